"""DDPO: fine-tune a Stable Diffusion so that its images earn more reward (stage (ii)).

    accelerate launch scripts/train.py --config config/dgx.py:prompt_image_alignment_classifier_isic

Denoising is a Markov decision process: state (latents, timestep, caption), action the next latents, reward on the final
image. Each epoch samples trajectories with the current policy, scores the images, and takes PPO-clipped policy-gradient
steps on them (equation 2 of the RL4Med-DDPO paper).
"""

import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from absl import flags
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline
from ml_collections import ConfigDict, config_flags
from tqdm.auto import tqdm

from ddpo_pytorch.cli import cli
from ddpo_pytorch.data.images import image_grid
from ddpo_pytorch.diffusers_patch.ddim_with_logprob import ddim_step_with_logprob
from ddpo_pytorch.errors import UserError
from ddpo_pytorch.generator.lora import disabled_lora
from ddpo_pytorch.generator.pipeline import PromptTable, guided_noise_prediction
from ddpo_pytorch.held_out import HeldOut, Sampling, draw_images, load_judge
from ddpo_pytorch.policy import load_policy
from ddpo_pytorch.ppo import make_optimizer, ppo_loss, step_kl
from ddpo_pytorch.prompts import PROMPT_LISTS, Prompt, all_prompts, get_prompt_fn
from ddpo_pytorch.randomness import Stream
from ddpo_pytorch.record import Record
from ddpo_pytorch.rewards import RewardFn, build_reward, check_prompts, parse_spec
from ddpo_pytorch.rollout import (
    Trajectories,
    draw_prompts,
    generators,
    sample_trajectories,
    timestep_order,
    update_order,
)
from ddpo_pytorch.run import DTYPES, Geometry, batch_geometry, check_training, make_accelerator, peak_memory_gib
from ddpo_pytorch.stat_tracking import PerPromptStatTracker, compute_advantages, reward_statistics
from ddpo_pytorch.stopping import BestAndCollapse, RewardPlateau

config_flags.DEFINE_config_file("config", "config/base.py", "experiment, e.g. config/mini.py:NAME")
logger = logging.getLogger(__name__)


@dataclass
class Run:
    """What the stages of an epoch share. `unet` is `pipe.unet` as prepared for training: it averages gradients."""

    config: ConfigDict
    accelerator: Accelerator
    geometry: Geometry
    pipe: StableDiffusionPipeline
    unet: torch.nn.Module
    optimizer: torch.optim.Optimizer
    table: PromptTable
    reward_fn: RewardFn
    executor: ThreadPoolExecutor

    @property
    def first_sample(self) -> int:
        """Global index of this process's first sample of an epoch."""
        return self.accelerator.process_index * self.geometry.local_samples


def train(config: ConfigDict) -> Path:
    """Run the experiment and return its run folder."""
    run, prompt_fn, held_out = set_up(config)
    accelerator, geometry = run.accelerator, run.geometry
    record = open_record(run, held_out)
    if record.epoch >= config.num_epochs:
        done, asked = record.epoch, config.num_epochs
        logger.info("nothing is left to do: %s has %d epochs, num_epochs is %d", record.folder, done, asked)
        accelerator.end_training()
        return record.folder
    record.begin(config.to_dict(), config.to_json_best_effort(indent=1), config.wandb, config.wandb_project)
    logger.info("run folder %s; %s", record.folder, geometry.describe())
    if record.epoch == 0:
        save_grid(run, prompt_fn, record.folder / "grid_0000.png")
    if held_out and record.watch.best is None:
        evaluate(run, record, held_out)
    for epoch in range(record.epoch, config.num_epochs):
        started = time.perf_counter()
        prompts, metadata = draw_prompts(
            prompt_fn, config.seed, epoch, geometry.samples, config.sample.images_per_prompt
        )
        samples, local_rewards = sample_and_score(run, epoch, prompts, metadata)
        sampled = time.perf_counter()

        rewards = accelerator.gather(local_rewards).cpu().numpy()
        advantages = compute_advantages(config.train.advantage, record.tracker, prompts, rewards)

        info = update(run, epoch, samples, torch.from_numpy(advantages).to(accelerator.device, torch.float32))
        updated = time.perf_counter()

        statistics = reward_statistics(prompts, rewards)
        record.advance(info.pop("updates"), statistics["reward_mean"])
        entry = {
            "epoch": epoch,
            "global_step": record.global_step,
            **statistics,
            "advantage_std": float(advantages.std()),
            **info,
            "rollout_samples_per_second": geometry.samples / (sampled - started),
            "update_samples_per_second": geometry.samples * config.train.num_inner_epochs / (updated - sampled),
            "peak_memory_gib": peak_memory_gib(),
            "seconds": updated - started,
        }
        if evaluated := bool(held_out) and record.epoch % config.held_out.every == 0:
            entry |= evaluate(run, record, held_out)
        record.write(entry)

        stop = record.stop_reason(evaluated)
        if stop or record.epoch % config.save_freq == 0 or record.epoch == config.num_epochs:
            record.save(run.pipe.unet, run.optimizer, config.num_checkpoint_limit)
            save_grid(run, prompt_fn, record.folder / f"grid_{record.epoch:04d}.png")
        if stop:
            logger.info("stopped: %s", stop)
            break
    run.executor.shutdown()
    record.close()
    logger.info("finished after %d epochs; checkpoints, logs and grids are in %s", record.epoch, record.folder)
    accelerator.end_training()
    return record.folder


