"""Stage (i): train a Stable Diffusion that draws the data set, to be improved by scripts/train.py.

    accelerate launch scripts/train_sd.py --config config/dgx.py:finetune_sd

`sd.stage` is "finetune" for the UNet of SD 1.5 (VAE and text encoder frozen), or, from scratch and in this order, "vae"
and "unet" (with tokenizer and text encoder). The diffusion model trains on latents that are encoded once. All
randomness is a function of (seed, step): after a kill, rerun the same command to resume; the result is that of an
uninterrupted run (on a CPU to the bit), for any number of processes with the same total batch size.
"""

import logging
import math
import time
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
from ddpo_pytorch.data.images import decoded, image_grid, save_picture
from ddpo_pytorch.diffusers_patch.pipeline_with_logprob import Sampling
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
from ddpo_pytorch.generator.finetune_state import Training, endless_batches
from ddpo_pytorch.generator.latents import LatentShards
from ddpo_pytorch.generator.lora import add_lora, has_lora, merged_state_dict, save_lora
from ddpo_pytorch.generator.pipeline import PromptEmbeddings, load_pipeline
from ddpo_pytorch.generator.text import check_tokens, has_mask
from ddpo_pytorch.sampling import SAMPLING
from ddpo_pytorch.training.held_out import save_grid
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
GRID_CAPTIONS, GRID_BATCH = 32, 4  # of all ISIC captions; the autoencoder takes 3 GiB to decode four of 512 px


