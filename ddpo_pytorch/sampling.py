"""Drawing images for evaluation: what to draw, how, and into which files; a function of (seed, prompt, index) alone.

Convolutions and matrix products choose their kernel by the shape of their input, and with it the order of their sums:
an image drawn among 7 others differs in its last bits from the same image drawn among 63. Networks therefore see passes
of one fixed shape here, the last one filled up. On a CPU they also see one thread each, since sums are split among
threads, and last bits with them; the cores of a process draw as many passes side by side.
"""

import copy
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

from ddpo_pytorch.data.images import load_pixels, save_image, to_uint8
from ddpo_pytorch.data.sample_folder import PartLog, folder_name
from ddpo_pytorch.diffusers_patch.pipeline_with_logprob import pipeline_with_logprob
from ddpo_pytorch.generator.pipeline import PromptEmbeddings, latent_shape, set_schedule
from ddpo_pytorch.prompts import check_prompt
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.randomness import Stream, derived_seed, text_number
from ddpo_pytorch.utils.settings import FINITE, ONE_OR_MORE, SEED, SHARE

SCHEDULERS = ("ddim", "dpm++")
# numeric settings by which images are drawn; training needs more of sample.eta (`check_schedule`)
SAMPLING = {"seed": SEED, "sample.num_steps": ONE_OR_MORE, "sample.eta": SHARE, "sample.guidance_scale": FINITE}
IMAGE_FORMATS = ("png", "jpg")
BLACK = 2  # an image with every 8-bit level below this is counted as black
CPU_PASS = 32  # images a pass on a CPU, of 16 x 16 latents; fewer of larger ones
Judge = Callable[[torch.Tensor, Sequence[str], Sequence[Mapping[str, Any]]], tuple[Sequence[float], dict[str, Any]]]


class Job(NamedTuple):
    """One image to draw: its prompt, the prompt's metadata, its file relative to the folder, the seed of its noise."""

    prompt: str
    metadata: dict[str, Any]
    path: str
    seed: int


def plan(prompts: Sequence[tuple[str, dict[str, Any]]], count: int, seed: int, image_format: str = "png") -> list[Job]:
    """`count` images of each (prompt, metadata), prompt by prompt.

    Seeds depend on (seed, text of the prompt, index): other prompts beside it, or more images, change nothing.

    Raises:
        UserError: a prompt that `check_prompt` refuses, or that occurs twice.
    """
    jobs, seen = [], set()
    for prompt, metadata in prompts:
        check_prompt(prompt)
        if prompt in seen:
            raise UserError(f"prompt {prompt!r} is given twice; give every prompt once")
        seen.add(prompt)
        folder = folder_name(prompt)
        for index in range(count):
            noise = derived_seed(seed, Stream.EVALUATION, text_number(prompt), index)
            jobs.append(Job(prompt, metadata, f"images/{folder}/{index:05d}.{image_format}", noise))
    return jobs


