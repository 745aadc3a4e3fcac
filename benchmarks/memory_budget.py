"""GPU memory that a full fine-tune of SD 1.5 needs, computed from its architecture: no GPU and no weights needed.

    python benchmarks/memory_budget.py --batch_size 4

The UNet of SD 1.5's public configuration lies on the meta device: shapes are real, numbers are not. Counted are
weights, gradients and weight average in float32, AdamW's states, the half-precision copies of the weights that
autocast keeps during a step, autoencoder and text encoder in float32, and the activations that autograd keeps; with
checkpointing these are the inputs of the blocks, and the activations of the largest block while it is computed again.
Not counted are buffers of kernels and fragmentation: leave them a few GB.
"""

import argparse
import logging
import sys

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D

logger = logging.getLogger(__name__)
GIB = 2**30
FROZEN = 83_653_863 + 123_060_480  # parameters of SD 1.5's autoencoder and text encoder


class Saved:
    """Bytes that autograd keeps within `with saved.hooks:`, each storage once; parameters do not count."""

    def __init__(self):
        self.bytes, self._seen, self._alive = 0, set(), []
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if not isinstance(tensor, torch.nn.Parameter) and storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self._alive.append(storage)  # so that no other storage gets its address
            self.bytes += storage.nbytes()
        return tensor


def activations(batch_size: int, image_size: int) -> tuple[float, float]:
    """GiB of activations in half precision: without checkpointing, and with it."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8).half().train()
        latents = torch.randn(batch_size, 4, image_size // 8, image_size // 8, dtype=torch.half, requires_grad=True)
        inputs = latents, torch.ones(batch_size), torch.randn(batch_size, 77, 768, dtype=torch.half)
    saved, entered, largest = Saved(), {}, 0

    def leave(block: torch.nn.Module, *_: object) -> None:
        nonlocal largest
        largest = max(largest, saved.bytes - entered[block])

    for block in unet.modules():
        if isinstance(block, BasicTransformerBlock | ResnetBlock2D):
            block.register_forward_pre_hook(lambda block, _: entered.__setitem__(block, saved.bytes))
            block.register_forward_hook(leave)
    with saved.hooks:
        unet(*inputs)
    whole = saved.bytes
    unet.enable_gradient_checkpointing()
    saved, block_bytes = Saved(), largest
    with saved.hooks:
        unet(*inputs)
    return whole / GIB, (saved.bytes + block_bytes) / GIB


def parameters() -> int:
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    return sum(parameter.numel() for parameter in unet.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory of a full fine-tune of SD 1.5.")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--image_size", type=int, default=512)
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    count = parameters()
    plain, checkpointed = activations(given.batch_size, given.image_size)
    fixed = {
        "UNet weights, float32": 4 * count / GIB,
        "gradients, float32": 4 * count / GIB,
        "weight average, float32": 4 * count / GIB,
        "half-precision copies under autocast": 2 * count / GIB,
        "autoencoder and text encoder, float32": 4 * FROZEN / GIB,
    }
    for name, gib in fixed.items():
        logger.info("%6.2f GiB  %s", gib, name)
    for adam, size in (("AdamW", 8), ("8-bit AdamW", 2)):
        for how, kept in (("all activations", plain), ("checkpointing", checkpointed)):
            logger.info(
                "%6.2f GiB  %s (%.2f), %s (%.2f): in all %.1f GiB",
                *(size * count / GIB + kept, adam, size * count / GIB, how, kept),
                sum(fixed.values()) + size * count / GIB + kept,
            )


if __name__ == "__main__":
    main()
