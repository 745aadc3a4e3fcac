"""The parts of a Stable Diffusion from files, each whole or not at all.

Where a tensor is missing, diffusers leaves a hole and transformers fills it with random numbers, both with a warning;
a tokenizer without its vocabulary maps every prompt to the same tokens, without one. Here each of these is an error
that names the file and the tensor.
"""

import json
import re
from collections.abc import Iterator
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
from ddpo_pytorch.utils.weights import check_finite, open_safetensors, read_pickle, refuse_text

# Weight files of diffusers and transformers, whole or in shards, of the full precision or of the variant fp16.
_WEIGHTS = re.compile(
    r"(diffusion_pytorch_model|model|pytorch_model)(\.fp16)?(-\d+-of-\d+)?(\.fp16)?\.(safetensors|bin)"
)
# Files that hold a vocabulary: tokenizers' own, CLIP's, BERT's.
VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("vocab.txt",))


def load_part(
    kind: type[nn.Module], model: str | Path, subfolder: str = "", dtype: torch.dtype = torch.float32, **options: Any
) -> nn.Module:
    """Load a network by `kind.from_pretrained`, with every tensor that it has, of its shape and finite in `dtype`.

    Args:
        kind: a model class of diffusers or transformers.
        model: local folder, or Hugging Face id. In a folder, safetensors are taken before .bin, and the full precision
            before the variant fp16.
        subfolder: of the part.
        options: further arguments of `from_pretrained`.

    Raises:
        UserError: for a folder that lacks the part or holds another, by file and tensor. Tensors beyond those of the
            network are refused in diffusers' models and within a text encoder's own modules; those of other heads
            (of a whole CLIP, of BERT's pre-training) are left out.
        OSError: for a Hugging Face id out of reach.
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
                ignore_mismatched_sizes=True,  # to be named below
                **options,
            )
    except Exception as error:  # config.json may hold anything
        if not local:
            raise
        for file in files:
            if file.suffix == ".bin":
                read_pickle(file)  # says it better
        raise UserError(f"{str(folder)!r} cannot be loaded ({first_line(error)}); save or fetch it again") from error
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        raise UserError(f"{name!r} lacks {missing[0]}{_others(missing)}; save or fetch it again")
    if found["mismatched_keys"]:
        wrong = sorted(found["mismatched_keys"])
        key, theirs, ours = wrong[0]
        raise UserError(
            f"{name!r}: {key} has shape {tuple(theirs)}, by config.json it is {tuple(ours)}{_others(wrong)}; weights "
            "and config.json do not belong together"
        )
    if unexpected := sorted(_own(part, found["unexpected_keys"])):
        raise UserError(
            f"{name!r} holds {unexpected[0]}{_others(unexpected)}, for which config.json has no place; weights and "
            "config.json do not belong together"
        )
    check_finite(part.state_dict(), name)
    return part


def _weight_files(folder: Path) -> tuple[list[Path], str | None]:
    """Return the weight files of a part's folder that will be read, and their variant. Each is a whole weight file."""
    if not folder.is_dir():
        raise UserError(f"{str(folder.parent)!r} has no folder {folder.name}; copy or fetch the whole model again")
    forms: dict[tuple[bool, bool], list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if match := _WEIGHTS.fullmatch(path.name):
            forms.setdefault((".fp16" in path.name, match[5] == "bin"), []).append(path)
    if not forms:
        raise UserError(f"{str(folder)!r} holds no weights (model.safetensors or the like); save or fetch it again")
    half, pickled = min(forms)
    for path in forms[half, pickled]:
        if pickled:
            refuse_text(path)
        else:
            with open_safetensors(path):
                pass
    return forms[half, pickled], "fp16" if half else None


def _own(part: nn.Module, keys: Any) -> list[str]:
    """Return those of unexpected keys that name a place within the part; all of them for diffusers' models."""
    if isinstance(part, ModelMixin):
        return list(keys)
    children = {name for name, _ in part.named_children()}
    bare = [key.removeprefix(f"{part.base_model_prefix}.").removeprefix("text_model.") for key in keys]
    return [key for key in bare if key.split(".")[0] in children and not key.endswith(".position_ids")]


def check_tokenizer_files(folder: str | Path) -> None:
    """Raise UserError for a local folder without a vocabulary, naming what it lacks."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{str(folder.parent)!r} has no folder {folder.name}; copy or fetch the whole model again")
    there = {path.name for path in folder.iterdir() if path.is_file()}
    if any(there.issuperset(names) for names in VOCABULARIES):
        return
    begun = next((names for names in VOCABULARIES if there & set(names)), VOCABULARIES[0])
    lacking = next(name for name in begun if name not in there)
    raise UserError(
        f"{str(folder)!r} lacks {lacking}; a tokenizer needs {' or '.join(map(' and '.join, VOCABULARIES))}: copy or "
        "fetch the whole model again"
    )


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, encoder: PreTrainedModel, name: str) -> None:
    """Raise UserError where a tokenizer is not the text encoder's, or has lost its vocabulary.

    The encoder may have more embeddings than there are tokens: BioMedBERT's table is longer.
    """
    vocabulary, table = tokenizer.get_vocab(), encoder.config.vocab_size
    if (highest := max(vocabulary.values(), default=-1)) >= table:
        raise UserError(
            f"{name}: the tokenizer numbers {len(vocabulary)} tokens up to {highest}, the text encoder has {table} "
            "embeddings; they do not belong together"
        )
    positions = encoder.config.max_position_embeddings
    if tokenizer.model_max_length > positions:
        raise UserError(
            f"{name}: tokenizer_config.json of the tokenizer states no model_max_length up to {positions}, the "
            "positions of the text encoder; copy or fetch the whole model again"
        )
    if tokenizer.pad_token_id is None:
        raise UserError(f"{name}: the tokenizer has no pad_token; copy or fetch the whole model again")
    if lost := _without_merges(tokenizer):
        raise UserError(
            f"{name}: the tokenizer cannot form {lost} of its {len(vocabulary)} tokens, since their merges are missing "
            "(merges.txt or tokenizer.json); copy or fetch the whole model again"
        )
    # letters, and words of its own, without the marks of CLIP and BERT
    words = [token.removesuffix("</w>").removeprefix("##") for token in list(vocabulary)[:200]]
    probes = [*"abcdefghijklmnopqrstuvwxyz", *(word for word in words if word.isalnum())]
    if len({tuple(numbers) for numbers in tokenizer(probes).input_ids}) == 1:
        raise UserError(
            f"{name}: the tokenizer maps every prompt to the same tokens, its vocabulary is missing; copy or fetch the "
            "whole model again"
        )


def _without_merges(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return how many tokens of a byte-pair vocabulary no merge forms, where it is more than a hundredth of them."""
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
    """Within it, diffusers and transformers report errors only."""
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
    """Return the first line of an error's text, or its kind where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
