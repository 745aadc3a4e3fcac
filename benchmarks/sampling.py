"""How fast eval.py draws on a CPU, as ratios within one run, and that its memory does not grow with the images.

    python benchmarks/sampling.py

The mini model (64 px), 10 steps, batches of 64, guidance 1 and 3. (a) eval.py's path, files and log included, against a
bare loop over diffusers' own pipeline, prompts embedded once, nothing saved. (b) The same path with LoRA of rank 4,
against sampling as the official code does it: prompts encoded in every batch, alphas looked up on the host at every
step, LoRA in attention processors with explicit softmax, trajectory and log-probs kept and copied, JPEGs. (c) Peak
resident memory of eval.py for N and 4 N images. (d) Pair (a) on all cores: eval.py's workers against the bare loop with
as many torch threads; give at least 32 images for every core. Ours uses channels_last and passes of 32; the bare loop
has diffusers' memory format and one batch. Both sides of a pair run by turns. On one thread, CPU seconds are compared,
which waiting for other programs does not change; on all cores, seconds of the clock, so the machine has to be idle. The
last line is JSON.
"""

import argparse
import json
import logging
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from torch import nn

from ddpo_pytorch.data.isic import CAPTIONS
from ddpo_pytorch.data.sample_folder import part_log
from ddpo_pytorch.generator.lora import ATTENTION, add_lora
from ddpo_pytorch.generator.pipeline import PromptEmbeddings, load_pipeline
from ddpo_pytorch.sampling import Sampler, draw_passes, images_per_pass, plan

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "ddpo_pytorch/assets/mini/sd"
CONFIG = "config/mini.py:prompt_image_alignment_classifier_isic_eval"
STEPS, RANK = 10, 4
logger = logging.getLogger(__name__)


def by_turns(
    first: Callable[[], None], second: Callable[[], None], turns: int, clock: Callable[[], float] = time.process_time
) -> tuple[float, float]:
    """Median seconds of each, of the CPU by default; both run once untimed before."""
    seconds = ([], [])
    for turn in range(turns + 1):
        for kind, function in enumerate((first, second)):
            started = clock()
            function()
            if turn:
                seconds[kind].append(clock() - started)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def eval_path(folder: Path, count: int, guidance: float, lora: bool, workers: int = 1) -> Callable[[], None]:
    """As scripts/eval.py draws on `workers` cores, without a judge: `count` images, over the captions by turns."""
    pipe = load_pipeline(MODEL)
    if lora:
        add_lora(pipe.unet, RANK, ATTENTION, seed=0)
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.vae.to(memory_format=torch.channels_last)
    sampler = Sampler(pipe, "ddim", STEPS, 1.0, guidance)
    jobs = plan([(caption, {}) for caption in CAPTIONS], math.ceil(count / len(CAPTIONS)), seed=0)[:count]
    size = images_per_pass(pipe, count)

    passes = [jobs[start : start + size] for start in range(0, count, size)]

    def run() -> None:
        torch.set_num_threads(1)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for _ in draw_passes(sampler, passes, workers, size, folder, part_log(folder, 0)):
            pass

    return run


def plain_diffusers() -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(MODEL, safety_checker=None)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prompts_of(count: int) -> list[str]:
    return [CAPTIONS[number % len(CAPTIONS)] for number in range(count)]


def bare_loop(count: int, guidance: float, threads: int = 1) -> Callable[[], None]:
    """One call of diffusers' pipeline on that many torch threads."""
    pipe = plain_diffusers()
    table = PromptEmbeddings(pipe)
    embeds = table(prompts_of(count))

    def run() -> None:
        torch.set_num_threads(threads)
        pipe(
            prompt_embeds=embeds,
            negative_prompt_embeds=table.negative.expand_as(embeds),
            num_inference_steps=STEPS,
            guidance_scale=guidance,
            eta=1.0,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        )

    return run


class ExplicitLoraAttention(nn.Module):
    """Attention as diffusers 0.17's LoRA processor computed it: scores and softmax written out, adapters beside."""

    def __init__(self, attention: nn.Module):
        super().__init__()
        pairs = {}
        for name, layer in zip(
            "qkvo", (attention.to_q, attention.to_k, attention.to_v, attention.to_out[0]), strict=True
        ):
            down, up = (nn.Linear(layer.in_features, RANK, bias=False), nn.Linear(RANK, layer.out_features, bias=False))
            pairs[name] = nn.Sequential(down, up)
        self.lora = nn.ModuleDict(pairs)

    def forward(self, attention, hidden_states, encoder_hidden_states=None, **_):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        split = attention.head_to_batch_dim
        query = split(attention.to_q(hidden_states) + self.lora["q"](hidden_states))
        key = split(attention.to_k(context) + self.lora["k"](context))
        value = split(attention.to_v(context) + self.lora["v"](context))
        mixed = attention.batch_to_head_dim(torch.bmm(attention.get_attention_scores(query, key), value))
        return attention.to_out[0](mixed) + self.lora["o"](mixed)


def official_step(scheduler, noise: torch.Tensor, timestep: torch.Tensor, latents: torch.Tensor):
    """DDIM step with eta = 1 and the mean log density of its draw; alphas are looked up on the host."""
    table = scheduler.alphas_cumprod
    previous = timestep - scheduler.config.num_train_timesteps // STEPS
    alpha = table.gather(0, timestep.cpu()).to(latents.device)
    alpha_previous = table.gather(0, previous.clamp(min=0).cpu()).to(latents.device)
    clean = (latents - (1 - alpha).sqrt() * noise) / alpha.sqrt()
    std = ((1 - alpha_previous) / (1 - alpha) * (1 - alpha / alpha_previous)).sqrt()
    mean = alpha_previous.sqrt() * clean + (1 - alpha_previous - std**2).clamp(min=0).sqrt() * noise
    sample = mean + std * torch.randn(mean.shape)
    density = -((sample - mean) ** 2) / (2 * std**2) - std.log() - math.log(math.sqrt(2 * math.pi))
    return sample, density.mean(dim=(1, 2, 3))


