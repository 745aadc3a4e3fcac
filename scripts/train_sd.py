"""Stage (i): a Stable Diffusion that draws the data set, to be improved by scripts/train.py.

    accelerate launch scripts/train_sd.py --config config/dgx.py:finetune_sd

`sd.stage` chooses what is trained: "finetune" the UNet of SD 1.5 (VAE and text encoder frozen), or, from nothing and in
this order, "vae" and "unet" (with tokenizer and text encoder). The diffusion model learns from latents that are encoded
once. All randomness is a function of (seed, step): a killed run goes on by the same command and ends as if it had not
been killed (on a CPU to the bit), and the number of processes does not matter at equal batches of all of them together.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from absl import flags
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import StableDiffusionPipeline
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from ml_collections import ConfigDict
from safetensors.torch import save_file
from torch.utils.data import Dataset, default_collate
from tqdm.auto import tqdm

from ddpo_pytorch.data.datasets import source
from ddpo_pytorch.data.image_cache import decoded
from ddpo_pytorch.data.images import image_grid, save_picture
from ddpo_pytorch.generator import from_scratch as scratch
from ddpo_pytorch.generator.conditioning import save_model, unet_metadata, with_bert
from ddpo_pytorch.generator.finetune_data import (
    SCHEDULES,
    add_pool,
    check_settings,
    find_images,
    find_rows,
    open_latents,
    refuse_outcome,
    settings_of,
    state_file,
)
from ddpo_pytorch.generator.finetune_losses import AutoencoderLoss, CaptionTable, NoiseLoss
from ddpo_pytorch.generator.finetune_state import Stopwatch, Training, endless_batches, parameter_groups
from ddpo_pytorch.generator.latents import LatentShards
from ddpo_pytorch.generator.lora import add_lora, has_lora, merged_state_dict, save_lora
from ddpo_pytorch.generator.pipeline import load_pipeline
from ddpo_pytorch.generator.text import check_tokens, has_mask
from ddpo_pytorch.sampling import SAMPLING
from ddpo_pytorch.training.caption_grid import draw_captions
from ddpo_pytorch.training.optimizer import make_adamw
from ddpo_pytorch.utils.cli import cli, define_config, expand_config
from ddpo_pytorch.utils.distributed import (
    DTYPES,
    locked_by_main,
    make_accelerator,
    peak_memory_gib,
    run_on_main_process,
)
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.files import JsonLines, atomic_folder, atomic_write
from ddpo_pytorch.utils.fingerprint import fingerprint, pipeline_fingerprints
from ddpo_pytorch.utils.randomness import BatchDraws, Stream
from ddpo_pytorch.utils.settings import SEED, check_ranges
from ddpo_pytorch.utils.training_state import save_state
from ddpo_pytorch.utils.weights import check_finite

FLAGS = flags.FLAGS
define_config(__file__, "experiment, e.g. config/dgx.py:finetune_sd")
logger = logging.getLogger(__name__)
GRID_CAPTIONS = 32  # drawn at intervals: all of ISIC's


@dataclass
class Stage:
    """One training: the loss and what it is fed, and what is done with the model on the way and at the end."""

    loss: AutoencoderLoss | NoiseLoss
    train_set: Dataset
    val_set: Dataset | None
    data: dict[str, Any]  # identifies the training data
    draw: Callable[[Path], None]
    finish: Callable[[], None]


def train(accelerator: Accelerator, config: ConfigDict, stage: Stage) -> None:
    """AdamW with warm-up, weight average, validation, sample grids; the average is in the model at the end."""
    sd, output, is_main = config.sd, Path(config.sd.output), accelerator.is_main_process
    parameters = [p for p in stage.loss.parameters() if p.requires_grad]
    groups = parameter_groups(stage.loss, parameters, sd)
    optimizer = make_adamw(groups, sd.use_8bit_adam, lr=sd.learning_rate, weight_decay=1e-2)
    schedule = get_scheduler(
        SCHEDULES[sd.lr_schedule], optimizer, num_warmup_steps=sd.warmup_steps, num_training_steps=sd.num_steps
    )
    model, optimizer = accelerator.prepare(stage.loss.train(), optimizer)
    average = EMAModel(parameters, decay=sd.ema_decay, foreach=True) if sd.ema_decay > 0 else None
    training = Training(parameters, optimizer, schedule, average, accelerator.scaler)
    identity = stage.data | {"initial weights": fingerprint(stage.loss)}
    state, settings = state_file(sd), settings_of(config, accelerator.num_processes, identity)
    first = training.restore(state, settings)
    log = JsonLines(output / f"{sd.stage}.jsonl", is_main, keep=first + 1, counter="step")
    batches = endless_batches(accelerator, sd, config.seed, stage.train_set, first * sd.gradient_accumulation_steps)

    losses, clock = [], Stopwatch()
    for step in tqdm(
        range(first + 1, sd.num_steps + 1), initial=first, total=sd.num_steps, disable=hidden(accelerator)
    ):
        for _ in range(sd.gradient_accumulation_steps):
            batch, draws = next(batches)
            with accelerator.accumulate(model):
                loss = stage.loss.batch_loss(model, batch, draws)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.detach())
        schedule.step()
        if average:
            average.step(parameters)

        last = step == sd.num_steps
        if step % sd.log_every == 0 or last:
            mean = accelerator.reduce(torch.stack(losses).mean(), "mean").item()
            images = sd.batch_size * len(losses) * accelerator.num_processes
            report(log, step, mean, schedule.get_last_lr()[0], images / clock.lap(), sd.num_steps)
            losses.clear()
        if stage.val_set is not None and (step % sd.val_every == 0 or step == 1 or last):
            with clock.paused(), training.averaged():
                val_loss = validate(accelerator, config, stage)
            log.write({"step": step, "val_loss": val_loss})
            logger.info("step %d/%d  validation loss %.5f", step, sd.num_steps, val_loss)
        if sd.save_every and step % sd.save_every == 0 and not last and is_main:
            with clock.paused():
                save_state(state, training.snapshot(step), settings)
        if sd.grid_every and step % sd.grid_every == 0:
            with clock.paused(), training.averaged():
                stage.draw(output / f"{sd.stage}_{step:06d}.png")

    if average:
        average.copy_to(parameters)
    if is_main:
        stage.finish()
        state.unlink(missing_ok=True)
    accelerator.wait_for_everyone()


def report(log: JsonLines, step: int, loss: float, learning_rate: float, speed: float, num_steps: int) -> None:
    log.write(
        {
            "step": step,
            "loss": loss,
            "learning_rate": learning_rate,
            "images_per_second": round(speed, 2),
            "peak_memory_gib": round(peak_memory_gib(), 2),
        }
    )
    logger.info("step %d/%d  loss %.4f  %.1f images/s", step, num_steps, loss, speed)
    if not math.isfinite(loss):
        raise UserError(f"the loss is {loss} at step {step}; lower sd.learning_rate, or take bf16 instead of fp16")


@torch.no_grad()
def validate(accelerator: Accelerator, config: ConfigDict, stage: Stage) -> float:
    """Mean loss of the validation set, each image with the same noise and timestep every time."""
    size, count, place = (
        config.sd.batch_size,
        len(stage.val_set),
        (accelerator.process_index, accelerator.num_processes),
    )
    sums = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    stage.loss.eval()
    for number in range(math.ceil(count / (size * place[1]))):
        start = (number * place[1] + place[0]) * size
        items = [stage.val_set[index] for index in range(start, min(start + size, count))]
        if items:
            batch = [tensor.to(accelerator.device) for tensor in default_collate(items)]
            draws = BatchDraws(
                config.seed, Stream.VALIDATION, number, size, *place, len(items), device=accelerator.device
            )
            with accelerator.autocast():
                loss = stage.loss.batch_loss(stage.loss, batch, draws)
            sums += torch.tensor([loss.item() * len(items), len(items)], device=accelerator.device)
    stage.loss.train()
    total, images = accelerator.reduce(sums).tolist()
    return total / images


def hidden(accelerator: Accelerator) -> bool | None:
    """tqdm's `disable`: a bar on the main process, if it has a terminal."""
    return None if accelerator.is_main_process else True


