"""DDPO: fine-tune a Stable Diffusion so that its images earn more reward (stage (ii)).

    accelerate launch scripts/train.py --config config/dgx.py:prompt_image_alignment_classifier_isic

Denoising is a Markov decision process: state (latents, timestep, caption), action the next latents, reward on the final
image. Each epoch samples trajectories with the current policy, scores the images, and takes PPO-clipped policy-gradient
steps on them (equation 2 of the RL4Med-DDPO paper).
"""

import logging
import math
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from absl import flags
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline
from ml_collections import ConfigDict
from tqdm.auto import tqdm

from ddpo_pytorch.diffusers_patch.ddim_with_logprob import ddim_step_with_logprob
from ddpo_pytorch.generator.lora import adapter_fingerprint, disabled_lora
from ddpo_pytorch.generator.pipeline import PromptEmbeddings, guided_noise_prediction
from ddpo_pytorch.ppo import averages, ppo_loss, step_kl
from ddpo_pytorch.rewards import parse_spec
from ddpo_pytorch.rollout import (
    Trajectories,
    draw_prompts,
    generators,
    sample_trajectories,
    timestep_order,
    update_order,
)
from ddpo_pytorch.sampling import Sampling
from ddpo_pytorch.stat_tracking import compute_advantages, reward_statistics
from ddpo_pytorch.training.estimate import epoch_time
from ddpo_pytorch.training.health import HealthCheck, check_groups
from ddpo_pytorch.training.optimizer import GuardedOptimizer, make_optimizer
from ddpo_pytorch.training.rollout_gradients import ScoreGradients, rollout_batches, while_sampling
from ddpo_pytorch.training.run_state import Record, open_record
from ddpo_pytorch.training.sample_grid import save_grid
from ddpo_pytorch.training.scoring import Scorer
from ddpo_pytorch.training.setup import Geometry, Objective, batch_geometry, check_training, load_policy, make_objective
from ddpo_pytorch.utils.cli import cli, define_config, expand_config
from ddpo_pytorch.utils.distributed import DTYPES, StopRequest, make_accelerator, peak_memory_gib
from ddpo_pytorch.utils.fingerprint import fingerprint, pipeline_fingerprints, with_contents
from ddpo_pytorch.utils.randomness import Stream

define_config(__file__, "experiment, e.g. config/mini.py:NAME")
logger = logging.getLogger(__name__)


@dataclass
class Run:
    """What the stages of an epoch share. `unet` is `pipe.unet` as prepared for training: it averages gradients."""

    config: ConfigDict
    accelerator: Accelerator
    geometry: Geometry
    objective: Objective
    pipe: StableDiffusionPipeline
    unet: torch.nn.Module
    optimizer: torch.optim.Optimizer
    guard: GuardedOptimizer
    table: PromptEmbeddings
    scorer: Scorer
    gradients: ScoreGradients | None
    contents: dict[str, str] = field(default_factory=dict)  # fingerprints of files, on the main process

    @property
    def first_sample(self) -> int:
        """Global index of this process's first sample of an epoch."""
        return self.accelerator.process_index * self.geometry.local_samples

    def order(self, epoch: int, inner_epoch: int) -> list[int]:
        """Of this process's samples in the updates of an inner epoch."""
        geometry = self.geometry
        share = geometry.samples, geometry.updates, self.first_sample, geometry.processes
        return update_order(self.config.seed, epoch, inner_epoch, *share)


def train(config: ConfigDict) -> Path:
    """Run the experiment and return its run folder."""
    run = set_up(config)
    record = open_record(config, run.contents, run.accelerator, run.objective.held_out, run.pipe.unet, run.optimizer)
    over = record.epoch >= config.num_epochs
    if reason := f"num_epochs is {config.num_epochs}" if over else record.stop_reason(bool(run.objective.held_out)):
        logger.info("nothing is left to do: %s has %d epochs, %s", record.folder, record.epoch, reason)
        record.close()
        run.accelerator.end_training()
        return record.folder
    record.begin(config.wandb, config.wandb_project)
    with run.accelerator.autocast():
        lasting = epoch_time(run.pipe, run.table, config, run.geometry, run.gradients)
    logger.info("run folder %s; %s; about %s an epoch", record.folder, run.geometry.describe(), lasting)
    if record.epoch == 0:
        draw_grid(run, record)
    if run.objective.held_out and record.watch.best is None:
        evaluate(run, record)
    with StopRequest(run.accelerator) as stop_request:
        outcome = run_epochs(run, record, stop_request)
    run.scorer.close()
    record.close()
    logger.info("%s after %d epochs; checkpoints, logs and grids are in %s", outcome, record.epoch, record.folder)
    run.accelerator.end_training()
    return record.folder


