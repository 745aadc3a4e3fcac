"""Draw samples for every prompt, from the base model or with trained weights on it.

    accelerate launch scripts/eval.py --config config/dgx.py:prompt_image_alignment_classifier_isic_eval_rl

Writes <logdir>/images/<caption with _>/<index>.png, <logdir>/image_log.json and <logdir>/settings.json. The noise of an
image is a function of (seed, prompt number, image number), and batches are cut from the list of all images before they
are dealt to processes: files do not depend on the number of processes. To complete an interrupted folder, run the same
command again; finished images are not drawn again.
"""

import hashlib
import logging
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from absl import flags
from diffusers import StableDiffusionPipeline
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

from ddpo_pytorch.checkpointing import load_weights
from ddpo_pytorch.data.images import save_image, to_uint8
from ddpo_pytorch.data.isic import folder_name
from ddpo_pytorch.data.sample_log import PartLog, claim_folder, logged, merge_parts
from ddpo_pytorch.diffusers_patch.pipeline_with_logprob import pipeline_with_logprob
from ddpo_pytorch.errors import UserError
from ddpo_pytorch.generator.pipeline import PromptTable, load_pipeline, set_schedule
from ddpo_pytorch.prompts import all_prompts
from ddpo_pytorch.randomness import Stream, derived_seed
from ddpo_pytorch.rewards import RewardFn, isic_classifier_reward
from ddpo_pytorch.run import DTYPES, cli, make_accelerator

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file("config", "config/base.py", "Sampling for evaluation.")

logger = logging.getLogger(__name__)


class Job(NamedTuple):
    """One image to draw: its prompt, the prompt's metadata, its file relative to logdir, and the seed of its noise."""

    prompt: str
    metadata: dict
    path: str
    seed: int


def plan(config: ConfigDict) -> list[Job]:
    """Every image of the evaluation, prompt by prompt."""
    count = config.eval.num_samples_per_prompt
    jobs = []
    for number, (prompt, metadata) in enumerate(all_prompts(config.prompt_fn, **config.prompt_fn_kwargs)):
        folder = folder_name(prompt)
        if "/" in folder or folder.startswith(".") or len(folder.encode()) > 255:
            raise UserError(f"prompt {prompt!r} cannot name a folder; use at most 255 bytes, no '/' and no leading '.'")
        for index in range(count):
            path = f"images/{folder}/{index:05d}.png"
            jobs.append(Job(prompt, metadata, path, derived_seed(config.seed, Stream.EVALUATION, number, index)))
    return jobs


def check_numbers(config: ConfigDict) -> None:
    """Raise UserError for a number that is out of range."""
    for name, value, least in (
        ("eval.num_samples_per_prompt", config.eval.num_samples_per_prompt, 1),
        ("eval.batch_size", config.eval.batch_size, 1),
        ("sample.num_steps", config.sample.num_steps, 1),
        ("sample.eta", config.sample.eta, 0),
        ("seed", config.seed, 0),
    ):
        if value < least:
            raise UserError(f"{name} is {value}; it must be at least {least}")


def load_model(config: ConfigDict, device: torch.device) -> StableDiffusionPipeline:
    """The pipeline of the configuration with the weights of `load_from` in it."""
    dtype = DTYPES[config.mixed_precision]
    pipe = load_pipeline(config.pretrained.model, config.pretrained.revision, config.unet_path, dtype, device)
    if config.load_from:
        logger.info("sampling with %s", load_weights(pipe.unet, config.load_from))
    else:
        logger.info("sampling from the base model (load_from is empty)")
    pipe.set_progress_bar_config(disable=True)
    set_schedule(pipe, config.sample.num_steps)
    return pipe


def fingerprint(pipe: StableDiffusionPipeline) -> str:
    """SHA-256 over all weights: tells a retrained model from the one that began a folder, wherever its files lie."""
    digest = hashlib.sha256()
    for part in (pipe.text_encoder, pipe.unet, pipe.vae):
        for name, value in part.state_dict().items():
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def settings_of(config: ConfigDict, pipe: StableDiffusionPipeline) -> dict:
    """What determines the images and their log, as opposed to how many there are and who draws them."""
    return {
        "seed": config.seed,
        "num_steps": config.sample.num_steps,
        "eta": config.sample.eta,
        "guidance_scale": config.sample.guidance_scale,
        "mixed_precision": config.mixed_precision,
        "weights_sha256": fingerprint(pipe),
        "prompts": [prompt for prompt, _ in all_prompts(config.prompt_fn, **config.prompt_fn_kwargs)],
        "classifier": config.eval.classifier,
    }


