"""Text encoders: CLIP as in Stable Diffusion, or BERT (BioMedBERT) with its padding masked in the UNet.

Stable Diffusion attends to all 77 positions of CLIP, which was trained with padding. BERT's padding means nothing, so
its embeddings are exactly 0 there (and nowhere else), and the UNet of such a pipeline derives its attention mask from
them (`mask_padding`). BERT's last hidden states have the width of the UNet's cross-attention (768): no projection.
"""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer, BertModel, CLIPTextModel, PreTrainedModel, PreTrainedTokenizerBase

from ddpo_pytorch.generator.parts import check_tokenizer, check_tokenizer_files, load_part
from ddpo_pytorch.utils.errors import UserError, one_line

logger = logging.getLogger(__name__)
TOKENS = 256  # default length of BERT prompts, with [CLS] and [SEP]: half of BioMedBERT's positions
KINDS = {"bert": BertModel, "clip_text_model": CLIPTextModel}  # by model_type in config.json
TextEncoder = tuple[PreTrainedTokenizerBase, PreTrainedModel]


def load_text_encoder(model: str | Path, tokens: int = TOKENS, device: str | torch.device = "cpu") -> TextEncoder:
    """Load tokenizer and frozen encoder, float32, in evaluation mode.

    `model` is a folder in diffusers format (its tokenizer/ and text_encoder/) or transformers format, or a Hugging Face
    id; `tokens` is the length of BERT's prompts, limited by its positions. Raises UserError if there is no such model,
    it is neither BERT nor CLIP, files are incomplete (see `load_part`), or the tokenizer does not match.
    """
    folder = Path(model).expanduser()
    model, part = str(model), ""
    if local := folder.is_dir():
        model, part = str(folder), "text_encoder" if (folder / "text_encoder").is_dir() else ""
        check_tokenizer_files(folder / "tokenizer" if part else folder)
    try:
        encoder = load_encoder(model, part)
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer" if part else model, trust_remote_code=False)
    except UserError:
        raise
    except Exception as error:  # tokenizer.json and config.json may hold anything
        reason = one_line(error) if local else "neither a local folder nor reachable on the hub"
        raise UserError(f"text encoder {model!r}: {reason}; check the name, or save or fetch it again") from error
    if has_mask(encoder):
        tokenizer.model_max_length = min(tokens, encoder.config.max_position_embeddings)
    check_tokenizer(tokenizer, encoder, model)
    return tokenizer, encoder.requires_grad_(False).eval().to(device)


def load_encoder(model: str, part: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load a BERT or CLIP from subfolder `part` of a folder or Hugging Face id. Raises UserError for other kinds."""
    kind = AutoConfig.from_pretrained(model, subfolder=part, trust_remote_code=False).model_type
    if kind not in KINDS:
        raise UserError(f"text encoder {model!r} is a {kind!r}; allowed are BERT and CLIP's text model")
    # the pooler only serves next-sentence prediction, and published files may lack it
    options = {"add_pooling_layer": False} if kind == "bert" else {}
    return load_part(KINDS[kind], model, part, dtype, **options)


def has_mask(encoder: nn.Module) -> bool:
    """Return whether the encoder's padding is masked: BERT's is; CLIP's is not, as in Stable Diffusion."""
    return encoder.config.model_type == "bert"


def tokenize(tokenizer: PreTrainedTokenizerBase, prompts: Iterable[str]) -> torch.Tensor:
    """Return token ids (N, L) of N prompts, padded or truncated to L = `tokenizer.model_max_length`."""
    return tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt").input_ids


def too_long(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[str]:
    """Return the prompts that `tokenize` truncates."""
    ids = tokenizer(list(prompts), truncation=False, verbose=False).input_ids if prompts else []
    return [prompt for prompt, own in zip(prompts, ids, strict=True) if len(own) > tokenizer.model_max_length]


def check_tokens(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], what: str = "prompts") -> None:
    """Warn about truncated prompts; raise UserError if different prompts all become the same tokens.

    The tokenizer then knows none of their words and letters. Prompts that differ only in case and spaces count as one.
    """
    if cut := too_long(tokenizer, prompts):
        limit = tokenizer.model_max_length
        logger.warning("%d %s exceed %d tokens and are truncated, the first is %r", len(cut), what, limit, cut[0])
    if len({" ".join(prompt.lower().split()) for prompt in prompts}) > 1:
        if len({tuple(ids) for ids in tokenizer(list(prompts), verbose=False).input_ids}) == 1:
            problem = f"the tokenizer maps all {len(prompts)} {what} to the same tokens, the first is {prompts[0]!r}"
            raise UserError(f"{problem}; give a model whose tokenizer knows their words")


def encode_tokens(encoder: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Return last hidden states (N, L, D) for token ids (N, L), BERT's set to 0 at padding. Gradients flow."""
    if not has_mask(encoder):
        return encoder(tokens)[0]
    mask = tokens != encoder.config.pad_token_id
    return encoder(tokens, attention_mask=mask)[0] * mask[..., None]


@torch.no_grad()
def embed(tokenizer: PreTrainedTokenizerBase, encoder: nn.Module, prompts: Iterable[str]) -> torch.Tensor:
    """Return embeddings (N, L, D) of N prompts in the encoder's dtype. BERT's [:, 0] is [CLS], padding is 0."""
    # outside autocast, which would return float32 on a GPU: latents are stored in the dtype of the embeddings
    with torch.autocast(encoder.device.type, enabled=False):
        return encode_tokens(encoder, tokenize(tokenizer, prompts).to(encoder.device)).to(encoder.dtype)


def mask_padding(unet: nn.Module, encoder: nn.Module) -> None:
    """Make the UNet ignore positions whose embedding is 0, if the encoder is a BERT."""
    if has_mask(encoder) and _add_mask not in unet._forward_pre_hooks.values():
        unet.register_forward_pre_hook(_add_mask, with_kwargs=True)


def _add_mask(unet: nn.Module, arguments: tuple, named: dict) -> tuple[tuple, dict]:
    embeds = named["encoder_hidden_states"] if "encoder_hidden_states" in named else arguments[2]
    return arguments, named | {"encoder_attention_mask": (embeds != 0).any(dim=-1)}
