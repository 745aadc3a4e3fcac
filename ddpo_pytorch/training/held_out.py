"""Images from fixed prompts and noise, drawn during training: sample grids, and held-out APR and reward.

Noise is a function of (seed, prompt number, image number), so grids and evaluations of a run differ only in weights.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import nn

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
Draw = Callable[[range], Iterable[Any]]  # from the numbers of a batch's images to a result for each
Show = Callable[[Sequence], Iterable]  # adds a progress bar


def map_fixed(
    accelerator: Accelerator, unet: nn.Module, count: int, batch_size: int, draw: Draw, show: Show = iter
) -> list[Any]:
    """Call `draw` with batches of the numbers below `count`; return its results, one for each number, in order.

    Every process draws the same number of batches, repeating some of another process if needed, because a UNet sharded
    by FSDP needs all processes in every pass. Each returns all results. `show` wraps the batches in a progress bar.
    """
    was_training = unet.training
    unet.eval()
    batches = [range(count)[start : start + batch_size] for start in range(0, count, batch_size)]
    rank, processes, results = accelerator.process_index, accelerator.num_processes, []
    for numbers in show((batches * processes)[rank::processes][: -(-len(batches) // processes)]):
        results += zip(numbers, draw(numbers), strict=True)
    unet.train(was_training)
    by_number = dict(gather_object(results))
    return [by_number[number] for number in range(count)]


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

    def draw(numbers: range) -> torch.Tensor:
        noise = [generator_of(seed, Stream.GRID, 0, i) for i in numbers]  # on the CPU: the same on every device
        with torch.no_grad(), accelerator.autocast():
            return draw_images(pipe, embeddings, [prompts[i] for i in numbers], noise, sampling).float().cpu()

    size = min(batch_size, -(-len(prompts) // accelerator.num_processes))  # no image is drawn twice
    images = map_fixed(accelerator, pipe.unet, len(prompts), size, draw)
    if not accelerator.is_main_process:
        return None
    grid = image_grid(torch.stack(images), COLUMNS)
    save_picture(path, grid, SYNTHETIC)
    return grid


def load_judge(path: str, reward_classifiers: Iterable[str], device: str | torch.device = "cpu") -> ArtifactClassifier:
    """Load the H=4 classifier at `path`. Raises UserError for other labels, and for weights that give the reward."""
    if not path:
        raise UserError("held_out.classifier is empty; held_out.every needs the H=4 judge, or set held_out.every=0")
    judge, given = load_classifier(path, device), f"held_out.classifier {str(path)!r}"
    if judge.labels != ARTIFACTS:
        raise UserError(f"{given} predicts {', '.join(judge.labels)}; give the H=4 classifier")
    for other in reward_classifiers:
        if fingerprint(load_classifier(other).state_dict()) == fingerprint(judge.state_dict()):
            raise UserError(f"{given} is {str(other)!r}, which gives the reward; give an independent one")
    return judge


@dataclass(frozen=True)
class Evaluation:
    """APR in [0, 1] according to the judge, mean reward of the same images, and APR of each caption."""

    apr: float
    reward: float
    apr_by_prompt: dict[str, float]


class HeldOut:
    """Fixed ISIC captions (else UserError), noise and their judge; comparable if their `fingerprint` is the same."""

    def __init__(
        self, judge: ArtifactClassifier, prompts: list[Prompt], images_per_prompt: int, seed: int, sampling: Sampling
    ):
        self.judge, self.sampling, self.seed, self.count = judge, sampling, seed, images_per_prompt
        texts = [prompt for prompt, _ in prompts]
        for text in texts:
            labels_of(text)
        self.images = [prompt for prompt in prompts for _ in range(images_per_prompt)]  # (prompt, metadata) of each
        self.fingerprint = {"judge": fingerprint(judge), "seed": seed, "prompts": texts}
        self.fingerprint |= {"images_per_prompt": images_per_prompt} | asdict(sampling)

    def evaluate(
        self,
        pipe: StableDiffusionPipeline,
        embeddings: PromptEmbeddings,
        reward_fn: RewardFn,
        batch_size: int,
        accelerator: Accelerator,
        show: Show = iter,
    ) -> Evaluation:
        """Draw and score all images with the current weights; return the same result on every process.

        Judge and reward see 8-bit images, as they would be stored. Raises UserError if an image is not finite.
        """
        captions, metadata = zip(*self.images, strict=True)

        def score(numbers: range) -> Iterable[tuple[list, float]]:
            texts, details = captions[numbers.start : numbers.stop], metadata[numbers.start : numbers.stop]
            noise = [generator_of(self.seed, Stream.HELD_OUT, *divmod(i, self.count)) for i in numbers]
            with torch.no_grad(), accelerator.autocast():
                images = draw_images(pipe, embeddings, texts, noise, self.sampling)
            if not images.isfinite().all():
                problem = f"a held-out image of {texts[0]!r}, ... is not finite"
                raise UserError(f"{problem}; lower train.learning_rate, or use mixed_precision bf16 or no")
            images = to_uint8(images).float() / 255
            rewards, _ = as_reward(reward_fn)(images, texts, details)
            return zip(self.judge.predict(images).tolist(), rewards.tolist(), strict=True)

        scores = map_fixed(accelerator, pipe.unet, len(captions), batch_size, score, show)
        predictions, rewards = zip(*scores, strict=True)
        aligned = aligned_images(requested_labels(captions, self.judge.labels), torch.tensor(predictions))
        reward = torch.tensor(rewards, dtype=torch.float64).mean().item()
        return Evaluation(float(aligned.mean()), reward, apr_by_prompt(aligned, captions))
