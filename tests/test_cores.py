"""Statistics are the same to the bit for any number of threads, of PyTorch and of NumPy's BLAS."""

import json
import os
import subprocess
import sys

import pytest
from launching import ROOT
from thread_statistics import statistics


@pytest.mark.slow
def test_statistics_do_not_depend_on_threads():
    """One thread of PyTorch and the BLAS threads of this process (in CI one), and another number of either."""
    here, blas_threads = statistics(1), 1 if os.environ.get("OMP_NUM_THREADS") == "2" else 2
    environment = os.environ | {"OMP_NUM_THREADS": str(blas_threads), "PYTHONPATH": str(ROOT)}
    environment["OMP_WAIT_POLICY"] = "passive"  # more threads than cores would spin in turns
    command = [sys.executable, "tests/thread_statistics.py", "3"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    assert len(here["500"]) == 12 and json.loads(run.stdout) == here
