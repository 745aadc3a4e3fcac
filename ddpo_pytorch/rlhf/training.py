"""A stage of learning from ratings: both judges on all rated images, or the Policy on those that the Selector passes.

Order, flips and dropout of an epoch are functions of (seed, stage, epoch, process), so that a resumed training ends
with the same weights as an uninterrupted one. The last epoch's weights are kept: the learning rate has decayed by then,
and choosing an epoch on the held-out images would bias the metrics measured on them.
"""

import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from ml_collections import ConfigDict
from torch import nn

from ddpo_pytorch.judges.classifier_training import EpochBatches, reset_scaler
from ddpo_pytorch.judges.policy import Policy
from ddpo_pytorch.judges.selector import Selector
from ddpo_pytorch.rlhf.rated_images import RatedSet, best_threshold, measures
from ddpo_pytorch.rlhf.reinforce import OBJECTIVES, advantages, importance_weights, reinforce_loss
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.fingerprint import fingerprint
from ddpo_pytorch.utils.randomness import Stream, derived_seed, generator_of
from ddpo_pytorch.utils.settings import (
    BELOW_ONE,
    NOT_NEGATIVE,
    ONE_OR_MORE,
    POSITIVE,
    SHARE,
    ZERO_OR_MORE,
    check_choices,
    check_pair,
    check_ranges,
)
from ddpo_pytorch.utils.training_state import TrainState

logger = logging.getLogger(__name__)
COLUMN = {"selector": "quality", "policy": "alignment"}
# settings that do not identify a stage: paths, of which the contents do, and for stage 1 those of stage 2
PATHS = ("ratings", "data_path", "val_ratings", "output", "stages", "text_encoder", "autoencoder")
SECOND_ONLY = ("second_learning_rate", "importance", "importance_range", "replay_share")
RANGES = {
    **dict.fromkeys(("num_epochs", "batch_size", "text_tokens"), ONE_OR_MORE),
    **dict.fromkeys(("learning_rate", "second_learning_rate", "final_learning_rate"), POSITIVE),
    **dict.fromkeys(("replay_share", "val_share"), BELOW_ONE),
    "warmup_steps": ZERO_OR_MORE,
    "weight_decay": NOT_NEGATIVE,
}


def check_settings(rlhf: ConfigDict) -> None:
    """Raise UserError for settings outside their range."""
    if tuple(rlhf.stages) not in ((1,), (2,), (1, 2)):
        raise UserError(f"rlhf.stages is {tuple(rlhf.stages)}; allowed are (1,), (2,) and (1, 2)")
    check_choices(rlhf, {"objective": OBJECTIVES}, "rlhf.")
    check_ranges(rlhf, RANGES if rlhf.threshold is None else RANGES | {"threshold": SHARE}, "rlhf.")
    check_pair("rlhf.importance_range", rlhf.importance_range, POSITIVE, equal=True)


def chosen_samples(passed: torch.Tensor, replay_share: float, seed: int) -> torch.Tensor:
    """Return the indices of stage 2's samples, ascending: all that passed (bool (N,)), and a share that did not.

    The latter are drawn with `seed` to make up `replay_share` of the samples, or all if there are fewer. Raises
    UserError if nothing passed.
    """
    if not passed.any():
        raise UserError(
            f"the Selector passes none of {len(passed)} rated images, so stage 2 has no samples; stage 1's files are "
            "unchanged: lower rlhf.threshold, or train stage 1 for longer or on more ratings elsewhere"
        )
    accepted, rejected = passed.nonzero().flatten(), (~passed).nonzero().flatten()
    wanted = min(len(rejected), round(replay_share / (1 - replay_share) * len(accepted)))
    replayed = torch.randperm(len(rejected), generator=generator_of(seed, Stream.ORDER, 2))[:wanted]
    return torch.cat([accepted, rejected[replayed]]).sort().values


