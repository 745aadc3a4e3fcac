"""Read weight files without running code; errors say what a file is instead.

Browsers save login pages under the name of a checkpoint, clones without Git LFS hold pointers, full disks leave half a
file, and diverged training leaves NaN. All of these are recognised here and nowhere else.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from ddpo_pytorch.utils.errors import UserError, one_line

WRAPPERS = ("model_state_dict", "state_dict")  # names of the state dict in our and published classifiers, and timm's
TEXTS = {  # found in place of weights: their beginning -> description and advice
    "version https://git-lfs": "is a Git LFS pointer; fetch the file itself with `git lfs pull`",
    "<": "looks like a web page (HTML or XML); download it again, from a link that leads to the file itself",
    "{": "looks like JSON, perhaps a server's error message; download it again",
    "[": "looks like JSON, perhaps a server's error message; download it again",
    "": "is a text file; give the file of weights",
}
_NUMPY_SCALARS = [  # types of a loss or accuracy in a checkpoint, which cannot run code
    *((np._core.multiarray.scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *(np.dtype, np.dtypes.Float32DType, np.dtypes.Float64DType),
]


def read_tensors(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tensors of a weight file by name, on the CPU, and the metadata of a safetensors file, else {}.

    The content decides the format, unless the name ends in .safetensors. Raises UserError for a file that is missing,
    truncated or not a weight file (a web page, JSON, a Git LFS pointer), for a pickle of more than tensors, and for NaN
    or infinity.
    """
    path = Path(path)
    head = read_head(path)
    # safetensors begin with the length of a JSON header, then that header
    is_safetensors = head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size
    if path.suffix == ".safetensors" or is_safetensors:
        return read_safetensors(path)
    tensors = read_pickle(path)
    for name in WRAPPERS:
        if isinstance(tensors, Mapping) and name in tensors:
            tensors = tensors[name]
    if not isinstance(tensors, Mapping) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise UserError(f"{str(path)!r} holds more than tensors; give a state dict, tensors by name")
    check_finite(tensors, path)
    return dict(tensors), {}


def read_safetensors(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tensors by name, and the metadata, of a safetensors file. Raises UserError as `read_tensors` does."""
    with open_safetensors(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is not a dict)
        metadata = file.metadata() or {}
    check_finite(tensors, path)
    return tensors, metadata


@contextmanager
def open_safetensors(path: str | Path) -> Iterator[Any]:
    """Open a safetensors file and check its header against its length; tensors are not read yet. Raises UserError."""
    path = Path(path)
    read_head(path)
    try:
        opened = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        problem = f"is not a readable safetensors file ({one_line(error, 150)})"
        raise UserError(f"{str(path)!r} {problem}; fetch or save it again") from error
    with opened as file:
        yield file


def read_pickle(path: str | Path, mmap: bool = False) -> Any:
    """Return what `torch.save` wrote: tensors, numbers, strings and containers of them, on the CPU.

    Raises UserError for any other content, none of which is run, and for a file that is missing or damaged.
    """
    path = Path(path)
    read_head(path)
    try:
        with torch.serialization.safe_globals(_NUMPY_SCALARS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # a damaged pickle can fail in any way
        # not PyTorch's own message, which suggests disabling the protection
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        problem = f"holds more than plain tensors ({named[1]})" if named else "is damaged or holds more than tensors"
        problem += " and is not opened, since unpickling can run code"
        advice = "fetch or save it again, as safetensors or as tensors by name"
        raise UserError(f"{str(path)!r} {problem}; {advice}") from error


def check_finite(tensors: Mapping[str, torch.Tensor], file: str | Path) -> None:
    """Raise UserError naming `file` and the first tensor with NaN or infinity."""
    for name, value in tensors.items():
        if value.is_floating_point() and not (value.float() if value.itemsize == 1 else value).isfinite().all():
            problem = f"{str(file)!r}: {name} holds NaN or infinity as {str(value.dtype).removeprefix('torch.')}"
            reason = "the file is damaged or its training diverged"
            raise UserError(f"{problem}; {reason}: give other weights, or mixed_precision=bf16 if fp16 overflows")


def read_head(path: Path) -> bytes:
    """Return the first bytes (up to 1024) of a weight file. Raises UserError for one that is missing, empty or text."""
    if not path.is_file():
        raise UserError(f"{str(path)!r} does not exist or is not a file; give another path")
    with open(path, "rb") as file:
        head = file.read(1024)
    # safetensors have a NUL among their first 8 bytes, archives soon after, and other pickles do not begin with UTF-8
    if b"\0" in head[:32]:
        return head
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:  # else the last character is cut off
            return head
        text = head[: error.start].decode()
    text = text.removeprefix("\ufeff").lstrip()
    problem = next(problem for beginning, problem in TEXTS.items() if text.startswith(beginning))
    kind = "safetensors" if path.suffix == ".safetensors" else "weight"
    problem = problem if head else "is empty; fetch it again"
    raise UserError(f"{str(path)!r} is not a readable {kind} file: it {problem}")