def set_up(config: ConfigDict) -> tuple[Run, Callable[..., Prompt], HeldOut | None]:
    """Everything but the run folder: what cannot be used is told before anything is written."""
    check_training(config)
    accelerator = make_accelerator(config.mixed_precision, config.allow_tf32)
    geometry = batch_geometry(config.sample, config.train, accelerator.num_processes)
    accelerator.gradient_accumulation_steps = config.train.gradient_accumulation_steps * geometry.train_timesteps
    dtype, device = DTYPES[config.mixed_precision], accelerator.device
    prompt_fn, reward_fn, held_out = prompts_and_judges(config, device)
    pipe = load_policy(
        config.pretrained, config.unet_path, config.sample, config.train, config.use_lora, config.seed, dtype, device
    )
    optimizer = make_optimizer(config.train, [p for p in pipe.unet.parameters() if p.requires_grad])
    unet, optimizer = accelerator.prepare(pipe.unet, optimizer)
    table, executor = PromptTable(pipe), ThreadPoolExecutor(max_workers=2)
    return Run(config, accelerator, geometry, pipe, unet, optimizer, table, reward_fn, executor), prompt_fn, held_out


def prompts_and_judges(
    config: ConfigDict, device: torch.device
) -> tuple[Callable[..., Prompt], RewardFn, HeldOut | None]:
    """Prompt function, reward, and held-out set (None if it is off), of which each has been tried on the prompts."""
    prompt_fn = get_prompt_fn(config.prompt_fn, **config.prompt_fn_kwargs)
    reward_fn = build_reward(config.reward_fn, config.reward_fn_kwargs.to_dict(), device)
    draw_prompts(prompt_fn, config.seed, 0, 1)
    if config.prompt_fn in PROMPT_LISTS:
        check_prompts(reward_fn, all_prompts(config.prompt_fn, **config.prompt_fn_kwargs))
    if not config.held_out.every:
        return prompt_fn, reward_fn, None
    rewarding = [config.reward_fn_kwargs.get(name, {}).get("classifier") for name in parse_spec(config.reward_fn)]
    judge = load_judge(config.held_out.classifier, filter(None, rewarding), device)
    prompts = all_prompts(config.prompt_fn, **config.prompt_fn_kwargs)
    count, sampling = config.held_out.images_per_prompt, sampling_of(config)
    return prompt_fn, reward_fn, HeldOut(judge, prompts, count, config.seed, sampling)


def sampling_of(config: ConfigDict) -> Sampling:
    return Sampling(config.sample.num_steps, config.sample.guidance_scale, config.sample.eta)


def open_record(run: Run, held_out: HeldOut | None) -> Record:
    """The record of a new run or, with its weights loaded, of the one to go on with."""
    config = run.config
    tracker = PerPromptStatTracker(**config.per_prompt_stat_tracking)
    plateau = RewardPlateau(config.early_stop.tolerance, config.early_stop.patience)
    watch = BestAndCollapse(config.held_out.tolerance, config.held_out.patience)
    record = Record(run.accelerator, tracker, plateau, watch)
    record.open(config.logdir, config.run_name, config.resume_from, run.pipe.unet, run.optimizer)
    if held_out and record.held_out_identity:
        held_out.check_identity(record.held_out_identity)
    return record


def sample_and_score(run: Run, epoch: int, prompts: list[str], metadata: list) -> tuple[Trajectories, torch.Tensor]:
    """This process's share of the epoch's trajectories, and their rewards (N,), scored while the next batch samples."""
    sample, size = run.config.sample, run.config.sample.batch_size
    trajectories, scores = [], []
    shares = range(run.first_sample, run.first_sample + run.geometry.local_samples, size)
    for start in tqdm(shares, f"epoch {epoch} sampling", leave=False, disable=None if run.config.progress else True):
        indices = range(start, start + size)
        noise = generators(run.accelerator.device, run.config.seed, Stream.NOISE, epoch, indices)
        texts, about = prompts[start : start + size], metadata[start : start + size]
        with run.accelerator.autocast():
            images, batch = sample_trajectories(
                run.pipe, run.table, texts, noise, sample.num_steps, sample.guidance_scale, sample.eta
            )
        if not batch.log_probs.isfinite().all() or not images.isfinite().all():
            raise UserError(
                f"epoch {epoch}: a sample is not finite; lower train.learning_rate, or use mixed_precision bf16 or no"
            )
        trajectories.append(batch)
        scores.append(run.executor.submit(run.reward_fn, images, texts, about))
    rewards = np.concatenate([score.result()[0] for score in scores])
    return Trajectories.concatenate(trajectories), torch.as_tensor(rewards, device=run.accelerator.device)


