"""The Policy scores in [0, 1] how well an image matches its prompt.

Features of a vision transformer (12 layers at full size) and the [CLS] state of a frozen BERT are concatenated and fed
to an MLP, width + text width -> width -> width / 2 -> 1 (1536 -> 768 -> 384 -> 1), with LayerNorm, ReLU and dropout.
"""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import nn

from ddpo_pytorch.generator.text import embed, has_mask, load_text_encoder, too_long
from ddpo_pytorch.judges.selector import Selector, load_selector
from ddpo_pytorch.judges.vit import Judge, VisionSizes, build, mlp, read_judge, save_judge
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.fingerprint import fingerprint

logger = logging.getLogger(__name__)
SELECTOR_FILE, POLICY_FILE = "selector.safetensors", "policy.safetensors"
DESCRIPTION = {"sizes": dict, "text": {"name": str, "tokens": range(2, 2**16), "fingerprint": str}, "origin?": dict}


class TextFeatures:
    """Frozen text encoder that maps prompts to [CLS] states (N, D), cached by prompt.

    Prompts are encoded one by one, since in a batch the last bits depend on the other prompts. Prompts of more than
    `tokens` tokens are truncated, with a warning. Raises UserError for encoders other than BERT: CLIP's attention is
    causal, so its first state is the same for every prompt.
    """

    def __init__(self, model: str | Path, tokens: int = 256, device: str | torch.device = "cpu"):
        self.name, self.tokens = str(model), tokens
        self._tokenizer, self._encoder = load_text_encoder(model, tokens, device)
        if not has_mask(self._encoder):
            raise UserError(f"text encoder {self.name!r} is CLIP's; the Policy needs BERT, whose [CLS] sees all tokens")
        self.width = self._encoder.config.hidden_size
        self.fingerprint = fingerprint(self._encoder, self._tokenizer)[:16]
        self._cache: dict[str, torch.Tensor] = {}

    def __call__(self, prompts: Sequence[str]) -> torch.Tensor:
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._cache]
        if cut := too_long(self._tokenizer, new):
            logger.warning("%d prompts of over %d tokens are truncated, the first is %r", len(cut), self.tokens, cut[0])
        for prompt in new:
            self._cache[prompt] = embed(self._tokenizer, self._encoder, [prompt])[0, 0].float()
        return torch.stack([self._cache[prompt] for prompt in prompts])


class Policy(Judge):
    """Map images and their prompts' features to one logit each.

    `text` is not a submodule: its weights are neither trained nor saved. `fit_text` determines how its features are
    centred and scaled, since [CLS] states of similar captions differ little.
    """

    def __init__(self, sizes: VisionSizes, text: TextFeatures):
        super().__init__(sizes)
        self.text = text
        self.register_buffer("text_mean", torch.zeros(text.width))
        self.register_buffer("text_scale", torch.ones(()))
        widths = self.features + text.width, sizes.width, sizes.width // 2, 1
        self.head = mlp(widths, nn.ReLU, sizes.dropout, norm=nn.LayerNorm)

    def forward(self, pixels: torch.Tensor, text_features: torch.Tensor) -> torch.Tensor:
        """Map preprocessed images and their prompts' features (B, D) to logits (B,)."""
        text_features = (text_features - self.text_mean) / self.text_scale
        return self.head(torch.cat([self.encoder(pixels), text_features], dim=1)).squeeze(-1)

    def fit_text(self, prompts: Iterable[str]) -> None:
        """Set centre and scale so that the features of the distinct prompts have mean 0 and mean square 1."""
        features = self.text(sorted(set(prompts))).to(self.text_mean.device)
        self.text_mean.copy_(features.mean(0))
        scale = (features - self.text_mean).square().mean().sqrt()
        self.text_scale.copy_(scale if len(features) > 1 and scale > 0 else torch.ones(()))

    def score(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Score images (B, 3, H, W) in [0, 1] with one prompt each: (B,), float32 in [0, 1], without dropout."""
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images have {len(prompts)} prompts; give one each")
        return self.score_with(images, self.text(prompts))


def save_policy(policy: Policy, path: str | Path) -> None:
    """Write all but the text encoder as safetensors, atomically; the encoder's name and fingerprint are metadata."""
    text = {name: getattr(policy.text, name) for name in ("name", "tokens", "fingerprint")}
    description = {"sizes": vars(policy.sizes), "text": text, "origin": policy.origin}
    save_judge(path, "policy", policy, description)


def load_policy_judge(path: str | Path, device: str | torch.device = "cpu", text_encoder: str | Path = "") -> Policy:
    """Load a Policy, frozen and in eval mode; `text_encoder` overrides the encoder's location in the file.

    Raises UserError for a missing or invalid file, and for another text encoder than the one in training.
    """
    description, weights = read_judge(path, "policy", DESCRIPTION)
    trained = description["text"]
    text = TextFeatures(text_encoder or trained["name"], trained["tokens"], device)
    if text.fingerprint != trained["fingerprint"]:
        problem = f"{text.name!r} has fingerprint {text.fingerprint}, not {trained['fingerprint']}; give the original"
        raise UserError(f"{str(path)!r} was trained with the text encoder {trained['name']!r}, but {problem}")
    policy = build(lambda: Policy(description["sizes"], text), weights, path)
    policy.origin = description.get("origin", {})
    return policy.to(device)


def load_judges(folder: str | Path, device: str | torch.device = "cpu") -> tuple[Selector, Policy]:
    """Load Selector and Policy from an output folder of train_rlhf.py. Raises UserError as the two loaders do."""
    folder = Path(folder)
    return load_selector(folder / SELECTOR_FILE, device), load_policy_judge(folder / POLICY_FILE, device)
