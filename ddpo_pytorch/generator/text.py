"""Text encoders: CLIP as in Stable Diffusion, or BERT (BioMedBERT), whose padding the UNet must not attend to.

CLIP was trained with its padding, and Stable Diffusion attends to all 77 positions. BERT's padding means nothing. Its
embeddings carry their mask with them: rows of padding are exactly 0, which no other row is, and the UNet of such a
pipeline (`mask_padding`) derives its attention mask from them. So training, rollout, update and evaluation mask alike,
without a mask of their own to forget. BERT's last hidden states have the width that the UNet's cross-attention expects
(768), and go there without a projection.
"""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
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

from ddpo_pytorch.generator.parts import check_tokenizer, check_tokenizer_files, first_line, load_part
from ddpo_pytorch.utils.errors import UserError

logger = logging.getLogger(__name__)
TOKENS = 256  # positions that a prompt has for BERT, [CLS] and [SEP] among them: half of what BioMedBERT could read
# Encoders by the model_type of their config.json.
KINDS = {"bert": BertModel, "clip_text_model": CLIPTextModel}
TextEncoder = tuple[PreTrainedTokenizerBase, PreTrainedModel]


def load_text_encoder(model: str | Path, tokens: int = TOKENS, device: str | torch.device = "cpu") -> TextEncoder:
    """Load tokenizer and frozen encoder, float32, in evaluation mode.

    Args:
        model: a folder in diffusers format (its tokenizer/ and text_encoder/), a folder of transformers, or a Hugging
            Face id.
        tokens: positions of a prompt for BERT, kept as `tokenizer.model_max_length`; at most what the encoder has.

    Raises:
        UserError: no such model, one of another kind than BERT and CLIP, one that is not whole (see `load_part`), or a
            tokenizer of another encoder.
    """
    folder = Path(model).expanduser()
    model, part, place = str(model), "", str(model)
    if local := folder.is_dir():
        model, part = str(folder), "text_encoder" if (folder / "text_encoder").is_dir() else ""
        place = folder / "tokenizer" if part else folder
        check_tokenizer_files(place)
    try:
        encoder = load_encoder(model, part)
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except UserError:
        raise
    except Exception as error:  # tokenizer.json and config.json may hold anything
        if local:
            raise UserError(f"text encoder {model!r}: {first_line(error)}; save or fetch it again") from error
        raise UserError(
            f"text encoder {model!r} is neither a folder with tokenizer and weights nor within reach on the "
            "Hugging Face hub; check the path, the id and the network"
        ) from error
    if has_mask(encoder):
        tokenizer.model_max_length = min(tokens, encoder.config.max_position_embeddings)
    check_tokenizer(tokenizer, encoder, model)
    return tokenizer, encoder.requires_grad_(False).eval().to(device)


def load_encoder(model: str | Path, part: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load the text encoder of a folder or Hugging Face id, which may lie in a subfolder `part`.

    Raises UserError for an encoder of another kind than BERT and CLIP, and as `load_part` does.
    """
    kind = AutoConfig.from_pretrained(model, subfolder=part, trust_remote_code=False).model_type
    if kind not in KINDS:
        raise UserError(f"text encoder {str(model)!r} is of kind {kind!r}; allowed are BERT and CLIP's text model")
    # no pooler: its weights belong to next-sentence prediction, and published files may lack them
    options = {"add_pooling_layer": False} if kind == "bert" else {}
    return load_part(KINDS[kind], model, part, dtype, **options)


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


def check_tokens(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], what: str = "prompts") -> None:
    """Raise UserError where prompts that differ in more than case and spaces all become the same tokens.

    The text encoder cannot tell them apart then: the tokenizer has none of their words and letters. Warns of those that
    are cut.
    """
    warn_of_cut(tokenizer, prompts, what)
    if len({" ".join(prompt.lower().split()) for prompt in prompts}) > 1:
        if len({tuple(numbers) for numbers in tokenizer(list(prompts), verbose=False).input_ids}) == 1:
            raise UserError(
                f"the model's tokenizer maps all {len(prompts)} {what} to the same tokens, the first is "
                f"{prompts[0]!r}; give a model whose tokenizer knows their words"
            )


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
