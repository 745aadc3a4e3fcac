"""Stage (i): train a Stable Diffusion on the data set, to be improved by scripts/train.py.

    accelerate launch scripts/train_sd.py --config config/dgx.py:finetune_sd

`sd.stage` is "finetune" for the UNet of SD 1.5 (VAE and text encoder frozen), or, from scratch and in this order, "vae"
and "unet" (with tokenizer and text encoder). The diffusion model trains on latents that are encoded once. All
randomness is a function of (seed, step): after a kill, rerun the same command to resume. The result equals that of an
uninterrupted run (bit for bit on a CPU), for any number of processes with the same total batch size.
"""

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import StableDiffusionPipeline
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from ml_collections import ConfigDict
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import Dataset, default_collate
from tqdm.auto import tqdm

from ddpo_pytorch.data.datasets import KINDS
from ddpo_pytorch.data.images import decoded, image_grid, save_picture
from ddpo_pytorch.diffusers_patch.pipeline_with_logprob import Sampling
from ddpo_pytorch.generator import finetune_data as data
from ddpo_pytorch.generator import from_scratch as scratch
from ddpo_pytorch.generator import pipeline
from ddpo_pytorch.generator.finetune_losses import AutoencoderLoss, CaptionTable, NoiseLoss
from ddpo_pytorch.generator.latents import LatentShards, merge_captions
from ddpo_pytorch.generator.lora import add_lora, has_lora, merge_lora, merged_state_dict, save_lora
from ddpo_pytorch.generator.text import check_tokens, has_mask
from ddpo_pytorch.sampling import SAMPLING
from ddpo_pytorch.training.held_out import save_grid
from ddpo_pytorch.training.optimizer import make_adamw
from ddpo_pytorch.utils import distributed
from ddpo_pytorch.utils.cli import cli, define_config, expand_config
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.files import JsonLines, atomic_folder, atomic_write
from ddpo_pytorch.utils.fingerprint import fingerprint, pipeline_fingerprints
from ddpo_pytorch.utils.randomness import BatchDraws, Stream
from ddpo_pytorch.utils.settings import SEED, check_ranges
from ddpo_pytorch.utils.training_state import TrainState
from ddpo_pytorch.utils.weights import check_finite

FLAGS = define_config(__file__, "experiment, e.g. config/dgx.py:finetune_sd")
logger = logging.getLogger(__name__)
GRID_CAPTIONS, GRID_BATCH = 32, 4  # all ISIC captions; the autoencoder takes 3 GiB to decode four images of 512 px


