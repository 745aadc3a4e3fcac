"""Draw best-of-N images: draw several for each prompt, keep those that pass the Selector, rank them by the Policy.

    accelerate launch scripts/generate.py --config config/fundus.py:generate --config.logdir=DIR

For each prompt (eval.prompts, else all of prompt_fn), images are drawn until `improve.num_candidates` pass or
`improve.max_attempts` are drawn; this is repeated `improve.images_per_prompt` times. Writes to logdir:
- images/<caption with _>/Fundus_<number>_selector_<score>_policy_<score>.png
- metadata.csv, a table of the images that passed, for train_sd.py, metric.py and Hugging Face's imagefolder
- image_log.json: prompts, scores, seeds and the hash of the weights. `best` marks the image with the highest Policy
  score; if none passed, the last one is kept, with `passed` false.
A complete folder is left as it is; an incomplete one is drawn again from the start.

--prompt="The left eye fundus image shows drusen." --n=4 draws only this prompt, into a subfolder of logdir, and prints
the paths of the n best images.
"""

import logging
import shutil
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from absl import flags
from accelerate import Accelerator
from accelerate.utils import gather_object
from ml_collections import ConfigDict
from tqdm.auto import tqdm

from ddpo_pytorch.data.fundus import MODALITY, modality_of
from ddpo_pytorch.data.images import SYNTHETIC, save_image, to_uint8
from ddpo_pytorch.data.metadata import METADATA
from ddpo_pytorch.data.sample_folder import LOG, claim_folder, damaged_images, folder_name, read_log, write_log
from ddpo_pytorch.data.tables import write_table
from ddpo_pytorch.generator.lora import adapter_fingerprint
from ddpo_pytorch.generator.pipeline import load_pipeline
from ddpo_pytorch.generator.text import check_tokens
from ddpo_pytorch.judges.policy import POLICY_FILE, SELECTOR_FILE, Policy, load_judges
from ddpo_pytorch.judges.selector import Selector
from ddpo_pytorch.prompts import all_prompts, given_prompts
from ddpo_pytorch.sampling import SAMPLING, Sampler, plan
from ddpo_pytorch.training.checkpoints import load_weights
from ddpo_pytorch.utils.cli import cli, define_config, expand_config
from ddpo_pytorch.utils.distributed import DTYPES, locked_by_main, make_accelerator, run_on_main_process
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.fingerprint import fingerprint, pipeline_fingerprints
from ddpo_pytorch.utils.randomness import Stream, derived_seed, text_number
from ddpo_pytorch.utils.settings import ONE_OR_MORE, UP_TO_A_MILLION, Range, check_ranges

FLAGS = define_config(__file__, "experiment, e.g. config/fundus.py:generate")
flags.DEFINE_multi_string("prompt", [], "prompt to draw instead of the configured ones; may be repeated")
flags.DEFINE_integer("n", 1, "images for each --prompt", 1, 1_000_000)
logger = logging.getLogger(__name__)
COUNTS = ("images_per_prompt", "num_candidates", "max_attempts")
COLUMNS = ("file_name", "text", "modality", "patient", "selector", "policy", "seed", "weights_sha256")


@dataclass
class Request:
    """The `repetition`-th search for images of a prompt."""

    prompt: str
    repetition: int
    # log entry and pixels, uint8 (3, H, W), of each image that passed, or of the last image as long as none has
    kept: list[tuple[dict[str, Any], torch.Tensor]] = field(default_factory=list)
    attempts: int = 0
    passed: int = 0


