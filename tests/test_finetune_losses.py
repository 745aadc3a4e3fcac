"""Stage (i)'s losses against their formulas, and random numbers that do not depend on the number of processes."""

import itertools

import pytest
import torch
from diffusers import DDPMScheduler

from ddpo_pytorch.data.isic import CAPTIONS
from ddpo_pytorch.generator.finetune_losses import AutoencoderLoss, CaptionTable, NoiseLoss, min_snr_weights
from ddpo_pytorch.generator.from_scratch import SCHEDULE
from ddpo_pytorch.generator.latents import sample_posterior
from ddpo_pytorch.generator.lora import add_lora, lora_parameters, merged_state_dict
from ddpo_pytorch.generator.pipeline import encode_prompts, load_pipeline
from ddpo_pytorch.utils.randomness import BatchDraws, EndlessBatches, Stream


@pytest.fixture
def pipe(tiny_pipeline_dir):
    return load_pipeline(tiny_pipeline_dir)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weights(kind):
    settings = {"beta_start", "beta_end", "beta_schedule"}
    schedule = DDPMScheduler(prediction_type=kind, **{key: SCHEDULE[key] for key in settings})
    timesteps = torch.tensor([0, 200, 500, 999])
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha_bar = (1 - betas).cumprod(0)[timesteps]
    snr = alpha_bar / (1 - alpha_bar)
    capped = torch.minimum(snr, torch.tensor(5.0))
    expected = {"epsilon": capped / snr, "v_prediction": capped / (snr + 1), "sample": capped}[kind]
    torch.testing.assert_close(min_snr_weights(schedule, timesteps, 5.0).double(), expected, rtol=1e-4, atol=1e-7)


def test_noise_loss_is_the_weighted_error_of_the_prediction(pipe):
    torch.manual_seed(0)
    latents, noise, timesteps = torch.randn(3, 4, 16, 16), torch.randn(3, 4, 16, 16), torch.tensor([5, 400, 900])
    numbers = torch.tensor([0, 31, 32])
    loss = NoiseLoss(pipe, CaptionTable(pipe, CAPTIONS, trained=False), min_snr_gamma=1.0)
    alpha_bar = pipe.scheduler.alphas_cumprod[timesteps].reshape(3, 1, 1, 1)
    noisy = alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * noise
    with torch.no_grad():
        predicted = pipe.unet(noisy, timesteps, encode_prompts(pipe, [CAPTIONS[0], CAPTIONS[31], ""])).sample
        errors = ((predicted - noise) ** 2).mean(dim=(1, 2, 3))
        snr = (alpha_bar / (1 - alpha_bar)).flatten()
        plain, weighted = (loss.train(on)(latents, noise, timesteps, numbers) for on in (False, True))
    torch.testing.assert_close(plain, errors.mean(), rtol=1e-5, atol=0)
    torch.testing.assert_close(weighted, (errors * snr.clamp(max=1) / snr).mean(), rtol=1e-4, atol=0)


def test_a_trained_text_encoder_is_called_and_gets_gradients(pipe):
    pipe.text_encoder.requires_grad_(True)
    frozen, trained = (CaptionTable(pipe, CAPTIONS, trained=on) for on in (False, True))
    numbers = torch.tensor([3, 32])
    torch.testing.assert_close(frozen(numbers), trained(numbers), rtol=1e-4, atol=1e-5)
    trained(numbers).sum().backward()
    assert next(pipe.text_encoder.parameters()).grad is not None
    assert not list(frozen.parameters()) and len(list(trained.parameters())) == len(
        list(pipe.text_encoder.parameters())
    )


