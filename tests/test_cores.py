"""Statistics are the same to the bit for any number of threads, of PyTorch and of NumPy's BLAS."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from launching import ROOT

from ddpo_pytorch.judges.classifier_report import Report
from ddpo_pytorch.metrics import diversity, fidelity, memorisation


def statistics(threads: int) -> dict[str, list[str]]:
    """Return statistics of the metrics by this number of PyTorch's threads, as text."""
    torch.set_num_threads(threads)
    rng, found = np.random.default_rng(0), {}
    for count, width in ((500, 700), (63, 1280)):  # sizes at which products by several threads differ
        x, y = rng.standard_normal((count, width)), rng.standard_normal((count, width)) + 0.1
        parts = [fidelity.moments(part) for part in np.array_split(x, 3)]
        real = fidelity.moments(y)
        frechet, kid = fidelity.frechet_jackknife(parts, real), fidelity.kernel_distance(x, y, 0, subsets=3)
        spread = diversity.within_prompt_diversity(x, np.arange(count) % 9, 7, 0, replicates=20).values()
        found[count] = [frechet.value, frechet.low, fidelity.frechet_distance(parts[0], real), kid.value, kid.high]
        near = fidelity.manifold_metrics(x, y, block=100).values()
        found[count] += [estimate.high for estimate in (*near, *spread)]
        found[count] += [memorisation.nearest(x, y, block=100)[0].sum()]
    labels = torch.tensor(rng.integers(0, 2, (3000, 1)))
    report = Report(labels + torch.tensor(rng.standard_normal((3000, 1))), labels, ("hair",), resamples=50)
    found["ece"] = [value for row in report.rows for value in row.values()]
    return {str(key): [str(value) for value in values] for key, values in found.items()}


@pytest.mark.slow
def test_statistics_do_not_depend_on_threads():
    """One thread of PyTorch and the BLAS threads of this process (in CI one), and another number of either."""
    here, blas_threads = statistics(1), 1 if os.environ.get("OMP_NUM_THREADS") == "2" else 2
    environment = os.environ | {"OMP_NUM_THREADS": str(blas_threads), "PYTHONPATH": str(ROOT)}
    environment["OMP_WAIT_POLICY"] = "passive"  # more threads than cores would spin in turns
    command = [sys.executable, "-c", "import json, test_cores; print(json.dumps(test_cores.statistics(3)))"]
    run = subprocess.run(command, cwd=ROOT / "tests", env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    assert len(here["500"]) == 12 and json.loads(run.stdout) == here
