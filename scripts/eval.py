"""Draw samples for every prompt, from the base model or with trained weights.

    accelerate launch scripts/eval.py --config config/dgx.py:prompt_image_alignment_classifier_isic_eval_rl

Writes <logdir>/images/<caption with _>/<index>.png, <logdir>/image_log.json and <logdir>/settings.json. Noise is a
function of (seed, prompt, index), and batches are formed from the list of all images before they are distributed to
processes and cores, so files do not depend on the number of either. Rerun the command to complete an interrupted
folder, or to add images or prompts: missing and damaged images are drawn. Several nodes need a shared logdir.
"""

import logging
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import StableDiffusionPipeline
from ml_collections import ConfigDict
from tqdm import tqdm

from ddpo_pytorch.data import sample_folder
from ddpo_pytorch.data.datasets import KINDS
from ddpo_pytorch.generator.lora import adapter_fingerprint, scale_lora
from ddpo_pytorch.generator.pipeline import load_pipeline
from ddpo_pytorch.generator.text import check_tokens
from ddpo_pytorch.judges.classifier import load_classifier
from ddpo_pytorch.prompts import Prompt, all_prompts, describe, given_prompts
from ddpo_pytorch.rewards import check_prompts, isic_classifier_reward
from ddpo_pytorch.sampling import IMAGE_FORMATS, SAMPLING, Job, Sampler, draw_passes, images_per_pass, plan
from ddpo_pytorch.training.checkpoints import load_weights
from ddpo_pytorch.utils.cli import cli, define_config, expand_config
from ddpo_pytorch.utils.distributed import DTYPES, locked_by_main, make_accelerator, run_on_main_process
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.fingerprint import fingerprint, pipeline_fingerprints
from ddpo_pytorch.utils.settings import NOT_NEGATIVE, ONE_OR_MORE, UP_TO_A_MILLION, check_choices, check_ranges

FLAGS = define_config(__file__, "experiment, e.g. config/dgx.py:prompt_image_alignment_classifier_isic_eval_rl")
logger = logging.getLogger(__name__)
RANGES = SAMPLING | {"eval.num_samples_per_prompt": UP_TO_A_MILLION, "eval.batch_size": ONE_OR_MORE}
RANGES |= {"eval.lora_scale": NOT_NEGATIVE}


def claim(config: ConfigDict, prompts: Sequence[Prompt], pipe: StableDiffusionPipeline, judge_sha256: str) -> str:
    """Claim logdir for everything that an image and its log entry depend on; return the fingerprint of the model."""
    sample, on_gpu = config.sample, pipe.device.type != "cpu"
    model = pipeline_fingerprints(pipe) | {"load_from": adapter_fingerprint(pipe.unet)}
    settings = model | {name: sample[name] for name in ("scheduler", "num_steps", "guidance_scale")}
    settings |= {"seed": config.seed, "eta": sample.eta if sample.scheduler == "ddim" else None}
    settings |= {"mixed_precision": config.mixed_precision, "weights_sha256": fingerprint(model)}
    settings |= {"classifier": judge_sha256, "image_format": config.eval.image_format, "device": pipe.device.type}
    # on a CPU the size of a pass follows from the model
    settings["images_per_pass"] = images_per_pass(pipe, config.eval.batch_size) if on_gpu else None
    settings["allow_tf32"] = config.allow_tf32 if on_gpu else None
    metadata = {"load_from": config.load_from, "model": config.pretrained.model, "unet_path": config.unet_path}
    metadata |= {"lora_scale": config.eval.lora_scale, "classifier": config.eval.classifier}
    metadata["prompts"] = [prompt for prompt, _ in prompts]
    metadata["versions"] = {name: version(name) for name in ("torch", "diffusers", "transformers", "peft")}
    sample_folder.claim_folder(config.logdir, settings, metadata)
    return settings["weights_sha256"]


def check_shared(folder: Path, seen: Sequence[bool]) -> None:
    """Raise UserError unless every process sees the folder."""
    if not all(seen):
        raise UserError(f"process {seen.index(False)} does not see {str(folder)!r}: several nodes need a shared logdir")