def test_captions_are_dropped_in_training_only(pipe):
    seen = []
    loss = NoiseLoss(pipe, CaptionTable(pipe, CAPTIONS, trained=False), caption_dropout=0.25)
    batch = torch.zeros(400, 4, 16, 16), torch.zeros(400, 4, 16, 16), torch.arange(400) % 32
    for mode in (True, False):
        loss.train(mode).batch_loss(
            lambda *args: seen.append(args) or args[0].sum(), batch, BatchDraws(0, Stream.NOISE, 1, 400)
        )
    dropped = [(arguments[3] == 32).float().mean() for arguments in seen]
    assert 0.18 < dropped[0] < 0.32 and dropped[1] == 0
    latents, noise, timesteps, _ = seen[1]
    assert torch.equal(latents, seen[0][0]) and torch.equal(noise, seen[0][1]) and torch.equal(timesteps, seen[0][2])
    assert latents.std() == pytest.approx(pipe.vae.config.scaling_factor, rel=0.02)  # mean 0, variance exp(0)
    assert timesteps.min() < 50 and timesteps.max() > 950


def test_autoencoder_loss(pipe):
    torch.manual_seed(0)
    images, noise = torch.rand(2, 3, 64, 64) * 2 - 1, torch.randn(2, 4, 16, 16)
    with torch.no_grad():
        posterior = pipe.vae.encode(images).latent_dist
        decoded = pipe.vae.decode(posterior.mean + posterior.std * noise).sample
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).sum(dim=(1, 2, 3)).mean()
        expected = (decoded - images).abs().mean() + 2 * ((decoded - images) ** 2).mean() + 0.1 * kl
        torch.testing.assert_close(AutoencoderLoss(pipe.vae, 0.1)(images, noise), expected, rtol=1e-5, atol=0)
    assert torch.equal(sample_posterior(posterior.mean, posterior.logvar, noise * 0), posterior.mean)


def test_merged_weights_are_the_sum(pipe):
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    add_lora(pipe.unet, 2, ("to_q", "conv1"), seed=0)
    assert all(value.equal(before[name]) for name, value in merged_state_dict(pipe.unet).items())
    for parameter in lora_parameters(pipe.unet):
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    merged = merged_state_dict(pipe.unet)
    assert merged.keys() == before.keys()
    changed = {name for name, value in merged.items() if not value.equal(before[name])}
    assert changed == {name for name in before if name.endswith(("to_q.weight", "conv1.weight"))}
    name, layer = next((n, module) for n, module in pipe.unet.named_modules() if n.endswith("attn1.to_q"))
    up, down = layer.lora_B["default"].weight, layer.lora_A["default"].weight
    torch.testing.assert_close(merged[f"{name}.weight"], before[f"{name}.weight"] + up @ down)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_batches_and_draws_do_not_depend_on_the_processes(processes):
    size = 8 // processes
    parts = [iter(EndlessBatches(50, size, seed=3, rank=rank, processes=processes)) for rank in range(processes)]
    whole = [list(itertools.chain.from_iterable(next(part) for part in parts)) for _ in range(13)]
    alone = list(itertools.islice(EndlessBatches(50, 8, seed=3), 13))
    assert whole == alone
    assert len(set(itertools.chain.from_iterable(alone[:6]))) == 48  # no image twice before a new permutation
    assert alone[:6] != alone[6:12]
    late = list(itertools.islice(EndlessBatches(50, 8, seed=3, first=7), 6))
    assert late == alone[7:]

    draws = [BatchDraws(0, Stream.NOISE, 5, size, rank, processes) for rank in range(processes)]
    reference = BatchDraws(0, Stream.NOISE, 5, 8)
    for draw in (lambda d: d.normal(2, 3), lambda d: d.uniform(), lambda d: d.integers(1000)):
        assert torch.equal(torch.cat([draw(d) for d in draws]), draw(reference))
    assert torch.equal(BatchDraws(0, Stream.NOISE, 5, 8, kept=3).normal(2, 3), BatchDraws(0, 1, 5, 8).normal(2, 3)[:3])
    with pytest.raises(ValueError, match="50 items are fewer than a batch of 60 for 1 processes"):
        EndlessBatches(50, 60, seed=0)
