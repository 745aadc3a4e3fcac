"""A UNet of the right kind and no size, and what LoRA should do to it, for the LoRA tests."""

import copy

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from ddpo_pytorch.generator.from_scratch import build_unet
from ddpo_pytorch.generator.lora import lora_parameters

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
RANK = 4


def make_unet() -> UNet2DConditionModel:
    """Return the same weights at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build_unet((8, 16), (True, False), text_width=12, latent_size=8).requires_grad_(False)


def projections(unet: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in unet.named_modules() if name.endswith(TARGETS)}


def random_weights(unet: nn.Module, rank: int = RANK) -> dict[str, torch.Tensor]:
    """Random adapter weights for every attention projection: <module>.down (rank, in) and <module>.up (out, rank)."""
    generator = torch.Generator().manual_seed(1)
    weights = {}
    for name, layer in projections(unet).items():
        weights[f"{name}.down"] = torch.randn(rank, layer.in_features, generator=generator)
        weights[f"{name}.up"] = 0.05 * torch.randn(layer.out_features, rank, generator=generator)
    return weights


def run(unet: nn.Module) -> torch.Tensor:
    """Output in float64: strong adapters amplify rounding, differently on each processor."""
    generator = torch.Generator().manual_seed(2)
    sample, text = (torch.randn(2, *shape, generator=generator).double() for shape in ((4, 8, 8), (5, 12)))
    with torch.no_grad():
        return copy.deepcopy(unet).double()(sample, torch.tensor([10, 700]), encoder_hidden_states=text).sample


def run_by_hand(weights: dict[str, torch.Tensor], scale: float = 1.0) -> torch.Tensor:
    """Output of a plain UNet in which hooks add scale * up(down(x)) to each projection: LoRA without any library."""
    unet = make_unet()
    for name, layer in projections(unet).items():
        down, up = weights[f"{name}.down"].double(), weights[f"{name}.up"].double()
        layer.register_forward_hook(lambda _, x, y, down=down, up=up: y + scale * (x[0] @ down.T @ up.T))
    return run(unet)


def randomize(unet: nn.Module) -> None:
    """Give every adapter weight a random value that moves the output."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in lora_parameters(unet):
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


def legacy(weights: dict[str, torch.Tensor], prefix: str = "") -> dict[str, torch.Tensor]:
    """Names of diffusers < 0.22, as in the published checkpoint."""
    renamed = {}
    for key, value in weights.items():
        module, half = key.rsplit(".", 1)
        attention, projection = module.replace(".to_out.0", ".to_out").rsplit(".", 1)
        renamed[f"{prefix}{attention}.processor.{projection}_lora.{half}.weight"] = value
    return renamed
