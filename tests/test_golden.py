"""The numbers of the official implementation (golden/README.md), reproduced with today's libraries.

The golden folder is the shared one's, or any other of the same form: nothing here is specific to its weights.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file

from ddpo_pytorch.diffusers_patch.ddim_with_logprob import ddim_step_with_logprob
from ddpo_pytorch.diffusers_patch.pipeline_with_logprob import pipeline_with_logprob
from ddpo_pytorch.generator.lora import load_lora, lora_parameters, lora_state_dict
from ddpo_pytorch.generator.pipeline import encode_prompts, guided_noise_prediction, load_pipeline
from ddpo_pytorch.ppo import ppo_loss
from ddpo_pytorch.stat_tracking import PerPromptStatTracker


@pytest.fixture(scope="module")
def golden_dir(shared: Path) -> Path:
    return shared / "golden"


@pytest.fixture(scope="module")
def settings(golden_dir: Path) -> dict:
    return json.loads((golden_dir / "golden.json").read_text())


@pytest.fixture(scope="module")
def numbers(golden_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(golden_dir / "golden.safetensors")


@pytest.fixture
def pipe(golden_dir: Path):
    return load_pipeline(golden_dir / "pipeline")


@pytest.fixture
def lora_pipe(pipe, golden_dir: Path):
    load_lora(pipe.unet, golden_dir / "legacy_lora")
    return pipe


def scheduler_of(golden_dir: Path, prediction_type: str, steps: int) -> DDIMScheduler:
    config = json.loads((golden_dir / "pipeline/scheduler/scheduler_config.json").read_text())
    scheduler = DDIMScheduler.from_config(config, prediction_type=prediction_type)
    scheduler.set_timesteps(steps)
    return scheduler


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Norm of the difference over the norm of the golden tensor."""
    return ((ours - theirs).norm() / theirs.norm()).item()


def ddim_cases(numbers: dict[str, torch.Tensor]) -> list[tuple[str, str, float]]:
    """(key prefix, prediction type, eta) of every DDIM setting in the golden file."""
    names = sorted(key.removesuffix("/log_prob") for key in numbers if re.fullmatch("ddim/.+/log_prob", key))
    cases = [(name, name.split("/")[1], float(name.split("/eta")[1])) for name in names]
    assert {prediction_type for _, prediction_type, _ in cases} == {"epsilon", "v_prediction", "sample"}
    return cases


def test_ddim_log_prob(golden_dir, numbers):
    for name, prediction_type, eta in ddim_cases(numbers):
        scheduler = scheduler_of(golden_dir, prediction_type, len(numbers["ddim/timesteps"]))
        assert torch.equal(scheduler.timesteps, numbers["ddim/timesteps"])
        inputs = [numbers[f"ddim/{key}"] for key in ("model_output", "t", "sample")]
        scored, log_prob = ddim_step_with_logprob(scheduler, *inputs, eta, prev_sample=numbers["ddim/prev_sample"])
        assert torch.equal(scored, numbers["ddim/prev_sample"])
        torch.testing.assert_close(log_prob, numbers[f"{name}/log_prob"], rtol=1e-5, atol=1e-5)


def test_ddim_seeded_step(golden_dir, settings, numbers):
    for name, prediction_type, eta in ddim_cases(numbers):
        scheduler = scheduler_of(golden_dir, prediction_type, len(numbers["ddim/timesteps"]))
        inputs = [numbers[f"ddim/{key}"] for key in ("model_output", "t", "sample")]
        generator = torch.Generator().manual_seed(settings["seed"] + 2)
        drawn = ddim_step_with_logprob(scheduler, *inputs, eta, generator=generator)
        expected = numbers[f"{name}/seeded_prev_sample"], numbers[f"{name}/seeded_log_prob"]
        torch.testing.assert_close(drawn, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("folder", "key"), [("legacy_lora", ""), ("legacy_lora_after_step", "_after_step")])
def test_legacy_lora_output(pipe, golden_dir, numbers, folder, key):
    load_lora(pipe.unet, golden_dir / folder)
    with torch.no_grad():
        inputs = numbers["unet/sample"], numbers["unet/t"], numbers["unet/encoder_hidden_states"]
        output = pipe.unet(*inputs).sample
    assert relative(output, numbers[f"unet/lora_output{key}"]) < 1e-5


