"""Draw samples for every prompt, from the base model or with trained weights on it.

    accelerate launch scripts/eval.py --config config/dgx.py:prompt_image_alignment_classifier_isic_eval_rl

Writes <logdir>/images/<caption with _>/<index>.png, <logdir>/image_log.json and <logdir>/settings.json. The noise of an
image is a function of (seed, prompt, index), and passes through the networks are cut from the list of all images before
they are dealt to processes and their cores: files do not depend on the number of either. To complete an interrupted
folder, or to add images or prompts, run the command again: missing and damaged images are drawn. Processes on several
nodes need a logdir they all see.
"""

import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from absl import flags
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import StableDiffusionPipeline
from ml_collections import ConfigDict
from tqdm import tqdm

from ddpo_pytorch.data.images import is_whole
from ddpo_pytorch.data.isic import CAPTIONS, labels_of
from ddpo_pytorch.data.sample_folder import SETTINGS, PartLog, claim_folder, logged, merge_parts, read_log, strays
from ddpo_pytorch.generator.lora import adapter_fingerprint
from ddpo_pytorch.generator.pipeline import load_pipeline
from ddpo_pytorch.generator.text import check_tokens
from ddpo_pytorch.judges.classifier import load_classifier
from ddpo_pytorch.prompts import Prompt, all_prompts, given_prompts, read_prompts
from ddpo_pytorch.rewards import RewardFn, check_prompts, isic_classifier_reward
from ddpo_pytorch.sampling import (
    IMAGE_FORMATS,
    SAMPLING,
    Job,
    Sampler,
    draw_passes,
    images_per_pass,
    plan,
)
from ddpo_pytorch.training.checkpoints import load_weights
from ddpo_pytorch.utils.cli import cli, define_config, expand_config
from ddpo_pytorch.utils.distributed import DTYPES, make_accelerator, peak_memory_gib, run_on_main_process
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.files import locked
from ddpo_pytorch.utils.fingerprint import fingerprint, pipeline_fingerprints
from ddpo_pytorch.utils.settings import ONE_OR_MORE, check_choices, check_ranges

FLAGS = flags.FLAGS
define_config(__file__, "Sampling for evaluation.")

logger = logging.getLogger(__name__)


def check_settings(config: ConfigDict) -> None:
    """Raise UserError for a value that is out of range."""
    check_ranges(config, SAMPLING | {"eval.num_samples_per_prompt": ONE_OR_MORE, "eval.batch_size": ONE_OR_MORE})
    check_choices(config, {"eval.image_format": IMAGE_FORMATS})


def prompts_of(config: ConfigDict) -> list[Prompt]:
    """(prompt, metadata) of eval.prompts, else all of prompt_fn; a text that is given twice is there twice."""
    texts = given_prompts(config.eval.prompts)
    if not texts:
        described = all_prompts(config.prompt_fn, **config.prompt_fn_kwargs)
        if config.prompt_fn != "from_file":
            return described
        texts = read_prompts(**config.prompt_fn_kwargs)
    return [(text, {"label": list(labels_of(text))} if text in CAPTIONS else {}) for text in texts]


def load_judge(path: str, prompts: Sequence[Prompt], device: torch.device) -> tuple[RewardFn | None, str]:
    """The classifier at `path` as a reward, and its hash; (None, "") without one. UserError for other prompts."""
    if not path:
        return None, ""
    model = load_classifier(path, device)
    judge = isic_classifier_reward(model, device)
    try:
        check_prompts(judge, prompts)
    except UserError as error:
        raise UserError(f"{error}; eval.classifier judges no other prompt, set --config.eval.classifier=") from error
    return judge, fingerprint(model, model.labels, model.arch, model.image_size)


def load_model(config: ConfigDict, device: torch.device) -> StableDiffusionPipeline:
    """Load the pipeline of the configuration with the weights of `load_from` in it."""
    dtype = DTYPES[config.mixed_precision]
    pipe = load_pipeline(config.pretrained.model, config.pretrained.revision, config.unet_path, dtype, device)
    if config.load_from:
        file = load_weights(pipe.unet, config.load_from)
        logger.info("sampling with %s", file)
    else:
        logger.info("sampling from the base model (load_from is empty)")
    # convolutions are a fifth faster on a CPU
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.vae.to(memory_format=torch.channels_last)
    return pipe


def settings_of(config: ConfigDict, device: str, model: dict[str, str], judge_sha256: str, size: int) -> dict:
    """Return what determines an image and its log entry, as opposed to how many there are and who draws them.

    `model` holds the fingerprints of the pipeline's parts and of the adapter on it.
    """
    on_cpu = device == "cpu"
    return model | {
        "seed": config.seed,
        "scheduler": config.sample.scheduler,
        "num_steps": config.sample.num_steps,
        "eta": config.sample.eta if config.sample.scheduler == "ddim" else None,
        "guidance_scale": config.sample.guidance_scale,
        "mixed_precision": config.mixed_precision,
        "weights_sha256": fingerprint(model),
        "classifier": judge_sha256,
        "image_format": config.eval.image_format,
        "device": device,
        "images_per_pass": None if on_cpu else size,  # there it follows from the model
        "allow_tf32": None if on_cpu else config.allow_tf32,
    }


def claim(held: ExitStack, config: ConfigDict, prompts: Sequence[Prompt], pipe: StableDiffusionPipeline, judge: str):
    """Lock logdir and reserve it for these settings; return the fingerprint of the model."""
    size = images_per_pass(pipe, config.eval.batch_size)
    model = pipeline_fingerprints(pipe) | {"load_from": adapter_fingerprint(pipe.unet)}
    settings = settings_of(config, pipe.device.type, model, judge, size)
    about = {"load_from": config.load_from, "model": config.pretrained.model, "unet_path": config.unet_path}
    about |= {"classifier": config.eval.classifier, "prompts": [prompt for prompt, _ in prompts]}
    about |= {"versions": {name: version(name) for name in ("torch", "diffusers", "transformers", "peft")}}
    held.enter_context(locked(config.logdir))
    claim_folder(config.logdir, settings, about)
    return settings["weights_sha256"]