class AutoencoderStage:
    """Training of the autoencoder, from scratch or from sd.vae; vae.png shows images above their reconstructions."""

    measures = ("val_loss", "val_psnr")

    def __init__(self, accelerator: Accelerator, config: ConfigDict):
        sd = config.sd
        self.accelerator, self.output, self.slow = accelerator, Path(sd.output), []
        sizes = sd.vae_channels, sd.image_size, sd.vae_latent_channels, sd.vae_attention
        self.vae = scratch.load_vae(sd.vae) if sd.vae else scratch.build_vae(*sizes)
        weights = sd.vae_kl_weight, sd.vae_crop, sd.perceptual_net, sd.perceptual_coef, sd.adversarial_coef
        with accelerator.local_main_process_first():  # the others read the caches that it fills
            images = data.find_images(sd, sd.csv, sd.limit)
            self.train_set, self.val_set = decoded(images, sd.cache_dir), None
            if sd.val_csv:
                self.val_set = decoded(data.find_images(sd, sd.val_csv, sd.val_images), sd.cache_dir)
            self.loss = AutoencoderLoss(self.vae, *weights)
        self.hashes = {"images": images.digest()}  # of the training data, to check a state to resume from

    @torch.no_grad()
    def _encode(self, dataset: Dataset, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the first N = `count` images (N, 3, H, W) in [-1, 1] and their mean latents (N, C, h, w)."""
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
        """Save the autoencoder, with the scaling factor that gives latents unit variance, as SD's UNet expects."""
        self.vae.register_to_config(scaling_factor=float(1 / self._encode(self.train_set, 64)[1].std()))
        self.draw(self.output / "vae.png")
        with atomic_folder(self.output / "vae") as temporary:
            self.vae.eval().save_pretrained(temporary)


class DiffusionStage:
    """Training of the UNet, and of the text encoder from scratch or with sd.train_text_encoder, on latents."""

    measures = ("val_loss",)

    def __init__(self, accelerator: Accelerator, config: ConfigDict, pipe: StableDiffusionPipeline):
        sd = config.sd
        self.accelerator, self.config, self.pipe, self.output = accelerator, config, pipe, Path(sd.output)
        if sd.grid_every:  # else too many steps would be noticed at the first grid
            pipeline.set_schedule(pipe, config.sample.num_steps)
        pipe.vae.to(accelerator.device).float()  # in half precision SD's autoencoder overflows
        real, self.val_set = (data.open_latents(accelerator, sd, pipe.vae, validation) for validation in (False, True))
        if self.val_set:
            real.check_disjoint(self.val_set)
        self.train_set, learned, scores = real, [real], []
        if sd.pool:
            pool, scores = data.open_pool(accelerator, sd, pipe.vae)
            self.train_set, learned = data.MixedLatents(real, pool, scores, sd.real_share), [real, pool]
        self.captions = merge_captions([*learned, *([self.val_set] if self.val_set else [])])
        table = CaptionTable(pipe, self.captions, trained=sd.stage == "unet" or sd.train_text_encoder)
        check_tokens(pipe.tokenizer, self.captions, "captions")
        if sd.gradient_checkpointing:
            pipe.unet.enable_gradient_checkpointing()
        self.loss = NoiseLoss(pipe, table, sd.caption_dropout, sd.min_snr_gamma)
        # a pretrained text encoder learns at a tenth of the UNet's rate
        self.slow = list(table.parameters()) if sd.stage == "finetune" else []
        self.hashes = {"latents": [latents.index["shards"] for latents in learned], "scores": scores}
        # the UNet's initial weights are part of the loss
        self.hashes |= pipeline_fingerprints(pipe, ("scheduler", "text_encoder", "tokenizer", "vae"))
        self.hashes["captions"] = fingerprint({"table": table.table})

    def draw(self, path: Path) -> None:
        """Save a grid of one image per caption."""
        self.pipe.set_progress_bar_config(disable=True)
        embeddings = pipeline.PromptEmbeddings(self.pipe)  # not cached: the text encoder may be in training
        captions, sampling = self.captions[:GRID_CAPTIONS], Sampling.of(self.config.sample)
        save_grid(self.accelerator, self.pipe, embeddings, captions, self.config.seed, sampling, GRID_BATCH, path)

    def finish(self) -> None:
        """Save the UNet for --config.unet_path, its adapters if any, and the whole model if other parts are new."""
        sd, pipe = self.config.sd, self.pipe
        if has_lora(pipe.unet):
            save_lora(pipe.unet, self.output)
            merge_lora(pipe.unet)
        if sd.stage == "unet" or sd.text_encoder == "bert" or sd.train_text_encoder:
            pipeline.save_model(pipe, self.output)
        with atomic_write(self.output / "pretrained_unet.safetensors") as temporary:
            save_file(merged_state_dict(pipe.unet), temporary, metadata=pipeline.unet_metadata(pipe.unet))


Stage = AutoencoderStage | DiffusionStage


def refuse_outcome(sd: ConfigDict) -> None:
    """Raise UserError if the stage is already finished, after removing a state that a kill left behind."""
    outcome = Path(sd.output) / data.OUTCOMES[sd.stage]
    if outcome.exists():
        Path(sd.output, f"{sd.stage}_state.pt").unlink(missing_ok=True)
        raise UserError(f"{str(outcome)!r} exists already; give another folder with --config.sd.output=DIR")


def train(accelerator: Accelerator, config: ConfigDict, stage: Stage) -> None:
    """Train with AdamW, warm-up and EMA weights, which the model has at the end. Raises UserError if not finite."""
    sd, output, is_main = config.sd, Path(config.sd.output), accelerator.is_main_process
    parameters, slow = [weight for weight in stage.loss.parameters() if weight.requires_grad], set(stage.slow)
    groups = [{"params": [weight for weight in parameters if weight not in slow]}]
    if slow:
        groups.append({"params": [weight for weight in parameters if weight in slow], "lr": sd.learning_rate / 10})
    optimizer = make_adamw(groups, sd.use_8bit_adam, lr=sd.learning_rate, weight_decay=1e-2)
    steps = {"num_warmup_steps": sd.warmup_steps, "num_training_steps": sd.num_steps}
    schedule = get_scheduler(data.SCHEDULES[sd.lr_schedule], optimizer, **steps)
    model, optimizer = accelerator.prepare(stage.loss.train(), optimizer)
    average = EMAModel(parameters, decay=sd.ema_decay, foreach=True) if sd.ema_decay > 0 else None
    hashes = stage.hashes | {"initial weights": fingerprint(stage.loss)}
    parts = {"weights": nn.ParameterList(parameters), "optimizer": optimizer, "schedule": schedule, "average": average}
    settings = data.settings_of(config, accelerator.num_processes, hashes)
    state = TrainState(output / f"{sd.stage}_state.pt", settings, scaler=accelerator.scaler, **parts)
    if first := (state.load() or {"step": 0})["step"]:
        logger.info("resuming after step %d of %s", first, state.path)
    if average:
        average.to(accelerator.device)
    log = JsonLines(output / f"{sd.stage}.jsonl", is_main, keep=first + 1, counter="step")
    done = first * sd.gradient_accumulation_steps  # batches
    batches = data.endless_batches(accelerator, sd, config.seed, stage.train_set, done)

    losses, seconds = [], 0.0  # since the last log entry
    hidden = None if is_main else True  # None: only on a terminal
    for step in tqdm(range(first + 1, sd.num_steps + 1), initial=first, total=sd.num_steps, disable=hidden):
        started = time.perf_counter()
        for _ in range(sd.gradient_accumulation_steps):
            batch, draws = next(batches)
            with accelerator.accumulate(model):
                loss = model(batch, draws)
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
            mean = accelerator.reduce(torch.stack(losses).mean(), "mean").item()  # waits for the device
            seconds += time.perf_counter() - started
            speed = sd.batch_size * len(losses) * accelerator.num_processes / seconds
            entry = {"step": step, "loss": mean, "learning_rate": schedule.get_last_lr()[0]}
            memory = round(distributed.peak_memory_gib(), 2)
            log.write(entry | {"images_per_second": round(speed, 2), "peak_memory_gib": memory})
            logger.info("step %d/%d  loss %.4f  %.1f images/s", step, sd.num_steps, mean, speed)
            if not math.isfinite(mean):
                raise UserError(f"the loss is {mean} at step {step}; lower sd.learning_rate, or use bf16, not fp16")
            losses, seconds = [], 0.0
        else:
            seconds += time.perf_counter() - started
        if stage.val_set is not None and (step % sd.val_every == 0 or step == 1 or last):
            with averaged(average, parameters):
                values = validate(accelerator, config, stage)
            log.write({"step": step} | values)
            psnr = f"  PSNR {values['val_psnr']:.2f} dB" if "val_psnr" in values else ""
            logger.info("step %d/%d  validation loss %.5f%s", step, sd.num_steps, values["val_loss"], psnr)
        if sd.save_every and step % sd.save_every == 0 and not last and is_main:
            state.save(step=step)
        if sd.grid_every and step % sd.grid_every == 0:
            with averaged(average, parameters):
                stage.draw(output / f"{sd.stage}_{step:06d}.png")

    if average:
        average.copy_to(parameters)
    if is_main:
        stage.finish()
        state.remove()
    accelerator.wait_for_everyone()


@contextmanager
def averaged(average: EMAModel | None, parameters: list[nn.Parameter]) -> Iterator[None]:
    """Swap in the EMA weights within this context."""
    if average:
        average.store(parameters)
        average.copy_to(parameters)
    yield
    if average:
        average.restore(parameters)


@torch.no_grad()
def validate(accelerator: Accelerator, config: ConfigDict, stage: Stage) -> dict[str, float]:
    """Return the means of `stage.measures` on the validation set; noise and timestep of an image never change."""
    size, count, device = config.sd.batch_size, len(stage.val_set), accelerator.device
    rank, processes = accelerator.process_index, accelerator.num_processes
    sums = torch.zeros(len(stage.measures) + 1, dtype=torch.float64, device=device)  # of the measures; last: images
    stage.loss.eval()
    for number in range(math.ceil(count / (size * processes))):
        start = (number * processes + rank) * size
        items = [stage.val_set[index] for index in range(start, min(start + size, count))]
        if items:
            batch = [tensor.to(device) for tensor in default_collate(items)]
            draws = BatchDraws(config.seed, Stream.VALIDATION, number, size, rank, processes, len(items), device=device)
            with accelerator.autocast():
                values = stage.loss(batch, draws).flatten().tolist()
            sums += torch.tensor([*(value * len(items) for value in values), len(items)], device=device)
    stage.loss.train()
    *totals, images = accelerator.reduce(sums).tolist()
    return dict(zip(stage.measures, (total / images for total in totals), strict=True))


def load_model(config: ConfigDict, device: torch.device) -> StableDiffusionPipeline:
    """Return a new model around the VAE of stage "vae", or the pretrained one with a trainable UNet or adapters."""
    pretrained, sd = config.pretrained, config.sd
    if sd.stage == "unet":  # the tokenizer knows the words of the training captions
        if sd.latents:
            return scratch.build_pipeline(sd, LatentShards(sd.latents).captions)
        return scratch.build_pipeline(sd, KINDS[sd.kind].caption_list(data.find_rows(sd, sd.csv, sd.limit)[0]))
    pipe = pipeline.load_pipeline(pretrained.model, pretrained.revision, config.unet_path, device=device)
    if sd.use_lora:
        for part in (pipe.unet, pipe.text_encoder):  # the VAE stays in float32, in which its latents were encoded
            part.to(distributed.DTYPES[config.mixed_precision])
            check_finite(part.state_dict(), config.unet_path or pretrained.model)
        add_lora(pipe.unet, sd.lora_rank, sd.lora_targets, config.seed)
    else:
        pipe.unet.requires_grad_(True)
    if sd.text_encoder == "bert" and not has_mask(pipe.text_encoder):
        pipe = pipeline.with_bert(pipe, sd.bert, sd.text_tokens)
    if sd.train_text_encoder:
        pipe.text_encoder.float().requires_grad_(True)
    return pipe


def main(_) -> None:
    required = ("sd.output", "pretrained.model") if FLAGS.config.sd.stage == "finetune" else ("sd.output",)
    config = expand_config(FLAGS.config, *required)
    sd = config.sd
    check_ranges(config, SAMPLING if sd.grid_every else {"seed": SEED})
    data.check_settings(sd)
    numerics = config.mixed_precision, config.allow_tf32, sd.gradient_accumulation_steps
    accelerator = distributed.make_accelerator(*numerics, process_timeout=config.process_timeout)
    set_seed(config.seed)  # the same initial weights on all processes
    with distributed.locked_by_main(accelerator, sd.output, "another --config.sd.output"):
        distributed.run_on_main_process(accelerator, refuse_outcome, sd)
        if sd.stage == "vae":
            stage = AutoencoderStage(accelerator, config)
        else:
            stage = DiffusionStage(accelerator, config, load_model(config, accelerator.device))
        train(accelerator, config, stage)
    logger.info("finished; the result is in %s", sd.output)
    accelerator.end_training()


if __name__ == "__main__":
    cli(main)
