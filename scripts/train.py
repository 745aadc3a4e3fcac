"""DDPO (stage (ii)): fine-tune Stable Diffusion by reinforcement learning to maximise the reward of its images.

    accelerate launch scripts/train.py --config config/dgx.py:prompt_image_alignment_classifier_isic

Denoising is a Markov decision process: the state is (latents, timestep, caption), the action the next latents, and the
reward depends on the final image. Each epoch samples trajectories with the current policy, scores their images and
takes PPO-clipped policy-gradient steps on them (algorithm 1 and equation 2 of the RL4Med-DDPO paper).
"""

import logging
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from absl import flags
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs
from diffusers import StableDiffusionPipeline
from ml_collections import ConfigDict
from torch import Tensor
from tqdm.auto import tqdm

from ddpo_pytorch.diffusers_patch.ddim_with_logprob import ddim_step_with_logprob
from ddpo_pytorch.diffusers_patch.pipeline_with_logprob import GradMode, Sampling
from ddpo_pytorch.generator.lora import disabled_lora
from ddpo_pytorch.generator.pipeline import PromptEmbeddings, finite_images, guided_noise_prediction, image_size
from ddpo_pytorch.ppo import averages, ppo_loss, step_kl
from ddpo_pytorch.rewards import Scorer
from ddpo_pytorch.rollout import Trajectories, draw_prompts, sample_trajectories, timestep_order, update_order
from ddpo_pytorch.stat_tracking import compute_advantages, reward_statistics
from ddpo_pytorch.training import setup
from ddpo_pytorch.training.health import HealthCheck, check_groups
from ddpo_pytorch.training.held_out import save_grid
from ddpo_pytorch.training.optimizer import GuardedOptimizer, make_optimizer
from ddpo_pytorch.training.rollout_gradients import RolloutGradients, rollout_batches, rollout_gradients
from ddpo_pytorch.training.run_state import RunState
from ddpo_pytorch.utils import distributed
from ddpo_pytorch.utils.cli import cli, define_config, expand_config
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.randomness import Stream, generator_of

define_config(__file__, "FILE.py:EXPERIMENT", default="config/mini.py:prompt_image_alignment_classifier_isic")
logger = logging.getLogger(__name__)
NOT_FINITE = "epoch {}: a sample is not finite; lower train.learning_rate, or use mixed_precision bf16 or no"
Minibatch = tuple[list[str], Tensor, Tensor]  # B prompts, (B,) indices of trajectories and of their steps
Statistics = dict[str, Tensor]  # 0-d
SCALE_GROWTH_INTERVAL = 100  # updates without overflow before fp16 doubles its loss scale; an epoch has only one or two


@dataclass
class Run:
    """Hold what all stages of an epoch share. `unet` is `pipe.unet` prepared by Accelerate, as DDP if distributed."""

    config: ConfigDict
    accelerator: Accelerator
    sizes: setup.BatchSizes
    task: setup.Task
    pipe: StableDiffusionPipeline
    unet: torch.nn.Module
    optimizer: torch.optim.Optimizer
    guard: GuardedOptimizer
    embeddings: PromptEmbeddings
    scorer: Scorer
    gradients: RolloutGradients | None  # None: every update computes its own
    contents: dict[str, str] = field(default_factory=dict)  # fingerprints of input files, on the main process

    @property
    def first_sample(self) -> int:
        """Return the global index of this process's first sample in an epoch."""
        return self.accelerator.process_index * self.sizes.local_samples

    def sample_order(self, epoch: int, inner_epoch: int) -> list[int]:
        """Return local sample indices in the order in which the updates of an inner epoch use them."""
        sizes = self.sizes
        return update_order(
            self.config.seed, epoch, inner_epoch, sizes.samples, sizes.updates, self.first_sample, sizes.processes
        )

    def progress(self, steps: Iterable, description: str) -> Iterable:
        """Wrap `steps` in a progress bar, shown on a terminal only."""
        return tqdm(steps, desc=description, leave=False, disable=None if self.config.progress else True)


