"""Gradients of each row from one backward pass, against a backward pass for each row."""

import pytest
import torch

from ddpo_pytorch.generator import from_scratch as scratch
from ddpo_pytorch.generator.cpu_kernels import fuse_lora, run_batch_on_all_cores
from ddpo_pytorch.generator.lora import add_lora, lora_parameters
from ddpo_pytorch.training.rollout_gradients import has_per_sample_gradients, per_sample_gradients

ROWS = 5
# attention, feed-forward, and the time embedding's projection, whose inputs have no dimension of pixels
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.2", "time_emb_proj")


def unet(dtype: torch.dtype, targets=TARGETS):
    torch.manual_seed(0)
    model = scratch.build_unet((16, 32), (False, True), 32, 16).eval().requires_grad_(False)
    add_lora(model, 4, targets, seed=0)
    model.to(dtype)
    for parameter in lora_parameters(model):
        parameter.data = parameter.data.to(torch.promote_types(dtype, torch.float32))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return model


def predict(model, rows: slice, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(ROWS, 4, 16, 16, generator=generator, dtype=torch.float64).to(dtype)
    context = torch.randn(ROWS, 9, 32, generator=generator, dtype=torch.float64).to(dtype)
    timesteps = 90 * torch.arange(ROWS)
    return model(latents[rows], timesteps[rows], encoder_hidden_states=context[rows], return_dict=False)[0]


def row_by_row(dtype: torch.dtype) -> list[torch.Tensor]:
    """The gradients of the square of each row's output, (ROWS, *weight.shape) of each adapter weight."""
    model = unet(dtype)
    rows = []
    for row in range(ROWS):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            output = predict(model, slice(row, row + 1), dtype)
        rows.append(torch.autograd.grad(output.double().square().sum(), lora_parameters(model)))
    return [torch.stack(found) for found in zip(*rows, strict=True)]


@pytest.mark.parametrize(
    ("threads", "fused", "checkpointing"),
    [(0, False, False), (0, True, False), (0, True, True), (3, False, True), (2, True, False), (3, True, True)],
)
def test_rows_have_their_own_gradients(threads, fused, checkpointing):
    model = unet(torch.float64)
    if fused:
        fuse_lora(model)
    if checkpointing:
        model.enable_gradient_checkpointing()
    if threads:
        run_batch_on_all_cores(model, threads)
    weights = lora_parameters(model)
    with per_sample_gradients(model, ROWS) as found:
        for _ in range(2):  # passes add up
            output = predict(model, slice(None), torch.float64)
            torch.autograd.grad(output.square().sum(), weights, allow_unused=True)
    for weight, expected in zip(weights, row_by_row(torch.float64), strict=True):
        torch.testing.assert_close(found[weight], 2 * expected, rtol=1e-9, atol=1e-12)
    assert all(weight.grad is None for weight in weights)

    kept = {weight: rows.clone() for weight, rows in found.items()}
    predict(model, slice(None), torch.float64).square().sum().backward()
    assert all(torch.equal(found[weight], rows) for weight, rows in kept.items()), "kept after the end"
    for weight, rows in kept.items():
        torch.testing.assert_close(weight.grad, rows.sum(dim=0) / 2, rtol=1e-9, atol=1e-12)


def test_rows_in_half_precision():
    """bfloat16 has 8 bits: of each tensor's gradients the rows differ from those taken alone by rounding."""
    model = unet(torch.bfloat16)
    fuse_lora(model)
    with per_sample_gradients(model, ROWS) as found, torch.autocast("cpu", torch.bfloat16):
        output = predict(model, slice(None), torch.bfloat16)
        torch.autograd.grad(output.double().square().sum(), lora_parameters(model), allow_unused=True)
    for weight, expected in zip(lora_parameters(model), row_by_row(torch.bfloat16), strict=True):
        assert found[weight].dtype == torch.float32
        assert (found[weight] - expected).norm() < 0.03 * expected.norm() and expected.norm() > 0


def test_only_adapters_of_linear_layers_have_them():
    assert has_per_sample_gradients(unet(torch.float32))
    assert not has_per_sample_gradients(unet(torch.float32, ("to_q", "conv1")))
    assert not has_per_sample_gradients(scratch.build_unet((16, 32), (False, True), 32, 16))
