"""Draw samples for every prompt, from the base model or with trained weights on it.

    accelerate launch scripts/eval.py --config config/dgx.py:prompt_image_alignment_classifier_isic_eval_rl

Writes <logdir>/images/<caption with _>/<index>.png, <logdir>/image_log.json and <logdir>/settings.json. The noise of an
image is a function of (seed, prompt, index), and passes through the networks are cut from the list of all images before
they are dealt to processes: files do not depend on the number of processes. To complete an interrupted folder, run the
same command again; finished images are not written again. Processes on several nodes need a logdir they all see.
"""

import logging
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from absl import flags
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from diffusers import StableDiffusionPipeline
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

from ddpo_pytorch.checkpointing import load_weights
from ddpo_pytorch.data.images import read_log
from ddpo_pytorch.data.isic import CAPTIONS, labels_of
from ddpo_pytorch.data.sample_log import PartLog, claim_folder, logged, merge_parts
from ddpo_pytorch.errors import UserError
from ddpo_pytorch.generator.pipeline import load_pipeline
from ddpo_pytorch.generator.sampling import (
    IMAGE_FORMATS,
    Job,
    Sampler,
    check_finite,
    draw_pass,
    fingerprint,
    images_per_pass,
    plan,
)
from ddpo_pytorch.judges.classifier import load_classifier
from ddpo_pytorch.prompts import Prompt, all_prompts, read_prompts
from ddpo_pytorch.rewards import RewardFn, check_prompts, isic_classifier_reward
from ddpo_pytorch.run import DTYPES, cli, make_accelerator, peak_memory_gib

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file("config", "config/base.py", "Sampling for evaluation.")

logger = logging.getLogger(__name__)


def check_settings(config: ConfigDict) -> None:
    """Raise UserError for a value that is out of range."""
    for name, value, least in (
        ("eval.num_samples_per_prompt", config.eval.num_samples_per_prompt, 1),
        ("eval.batch_size", config.eval.batch_size, 1),
        ("sample.num_steps", config.sample.num_steps, 1),
        ("sample.eta", config.sample.eta, 0),
        ("seed", config.seed, 0),
    ):
        if value < least:
            raise UserError(f"{name} is {value}; it must be at least {least}")
    if config.sample.eta > 1:
        raise UserError(f"sample.eta is {config.sample.eta}; a share of noise is at most 1")
    if config.eval.image_format not in IMAGE_FORMATS:
        raise UserError(f"eval.image_format is {config.eval.image_format!r}; allowed are {', '.join(IMAGE_FORMATS)}")


def prompts_of(config: ConfigDict) -> list[Prompt]:
    """(prompt, metadata) of eval.prompts, else all of prompt_fn; a text that is given twice is there twice."""
    texts = [str(text) for text in config.eval.prompts]
    if not texts:
        described = all_prompts(config.prompt_fn, **config.prompt_fn_kwargs)
        if config.prompt_fn != "from_file":
            return described
        texts = read_prompts(**config.prompt_fn_kwargs)
    return [(text, {"label": list(labels_of(text))} if text in CAPTIONS else {}) for text in texts]


def load_judge(path: str, prompts: Sequence[Prompt], device: torch.device) -> RewardFn | None:
    """The classifier at `path` as a reward, or None without one. UserError for prompts that it cannot judge."""
    if not path:
        return None
    model = load_classifier(path, device)
    check_finite(model, path)
    judge = isic_classifier_reward(model, device)
    try:
        check_prompts(judge, prompts)
    except UserError as error:
        raise UserError(f"{error}; eval.classifier judges no other prompt, set --config.eval.classifier=") from error
    return judge


def load_model(config: ConfigDict, device: torch.device) -> StableDiffusionPipeline:
    """The pipeline of the configuration with the weights of `load_from` in it, all of them finite."""
    dtype = DTYPES[config.mixed_precision]
    pipe = load_pipeline(config.pretrained.model, config.pretrained.revision, config.unet_path, dtype, device)
    check_finite(pipe.unet, config.unet_path or config.pretrained.model)
    for part in (pipe.text_encoder, pipe.vae):
        check_finite(part, config.pretrained.model)
    if config.load_from:
        file = load_weights(pipe.unet, config.load_from)
        check_finite(pipe.unet, file)
        logger.info("sampling with %s", file)
    else:
        logger.info("sampling from the base model (load_from is empty)")
    # convolutions are a fifth faster on a CPU
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.vae.to(memory_format=torch.channels_last)
    return pipe