def update(run: Run, epoch: int, samples: Trajectories, advantages: torch.Tensor) -> dict[str, float]:
    """PPO on the epoch's samples, with the advantages of all processes. Returns statistics, averaged likewise."""
    config, train, geometry, accelerator = run.config, run.config.train, run.geometry, run.accelerator
    statistics, grad_norms = [], []
    first_ratio_deviation = torch.zeros((), device=accelerator.device)
    for inner_epoch in range(train.num_inner_epochs):
        order = update_order(
            config.seed, epoch, inner_epoch, geometry.samples, geometry.updates, run.first_sample, geometry.processes
        )
        batches = torch.tensor(order, device=accelerator.device).split(train.batch_size)
        for batch in tqdm(batches, f"epoch {epoch} update", leave=False, disable=None if config.progress else True):
            chosen = timestep_order(
                config.seed,
                epoch,
                inner_epoch,
                (run.first_sample + batch).tolist(),
                geometry.timestep_window,
                geometry.train_timesteps,
            )
            prompt_embeds = run.table([samples.prompts[i] for i in batch.tolist()])
            for step in chosen.to(accelerator.device).T:
                latents, next_latents = samples.latents[batch, step], samples.latents[batch, step + 1]
                timesteps = samples.timesteps[step]
                predict = partial(
                    guided_noise_prediction,
                    latents=latents,
                    timesteps=timesteps,
                    prompt_embeds=prompt_embeds,
                    negative_prompt_embeds=run.table.negative,
                    guidance_scale=config.sample.guidance_scale,
                )
                with accelerator.accumulate(run.unet):
                    with accelerator.autocast():
                        noise_pred = predict(run.unet)
                    _, log_prob = ddim_step_with_logprob(
                        run.pipe.scheduler, noise_pred, timesteps, latents, config.sample.eta, prev_sample=next_latents
                    )
                    loss, info = ppo_loss(
                        log_prob,
                        samples.log_probs[batch, step],
                        advantages[run.first_sample + batch],
                        train.clip_range,
                        train.adv_clip_max,
                    )
                    if train.kl_coef:
                        with torch.no_grad(), disabled_lora(run.pipe.unet), accelerator.autocast():
                            base_pred = predict(run.pipe.unet)
                        kl = step_kl(run.pipe.scheduler, noise_pred, base_pred, timesteps, latents, config.sample.eta)
                        loss = loss + train.kl_coef * kl
                        info["kl_to_base"] = kl.detach()
                    accelerator.backward(loss)
                    if not grad_norms:
                        first_ratio_deviation = torch.maximum(first_ratio_deviation, info["ratio_max_deviation"])
                    if accelerator.sync_gradients:
                        grad_norms.append(accelerator.clip_grad_norm_(run.unet.parameters(), train.max_grad_norm))
                    run.optimizer.step()
                    run.optimizer.zero_grad()
                statistics.append({"loss": loss.detach(), **info})
    means = {key: torch.stack([entry[key] for entry in statistics]).mean() for key in statistics[0]}
    means["grad_norm"] = torch.stack(grad_norms).mean()
    return {key: value.item() for key, value in accelerator.reduce(means, "mean").items()} | {
        "first_ratio_deviation": accelerator.gather(first_ratio_deviation[None]).max().item(),
        "updates": len(grad_norms),
    }


def evaluate(run: Run, record: Record, held_out: HeldOut) -> dict[str, float]:
    """APR and reward on the held-out set, put on record; the best checkpoint is replaced where APR is the highest."""
    show = partial(tqdm, desc="held-out images", leave=False, disable=None if run.config.progress else True)
    evaluation = held_out.evaluate(
        run.pipe, run.table, run.reward_fn, run.config.sample.batch_size, run.accelerator, show
    )
    return record.add_evaluation(evaluation, held_out, run.pipe.unet, run.optimizer)


def save_grid(run: Run, prompt_fn: Callable[..., Prompt], path: Path) -> None:
    """16 images from prompts and noise that stay the same for the whole run."""
    if run.accelerator.is_main_process:
        size = run.config.sample.batch_size
        prompts, _ = draw_prompts(prompt_fn, run.config.seed, 0, 16)
        noise = generators(run.accelerator.device, run.config.seed, Stream.GRID, 0, range(16))
        parts = [slice(start, start + size) for start in range(0, 16, size)]
        with run.accelerator.autocast():
            images = [draw_images(run.pipe, run.table, prompts[p], noise[p], sampling_of(run.config)) for p in parts]
        image_grid(torch.cat(images), columns=8).save(path)
    run.accelerator.wait_for_everyone()


if __name__ == "__main__":
    cli(lambda _: train(flags.FLAGS.config))
