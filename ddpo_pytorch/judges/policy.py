"""The Policy: how well an image shows what its prompt says, in [0, 1].

Vision transformer (12 layers at full size) beside the [CLS] state of a frozen BERT; the two are joined and go through
width + text width -> width -> width / 2 -> 1 (1536 -> 768 -> 384 -> 1), with LayerNorm, ReLU and dropout in between.
"""

import dataclasses
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ddpo_pytorch.generator.text import embed, has_mask, load_text_encoder, too_long
from ddpo_pytorch.judges.selector import Selector, load_selector
from ddpo_pytorch.judges.vit import ImageEncoder, VisionSizes, build, read_judge, save_judge, scoring, sizes_of
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.fingerprint import fingerprint

logger = logging.getLogger(__name__)
SELECTOR_FILE, POLICY_FILE = "selector.safetensors", "policy.safetensors"


class TextFeatures:
    """The frozen text encoder: prompts -> [CLS] states (N, D), each computed once and alone.

    Alone, because in a batch the last bits depend on the neighbours. A prompt of more than `tokens` tokens is cut; a
    warning says how many are. Raises UserError for an encoder that is not BERT: of CLIP, whose attention looks
    backwards only, the first state is the same for every prompt.
    """

    def __init__(self, model: str | Path, tokens: int = 256, device: str | torch.device = "cpu"):
        self.name, self.tokens = str(model), tokens
        self._tokenizer, self._encoder = load_text_encoder(model, tokens, device)
        if not has_mask(self._encoder):
            raise UserError(f"text encoder {self.name!r} is CLIP's; the Policy needs BERT, whose [CLS] sees all tokens")
        self.width = self._encoder.config.hidden_size
        self.fingerprint = fingerprint(self._encoder, self._tokenizer)[:16]
        self._known: dict[str, torch.Tensor] = {}

    def __call__(self, prompts: Sequence[str]) -> torch.Tensor:
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._known]
        if cut := too_long(self._tokenizer, new):
            logger.warning(
                "%d of %d prompts have more than %d tokens and are cut, e.g. %.60r...",
                *(len(cut), len(new), self._tokenizer.model_max_length, cut[0]),
            )
        for prompt in new:
            self._known[prompt] = embed(self._tokenizer, self._encoder, [prompt])[0, 0].float()
        return torch.stack([self._known[prompt] for prompt in prompts])


class Policy(nn.Module):
    """Images and the features of their prompts -> one logit each; the score is its sigmoid.

    `text` is no part of the module: its weights are neither trained nor saved. Its features are centred and scaled by
    what `fit_text` has found, since [CLS] states of captions of one kind differ little. `origin` is what the Policy was
    trained on and how (plain values).
    """

    def __init__(self, sizes: VisionSizes, text: TextFeatures):
        super().__init__()
        self.sizes, self.text = sizes, text
        self.origin: Mapping[str, Any] = {}
        self.encoder = ImageEncoder(sizes)
        self.register_buffer("text_mean", torch.zeros(text.width))
        self.register_buffer("text_scale", torch.ones(()))
        layers, width = [], sizes.width + text.width
        for inner in (sizes.width, sizes.width // 2):
            layers += [nn.Linear(width, inner), nn.LayerNorm(inner), nn.ReLU(), nn.Dropout(sizes.dropout)]
            width = inner
        self.head = nn.Sequential(*layers, nn.Linear(width, 1))

    def preprocess(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, 3, S, S) in [-1, 1]."""
        return self.encoder.preprocess(images)

    def forward(self, pixels: torch.Tensor, text_features: torch.Tensor) -> torch.Tensor:
        """Preprocessed images and prompts' features (B, D) -> logits (B,)."""
        text_features = (text_features - self.text_mean) / self.text_scale
        return self.head(torch.cat([self.encoder(pixels), text_features], dim=1)).squeeze(-1)

    def fit_text(self, prompts: Iterable[str]) -> None:
        """Centre the features of these prompts, each taken once, and bring their mean square to 1.

        One number scales all features, so that their geometry is kept. One prompt alone is only centred.
        """
        features = self.text(sorted(set(prompts))).to(self.text_mean.device)
        self.text_mean.copy_(features.mean(0))
        spread = (features - self.text_mean).square().mean().sqrt()
        self.text_scale.copy_(spread if len(features) > 1 and spread > 0 else torch.ones(()))

    def score(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Images (B, 3, H, W) in [0, 1] with a prompt each -> scores (B,), float32 in [0, 1], without dropout."""
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images have {len(prompts)} prompts; give one each")
        device = next(self.parameters()).device
        with scoring(self):
            return self(self.preprocess(images.to(device)), self.text(prompts).to(device)).float().sigmoid()

    def compute_value(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """The baseline V (B,) of stage 2: the score itself as a constant."""
        return self.score(images, prompts)


def save_policy(policy: Policy, path: str | Path) -> None:
    """Write safetensors of all but the text encoder, with its name and fingerprint inside; whole or not at all."""
    text = {name: getattr(policy.text, name) for name in ("name", "tokens", "fingerprint")}
    about = {"sizes": dataclasses.asdict(policy.sizes), "text": text, "origin": policy.origin}
    save_judge(path, "policy", policy, about)


def load_policy_judge(path: str | Path, device: str | torch.device = "cpu", text_encoder: str | Path = "") -> Policy:
    """Open a Policy, frozen and in eval mode.

    `text_encoder` is the place of its text encoder, where that is no longer the one that the file states. Raises
    UserError for a missing or other file, and for another text encoder than it was trained with.
    """
    about, weights = read_judge(path, "policy")
    sizes = sizes_of(about, "policy", path)
    text = TextFeatures(text_encoder or about["text"]["name"], about["text"]["tokens"], device)
    if text.fingerprint != about["text"]["fingerprint"]:
        raise UserError(
            f"{str(path)!r} was trained with the text encoder {about['text']['name']!r} (fingerprint "
            f"{about['text']['fingerprint']}); {text.name!r} is another one ({text.fingerprint}): give that one"
        )
    policy = build(lambda: Policy(sizes, text), weights, path)
    policy.origin = about.get("origin", {})
    return policy.requires_grad_(False).eval().to(device)


def load_judges(
    folder: str | Path, device: str | torch.device = "cpu", text_encoder: str | Path = ""
) -> tuple[Selector, Policy]:
    """Selector and Policy of a folder that train_rlhf.py wrote. Raises UserError as the two loaders do."""
    folder = Path(folder)
    return load_selector(folder / SELECTOR_FILE, device), load_policy_judge(folder / POLICY_FILE, device, text_encoder)