def official_way(folder: Path, count: int, guidance: float) -> Callable[[], None]:
    pipe = plain_diffusers()
    modules = dict(pipe.unet.named_modules())
    names = pipe.unet.attn_processors
    pipe.unet.set_attn_processor(
        {name: ExplicitLoraAttention(modules[name.removesuffix(".processor")]) for name in names}
    )

    def encode(prompts: Sequence[str]) -> torch.Tensor:
        tokens = pipe.tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt").input_ids
        return pipe.text_encoder(tokens)[0]

    @torch.no_grad()
    def run() -> None:
        torch.set_num_threads(1)
        folder.mkdir(exist_ok=True)
        embeds, negative = encode(prompts_of(count)), encode([""]).repeat(count, 1, 1)
        context = torch.cat([negative, embeds]) if guidance > 1 else embeds
        pipe.scheduler.set_timesteps(STEPS)
        side = pipe.unet.config.sample_size
        latents = torch.randn(count, pipe.unet.config.in_channels, side, side)
        all_latents, log_probs = [latents], []
        for timestep in pipe.scheduler.timesteps:
            doubled = torch.cat([latents, latents]) if guidance > 1 else latents
            noise = pipe.unet(doubled, timestep, encoder_hidden_states=context).sample
            if guidance > 1:
                unconditional, conditional = noise.chunk(2)
                noise = unconditional + guidance * (conditional - unconditional)
            latents, log_prob = official_step(pipe.scheduler, noise, timestep[None], latents)
            all_latents.append(latents)
            log_probs.append(log_prob)
        images = (pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
        stacked = torch.stack(all_latents, dim=1)
        _ = stacked[:, :-1].clone(), stacked[:, 1:].clone(), torch.stack(log_probs, dim=1)
        for number, image in enumerate(images):
            pixels = (image.permute(1, 2, 0).numpy() * 255).astype("uint8")
            Image.fromarray(pixels).save(folder / f"{number}.jpg")

    return run


def peak_mib(folder: Path, images_per_prompt: int, batch_size: int) -> int:
    """Peak resident memory of a whole run of scripts/eval.py over the 32 captions, MiB."""
    fields = {"logdir": folder, "eval.num_samples_per_prompt": images_per_prompt, "eval.batch_size": batch_size}
    fields |= {"sample.num_steps": 2}
    options = [f"--config={CONFIG}", *(f"--config.{name}={value}" for name, value in fields.items())]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "scripts/eval.py", *options]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(command)} failed")
    return round(usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**20)


def measure(folder: Path, guidance: float, count: int, turns: int, cores: int) -> dict[str, float]:
    """Images a second of all, and the three ratios."""
    bare, own = by_turns(bare_loop(count, guidance), eval_path(folder / "own", count, guidance, lora=False), turns)
    official, own_lora = by_turns(
        official_way(folder / "official", count, guidance), eval_path(folder / "lora", count, guidance, True), turns
    )
    all_bare, all_own = by_turns(
        bare_loop(count, guidance, cores),
        eval_path(folder / "cores", count, guidance, lora=False, workers=cores),
        turns,
        time.perf_counter,
    )
    times = {"eval_all_cores": all_own, "bare_diffusers_all_cores": all_bare}
    times |= {"eval": own, "bare_diffusers": bare, "eval_lora": own_lora, "official_way": official}
    speeds = {f"{name}_images_per_s": round(count / seconds, 2) for name, seconds in times.items()}
    ratios = {"against_bare": bare / own, "against_official": official / own_lora, "all_cores": all_bare / all_own}
    return speeds | {name: round(ratio, 3) for name, ratio in ratios.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed and memory of eval.py.")
    parser.add_argument("--count", type=int, default=64, help="images of a batch")
    parser.add_argument("--turns", type=int, default=5, help="timed repetitions of each side")
    parser.add_argument("--images_per_prompt", type=int, default=4, help="N / 32 of the memory figures")
    given = parser.parse_args()
    if min(given.count, given.turns, given.images_per_prompt) < 1:
        parser.exit(2, "error: --count, --turns and --images_per_prompt must be at least 1\n")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    result = {"cores": cores}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for guidance in (1.0, 3.0):
            result[f"guidance_{guidance:g}"] = ratios = measure(folder, guidance, given.count, given.turns, cores)
            logger.info(
                "guidance %g: %s times as fast as bare diffusers, on %d core(s) %s times; with LoRA, %s times as the "
                "official way",
                *(guidance, ratios["against_bare"], cores, ratios["all_cores"], ratios["against_official"]),
            )
        small, large = (
            peak_mib(folder / f"x{factor}", factor * given.images_per_prompt, given.count) for factor in (1, 4)
        )
    images = 32 * given.images_per_prompt
    result["peak_mib"] = {str(images): small, str(4 * images): large}
    logger.info("peak memory of eval.py: %d MiB for %d images, %d MiB for %d", small, images, large, 4 * images)
    result |= {"processor": platform.processor() or platform.machine(), "torch": torch.__version__}
    logger.info("%s", json.dumps(result))


if __name__ == "__main__":
    main()