def draw(
    accelerator: Accelerator, config: ConfigDict, sampler: Sampler, jobs: Sequence[Job], workers: int, *judging: Any
) -> list[Job]:
    """Draw the missing images on all processes; return the jobs whose image is not finite."""
    rank, processes, folder = accelerator.process_index, accelerator.num_processes, Path(config.logdir)
    run_on_main_process(accelerator, check_shared, folder, gather_object([(folder / sample_folder.SETTINGS).is_file()]))
    entries = sample_folder.read_entries(folder)
    logged = [job.path for job in jobs if job.path in entries]
    if damaged := sorted(gather_object(sample_folder.damaged_images(folder, logged[rank::processes]))):
        logger.warning("%d images are damaged and will be redrawn, the first is %s", len(damaged), folder / damaged[0])
    done, size = set(logged).difference(damaged), images_per_pass(sampler.pipe, config.eval.batch_size)
    passes = [jobs[start : start + size] for start in range(0, len(jobs), size)]
    passes = [batch for batch in passes if any(job.path not in done for job in batch)]
    missing = [sum(job.path not in done for job in batch) for batch in passes]
    accelerator.wait_for_everyone()  # all processes have read the folder before one writes
    logger.info("%d images for %d prompts, %d missing", len(jobs), len({job.prompt for job in jobs}), sum(missing))

    started, broken, log = time.perf_counter(), [], sample_folder.part_log(folder, rank)
    shown = config.progress and rank == 0
    with tqdm(total=sum(missing), unit="img", smoothing=0.1, disable=None if shown else True) as bar:
        own = passes[rank::processes]
        for number, failed in draw_passes(sampler, own, workers, size, folder, log, done, *judging):
            broken += failed
            bar.update(sum(missing[number * processes : (number + 1) * processes]))  # other processes are about as far
    accelerator.wait_for_everyone()
    seconds, broken = time.perf_counter() - started, gather_object(broken)
    drawn = sum(missing) - len(broken)
    logger.info("%d images drawn, %.2f images/s", drawn, drawn / seconds)
    return broken


def report(folder: Path, jobs: Sequence[Job], broken: Sequence[Job]) -> None:
    """Merge the logs and report the folder's state. Raises UserError if images are missing."""
    planned = [job.path for job in jobs]
    entries = {entry["path_to_img"]: entry for entry in sample_folder.merge_parts(folder, planned)}
    files = (path for path in folder.glob("images/*/[!.]*") if path.suffix.lower() in sample_folder.IMAGE_SUFFIXES)
    unlogged = sorted({str(path.relative_to(folder)) for path in files} - entries.keys())
    logger.info("%d images in %s", len(entries), folder)
    for problem, paths in (
        ("images are black", [path for path, entry in entries.items() if entry.get("black")]),
        ("images were not requested by this command", sorted(entries.keys() - planned)),
        ("files are not in image_log.json, but metric.py would count them", unlogged),
    ):
        if paths:
            logger.warning("%d %s, the first is %s", len(paths), problem, folder / paths[0])
    if broken:
        first = min(broken, key=jobs.index)
        problem = f"{len(broken)} images are not finite and were not written, the first is {first.path}"
        advice = "the others are complete. Run again with another logdir and other weights, or in bf16"
        raise UserError(f"{problem} of {first.prompt!r}; {advice}")
    if missing := [path for path in planned if path not in entries]:
        problem = f"{len(missing)} of {len(jobs)} images are not in {str(folder)!r}"
        raise UserError(f"{problem}, the first is {missing[0]}; run the same command again")


def main(_) -> None:
    config = expand_config(FLAGS.config, "logdir", "pretrained.model")
    accelerator = make_accelerator(config.mixed_precision, config.allow_tf32, process_timeout=config.process_timeout)
    device, sample, workers = accelerator.device, config.sample, torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)  # sums split among threads would change the last bits: each core draws its own passes
    check_ranges(config, RANGES)
    check_choices(config, {"eval.image_format": IMAGE_FORMATS, "dataset.kind": KINDS})
    prompts = [describe(prompt) for prompt in given_prompts(config.eval.prompts, config.dataset.kind)]
    prompts = prompts or all_prompts(config.prompt_fn, **config.prompt_fn_kwargs)
    jobs = plan(prompts, config.eval.num_samples_per_prompt, config.seed, config.eval.image_format)
    judge, judge_sha256 = None, ""
    if config.eval.classifier:
        classifier = load_classifier(config.eval.classifier, device)
        judge = isic_classifier_reward(classifier, device)
        judge_sha256 = fingerprint(classifier, classifier.labels, classifier.arch, classifier.image_size)
        try:
            check_prompts(judge, prompts, device)
        except UserError as error:
            raise UserError(f"{error}; eval.classifier cannot judge it, set --config.eval.classifier=") from error
    pretrained, dtype = config.pretrained, DTYPES[config.mixed_precision]
    pipe = load_pipeline(pretrained.model, pretrained.revision, config.unet_path, dtype, device)
    weights = load_weights(pipe.unet, config.load_from) if config.load_from else "the base model (load_from is empty)"
    scale_lora(pipe.unet, config.eval.lora_scale)
    logger.info("sampling with %s", weights)
    for part in (pipe.unet, pipe.vae):
        part.to(memory_format=torch.channels_last)  # convolutions are a fifth faster on a CPU
    sampler = Sampler(pipe, sample.scheduler, sample.num_steps, sample.eta, sample.guidance_scale)
    check_tokens(pipe.tokenizer, [prompt for prompt, _ in prompts])
    with locked_by_main(accelerator, config.logdir):
        weights_sha256 = run_on_main_process(accelerator, claim, config, prompts, pipe, judge_sha256)
        broken = draw(accelerator, config, sampler, jobs, workers, judge, weights_sha256)
        run_on_main_process(accelerator, report, Path(config.logdir), jobs, broken)
    accelerator.end_training()


if __name__ == "__main__":
    cli(main)