@torch.no_grad()
def all_scores(accelerator: Accelerator, network: Selector | Policy, rated: RatedSet, batch_size: int) -> torch.Tensor:
    """Return scores (N,) in order, float32 on the CPU of every process; processes take whole batches in turn."""
    table = torch.zeros(len(rated), device=accelerator.device)
    batches = torch.arange(len(rated)).split(batch_size)
    for indices in batches[accelerator.process_index :: accelerator.num_processes]:
        images = (rated.images[indices].float() / 255).to(accelerator.device)
        prompts = [rated.prompts[index] for index in indices.tolist()]
        table[indices] = network.score(images, prompts) if isinstance(network, Policy) else network.score(images)
    return accelerator.reduce(table, "sum").cpu()  # every row comes from one process, the others have zeros there


def stage_settings(
    accelerator: Accelerator,
    stage: int,
    networks: Mapping[str, Selector | Policy],
    train: RatedSet,
    val: RatedSet,
    rlhf: ConfigDict,
    seed: int,
) -> dict[str, Any]:
    """Return what identifies a training of a stage."""
    ignored = PATHS if stage == 2 else PATHS + SECOND_ONLY
    settings = {f"rlhf.{name}": value for name, value in rlhf.to_dict().items() if name not in ignored}
    return settings | {
        "stage": stage,
        "seed": seed,
        "mixed_precision": accelerator.mixed_precision,
        "processes": accelerator.num_processes,
        "text encoder": networks["policy"].text.fingerprint,
        "weights at the start": {name: fingerprint(network) for name, network in networks.items()},
        "training ratings": train.digest,
        "validation ratings": val.digest,
    }


def state_path(output: Path, stage: int) -> Path:
    """Return the path of a stage's training state, which is removed once its judges are saved."""
    return output / f"stage_{stage}.unfinished.pt"


