"""The image encoder of Selector and Policy: timm's vision transformer, RGB, and the one way that images get into it.

Blocks are pre-norm, attention runs over the patches of one image, position embeddings start at std 0.02, the class
token after the last LayerNorm (or, with stem "conv", the mean of the others) is what is returned.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision.transforms.functional as tvf
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ddpo_pytorch.data.images import LARGEST_SIDE
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.files import atomic_write
from ddpo_pytorch.utils.json_files import OneOf, parse_json
from ddpo_pytorch.utils.weights import read_safetensors

STEMS = ("linear", "conv")
_SIZES = {
    "image_size": range(1, LARGEST_SIDE + 1),
    "patch_size": range(1, 1025),
    "width": range(1, 8193),
    "layers": range(1, 97),
    "heads": range(1, 513),
    "dropout?": float,
    "mlp_ratio?": float,
    "stem?": str,
}
# what the files of judges state about themselves
DESCRIPTIONS = {
    "selector": {"sizes": _SIZES, "threshold?": OneOf((float, None)), "calibration?": dict, "origin?": dict},
    "policy": {
        "sizes": _SIZES,
        "text": {"name": str, "tokens": range(2, 2**16), "fingerprint": str},
        "origin?": dict,
    },
}
LEAST_CHANNELS = 24  # of a convolution of the stem


@dataclass(frozen=True)
class VisionSizes:
    """Sizes of a vision transformer. Raises UserError for those that do not divide.

    `stem` makes tokens from patches: "linear", one projection, and the class token is returned; or "conv", `conv_stem`
    (after Xiao et al. 2021), and the mean of all tokens, which learns from few images what blur and noise are.
    `image_size` and `patch_size` in pixels; `width` of tokens, split among `heads`; `dropout` after positions,
    attention and both layers of each MLP, whose inner width is `mlp_ratio` x width.
    """

    image_size: int = 512
    patch_size: int = 16
    width: int = 768
    layers: int = 12
    heads: int = 12
    dropout: float = 0.1
    mlp_ratio: float = 4.0
    stem: str = "linear"

    def __post_init__(self):
        for name in ("image_size", "patch_size", "width", "layers", "heads"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} of a judge is {getattr(self, name)}; it must be 1 or more")
        for name, part in (("image_size", "patch_size"), ("width", "heads")):
            whole_size, divisor = getattr(self, name), getattr(self, part)
            if whole_size % divisor:
                raise UserError(f"{name} {whole_size} of a judge is no multiple of {part} {divisor}; change one")
        if self.stem not in STEMS:
            raise UserError(f"stem of a judge is {self.stem!r}; allowed are {', '.join(STEMS)}")
        if self.stem == "conv" and self.patch_size & (self.patch_size - 1):
            raise UserError(f"patch_size {self.patch_size} of a judge is no power of two, which stem 'conv' needs")
        if not 0 < self.mlp_ratio <= 16:
            raise UserError(f"mlp_ratio of a judge is {self.mlp_ratio}; it must be above 0 and at most 16")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout of a judge is {self.dropout}; it must be in [0, 1)")


class ImageEncoder(nn.Module):
    """Preprocessed images (B, 3, S, S) -> features (B, width)."""

    def __init__(self, sizes: VisionSizes):
        super().__init__()
        self.size = sizes.image_size
        self.vit = VisionTransformer(
            img_size=sizes.image_size,
            patch_size=sizes.patch_size,
            num_classes=0,
            global_pool="avg" if sizes.stem == "conv" else "token",
            fc_norm=False,
            embed_dim=sizes.width,
            depth=sizes.layers,
            num_heads=sizes.heads,
            mlp_ratio=sizes.mlp_ratio,
            pos_drop_rate=sizes.dropout,
            proj_drop_rate=sizes.dropout,
            attn_drop_rate=sizes.dropout,
        )
        if sizes.stem == "conv":
            self.vit.patch_embed.proj = conv_stem(sizes.patch_size, sizes.width)

    def preprocess(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, 3, S, S) in [-1, 1], float32; input unchanged.

        Colours and exposure are signs of quality, so no image is stretched to its own minimum and maximum.
        """
        return resized(images.float(), self.size) * 2 - 1

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.vit(pixels)


