"""Which UNet belongs to which text encoder, written down where nothing else would tell.

A UNet trained for CLIP takes BERT's embeddings without complaint, their width being the same, and draws what it drew
before it was trained: pictures that look like something and mean nothing. So a model with a BERT keeps
`conditioning.json` beside model_index.json, with hashes of UNet, text encoder and tokenizer, and UNet weights saved
apart name the text encoder that they were trained with. Models with CLIP have neither.
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
_PARTS = ("unet", "text_encoder", "tokenizer")


def save_model(pipe: StableDiffusionPipeline, folder: str | Path) -> None:
    """Write the pipeline in diffusers format and, of one with BERT, its record, which comes last."""
    folder = Path(folder)
    pipe.save_pretrained(folder)
    if has_mask(pipe.text_encoder):
        files = {str(path.relative_to(folder)): sha256(path) for path in _files(folder)}
        record = {KEY: fingerprint(pipe.text_encoder), "tokens": pipe.tokenizer.model_max_length, "files": files}
        write_json(folder / RECORD, record)


def with_bert(pipe: StableDiffusionPipeline, model: str | Path, tokens: int) -> StableDiffusionPipeline:
    """The pipeline with a BERT (see `load_text_encoder`) in the place of its text encoder; its UNet is to be trained.

    Raises UserError where BERT's width is not that of the UNet's cross-attention.
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
    """What UNet weights of this pipeline state in their file, beside their format."""
    return {"format": "pt"} | ({KEY: fingerprint(pipe.text_encoder)} if has_mask(pipe.text_encoder) else {})


def check_model(pipe: StableDiffusionPipeline, folder: Path) -> None:
    """Raise UserError for a model folder with BERT whose UNet, text encoder or tokenizer is not the recorded one."""
    if not has_mask(pipe.text_encoder):
        return
    record = _record(folder)
    found = {str(path.relative_to(folder)): path for path in _files(folder)}
    for name, expected in record["files"].items():
        if name not in found or sha256(found[name]) != expected:
            problem = "is missing" if name not in found else "is not the one that was trained with the others"
            raise UserError(
                f"{str(folder / name)!r} {problem} (see {RECORD}); a UNet draws nothing meaningful from another text "
                "encoder's embeddings: copy the whole folder again, or train with scripts/train_sd.py"
            )


def check_unet_file(pipe: StableDiffusionPipeline, model: str | Path, path: str | Path) -> None:
    """Raise UserError for UNet weights that name another text encoder than the model's, or, for BERT, none."""
    with safe_open(path, framework="pt") as file:
        stated = (file.metadata() or {}).get(KEY)
    own = None
    if has_mask(pipe.text_encoder):
        own = _record(Path(model))[KEY] if Path(model).is_dir() else fingerprint(pipe.text_encoder)
    if stated != own:
        theirs, ours = ("CLIP, or none that they name" if one is None else f"BERT {one[:12]}" for one in (stated, own))
        raise UserError(
            f"UNet weights {str(path)!r} were trained with text encoder {theirs}; that of {str(model)!r} is {ours}: "
            "give the model that scripts/train_sd.py wrote beside them"
        )


def _record(folder: Path) -> dict:
    try:
        return read_json(folder / RECORD, {KEY: str, "files": {str: str}})
    except (OSError, UserError) as error:
        raise UserError(
            f"{str(folder)!r} has a BERT text encoder but no readable {RECORD}, so nothing says that its UNet was "
            "trained with it; give a folder that scripts/train_sd.py wrote"
        ) from error


def _files(folder: Path) -> list[Path]:
    return sorted(path for part in _PARTS for path in (folder / part).glob("*") if path.is_file())
