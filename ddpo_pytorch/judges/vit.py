"""Base of Selector and Policy: an image encoder from timm, preprocessing, and the judges' files."""

import json
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision.transforms.functional as tvf
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torchvision.ops import MLP

from ddpo_pytorch.data.images import LARGEST_SIDE
from ddpo_pytorch.generator.parts import check_fit
from ddpo_pytorch.utils.errors import UserError, one_line
from ddpo_pytorch.utils.files import atomic_write
from ddpo_pytorch.utils.json_files import parse_json
from ddpo_pytorch.utils.settings import BELOW_ONE, Range, check_choices, check_ranges
from ddpo_pytorch.utils.weights import read_safetensors

STEMS = ("linear", "conv")
MIN_CHANNELS = 24  # of the stem's convolutions
# upper limits, so that a malicious file cannot request a huge network
LARGEST = {"image_size": LARGEST_SIDE, "patch_size": 1024, "width": 8192, "layers": 96, "heads": 512}
RANGES = {name: Range(f"[1, {size}]", whole=True) for name, size in LARGEST.items()}
RANGES |= {"dropout": BELOW_ONE, "mlp_ratio": Range("(0, 16]")}


@dataclass(frozen=True)
class VisionSizes:
    """Sizes of an image encoder: a vision transformer, or a `backbone` of timm. Raises UserError for impossible ones.

    `stem` turns patches into tokens: "linear" is one projection; "conv" is `conv_stem` (after Xiao et al. 2021), which
    learns to see blur and noise from few images. `width` is the size of a token, split among `heads`; `dropout` follows
    positions, attention and both layers of each MLP, whose hidden width is `mlp_ratio` x width. With a `backbone` (a
    timm model), the encoder uses only image_size; heads use `dropout`, the Policy's also `width`.
    """

    image_size: int = 512
    patch_size: int = 16
    width: int = 768
    layers: int = 12
    heads: int = 12
    dropout: float = 0.1
    mlp_ratio: float = 4.0
    stem: str = "linear"
    backbone: str = ""

    def __post_init__(self):
        check_ranges(vars(self), RANGES)
        check_choices(vars(self), {"stem": STEMS})
        if self.backbone:
            if not isinstance(self.backbone, str) or not timm.is_model(self.backbone):
                raise UserError(f"backbone {self.backbone!r} is unknown to timm; try tf_efficientnet_lite0")
            return
        for name, divisor in (("image_size", "patch_size"), ("width", "heads")):
            size, part = getattr(self, name), getattr(self, divisor)
            if size % part:
                raise UserError(f"{name} {size} is not a multiple of {divisor} {part}; change one of them")
        if self.stem == "conv" and self.patch_size & (self.patch_size - 1):
            raise UserError(f"patch_size is {self.patch_size}; stem 'conv' needs a power of two")


