"""Records that tie a UNet to the BERT it was trained with.

A UNet trained with CLIP accepts BERT's embeddings, which have the same width, and draws meaningless images. A model
with BERT therefore has conditioning.json next to model_index.json, with hashes of UNet, text encoder and tokenizer, and
separate UNet weights name their text encoder in their metadata. Models with CLIP have neither.
"""

from pathlib import Path

from diffusers import StableDiffusionPipeline
from safetensors import safe_open

from ddpo_pytorch.generator.text import has_mask, load_text_encoder, mask_padding
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.files import sha256, write_json
from ddpo_pytorch.utils.fingerprint import fingerprint
from ddpo_pytorch.utils.json_files import read_json

RECORD = "conditioning.json"
KEY = "text_encoder_sha256"


def save_model(pipe: StableDiffusionPipeline, folder: str | Path) -> None:
    """Write the pipeline in diffusers format, with conditioning.json (last) if its text encoder is a BERT."""
    folder = Path(folder)
    pipe.save_pretrained(folder)
    if has_mask(pipe.text_encoder):
        files = {name: sha256(path) for name, path in _files(folder).items()}
        record = {KEY: fingerprint(pipe.text_encoder), "tokens": pipe.tokenizer.model_max_length, "files": files}
        write_json(folder / RECORD, record)


def with_bert(pipe: StableDiffusionPipeline, model: str | Path, tokens: int) -> StableDiffusionPipeline:
    """Return the pipeline with the BERT `model` (see `load_text_encoder`) as text encoder, for its UNet to be trained.

    Raises UserError for a text encoder that is no BERT, or whose width differs from the UNet's cross-attention.
    """
    tokenizer, encoder = load_text_encoder(model, tokens, pipe.device)
    if not has_mask(encoder):
        raise UserError(f"sd.bert is {str(model)!r}, which is no BERT; give one, or sd.text_encoder=clip")
    width, expected = encoder.config.hidden_size, pipe.unet.config.cross_attention_dim
    if width != expected:
        raise UserError(f"sd.bert {str(model)!r} has width {width}, the UNet expects {expected}; give another one")
    parts = pipe.components | {"tokenizer": tokenizer, "text_encoder": encoder.to(pipe.text_encoder.dtype)}
    mask_padding(pipe.unet, encoder)
    return StableDiffusionPipeline(**parts, requires_safety_checker=False)


def unet_metadata(pipe: StableDiffusionPipeline) -> dict[str, str]:
    """Return the metadata for a file of this pipeline's UNet weights."""
    return {"format": "pt"} | ({KEY: fingerprint(pipe.text_encoder)} if has_mask(pipe.text_encoder) else {})


def check_model(pipe: StableDiffusionPipeline, folder: Path) -> None:
    """Raise UserError for a folder with BERT whose UNet, text encoder or tokenizer is not the recorded one."""
    if not has_mask(pipe.text_encoder):
        return
    files = _files(folder)
    for name, expected in _record(folder)["files"].items():
        if name not in files or sha256(files[name]) != expected:
            problem = "is missing" if name not in files else "is not the one that was trained with the others"
            raise UserError(f"{str(folder / name)!r} {problem} (see {RECORD}); copy the whole folder again")


def check_unet_file(pipe: StableDiffusionPipeline, model: str | Path, path: str | Path) -> None:
    """Raise UserError for UNet weights that were trained with another text encoder than the model's."""
    with safe_open(path, framework="pt") as file:
        stated = (file.metadata() or {}).get(KEY)
    own = None
    if has_mask(pipe.text_encoder):
        own = _record(Path(model))[KEY] if Path(model).is_dir() else fingerprint(pipe.text_encoder)
    if stated != own:
        theirs, ours = ("CLIP (or one not recorded)" if one is None else f"BERT {one[:12]}" for one in (stated, own))
        raise UserError(f"UNet weights {str(path)!r} are for text encoder {theirs}; {str(model)!r} has {ours}")


def _record(folder: Path) -> dict:
    try:
        return read_json(folder / RECORD, {KEY: str, "files": {str: str}})
    except (OSError, UserError) as error:
        raise UserError(f"{str(folder)!r} has a BERT but no readable {RECORD}; copy the whole folder again") from error


def _files(folder: Path) -> dict[str, Path]:
    """Return the recorded parts' files by path relative to the folder."""
    parts = ("unet", "text_encoder", "tokenizer")
    paths = sorted(path for part in parts for path in (folder / part).glob("*") if path.is_file())
    return {str(path.relative_to(folder)): path for path in paths}