def test_trajectory(lora_pipe, settings, numbers):
    tokens = lora_pipe.tokenizer(settings["prompts"], padding="max_length", return_tensors="pt").input_ids
    assert torch.equal(tokens, numbers["traj/prompt_ids"])
    embeds = encode_prompts(lora_pipe, settings["prompts"])
    assert relative(embeds, numbers["traj/prompt_embeds"]) < 1e-5
    assert relative(encode_prompts(lora_pipe, [""]), numbers["traj/negative_embeds"]) < 1e-5

    images, _, latents, log_probs = pipeline_with_logprob(
        lora_pipe,
        prompt_embeds=embeds,
        num_inference_steps=settings["num_inference_steps"],
        guidance_scale=settings["guidance_scale"],
        eta=settings["eta"],
        generator=torch.Generator().manual_seed(settings["seed"] + 5),
        latents=numbers["traj/initial_latents"],
    )
    assert torch.equal(lora_pipe.scheduler.timesteps, numbers["traj/timesteps"])
    assert relative(torch.stack(latents, dim=1), numbers["traj/latents"]) < 1e-4
    torch.testing.assert_close(torch.stack(log_probs, dim=1), numbers["traj/log_probs"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(images, numbers["traj/images"], rtol=0, atol=1e-4)


def test_ppo_update(lora_pipe, golden_dir, settings, numbers):
    """Losses, gradient norm and the weights after one AdamW step, from the golden trajectory."""
    unet, scheduler = lora_pipe.unet, lora_pipe.scheduler
    parameters = lora_parameters(unet)
    optimizer = torch.optim.AdamW(
        parameters,
        lr=settings["learning_rate"],
        betas=tuple(settings["adam_betas"]),
        weight_decay=settings["weight_decay"],
        eps=settings["eps"],
    )
    scheduler.set_timesteps(settings["num_inference_steps"])
    latents = numbers["traj/latents"]
    measured = []
    for step, timestep in enumerate(scheduler.timesteps):
        prediction = guided_noise_prediction(
            unet,
            latents[:, step],
            timestep,
            numbers["traj/prompt_embeds"],
            numbers["traj/negative_embeds"],
            settings["guidance_scale"],
        )
        _, log_prob = ddim_step_with_logprob(
            scheduler, prediction, timestep, latents[:, step], settings["eta"], prev_sample=latents[:, step + 1]
        )
        loss, info = ppo_loss(
            log_prob,
            numbers["ppo/old_log_probs"][:, step],
            numbers["ppo/advantages"],
            settings["clip_range"],
            settings["adv_clip_max"],
        )
        (loss / len(scheduler.timesteps)).backward()
        measured.append(torch.stack([loss.detach(), info["approx_kl"], info["clipfrac"]]))
    measured, expected = torch.stack(measured), numbers["ppo/loss_kl_clipfrac"]
    torch.testing.assert_close(measured[:, 0], expected[:, 0], rtol=1e-3, atol=1e-5)
    # The KL estimate is a square of differences of 1e-4 between numbers near 1, which float32 knows to 1e-7.
    torch.testing.assert_close(measured[:, 1], expected[:, 1], rtol=1e-2, atol=1e-10)
    torch.testing.assert_close(measured[:, 2], expected[:, 2], rtol=0, atol=1e-6)

    norm = torch.nn.utils.clip_grad_norm_(parameters, settings["max_grad_norm"])
    torch.testing.assert_close(norm, numbers["ppo/grad_norm"], rtol=1e-3, atol=0)

    before = lora_state_dict(unet)
    optimizer.step()
    after = lora_state_dict(unet)
    load_lora(unet, golden_dir / "legacy_lora_after_step")
    expected_after = lora_state_dict(unet)
    ours, theirs, start = (torch.cat([w[key].flatten() for key in before]) for w in (after, expected_after, before))
    assert relative(ours, theirs) < 1e-3
    # The step itself, which is small beside the weights, has to agree too.
    assert relative(ours - start, theirs - start) < 2e-2


def test_tracker_is_exact(settings, numbers):
    tracker = PerPromptStatTracker(**settings["stat_tracker"])
    epochs = sorted({key.split("/")[1] for key in numbers if key.startswith("stats/")}, key=lambda name: int(name[5:]))
    assert len(epochs) > 1
    for epoch in epochs:
        prompts, rewards, expected = (
            numbers[f"stats/{epoch}/{name}"].numpy() for name in ("prompt", "reward", "advantage")
        )
        np.testing.assert_array_equal(tracker.update(prompts, rewards), expected)
