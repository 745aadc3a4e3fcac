"""Strict loading of the parts of a Stable Diffusion: every tensor and token is there, or an error names the file.

Where a tensor is missing, diffusers leaves a hole and transformers draws random numbers, both with a mere warning; a
tokenizer without its vocabulary silently maps every prompt to the same tokens.
"""

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.utils import logging as diffusers_logging
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.weights import check_finite, open_safetensors, read_head, read_pickle

# weight files of diffusers and transformers: one file or shards, in full precision or of the variant fp16
_WEIGHTS = re.compile(
    r"(diffusion_pytorch_model|model|pytorch_model)(\.fp16)?(-\d+-of-\d+)?(\.fp16)?\.(safetensors|bin)"
)
# files that hold a vocabulary: tokenizers' own, CLIP's, BERT's
VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("vocab.txt",))


def load_part(
    kind: type[nn.Module], model: str | Path, subfolder: str = "", dtype: torch.dtype = torch.float32, **options: Any
) -> nn.Module:
    """Load a network by `kind.from_pretrained` and check that all its tensors were there, with their shapes and finite.

    Args:
        kind: a model class of diffusers or transformers.
        model: local folder, or Hugging Face id. In a folder, safetensors are preferred to .bin, and the full precision
            to the variant fp16.
        subfolder: of the part.
        options: further arguments of `from_pretrained`.

    Raises:
        UserError: a folder that lacks the part or holds another one (the file and tensor are named). Unexpected tensors
            are refused too, except heads of a text encoder (a whole CLIP, BERT's pre-training).
        OSError: a Hugging Face id out of reach.
    """
    folder, name = Path(model) / subfolder, f"{model} {subfolder}".strip()
    if local := Path(model).is_dir():
        files, options["variant"] = _weight_files(folder)
        name = str(files[0] if len(files) == 1 else folder)
    try:
        with quiet():
            part, found = kind.from_pretrained(
                model,
                subfolder=subfolder,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are named below
                **options,
            )
    except Exception as error:  # config.json may hold anything
        if not local:
            raise
        for file in files:
            if file.suffix == ".bin":
                read_pickle(file)  # raises a clearer error
        raise UserError(f"{str(folder)!r} cannot be loaded ({first_line(error)}); save or fetch it again") from error
    if missing := sorted(found["missing_keys"]):
        raise UserError(f"{name!r} lacks {missing[0]}{_others(missing)}; save or fetch it again")
    if wrong := sorted(found["mismatched_keys"]):
        key, theirs, ours = wrong[0]
        shapes = f"{tuple(theirs)}, config.json says {tuple(ours)}"
        raise UserError(f"{name!r}: {key} has shape {shapes}{_others(wrong)}; save or fetch both again")
    if unexpected := _unexpected(part, found["unexpected_keys"]):
        others = _others(unexpected)
        raise UserError(f"{name!r} holds {unexpected[0]}{others}, unknown to config.json; save or fetch both again")
    check_finite(part.state_dict(), name)
    return part


def _weight_files(folder: Path) -> tuple[list[Path], str | None]:
    """Return the weight files that `from_pretrained` will read, each a readable one, and their variant."""
    _check_folder(folder)
    forms: dict[tuple[bool, bool], list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if match := _WEIGHTS.fullmatch(path.name):
            forms.setdefault((".fp16" in path.name, match[5] == "bin"), []).append(path)
    if not forms:
        raise UserError(f"{str(folder)!r} holds no weights (model.safetensors or the like); save or fetch it again")
    half, pickled = min(forms)
    for path in forms[half, pickled]:
        if pickled:
            read_head(path)
        else:
            with open_safetensors(path):
                pass
    return forms[half, pickled], "fp16" if half else None


def _unexpected(part: nn.Module, keys: Iterable[str]) -> list[str]:
    """Return the unexpected keys that are not of a text encoder's heads."""
    if isinstance(part, ModelMixin):
        return sorted(keys)
    children = {name for name, _ in part.named_children()}
    bare = [key.removeprefix(f"{part.base_model_prefix}.").removeprefix("text_model.") for key in keys]
    return sorted(key for key in bare if key.split(".")[0] in children and not key.endswith(".position_ids"))


def check_tokenizer_files(folder: str | Path) -> None:
    """Raise UserError for a local folder without a complete vocabulary."""
    folder = Path(folder)
    _check_folder(folder)
    present = {path.name for path in folder.iterdir() if path.is_file()}
    if any(present.issuperset(names) for names in VOCABULARIES):
        return
    partial = next((names for names in VOCABULARIES if present & set(names)), VOCABULARIES[0])
    missing = next(name for name in partial if name not in present)
    raise UserError(f"{str(folder)!r} lacks {missing}; copy or fetch the whole model again")


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"{str(folder.parent)!r} has no folder {folder.name}; copy or fetch the whole model again")


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, encoder: PreTrainedModel, name: str) -> None:
    """Raise UserError for a tokenizer that does not match the text encoder or has lost its vocabulary."""
    vocabulary, embeddings = tokenizer.get_vocab(), encoder.config.vocab_size
    positions = encoder.config.max_position_embeddings
    # letters, and words of its own without the marks of CLIP and BERT
    words = [token.removesuffix("</w>").removeprefix("##") for token in list(vocabulary)[:200]]
    probes = [*"abcdefghijklmnopqrstuvwxyz", *(word for word in words if word.isalnum())]
    problem = ""
    # fewer tokens than embeddings are fine: BioMedBERT has a longer table
    if (highest := max(vocabulary.values(), default=-1)) >= embeddings:
        problem = f"numbers its tokens up to {highest}, but the text encoder has {embeddings} embeddings"
    elif tokenizer.model_max_length > positions:
        problem = f"has no model_max_length up to the encoder's {positions} positions in tokenizer_config.json"
    elif tokenizer.pad_token_id is None:
        problem = "has no pad_token"
    elif lost := _tokens_without_merges(tokenizer):
        problem = f"cannot form {lost} of its {len(vocabulary)} tokens: merges (merges.txt, tokenizer.json) are missing"
    elif len({tuple(numbers) for numbers in tokenizer(probes).input_ids}) == 1:
        problem = "maps every prompt to the same tokens: its vocabulary is missing"
    if problem:
        raise UserError(f"{name}: the tokenizer {problem}; copy or fetch the whole model again")


def _tokens_without_merges(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the number of tokens of a byte-pair vocabulary that no merge forms, or 0 if it is below one per cent."""
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is None:
        return 0
    model = json.loads(backend.to_str())["model"]
    if model["type"] != "BPE":
        return 0
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    formed = {"".join(pair) for pair in pairs} | set(tokenizer.all_special_tokens)
    lost = sum(len(token.removesuffix("</w>")) > 1 and token not in formed for token in model["vocab"])
    return lost if lost > len(model["vocab"]) // 100 else 0


@contextmanager
def quiet() -> Iterator[None]:
    """Limit the logs of diffusers and transformers to errors within this context."""
    libraries = diffusers_logging, transformers_logging
    levels = [library.get_verbosity() for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
    try:
        yield
    finally:
        for library, level in zip(libraries, levels, strict=True):
            library.set_verbosity(level)


def _others(keys: list) -> str:
    return f" and {len(keys) - 1} more" if len(keys) > 1 else ""


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, or its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
