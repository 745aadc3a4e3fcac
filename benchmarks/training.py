"""How fast train.py learns, as ratios within one run to the loops of ddpo-pytorch on bare diffusers and peft.

    python benchmarks/training.py --size 4m

Ours is what scripts/train.py runs, `sample_and_score` and `update`, set up by its own `set_up`. The baseline is written
out below as ddpo-pytorch has it: prompts encoded in every batch, alphas looked up on the host at every step, one
timestep a forward pass, trajectories stacked, copied and permuted. Both train the same LoRA on the same model.

First both score and train one fixed batch in float32, with one update: log-probs, loss and gradient norm have to agree,
and UNet inputs and optimizer steps have to be as many as expected. Then epochs run by turns; medians are compared. With
train.gradients_while_sampling, the default, rollouts of ours take backward passes and its updates are spared forward
passes, so that epochs compare, not their parts; these do with --set train.gradients_while_sampling=False.

On one CPU thread times are CPU seconds, which waiting for other programs does not change; on more, or a GPU, seconds of
the clock. Peak memory of either side is that of a process of its own. Settings are compared through --set, e.g. --set
train.batch_size=4.

Sizes: mini, the embedded model (64 px, no guidance); 4m, a random UNet of 4 million parameters on 16 x 16 latents;
sd15, SD 1.5's architecture with random weights, bfloat16, for a GPU. The last line is JSON.
"""

import argparse
import json
import logging
import math
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import workload
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from ml_collections import ConfigDict

from ddpo_pytorch.rewards import build_reward
from ddpo_pytorch.utils.distributed import DTYPES, peak_memory_gib
from ddpo_pytorch.utils.errors import UserError

logger = logging.getLogger(__name__)


