"""APR during training, by a judge that gives no reward, on images whose prompts and noise never change.

An image's noise is a function of (seed, prompt number, image number) alone, so evaluations of a run differ only by the
weights. No random state is read or left behind: training continues as if nothing had happened.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline

from ddpo_pytorch.data.images import to_uint8
from ddpo_pytorch.data.isic import ARTIFACTS, labels_of
from ddpo_pytorch.diffusers_patch.pipeline_with_logprob import Sampling
from ddpo_pytorch.generator.pipeline import PromptEmbeddings
from ddpo_pytorch.judges.classifier import ArtifactClassifier, load_classifier
from ddpo_pytorch.metrics.alignment import aligned_images, apr_by_prompt
from ddpo_pytorch.prompts import Prompt
from ddpo_pytorch.rewards import RewardFn, as_reward
from ddpo_pytorch.sampling import draw_images
from ddpo_pytorch.utils.errors import UserError, difference
from ddpo_pytorch.utils.fingerprint import fingerprint
from ddpo_pytorch.utils.randomness import Stream, generator_of


def load_judge(
    path: str | Path, reward_classifiers: Iterable[str | Path], device: str | torch.device = "cpu"
) -> ArtifactClassifier:
    """Load the classifier of the four artifacts at `path`.

    Raises UserError for other labels, and for the weights of a classifier that gives the reward, under whatever path:
    what is optimized cannot judge.
    """
    if not path:
        raise UserError("held_out.classifier is empty; held_out.every needs the H=4 judge, or set held_out.every=0")
    judge = load_classifier(path, device)
    if judge.labels != ARTIFACTS:
        raise UserError(
            f"held_out.classifier {str(path)!r} predicts {', '.join(judge.labels)}; the judge predicts "
            f"{', '.join(ARTIFACTS)}: give the H=4 classifier"
        )
    for other in reward_classifiers:
        if fingerprint(load_classifier(other).state_dict()) == fingerprint(judge.state_dict()):
            raise UserError(
                f"held_out.classifier {str(path)!r} has the weights of {str(other)!r}, which gives the reward, so it "
                "is no independent judge; give one that was trained separately"
            )
    return judge


@dataclass(frozen=True)
class Evaluation:
    """APR in [0, 1] by the judge and mean reward of the same images; APR of each caption."""

    apr: float
    reward: float
    apr_by_prompt: dict[str, float]


class HeldOut:
    """A fixed set of prompts and noise with its judge.

    Args:
        judge: from `load_judge`.
        prompts: all (prompt, metadata) to draw. Raises UserError for one that is not an ISIC caption.
        images_per_prompt: images of each.
        seed: of the noise.
        sampling: as in training.

    Attributes:
        fingerprint: what two evaluations must share for their numbers to be comparable.
    """

    def __init__(
        self,
        judge: ArtifactClassifier,
        prompts: Sequence[Prompt],
        images_per_prompt: int,
        seed: int,
        sampling: Sampling,
    ):
        self.judge, self.sampling, self.seed = judge, sampling, seed
        for prompt, _ in prompts:
            labels_of(prompt)
        # (prompt, metadata, prompt number, image number) of each image
        self.images = [
            (prompt, metadata, number, index)
            for number, (prompt, metadata) in enumerate(prompts)
            for index in range(images_per_prompt)
        ]
        self.fingerprint = {
            "judge": fingerprint(judge),
            "seed": seed,
            "prompts": [prompt for prompt, _ in prompts],
            "images_per_prompt": images_per_prompt,
            **asdict(sampling),
        }

    def check_fingerprint(self, earlier: dict[str, Any]) -> None:
        """Raise UserError if the run to resume was evaluated differently so far."""
        if changed := difference(earlier, self.fingerprint):
            name, before, now = changed
            raise UserError(
                f"this run's held-out evaluations had {name}={before}, now it is {now}, so their APR cannot be "
                "compared; give the same as before, or held_out.every=0"
            )

    def evaluate(
        self,
        pipe: StableDiffusionPipeline,
        embeddings: PromptEmbeddings,
        reward_fn: RewardFn,
        batch_size: int,
        accelerator: Accelerator,
        show: Callable[[Sequence], Iterable] = iter,
    ) -> Evaluation:
        """Draw and score all images with the current weights; return the same result on every process.

        Judge and reward see images in 8 bits, as they would be stored. `show` wraps this process's batches, for a
        progress bar. Raises UserError if an image is not finite.
        """
        starts = list(range(0, len(self.images), batch_size))[accelerator.process_index :: accelerator.num_processes]
        # every process draws equally many batches, since a UNet divided by FSDP needs all of them in every pass
        rounds = -(-len(self.images) // (batch_size * accelerator.num_processes))
        heads = len(self.judge.labels)
        scores = torch.zeros(len(self.images), heads + 1, dtype=torch.float64)  # predictions and reward of each image
        for number, start in enumerate(show([*starts, *[0] * (rounds - len(starts))])):
            prompts, metadata, *progress = zip(*self.images[start : start + batch_size], strict=True)
            # on the CPU: the same noise on every device
            noise = [generator_of(self.seed, Stream.HELD_OUT, *image) for image in zip(*progress, strict=True)]
            with accelerator.autocast():
                images = draw_images(pipe, embeddings, prompts, noise, self.sampling)
            if not images.isfinite().all():
                raise UserError(
                    f"a held-out image of {prompts[0]!r} or its neighbours is not finite; lower train.learning_rate, "
                    "or use mixed_precision bf16 or no"
                )
            if number >= len(starts):
                continue
            images = to_uint8(images).float() / 255
            rewards, _ = as_reward(reward_fn)(images, prompts, metadata)
            rows = scores[start : start + batch_size]
            rows[:, :heads] = self.judge.predict(images).cpu().double()
            rows[:, heads] = torch.from_numpy(rewards)
        # each row is filled by one process and zero on the others
        scores = accelerator.reduce(scores.to(accelerator.device), "sum").cpu()
        captions = [image[0] for image in self.images]
        aligned = aligned_images(captions, scores[:, :heads], self.judge.labels)
        return Evaluation(float(aligned.mean()), scores[:, heads].mean().item(), apr_by_prompt(aligned, captions))
