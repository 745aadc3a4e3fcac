"""Strict loading of the parts of Stable Diffusion: every tensor and token is present, or an error names the file.

If a tensor is missing, diffusers and transformers only warn and leave random or uninitialised values; a tokenizer
without its vocabulary silently maps every prompt to the same tokens.
"""

import json
import logging
import re
import string
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ddpo_pytorch.utils.errors import UserError, one_line
from ddpo_pytorch.utils.weights import check_finite, read_tensors

# weight files of diffusers and transformers: one file or shards, in full precision or the variant fp16
_WEIGHTS = re.compile(r"(diffusion_pytorch_|pytorch_)?model(\.fp16)?(-\d+-of-\d+)?(\.fp16)?\.(safetensors|bin)")
# files that hold a vocabulary: tokenizers' own, CLIP's, BERT's
VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("vocab.txt",))
Tensors = Mapping[str, torch.Tensor]


def load_part(
    kind: type[nn.Module], model: str | Path, subfolder: str = "", dtype: torch.dtype = torch.float32, **options: Any
) -> nn.Module:
    """Load a network with `kind.from_pretrained`; check that every tensor was found, has its shape and is finite.

    `model` is a local folder, where safetensors are preferred to .bin and full precision to the variant fp16, or a
    Hugging Face id (OSError if it is unreachable). Raises UserError for a folder that lacks the part or holds another
    one, naming file and tensor. Unexpected tensors are rejected too, except heads of a text encoder (a whole CLIP,
    BERT's pre-training).
    """
    folder, name = Path(model) / subfolder, f"{model} {subfolder}".strip()
    if local := Path(model).is_dir():
        forms: dict[tuple[bool, bool], list[Path]] = {}  # files by (is fp16, is .bin); the least is read
        for path in sorted(folder.glob("*")):
            if match := _WEIGHTS.fullmatch(path.name):
                forms.setdefault((".fp16" in path.name, match[5] == "bin"), []).append(path)
        if not forms:
            raise UserError(f"{str(folder)!r} holds no weights (model.safetensors or the like); save or fetch it again")
        (half, _), files = min(forms.items())
        options["variant"] = "fp16" if half else None
        name = str(files[0] if len(files) == 1 else folder)
    try:
        with quiet():
            options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # reported below
            part, found = kind.from_pretrained(model, subfolder=subfolder, dtype=dtype, **options)
    except Exception as error:  # config.json may hold anything
        if not local:
            raise
        for file in files:
            read_tensors(file)  # raises a clearer error
        raise UserError(f"{str(folder)!r} cannot be loaded ({one_line(error)}); save or fetch it again") from error
    unexpected = found["unexpected_keys"]
    if not isinstance(part, ModelMixin):  # leave out the heads of a text encoder
        children = {child for child, _ in part.named_children()}
        bare = [key.removeprefix(f"{part.base_model_prefix}.").removeprefix("text_model.") for key in unexpected]
        unexpected = [key for key in bare if key.split(".")[0] in children and not key.endswith(".position_ids")]
    mismatched = [f"{key} of shape {tuple(theirs)}, not {tuple(own)}" for key, theirs, own in found["mismatched_keys"]]
    problems = ("lacks", "differs from config.json: it has", "has no place in config.json for")
    for problem, keys in zip(problems, (found["missing_keys"], mismatched, unexpected), strict=True):
        if keys:
            others = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise UserError(f"{name!r} {problem} {min(keys)}{others}; save or fetch both again")
    check_finite(part.state_dict(), name)
    # The tensors are views of the memory-mapped file, at arbitrary alignment. On some CPUs, alignment affects how
    # products are rounded, so the same weights in another file would give different images.
    for tensor in (*part.parameters(), *part.buffers()):
        tensor.data = tensor.data.clone()
    return part


def check_fit(given: Tensors, expected: Tensors, file: str | Path, advice: str, names: Mapping[str, str] = {}) -> None:
    """Raise UserError unless a file's tensors match `expected`; `names` maps keys to the names in the file."""
    for key in (*given, *expected):
        name = names.get(key, key)
        if key not in expected:
            raise UserError(f"{file} holds {name}, which the model lacks; {advice}")
        if key not in given:
            raise UserError(f"{file} lacks {name}; {advice}")
        if (shape := tuple(given[key].shape)) != (wanted := tuple(expected[key].shape)):
            raise UserError(f"{file} holds {name} of shape {shape}, the model expects {wanted}; {advice}")


def check_tokenizer_files(folder: str | Path) -> None:
    """Raise UserError for a local folder without a complete vocabulary."""
    present = {path.name for path in Path(folder).glob("*") if path.is_file()}
    if not any(present.issuperset(names) for names in VOCABULARIES):
        begun = next(filter(present.intersection, VOCABULARIES), VOCABULARIES[0])
        missing = next(name for name in begun if name not in present)
        raise UserError(f"{str(folder)!r} lacks {missing}; copy or fetch the whole model again")


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, encoder: PreTrainedModel, name: str) -> None:
    """Raise UserError for a tokenizer that does not match the text encoder or has lost its vocabulary."""
    vocabulary, embeddings = tokenizer.get_vocab(), encoder.config.vocab_size
    positions = encoder.config.max_position_embeddings
    # letters, and some of its own words without the markers of CLIP and BERT
    words = [token.removesuffix("</w>").removeprefix("##") for token in list(vocabulary)[:200]]
    probes, problem = [*string.ascii_lowercase, *filter(str.isalnum, words)], ""
    # fewer tokens than embeddings are fine, as in BioMedBERT
    if (highest := max(vocabulary.values(), default=-1)) >= embeddings:
        problem = f"has token ids up to {highest}, but the text encoder has {embeddings} embeddings"
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
    """Return the number of tokens of a byte-pair vocabulary that no merge forms, or 0 if they are at most 1%."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = json.loads(backend.to_str())["model"] if backend else {}
    if model.get("type") != "BPE":
        return 0
    formed = {"".join(merge).replace(" ", "") for merge in model["merges"]} | set(tokenizer.all_special_tokens)
    lost = sum(len(token.removesuffix("</w>")) > 1 and token not in formed for token in model["vocab"])
    return lost if lost > len(model["vocab"]) // 100 else 0


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the warnings of diffusers and transformers within this context."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
