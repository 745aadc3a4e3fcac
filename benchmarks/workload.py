"""Workloads of benchmarks/training.py: models of three sizes, their settings and arithmetic, and train.py on them."""

import argparse
import ast
import datetime
import importlib.util
import logging
import os
import platform
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import numpy as np
import peft
import torch
import transformers
from accelerate.state import AcceleratorState, GradientState, PartialState
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from ml_collections import ConfigDict
from peft import LoraConfig
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

from ddpo_pytorch.data.isic import CAPTIONS
from ddpo_pytorch.generator import from_scratch as scratch
from ddpo_pytorch.prompts import get_prompt_fn
from ddpo_pytorch.rollout import Trajectories, draw_prompts
from ddpo_pytorch.stat_tracking import PerPromptStatTracker
from ddpo_pytorch.utils.distributed import DTYPES, StopRequest
from ddpo_pytorch.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "ddpo_pytorch/assets/mini"
SIZES = {
    "mini": {"mixed_precision": "no", "sample.guidance_scale": 1.0, "sample.num_steps": 10, "sample.batch_size": 16},
    "4m": {"mixed_precision": "no", "sample.guidance_scale": 5.0, "sample.num_steps": 10, "sample.batch_size": 8},
    "sd15": {"mixed_precision": "bf16", "sample.guidance_scale": 5.0, "sample.num_steps": 50, "sample.batch_size": 8},
}
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
RANK = 4
TOLERANCE = 1e-4  # between the two sides in float32

logger = logging.getLogger(__name__)


def load(path: str) -> ModuleType:
    """A script or configuration file of this repository as a module; absl wants it among the imported ones."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = sys.modules[Path(path).stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def random_model(size: str) -> StableDiffusionPipeline:
    """The pipeline of size 4m or sd15 with random weights, on torch's default device."""
    torch.manual_seed(0)
    tokenizer, text_encoder = scratch.build_clip(CAPTIONS, 64, 2)
    if size == "4m":
        unet = scratch.build_unet((64, 128), (True, True), 64, 16)
        return scratch.assemble(scratch.build_vae((16, 32, 32), 64), text_encoder, tokenizer, unet)
    text = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        sample_size=512,
    )
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    return scratch.assemble(vae, CLIPTextModel(text), tokenizer, unet)


def save_model(size: str, folder: Path) -> None:
    """Write it as a folder that train.py reads, in the type it is trained in."""
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    random_model(size).to(dtype=DTYPES[SIZES[size]["mixed_precision"]]).save_pretrained(folder)


def configure(model: Path, given: argparse.Namespace, updates: int = 1) -> ConfigDict:
    """config/base.py with the size's and the user's fields, and so many updates an epoch."""
    config = load("config/base.py").get_config()
    classifier = str(ASSETS / "artifact_classifier_H6.safetensors")
    fields = {"reward_fn_kwargs.isic_classifier_reward.classifier": classifier, "progress": False}
    fields |= {"pretrained.model": str(model), "sample.num_batches_per_epoch": given.batches}
    config.update_from_flattened_dict(SIZES[given.size] | fields)
    overrides = {}
    for assignment in given.set:
        name, _, value = assignment.partition("=")
        try:
            overrides[name] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            overrides[name] = value
    try:
        config.update_from_flattened_dict(overrides)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"--set takes name=value of config/base.py ({' '.join(str(error).split())})") from error
    if "train.batch_size" not in overrides:
        config.train.batch_size = config.sample.batch_size
    batches = config.sample.batch_size * given.batches // config.train.batch_size
    if batches % updates:
        raise UserError(f"--updates {updates} does not divide the {batches} train batches of an epoch")
    config.train.gradient_accumulation_steps = batches // updates
    return config


def unet_flops(model: Path) -> tuple[int, int]:
    """Of one UNet input: forward, and forward with the backward pass to the adapters."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(model / "unet"))
        unet.requires_grad_(False).set_attn_processor(AttnProcessor())  # the counter sees its matrix products
        add_adapters(unet)
        size = unet.config.sample_size
        inputs = torch.zeros(1, unet.config.in_channels, size, size), torch.ones(1)
        inputs += (torch.zeros(1, 77, unet.config.cross_attention_dim),)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        unet(*inputs)
    with FlopCounterMode(display=False) as both:
        unet(*inputs).sample.sum().backward()
    return forward.get_total_flops(), both.get_total_flops()


def matmul_peak(device: torch.device, dtype: torch.dtype, clock: Callable[[], float]) -> float:
    """FLOP/s of the best of ten products of large square matrices."""
    side = 8192 if device.type == "cuda" else 1024
    one, other = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(10):
        started = clock()
        one @ other
        seconds.append(clock() - started)
    return 2 * side**3 / min(seconds)


def add_adapters(unet: UNet2DConditionModel) -> None:
    """peft's LoRA on every attention projection."""
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=TARGETS))


