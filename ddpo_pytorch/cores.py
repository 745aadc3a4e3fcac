"""How many threads this process may run: the cores it is bound to, and the limit that the user has set."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

LIMITS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
LAUNCHERS = re.compile(r"(.*/)?(accelerate(-launch)?|torchrun)|(torch\.distributed|accelerate\.commands)\..*")
LAUNCHER_OPTION = re.compile(r"--?num[-_]cpu[-_]threads[-_]per[-_]process(=.*)?")


def available_cores() -> int:
    """Return the number of cores that this process is bound to (taskset, cpusets), else that of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def thread_limit() -> int:
    """Return the number of threads that this process may run: all its cores, but at most what the user allows."""
    return min([available_cores(), *_user_limits()])


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