def train(config: ConfigDict) -> Path:
    """Run the experiment and return its run folder."""
    run = set_up(config)
    held_out, weights = run.task.held_out, (run.pipe.unet, run.optimizer)
    # starts a new run, or resumes one by loading weights and optimizer state; locks its folder until `close`
    with closing(RunState(config, run.contents, run.accelerator, held_out, *weights)) as state:
        reason = f"num_epochs is {config.num_epochs}" if state.epoch >= config.num_epochs else None
        if reason := reason or state.stop_reason(bool(held_out)):
            logger.info("nothing left to do: %s has %d epochs, %s", state.folder, state.epoch, reason)
        else:
            state.begin(config.log_with, config.wandb_project)
            logger.info("run folder %s; %s", state.folder, run.sizes.describe())
            if state.epoch == 0:
                draw_grid(run, state)
            if held_out and state.watch.best is None:
                evaluate(run, state)
                state.save(*weights)
            outcome = "finished"
            with distributed.StopRequest(run.accelerator) as stop_request:
                try:
                    run_epochs(run, state, stop_request)
                except distributed.StopRequested:
                    # drop the unfinished epoch: the resumed run draws the same samples again
                    state.save(*weights)
                    outcome = "stopped on request (rerun the same command to resume)"
            run.scorer.close()
            logger.info("%s after %d epochs; checkpoints, logs and grids are in %s", outcome, state.epoch, state.folder)
        run.accelerator.end_training()
        return state.folder


def set_up(config: ConfigDict) -> Run:
    """Build everything but the run folder, so that invalid settings are reported before anything is written."""
    setup.check_training(expand_config(config, "logdir", "pretrained.model"))
    if config.per_prompt_stat_tracking is None and config.train.advantage == "per_prompt":
        config.train.advantage = "global"  # as in ddpo-pytorch
    accelerator = distributed.make_accelerator(
        config.mixed_precision,
        config.allow_tf32,
        may_shard=True,
        process_timeout=config.process_timeout,
        growth_interval=SCALE_GROWTH_INTERVAL,
    )
    device = accelerator.device
    if config.use_lora and setup.in_half_on_gpu(config, device):  # `cast_adapters` replaces autocast
        accelerator.autocast_handler = AutocastKwargs(enabled=False)
    sizes = setup.batch_sizes(config.sample, config.train, accelerator.num_processes)
    # each (minibatch, timesteps) pair is a backward pass, and an update averages over all of them
    accelerator.gradient_accumulation_steps = config.train.gradient_accumulation_steps * sizes.forwards
    task = setup.make_task(config, device)
    prompts, _ = draw_prompts(task.prompt_fn, config.seed, 0, sizes.samples, config.sample.images_per_prompt)
    check_groups(config.train.advantage, prompts)

    # frozen weights in the dtype of mixed_precision, trained weights in float32
    pipe = setup.load_policy(config, distributed.DTYPES[config.mixed_precision], device)
    setup.try_reward(config, task, device, image_size(pipe))
    contents = setup.content_fingerprints(config, pipe, task) if accelerator.is_main_process else {}
    optimizer = make_optimizer(config.train, [p for p in pipe.unet.parameters() if p.requires_grad])
    unet, optimizer = accelerator.prepare(pipe.unet, optimizer)
    guard = GuardedOptimizer(accelerator, optimizer, config.train.max_grad_norm, config.train.max_skipped_updates)
    embeddings = PromptEmbeddings(pipe)
    if task.prompts is not None:
        embeddings.precompute(text for text, _ in task.prompts)
    scorer = Scorer(task.reward_fn, device)
    gradients = rollout_gradients(accelerator, pipe.unet, sizes, config.sample, config.train)
    models = pipe, unet, optimizer, guard, embeddings
    return Run(config, accelerator, sizes, task, *models, scorer, gradients, contents)