def settings_of(config: ConfigDict, prompts: Sequence[Prompt], weights_sha256: str) -> dict:
    """What determines the images and their log, as opposed to how many there are and who draws them."""
    return {
        "seed": config.seed,
        "scheduler": config.sample.scheduler,
        "num_steps": config.sample.num_steps,
        "eta": config.sample.eta if config.sample.scheduler == "ddim" else None,
        "guidance_scale": config.sample.guidance_scale,
        "mixed_precision": config.mixed_precision,
        "weights_sha256": weights_sha256,
        "prompts": [prompt for prompt, _ in prompts],
        "classifier": config.eval.classifier,
        "image_format": config.eval.image_format,
    }


def claim(
    accelerator: Accelerator, config: ConfigDict, prompts: Sequence[Prompt], pipe: StableDiffusionPipeline
) -> str:
    """Reserve logdir for these settings; returns the fingerprint of the weights, on every process."""
    digest = None
    if accelerator.is_main_process:
        digest = fingerprint(pipe)
        about = {"load_from": config.load_from, "model": config.pretrained.model, "unet_path": config.unet_path}
        about |= {"images_per_pass": images_per_pass(pipe, config.eval.batch_size), "device": accelerator.device.type}
        versions = {name: version(name) for name in ("torch", "diffusers", "transformers", "peft")}
        claim_folder(config.logdir, settings_of(config, prompts, digest), about | {"versions": versions})
    return broadcast_object_list([digest])[0]


def report(folder: Path, jobs: Sequence[Job], broken: Sequence[Job], drawn: int, seconds: float, peak: float) -> None:
    """Merge the log; say what there is, and what is wrong with it. UserError when images were not finite."""
    count = merge_parts(folder, [job.path for job in jobs])
    logger.info(
        "%d images in %s; drawn now: %d, %.2f images/s; peak memory of a process %.2f GiB",
        *(count, folder, drawn, drawn / seconds, peak),
    )
    if black := [entry["path_to_img"] for entry in read_log(folder) if entry.get("black")]:
        logger.warning("%d images are black, the first is %s", len(black), folder / black[0])
    if broken:
        first = min(broken, key=jobs.index)
        raise UserError(
            f"{len(broken)} images are not finite and were not written, the first is {first.path} of {first.prompt!r}; "
            "the others and their log are complete. Run again with another logdir and --config.mixed_precision=bf16 or "
            "no, or with other weights"
        )


def main(_) -> None:
    config = FLAGS.config
    accelerator = make_accelerator(config.mixed_precision, config.allow_tf32)
    rank, processes, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    folder, sample = Path(config.logdir), config.sample
    if device.type == "cpu":
        # sums are split among threads, and last bits with them: files would depend on the cores that a process gets.
        torch.set_num_threads(1)
    check_settings(config)
    prompts = prompts_of(config)
    jobs = plan(prompts, config.eval.num_samples_per_prompt, config.seed, config.eval.image_format)
    judge = load_judge(config.eval.classifier, prompts, device)
    pipe = load_model(config, device)
    sampler = Sampler(pipe, sample.scheduler, sample.num_steps, sample.eta, sample.guidance_scale)
    digest = claim(accelerator, config, prompts, pipe)

    size, done = images_per_pass(pipe, config.eval.batch_size), logged(folder)
    passes = [jobs[start : start + size] for start in range(0, len(jobs), size)]
    missing = [[job for job in one if job.path not in done] for one in passes]
    passes = [one for one, lacking in zip(passes, missing, strict=True) if lacking]
    missing = [len(lacking) for lacking in missing if lacking]
    accelerator.wait_for_everyone()  # everyone has looked before anyone writes
    logger.info("%d images for %d prompts, %d are missing", len(jobs), len(prompts), sum(missing))
    if device.type == "cpu":
        logger.info("%d process(es) of one core each; torchrun --nproc_per_node starts more", processes)

    started, broken = time.perf_counter(), []
    shown = config.progress and not rank
    with (
        PartLog(folder, rank) as log,
        tqdm(total=sum(missing), unit="img", smoothing=0.1, disable=None if shown else True) as bar,
    ):
        for number in range(rank, len(passes), processes):
            broken += draw_pass(sampler, passes[number], size, folder, log, done, judge, digest)
            # the other processes are about as far as this one
            bar.update(sum(missing[number : number + processes]))
    accelerator.wait_for_everyone()
    seconds, broken = time.perf_counter() - started, gather_object(broken)
    peak = max(gather_object([peak_memory_gib()]))
    if accelerator.is_main_process:
        report(folder, jobs, [Job(*job) for job in broken], sum(missing) - len(broken), seconds, peak)
    accelerator.end_training()


if __name__ == "__main__":
    cli(main)