def images_per_pass(pipe: StableDiffusionPipeline, batch_size: int) -> int:
    """Images that go through the networks together: `batch_size` on a GPU, a function of the model alone on a CPU.

    On a CPU 32 images of 16 x 16 latents are as fast as 64 of them, and 2 of 64 x 64 (512 px) are as many, so that
    nothing is lost by giving every run the same shapes, and with them the same bytes. On a GPU more images are faster
    until its memory is full, which is the user's to say.
    """
    if pipe.device.type != "cpu":
        return batch_size
    _, height, width = latent_shape(pipe)
    return min(max(CPU_PASS * 16 * 16 // (height * width), 1), CPU_PASS)


class Sampler:
    """Images from prompts and seeds, each from a CPU generator of its own, so that noise is the same on every device.

    A generator gives first the initial latents, whatever the scheduler, then with DDIM a draw a step. For one thread:
    schedulers remember the step they are at. Others get a `twin`.

    Args:
        pipe: from `load_pipeline`, with all weights loaded. They are shared; the pipeline itself is left as it is.
        scheduler: one of SCHEDULERS; "dpm++" takes no eta.
        num_steps, eta, guidance_scale: as in config/base.py.

    Raises:
        UserError: unknown scheduler, or more steps than the model's schedule has.
    """

    def __init__(
        self, pipe: StableDiffusionPipeline, scheduler: str, num_steps: int, eta: float, guidance_scale: float
    ):
        if scheduler not in SCHEDULERS:
            raise UserError(f"sample.scheduler is {scheduler!r}; allowed are {', '.join(SCHEDULERS)}")
        pipe = _own_pipeline(pipe)
        if scheduler == "dpm++":
            pipe.scheduler = DPMSolverMultistepScheduler.from_config(
                pipe.scheduler.config, algorithm_type="dpmsolver++"
            )
        set_schedule(pipe, num_steps)
        self.pipe, self.scheduler, self.eta = pipe, scheduler, eta
        self.common = {"num_inference_steps": num_steps, "guidance_scale": guidance_scale, "output_type": "pt"}
        self.table = PromptEmbeddings(pipe)

    def twin(self) -> "Sampler":
        """The same for another thread: scheduler and pipeline of its own; weights and prompt embeddings are shared."""
        twin = copy.copy(self)
        twin.pipe = _own_pipeline(self.pipe)
        return twin

    def __call__(self, prompts: Iterable[str], seeds: Iterable[int]) -> torch.Tensor:
        """Images (B, 3, H, W), float32 in [0, 1] or NaN."""
        embeds = self.table(prompts)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        draw = self._ddim if self.scheduler == "ddim" else self._dpm_solver
        with torch.autocast(embeds.device.type, embeds.dtype, enabled=embeds.dtype != torch.float32):
            return draw(prompt_embeds=embeds, generator=generators, **self.common).float()

    def _ddim(self, **arguments: Any) -> torch.Tensor:
        negative = self.table.negative
        images, *_ = pipeline_with_logprob(
            self.pipe, negative_prompt_embeds=negative, eta=self.eta, keep_trajectory=False, **arguments
        )
        return images

    def _dpm_solver(self, prompt_embeds: torch.Tensor, generator: list[torch.Generator], **arguments: Any):
        shape = latent_shape(self.pipe)
        latents = torch.stack([torch.randn(shape, generator=source) for source in generator]).to(prompt_embeds)
        return self.pipe(
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=self.table.negative.expand_as(prompt_embeds),
            generator=generator,
            latents=latents,
            **arguments,
        ).images


def _own_pipeline(pipe: StableDiffusionPipeline) -> StableDiffusionPipeline:
    parts = pipe.components | {"scheduler": copy.deepcopy(pipe.scheduler)}
    own = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    own.set_progress_bar_config(disable=True)
    return own


def draw_passes(
    sampler: Sampler, passes: Sequence[Sequence[Job]], workers: int, *arguments: Any
) -> Iterator[tuple[int, list[Job]]]:
    """`draw_pass(sampler, passes[i], *arguments)` for every i: yields i and what it returns, as they get ready.

    On a CPU `workers` threads draw a pass each at the same time, with the same bytes for any number of them; memory
    grows with their number and not with that of the passes. On a GPU one draws while another encodes and writes.
    Set torch's threads to 1 before on a CPU. An error of one pass is raised after those that have begun.
    """
    device, local = sampler.pipe.device, threading.local()
    turn = nullcontext() if device.type == "cpu" else threading.Lock()

    def start() -> None:
        if device.type == "cpu":
            torch.set_num_threads(1)  # each thread has a number of its own
        elif device.type == "cuda":
            torch.cuda.set_device(device)
        local.sampler = sampler.twin()

    def draw(jobs: Sequence[Job]) -> list[Job]:
        return draw_pass(local.sampler, jobs, *arguments, turn=turn)

    pool = ThreadPoolExecutor(workers if device.type == "cpu" else 2, initializer=start)
    try:
        numbers = {pool.submit(draw, jobs): number for number, jobs in enumerate(passes)}
        for future in as_completed(numbers):
            yield numbers[future], future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def draw_pass(
    sampler: Sampler,
    jobs: Sequence[Job],
    size: int,
    folder: Path,
    log: PartLog,
    done: Collection[str] = (),
    judge: Judge | None = None,
    weights_sha256: str = "",
    turn: AbstractContextManager | None = None,
) -> list[Job]:
    """Draw one pass of `size` images, of which `jobs` are wanted; write files and log entries of those not in `done`.

    All are drawn, those in `done` too, so that a restart repeats the same pass. The judge sees the images as they are
    stored: in 8 bits, and after JPEG where that is the format. An image is logged after its file is there. Returns the
    jobs whose image is not finite; they are neither written nor logged. Drawing, not writing, happens within `turn`.
    """
    rows = [*jobs, *[jobs[-1]] * (size - len(jobs))]
    with turn or nullcontext():
        images = sampler([job.prompt for job in rows], [job.seed for job in rows])
        finite = images.flatten(1).isfinite().all(dim=1).tolist()
        device, pixels = images.device, to_uint8(images.nan_to_num()).cpu()
        del images
    wanted = [number for number, job in enumerate(jobs) if job.path not in done]
    new = [number for number in wanted if finite[number]]
    for number in new:
        path = folder / jobs[number].path
        save_image(path, pixels[number])
        if path.suffix != ".png":
            pixels[number] = load_pixels(path)
    if new:
        about = _entries(rows, pixels, judge, device, weights_sha256)
        log.add([about[number] for number in new])
    return [jobs[number] for number in wanted if not finite[number]]


def _entries(
    rows: Sequence[Job], pixels: torch.Tensor, judge: Judge | None, device: torch.device, weights_sha256: str
) -> list[dict[str, Any]]:
    """Log entries for rows of stored pixels, uint8 (B, 3, H, W). The judge, too, always sees a whole pass.

    labels are those of the judge's attributes, as predictions are; without a judge, all that the prompt states.
    """
    black = (pixels.flatten(1).amax(dim=1) < BLACK).tolist()
    entries = [
        {
            "prompt": job.prompt,
            "reward": None,
            "path_to_img": job.path,
            "predictions": None,
            "labels": job.metadata.get("label"),
            "logits": None,
            "seed": job.seed,
            "black": is_black,
            "weights_sha256": weights_sha256,
        }
        for job, is_black in zip(rows, black, strict=True)
    ]
    if judge is not None:
        images = pixels.to(device).float() / 255
        rewards, info = judge(images, [job.prompt for job in rows], [job.metadata for job in rows])
        found = zip(entries, rewards, info["predictions"], info["labels"], info["logits"], strict=True)
        for entry, reward, predictions, labels, logits in found:
            entry |= {"reward": f"{reward:.4f}", "predictions": predictions.tolist(), "labels": labels.tolist()}
            entry["logits"] = [round(float(logit), 6) for logit in logits]
    return entries
