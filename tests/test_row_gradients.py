"""Gradients taken while sampling, batches split among threads, and fused adapters: against a plain UNet; train.py."""

from functools import cache

import pytest
import torch
from accelerate import Accelerator
from peft.tuners import lora
from rl_tools import configured
from tiny_unet import make_unet, randomize

from ddpo_pytorch.diffusers_patch.pipeline_with_logprob import Sampling
from ddpo_pytorch.generator.cpu_kernels import fuse_lora, is_fused, run_batch_on_all_cores
from ddpo_pytorch.generator.lora import ATTENTION, add_lora, disabled_lora, lora_parameters
from ddpo_pytorch.generator.pipeline import PromptEmbeddings
from ddpo_pytorch.rollout import sample_trajectories
from ddpo_pytorch.training import setup
from ddpo_pytorch.training.rollout_gradients import RolloutGradients, per_sample_gradients, rollout_gradients

ROWS = 7
# attention, feed-forward, and the time embedding's projection, whose inputs have no dimension of pixels
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.2", "time_emb_proj")


def unet(targets=TARGETS):
    """Return a float64 UNet with random adapters, if any, the same at every call."""
    model = make_unet().requires_grad_(not targets).eval()
    if targets:
        add_lora(model, 4, targets, seed=0)
        randomize(model)
    return model.double()


def predict(model, first: int = 0, end: int = ROWS, **options) -> torch.Tensor:
    """Return the output (rows, 4, 8, 8) for some of ROWS latents with a timestep and text (9, 12) each, float64."""
    generator = torch.Generator().manual_seed(2)
    latents, context = (torch.randn(ROWS, *shape, generator=generator).double() for shape in ((4, 8, 8), (9, 12)))
    latents, timesteps, context = (value[first:end] for value in (latents, torch.arange(ROWS) * 90, context))
    return model(latents, timesteps, encoder_hidden_states=context, return_dict=False, **options)[0]


@cache
def row_by_row() -> list[torch.Tensor]:
    """Return the gradients of the square of each row's output, (ROWS, *weight.shape) of each adapter weight."""
    model = unet()
    losses = [predict(model, row, row + 1).square().sum() for row in range(ROWS)]
    rows = [torch.autograd.grad(loss, lora_parameters(model)) for loss in losses]
    return [torch.stack(found) for found in zip(*rows, strict=True)]


@pytest.mark.parametrize(
    ("threads", "fused", "checkpointing"),
    [(0, False, False), (0, True, False), (0, True, True), (3, False, True), (2, True, False), (3, True, True)],
)
def test_rows_have_their_own_gradients(threads, fused, checkpointing):
    model = unet()
    if fused:
        fuse_lora(model)
    if checkpointing:
        model.enable_gradient_checkpointing()
    if threads:
        run_batch_on_all_cores(model, threads)
    weights = lora_parameters(model)
    with per_sample_gradients(model, ROWS) as found:
        for _ in range(2):  # passes add up
            torch.autograd.grad(predict(model).square().sum(), weights, allow_unused=True)
    for weight, expected in zip(weights, row_by_row(), strict=True):
        torch.testing.assert_close(found[weight], 2 * expected, rtol=1e-9, atol=1e-12)
    assert all(weight.grad is None for weight in weights)

    kept = {weight: rows.clone() for weight, rows in found.items()}
    predict(model).square().sum().backward()
    assert all(torch.equal(found[weight], rows) for weight, rows in kept.items()), "kept after the end"
    for weight, rows in kept.items():
        torch.testing.assert_close(weight.grad, rows.sum(dim=0) / 2, rtol=1e-9, atol=1e-12)


def gradients_of(model) -> torch.Tensor:
    """Return the gradients of all adapter weights as a vector."""
    return torch.cat([weight.grad.flatten() for weight in lora_parameters(model)])