class Judge(nn.Module):
    """Base of Selector and Policy, whose `forward` returns a logit per image; the score is its sigmoid.

    `encoder` maps preprocessed images (B, 3, S, S) to `features` (B, F): the backbone's pooled ones, or F = width
    values of the transformer, the class token after the last LayerNorm or, with stem "conv", the mean of the others.
    `origin` describes training data and settings (plain values). `criteria` name a Selector's further outputs.
    """

    criteria: tuple[str, ...] = ()

    def __init__(self, sizes: VisionSizes):
        super().__init__()
        self.sizes = sizes
        self.origin: Mapping[str, Any] = {}
        if sizes.backbone:
            network = timm_network(sizes.backbone, sizes.image_size, num_classes=0)
            network.to(memory_format=torch.channels_last)  # faster on a CPU, as in judges.classifier
        else:
            network = VisionTransformer(
                img_size=sizes.image_size,
                patch_size=sizes.patch_size,
                num_classes=0,
                global_pool="avg" if sizes.stem == "conv" else "token",
                fc_norm=False,
                embed_dim=sizes.width,
                depth=sizes.layers,
                num_heads=sizes.heads,
                mlp_ratio=sizes.mlp_ratio,
                **dict.fromkeys(("pos_drop_rate", "proj_drop_rate", "attn_drop_rate"), sizes.dropout),
            )
            if sizes.stem == "conv":
                network.patch_embed.proj = conv_stem(sizes.patch_size, sizes.width)
        self.features: int = getattr(network, "head_hidden_size", None) or network.num_features
        self.encoder = nn.Sequential(OrderedDict(vit=network))

    def preprocess(self, images: torch.Tensor) -> torch.Tensor:
        """Resize images (B, 3, H, W) in [0, 1] and map them to [-1, 1]: (B, 3, S, S), float32; input unchanged."""
        # no contrast normalisation per image, because colour and exposure are signs of quality
        return resized(images.float(), self.sizes.image_size) * 2 - 1

    @torch.no_grad()
    def score_with(self, images: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        """Score images in [0, 1] with `inputs` of `forward`: float32 in [0, 1], of its shape, without dropout."""
        training, device = self.training, next(self.parameters()).device
        self.eval()
        try:
            pixels = self.preprocess(images.to(device))
            return self(pixels, *(values.to(device) for values in inputs)).float().sigmoid()
        finally:
            self.train(training)


def timm_network(arch: str, image_size: int, **options: Any) -> nn.Module:
    """Return timm's network `arch` for images of this size; `options` of timm.create_model."""
    fixed = {"img_size": image_size} if timm.get_pretrained_cfg(arch).fixed_input_size else {}  # ViT
    return timm.create_model(arch, **options, **fixed)


def mlp(widths: Sequence[int], activation: Callable, dropout: float, norm: Callable | None = None) -> nn.Sequential:
    """Return linear layers from widths[0] to widths[-1] with norm, activation and dropout between them."""
    layers = MLP(widths[0], widths[1:], norm, activation, dropout=dropout)
    return nn.Sequential(*list(layers)[:-1])  # no dropout after the last layer


class Detail(nn.Module):
    """Append 8 times the difference from the mean of 3 x 3 pixels, which shows blur: (B, 3, H, W) to (B, 6, H, W)."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        smooth = nn.functional.avg_pool2d(images, 3, 1, 1, count_include_pad=False)
        return torch.cat([images, 8 * (images - smooth)], dim=1)


def conv_stem(patch_size: int, width: int) -> nn.Sequential:
    """Return `Detail`, log2(patch_size) convolutions, a projection: (B, 3, S, S) to (B, width, S / patch_size, ...)."""
    channels, layers = 6, [Detail()]
    for halvings_left in reversed(range(patch_size.bit_length() - 1)):
        out_channels = max(width >> halvings_left, MIN_CHANNELS)
        layers += [nn.Conv2d(channels, out_channels, 3, 2, 1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU()]
        channels = out_channels
    return nn.Sequential(*layers, nn.Conv2d(channels, width, 1))


def resized(images: torch.Tensor, size: int) -> torch.Tensor:
    """Resize float images (B, 3, H, W) to size x size pixels, bilinear and antialiased, for training and scoring."""
    if images.shape[-2:] == (size, size):
        return images
    return tvf.resize(images, [size, size], antialias=True).clamp(0, 1)


def save_judge(path: str | Path, kind: str, module: nn.Module, description: Mapping[str, Any]) -> None:
    """Write all weights as safetensors, atomically, with `description` as JSON metadata under the name `kind`."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, metadata={kind: json.dumps(description)})


def read_judge(path: str | Path, kind: str, shape: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return description and weights that `save_judge` wrote, with "sizes" as a VisionSizes.

    Raises UserError for a missing file, another kind, impossible sizes, and an invalid description.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{kind} {str(path)!r} does not exist; train one with scripts/train_rlhf.py")
    weights, metadata = read_safetensors(path)
    if kind not in metadata:
        raise UserError(f"{str(path)!r} has no description of a {kind} in its metadata; give a file of this project")
    description = parse_json(metadata[kind], shape, f"the description in {str(path)!r}", "train it again")
    if "sizes" in description:
        try:
            description["sizes"] = VisionSizes(**description["sizes"])
        except (UserError, TypeError) as error:
            raise UserError(f"{str(path)!r} describes an impossible judge ({error}); train it again") from error
    return description, weights


def build(make: Callable[[], nn.Module], weights: Mapping[str, torch.Tensor], path: str | Path) -> nn.Module:
    """Return the module of `make` with `weights`, frozen and in eval mode. Raises UserError if they do not fit."""
    try:
        with torch.device("meta"):  # allocates no memory: a file may describe a huge network
            expected = make().state_dict()
    except Exception as error:  # timm raises many kinds of errors for invalid descriptions
        raise UserError(f"{str(path)!r} describes a network that cannot be built ({one_line(error, 300)})") from error
    check_fit(weights, expected, path, "the file contradicts its own description, fetch or train it again")
    module = make()
    module.load_state_dict(weights)
    return module.requires_grad_(False).eval()
