"""Build a small Stable Diffusion from scratch: the parts of SD 1.5, or a BERT in place of CLIP, of any size."""

from collections.abc import Sequence
from pathlib import Path

from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from ml_collections import ConfigDict
from torch import nn
from transformers import BertConfig, BertModel, BertTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ddpo_pytorch.generator.parts import load_part
from ddpo_pytorch.generator.text import TOKENS, TextEncoder, mask_padding
from ddpo_pytorch.utils.errors import UserError

# SD 1.5's schedule. With set_alpha_to_one=False and steps_offset=1 the last DDIM step keeps a positive variance.
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULE |= {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
GROUPS = 8  # of group normalisation; every channel count must be a multiple
HEAD_WIDTH = 16  # channels per head of a text encoder, whose width must be a multiple


def build_tokenizer(captions: Sequence[str]) -> CLIPTokenizer:
    """Return a CLIP tokenizer of 77 tokens whose byte-pair merges spell the words of `captions`.

    Merges are constructed rather than trained: training breaks ties at random, so two processes, or a resumed run,
    would number the tokens differently.
    """
    special = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    words, letters = _words_and_letters(CLIPTokenizer(vocab=special, merges=[]), captions)
    merges = {}  # an ordered set
    for word in words:
        head, *tail = *word[:-1], f"{word[-1]}</w>"
        for letter in tail:
            merges[head, letter] = None
            head += letter
    vocab = [*special, *letters, *(f"{letter}</w>" for letter in letters), *dict.fromkeys(map("".join, merges))]
    tokenizer = CLIPTokenizer(vocab={token: number for number, token in enumerate(vocab)}, merges=list(merges))
    tokenizer.model_max_length = 77
    return tokenizer


def build_clip(captions: Sequence[str], width: int, layers: int, tokens: int = 77) -> TextEncoder:
    """Return a CLIP tokenizer and text model with 16 channels per head; prompts always have 77 tokens."""
    tokenizer = build_tokenizer(captions)
    numbers = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return tokenizer, CLIPTextModel(CLIPTextConfig(**_sizes(tokenizer, width, layers), **numbers))


def build_bert(captions: Sequence[str], width: int, layers: int, tokens: int = TOKENS) -> TextEncoder:
    """Return a BERT with 16 channels per head, whose WordPiece vocabulary is the words and letters of `captions`."""
    words, letters = _words_and_letters(BertTokenizer(vocab={"[UNK]": 0}, do_lower_case=True), captions)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocab = [*special, *letters, *(f"##{letter}" for letter in letters), *(word for word in words if len(word) > 1)]
    tokenizer = BertTokenizer(vocab={token: number for number, token in enumerate(vocab)}, do_lower_case=True)
    tokenizer.model_max_length = tokens
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(**_sizes(tokenizer, width, layers), **dropout, pad_token_id=tokenizer.pad_token_id)
    return tokenizer, BertModel(config, add_pooling_layer=False)


# builders by sd.text_encoder, called with (captions, width, layers, tokens)
TEXT_ENCODERS = {"clip": build_clip, "bert": build_bert}


def _words_and_letters(tokenizer: CLIPTokenizer | BertTokenizer, captions: Sequence[str]) -> tuple[list[str], ...]:
    """Return the words of captions, normalised and split by the tokenizer, and their letters, both sorted."""
    backend = tokenizer.backend_tokenizer
    texts = [backend.normalizer.normalize_str(caption) for caption in captions]
    words = sorted({word for text in texts for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)})
    return words, sorted(set("".join(words)))


def _sizes(tokenizer: CLIPTokenizer | BertTokenizer, width: int, layers: int) -> dict[str, int]:
    """Return the sizes that have the same names in the configurations of CLIP and BERT."""
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length}
    blocks = {"num_hidden_layers": layers, "num_attention_heads": max(1, width // HEAD_WIDTH)}
    return text | blocks | {"hidden_size": width, "intermediate_size": 4 * width}


def load_vae(folder: str | Path) -> AutoencoderKL:
    """Load an autoencoder in diffusers format, float32. Raises UserError as `load_part` does."""
    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"{str(folder)!r} holds no VAE; train it first with --config.sd.stage=vae")
    return load_part(AutoencoderKL, folder)


def build_vae(
    channels: Sequence[int], image_size: int, latent_channels: int = 4, attention: bool = True
) -> AutoencoderKL:
    """Return a KL autoencoder that divides sides by 2 ** (len(channels) - 1); `attention`: at the lowest resolution."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=tuple(channels),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=GROUPS,
        sample_size=image_size,
        mid_block_add_attention=attention,
    )
    # start with a small posterior variance: at 1, noise would drown out the latents for most of a short training
    nn.init.constant_(vae.quant_conv.bias[vae.config.latent_channels :], -6.0)
    return vae


def build_unet(
    channels: Sequence[int], attention: Sequence[bool], text_width: int, latent_size: int, latent_channels: int = 4
) -> UNet2DConditionModel:
    """Return a UNet with a block per resolution; `attention[i]` adds self- and cross-attention to block i."""
    return UNet2DConditionModel(
        sample_size=latent_size,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=tuple(channels),
        layers_per_block=1,
        down_block_types=tuple("CrossAttnDownBlock2D" if on else "DownBlock2D" for on in attention),
        up_block_types=tuple("CrossAttnUpBlock2D" if on else "UpBlock2D" for on in reversed(tuple(attention))),
        cross_attention_dim=text_width,
        # despite its name, diffusers reads this as the number of heads
        attention_head_dim=tuple(max(1, width // 32) for width in channels),
        norm_num_groups=GROUPS,
    )


def assemble(vae, text_encoder, tokenizer, unet) -> StableDiffusionPipeline:
    """Return a pipeline of the four parts and SD 1.5's noise schedule; save it with `pipeline.save_model`."""
    mask_padding(unet, text_encoder)
    parts = vae, text_encoder, tokenizer, unet, DDIMScheduler(**SCHEDULE)
    return StableDiffusionPipeline(*parts, None, None, requires_safety_checker=False)


def build_pipeline(sd: ConfigDict, captions: Sequence[str]) -> StableDiffusionPipeline:
    """Build tokenizer, text encoder and UNet of `config.sd` around the VAE that stage "vae" saved in sd.output."""
    vae = load_vae(Path(sd.output) / "vae").requires_grad_(False).eval()
    tokenizer, text_encoder = TEXT_ENCODERS[sd.text_encoder](captions, sd.text_width, sd.text_layers, sd.text_tokens)
    latent_size = sd.image_size // 2 ** (len(vae.config.block_out_channels) - 1)
    sizes = sd.text_width, latent_size, vae.config.latent_channels
    unet = build_unet(sd.unet_channels, sd.unet_attention, *sizes)
    return assemble(vae, text_encoder, tokenizer, unet)