def run_epochs(run: Run, state: RunState, stop_request: distributed.StopRequest) -> None:
    """Run algorithm 1 from epoch `state.epoch` on. Raises StopRequested, between batches of samples."""
    config, accelerator, sizes = run.config, run.accelerator, run.sizes
    health = HealthCheck(config.train, accelerator.is_main_process)
    for epoch in range(state.epoch, config.num_epochs):
        #################### SAMPLING ####################
        started = time.perf_counter()
        # N prompts over all processes, a function of (seed, epoch) alone: every process draws the same list
        prompts, metadata = draw_prompts(
            run.task.prompt_fn, config.seed, epoch, sizes.samples, config.sample.images_per_prompt
        )
        samples, local_scores = sample_and_score(run, epoch, prompts, metadata, stop_request)
        sampled = time.perf_counter()

        #################### ADVANTAGES ####################
        # (N,) rewards of all processes, in the order of `prompts`, and (N,) for each part of a weighted sum
        rewards, *parts = accelerator.gather(local_scores).T.contiguous().cpu().numpy()
        advantages = compute_advantages(config.train.advantage, state.tracker, prompts, rewards)  # (N,) float64
        local = torch.from_numpy(advantages[run.first_sample :][: sizes.local_samples])  # (n,) of this process

        #################### TRAINING ####################
        info = update(run, epoch, samples, local.to(accelerator.device, torch.float32))
        updated = time.perf_counter()

        #################### LOGS AND CHECKPOINTS ####################
        statistics = reward_statistics(prompts, rewards, dict(zip(run.scorer.reward_fn.parts, parts, strict=True)))
        state.advance(info.pop("updates"), info["skipped_updates"], statistics["reward_mean"])
        entry = {
            "epoch": epoch,
            "global_step": state.global_step,
            **statistics,
            "advantage_std": float(advantages.std()),
            **info,
            "rollout_samples_per_second": sizes.samples / (sampled - started),
            "update_samples_per_second": sizes.samples * config.train.num_inner_epochs / (updated - sampled),
            "peak_memory_gib": distributed.peak_memory_gib(),
            "seconds": updated - started,
        }
        health.check_epoch(epoch, prompts, advantages, entry)
        if evaluated := bool(run.task.held_out) and state.epoch % config.held_out.every == 0:
            entry |= evaluate(run, state)
        state.write(entry)

        stop = state.stop_reason(evaluated)
        due = stop or state.epoch % config.save_freq == 0 or state.epoch == config.num_epochs
        if due:
            draw_grid(run, state)
        if due or state.best_due:
            state.save(run.pipe.unet, run.optimizer)
        if stop:
            logger.info("stopped: %s", stop)
            return


def sample_and_score(
    run: Run, epoch: int, prompts: list[str], metadata: list, stop_request: distributed.StopRequest
) -> tuple[Trajectories, Tensor]:
    """Sample and score this process's n trajectories of an epoch. Raises StopRequested, and UserError if not finite.

    Scores are (n, 1 + P) float64: the reward, then the unweighted rewards of the P parts of a weighted sum.
    """
    config, sampling, device = run.config, Sampling.of(run.config.sample), run.accelerator.device
    # to take gradients while sampling, the first update's samples are drawn first, in that update's order
    order = run.sample_order(epoch, inner_epoch=0) if run.gradients else range(run.sizes.local_samples)
    plain = GradMode() if setup.rollout_needs_grad_mode(config, device) else None
    trajectories, sampled = None, []
    batches = rollout_batches(order, setup.rollout_batch_size(config, device), run.gradients)
    for indices, recording in run.progress(batches, f"epoch {epoch} sampling"):
        stop_request.check()
        global_indices = [run.first_sample + i for i in indices]
        texts, details = [prompts[i] for i in global_indices], [metadata[i] for i in global_indices]
        # one generator per image, so that images depend neither on batch sizes nor on the number of processes
        noise = [generator_of(config.seed, Stream.NOISE, epoch, i, device=device) for i in global_indices]
        with run.accelerator.autocast(), recording as gradients:
            # images (B, 3, H, W) in [0, 1]; latents (B, T + 1, C, h, w) and log_probs (B, T) of each step
            images, batch = sample_trajectories(run.pipe, run.embeddings, texts, noise, sampling, gradients or plain)
        if trajectories is None:
            trajectories = Trajectories.like(batch, run.sizes.local_samples)
        trajectories.put(indices, batch)
        # on a GPU, scored in a thread while the next batch is sampled
        run.scorer.submit(images, texts, details, partial(check_images, run, epoch, batch.latents[:, -1]))
        sampled += indices
    # back to the order of local indices
    scores = torch.from_numpy(run.scorer.collect()[np.argsort(sampled)]).to(device)
    if not trajectories.log_probs.isfinite().all():
        raise UserError(NOT_FINITE.format(epoch))
    return trajectories, scores


