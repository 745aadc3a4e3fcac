"""How many threads this process may run, and results that do not depend on that number.

The number is that of the cores the process is bound to, within the limit that the user has set. How a sum or a matrix
product is divided among threads decides its last bits; so what must not depend on their number, nor on that of the
processes that share the cores, is computed by one thread, and many such computations at the same time.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

MOST_WORKERS = 16  # each holds memory of its own
LIMITS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
LAUNCHERS = re.compile(r"(.*/)?(accelerate(-launch)?|torchrun)|(torch\.distributed|accelerate\.commands)\..*")
LAUNCHER_OPTION = re.compile(r"--?num[-_]cpu[-_]threads[-_]per[-_]process(=.*)?")


def available_cores() -> int:
    """Return the number of cores that this process is bound to (taskset, cpusets), else that of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def thread_limit() -> int:
    """Return the number of threads that this process may run: all its cores, but at most what the user allows."""
    return min([available_cores(), *_user_limits()])


@contextmanager
def one_thread() -> Iterator[None]:
    """Let PyTorch compute on a CPU by one thread. Also a decorator."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@one_thread()
def on_all_cores(function: Callable[..., Any], items: Iterable[Any]) -> list[Any]:
    """Return function(item) of all items in order, each by one thread. Raises the first item's error there is."""
    workers = min(thread_limit(), MOST_WORKERS)
    with ThreadPoolExecutor(workers, initializer=partial(torch.set_num_threads, 1)) as pool:
        return list(pool.map(function, items))


@one_thread()
def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return a @ b.T (N, M) of float64 arrays (N, F) and (M, F), the same to the bit for any number of threads.

    By PyTorch, whose threads can be set: NumPy's BLAS takes their number from the environment when it is loaded.
    Copies, since alignment in memory can decide last bits, too.
    """
    return (torch.tensor(a) @ torch.tensor(b).T).numpy()


@one_thread()
def eigenvalues(symmetric: np.ndarray) -> np.ndarray:
    """Return the eigenvalues (..., N) in ascending order of symmetric matrices (..., N, N), as reproducibly."""
    return torch.linalg.eigvalsh(torch.tensor(symmetric)).numpy()


def _user_limits() -> list[int]:
    """Return the values of `LIMITS` that the user has set.

    torchrun and `accelerate launch` set OMP_NUM_THREADS for the processes they start, 1 by default, whatever the number
    of cores. Such a value is theirs, and no limit, if their own environment lacks it and no option asked for it. Where
    that cannot be read (not on Linux, or another program stands between), the limit is respected.
    """
    given = [name for name in LIMITS if re.match(r"[1-9]\d*", os.environ.get(name, ""))]
    if given and (launcher := _launcher_environment()) is not None:
        given = [name for name in given if name in launcher]
    return [int(re.match(r"\d+", os.environ[name]).group()) for name in given]  # OpenMP allows a list, one per level


def _launcher_environment() -> Mapping[str, str] | None:
    """Return the environment that the user gave to the launcher of this process; None without one, or unknown."""
    process = Path("/proc", str(os.getppid()))
    try:
        words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
        lines = (process / "environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return None
    if not any(LAUNCHERS.fullmatch(word) for word in words) or any(LAUNCHER_OPTION.fullmatch(word) for word in words):
        return None
    return dict(line.split("=", 1) for line in lines if "=" in line)
