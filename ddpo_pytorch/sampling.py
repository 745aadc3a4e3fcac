"""Drawing images without log-probs: for evaluation, as a function of (seed, prompt, index) alone.

Convolutions and matrix products choose their kernel by input shape, so an image drawn in a batch of 8 differs in its
last bits from the same image drawn in a batch of 64. `draw_passes` therefore uses passes of one fixed shape, the last
one padded. On a CPU the number of threads matters as well: there each pass runs on one thread, and the cores draw
several passes at the same time.
"""

import copy
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline

from ddpo_pytorch.data.images import load_pixels, save_image, to_uint8
from ddpo_pytorch.data.sample_folder import PartLog, folder_name
from ddpo_pytorch.diffusers_patch.pipeline_with_logprob import Sampling, pipeline_with_logprob
from ddpo_pytorch.generator.pipeline import PromptEmbeddings, latent_shape, set_schedule
from ddpo_pytorch.prompts import check_prompt
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.randomness import Stream, derived_seed, text_number
from ddpo_pytorch.utils.settings import FINITE, ONE_OR_MORE, SEED, SHARE

SCHEDULERS = ("ddim", "dpm++")
# ranges of the sampling settings; training needs more of sample.eta (`check_schedule`)
SAMPLING = {"seed": SEED, "sample.num_steps": ONE_OR_MORE, "sample.eta": SHARE, "sample.guidance_scale": FINITE}
IMAGE_FORMATS = ("png", "jpg")
BLACK = 2  # an image with all 8-bit levels below this is black
CPU_PASS = 32  # images per pass on a CPU for 16 x 16 latents, fewer for larger ones
Judge = Callable[[torch.Tensor, Sequence[str], Sequence[Mapping[str, Any]]], tuple[Sequence[float], dict[str, Any]]]


class Job(NamedTuple):
    """One image to draw: prompt, the prompt's metadata, seed of its noise, and file relative to the folder."""

    prompt: str
    metadata: dict[str, Any]
    seed: int
    path: str = ""


def plan(prompts: Sequence[tuple[str, dict[str, Any]]], count: int, seed: int, image_format: str = "png") -> list[Job]:
    """Return `count` jobs for each (prompt, metadata), prompt by prompt.

    Seeds depend on (seed, prompt, index) alone: other prompts, or more images, do not change them.

    Raises:
        UserError: a prompt that `check_prompt` refuses, or that occurs twice.
    """
    jobs, seen = [], set()
    for prompt, metadata in prompts:
        check_prompt(prompt)
        if prompt in seen:
            raise UserError(f"prompt {prompt!r} is given twice; give every prompt once")
        seen.add(prompt)
        folder, number = folder_name(prompt), text_number(prompt)
        for index in range(count):
            noise_seed = derived_seed(seed, Stream.EVALUATION, number, index)
            jobs.append(Job(prompt, metadata, noise_seed, f"images/{folder}/{index:05d}.{image_format}"))
    return jobs


def draw_images(
    pipe: StableDiffusionPipeline,
    embeddings: PromptEmbeddings,
    prompts: Iterable[str],
    noise: list[torch.Generator],
    sampling: Sampling,
) -> torch.Tensor:
    """Draw one image per prompt, each from its own generator: (B, 3, H, W) float32 in [0, 1], without log-probs.

    Uses `pipe.scheduler`: DDIM, or DPM-Solver++, which ignores eta.
    """
    embeds, negative = embeddings(prompts), embeddings.negative  # (B, L, D), (1, L, D)
    settings = {"num_inference_steps": sampling.num_steps, "guidance_scale": sampling.guidance_scale}
    settings |= {"prompt_embeds": embeds, "generator": noise, "output_type": "pt"}
    if isinstance(pipe.scheduler, DDIMScheduler):
        return pipeline_with_logprob(
            pipe, negative_prompt_embeds=negative, eta=sampling.eta, keep_trajectory=False, **settings
        )[0]
    shape = latent_shape(pipe)
    latents = torch.stack([torch.randn(shape, generator=source) for source in noise]).to(embeds)
    return pipe(negative_prompt_embeds=negative.expand_as(embeds), latents=latents, **settings).images