def hardware() -> dict[str, str | int]:
    """Processor, its cores that this process may use, GPU, versions of what computes, and the date."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": cores(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        **{package.__name__: package.__version__ for package in (torch, diffusers, peft)},
        "date": datetime.date.today().isoformat(),
    }


class Ours:
    """scripts/train.py without its run folder."""

    def __init__(self, config: ConfigDict, given: argparse.Namespace):
        for state in (AcceleratorState, PartialState, GradientState):
            state._reset_state()
        use_threads(given.threads)
        self.script = load("scripts/train.py")
        self.run = self.script.set_up(config)
        self.pipe, self.optimizer = self.run.pipe, self.run.optimizer.optimizer
        self.device = self.run.accelerator.device
        self.stop_request = StopRequest(self.run.accelerator)

    def rollout(self, epoch: int, prompts: list[str], metadata: list) -> tuple[Trajectories, np.ndarray]:
        samples, scores = self.script.sample_and_score(self.run, epoch, prompts, metadata, self.stop_request)
        return samples, scores[:, 0].cpu().numpy()

    def update(self, epoch: int, samples: Trajectories, advantages: torch.Tensor) -> dict[str, float]:
        return self.script.update(self.run, epoch, samples, advantages)

    def recorded(self, inputs: int) -> tuple[int, int]:
        """UNet inputs, of `inputs` in an epoch, with gradients taken while sampling; and those that check a ratio."""
        gradients = self.run.gradients
        if not gradients:
            return 0, 0
        config = self.run.config
        rows = config.train.batch_size * config.train.timesteps_per_forward * (1 + (config.sample.guidance_scale > 1))
        return inputs * gradients.samples // self.run.sizes.local_samples, rows


def draw(config: ConfigDict, epoch: int) -> tuple[list[str], list]:
    """Prompts of an epoch, and their metadata for the reward."""
    count = config.sample.batch_size * config.sample.num_batches_per_epoch
    return draw_prompts(get_prompt_fn(config.prompt_fn), config.seed, epoch, count)


def same_adapters(unet: torch.nn.Module, other: torch.nn.Module, seed: int = 0) -> None:
    """Give the adapters of both the same random weights, which change the output."""
    generator = torch.Generator().manual_seed(seed)
    others = {name: weight for name, weight in other.named_parameters() if weight.requires_grad}
    for name, weight in unet.named_parameters():
        if weight.requires_grad:
            weight.data.copy_(torch.randn(weight.shape, generator=generator) / 10)
            others.pop(name).data.copy_(weight.data)
    if others:
        raise RuntimeError(f"trained on one side only: {', '.join(others)}")


def count_work(side: Any) -> dict[str, int]:
    """UNet inputs and optimizer steps of a side from now on."""
    done = {"inputs": 0, "steps": 0}
    side.pipe.unet.register_forward_pre_hook(lambda _, args: done.update(inputs=done["inputs"] + len(args[0])))
    side.optimizer.register_step_post_hook(lambda *_: done.update(steps=done["steps"] + 1))
    return done


def apart(function: Callable, *arguments: object) -> Any:
    """Return the result of `function` from a forked process, before torch has started threads or a GPU."""
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        return pool.submit(function, *arguments).result()


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def log_plainly() -> None:
    """Bare lines on stdout, and no progress bars of loading."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def use_threads(count: int) -> None:
    """Keep this process to that many of its cores: train.py takes as many threads as it may use cores."""
    if count < cores():
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-count:])
    torch.set_num_threads(count)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Speed and memory of train.py against ddpo-pytorch's loops.")
    parser.add_argument("--size", choices=SIZES, default="mini")
    parser.add_argument("--attention", choices=("sdpa", "explicit"), default="sdpa", help="the baseline's")
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--turns", type=int, default=5, help="timed epochs of each side")
    parser.add_argument("--batches", type=int, default=2, help="rollout batches of an epoch")
    parser.add_argument("--updates", type=int, default=1, help="of the weights in an epoch; 2 in the paper")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a field of config/base.py")
    given = parser.parse_args()
    if min(given.threads, given.turns, given.batches, given.updates) < 1 or given.threads > cores():
        parser.exit(2, f"error: --threads can be 1 to {cores()}, --turns, --batches and --updates 1 or more\n")
    return given


def agree(what: str, ours: torch.Tensor | float, baseline: torch.Tensor | float) -> None:
    """Raise RuntimeError where the two differ by more than the tolerance."""
    difference = (torch.as_tensor(ours) - torch.as_tensor(baseline)).abs().max().item()
    logger.info("%s: ours and the baseline's differ by %.1e", what, difference)
    if not difference <= TOLERANCE:
        raise RuntimeError(f"{what} differ by {difference}; the two sides do not do the same work")


def epoch_of(side: Any, config: ConfigDict, epoch: int, clock: Callable[[], float]) -> dict[str, float]:
    """Seconds of a whole epoch and of its parts."""
    started = clock()
    prompts, metadata = draw(config, epoch)
    samples, rewards = side.rollout(epoch, prompts, metadata)
    sampled = clock()
    advantages = PerPromptStatTracker(**config.per_prompt_stat_tracking).update(prompts, rewards)
    side.update(epoch, samples, torch.as_tensor(advantages, dtype=torch.float32, device=side.device))
    return {"rollout": sampled - started, "update": clock() - sampled, "epoch": clock() - started}