def vae_stage(accelerator: Accelerator, config: ConfigDict) -> Stage:
    """The autoencoder, from nothing or another one; vae.png shows reconstructions below their images."""
    sd, output = config.sd, Path(config.sd.output)
    vae = scratch.load_vae(sd.vae) if sd.vae else scratch.build_vae(sd.vae_channels, sd.image_size)
    with accelerator.local_main_process_first():
        images = find_images(sd, sd.csv, sd.limit)
        train_set = decoded(images, sd.cache_dir)
        val_set = decoded(find_images(sd, sd.val_csv, sd.val_images), sd.cache_dir) if sd.val_csv else None

    @torch.no_grad()
    def encoded(dataset: Dataset, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        images = torch.stack([dataset[index][0] for index in range(min(count, len(dataset)))])
        images = images.to(accelerator.device).float() / 127.5 - 1
        return images, vae.encode(images).latent_dist.mean

    @torch.no_grad()
    def draw(path: Path) -> None:
        images, latents = encoded(val_set or train_set, 8)
        pairs = torch.cat([images, vae.decode(latents).sample]) / 2 + 0.5
        if accelerator.is_main_process:
            save_picture(path, image_grid(pairs.clamp(0, 1), columns=len(images)))

    def finish() -> None:
        # latents of unit variance, as SD's diffusion expects them
        vae.register_to_config(scaling_factor=float(1 / encoded(train_set, 64)[1].std()))
        draw(output / "vae.png")
        with atomic_folder(output / "vae") as temporary:
            vae.eval().save_pretrained(temporary)

    data = {"images": images.digest()}
    return Stage(AutoencoderLoss(vae, sd.vae_kl_weight), train_set, val_set, data, draw, finish)


def unet_stage(accelerator: Accelerator, config: ConfigDict, pipe: StableDiffusionPipeline) -> Stage:
    """The UNet (and, from nothing, the text encoder) on latents."""
    sd, output = config.sd, Path(config.sd.output)
    pipe.vae.to(accelerator.device).float()  # in half precision SD's autoencoder overflows
    train_set, val_set = (open_latents(accelerator, sd, pipe.vae, validation) for validation in (False, True))
    if sd.pool:
        train_set = add_pool(accelerator, sd, pipe.vae, train_set)
    names = list(dict.fromkeys([*train_set.captions, *(val_set.captions if val_set else ())]))
    captions = CaptionTable(pipe, names, trained=sd.stage == "unet" or sd.train_text_encoder)
    check_tokens(pipe.tokenizer, names, "captions")
    train_set.renumber(names)
    if val_set is not None:
        val_set.renumber(names)
    if val_set is not None and train_set.shares_images_with(val_set):
        raise UserError("training and validation latents share images; extract them from different split tables")
    if sd.gradient_checkpointing:
        pipe.unet.enable_gradient_checkpointing()
    data = {"latents": train_set.digests(), "captions": captions.digest()}
    data |= pipeline_fingerprints(pipe, ("scheduler", "text_encoder", "tokenizer", "vae"))  # the UNet is in the loss

    def finish() -> None:
        if has_lora(pipe.unet):
            save_lora(pipe.unet, output)
        if sd.stage == "unet" or sd.text_encoder == "bert" or sd.train_text_encoder:
            save_model(pipe, output)
        with atomic_write(output / "pretrained_unet.safetensors") as temporary:
            save_file(merged_state_dict(pipe.unet), temporary, metadata=unet_metadata(pipe))

    loss = NoiseLoss(pipe, captions, sd.caption_dropout, sd.min_snr_gamma)
    draw = partial(draw_captions, accelerator, pipe, names[:GRID_CAPTIONS], config.sample, config.seed)
    return Stage(loss, train_set, val_set, data, draw, finish)


def captions_of(sd: ConfigDict) -> tuple[str, ...]:
    """The training captions, whose words the tokenizer of a new model knows."""
    if sd.latents:
        return tuple(LatentShards(sd.latents).captions)
    return source(sd.kind).caption_list(find_rows(sd, sd.csv, sd.limit)[0])


def load_pretrained(accelerator: Accelerator, config: ConfigDict) -> StableDiffusionPipeline:
    """The pretrained model with a UNet to train: all of it in float32, or adapters on a frozen one of storage type."""
    pretrained, sd = config.pretrained, config.sd
    pipe = load_pipeline(pretrained.model, pretrained.revision, config.unet_path, device=accelerator.device)
    if sd.use_lora:
        for part in (pipe.unet, pipe.text_encoder):  # not the VAE, whose latents belong to its float32 weights
            part.to(DTYPES[config.mixed_precision])
            check_finite(part.state_dict(), config.unet_path or pretrained.model)
        add_lora(pipe.unet, sd.lora_rank, sd.lora_targets, config.seed)
    else:
        pipe.unet.requires_grad_(True)
    if sd.text_encoder == "bert" and not has_mask(pipe.text_encoder):
        pipe = with_bert(pipe, sd.bert, sd.text_tokens)
    if sd.train_text_encoder:
        pipe.text_encoder.float().requires_grad_(True)
    return pipe


def main(_) -> None:
    needed = ("sd.output", "pretrained.model") if FLAGS.config.sd.stage == "finetune" else ("sd.output",)
    config = expand_config(FLAGS.config, *needed)
    sd = config.sd
    check_ranges(config, SAMPLING if sd.grid_every else {"seed": SEED})
    check_settings(sd)
    accelerator = make_accelerator(
        config.mixed_precision,
        config.allow_tf32,
        sd.gradient_accumulation_steps,
        process_timeout=config.process_timeout,
    )
    set_seed(config.seed)  # of fresh weights, alike on all processes
    with locked_by_main(accelerator, sd.output, "another --config.sd.output"):
        run_on_main_process(accelerator, refuse_outcome, sd)
        if sd.stage == "vae":
            stage = vae_stage(accelerator, config)
        elif sd.stage == "unet":
            stage = unet_stage(accelerator, config, scratch.build_pipeline(sd, captions_of(sd)))
        else:
            stage = unet_stage(accelerator, config, load_pretrained(accelerator, config))
        train(accelerator, config, stage)
    logger.info("finished; the outcome is in %s", sd.output)
    accelerator.end_training()


if __name__ == "__main__":
    cli(main)