def check_common(folder: Path, seen: Sequence[bool]) -> None:
    """`seen` says of every process whether it sees what the main process has written."""
    if not all(seen):
        raise UserError(f"process {seen.index(False)} does not see {str(folder)!r}: several nodes need a common logdir")


def report(folder: Path, jobs: Sequence[Job], broken: Sequence[Job], drawn: str, mixed_precision: str) -> None:
    """Merge the log; say what there is, and what is wrong with it. UserError when images are not there."""
    planned = [job.path for job in jobs]
    count = merge_parts(folder, planned)
    logger.info("%d images in %s; %s", count, folder, drawn)
    entries = read_log(folder)
    listed = {entry["path_to_img"] for entry in entries}
    for what, paths in (
        ("images are black", [entry["path_to_img"] for entry in entries if entry.get("black")]),
        ("images are more than this command asks for", sorted(listed.difference(planned))),
        ("files are not in image_log.json, but metric.py would count them", strays(folder, listed)),
    ):
        if paths:
            logger.warning("%d %s, the first is %s", len(paths), what, folder / paths[0])
    if broken:
        first = min(broken, key=jobs.index)
        other = "" if mixed_precision == "no" else "--config.mixed_precision=bf16 or no, or with "
        raise UserError(
            f"{len(broken)} images are not finite and were not written, the first is {first.path} of {first.prompt!r}; "
            f"the others and their log are complete. Run again with another logdir and {other}other weights"
        )
    if missing := [path for path in planned if path not in listed]:
        raise UserError(
            f"{len(missing)} of {len(planned)} images are not in {str(folder)!r}, the first is {missing[0]}; run the "
            "same command again"
        )


def draw(
    accelerator: Accelerator, config: ConfigDict, sampler: Sampler, jobs: Sequence[Job], workers: int, *judging: Any
) -> tuple[list[Job], str]:
    """Draw what is missing, on all processes; returns the jobs whose image is not finite, and a text of figures."""
    rank, processes, folder = accelerator.process_index, accelerator.num_processes, Path(config.logdir)
    size, done = images_per_pass(sampler.pipe, config.eval.batch_size), logged(folder)
    there = [job.path for job in jobs if job.path in done]
    damaged = sorted(gather_object([path for path in there[rank::processes] if not is_whole(folder / path)]))
    for path in damaged:
        del done[path]
    if damaged:
        logger.warning("%d images are damaged and are drawn again, the first is %s", len(damaged), folder / damaged[0])
    passes = [jobs[start : start + size] for start in range(0, len(jobs), size)]
    missing = [[job for job in one if job.path not in done] for one in passes]
    passes = [one for one, lacking in zip(passes, missing, strict=True) if lacking]
    missing = [len(lacking) for lacking in missing if lacking]
    accelerator.wait_for_everyone()  # everyone has looked before anyone writes
    prompts = len({job.prompt for job in jobs})
    logger.info("%d images for %d prompts, %d are missing", len(jobs), prompts, sum(missing))
    if accelerator.device.type == "cpu":
        logger.info("%d process(es) of %d core(s)", processes, workers)

    started, broken = time.perf_counter(), []
    shown = config.progress and not rank
    with (
        PartLog(folder, rank) as log,
        tqdm(total=sum(missing), unit="img", smoothing=0.1, disable=None if shown else True) as bar,
    ):
        own = passes[rank::processes]
        for number, failed in draw_passes(sampler, own, workers, size, folder, log, done, *judging):
            broken += failed
            # the other processes are about as far as this one
            bar.update(sum(missing[number * processes : (number + 1) * processes]))
    accelerator.wait_for_everyone()
    seconds, broken = time.perf_counter() - started, [Job(*job) for job in gather_object(broken)]
    drawn, peak = sum(missing) - len(broken), max(gather_object([peak_memory_gib()]))
    speed = f"drawn now: {drawn}, {drawn / seconds:.2f} images/s; peak memory of a process {peak:.2f} GiB"
    return broken, speed


def main(_) -> None:
    config = expand_config(FLAGS.config, "logdir", "pretrained.model")
    accelerator = make_accelerator(config.mixed_precision, config.allow_tf32, process_timeout=config.process_timeout)
    device, folder, sample = accelerator.device, Path(config.logdir), config.sample
    workers = torch.get_num_threads()
    if device.type == "cpu":
        # sums are split among threads, and last bits with them: each core draws passes of its own.
        torch.set_num_threads(1)
    check_settings(config)
    prompts = prompts_of(config)
    jobs = plan(prompts, config.eval.num_samples_per_prompt, config.seed, config.eval.image_format)
    judge, judge_digest = load_judge(config.eval.classifier, prompts, device)
    pipe = load_model(config, device)
    sampler = Sampler(pipe, sample.scheduler, sample.num_steps, sample.eta, sample.guidance_scale)
    check_tokens(pipe.tokenizer, [prompt for prompt, _ in prompts])
    with ExitStack() as held:
        digest = run_on_main_process(accelerator, claim, held, config, prompts, pipe, judge_digest)
        run_on_main_process(accelerator, check_common, folder, gather_object([(folder / SETTINGS).is_file()]))
        broken, drawn = draw(accelerator, config, sampler, jobs, workers, judge, digest)
        run_on_main_process(accelerator, report, folder, jobs, broken, drawn, config.mixed_precision)
    accelerator.end_training()


if __name__ == "__main__":
    cli(main)