def run_epochs(run: Run, record: Record, stop_request: StopRequest) -> str:
    """Algorithm 1 of the paper, from where the record is. Returns how it ended."""
    config, accelerator, geometry = run.config, run.accelerator, run.geometry
    health = HealthCheck(config.train, accelerator.is_main_process)
    for epoch in range(record.epoch, config.num_epochs):
        started = time.perf_counter()
        prompts, metadata = draw_prompts(
            run.objective.prompt_fn, config.seed, epoch, geometry.samples, config.sample.images_per_prompt
        )
        health.check_prompts(epoch, prompts)
        if (drawn := sample_and_score(run, epoch, prompts, metadata, stop_request)) is None:
            record.save(run.pipe.unet, run.optimizer, config.num_checkpoint_limit)
            return "stopped as asked, to be gone on with by the same command,"
        samples, local_scores = drawn
        sampled = time.perf_counter()

        rewards, *parts = accelerator.gather(local_scores).T.contiguous().cpu().numpy()
        advantages = compute_advantages(config.train.advantage, record.tracker, prompts, rewards)

        info = update(run, epoch, samples, torch.from_numpy(advantages).to(accelerator.device, torch.float32))
        updated = time.perf_counter()

        statistics = reward_statistics(prompts, rewards, dict(zip(run.scorer.reward_fn.parts, parts, strict=True)))
        record.advance(info.pop("updates"), info["skipped_updates"], statistics["reward_mean"])
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
        health.check_epoch(epoch, advantages, entry)
        if evaluated := bool(run.objective.held_out) and record.epoch % config.held_out.every == 0:
            entry |= evaluate(run, record)
        record.write(entry)

        stop = record.stop_reason(evaluated)
        if stop or record.epoch % config.save_freq == 0 or record.epoch == config.num_epochs:
            draw_grid(run, record)
            record.save(run.pipe.unet, run.optimizer, config.num_checkpoint_limit)
        if stop:
            logger.info("stopped: %s", stop)
            break
    return "finished"


def set_up(config: ConfigDict) -> Run:
    """Set up everything but the run folder, so that whatever is unusable is reported before anything is written."""
    check_training(expand_config(config, "logdir", "pretrained.model"))
    if config.per_prompt_stat_tracking is None and config.train.advantage == "per_prompt":
        config.train.advantage = "global"  # as in ddpo-pytorch
    accelerator = make_accelerator(
        config.mixed_precision, config.allow_tf32, may_shard=True, process_timeout=config.process_timeout
    )
    geometry = batch_geometry(config.sample, config.train, accelerator.num_processes)
    accelerator.gradient_accumulation_steps = config.train.gradient_accumulation_steps * geometry.forwards
    dtype, device = DTYPES[config.mixed_precision], accelerator.device
    asked = config.prompt_fn, config.prompt_fn_kwargs, config.reward_fn, config.reward_fn_kwargs
    objective = make_objective(*asked, config.held_out, config.sample, config.seed, device)
    first = draw_prompts(objective.prompt_fn, config.seed, 0, geometry.samples, config.sample.images_per_prompt)
    check_groups(config.train.advantage, first[0])
    base = config.pretrained, config.unet_path, config.sample, config.train, config.use_lora, config.seed
    pipe = load_policy(*base, dtype, device, config.load_from)
    contents = fingerprints(config, pipe, objective) if accelerator.is_main_process else {}
    optimizer = make_optimizer(config.train, [p for p in pipe.unet.parameters() if p.requires_grad])
    unet, optimizer = accelerator.prepare(pipe.unet, optimizer)
    guard = GuardedOptimizer(accelerator, optimizer, config.train.max_grad_norm, config.train.max_skipped_updates)
    table = PromptEmbeddings(pipe)
    if objective.prompts is not None:
        table.precompute(text for text, _ in objective.prompts)
    scorer = Scorer(objective.reward_fn, device)
    gradients = while_sampling(accelerator, pipe.unet, geometry, config.sample, config.train)
    return Run(
        config, accelerator, geometry, objective, pipe, unet, optimizer, guard, table, scorer, gradients, contents
    )