def best_of_n(
    sampler: Sampler, selector: Selector, policy: Policy, requests: Sequence[Request], config: ConfigDict
) -> Iterator[Request]:
    """Yield each request once `improve.num_candidates` images have passed or `max_attempts` are drawn, in any order.

    The image of an attempt is a function of (seed, prompt, repetition, attempt). At most `eval.batch_size` requests are
    open at a time, so that memory does not grow with their number. Images are scored in 8 bits, as they are stored.
    Images that are not finite do not pass; a batch without a finite one raises UserError.
    """
    improve, waiting = config.improve, deque(requests)
    while waiting:
        batch = [waiting.popleft() for _ in range(min(config.eval.batch_size, len(waiting)))]
        prompts = [one.prompt for one in batch]
        progress = [(text_number(one.prompt), one.repetition, one.attempts) for one in batch]
        seeds = [derived_seed(config.seed, Stream.POOL, *numbers) for numbers in progress]
        images = sampler(prompts, seeds)
        finite = images.flatten(1).isfinite().all(dim=1).cpu()
        if not finite.any():
            raise UserError(f"images of {prompts[0]!r} are not finite; use mixed_precision bf16 or no")
        pixels = to_uint8(images.nan_to_num())
        scores, alignment = selector.score_all(pixels.float() / 255), policy.score(pixels.float() / 255, prompts)
        quality, criteria = scores[:, 0], scores[:, 1:].double().round(decimals=6).tolist()
        passed = selector.accepts(quality).cpu() & finite
        rows = zip(quality.tolist(), alignment.tolist(), passed.tolist(), criteria, strict=True)
        for one, seed, image, (score, reward, passes, others) in zip(batch, seeds, pixels.cpu(), rows, strict=True):
            number = one.repetition * improve.max_attempts + one.attempts
            one.attempts += 1
            if passes or not one.passed:  # keep all that passed, or else the latest
                # the file is named after the modality, the number and both scores
                name = f"{modality_of(one.prompt) or MODALITY}_{number}_selector_{score:.2f}_policy_{reward:.2f}.png"
                entry = {
                    "prompt": one.prompt,
                    "path_to_img": f"images/{folder_name(one.prompt)}/{name}",
                    "reward": f"{reward * passes:.4f}",
                    "selector": round(score, 6),
                    "policy": round(reward, 6),
                    "passed": passes,
                    "best": False,
                    "seed": seed,
                    "attempts": 0,
                    **dict(zip(selector.criteria, others, strict=True)),
                }
                one.kept = [*(one.kept if one.passed else ()), (entry, image)]
                one.passed += passes
        for one in reversed(batch):
            if one.passed < improve.num_candidates and one.attempts < improve.max_attempts:
                waiting.appendleft(one)
                continue
            for entry, _ in one.kept:
                entry["attempts"] = one.attempts
            # the best is the image with the highest Policy score
            max((entry for entry, _ in one.kept), key=lambda entry: entry["policy"])["best"] = True
            yield one


