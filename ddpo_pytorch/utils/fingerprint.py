"""Fingerprints of everything that determines a result, compared before work is resumed.

Output folders and training states record them next to their settings, since a path does not identify its content.
"""

import hashlib
import inspect
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.files import sha256
from ddpo_pytorch.utils.published import resolve

PIPELINE_PARTS = ("scheduler", "text_encoder", "tokenizer", "unet", "vae")
# files of a folder that count: weights, configurations, vocabularies and tables; not images, logs, unfinished states
_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".json", ".txt", ".csv", ".npz", ".onnx", ".py")
_UNFINISHED = ".unfinished.pt"
_IGNORED = {"architectures", "dtype", "torch_dtype", "transformers_version"}  # the dtype is hashed with the weights


def fingerprint(*parts: Any) -> str:
    """Return the SHA-256, in hex, of parts in their order; it is equal for equal contents, whatever their paths.

    A part may be a network (its `config`, and weights without adapters), a state dict, a tokenizer, a scheduler, the
    Path of a file or folder (of which weights, configurations and tables count), plain values, or mappings and lists of
    these. Only entries of a configuration that differ from the defaults of its class count, so that new entries in a
    later library version change nothing.
    """
    return hashlib.sha256(b"".join(map(_digest, parts))).hexdigest()


def pipeline_fingerprints(pipe: Any, parts: Iterable[str] = PIPELINE_PARTS) -> dict[str, str]:
    """Return the fingerprint of each part of a Stable Diffusion: {"model.unet": ..., "model.tokenizer": ..., ...}."""
    return {f"model.{name}": fingerprint(getattr(pipe, name)) for name in parts}


def with_contents(settings: Any) -> Any:
    """Return settings in which each string that names an existing file or folder is replaced by its Path.

    A plain word, without slash or dot, is not taken for a path, even if a folder of that name exists.
    """
    if isinstance(settings, Mapping):
        return {name: with_contents(value) for name, value in settings.items()}
    if isinstance(settings, list | tuple):
        return [with_contents(value) for value in settings]
    if isinstance(settings, str) and re.search(r"[/\\.]", settings) and "\0" not in settings and len(settings) < 4096:
        path = resolve(settings)
        return path if path.exists() else settings
    return settings


def _digest(part: Any) -> bytes:
    kind = "path" if isinstance(part, Path) else "module" if isinstance(part, nn.Module) else "value"
    return hashlib.sha256(b"".join((kind.encode(), *_pieces(part)))).digest()


def _pieces(part: Any) -> Iterator[bytes]:
    if isinstance(part, Path) and part.is_file():
        yield _file_digest(part)
    elif isinstance(part, Path):
        if not part.is_dir():
            raise UserError(f"{str(part)!r} does not exist; give an existing file or folder")
        for file in sorted(part.rglob("*")):
            local = file.relative_to(part)
            hidden = any(name.startswith(".") for name in local.parts)
            if file.suffix in _SUFFIXES and file.is_file() and not hidden and not file.name.endswith(_UNFINISHED):
                yield _json(local.as_posix())
                yield _file_digest(file)
    elif isinstance(part, nn.Module):
        yield _json(_settings_of(part.config, type(part)) if hasattr(part, "config") else {})
        state = part.state_dict()
        yield from _tensors({name.replace(".base_layer.", "."): state[name] for name in state if ".lora_" not in name})
    elif hasattr(part, "backend_tokenizer"):
        backend = json.loads(part.backend_tokenizer.to_str())
        # padding and truncation are those of the last call
        yield _json({name: value for name, value in backend.items() if name not in ("padding", "truncation")})
        yield _json([part.special_tokens_map, part.model_max_length, part.padding_side])
    elif isinstance(part, Mapping) and part and all(isinstance(value, torch.Tensor) for value in part.values()):
        yield from _tensors(part)
    elif isinstance(part, Mapping):
        for name in sorted(part, key=str):
            yield _json(str(name))
            yield _digest(part[name])
    elif isinstance(part, list | tuple):
        yield from map(_digest, part)
    elif hasattr(part, "config"):  # a scheduler
        yield _json(_settings_of(part.config, type(part)))
    else:
        yield _json(part)


def _tensors(state: Mapping[str, torch.Tensor]) -> Iterator[bytes]:
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest = hashlib.sha256(_json([name, str(value.dtype), list(value.shape)]))
        digest.update(value.flatten().view(torch.uint8).numpy().data)
        yield digest.digest()


def _settings_of(config: Any, owner: type) -> dict[str, Any]:
    """Return the entries of a configuration that have an effect and differ from the defaults of the class."""
    if hasattr(config, "to_diff_dict"):  # transformers
        config = config.to_diff_dict()
    parameters = inspect.signature(owner.__init__).parameters
    defaults = {name: _json(parameter.default) for name, parameter in parameters.items()}
    effective = {name: value for name, value in config.items() if not name.startswith("_") and name not in _IGNORED}
    return {name: value for name, value in effective.items() if _json(value) != defaults.get(name)}


def _file_digest(path: Path) -> bytes:
    status = path.stat()
    return _hash_once(path.resolve(), status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@cache
def _hash_once(path: Path, *_: int) -> bytes:
    """Return the SHA-256 of a file, computed once per process while its size and times stay the same."""
    return bytes.fromhex(sha256(path))


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, default=str).encode()