def fingerprints(config: ConfigDict, pipe: StableDiffusionPipeline, objective: Objective) -> dict[str, str]:
    """Return the fingerprints of the files behind the settings: base model, adapter to start from, rewards, prompts."""
    found = pipeline_fingerprints(pipe)
    found["load_from"] = config.load_from and (adapter_fingerprint(pipe.unet) or found["model.unet"])
    kwargs = config.reward_fn_kwargs.to_dict()
    for name in parse_spec(config.reward_fn):
        found[f"reward.{name}"] = fingerprint(with_contents(kwargs.get(name, {})))
    found["prompts"] = fingerprint(objective.prompts or with_contents(config.prompt_fn_kwargs.to_dict()))
    return found


def sample_and_score(
    run: Run, epoch: int, prompts: list[str], metadata: list, stop_request: StopRequest
) -> tuple[Trajectories, torch.Tensor] | None:
    """Return this process's N trajectories of the epoch and their scores, taken while the next batch is sampled.

    Scores are (N, 1 + P) float64: the rewards, then the unweighted rewards of the P parts of a weighted sum. None if a
    process was asked to stop.
    """
    config, sample, device, first = run.config, run.config.sample, run.accelerator.device, run.first_sample
    order = run.order(epoch, inner_epoch=0) if run.gradients else range(run.geometry.local_samples)
    trajectories, drawn = None, []
    show = partial(tqdm, desc=f"epoch {epoch} sampling", leave=False, disable=None if config.progress else True)
    for batch, recording in show(rollout_batches(order, sample.batch_size, run.gradients)):
        if stop_request.agreed():
            return None
        indices = [first + place for place in batch]
        noise = generators(device, config.seed, Stream.NOISE, epoch, indices)
        texts, about = [prompts[i] for i in indices], [metadata[i] for i in indices]
        with run.accelerator.autocast(), recording as gradients:
            images, part = sample_trajectories(
                run.pipe, run.table, texts, noise, sample.num_steps, sample.guidance_scale, sample.eta, gradients
            )
        part.check_finite(images, epoch)
        trajectories = trajectories or Trajectories.like(part, run.geometry.local_samples)
        trajectories.put(batch, part)
        run.scorer.submit(images, texts, about)
        drawn += batch
    scores = np.stack(list(run.scorer.collect_parts().values()), axis=1)
    return trajectories, torch.from_numpy(scores[np.argsort(drawn)]).to(device)