def generate(accelerator: Accelerator, config: ConfigDict) -> None:
    """Draw, select and log images, unless the folder is complete."""
    improve, sample, pretrained, folder = config.improve, config.sample, config.pretrained, Path(config.logdir)
    prompts = given_prompts(config.eval.prompts, "fundus")
    prompts = prompts or [prompt for prompt, _ in all_prompts(config.prompt_fn, **config.prompt_fn_kwargs)]
    plan([(prompt, {}) for prompt in prompts], 1, config.seed)  # rejects the same prompts as eval.py
    selector, policy = load_judges(improve.judges, accelerator.device)
    dtype = DTYPES[config.mixed_precision]
    pipe = load_pipeline(pretrained.model, pretrained.revision, config.unet_path, dtype, accelerator.device)
    if config.load_from:
        load_weights(pipe.unet, config.load_from)
    check_tokens(pipe.tokenizer, prompts)
    sampler = Sampler(pipe, sample.scheduler, sample.num_steps, sample.eta, sample.guidance_scale)
    model = pipeline_fingerprints(pipe) | {"load_from": adapter_fingerprint(pipe.unet)}
    settings = model | {name: improve[name] for name in COUNTS}
    settings |= {name: sample[name] for name in ("scheduler", "num_steps", "eta", "guidance_scale")}
    settings |= {"seed": config.seed, "prompts": prompts, "mixed_precision": config.mixed_precision}
    settings |= {name: fingerprint(Path(improve.judges) / name) for name in (SELECTOR_FILE, POLICY_FILE)}
    origin = {"model": pretrained.model, "load_from": config.load_from}
    run_on_main_process(accelerator, claim_folder, folder, settings, origin)
    if (folder / LOG).is_file():
        entries = read_log(folder)
        best = Counter(entry.get("prompt") for entry in entries if entry.get("best") is True)
        listed = (folder / METADATA).is_file() and best == dict.fromkeys(prompts, improve.images_per_prompt)
        damaged = damaged_images(folder, [entry["path_to_img"] for entry in entries])
        if listed and not damaged:
            logger.info("%s is complete already; nothing to do", folder)
            return
        flaw = f"{len(damaged)} damaged images, e.g. {damaged[0]}" if damaged else f"an incomplete {LOG} or {METADATA}"
        logger.warning("%s has %s; all images are drawn again", folder, flaw)
    accelerator.wait_for_everyone()  # all processes have read the folder before anything is removed
    if accelerator.is_main_process:  # remove the remains of an interrupted run
        (folder / LOG).unlink(missing_ok=True)
        shutil.rmtree(folder / "images", ignore_errors=True)
    accelerator.wait_for_everyone()

    requests = [Request(prompt, number) for prompt in prompts for number in range(improve.images_per_prompt)]
    own, entries, started = requests[accelerator.process_index :: accelerator.num_processes], [], time.perf_counter()
    served = best_of_n(sampler, selector, policy, own, config)
    shown = config.progress and accelerator.is_main_process
    for request in tqdm(served, total=len(own), unit="prompt", disable=None if shown else True):
        for entry, image in request.kept:
            save_image(folder / entry["path_to_img"], image, SYNTHETIC)
            entries.append(entry | {"weights_sha256": fingerprint(model)})
    attempts = sum(gather_object([request.attempts for request in own]))
    entries = sorted(gather_object(entries), key=lambda entry: (entry["prompt"], entry["path_to_img"]))
    if accelerator.is_main_process:
        rows = []
        for entry in filter(lambda entry: entry["passed"], entries):
            path, text = entry["path_to_img"], entry["prompt"]
            modality = modality_of(text) or MODALITY
            rows.append(entry | {"file_name": path, "text": text, "modality": modality, "patient": path})
        write_table(folder / METADATA, (*COLUMNS, *selector.criteria), rows)
        write_log(folder, entries)
        logger.info("%d images drawn at %.1f images/s", attempts, attempts / (time.perf_counter() - started))
        logger.info("%d of them passed and are in %s; the best of each prompt is marked in %s", len(rows), folder, LOG)
        if failed := [entry["prompt"] for entry in entries if not entry["passed"]]:
            logger.warning("no image passed for %d of %d requests, e.g. %r", len(failed), len(requests), failed[0])


def main(_) -> None:
    config = expand_config(FLAGS.config, "logdir", "pretrained.model", "improve.judges")
    if FLAGS.n > 1 and not FLAGS.prompt:
        raise UserError(f"--n={FLAGS.n} counts images of --prompt, which is not given; set improve.images_per_prompt")
    if FLAGS.prompt:
        config.eval.prompts, config.improve.images_per_prompt = tuple(FLAGS.prompt), FLAGS.n
        config.logdir = str(Path(config.logdir) / folder_name("; ".join(FLAGS.prompt)))
    counts = dict.fromkeys(("eval.batch_size", *(f"improve.{name}" for name in COUNTS)), ONE_OR_MORE)
    check_ranges(config, SAMPLING | counts | {"improve.images_per_prompt": UP_TO_A_MILLION})
    check_ranges(config, {"improve.num_candidates": Range(f"[1, {config.improve.max_attempts}]", whole=True)})
    accelerator = make_accelerator(config.mixed_precision, config.allow_tf32, process_timeout=config.process_timeout)
    with locked_by_main(accelerator, config.logdir):
        generate(accelerator, config)
        if FLAGS.prompt and accelerator.is_main_process:
            best = [entry["path_to_img"] for entry in read_log(config.logdir) if entry["best"]]
            print(*(Path(config.logdir, path) for path in best), sep="\n")
    accelerator.end_training()


if __name__ == "__main__":
    cli(main)
