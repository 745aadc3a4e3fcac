"""Images from fixed prompts and noise, drawn during training: sample grids, and held-out APR and reward.

An image's noise is a function of (seed, prompt number, image number) alone, so grids and evaluations of a run differ
only in the weights. No global random state is read or changed, so training is not affected.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import StableDiffusionPipeline
from PIL import Image

from ddpo_pytorch.data.images import SYNTHETIC, image_grid, save_picture, to_uint8
from ddpo_pytorch.data.isic import ARTIFACTS, labels_of
from ddpo_pytorch.data.metadata import requested_labels
from ddpo_pytorch.diffusers_patch.pipeline_with_logprob import Sampling
from ddpo_pytorch.generator.pipeline import PromptEmbeddings
from ddpo_pytorch.judges.classifier import ArtifactClassifier, load_classifier
from ddpo_pytorch.metrics.alignment import aligned_images, apr_by_prompt
from ddpo_pytorch.prompts import Prompt
from ddpo_pytorch.rewards import RewardFn, as_reward
from ddpo_pytorch.sampling import draw_images
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.fingerprint import fingerprint
from ddpo_pytorch.utils.randomness import Stream, generator_of

COLUMNS = 8  # of a grid


@torch.no_grad()
def draw_fixed(
    accelerator: Accelerator,
    pipe: StableDiffusionPipeline,
    embeddings: PromptEmbeddings,
    prompts: Sequence[str],
    noise: Callable[[int], torch.Generator],
    sampling: Sampling,
    batch_size: int,
    show: Callable[[Sequence], Iterable] = iter,
) -> Iterator[tuple[range, torch.Tensor]]:
    """Draw image i of prompts[i] from `noise(i)`; yield this process's batches: numbers i, images (B, 3, H, W).

    Every process draws the same number of batches, repeating some of another process if needed, because a UNet sharded
    by FSDP needs all processes in every pass. `show` wraps the batches in a progress bar.
    """
    was_training = pipe.unet.training
    pipe.unet.eval()
    batches = [range(len(prompts))[start : start + batch_size] for start in range(0, len(prompts), batch_size)]
    rank, processes = accelerator.process_index, accelerator.num_processes
    for numbers in show((batches * processes)[rank::processes][: -(-len(batches) // processes)]):
        with accelerator.autocast():
            images = draw_images(pipe, embeddings, [prompts[i] for i in numbers], [noise(i) for i in numbers], sampling)
        yield numbers, images
    pipe.unet.train(was_training)


def save_grid(
    accelerator: Accelerator,
    pipe: StableDiffusionPipeline,
    embeddings: PromptEmbeddings,
    prompts: Sequence[str],
    seed: int,
    sampling: Sampling,
    batch_size: int,
    path: Path,
) -> Image.Image | None:
    """Draw one image per prompt and save them as a grid; return it on the main process."""

    def noise(number: int) -> torch.Generator:
        return generator_of(seed, Stream.GRID, 0, number)  # on the CPU: the same on every device

    images, share = [], -(-len(prompts) // accelerator.num_processes)
    batch_size = min(batch_size, share)  # no image is drawn twice
    for numbers, drawn in draw_fixed(accelerator, pipe, embeddings, prompts, noise, sampling, batch_size):
        images += zip(numbers, drawn.float().cpu(), strict=True)
    images = dict(gather_object(images))
    if not accelerator.is_main_process:
        return None
    grid = image_grid(torch.stack([images[number] for number in range(len(prompts))]), COLUMNS)
    save_picture(path, grid, SYNTHETIC)
    return grid


def load_judge(
    path: str | Path, reward_classifiers: Iterable[str | Path], device: str | torch.device = "cpu"
) -> ArtifactClassifier:
    """Load the classifier of the four artifacts at `path`.

    Raises UserError for other labels, and for the same weights as a classifier of the reward, whatever its path.
    """
    if not path:
        raise UserError("held_out.classifier is empty; held_out.every needs the H=4 judge, or set held_out.every=0")
    judge = load_classifier(path, device)
    if judge.labels != ARTIFACTS:
        raise UserError(
            f"held_out.classifier {str(path)!r} predicts {', '.join(judge.labels)}; give the H=4 classifier"
        )
    for other in reward_classifiers:
        if fingerprint(load_classifier(other).state_dict()) == fingerprint(judge.state_dict()):
            raise UserError(
                f"held_out.classifier {str(path)!r} is {str(other)!r}, which gives the reward; give an independent one"
            )
    return judge


@dataclass(frozen=True)
class Evaluation:
    """APR in [0, 1] according to the judge, mean reward of the same images, and APR of each caption."""

    apr: float
    reward: float
    apr_by_prompt: dict[str, float]


class HeldOut:
    """A fixed set of prompts and noise with its judge (`load_judge`).

    `prompts` are (prompt, metadata); raises UserError for one that is not an ISIC caption. Two evaluations are
    comparable if their `fingerprint` is the same.
    """

    def __init__(
        self,
        judge: ArtifactClassifier,
        prompts: Sequence[Prompt],
        images_per_prompt: int,
        seed: int,
        sampling: Sampling,
    ):
        self.judge, self.sampling, self.seed, self.count = judge, sampling, seed, images_per_prompt
        for prompt, _ in prompts:
            labels_of(prompt)
        self.images = [prompt for prompt in prompts for _ in range(images_per_prompt)]  # (prompt, metadata) of each
        self.fingerprint = {
            "judge": fingerprint(judge),
            "seed": seed,
            "prompts": [prompt for prompt, _ in prompts],
            "images_per_prompt": images_per_prompt,
            **asdict(sampling),
        }

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

        Judge and reward see 8-bit images, as they would be stored. Raises UserError if an image is not finite.
        """
        captions, metadata = zip(*self.images, strict=True)

        def noise(number: int) -> torch.Generator:
            return generator_of(self.seed, Stream.HELD_OUT, *divmod(number, self.count))

        scores = []  # (number, predictions of the judge, reward) of each image
        fixed = captions, noise, self.sampling, batch_size, show
        for numbers, images in draw_fixed(accelerator, pipe, embeddings, *fixed):
            texts, details = captions[numbers.start : numbers.stop], metadata[numbers.start : numbers.stop]
            if not images.isfinite().all():
                raise UserError(
                    f"a held-out image of {texts[0]!r}, ... is not finite; lower train.learning_rate, or use bf16 or no"
                )
            images = to_uint8(images).float() / 255
            rewards, _ = as_reward(reward_fn)(images, texts, details)
            scores += zip(numbers, self.judge.predict(images).tolist(), rewards.tolist(), strict=True)
        scored = {number: values for number, *values in gather_object(scores)}
        predictions, rewards = zip(*(scored[number] for number in range(len(captions))), strict=True)
        aligned = aligned_images(requested_labels(captions, self.judge.labels), torch.tensor(predictions))
        reward = torch.tensor(rewards, dtype=torch.float64).mean().item()
        return Evaluation(float(aligned.mean()), reward, apr_by_prompt(aligned, captions))
