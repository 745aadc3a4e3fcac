"""Stage (i)'s losses against their formulas, and random numbers that do not depend on the number of processes."""

import itertools

import pytest
import timm
import torch
from refusals import refused
from safetensors.torch import save_file

from ddpo_pytorch.data.isic import CAPTIONS
from ddpo_pytorch.generator.finetune_losses import AutoencoderLoss, CaptionTable, NoiseLoss, PerceptualDistance
from ddpo_pytorch.generator.pipeline import encode_prompts, load_pipeline
from ddpo_pytorch.utils.randomness import BatchDraws, EndlessBatches, Stream


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_noise_loss_is_the_weighted_error_of_the_prediction(pipe, kind):
    pipe.scheduler.register_to_config(prediction_type=kind)
    loss = NoiseLoss(pipe, CaptionTable(pipe, CAPTIONS, trained=False), min_snr_gamma=1.0)
    generator, numbers = torch.Generator().manual_seed(0), torch.tensor([0, 31, 32])
    mean, logvar = (torch.randn(3, 4, 16, 16, generator=generator) for _ in range(2))
    judges, draws = torch.tensor([1.0, 0.5, 2.0]), BatchDraws(0, Stream.NOISE, 1, 3)
    latents = (mean + draws.normal(4, 16, 16) * (logvar / 2).exp()) * pipe.vae.config.scaling_factor
    noise, timesteps = draws.normal(4, 16, 16), draws.integers(1000)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha_bar = (1 - betas).cumprod(0)[timesteps].float().reshape(3, 1, 1, 1)
    signal, sigma, snr = alpha_bar.sqrt(), (1 - alpha_bar).sqrt(), (alpha_bar / (1 - alpha_bar)).flatten()
    with torch.no_grad():
        embeds = encode_prompts(pipe, [CAPTIONS[0], CAPTIONS[31], ""])
        predicted = pipe.unet(signal * latents + sigma * noise, timesteps, embeds).sample
        target = {"epsilon": noise, "v_prediction": signal * noise - sigma * latents, "sample": latents}[kind]
        errors = ((predicted - target) ** 2).mean(dim=(1, 2, 3)) * judges
        divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": 1}[kind]
        for training, expected in ((False, errors), (True, errors * snr.clamp(max=1) / divisor)):
            value = loss.train(training)((mean, logvar, numbers, judges), BatchDraws(0, Stream.NOISE, 1, 3))
            torch.testing.assert_close(value, expected.mean(), rtol=1e-4, atol=0)


def test_captions_are_dropped_in_training_only(pipe, monkeypatch):
    seen = []
    table = CaptionTable(pipe, CAPTIONS, trained=False)
    monkeypatch.setattr(table, "forward", lambda numbers: seen.append(numbers) or table.table[numbers[:1]])
    monkeypatch.setattr(pipe.unet, "forward", lambda noisy, timesteps, embeds, return_dict: (noisy,))
    loss = NoiseLoss(pipe, table, caption_dropout=0.25)
    batch = torch.zeros(400, 4, 2, 2), torch.zeros(400, 4, 2, 2), torch.arange(400) % 32
    for mode in (True, False):
        loss.train(mode)(batch, BatchDraws(0, Stream.NOISE, 1, 400))
    assert 0.18 < (seen[0] == 32).float().mean() < 0.32 and torch.equal(seen[1], batch[2])


def test_a_trained_text_encoder_learns_without_dropout(bert_pipeline_dir):
    pipe = load_pipeline(bert_pipeline_dir)
    for part in pipe.text_encoder.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.5
    pipe.text_encoder.requires_grad_(True)
    table = NoiseLoss(pipe, CaptionTable(pipe, CAPTIONS, trained=True)).train().captions
    embeds = table(torch.tensor([3, 32]))
    torch.testing.assert_close(embeds, encode_prompts(pipe, [CAPTIONS[3], ""]), rtol=1e-5, atol=1e-5)
    embeds.sum().backward()
    assert pipe.text_encoder.embeddings.word_embeddings.weight.grad.abs().sum() > 0


def test_autoencoder_loss_and_its_crops(pipe):
    images, draws = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8), BatchDraws(0, Stream.NOISE, 1, 2)
    scaled, noise = images / 127.5 - 1, draws.normal(4, 16, 16)
    with torch.no_grad():
        posterior = pipe.vae.encode(scaled).latent_dist
        decoded = pipe.vae.decode(posterior.mean + posterior.std * noise).sample
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).sum(dim=(1, 2, 3)).mean()
        expected = (decoded - scaled).abs().mean() + 2 * ((decoded - scaled) ** 2).mean() + 0.1 * kl
        loss = AutoencoderLoss(pipe.vae, 0.1)([images], BatchDraws(0, Stream.NOISE, 1, 2))
        psnr = 10 * torch.log10(4 / ((decoded.clamp(-1, 1) - scaled) ** 2).mean(dim=(1, 2, 3)))
        validated = AutoencoderLoss(pipe.vae, 0.1).eval()([images], BatchDraws(0, Stream.NOISE, 1, 2))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(validated, torch.stack([expected, psnr.mean()]), rtol=1e-4, atol=0)
    # crops are squares of the images at random places
    places = torch.arange(8 * 8).reshape(1, 1, 8, 8).expand(200, 3, 8, 8)
    crops = AutoencoderLoss(pipe.vae, 0.0, crop=4)._cut(places, BatchDraws(0, Stream.NOISE, 1, 200))
    assert torch.equal(crops - crops[:, :, :1, :1], (places - places[:, :, :1, :1])[:, :, :4, :4])
    assert {int(corner) for corner in crops[:, 0, 0, 0]} == {8 * y + x for y in range(5) for x in range(5)}


