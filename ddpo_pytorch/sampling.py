"""Sampling without log-probs, for evaluation: an image is a function of (seed, prompt, index) alone.

The last bits of an image depend on the batch size, which selects kernels. `draw_passes` therefore uses passes of one
shape, the last one padded; on a CPU each runs on one thread, since the number of threads matters as well.
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

from ddpo_pytorch.data.images import SYNTHETIC, load_pixels, save_image, to_uint8
from ddpo_pytorch.data.sample_folder import folder_name
from ddpo_pytorch.diffusers_patch.pipeline_with_logprob import Sampling, pipeline_with_logprob
from ddpo_pytorch.generator.pipeline import PromptEmbeddings, decode_latents, finite_images, latent_shape, set_schedule
from ddpo_pytorch.prompts import check_prompt
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.files import JsonLines
from ddpo_pytorch.utils.randomness import Stream, derived_seed, text_number
from ddpo_pytorch.utils.settings import FINITE, ONE_OR_MORE, SEED, SHARE, check_choices

SCHEDULERS = ("ddim", "dpm++")
# ranges of the sampling settings; training is stricter about sample.eta (`check_schedule`)
SAMPLING = {"seed": SEED, "sample.num_steps": ONE_OR_MORE, "sample.eta": SHARE, "sample.guidance_scale": FINITE}
IMAGE_FORMATS = ("png", "jpg")
BLACK = 2  # an image with all 8-bit levels below this is black
CPU_PASS = 32  # images per pass on a CPU for 16 x 16 latents, fewer for larger ones
# maps images, prompts and metadata to rewards (N,) and {"predictions", "labels", "logits"}, each (N, H)
Judge = Callable[[torch.Tensor, Sequence[str], Sequence[Mapping[str, Any]]], tuple[Sequence[float], dict[str, Any]]]


class Job(NamedTuple):
    """An image to draw: its prompt, the prompt's metadata, the seed of its noise, and its path in the folder."""

    prompt: str
    metadata: dict[str, Any]
    seed: int
    path: str = ""


def plan(prompts: Sequence[tuple[str, dict[str, Any]]], count: int, seed: int, image_format: str = "png") -> list[Job]:
    """Return `count` jobs per (prompt, metadata), seeded by (seed, prompt, index); prompts must differ (UserError)."""
    jobs, seen = [], set()
    for prompt, metadata in prompts:
        check_prompt(prompt)
        if prompt in seen:
            raise UserError(f"prompt {prompt!r} is given twice; give each prompt once")
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
    """Draw one image per prompt by `pipe.scheduler`, each from its own generator: (B, 3, H, W) float32 in [0, 1]."""
    embeds, negative = embeddings(prompts), embeddings.negative  # (B, L, D), (1, L, D)
    settings = {"num_inference_steps": sampling.num_steps, "guidance_scale": sampling.guidance_scale}
    settings |= {"prompt_embeds": embeds, "generator": noise, "output_type": "latent"}
    if isinstance(pipe.scheduler, DDIMScheduler):
        settings |= {"negative_prompt_embeds": negative, "eta": sampling.eta, "keep_trajectory": False}
        latents = pipeline_with_logprob(pipe, **settings)[0]
    else:  # DPM-Solver++, which ignores eta
        shape = latent_shape(pipe)
        start = torch.stack([torch.randn(shape, generator=source) for source in noise]).to(embeds)
        latents = pipe(negative_prompt_embeds=negative.expand_as(embeds), latents=start, **settings).images
    return finite_images(pipe.vae, decode_latents(pipe.vae, latents), latents)


def images_per_pass(pipe: StableDiffusionPipeline, batch_size: int) -> int:
    """Return the images per pass: `batch_size` on a GPU; on a CPU a function of the model, since more are no faster."""
    if pipe.device.type != "cpu":
        return batch_size
    _, height, width = latent_shape(pipe)
    return min(max(CPU_PASS * 16 * 16 // (height * width), 1), CPU_PASS)


class Sampler:
    """Draw images from prompts and seeds. Noise comes from CPU generators and is the same on every device.

    Use a Sampler in one thread only, since schedulers keep track of their step; `twin` makes one for another thread.
    It shares the weights of `pipe` but not its scheduler; settings are those of `config.sample`, and "dpm++" ignores
    eta. Raises UserError for an unknown scheduler, or more steps than the model's schedule has.
    """

    def __init__(
        self, pipe: StableDiffusionPipeline, scheduler: str, num_steps: int, eta: float, guidance_scale: float
    ):
        check_choices({"scheduler": scheduler}, {"scheduler": SCHEDULERS}, "sample.")
        pipe = _with_own_scheduler(pipe)
        if scheduler == "dpm++":
            config = pipe.scheduler.config
            pipe.scheduler = DPMSolverMultistepScheduler.from_config(config, algorithm_type="dpmsolver++")
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
    another encodes and writes. If a pass fails, its error is raised once the passes in progress are done.
    """
    device, local = sampler.pipe.device, threading.local()
    turn = nullcontext() if device.type == "cpu" else threading.Lock()

    def start() -> None:
        if device.type == "cpu":
            torch.set_num_threads(1)  # a per-thread setting
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
    log: JsonLines,
    done: Collection[str] = (),
    judge: Judge | None = None,
    weights_sha256: str = "",
    turn: AbstractContextManager = nullcontext(),  # noqa: B008 (it has no state)
) -> list[Job]:
    """Draw and judge a pass of `jobs`, padded to `size` images; write, then log, those whose path is not in `done`.

    A rerun thus repeats the same pass. The judge sees images as stored: in 8 bits, and after JPEG compression if that
    is the format. `turn` is held while drawing. Returns the jobs with non-finite images, neither written nor logged.
    """
    rows = [*jobs, *[jobs[-1]] * (size - len(jobs))]
    with turn:
        images = sampler([job.prompt for job in rows], [job.seed for job in rows])
        finite = images.flatten(1).isfinite().all(dim=1).tolist()
        device, pixels = images.device, to_uint8(images.nan_to_num()).cpu()
        del images
    wanted = [number for number, job in enumerate(jobs) if job.path not in done]
    new, entries = [number for number in wanted if finite[number]], []
    for number in new:
        job, path = jobs[number], folder / jobs[number].path
        save_image(path, pixels[number], SYNTHETIC)
        if path.suffix != ".png":
            pixels[number] = load_pixels(path)
        entry = {"prompt": job.prompt, "reward": None, "path_to_img": job.path, "predictions": None}
        entry |= {"labels": job.metadata.get("label"), "logits": None, "seed": job.seed}
        entries.append(entry | {"black": bool(pixels[number].amax() < BLACK), "weights_sha256": weights_sha256})
    if new and judge:
        prompts, metadata = [job.prompt for job in rows], [job.metadata for job in rows]
        rewards, info = judge(pixels.to(device).float() / 255, prompts, metadata)
        for entry, row in zip(entries, new, strict=True):  # labels: of the judge's attributes alone
            entry |= {name: info[name][row].tolist() for name in ("predictions", "labels")}
            entry["reward"], entry["logits"] = f"{rewards[row]:.4f}", [round(float(x), 6) for x in info["logits"][row]]
    log.write(*entries)
    return [jobs[number] for number in wanted if not finite[number]]