def images_per_pass(pipe: StableDiffusionPipeline, batch_size: int) -> int:
    """Return the number of images per pass: `batch_size` on a GPU, a function of the model alone on a CPU.

    On a CPU, 32 images of 16 x 16 latents (2 of 64 x 64) are as fast as more, so fixing the shape costs nothing and
    makes the bytes equal in all runs. On a GPU more images are faster until memory is full.
    """
    if pipe.device.type != "cpu":
        return batch_size
    _, height, width = latent_shape(pipe)
    return min(max(CPU_PASS * 16 * 16 // (height * width), 1), CPU_PASS)


class Sampler:
    """Draw images from prompts and seeds. Noise comes from CPU generators and is the same on every device.

    A Sampler serves one thread, since schedulers keep track of their step; `twin` makes one for another thread.

    Args:
        pipe: from `load_pipeline`, with all weights loaded. They are shared; its scheduler is not changed.
        scheduler: one of SCHEDULERS; "dpm++" ignores eta.
        num_steps, eta, guidance_scale: as in config/base.py.

    Raises:
        UserError: unknown scheduler, or more steps than the model's schedule has.
    """

    def __init__(
        self, pipe: StableDiffusionPipeline, scheduler: str, num_steps: int, eta: float, guidance_scale: float
    ):
        if scheduler not in SCHEDULERS:
            raise UserError(f"sample.scheduler is {scheduler!r}; allowed are {', '.join(SCHEDULERS)}")
        pipe = _with_own_scheduler(pipe)
        if scheduler == "dpm++":
            pipe.scheduler = DPMSolverMultistepScheduler.from_config(
                pipe.scheduler.config, algorithm_type="dpmsolver++"
            )
        set_schedule(pipe, num_steps)
        self.pipe, self.embeddings = pipe, PromptEmbeddings(pipe)
        self._sampling = Sampling(num_steps, guidance_scale, eta)

    def twin(self) -> "Sampler":
        """Return a Sampler for another thread that shares weights and prompt embeddings."""
        twin = copy.copy(self)
        twin.pipe = _with_own_scheduler(self.pipe)
        return twin

    def __call__(self, prompts: Iterable[str], seeds: Iterable[int]) -> torch.Tensor:
        """Return images (B, 3, H, W), float32 in [0, 1] or NaN."""
        noise = [torch.Generator().manual_seed(seed) for seed in seeds]
        device, dtype = self.pipe.device.type, self.pipe.text_encoder.dtype
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            return draw_images(self.pipe, self.embeddings, prompts, noise, self._sampling).float()


def _with_own_scheduler(pipe: StableDiffusionPipeline) -> StableDiffusionPipeline:
    parts = pipe.components | {"scheduler": copy.deepcopy(pipe.scheduler)}
    own = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    own.set_progress_bar_config(disable=True)
    return own


def draw_passes(
    sampler: Sampler, passes: Sequence[Sequence[Job]], workers: int, *arguments: Any
) -> Iterator[tuple[int, list[Job]]]:
    """Run `draw_pass(sampler, passes[i], *arguments)` for all i; yield i and its result as they complete.

    On a CPU, `workers` threads draw one pass each (set torch's threads to 1 before). On a GPU, one thread draws while
    another encodes and writes. An error of a pass is raised after the passes in progress.
    """
    device, local = sampler.pipe.device, threading.local()
    turn = nullcontext() if device.type == "cpu" else threading.Lock()

    def start() -> None:
        if device.type == "cpu":
            torch.set_num_threads(1)  # a setting of each thread
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
    """Draw a pass of `jobs` padded to `size` images; write files and log entries of those whose path is not in `done`.

    All are drawn, those in `done` too, so that a rerun repeats the same pass. The judge sees images as stored: in 8
    bits, and after JPEG compression where that is the format. Images are logged after their files are written. Only
    drawing happens within `turn`. Returns the jobs with a non-finite image, which are neither written nor logged.
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
        entries = _log_entries(rows, pixels, judge, device, weights_sha256)
        log.add([entries[number] for number in new])
    return [jobs[number] for number in wanted if not finite[number]]


def _log_entries(
    rows: Sequence[Job], pixels: torch.Tensor, judge: Judge | None, device: torch.device, weights_sha256: str
) -> list[dict[str, Any]]:
    """Return log entries for stored pixels, uint8 (B, 3, H, W), of a whole pass.

    labels are those of the judge's attributes; without a judge, all that the prompt states.
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
        judged = zip(entries, rewards, info["predictions"], info["labels"], info["logits"], strict=True)
        for entry, reward, predictions, labels, logits in judged:
            entry |= {"reward": f"{reward:.4f}", "predictions": predictions.tolist(), "labels": labels.tolist()}
            entry["logits"] = [round(float(logit), 6) for logit in logits]
    return entries