def test_perceptual_distance(tmp_path):
    file = tmp_path / "tinynet_e.safetensors"
    save_file({name: value.half() for name, value in timm.create_model("tinynet_e").state_dict().items()}, file)
    distance = PerceptualDistance(str(file)).train()
    features = timm.create_model("tinynet_e", features_only=True, out_indices=(0, 1, 2, 3)).eval()
    features.load_state_dict(distance.network.state_dict(), strict=False)
    one, other = torch.rand(2, 2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = (torch.tensor(distance.network.pretrained_cfg[name]).reshape(3, 1, 1) for name in ("mean", "std"))
    expected = 0.0
    for a, b in zip(*(features(((x + 1) / 2 - mean) / std) for x in (one, other)), strict=True):
        cosine = torch.nn.functional.cosine_similarity(a, b, dim=1)
        expected += (2 - 2 * cosine).mean()  # the square of the distance of unit vectors
    torch.testing.assert_close(distance(one, other), expected, rtol=1e-3, atol=0)
    assert not any(weight.requires_grad for weight in distance.parameters())
    renamed = file.rename(tmp_path / "resnet18.safetensors")
    for network in (str(renamed), "no_such_network", str(tmp_path / "absent.safetensors")):
        refused(network, PerceptualDistance, network)


def test_the_decoder_learns_against_a_discriminator_with_a_gradient_of_the_chosen_size(pipe):
    """And the discriminator from the hinge loss alone, the encoder not at all."""
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    vae, gradients = pipe.vae.requires_grad_(True), []
    torch.manual_seed(0)
    for coef in (0.0, 0.5):
        loss = AutoencoderLoss(vae, 0.1, adversarial_coef=coef)
        vae.zero_grad()
        loss([images], BatchDraws(0, Stream.NOISE, 1, 2)).backward()
        gradients.append(vae.decoder.conv_out.weight.grad.clone())
    torch.testing.assert_close((gradients[1] - gradients[0]).norm(), 0.5 * gradients[0].norm(), rtol=0.05, atol=0)
    assert all(weight.grad is None for part in (vae.encoder, vae.quant_conv) for weight in part.parameters())
    found = [weight.grad.clone() for weight in loss.discriminator.parameters()]
    noise = BatchDraws(0, Stream.NOISE, 1, 2).normal(4, 8, 8)
    with torch.no_grad():
        posterior = vae.encode(images / 127.5 - 1).latent_dist
        decoded = vae.decode(posterior.mean + posterior.std * noise).sample
    real, fake = loss.discriminator(images / 127.5 - 1), loss.discriminator(decoded)
    hinge = ((1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()) / 2
    expected = torch.autograd.grad(hinge, loss.discriminator.parameters())
    torch.testing.assert_close(found, list(expected), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("processes", [1, 4])
def test_batches_and_draws_do_not_depend_on_the_processes(processes):
    size = 8 // processes
    parts = [iter(EndlessBatches(50, size, seed=3, rank=rank, processes=processes)) for rank in range(processes)]
    whole = [list(itertools.chain.from_iterable(next(part) for part in parts)) for _ in range(13)]
    alone = list(itertools.islice(EndlessBatches(50, 8, seed=3), 13))
    assert whole == alone
    assert len(set(itertools.chain.from_iterable(alone[:6]))) == 48  # no image twice before a new permutation
    assert alone[:6] != alone[6:12]
    assert list(itertools.islice(EndlessBatches(50, 8, seed=3, first=7), 6)) == alone[7:]

    draws = [BatchDraws(0, Stream.NOISE, 5, size, rank, processes) for rank in range(processes)]
    reference = BatchDraws(0, Stream.NOISE, 5, 8)
    for draw in (lambda d: d.normal(2, 3), lambda d: d.uniform(), lambda d: d.integers(1000)):
        assert torch.equal(torch.cat([draw(d) for d in draws]), draw(reference))
    assert torch.equal(BatchDraws(0, Stream.NOISE, 5, 8, kept=3).normal(2, 3), BatchDraws(0, 1, 5, 8).normal(2, 3)[:3])
    refused("50 items are fewer than a batch of 60 for 1 processes", EndlessBatches, 50, 60, seed=0)
