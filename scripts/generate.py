"""Draw best-of-N images: those of each prompt that pass the Selector, ranked by the Policy.

    accelerate launch scripts/generate.py --config config/fundus.py:generate --config.logdir=DIR

For each prompt (eval.prompts, else all of prompt_fn), `improve.images_per_prompt` times: draw images until
`improve.num_candidates` pass or `improve.max_attempts` are drawn. Writes <logdir>/images/<caption with _>/
Fundus_<number>_selector_<score>_policy_<score>.png and, at the end, <logdir>/image_log.json, in which `best` marks the
image of highest Policy score; if none passed, the last one is kept, with `passed` false. A complete folder stays as it
is, an incomplete one is drawn from the start.
"""

import logging
import shutil
import time
from pathlib import Path

from absl import flags
from accelerate import Accelerator
from accelerate.utils import gather_object
from ml_collections import ConfigDict
from tqdm.auto import tqdm

from ddpo_pytorch.data.images import save_image
from ddpo_pytorch.data.sample_folder import LOG, claim_folder, damaged_images, read_log, write_log
from ddpo_pytorch.generator.lora import adapter_fingerprint
from ddpo_pytorch.generator.pipeline import load_pipeline
from ddpo_pytorch.generator.text import check_tokens
from ddpo_pytorch.judges.policy import POLICY_FILE, SELECTOR_FILE, load_judges
from ddpo_pytorch.prompts import all_prompts, given_prompts
from ddpo_pytorch.rlhf.best_of_n import Request, best_of_n, log_entries
from ddpo_pytorch.sampling import SAMPLING, Sampler, plan
from ddpo_pytorch.training.checkpoints import load_weights
from ddpo_pytorch.utils.cli import cli, define_config, expand_config
from ddpo_pytorch.utils.distributed import DTYPES, locked_by_main, make_accelerator
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.fingerprint import fingerprint, pipeline_fingerprints
from ddpo_pytorch.utils.settings import ONE_OR_MORE, check_ranges

FLAGS = flags.FLAGS
define_config(__file__, "experiment, e.g. config/fundus.py:generate")
logger = logging.getLogger(__name__)
COUNTS = ("images_per_prompt", "num_candidates", "max_attempts")


def check_settings(config: ConfigDict) -> None:
    """Raise UserError for a number that is out of range."""
    improve = config.improve
    check_ranges(config, SAMPLING | {"eval.batch_size": ONE_OR_MORE})
    check_ranges(improve, dict.fromkeys(COUNTS, ONE_OR_MORE), "improve.")
    if improve.num_candidates > improve.max_attempts:
        raise UserError(
            f"improve.num_candidates is {improve.num_candidates}; it must be at most improve.max_attempts, which is "
            f"{improve.max_attempts}"
        )


def is_complete(folder: Path) -> bool:
    """Return whether there is a log with all its images undamaged."""
    if not (folder / LOG).is_file():
        return False
    paths = [str(entry.get("path_to_img")) for entry in read_log(folder)]
    if damaged := damaged_images(folder, paths):
        logger.warning(
            "%d of %d images in %s are damaged, the first is %s; all are drawn again",
            len(damaged), len(paths), folder, damaged[0],
        )  # fmt: skip
    return not damaged


def generate(accelerator: Accelerator, config: ConfigDict) -> None:
    """Draw, select and log the images, unless the folder is complete."""
    improve, sample, pretrained, folder = config.improve, config.sample, config.pretrained, Path(config.logdir)
    prompts = given_prompts(config.eval.prompts)
    prompts = prompts or [prompt for prompt, _ in all_prompts(config.prompt_fn, **config.prompt_fn_kwargs)]
    plan([(prompt, {}) for prompt in prompts], 1, config.seed)  # refuses the same prompts as eval.py
    selector, policy = load_judges(improve.judges, accelerator.device)
    dtype = DTYPES[config.mixed_precision]
    pipe = load_pipeline(pretrained.model, pretrained.revision, config.unet_path, dtype, accelerator.device)
    if config.load_from:
        load_weights(pipe.unet, config.load_from)
    check_tokens(pipe.tokenizer, prompts)
    sampler = Sampler(pipe, sample.scheduler, sample.num_steps, sample.eta, sample.guidance_scale)
    settings = {name: improve[name] for name in COUNTS}
    settings |= {name: sample[name] for name in ("scheduler", "num_steps", "eta", "guidance_scale")}
    settings |= {"seed": config.seed, "prompts": prompts, "mixed_precision": config.mixed_precision}
    settings |= {name: fingerprint(Path(improve.judges) / name) for name in (SELECTOR_FILE, POLICY_FILE)}
    settings |= pipeline_fingerprints(pipe) | {"load_from": adapter_fingerprint(pipe.unet)}
    if accelerator.is_main_process:
        claim_folder(folder, settings, {"model": pretrained.model, "load_from": config.load_from})
    accelerator.wait_for_everyone()
    if is_complete(folder):
        logger.info("%s is complete already; nothing to do", folder)
        return
    accelerator.wait_for_everyone()  # all have read the folder before anything is removed
    if accelerator.is_main_process:  # remains of an interrupted run
        (folder / LOG).unlink(missing_ok=True)
        shutil.rmtree(folder / "images", ignore_errors=True)
    accelerator.wait_for_everyone()

    requests = [Request(prompt, number) for prompt in prompts for number in range(improve.images_per_prompt)]
    own, entries, started = requests[accelerator.process_index :: accelerator.num_processes], [], time.perf_counter()
    limits = improve.num_candidates, improve.max_attempts, config.eval.batch_size
    served = best_of_n(sampler, selector, policy, own, *limits, config.seed)
    shown = config.progress and accelerator.is_main_process
    for request in tqdm(served, total=len(own), unit="prompt", disable=None if shown else True):
        for entry, image in log_entries(request, improve.max_attempts):
            save_image(folder / entry["path_to_img"], image)
            entries.append(entry)
    attempts = sum(gather_object([request.attempts for request in own]))
    entries = sorted(gather_object(entries), key=lambda entry: (entry["prompt"], entry["path_to_img"]))
    if accelerator.is_main_process:
        write_log(folder, entries)
        passed = sum(entry["passed"] for entry in entries)
        logger.info("%d images drawn at %.1f images/s", attempts, attempts / (time.perf_counter() - started))
        logger.info("%d of them passed and are in %s; the best of each prompt is marked in %s", passed, folder, LOG)
        if failed := [entry["prompt"] for entry in entries if not entry["passed"]]:
            logger.warning("no image passed for %d of %d requests, e.g. %r", len(failed), len(requests), failed[0])


def main(_) -> None:
    config = expand_config(FLAGS.config, "logdir", "pretrained.model", "improve.judges")
    check_settings(config)
    accelerator = make_accelerator(config.mixed_precision, config.allow_tf32, process_timeout=config.process_timeout)
    with locked_by_main(accelerator, config.logdir):
        generate(accelerator, config)
    accelerator.end_training()


if __name__ == "__main__":
    cli(main)