class StageTraining:
    """Training of stage 1 or 2.

    Args:
        networks: {"selector": ..., "policy": ...} in stage 1, {"policy": ...} in stage 2.
        train, val: rated images to learn from, and of other patients to measure with.
        output: folder of the state, which is resumed if there is one.
        selector_scores: of the training images (N,), for the importance weights of stage 2.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        stage: int,
        networks: Mapping[str, Selector | Policy],
        train: RatedSet,
        val: RatedSet,
        rlhf: ConfigDict,
        seed: int,
        output: Path,
        selector_scores: torch.Tensor | None = None,
    ):
        processes, rank = accelerator.num_processes, accelerator.process_index
        if len(train) < processes:
            raise UserError(f"{len(train)} rated images are too few for {processes} processes; add images")
        self.accelerator, self.stage, self.networks, self.rlhf = accelerator, stage, dict(networks), rlhf
        self.train, self.val, self.selector_scores = train, val, selector_scores
        self.settings = stage_settings(accelerator, stage, self.networks, train, val, rlhf, seed)
        self.seed = derived_seed(seed, Stream.ORDER, stage)
        parameters = [parameter for network in self.networks.values() for parameter in network.parameters()]
        rate = rlhf.learning_rate if stage == 1 else rlhf.second_learning_rate
        optimizer = torch.optim.Adam(parameters, lr=rate, weight_decay=rlhf.weight_decay)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer, rlhf.num_epochs, eta_min=min(rate, rlhf.final_learning_rate)
        )
        reset_scaler(accelerator)
        *models, self.optimizer = accelerator.prepare(*self.networks.values(), optimizer)
        self.models: dict[str, nn.Module] = dict(zip(self.networks, models, strict=True))
        self.batches = EpochBatches(len(train), len(train), rlhf.batch_size, self.seed, rank, processes)
        parts = {"optimizer": self.optimizer, "scheduler": self.scheduler, "scaler": accelerator.scaler}
        self.state = TrainState(state_path(output, stage), self.settings, **parts, **self.networks)
        self.epoch = 0
        if progress := self.state.load():
            self.epoch = progress["epoch"]
            logger.info("resuming from %s: %d epochs are done", self.state.path, self.epoch)

    def run_epoch(self) -> dict[str, Any]:
        """Train one epoch and measure on the held-out images. Raises UserError for a loss that is not finite."""
        device, started = self.accelerator.device, time.perf_counter()
        self.batches.epoch = self.epoch
        rate = self.scheduler.get_last_lr()[0]
        with torch.random.fork_rng([torch.cuda.current_device()] if device.type == "cuda" else []):
            # 1 + rank: the seed without it is that of the flips
            torch.manual_seed(derived_seed(self.seed, Stream.NOISE, self.epoch, 1 + self.accelerator.process_index))
            losses = self._train(rate)
        speed = len(self.train) / (time.perf_counter() - started)
        if bad := next((name for name, loss in losses.items() if not math.isfinite(loss)), None):
            raise UserError(
                f"the {bad}'s loss is {losses[bad]} in epoch {self.epoch}, stage {self.stage}; lower the learning rate"
            )
        self.scheduler.step()
        self.epoch += 1
        entry = {"stage": self.stage, "learning_rate": rate, "loss": losses, **self.held_out()}
        return entry | {"images_per_second": round(speed, 1)}

    def held_out(self) -> dict[str, dict[str, float | None]]:
        """Return `measures` of each network on the held-out images, the Selector's at the currently best threshold."""
        metrics = {}
        for name, network in self.networks.items():
            for buffer in network.buffers():  # batch-norm statistics, which each process has of its own images
                broadcast(buffer)
            scores = all_scores(self.accelerator, network, self.val, self.rlhf.batch_size)
            rewards, threshold = self.val.rewards[COLUMN[name]], None
            if name == "selector":
                given = self.rlhf.threshold
                threshold = best_threshold(scores, rewards)[0] if given is None else given
            metrics[name] = measures(scores, rewards, threshold)
        return metrics

    def _train(self, rate: float) -> dict[str, float]:
        """Run one pass over the rated images; return the mean loss of each network."""
        device, losses = self.accelerator.device, {name: [] for name in self.networks}
        flips = self.train.flips(self.seed, self.epoch) if self.rlhf.flip else torch.zeros(len(self.train)).bool()
        for model in self.models.values():
            model.train()
        batches = list(self.batches)
        for number, batch in enumerate(batches):
            self._set_rate(rate * self._warmup(self.epoch * len(batches) + number + 1))
            indices = torch.tensor(batch)
            images = self.train.images[indices]
            images = torch.where(flips[indices][:, None, None, None], images.flip(-1), images)
            images = images.to(device).float() / 255
            loss = {name: self._loss(name, indices, images) for name in self.networks}
            self.accelerator.backward(torch.stack(list(loss.values())).sum())  # the networks share no weights
            self.optimizer.step()
            self.optimizer.zero_grad()
            for name, value in loss.items():
                losses[name].append(value.detach())
        self._set_rate(rate)  # the schedule multiplies the current rate
        means = torch.stack([torch.stack(values).mean() for values in losses.values()])
        return dict(zip(losses, self.accelerator.reduce(means, "mean").tolist(), strict=True))

    def _warmup(self, update: int) -> float:
        """Return the factor of the learning rate at an update, counted from 1: linear over stage 1's warm-up."""
        return min(1.0, update / self.rlhf.warmup_steps) if self.stage == 1 and self.rlhf.warmup_steps else 1.0

    def _set_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def _loss(self, name: str, indices: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """Return the loss of one network for float images (B, 3, S, S) with these indices (B,)."""
        network, model = self.networks[name], self.models[name]
        prompts = [self.train.prompts[index] for index in indices.tolist()]
        inputs = (network.preprocess(images),)
        if name == "policy":
            inputs += (network.text(prompts).to(images.device),)
        with self.accelerator.autocast():
            logits = model(*inputs)
        logits = logits.float()  # (B,)
        rewards = self.train.rewards[COLUMN[name]][indices].to(images.device)
        weights = self.train.weights[indices].to(images.device)
        values = logits.sigmoid()
        if self.stage == 2:  # without dropout, so that the baseline is the score that others see
            policy: Policy = self.networks["policy"]
            values = policy.score(images, prompts)
            if self.rlhf.importance:
                scores = self.selector_scores[indices].to(images.device)
                weights = weights * importance_weights(scores, values, *self.rlhf.importance_range)
        return reinforce_loss(logits, advantages(rewards, values), weights, self.rlhf.objective)

    def finish(self) -> None:
        """Unwrap the networks, put them into eval mode and free the optimizer."""
        for model in self.models.values():
            self.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        self.accelerator.free_memory()
        for network in self.networks.values():
            network.eval()