def draw(pipe: StableDiffusionPipeline, table: PromptTable, batch: list[Job], sample: ConfigDict) -> torch.Tensor:
    """Images (B, 3, H, W) in [0, 1], each from its own generator: first the initial latents, then a draw a step."""
    generators = [torch.Generator().manual_seed(job.seed) for job in batch]
    embeds = table(job.prompt for job in batch)
    with torch.autocast(embeds.device.type, embeds.dtype, enabled=embeds.dtype != torch.float32):
        images, *_ = pipeline_with_logprob(
            pipe,
            prompt_embeds=embeds,
            negative_prompt_embeds=table.negative,
            num_inference_steps=sample.num_steps,
            guidance_scale=sample.guidance_scale,
            eta=sample.eta,
            generator=generators,
            keep_trajectory=False,
        )
    if not images.isfinite().all():
        raise UserError(f"{batch[0].prompt!r}: an image is not finite; set --config.mixed_precision=bf16 or no")
    return images


def describe(batch: list[Job], images: torch.Tensor, judge: RewardFn | None) -> list[dict]:
    """Log entries. The judge sees the images as they are stored, in 8 bits."""
    entries = [
        {"prompt": job.prompt, "reward": None, "path_to_img": job.path, "predictions": None, "seed": job.seed}
        | {"labels": job.metadata.get("label")}
        for job in batch
    ]
    if judge is not None:
        stored = to_uint8(images).float() / 255
        rewards, info = judge(stored, [job.prompt for job in batch], [job.metadata for job in batch])
        for entry, reward, predictions in zip(entries, rewards, info["predictions"], strict=True):
            entry |= {"reward": f"{reward:.4f}", "predictions": predictions.tolist()}
    return entries


def main(_) -> None:
    config = FLAGS.config
    accelerator = make_accelerator(config.mixed_precision, config.allow_tf32)
    rank, device, folder = accelerator.process_index, accelerator.device, Path(config.logdir)
    if device.type == "cpu":
        # sums are split among threads, and last bits with them: files would depend on the cores that a process gets.
        torch.set_num_threads(1)
    check_numbers(config)
    jobs = plan(config)
    judge = isic_classifier_reward(config.eval.classifier, device) if config.eval.classifier else None
    pipe = load_model(config, device)
    if accelerator.is_main_process:
        about = {"load_from": config.load_from, "model": config.pretrained.model, "unet_path": config.unet_path}
        versions = {name: version(name) for name in ("torch", "diffusers", "transformers", "peft")}
        claim_folder(folder, settings_of(config, pipe), about | {"versions": versions})
    accelerator.wait_for_everyone()

    size, done = config.eval.batch_size, logged(folder)
    batches = [jobs[start : start + size] for start in range(0, len(jobs), size)]
    open_batches = [batch for batch in batches if any(job.path not in done for job in batch)]
    accelerator.wait_for_everyone()  # everyone has looked before anyone writes
    logger.info("%d images for %d prompts, %d are there already", len(jobs), len({j.prompt for j in jobs}), len(done))
    if device.type == "cpu":
        logger.info("%d process(es) of one core each; torchrun --nproc_per_node starts more", accelerator.num_processes)

    table = PromptTable(pipe)
    bar = tqdm(open_batches[rank :: accelerator.num_processes], disable=None if config.progress and not rank else True)
    with PartLog(folder, rank) as log:
        for batch in bar:
            images = draw(pipe, table, batch, config.sample).cpu()
            for job, image, entry in zip(batch, images, describe(batch, images, judge), strict=True):
                if job.path not in done:
                    save_image(folder / job.path, image)
                    log.add([entry])
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        count = merge_parts(folder, [job.path for job in jobs])
        logger.info("%d images in %s", count, folder)
    accelerator.end_training()


if __name__ == "__main__":
    cli(main)
