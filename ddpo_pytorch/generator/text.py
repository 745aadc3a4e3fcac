"""Text encoders: CLIP as in Stable Diffusion, or BERT (BioMedBERT), whose padding the UNet must not attend to.

CLIP was trained with its padding, and Stable Diffusion attends to all 77 positions. BERT's padding means nothing. Its
embeddings carry their mask with them: rows of padding are exactly 0, which no other row is, and the UNet of such a
pipeline (`mask_padding`) derives its attention mask from them. So training, rollout, update and evaluation mask alike,
without a mask of their own to forget. BERT's last hidden states have the width that the UNet's cross-attention expects
(768), and go there without a projection.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPTextModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ddpo_pytorch.errors import UserError

logger = logging.getLogger(__name__)
TOKENS = 256  # positions that a prompt has for BERT, [CLS] and [SEP] among them: half of what BioMedBERT could read
# what is wrong with a folder of which some .bin holds more than tensors
PICKLE = (
    "its weights are a pickle of more than plain tensors and were not opened, since that can run code; give safetensors"
)
TextEncoder = tuple[PreTrainedTokenizerBase, PreTrainedModel]


def load_text_encoder(model: str | Path, tokens: int = TOKENS, device: str | torch.device = "cpu") -> TextEncoder:
    """Tokenizer and frozen encoder, float32, in evaluation mode.

    Args:
        model: a folder in diffusers format (its tokenizer/ and text_encoder/), a folder of transformers, or a Hugging
            Face id.
        tokens: positions of a prompt for BERT, kept as `tokenizer.model_max_length`; at most what the encoder has.

    Raises:
        UserError: no such model, one of another kind than BERT and CLIP, or a tokenizer of another encoder.
    """
    folder = Path(model).expanduser()
    places = (model, model)
    if folder.is_dir():
        places = (folder, folder)
        if (folder / "text_encoder").is_dir():
            places = (folder / "tokenizer", folder / "text_encoder")
    try:
        kind = AutoConfig.from_pretrained(places[1], trust_remote_code=False).model_type
        loader = {"bert": _bert_from, "clip_text_model": CLIPTextModel.from_pretrained}.get(kind)
        if loader is None:
            raise UserError(f"text encoder {str(model)!r} is of kind {kind!r}; allowed are BERT and CLIP's text model")
        tokenizer = AutoTokenizer.from_pretrained(places[0], trust_remote_code=False)
        encoder = loader(places[1])
    except (OSError, ValueError) as error:
        raise UserError(
            f"text encoder {str(model)!r} is neither a folder with tokenizer and weights nor within reach on the "
            "Hugging Face hub; check the path, the id and the network"
        ) from error
    except UnpicklingError as error:
        raise UserError(f"text encoder {str(model)!r}: {PICKLE}") from error
    check_tokenizer(tokenizer, encoder, str(model))
    if has_mask(encoder):
        tokenizer.model_max_length = min(tokens, encoder.config.max_position_embeddings)
    return tokenizer, encoder.float().requires_grad_(False).eval().to(device)


def _bert_from(place: str | Path, **where: Any) -> BertModel:
    # no pooler: its weights belong to next-sentence prediction, and published files may lack them
    return BertModel.from_pretrained(place, add_pooling_layer=False, **where)


def bert_part(model: str, revision: str, dtype: torch.dtype) -> dict[str, BertModel]:
    """The text encoder of a model in diffusers format, where that is BERT, as an argument for its pipeline; else {}.

    Raises OSError where the model has none.
    """
    where = {"subfolder": "text_encoder", "revision": revision}
    if AutoConfig.from_pretrained(model, trust_remote_code=False, **where).model_type != "bert":
        return {}
    return {"text_encoder": _bert_from(model, dtype=dtype, **where)}


@contextmanager
def quiet() -> Iterator[None]:
    """Within it, diffusers reports errors only."""
    level = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(level)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, encoder: PreTrainedModel, name: str) -> None:
    """Raise UserError where the encoder lacks embeddings for tokens. It may have more: BioMedBERT's table is longer."""
    if len(tokenizer) > encoder.config.vocab_size:
        raise UserError(
            f"{name}: the tokenizer has {len(tokenizer)} tokens, the text encoder {encoder.config.vocab_size}; they do "
            "not belong together"
        )


