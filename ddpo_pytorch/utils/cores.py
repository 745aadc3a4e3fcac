"""Thread counts, and results that do not depend on them.

The last bits of a sum or matrix product depend on how it is split among threads. Results that must not depend on the
number of threads or processes are therefore each computed by a single thread, many of them at the same time.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import numpy as np
import psutil
import torch

MOST_WORKERS = 16  # each needs its own memory
LAUNCHERS = re.compile(r"(.*/)?(accelerate(-launch)?|torchrun)|(torch\.distributed|accelerate\.commands)\..*")
LAUNCHER_OPTION = re.compile(r"--?num[-_]cpu[-_]threads[-_]per[-_]process(=.*)?")


def available_cores() -> int:
    """Return the number of cores that this process may use (taskset, cpusets), or that of the machine if unknown."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def thread_limit() -> int:
    """Return the number of available cores, or the user's OMP_NUM_THREADS or MKL_NUM_THREADS if that is less.

    torchrun and `accelerate launch` set OMP_NUM_THREADS for their processes, by default to 1. That is ignored, unless
    the user set it in the launcher's environment or by the launcher's option.
    """
    limits, given = [available_cores()], dict(os.environ)
    with suppress(psutil.Error):  # e.g. another user's process
        parent = psutil.Process(os.getppid())
        words = parent.cmdline()
        if any(map(LAUNCHERS.fullmatch, words)) and not any(map(LAUNCHER_OPTION.fullmatch, words)):
            given = parent.environ()
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        number = re.match(r"[1-9]\d*", os.environ.get(name, ""))  # OpenMP allows a list, one per level
        if number and name in given:
            limits.append(int(number.group()))
    return min(limits)


@contextmanager
def one_thread() -> Iterator[None]:
    """Limit PyTorch to one CPU thread. Also a decorator."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@one_thread()
def on_all_cores(function: Callable[..., Any], items: Iterable[Any]) -> list[Any]:
    """Return function(item) of all items in order, each computed by one thread. Raises the first item's error."""
    workers = min(thread_limit(), MOST_WORKERS)
    with ThreadPoolExecutor(workers, initializer=partial(torch.set_num_threads, 1)) as pool:
        return list(pool.map(function, items))


@one_thread()
def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return a @ b.T (N, M) of float64 arrays (N, F) and (M, F), the same to the bit for any number of threads."""
    # PyTorch, since the threads of NumPy's BLAS cannot be changed; copies, since alignment can change the last bits
    return (torch.tensor(a) @ torch.tensor(b).T).numpy()


@one_thread()
def eigenvalues(symmetric: np.ndarray) -> np.ndarray:
    """Return the ascending eigenvalues (..., N) of symmetric matrices (..., N, N), as reproducibly as `product`."""
    return torch.linalg.eigvalsh(torch.tensor(symmetric)).numpy()