class Detail(nn.Module):
    """Images (B, 3, H, W) -> (B, 6, H, W): the image, and what the mean of 3 x 3 pixels removes from it, times 8.

    Blur, noise and missing vessels show in differences between neighbours, which are small beside those of colour.
    """

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        smooth = nn.functional.avg_pool2d(images, 3, 1, 1, count_include_pad=False)
        return torch.cat([images, 8 * (images - smooth)], dim=1)


def conv_stem(patch_size: int, width: int) -> nn.Sequential:
    """Images (B, 3, S, S) -> tokens (B, width, S / patch_size, S / patch_size).

    `Detail`, then 3 x 3 convolutions of stride 2 with batch norm, as many as halve the patch to one, and a projection.
    """
    halvings, channels, layers = patch_size.bit_length() - 1, 6, [Detail()]
    for left in range(halvings - 1, -1, -1):
        following = max(width >> left, LEAST_CHANNELS)
        layers += [nn.Conv2d(channels, following, 3, 2, 1, bias=False), nn.BatchNorm2d(following), nn.ReLU()]
        channels = following
    return nn.Sequential(*layers, nn.Conv2d(channels, width, 1))


def resized(images: torch.Tensor, size: int) -> torch.Tensor:
    """Float images (B, 3, H, W) at size x size pixels: bilinear, antialiased. Training and scoring both scale by this.

    Another filter would be sharper or softer, and sharpness is part of what is judged.
    """
    if images.shape[-2:] == (size, size):
        return images
    return tvf.resize(images, [size, size], antialias=True).clamp(0, 1)


@contextmanager
def scoring(module: nn.Module) -> Iterator[None]:
    """Without gradients and dropout; the module is afterwards in the mode that it was in."""
    training = module.training
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train(training)


def save_judge(path: str | Path, kind: str, module: nn.Module, about: Mapping[str, Any]) -> None:
    """Safetensors of all weights with `about` as JSON under the name `kind`: the file describes itself."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, metadata={kind: json.dumps(about)})


def read_judge(path: str | Path, kind: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What `save_judge` wrote: description and weights. Raises UserError for a file that is missing or another."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{kind} {str(path)!r} does not exist; train one with scripts/train_rlhf.py")
    weights, metadata = read_safetensors(path)
    if (about := metadata.get(kind)) is None:
        raise UserError(f"{str(path)!r} is no {kind}: it holds no description of one; train_rlhf.py writes them")
    return parse_json(about, DESCRIPTIONS[kind], f"the description in {str(path)!r}", "train it again"), weights


def sizes_of(about: Mapping[str, Any], kind: str, path: str | Path) -> VisionSizes:
    """Sizes from the description of a file. Raises UserError where it states none that can be."""
    try:
        return VisionSizes(**about["sizes"])
    except (UserError, KeyError, TypeError) as error:
        raise UserError(f"{str(path)!r} describes no {kind} of this version ({error}); train it again") from error


def build(make: Callable[[], nn.Module], weights: Mapping[str, torch.Tensor], path: str | Path) -> nn.Module:
    """Return the module that `make` builds, with these weights in it.

    Names and shapes are compared before any memory is taken: a file may describe a network that no machine can hold.
    Raises UserError where they are not the module's.
    """
    try:
        with torch.device("meta"):
            expected = {name: tuple(value.shape) for name, value in make().state_dict().items()}
    except Exception as error:  # of timm, for a description of what it cannot build
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{str(path)!r} describes a network that cannot be built ({reason})") from error
    found = {name: tuple(value.shape) for name, value in weights.items()}
    if wrong := sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)):
        ours, theirs = (shapes.get(wrong[0], "absent") for shapes in (expected, found))
        raise UserError(
            f"{str(path)!r} does not fit the network that it describes: {wrong[0]} is {theirs} instead of {ours}"
            + (f", and {len(wrong) - 1} more differ" if len(wrong) > 1 else "")
        )
    module = make()
    module.load_state_dict(weights)
    return module