@pytest.fixture
def both_ways(train, script, monkeypatch):
    """Function: an epoch without and with gradients taken while sampling; those of its updates, and the log line."""
    set_up = script.set_up

    def run(sampling, **overrides):
        taken = []

        def recording(config):
            job = set_up(config)
            assert (job.gradients is not None) == sampling
            generator, step = torch.Generator().manual_seed(0), job.guard.step
            for name, weight in job.pipe.unet.named_parameters():
                if "lora_B" in name:  # begins at 0, where the gradient of the other half is 0
                    weight.data.normal_(std=0.02, generator=generator)

            def record_and_step(parameters):
                taken.append(gradients_of(job.pipe.unet))
                return step(parameters)

            job.guard.step = record_and_step
            return job

        monkeypatch.setattr(script, "set_up", recording)
        chosen = {"run_name": str(sampling), "train__gradients_while_sampling": sampling, "num_epochs": 1}
        _, (line,) = train(**overrides | chosen)
        return taken, line

    return lambda **overrides: [run(sampling, **overrides) for sampling in (False, True)]


HALVED = {"train__batch_size": 2, "sample__batch_size": 2, "sample__num_batches_per_epoch": 4}


@pytest.mark.parametrize(
    ("overrides", "updates"),
    [
        (HALVED | {"train__gradient_accumulation_steps": 2, "train__num_inner_epochs": 2}, 4),
        (
            {"sample__guidance_scale": 1.0, "train__timestep_window": (0.34, 1.0), "train__adv_clip_max": 0.3}
            | {"sample__images_per_prompt": 4, "train__advantage": "group"},
            2,
        ),
        # 8 samples, drawn 3, 3 and 2 at once
        ({"train__batch_size": 1, "train__timesteps_per_forward": 3, "train__gradient_accumulation_steps": 8}, 1),
    ],
    ids=lambda value: "-".join(key.split("__")[-1] for key in value) if isinstance(value, dict) else None,
)
def test_same_gradients(both_ways, overrides, updates):
    (expected, line), (actual, sampled_line) = both_ways(**overrides)
    assert len(expected) == len(actual) == updates
    for number, (one, other) in enumerate(zip(expected, actual, strict=True)):
        # From the second update on, weights differ by what Adam makes of the first one's rounding. Where samples are
        # drawn in batches of another size, trajectories do (3.2e-5 of the gradient at most, without AVX).
        limit = 1e-2 if number else 1e-4 if "train__timesteps_per_forward" in overrides else 1e-5
        assert (one - other).norm() < limit * one.norm() and one.norm() > 0
    # passes of other sizes may round otherwise
    assert sampled_line["first_ratio_deviation"] <= (1e-6 if "train__timesteps_per_forward" in overrides else 0)
    for key, value in line.items():
        if key.startswith("reward") or key in ("global_step", "advantage_std", "loss"):
            assert sampled_line[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key


@pytest.mark.parametrize("without_autocast", [False, True])
def test_same_gradients_in_half_precision(both_ways, without_autocast, monkeypatch):
    """The window begins after steps without gradients, whose casts of weights must not be used again.

    Rounding to 8 bits puts either gradient of this model .4 of its norm away from the one in float32 on the same
    trajectories (measured, guidance is 5); from each other they are .05 to .10 away, by the instruction set. Casts used
    again would carry no gradient at all: 1. On a GPU there is no autocast, and adapters are cast layer by layer.
    """
    if without_autocast:
        monkeypatch.setattr(setup, "in_half_on_gpu", lambda *_: True)
    few = {"sample__num_batches_per_epoch": 1, "train__timestep_window": (0.34, 1.0)}
    (expected, _), (actual, line) = both_ways(mixed_precision="bf16", **few)
    assert (expected[0] - actual[0]).norm() < 0.4 * expected[0].norm() and expected[0].norm() > 0
    assert line["first_ratio_deviation"] == 0.0


def test_where_it_is_possible(settings):
    excluding = {"train.gradients_while_sampling": False, "train.timestep_fraction": 0.67, "train.kl_coef": 0.1}
    excluding |= {"train.lora_targets": ("to_q", "conv1"), "use_lora": False}
    for field, value in [("train.timestep_window", (0.0, 0.5)), *excluding.items()]:
        config = configured(settings, {field: value})
        pipe = setup.load_policy(config, torch.float32, torch.device("cpu"))
        sizes = setup.batch_sizes(config.sample, config.train, 1)
        found = rollout_gradients(Accelerator(cpu=True), pipe.unet, sizes, config.sample, config.train)
        assert (found is None) == (field in excluding), field


def test_a_gradient_scaler_takes_part(pipe):
    """As with mixed_precision fp16 on a GPU: gradients are the scale times as large until they are unscaled."""
    pipe.set_progress_bar_config(disable=True)
    add_lora(pipe.unet, 2, ATTENTION, seed=0)
    table, found = PromptEmbeddings(pipe), []
    for scale in (None, 1024.0):
        accelerator = Accelerator(cpu=True)
        accelerator.scaler = scale and torch.amp.GradScaler("cpu", init_scale=scale)
        gradients = RolloutGradients(accelerator, pipe.unet, 3, 2, (0, 2), 2)
        for first, prompts in ((0, ["one", "two"]), (2, ["three"])):
            noise = [torch.Generator().manual_seed(first + i) for i in range(len(prompts))]
            with gradients.recording(first, len(prompts)) as taking:
                sample_trajectories(pipe, table, prompts, noise, Sampling(2, 3.0, 1.0), taking)
        gradients.set_gradients(torch.tensor([1.0, -2.0, 0.5]))
        found.append(gradients_of(pipe.unet))
    plain, scaled = found
    torch.testing.assert_close(scaled, 1024 * plain, rtol=1e-5, atol=1e-9)
    accelerator.scaler.unscale_(torch.optim.SGD(lora_parameters(pipe.unet)))
    torch.testing.assert_close(gradients_of(pipe.unet), plain, rtol=1e-5, atol=1e-12)
    assert plain.norm() > 0


def assert_close(models, rows, **options):
    """Assert that two models have the same outputs and gradients of a loss that weights every output."""
    weights = torch.randn(rows, 4, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    outputs, gradients = [], []
    for model in models:
        output = predict(model, end=rows, **options)
        (output * weights).sum().backward()
        outputs.append(output)
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-10, atol=1e-12)
    assert len(gradients[0]) > 10
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-8, atol=1e-10)
    with torch.no_grad():
        drawn = predict(models[1], end=rows, **options)
    assert torch.equal(drawn, outputs[1]) and not drawn.requires_grad