class Baseline:
    """ddpo-pytorch's epoch on diffusers' modules and peft's adapters, in plain loops."""

    def __init__(self, config: ConfigDict, given: argparse.Namespace):
        self.config, self.dtype = config, DTYPES[config.mixed_precision]
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        workload.use_threads(given.threads)
        self.pipe = StableDiffusionPipeline.from_pretrained(
            config.pretrained.model, dtype=self.dtype, safety_checker=None, requires_safety_checker=False
        ).to(self.device)
        self.pipe.scheduler = DDIMScheduler.from_config(self.pipe.scheduler.config)
        for part in (self.pipe.vae, self.pipe.text_encoder, self.pipe.unet):
            part.requires_grad_(False)
        if given.attention == "explicit":
            self.pipe.unet.set_attn_processor(AttnProcessor())
        workload.add_adapters(self.pipe.unet)
        self.weights = [weight for weight in self.pipe.unet.parameters() if weight.requires_grad]
        for weight in self.weights:
            weight.data = weight.data.float()
        train = config.train
        self.optimizer = torch.optim.AdamW(
            self.weights,
            lr=train.learning_rate,
            betas=(train.adam_beta1, train.adam_beta2),
            weight_decay=train.adam_weight_decay,
            eps=train.adam_epsilon,
        )
        self.reward_fn = build_reward(config.reward_fn, config.reward_fn_kwargs.to_dict(), self.device)
        self.executor = ThreadPoolExecutor(max_workers=2)
        self.noise, self.orders = torch.Generator(self.device).manual_seed(0), torch.Generator().manual_seed(0)
        self.negative = self.encode([""])

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> torch.Tensor:
        tokens = self.pipe.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return self.pipe.text_encoder(tokens.to(self.device))[0]

    def predict(self, latents: torch.Tensor, timesteps: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        guidance, unet = self.config.sample.guidance_scale, self.pipe.unet
        if guidance <= 1:
            return unet(latents, timesteps, encoder_hidden_states=embeds).sample.float()
        both = torch.cat([self.negative.repeat(len(embeds), 1, 1), embeds])
        noise = unet(torch.cat([latents] * 2), torch.cat([timesteps] * 2), encoder_hidden_states=both).sample
        unconditional, conditional = noise.float().chunk(2)
        return unconditional + guidance * (conditional - unconditional)

    def alphas(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of this timestep and the next, (B, 1, 1, 1), from the scheduler's table on the host."""
        scheduler = self.pipe.scheduler
        table, stride = scheduler.alphas_cumprod, scheduler.config.num_train_timesteps // scheduler.num_inference_steps
        now = table.gather(0, timesteps.cpu()).to(self.device)
        after = table.gather(0, (timesteps - stride).clamp(min=0).cpu()).to(self.device)
        return now[:, None, None, None], after[:, None, None, None]

    def step(self, noise, timesteps, latents, next_latents=None) -> tuple[torch.Tensor, torch.Tensor]:
        """DDIM's next latents, drawn or given, and their mean log density (B,)."""
        alpha, after = self.alphas(timesteps)
        # ddpo-pytorch looks the alphas up once more for the variance
        (alpha_again, after_again), eta = self.alphas(timesteps), self.config.sample.eta
        std = eta * ((1 - after_again) / (1 - alpha_again) * (1 - alpha_again / after_again)).sqrt()
        clean = (latents.float() - (1 - alpha).sqrt() * noise) / alpha.sqrt()
        mean = after.sqrt() * clean + (1 - after - std**2).clamp(min=0).sqrt() * noise
        if next_latents is None:
            drawn = torch.randn(mean.shape, generator=self.noise, device=self.device)
            next_latents = (mean + std * drawn).to(latents.dtype)
        density = -((next_latents.float() - mean) ** 2) / (2 * std**2) - std.log() - math.log(math.sqrt(2 * math.pi))
        return next_latents, density.mean(dim=(1, 2, 3))

    def rollout(self, epoch: int, prompts: list[str], metadata: list) -> tuple[dict[str, torch.Tensor], np.ndarray]:
        size, parts, rewards = self.config.sample.batch_size, [], []
        for start in range(0, len(prompts), size):
            texts = prompts[start : start + size]
            images, part = self.denoise(texts)
            parts.append(part)
            rewards.append(self.executor.submit(self.reward_fn, images, texts, metadata[start : start + size]))
        samples = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return samples, np.concatenate([reward.result()[0] for reward in rewards])

    @torch.no_grad()
    def denoise(self, prompts: list[str]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        pipe, count = self.pipe, len(prompts)
        with self.autocast():
            embeds = self.encode(prompts)
            pipe.scheduler.set_timesteps(self.config.sample.num_steps, device=self.device)
            shape = (count, pipe.unet.config.in_channels, pipe.unet.config.sample_size, pipe.unet.config.sample_size)
            latents = torch.randn(shape, generator=self.noise, device=self.device).to(embeds.dtype)
            all_latents, log_probs = [latents], []
            for timestep in pipe.scheduler.timesteps:
                timesteps = timestep.repeat(count)
                latents, log_prob = self.step(self.predict(latents, timesteps, embeds), timesteps, latents)
                all_latents.append(latents)
                log_probs.append(log_prob)
            images = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
        stacked = torch.stack(all_latents, dim=1)
        part = {"embeds": embeds, "timesteps": pipe.scheduler.timesteps.repeat(count, 1)}
        part |= {"latents": stacked[:, :-1], "next_latents": stacked[:, 1:], "log_probs": torch.stack(log_probs, dim=1)}
        return (images.float() / 2 + 0.5).clamp(0, 1), part

    def update(self, epoch: int, samples: dict[str, torch.Tensor], advantages: torch.Tensor) -> dict[str, float]:
        train, (count, length) = self.config.train, samples["timesteps"].shape
        order = torch.randperm(count, generator=self.orders)
        samples = {name: value[order.to(self.device)] for name, value in (samples | {"advantages": advantages}).items()}
        steps = torch.stack([torch.randperm(length, generator=self.orders) for _ in range(count)])
        rows = torch.arange(count)[:, None]
        for name in ("timesteps", "latents", "next_latents", "log_probs"):
            samples[name] = samples[name][rows.to(self.device), steps.to(self.device)]
        accumulated, losses, norms = train.gradient_accumulation_steps * length, [], []
        for start in range(0, count, train.batch_size):
            batch = {name: value[start : start + train.batch_size] for name, value in samples.items()}
            for j in range(length):
                loss = self.loss(batch, j)
                (loss / accumulated).backward()
                losses.append(loss.detach())
                if len(losses) % accumulated == 0:
                    norms.append(torch.nn.utils.clip_grad_norm_(self.weights, train.max_grad_norm))
                    self.optimizer.step()
                    self.optimizer.zero_grad()
        return {"loss": torch.stack(losses).mean().item(), "grad_norm": torch.stack(norms).mean().item()}

    def score(self, batch: dict[str, torch.Tensor], j: int) -> torch.Tensor:
        """Log-probs (B,) of step j of trajectories that were drawn earlier."""
        latents, timesteps = batch["latents"][:, j], batch["timesteps"][:, j]
        with self.autocast():
            noise = self.predict(latents, timesteps, batch["embeds"])
        return self.step(noise, timesteps, latents, batch["next_latents"][:, j])[1]

    def loss(self, batch: dict[str, torch.Tensor], j: int) -> torch.Tensor:
        """PPO's clipped surrogate."""
        train = self.config.train
        advantages = batch["advantages"].clamp(-train.adv_clip_max, train.adv_clip_max)
        ratio = (self.score(batch, j) - batch["log_probs"][:, j]).exp()
        clipped = ratio.clamp(1 - train.clip_range, 1 + train.clip_range)
        return torch.maximum(-advantages * ratio, -advantages * clipped).mean()


def check(model: Path, given: argparse.Namespace, while_sampling: bool) -> None:
    """One epoch of at most 4 steps in float32, of either side. Raises RuntimeError where they do not agree.

    while_sampling: ours takes gradients then; else the update has other weights than drew the samples, so ratios are
    not 1.
    """
    config = workload.configure(model, given)
    config.mixed_precision, config.allow_tf32, config.sample.num_steps = "no", False, min(config.sample.num_steps, 4)
    config.train.gradients_while_sampling = while_sampling
    ours, baseline = workload.Ours(config, given), Baseline(config, given)
    prompts, metadata = workload.draw(config, 0)
    counted = {"ours": workload.count_work(ours), "baseline": workload.count_work(baseline)}
    workload.same_adapters(ours.pipe.unet, baseline.pipe.unet)
    samples, _ = ours.rollout(0, prompts, metadata)
    theirs, _ = baseline.rollout(0, prompts, metadata)
    inputs = samples.log_probs.numel() * (2 if config.sample.guidance_scale > 1 else 1)
    theirs |= {"latents": samples.latents[:, :-1], "next_latents": samples.latents[:, 1:]}
    with torch.no_grad():
        scored = [baseline.score(theirs, j) for j in range(config.sample.num_steps)]
    workload.agree("log-probs", samples.log_probs, torch.stack(scored, dim=1))
    theirs["log_probs"] = samples.log_probs
    if not while_sampling:
        workload.same_adapters(ours.pipe.unet, baseline.pipe.unet, seed=1)
    counted["baseline"]["inputs"] -= inputs  # of the scoring
    advantages = torch.linspace(-1, 2, len(prompts), device=ours.device)
    own, their = ours.update(0, samples, advantages), baseline.update(0, theirs, advantages)
    workload.agree("loss", own["loss"], their["loss"])
    workload.agree("gradient norm, relative", own["grad_norm"] / their["grad_norm"], 1.0)
    recorded, checked = ours.recorded(inputs)
    expected = {"ours": 2 * inputs - recorded + checked, "baseline": 2 * inputs}
    if any(counted[name] != {"inputs": count, "steps": 1} for name, count in expected.items()):
        raise RuntimeError(f"work differs: {counted}, expected {expected} UNet inputs and 1 optimizer step")


def peak_memory(kind: type, model: Path, given: argparse.Namespace) -> float:
    """Peak of a process with two epochs, MiB."""
    config = workload.configure(model, given, given.updates)
    side = kind(config, given)
    for epoch in range(2):
        workload.epoch_of(side, config, epoch, time.perf_counter)
    return round(1024 * peak_memory_gib(), 1)


def measure(model: Path, given: argparse.Namespace) -> dict:
    """Medians of `turns` epochs of both sides by turns, after one that is not counted; speeds, ratios, utilisation."""
    config = workload.configure(model, given, given.updates)
    sides = {"ours": workload.Ours(config, given), "baseline": Baseline(config, given)}
    device = sides["ours"].device

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.process_time() if device.type == "cpu" and given.threads == 1 else time.perf_counter()

    times = {name: [] for name in sides}
    for turn in range(given.turns + 1):
        for name, side in sides.items():
            times[name].append(workload.epoch_of(side, config, turn, clock))
    median = {
        name: {part: statistics.median(taken[part] for taken in all_turns[1:]) for part in all_turns[0]}
        for name, all_turns in times.items()
    }
    samples = config.sample.batch_size * given.batches
    inputs = samples * config.sample.num_steps * (2 if config.sample.guidance_scale > 1 else 1)
    peak = workload.matmul_peak(device, DTYPES[config.mixed_precision], clock)
    forward, both = workload.unet_flops(model)
    result = {"samples": samples, "unet_inputs": inputs, "steps": config.sample.num_steps}
    result["matmul_peak_tflops"] = round(peak / 1e12, 3)
    for name, seconds in median.items():
        result[name] = {f"{part}_samples_per_s": round(samples / taken, 3) for part, taken in seconds.items()}
        result[name] |= {f"{part}_ms_per_input": round(1e3 * taken / inputs, 3) for part, taken in seconds.items()}
        recorded, checked = sides[name].recorded(inputs) if name == "ours" else (0, 0)
        work = {"rollout": forward * inputs + (both - forward) * recorded}
        work["update"] = both * (inputs - recorded) + forward * checked
        work["epoch"] = work["rollout"] + work["update"]
        result[name] |= {f"{part}_utilisation": round(work[part] / seconds[part] / peak, 4) for part in work}
    result["ratio"] = {part: round(median["baseline"][part] / median["ours"][part], 3) for part in median["ours"]}
    return result


def main() -> None:
    given = workload.arguments()
    workload.log_plainly()
    try:
        with tempfile.TemporaryDirectory() as name:
            model = workload.ASSETS / "sd" if given.size == "mini" else Path(name)
            if given.size != "mini":
                workload.apart(workload.save_model, given.size, model)
            for while_sampling in (False, True):
                workload.apart(check, model, given, while_sampling)
            result = workload.apart(measure, model, given)
            ours, baseline = (workload.apart(peak_memory, kind, model, given) for kind in (workload.Ours, Baseline))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    ratio = result["ratio"] | {"memory": round(ours / baseline, 3)}
    result |= {"ratio": ratio, "peak_mib": {"ours": ours, "baseline": baseline}, **vars(given)} | workload.hardware()
    logger.info("rollout %s, update %s, epoch %s times as fast as the baseline, %s of its peak memory", *ratio.values())
    logger.info("%s", json.dumps(result))


if __name__ == "__main__":
    main()
