"""DDPO: fine-tune a Stable Diffusion so that its images earn more reward (stage (ii)).

    accelerate launch scripts/train.py --config config/dgx.py:prompt_image_alignment_classifier_isic

Denoising is a Markov decision process: state (latents, timestep, caption), action the next latents, reward on the final
image. Each epoch samples trajectories with the current policy, scores the images, and takes PPO-clipped policy-gradient
steps on them (equation 2 of the RL4Med-DDPO paper).
"""

import logging
import time
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

from ddpo_pytorch.checkpointing import load_checkpoint, save_checkpoint
from ddpo_pytorch.data.images import image_grid
from ddpo_pytorch.diffusers_patch.ddim_with_logprob import check_schedule, ddim_step_with_logprob
from ddpo_pytorch.errors import UserError
from ddpo_pytorch.generator.lora import add_lora, disabled_lora
from ddpo_pytorch.generator.pipeline import PromptTable, guided_noise_prediction, load_pipeline, set_schedule
from ddpo_pytorch.ppo import make_optimizer, ppo_loss, step_kl
from ddpo_pytorch.prompts import PROMPT_LISTS, all_prompts, get_prompt_fn
from ddpo_pytorch.randomness import Stream
from ddpo_pytorch.rewards import RewardFn, build_reward, check_prompts
from ddpo_pytorch.rollout import (
    Trajectories,
    draw_prompts,
    generators,
    sample_trajectories,
    timestep_order,
    update_order,
)
from ddpo_pytorch.run import (
    DTYPES,
    Geometry,
    JsonLines,
    RewardPlateau,
    batch_geometry,
    check_training,
    cli,
    make_accelerator,
    open_run,
    peak_memory_gib,
    start_wandb,
)
from ddpo_pytorch.stat_tracking import PerPromptStatTracker, compute_advantages, reward_statistics

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
    check_training(config)
    accelerator = make_accelerator(config.mixed_precision, config.allow_tf32)
    geometry = batch_geometry(config.sample, config.train, accelerator.num_processes)
    accelerator.gradient_accumulation_steps = config.train.gradient_accumulation_steps * geometry.train_timesteps
    prompt_fn = get_prompt_fn(config.prompt_fn, **config.prompt_fn_kwargs)
    reward_fn = build_reward(config.reward_fn, config.reward_fn_kwargs.to_dict(), accelerator.device)

    # a prompt that cannot be read or scored is told before anything is written.
    draw_prompts(prompt_fn, config.seed, 0, 1)
    if config.prompt_fn in PROMPT_LISTS:
        check_prompts(reward_fn, all_prompts(config.prompt_fn, **config.prompt_fn_kwargs))

    ###### policy: the UNet, or adapters on it ######
    pretrained, dtype = config.pretrained, DTYPES[config.mixed_precision]
    pipe = load_pipeline(pretrained.model, pretrained.revision, config.unet_path, dtype, accelerator.device)
    pipe.set_progress_bar_config(disable=True)
    set_schedule(pipe, config.sample.num_steps)
    check_schedule(pipe.scheduler, config.sample.eta)
    if config.use_lora:
        add_lora(pipe.unet, config.train.lora_rank, config.train.lora_targets, config.seed)
    else:
        pipe.unet.float().requires_grad_(True)
    if config.train.gradient_checkpointing:
        pipe.unet.enable_gradient_checkpointing()
    optimizer = make_optimizer(config.train, [p for p in pipe.unet.parameters() if p.requires_grad])
    unet, optimizer = accelerator.prepare(pipe.unet, optimizer)

    ###### run folder and progress ######
    run_dir, checkpoint = open_run(accelerator, config.logdir, config.run_name, config.resume_from)
    tracker = PerPromptStatTracker(**config.per_prompt_stat_tracking)
    plateau = RewardPlateau(config.early_stop.tolerance, config.early_stop.patience)
    progress = {"epoch": 0, "global_step": 0, "wandb_id": None}
    if checkpoint is not None:
        progress = load_checkpoint(checkpoint, pipe.unet, optimizer, accelerator.scaler)
        tracker.load_state_dict(progress["tracker"])
        plateau.load_state_dict(progress["plateau"])
        logger.info("resumed from %s after %d epochs", checkpoint, progress["epoch"])
    log, wandb_run = JsonLines(run_dir / "metrics.jsonl", accelerator.is_main_process, keep=progress["epoch"]), None
    if accelerator.is_main_process:
        name = "config.json" if checkpoint is None else f"config_{progress['epoch']:04d}.json"
        (run_dir / name).write_text(config.to_json_best_effort(indent=1))
        wandb_run = start_wandb(config.wandb, config.wandb_project, run_dir, config.to_dict(), progress["wandb_id"])
        progress["wandb_id"] = wandb_run.id if wandb_run else None
    logger.info("run folder %s; %s", run_dir, geometry.describe())

    table, executor = PromptTable(pipe), ThreadPoolExecutor(max_workers=2)
    run = Run(config, accelerator, geometry, pipe, unet, optimizer, table, reward_fn, executor)
    if progress["epoch"] == 0:
        save_grid(run, prompt_fn, run_dir / "grid_0000.png")
    for epoch in range(progress["epoch"], config.num_epochs):
        started = time.perf_counter()
        prompts, metadata = draw_prompts(
            prompt_fn, config.seed, epoch, geometry.samples, config.sample.images_per_prompt
        )
        samples, local_rewards = sample_and_score(run, epoch, prompts, metadata)
        sampled = time.perf_counter()

        rewards = accelerator.gather(local_rewards).cpu().numpy()
        advantages = compute_advantages(config.train.advantage, tracker, prompts, rewards)

        info = update(run, epoch, samples, torch.from_numpy(advantages).to(accelerator.device, torch.float32))
        updated = time.perf_counter()

        progress |= {"epoch": epoch + 1, "global_step": progress["global_step"] + info.pop("updates")}
        entry = {
            "epoch": epoch,
            "global_step": progress["global_step"],
            **reward_statistics(prompts, rewards),
            "advantage_std": float(advantages.std()),
            **info,
            "rollout_samples_per_second": geometry.samples / (sampled - started),
            "update_samples_per_second": geometry.samples * config.train.num_inner_epochs / (updated - sampled),
            "peak_memory_gib": peak_memory_gib(),
            "seconds": updated - started,
        }
        log.write(entry)
        if wandb_run:
            wandb_run.log(entry, step=progress["global_step"])
        shown = ("epoch", "reward_mean", "reward_std", "first_ratio_deviation", "clipfrac", "grad_norm", "seconds")
        logger.info(
            "epoch %d  reward %.4f +- %.4f  |ratio-1| %.1e  clipfrac %.3f  grad norm %.4f  %.1f s",
            *(entry[key] for key in shown),
        )

        stop = plateau.update(entry["reward_mean"])
        if stop or (epoch + 1) % config.save_freq == 0 or epoch + 1 == config.num_epochs:
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                progress |= {"tracker": tracker.state_dict(), "plateau": plateau.state_dict()}
                limit = config.num_checkpoint_limit
                save_checkpoint(run_dir, epoch + 1, pipe.unet, optimizer, accelerator.scaler, progress, limit)
            save_grid(run, prompt_fn, run_dir / f"grid_{epoch + 1:04d}.png")
        if stop:
            logger.info("mean reward changed by less than %g for %d epochs", plateau.tolerance, plateau.patience)
            break
    executor.shutdown()
    if wandb_run:
        wandb_run.finish()
    logger.info("finished after %d epochs; checkpoints, metrics.jsonl and grids are in %s", progress["epoch"], run_dir)
    accelerator.end_training()
    return run_dir


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


def save_grid(run: Run, prompt_fn, path: Path) -> None:
    """16 images from prompts and noise that stay the same for the whole run."""
    if run.accelerator.is_main_process:
        sample, images = run.config.sample, []
        prompts, _ = draw_prompts(prompt_fn, run.config.seed, 0, 16)
        noise = generators(run.accelerator.device, run.config.seed, Stream.GRID, 0, range(16))
        for start in range(0, 16, sample.batch_size):
            part = slice(start, start + sample.batch_size)
            with run.accelerator.autocast():
                drawn, _ = sample_trajectories(
                    run.pipe, run.table, prompts[part], noise[part], sample.num_steps, sample.guidance_scale, sample.eta
                )
            images.append(drawn)
        image_grid(torch.cat(images), columns=8).save(path)
    run.accelerator.wait_for_everyone()


if __name__ == "__main__":
    cli(lambda _: train(flags.FLAGS.config))