@pytest.mark.parametrize("lora, rows, threads, masked", [(True, 7, 3, False), (False, 6, 2, True), (True, 1, 2, True)])
def test_outputs_and_gradients_are_those_of_the_whole_batch(lora, rows, threads, masked):
    models = [unet(ATTENTION if lora else ()) for _ in range(2)]
    run_batch_on_all_cores(models[1], threads)
    # text of different lengths, as a BERT masks it
    mask = {"encoder_attention_mask": torch.arange(9) < 2 + torch.arange(rows)[:, None]} if masked else {}
    assert_close(models, rows, **mask)


def test_fused_adapters_compute_what_peft_computes():
    models = unet(ATTENTION), unet(ATTENTION)
    fuse_lora(models[1])
    assert_close(models, 3)
    with torch.no_grad(), disabled_lora(models[0]), disabled_lora(models[1]):
        without = [predict(model) for model in models]
    assert torch.equal(*without) and not torch.allclose(without[0], predict(models[0]))


def test_fused_adapters_leave_half_precision_to_peft():
    """There, W + up down would be W again: an update of a thousandth of W's last digit still changes the output."""
    model = unet(ATTENTION).bfloat16()
    for parameter in lora_parameters(model):
        parameter.data = parameter.data.float() * 1e-3
    layer = model.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(3)).bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = layer(x)
        fuse_lora(model)
        assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("device, tf32, fused", [("cpu", True, True), ("cuda", True, False), ("cuda", False, True)])
def test_adapters_are_fused_only_where_tf32_cannot_round_them_away(settings, monkeypatch, device, tf32, fused):
    load = setup.load_pipeline
    monkeypatch.setattr(setup, "load_pipeline", lambda *given: load(*given[:-1], torch.device("cpu")))
    pipe = setup.load_policy(configured(settings, {"allow_tf32": tf32}), torch.float32, torch.device(device))
    layers = [module for module in pipe.unet.modules() if isinstance(module, lora.Linear)]
    assert len(layers) > 10 and {is_fused(layer) for layer in layers} == {fused}