def check_images(run: Run, epoch: int, latents: Tensor, images: Tensor) -> Tensor:
    """Return the images, decoded again in float32 if not finite. Raises UserError if one is not finite even then."""
    images = finite_images(run.pipe.vae, images, latents)
    if not images.isfinite().all():
        raise UserError(NOT_FINITE.format(epoch))
    return images


def update(run: Run, epoch: int, samples: Trajectories, advantages: Tensor) -> dict[str, float]:
    """Take PPO steps on this process's n samples with their advantages (n,); return statistics over all processes."""
    train = run.config.train
    per_update = train.batch_size * train.gradient_accumulation_steps  # samples of this process
    statistics, grad_norms, deviations = [], [], []
    for inner_epoch in range(train.num_inner_epochs):
        # shuffle the samples and divide them into the optimizer updates of this pass
        order = torch.tensor(run.sample_order(epoch, inner_epoch))  # on the CPU: also indexes the list of prompts
        updates = order.split(per_update)
        for indices in run.progress(updates, f"epoch {epoch} update"):
            if not grad_norms and run.gradients:
                # the ratio is still 1, and the rollout has already computed this gradient but for the advantages
                chosen = advantages[distributed.to_device(indices, advantages.device)]
                clipped = chosen.clamp(-train.adv_clip_max, train.adv_clip_max)
                run.gradients.set_gradients(clipped)
                # one minibatch's forward pass measures whether the ratio is 1, as the shortcut assumes
                info = score_minibatch(run, epoch, samples, advantages, indices) | {"loss": -clipped.mean()}
            else:
                info = accumulate_gradient(run, epoch, inner_epoch, samples, advantages, indices)
            if not grad_norms:  # before the first step the policy is the one that sampled: 0 up to rounding
                deviations.append(info["ratio_max_deviation"])
                if len(updates) > 1 and run.config.mixed_precision != "no":  # its kernels may round differently
                    second = score_minibatch(run, epoch, samples, advantages, updates[1])
                    deviations.append(second["ratio_max_deviation"])
            grad_norms.append(run.guard.step(run.unet.parameters()))  # None if skipped
            statistics.append(info)
    taken = [{"grad_norm": norm} for norm in grad_norms if norm is not None]
    means = {"grad_norm": math.nan} | averages(run.accelerator, statistics) | averages(run.accelerator, taken)
    largest = run.accelerator.gather(torch.stack(deviations)[None]).amax(dim=0).tolist()
    means |= dict(zip(("first_ratio_deviation", "second_ratio_deviation"), largest, strict=False))
    return means | {"updates": len(taken), "skipped_updates": len(grad_norms) - len(taken)}


def accumulate_gradient(
    run: Run, epoch: int, inner_epoch: int, samples: Trajectories, advantages: Tensor, indices: Tensor
) -> Statistics:
    """Accumulate the gradient of one optimizer update over the samples `indices`; return its statistics."""
    infos = []
    for minibatch in minibatches(run, epoch, inner_epoch, samples, indices):
        # DDP averages gradients over processes only in the last backward pass of the update
        with run.accelerator.accumulate(run.unet):
            loss, info = minibatch_loss(run, samples, advantages, minibatch)
            run.accelerator.backward(loss)
        infos.append(info | {"loss": loss.detach()})
    means = {name: torch.stack([info[name] for info in infos]).mean() for name in infos[0]}
    return means | {"ratio_max_deviation": torch.stack([info["ratio_max_deviation"] for info in infos]).max()}


def score_minibatch(run: Run, epoch: int, samples: Trajectories, advantages: Tensor, indices: Tensor) -> Statistics:
    """Return the statistics of the first minibatch of an update on samples `indices`, computed as in the rollout."""
    with torch.set_grad_enabled(setup.rollout_needs_grad_mode(run.config, run.accelerator.device)):
        return minibatch_loss(run, samples, advantages, next(minibatches(run, epoch, 0, samples, indices)))[1]


