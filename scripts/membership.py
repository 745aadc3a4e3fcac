"""Test whether a generator's denoising losses tell training images from validation images, before and after RL.

    accelerate launch scripts/membership.py --config config/dgx.py:finetune_sd --config.load_from=RUN

Reads the images of stage (i), sd.csv and sd.val_csv (sd.limit and sd.val_images of them), or their latents, and writes
<sd.output>/membership.json: mean losses and the AUC of a lower loss on training images, for the base model and for the
one of load_from, and the difference of the AUCs. An image has the same noise under both models.
"""

import json
import logging
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from ml_collections import ConfigDict
from torch.utils.data import default_collate

from ddpo_pytorch.generator.finetune_data import check_settings, open_latents
from ddpo_pytorch.generator.finetune_losses import CaptionTable, NoiseLoss
from ddpo_pytorch.generator.latents import LatentShards, merge_captions
from ddpo_pytorch.generator.pipeline import load_pipeline
from ddpo_pytorch.metrics.intervals import bootstrap_mean
from ddpo_pytorch.metrics.memorisation import membership_auc
from ddpo_pytorch.training.checkpoints import load_weights
from ddpo_pytorch.utils.cli import cli, define_config, expand_config
from ddpo_pytorch.utils.distributed import DTYPES, locked_by_main, make_accelerator
from ddpo_pytorch.utils.errors import UserError, difference
from ddpo_pytorch.utils.files import write_json
from ddpo_pytorch.utils.json_files import read_json
from ddpo_pytorch.utils.randomness import BatchDraws, Stream
from ddpo_pytorch.utils.settings import SEED, check_ranges

FLAGS = define_config(__file__, "experiment, e.g. config/dgx.py:finetune_sd")
logger = logging.getLogger(__name__)
TITLE = "Membership: AUC of lower denoising losses on training than on validation images"
RESULT = "membership.json"
TIMESTEPS = 16  # random timesteps over which the loss of an image is averaged


@torch.no_grad()
def image_losses(accelerator: Accelerator, config: ConfigDict, loss: NoiseLoss, latents: LatentShards) -> np.ndarray:
    """Return each image's loss (N,), averaged over `TIMESTEPS` draws of timestep and noise; equal on every process."""
    size, device, losses = config.sd.batch_size, accelerator.device, []
    for number in range(accelerator.process_index, -(-len(latents) // size), accelerator.num_processes):
        items = [latents[index] for index in range(number * size, min((number + 1) * size, len(latents)))]
        batch, total = [tensor.to(device) for tensor in default_collate(items)], torch.zeros(len(items), device=device)
        for step in range(TIMESTEPS):
            place = config.seed, Stream.VALIDATION, number * TIMESTEPS + step, size
            with accelerator.autocast():  # collating above would fail in it
                total += loss.errors(batch, BatchDraws(*place, kept=len(items), device=device))
        losses.append((number, (total / TIMESTEPS).tolist()))
    return np.concatenate([values for _, values in sorted(gather_object(losses))])


def read_settings(config: ConfigDict) -> dict:
    """Return what identifies a result. Raises UserError if there is one of other settings."""
    settings = {"seed": config.seed, "timesteps": TIMESTEPS, "model": config.pretrained.model}
    settings |= {name: config[name] for name in ("unet_path", "load_from", "mixed_precision")}
    names = ("batch_size", "csv", "val_csv", "limit", "val_images", "latents", "val_latents")
    settings |= {f"sd.{name}": config.sd[name] for name in names}
    path = Path(config.sd.output) / RESULT
    if changed := path.is_file() and difference(read_json(path, {"settings": dict})["settings"], settings):
        raise UserError(f"{str(path)!r} is the result of {changed}; move it away, or give another --config.sd.output")
    return settings


def test(accelerator: Accelerator, config: ConfigDict) -> dict:
    """Return the content of membership.json. Raises UserError for too few images and losses that are not finite."""
    pretrained, sd, dtype = config.pretrained, config.sd, DTYPES[config.mixed_precision]
    settings = read_settings(config)
    model = pretrained.model, pretrained.revision, config.unet_path, dtype
    if config.load_from:  # raises for unusable weights before images are encoded and measured with the base model
        load_weights(load_pipeline(*model).unet, config.load_from)
    pipe = load_pipeline(*model[:3], device=accelerator.device)
    for part in (pipe.unet, pipe.text_encoder):  # the VAE stays in float32, in which its latents were encoded
        part.to(dtype)
    sets = [open_latents(accelerator, sd, pipe.vae, validation) for validation in (False, True)]
    if sets[1] is None or min(map(len, sets)) < 2:
        raise UserError("a membership test needs at least 2 images of each of sd.csv and sd.val_csv; give both tables")
    sets[0].check_disjoint(sets[1])
    loss = NoiseLoss(pipe, CaptionTable(pipe, merge_captions(sets), trained=False)).to(accelerator.device).eval()
    result, losses = {"title": TITLE, "settings": settings}, {}
    models = {"base": pretrained.model} | ({"load_from": config.load_from} if config.load_from else {})
    for name, given in models.items():
        if name == "load_from":
            load_weights(pipe.unet, given)
        losses[name] = [image_losses(accelerator, config, loss, latents) for latents in sets]
        if not all(np.isfinite(part).all() for part in losses[name]):
            raise UserError(f"losses of {given!r} are not finite; use mixed_precision bf16 or no, or other weights")
        result[name] = {"AUC": membership_auc(*losses[name]).to_dict()}
        for split, part in zip(("train", "val"), losses[name], strict=True):
            mean = bootstrap_mean(part, np.zeros(len(part)), config.seed, resample_groups=False, share=False)
            result[name][f"{split}_loss"] = mean.to_dict()
    if config.load_from:
        result["difference"] = membership_auc(*losses["load_from"], base=losses["base"]).to_dict()
    return result


def main(_) -> None:
    config = expand_config(FLAGS.config, "sd.output", "pretrained.model")
    check_settings(config.sd)
    check_ranges(config, {"seed": SEED})
    accelerator = make_accelerator(config.mixed_precision, config.allow_tf32, process_timeout=config.process_timeout)
    with locked_by_main(accelerator, config.sd.output, "another --config.sd.output"):
        result = test(accelerator, config)
        if accelerator.is_main_process:
            write_json(Path(config.sd.output) / RESULT, result)
            logger.info("%s", json.dumps(result, indent=1))
    accelerator.end_training()


if __name__ == "__main__":
    cli(main)
