"""The policy of stage (ii): a pipeline whose UNet, or adapters on it, can be trained by policy gradient."""

import logging

import torch
from diffusers import StableDiffusionPipeline
from ml_collections import ConfigDict

from ddpo_pytorch.diffusers_patch.ddim_with_logprob import check_schedule
from ddpo_pytorch.generator.cpu_kernels import fuse_lora
from ddpo_pytorch.generator.lora import add_lora
from ddpo_pytorch.generator.pipeline import load_pipeline, set_schedule
from ddpo_pytorch.generator.threads import divide_among_threads
from ddpo_pytorch.training.checkpoints import load_weights
from ddpo_pytorch.utils.distributed import sharding_asked

logger = logging.getLogger(__name__)


def load_policy(
    pretrained: ConfigDict,
    unet_path: str,
    sample: ConfigDict,
    train: ConfigDict,
    use_lora: bool,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
    load_from: str = "",
) -> StableDiffusionPipeline:
    """Load the pipeline of `config.pretrained` and `unet_path`, with its schedule, frozen but for the policy.

    The policy is in float32: LoRA adapters of `config.train`, or the whole UNet. Adapters start from a function of
    `seed` that changes nothing; with `load_from`, which eval.py reads in the same way, the policy starts from the
    weights there. The rest is in `dtype`. Raises UserError for files that do not fit, and for a schedule that cannot be
    trained.
    """
    pipe = load_pipeline(pretrained.model, pretrained.revision, unet_path, dtype, device)
    pipe.set_progress_bar_config(disable=True)
    set_schedule(pipe, sample.num_steps)
    check_schedule(pipe.scheduler, sample.eta)
    # what convolutions are fastest in; but FSDP divides contiguous weights only
    for part in (pipe.vae,) if sharding_asked() else (pipe.unet, pipe.vae):
        part.to(memory_format=torch.channels_last)
    if use_lora:
        add_lora(pipe.unet, train.lora_rank, train.lora_targets, seed)
        fuse_lora(pipe.unet)
    else:
        pipe.unet.float().requires_grad_(True)
    if load_from:
        logger.info("training starts from %s", load_weights(pipe.unet, load_from, adapters=use_lora))
    if train.gradient_checkpointing:
        pipe.unet.enable_gradient_checkpointing()
    if train.compile:
        pipe.unet.compile_repeated_blocks()
    elif device.type == "cpu" and torch.get_num_threads() > 1 and not sharding_asked():
        divide_among_threads(pipe.unet, torch.get_num_threads())
    return pipe