def minibatches(run: Run, epoch: int, inner_epoch: int, samples: Trajectories, indices: Tensor) -> Iterator[Minibatch]:
    """Yield an update's minibatches on the samples' device, with B = train.batch_size * train.timesteps_per_forward."""
    train, sizes, pairs = run.config.train, run.sizes, []
    for batch in indices.split(train.batch_size):
        numbers, window = (run.first_sample + batch).tolist(), sizes.timestep_window
        # (batch_size, T'): the timesteps trained on, shuffled independently for each sample
        steps = timestep_order(run.config.seed, epoch, inner_epoch, numbers, window, sizes.train_timesteps)
        for chunk in steps.split(train.timesteps_per_forward, dim=1):
            pairs.append(torch.stack([batch.repeat_interleave(chunk.shape[1]), chunk.flatten()]))
    # one host-to-device copy per update, to the samples' device
    moved = distributed.to_device(torch.stack(pairs), samples.latents.device)
    for pair, (sample, step) in zip(pairs, moved, strict=True):
        yield [samples.prompts[i] for i in pair[0].tolist()], sample, step


def minibatch_loss(
    run: Run, samples: Trajectories, advantages: Tensor, minibatch: Minibatch
) -> tuple[Tensor, Statistics]:
    """Return the loss of B denoising steps (equation 2 of the paper), with gradient, and detached statistics."""
    prompts, sample, step = minibatch
    config, train, scheduler = run.config, run.config.train, run.pipe.scheduler
    latents, next_latents = samples.latents[sample, step], samples.latents[sample, step + 1]  # (B, C, h, w)
    timesteps = samples.timesteps[step]  # (B,)
    predict_noise = partial(
        guided_noise_prediction,
        latents=latents,
        timesteps=timesteps,
        prompt_embeds=run.embeddings(prompts),  # (B, L, D)
        negative_prompt_embeds=run.embeddings.negative,
        guidance_scale=config.sample.guidance_scale,
    )
    with run.accelerator.autocast():
        noise_pred = predict_noise(run.unet)  # the same call as in the rollout, so that the ratio starts at exactly 1
    # log-prob (B,) of the rollout's step under the current policy; in float32, outside autocast
    _, log_prob = ddim_step_with_logprob(
        scheduler, noise_pred, timesteps, latents, config.sample.eta, prev_sample=next_latents
    )
    old_log_prob = samples.log_probs[sample, step]  # (B,) under the policy that sampled
    loss, info = ppo_loss(log_prob, old_log_prob, advantages[sample], train.clip_range, train.adv_clip_max)
    if train.kl_coef:  # not in ddpo-pytorch: KL to the base model, which is the UNet with its adapters off
        with torch.no_grad(), disabled_lora(run.pipe.unet), run.accelerator.autocast():
            base_pred = predict_noise(run.pipe.unet)
        kl = step_kl(scheduler, noise_pred, base_pred, timesteps, latents, config.sample.eta)
        loss = loss + train.kl_coef * kl
        info["kl_to_base"] = kl.detach()
    return loss, info


def evaluate(run: Run, state: RunState) -> dict[str, float]:
    """Measure and log APR and reward on the held-out set."""
    held_out, size = run.task.held_out, run.config.sample.batch_size
    show = partial(run.progress, description="held-out images")
    evaluation = held_out.evaluate(run.pipe, run.embeddings, run.task.reward_fn, size, run.accelerator, show)
    return state.add_evaluation(evaluation, held_out)


def draw_grid(run: Run, state: RunState) -> None:
    """Save a grid of 16 images, from the same prompts and noise throughout the run."""
    seed, size = run.config.seed, run.config.sample.batch_size
    prompts, _ = draw_prompts(run.task.prompt_fn, seed, 0, 16)
    path = state.folder / f"grid_{state.epoch:04d}.png"
    sampling = Sampling.of(run.config.sample)
    picture = save_grid(run.accelerator, run.pipe, run.embeddings, prompts, seed, sampling, size, path)
    if run.config.log_images and picture is not None:
        state.log_image(picture)


if __name__ == "__main__":
    cli(lambda _: train(flags.FLAGS.config))
