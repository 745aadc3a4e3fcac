"""APR during training: a judge that gives no reward looks at images whose prompts and noise are always the same.

The noise of an image is a function of (seed, prompt number, image number) and of nothing else, so evaluations of one
run differ by the weights alone. No random state is read or left behind: training goes on as if nothing had happened.
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
from ddpo_pytorch.generator.pipeline import PromptEmbeddings
from ddpo_pytorch.judges.classifier import ArtifactClassifier, load_classifier
from ddpo_pytorch.metrics.alignment import count_alignment
from ddpo_pytorch.prompts import Prompt
from ddpo_pytorch.rewards import RewardFn, as_reward
from ddpo_pytorch.sampling import Job, Sampling, draw_images
from ddpo_pytorch.utils.errors import UserError, difference
from ddpo_pytorch.utils.fingerprint import fingerprint
from ddpo_pytorch.utils.randomness import Stream, derived_seed


def load_judge(
    path: str | Path, reward_classifiers: Iterable[str | Path], device: str | torch.device = "cpu"
) -> ArtifactClassifier:
    """The classifier of the four artifacts at `path`.

    Raises UserError for other labels, and for the weights of a classifier that gives the reward, from whatever file:
    what is optimised cannot judge.
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
                f"held_out.classifier {str(path)!r} has the weights of {str(other)!r}, which gives the reward, and is "
                "no independent judge; give one that was trained apart"
            )
    return judge


@dataclass(frozen=True)
class Evaluation:
    """APR in [0, 1] by the judge and mean reward of the same images; APR of each caption that was drawn."""

    apr: float
    reward: float
    apr_by_prompt: dict[str, float]


class HeldOut:
    """A fixed set of prompts and noise, and the judge of what is drawn from it.

    Args:
        judge: from `load_judge`.
        prompts: all (prompt, metadata) to draw. UserError for one that is not an ISIC caption.
        images_per_prompt: images of each.
        seed: of the noise.
        sampling: how they are drawn.
    """

    def __init__(
        self,
        judge: ArtifactClassifier,
        prompts: Sequence[Prompt],
        images_per_prompt: int,
        seed: int,
        sampling: Sampling,
    ):
        self.judge, self.sampling = judge, sampling
        for prompt, _ in prompts:
            labels_of(prompt)
        self.jobs = [
            Job(prompt, metadata, derived_seed(seed, Stream.HELD_OUT, number, index))
            for number, (prompt, metadata) in enumerate(prompts)
            for index in range(images_per_prompt)
        ]
        # what two evaluations must share for their numbers to be compared
        self.identity = {
            "judge": fingerprint(judge),
            "seed": seed,
            "prompts": [prompt for prompt, _ in prompts],
            "images_per_prompt": images_per_prompt,
            **asdict(sampling),
        }

    def check_identity(self, earlier: dict[str, Any]) -> None:
        """Raise UserError when a run that is resumed was evaluated in another way so far."""
        if changed := difference(earlier, self.identity):
            name, before, now = changed
            raise UserError(
                f"this run's held-out evaluations had {name}={before}, now it is {now}, so their APR cannot be "
                "compared; give the same as before, or held_out.every=0"
            )

    def evaluate(
        self,
        pipe: StableDiffusionPipeline,
        table: PromptEmbeddings,
        reward_fn: RewardFn,
        batch_size: int,
        accelerator: Accelerator,
        show: Callable[[Sequence], Iterable] = iter,
    ) -> Evaluation:
        """Draw and score all images with the weights as they are; the same result on every process.

        Batches are cut from the list of all images before they are dealt to processes. Judge and reward see images in
        8 bits, as they would be stored. `show` wraps this process's batches, for a progress bar. Raises UserError when
        an image is not finite.
        """
        every = range(0, len(self.jobs), batch_size)
        starts = every[accelerator.process_index :: accelerator.num_processes]
        # all processes draw equally many, the last one perhaps for nothing: a divided UNet (sharding.py) needs them all
        spare = [0] * (-(-len(every) // accelerator.num_processes) - len(starts))
        heads = len(self.judge.labels)
        scores = torch.zeros(len(self.jobs), heads + 1, dtype=torch.float64)
        for number, start in enumerate(show([*starts, *spare])):
            batch = self.jobs[start : start + batch_size]
            noise = [torch.Generator().manual_seed(job.seed) for job in batch]  # on the CPU: alike on every device
            with accelerator.autocast():
                images = draw_images(pipe, table, [job.prompt for job in batch], noise, self.sampling)
            if not images.isfinite().all():
                raise UserError(
                    f"held-out image of {batch[0].prompt!r}, or one beside it, is not finite; lower "
                    "train.learning_rate, or use mixed_precision bf16 or no"
                )
            if number >= len(starts):
                continue
            images = to_uint8(images).float() / 255
            rewards, _ = as_reward(reward_fn)(images, [job.prompt for job in batch], [job.metadata for job in batch])
            rows = scores[start : start + batch_size]
            rows[:, :heads] = self.judge.predict(images).cpu().double()
            rows[:, heads] = torch.from_numpy(rewards)
        # every row comes from one process, the others have zeros there
        scores = accelerator.reduce(scores.to(accelerator.device), "sum").cpu()
        counts = count_alignment([job.prompt for job in self.jobs], scores[:, :heads].long(), self.judge.labels)
        return Evaluation(counts.apr(), scores[:, heads].mean().item(), counts.apr_by_prompt())