def update(run: Run, epoch: int, samples: Trajectories, advantages: torch.Tensor) -> dict[str, float]:
    """PPO on the epoch's samples, with the advantages of all processes. Returns statistics, averaged likewise."""
    config, train, geometry, accelerator = run.config, run.config.train, run.geometry, run.accelerator
    objective = partial(ppo_loss, clip_range=train.clip_range, adv_clip_max=train.adv_clip_max)
    statistics, grad_norms = [], []
    first_ratio_deviation = torch.zeros((), device=accelerator.device)
    for inner_epoch in range(train.num_inner_epochs):
        batches = torch.tensor(run.order(epoch, inner_epoch), device=accelerator.device).split(train.batch_size)
        show = partial(tqdm, desc=f"epoch {epoch} update", leave=False, disable=None if config.progress else True)
        for number, batch in enumerate(show(batches), start=1):
            # in the first update the ratio is 1, as one pass shows, and the gradient was taken while sampling
            recorded = run.gradients and inner_epoch == 0 and number <= train.gradient_accumulation_steps
            chosen = timestep_order(
                config.seed,
                epoch,
                inner_epoch,
                (run.first_sample + batch).tolist(),
                geometry.timestep_window,
                geometry.train_timesteps,
            ).to(accelerator.device)
            prompt_embeds = run.table([samples.prompts[i] for i in batch.tolist()])
            for steps in chosen.split(train.timesteps_per_forward, dim=1):
                # one row for each sample and timestep: of sample `row` the step to `step + 1`
                row, step = batch.repeat_interleave(steps.shape[1]), steps.flatten()
                old_log_prob, advantage = samples.log_probs[row, step], advantages[run.first_sample + row]
                if recorded and statistics:
                    loss, info = objective(old_log_prob, old_log_prob, advantage)
                    statistics.append({"loss": loss, **info})
                    continue
                latents, next_latents = samples.latents[row, step], samples.latents[row, step + 1]
                timesteps = samples.timesteps[step]
                predict = partial(
                    guided_noise_prediction,
                    latents=latents,
                    timesteps=timesteps,
                    prompt_embeds=prompt_embeds.repeat_interleave(steps.shape[1], dim=0),
                    negative_prompt_embeds=run.table.negative,
                    guidance_scale=config.sample.guidance_scale,
                )
                with torch.no_grad() if recorded else accelerator.accumulate(run.unet):
                    with accelerator.autocast():
                        noise_pred = predict(run.unet)
                    _, log_prob = ddim_step_with_logprob(
                        run.pipe.scheduler, noise_pred, timesteps, latents, config.sample.eta, prev_sample=next_latents
                    )
                    loss, info = objective(log_prob, old_log_prob, advantage)
                    if train.kl_coef:
                        with torch.no_grad(), disabled_lora(run.pipe.unet), accelerator.autocast():
                            base_pred = predict(run.pipe.unet)
                        kl = step_kl(run.pipe.scheduler, noise_pred, base_pred, timesteps, latents, config.sample.eta)
                        loss = loss + train.kl_coef * kl
                        info["kl_to_base"] = kl.detach()
                    if not grad_norms:
                        first_ratio_deviation = torch.maximum(first_ratio_deviation, info["ratio_max_deviation"])
                    if not recorded:
                        accelerator.backward(loss)
                        if accelerator.sync_gradients:
                            grad_norms.append(run.guard.step(run.unet.parameters()))
                statistics.append({"loss": loss.detach(), **info})
            if recorded and number == train.gradient_accumulation_steps:
                own = advantages[run.first_sample + torch.cat(batches[:number])]
                run.gradients.set_gradients(own.clamp(-train.adv_clip_max, train.adv_clip_max))
                grad_norms.append(run.guard.step(run.unet.parameters()))
    taken = [{"grad_norm": norm} for norm in grad_norms if norm is not None]
    means = {"grad_norm": math.nan} | averages(accelerator, statistics) | averages(accelerator, taken)
    return means | {
        "first_ratio_deviation": accelerator.gather(first_ratio_deviation[None]).max().item(),
        "updates": len(taken),
        "skipped_updates": len(grad_norms) - len(taken),
    }


def evaluate(run: Run, record: Record) -> dict[str, float]:
    """APR and reward on the held-out set, put on record; the best checkpoint is replaced where APR is the highest."""
    show = partial(tqdm, desc="held-out images", leave=False, disable=None if run.config.progress else True)
    held_out, size = run.objective.held_out, run.config.sample.batch_size
    evaluation = held_out.evaluate(run.pipe, run.table, run.objective.reward_fn, size, run.accelerator, show)
    return record.add_evaluation(evaluation, held_out, run.pipe.unet, run.optimizer)


def draw_grid(run: Run, record: Record) -> None:
    """16 images from prompts and noise that stay the same for the whole run."""
    seed, size = run.config.seed, run.config.sample.batch_size
    prompts, _ = draw_prompts(run.objective.prompt_fn, seed, 0, 16)
    path = record.folder / f"grid_{record.epoch:04d}.png"
    save_grid(run.accelerator, run.pipe, run.table, prompts, seed, Sampling.of(run.config.sample), size, path)


if __name__ == "__main__":
    cli(lambda _: train(flags.FLAGS.config))
