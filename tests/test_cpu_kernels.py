"""A UNet whose batches are split among threads, and one with fused adapters, against the plain one."""

import pytest
import torch
from peft.tuners import lora
from rl_tools import configured

from ddpo_pytorch.generator import from_scratch as scratch
from ddpo_pytorch.generator.cpu_kernels import fuse_lora, is_fused, run_batch_on_all_cores
from ddpo_pytorch.generator.lora import ATTENTION, add_lora, disabled_lora
from ddpo_pytorch.training import setup


def unet(lora: bool):
    torch.manual_seed(0)
    unet = scratch.build_unet((16, 32), (False, True), 32, 16).double().eval()
    if lora:
        unet.requires_grad_(False)
        add_lora(unet, 4, ATTENTION, seed=0)
        unet.double()
        for name, parameter in unet.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    return unet


def inputs(rows):
    """Latents (rows, 4, 16, 16), timesteps (rows,) and text embeddings (rows, 9, 32), float64."""
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(rows, 4, 16, 16, generator=generator, dtype=torch.float64)
    return latents, torch.arange(rows) * 90, torch.randn(rows, 9, 32, generator=generator, dtype=torch.float64)


def assert_close(models, rows, **options):
    """Assert that two models have the same outputs and gradients of a loss that weights every output."""
    latents, timesteps, context = inputs(rows)
    weights = torch.randn(latents.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    outputs, gradients = [], []
    for model in models:
        output = model(latents, timesteps, encoder_hidden_states=context, return_dict=False, **options)[0]
        (output * weights).sum().backward()
        outputs.append(output)
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-10, atol=1e-12)
    assert len(gradients[0]) > 10
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-8, atol=1e-10)
    with torch.no_grad():
        drawn = models[1](latents, timesteps, encoder_hidden_states=context, return_dict=False, **options)[0]
    assert torch.equal(drawn, outputs[1]) and not drawn.requires_grad


@pytest.mark.parametrize(
    ("lora", "rows", "threads", "masked"), [(True, 7, 3, False), (False, 6, 2, True), (True, 1, 2, True)]
)
def test_outputs_and_gradients_are_those_of_the_whole_batch(lora, rows, threads, masked):
    models = unet(lora), unet(lora)
    run_batch_on_all_cores(models[1], threads)
    # text of different lengths, as a BERT masks it
    mask = {"encoder_attention_mask": torch.arange(9) < 2 + torch.arange(rows)[:, None]} if masked else {}
    assert_close(models, rows, **mask)


def test_fused_adapters_compute_what_peft_computes():
    models = unet(True), unet(True)
    fuse_lora(models[1])
    assert_close(models, 3)
    latents, timesteps, context = inputs(3)
    without, adapted = [], models[0](latents, timesteps, context).sample
    for model in models:
        with torch.no_grad(), disabled_lora(model):
            without.append(model(latents, timesteps, context).sample)
    assert torch.equal(*without) and not torch.allclose(without[0], adapted)


def test_fused_adapters_leave_half_precision_to_peft():
    """There, W + up down would be W again: an update of a thousandth of W's last digit still changes the output."""
    model = unet(True).bfloat16()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float() * 1e-3
    layer = model.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(3)).bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = layer(x)
        fuse_lora(model)
        assert torch.equal(layer(x), expected)


@pytest.mark.parametrize(
    ("device", "tf32", "fused"), [("cpu", True, True), ("cuda", True, False), ("cuda", False, True)]
)
def test_adapters_are_fused_only_where_tf32_cannot_round_them_away(settings, monkeypatch, device, tf32, fused):
    load = setup.load_pipeline
    monkeypatch.setattr(setup, "load_pipeline", lambda *given: load(*given[:-1], torch.device("cpu")))
    config = configured(settings, {"allow_tf32": tf32})
    pipe = setup.load_policy(config, torch.float32, torch.device(device))
    layers = [module for module in pipe.unet.modules() if isinstance(module, lora.Linear)]
    assert len(layers) > 10 and {is_fused(layer) for layer in layers} == {fused}