class AutoencoderStage:
    """Training of the autoencoder, from scratch or from sd.vae; vae.png shows reconstructions below their images."""

    def __init__(self, accelerator: Accelerator, config: ConfigDict):
        sd = config.sd
        self.accelerator, self.output = accelerator, Path(sd.output)
        self.vae = scratch.load_vae(sd.vae) if sd.vae else scratch.build_vae(sd.vae_channels, sd.image_size)
        with accelerator.local_main_process_first():  # the others read its cache
            images = find_images(sd, sd.csv, sd.limit)
            self.train_set = decoded(images, sd.cache_dir)
            self.val_set = decoded(find_images(sd, sd.val_csv, sd.val_images), sd.cache_dir) if sd.val_csv else None
        self.loss = AutoencoderLoss(self.vae, sd.vae_kl_weight)
        self.data = {"images": images.digest()}  # what a state to resume from was trained on

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.loss.parameters())}]

    @torch.no_grad()
    def _encode(self, dataset: Dataset, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the first images (N, 3, H, W) in [-1, 1] and their mean latents (N, C, h, w)."""
        images = torch.stack([dataset[index][0] for index in range(min(count, len(dataset)))])
        images = images.to(self.accelerator.device).float() / 127.5 - 1
        return images, self.vae.encode(images).latent_dist.mean

    @torch.no_grad()
    def draw(self, path: Path) -> None:
        """Save a grid of images and their reconstructions."""
        images, latents = self._encode(self.val_set or self.train_set, 8)
        pairs = torch.cat([images, self.vae.decode(latents).sample]) / 2 + 0.5
        if self.accelerator.is_main_process:
            save_picture(path, image_grid(pairs.clamp(0, 1), columns=len(images)))

    def finish(self) -> None:
        """Save the autoencoder, scaled to latents of unit variance as SD's diffusion expects them."""
        self.vae.register_to_config(scaling_factor=float(1 / self._encode(self.train_set, 64)[1].std()))
        self.draw(self.output / "vae.png")
        with atomic_folder(self.output / "vae") as temporary:
            self.vae.eval().save_pretrained(temporary)


class DiffusionStage:
    """Training of the UNet, and of the text encoder from scratch or with sd.train_text_encoder, on latents."""

    def __init__(self, accelerator: Accelerator, config: ConfigDict, pipe: StableDiffusionPipeline):
        sd = config.sd
        self.accelerator, self.config, self.pipe, self.output = accelerator, config, pipe, Path(sd.output)
        pipe.vae.to(accelerator.device).float()  # in half precision SD's autoencoder overflows
        self.train_set, self.val_set = (
            open_latents(accelerator, sd, pipe.vae, validation) for validation in (False, True)
        )
        if sd.pool:
            self.train_set = add_pool(accelerator, sd, pipe.vae, self.train_set)
        sets = [self.train_set, *([self.val_set] if self.val_set else [])]
        self.captions = list(dict.fromkeys(caption for latents in sets for caption in latents.captions))
        table = CaptionTable(pipe, self.captions, trained=sd.stage == "unet" or sd.train_text_encoder)
        check_tokens(pipe.tokenizer, self.captions, "captions")
        for latents in sets:
            latents.renumber(self.captions)
        if self.val_set and self.train_set.shares_images_with(self.val_set):
            raise UserError("training and validation latents share images; extract them from different split tables")
        if sd.gradient_checkpointing:
            pipe.unet.enable_gradient_checkpointing()
        self.loss = NoiseLoss(pipe, table, sd.caption_dropout, sd.min_snr_gamma)
        self.data = {"latents": self.train_set.digests(), "captions": table.digest()}
        # the UNet's initial weights are part of the loss
        self.data |= pipeline_fingerprints(pipe, ("scheduler", "text_encoder", "tokenizer", "vae"))

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return all trained weights; a pretrained text encoder learns at a tenth of the UNet's rate."""
        sd, trained = self.config.sd, [weight for weight in self.loss.parameters() if weight.requires_grad]
        if sd.stage != "finetune" or not sd.train_text_encoder:
            return [{"params": trained}]
        slow = {id(weight) for weight in self.loss.captions.parameters()}
        return [
            {"params": [weight for weight in trained if id(weight) not in slow]},
            {"params": [weight for weight in trained if id(weight) in slow], "lr": sd.learning_rate / 10},
        ]

    def draw(self, path: Path) -> None:
        """Save a grid of one image per caption."""
        config, embeddings = self.config, PromptEmbeddings(self.pipe)  # new ones: the text encoder may be in training
        self.pipe.set_progress_bar_config(disable=True)
        captions, sampling = self.captions[:GRID_CAPTIONS], Sampling.of(config.sample)
        save_grid(self.accelerator, self.pipe, embeddings, captions, config.seed, sampling, GRID_BATCH, path)

    def finish(self) -> None:
        """Save the UNet for --config.unet_path; also adapters, and the whole model if other parts are new."""
        sd, pipe = self.config.sd, self.pipe
        if has_lora(pipe.unet):
            save_lora(pipe.unet, self.output)
        if sd.stage == "unet" or sd.text_encoder == "bert" or sd.train_text_encoder:
            save_model(pipe, self.output)
        with atomic_write(self.output / "pretrained_unet.safetensors") as temporary:
            save_file(merged_state_dict(pipe.unet), temporary, metadata=unet_metadata(pipe))


Stage = AutoencoderStage | DiffusionStage


def train(accelerator: Accelerator, config: ConfigDict, stage: Stage) -> None:
    """Train with AdamW, warm-up and a weight average, which is in the model at the end."""
    sd, output, is_main = config.sd, Path(config.sd.output), accelerator.is_main_process
    parameters = [weight for weight in stage.loss.parameters() if weight.requires_grad]
    optimizer = make_adamw(stage.parameter_groups(), sd.use_8bit_adam, lr=sd.learning_rate, weight_decay=1e-2)
    schedule = get_scheduler(
        SCHEDULES[sd.lr_schedule], optimizer, num_warmup_steps=sd.warmup_steps, num_training_steps=sd.num_steps
    )
    model, optimizer = accelerator.prepare(stage.loss.train(), optimizer)
    average = EMAModel(parameters, decay=sd.ema_decay, foreach=True) if sd.ema_decay > 0 else None
    training = Training(parameters, optimizer, schedule, average, accelerator.scaler)
    data = stage.data | {"initial weights": fingerprint(stage.loss)}
    state, settings = state_file(sd), settings_of(config, accelerator.num_processes, data)
    first = training.restore(state, settings)
    log = JsonLines(output / f"{sd.stage}.jsonl", is_main, keep=first + 1, counter="step")
    batches = endless_batches(accelerator, sd, config.seed, stage.train_set, first * sd.gradient_accumulation_steps)

    losses, seconds = [], 0.0  # since the last log entry
    hidden = None if is_main else True  # None: a bar on terminals only
    for step in tqdm(range(first + 1, sd.num_steps + 1), initial=first, total=sd.num_steps, disable=hidden):
        started = time.perf_counter()
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
        logged = step % sd.log_every == 0 or last
        if logged:
            mean = accelerator.reduce(torch.stack(losses).mean(), "mean").item()  # waits for the device
        seconds += time.perf_counter() - started
        if logged:
            speed = sd.batch_size * len(losses) * accelerator.num_processes / seconds
            entry = {"step": step, "loss": mean, "learning_rate": schedule.get_last_lr()[0]}
            log.write(entry | {"images_per_second": round(speed, 2), "peak_memory_gib": round(peak_memory_gib(), 2)})
            logger.info("step %d/%d  loss %.4f  %.1f images/s", step, sd.num_steps, mean, speed)
            if not math.isfinite(mean):
                raise UserError(
                    f"the loss is {mean} at step {step}; lower sd.learning_rate, or use bf16 instead of fp16"
                )
            losses, seconds = [], 0.0
        if stage.val_set is not None and (step % sd.val_every == 0 or step == 1 or last):
            with training.averaged():
                val_loss = validate(accelerator, config, stage)
            log.write({"step": step, "val_loss": val_loss})
            logger.info("step %d/%d  validation loss %.5f", step, sd.num_steps, val_loss)
        if sd.save_every and step % sd.save_every == 0 and not last and is_main:
            save_state(state, training.snapshot(step), settings)
        if sd.grid_every and step % sd.grid_every == 0:
            with training.averaged():
                stage.draw(output / f"{sd.stage}_{step:06d}.png")

    if average:
        average.copy_to(parameters)
    if is_main:
        stage.finish()
        state.unlink(missing_ok=True)
    accelerator.wait_for_everyone()


@torch.no_grad()
def validate(accelerator: Accelerator, config: ConfigDict, stage: Stage) -> float:
    """Return the mean loss of the validation set, where each image always has the same noise and timestep."""
    size, count, device = config.sd.batch_size, len(stage.val_set), accelerator.device
    rank, processes = accelerator.process_index, accelerator.num_processes
    sums = torch.zeros(2, dtype=torch.float64, device=device)  # of losses, of images
    stage.loss.eval()
    for number in range(math.ceil(count / (size * processes))):
        start = (number * processes + rank) * size
        items = [stage.val_set[index] for index in range(start, min(start + size, count))]
        if items:
            batch = [tensor.to(device) for tensor in default_collate(items)]
            draws = BatchDraws(config.seed, Stream.VALIDATION, number, size, rank, processes, len(items), device=device)
            with accelerator.autocast():
                loss = stage.loss.batch_loss(stage.loss, batch, draws)
            sums += torch.tensor([loss.item() * len(items), len(items)], device=device)
    stage.loss.train()
    total, images = accelerator.reduce(sums).tolist()
    return total / images


def training_captions(sd: ConfigDict) -> tuple[str, ...]:
    """Return the training captions, from which a new model's tokenizer learns its words."""
    if sd.latents:
        return tuple(LatentShards(sd.latents).captions)
    return source(sd.kind).caption_list(find_rows(sd, sd.csv, sd.limit)[0])


def load_pretrained(accelerator: Accelerator, config: ConfigDict) -> StableDiffusionPipeline:
    """Load the pretrained model and make its UNet trainable, in float32, or with adapters on a frozen UNet."""
    pretrained, sd = config.pretrained, config.sd
    pipe = load_pipeline(pretrained.model, pretrained.revision, config.unet_path, device=accelerator.device)
    if sd.use_lora:
        for part in (pipe.unet, pipe.text_encoder):  # the VAE stays in float32, as its latents are stored
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
    required = ("sd.output", "pretrained.model") if FLAGS.config.sd.stage == "finetune" else ("sd.output",)
    config = expand_config(FLAGS.config, *required)
    sd = config.sd
    check_ranges(config, SAMPLING if sd.grid_every else {"seed": SEED})
    check_settings(sd)
    accelerator = make_accelerator(
        config.mixed_precision,
        config.allow_tf32,
        sd.gradient_accumulation_steps,
        process_timeout=config.process_timeout,
    )
    set_seed(config.seed)  # the same initial weights on all processes
    with locked_by_main(accelerator, sd.output, "another --config.sd.output"):
        run_on_main_process(accelerator, refuse_outcome, sd)
        if sd.stage == "vae":
            stage = AutoencoderStage(accelerator, config)
        elif sd.stage == "unet":
            pipe = scratch.build_pipeline(sd, training_captions(sd))
            stage = DiffusionStage(accelerator, config, pipe)
        else:
            stage = DiffusionStage(accelerator, config, load_pretrained(accelerator, config))
        train(accelerator, config, stage)
    logger.info("finished; the result is in %s", sd.output)
    accelerator.end_training()


if __name__ == "__main__":
    cli(main)