def has_mask(encoder: nn.Module) -> bool:
    """Whether the encoder's padding is masked: BERT's is, CLIP's is not, as in Stable Diffusion."""
    return encoder.config.model_type == "bert"


def tokenize(tokenizer: PreTrainedTokenizerBase, prompts: Iterable[str]) -> torch.Tensor:
    """Token numbers (N, L) of N prompts, L = `tokenizer.model_max_length`. Longer ones are cut."""
    return tokenizer(
        list(prompts),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids


def too_long(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[str]:
    """Those prompts that `tokenize` cuts."""
    numbers = tokenizer(list(prompts), truncation=False, verbose=False).input_ids if prompts else []
    return [prompt for prompt, own in zip(prompts, numbers, strict=True) if len(own) > tokenizer.model_max_length]


def warn_of_cut(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], what: str = "prompts") -> None:
    """Log a warning where `tokenize` cuts some: how many, and the first."""
    if cut := too_long(tokenizer, prompts):
        limit = tokenizer.model_max_length
        logger.warning("%d %s have more than %d tokens and are cut, the first is %r", len(cut), what, limit, cut[0])


def encode_tokens(encoder: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Last hidden states (N, L, D) of token numbers (N, L); BERT's are 0 at padding. Gradients flow."""
    if not has_mask(encoder):
        return encoder(tokens)[0]
    mask = tokens != encoder.config.pad_token_id
    return encoder(tokens, attention_mask=mask)[0] * mask[..., None]


@torch.no_grad()
def embed(tokenizer: PreTrainedTokenizerBase, encoder: nn.Module, prompts: Iterable[str]) -> torch.Tensor:
    """Embeddings (N, L, D) of N prompts in the encoder's dtype; of BERT, [:, 0] is [CLS] and rows of padding are 0."""
    # outside autocast, which would return float32 on a GPU: latents are stored in the dtype of the embeddings.
    with torch.autocast(encoder.device.type, enabled=False):
        return encode_tokens(encoder, tokenize(tokenizer, prompts).to(encoder.device)).to(encoder.dtype)


def mask_padding(unet: nn.Module, encoder: nn.Module) -> None:
    """Let the UNet pass over padding: from now on it masks positions whose embedding is 0. Nothing changes for CLIP."""
    if has_mask(encoder) and _add_mask not in unet._forward_pre_hooks.values():
        unet.register_forward_pre_hook(_add_mask, with_kwargs=True)


def _add_mask(unet: nn.Module, arguments: tuple, named: dict) -> tuple[tuple, dict]:
    embeds = named["encoder_hidden_states"] if "encoder_hidden_states" in named else arguments[2]
    return arguments, named | {"encoder_attention_mask": (embeds != 0).any(dim=-1)}


def build_bert(captions: Sequence[str], width: int, layers: int, tokens: int = TOKENS) -> TextEncoder:
    """A BERT from nothing whose WordPiece vocabulary is the words and letters of `captions`; heads of 16 channels."""
    words, letters = _words(captions)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = [*special, *letters, *(f"##{letter}" for letter in letters), *(w for w in words if len(w) > 1)]
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(vocabulary)}, do_lower_case=True)
    tokenizer.model_max_length = tokens
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 16),
        max_position_embeddings=tokens,
        pad_token_id=tokenizer.pad_token_id,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return tokenizer, BertModel(config, add_pooling_layer=False)


def _words(captions: Sequence[str]) -> tuple[list[str], list[str]]:
    """Words and letters of captions as BERT's uncased pre-tokenizer cuts them, sorted."""
    backend = BertTokenizer(vocab={"[UNK]": 0}, do_lower_case=True).backend_tokenizer
    texts = [backend.normalizer.normalize_str(caption) for caption in captions]
    words = sorted({word for text in texts for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)})
    return words, sorted({letter for word in words for letter in word})
