"""The numbers of the official implementation (golden/README.md), reproduced with today's libraries.

The golden folder is the shared one's, or any other of the same form: nothing here is specific to its weights.
"""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from diffusers import DDIMScheduler
from safetensors.torch import load_file
from script_tools import load_module

from ddpo_pytorch.diffusers_patch.ddim_with_logprob import ddim_step_with_logprob
from ddpo_pytorch.diffusers_patch.pipeline_with_logprob import pipeline_with_logprob
from ddpo_pytorch.generator.lora import load_lora, lora_parameters, lora_state_dict
from ddpo_pytorch.generator.pipeline import (
    PromptEmbeddings,
    encode_prompts,
    guided_noise_prediction,
    load_pipeline,
    set_schedule,
)
from ddpo_pytorch.ppo import ppo_loss
from ddpo_pytorch.rollout import Trajectories
from ddpo_pytorch.stat_tracking import PerPromptStatTracker
from ddpo_pytorch.training.optimizer import GuardedOptimizer, make_optimizer
from ddpo_pytorch.training.setup import batch_sizes
from ddpo_pytorch.utils.distributed import make_accelerator
from ddpo_pytorch.utils.errors import UserError


@pytest.fixture(scope="module")
def golden_dir(shared: Path) -> Path:
    return shared / "golden"


@pytest.fixture(scope="module")
def golden_settings(golden_dir: Path) -> dict:
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


def test_ddim_seeded_step(golden_dir, golden_settings, numbers):
    for name, prediction_type, eta in ddim_cases(numbers):
        scheduler = scheduler_of(golden_dir, prediction_type, len(numbers["ddim/timesteps"]))
        inputs = [numbers[f"ddim/{key}"] for key in ("model_output", "t", "sample")]
        generator = torch.Generator().manual_seed(golden_settings["seed"] + 2)
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


def test_trajectory(lora_pipe, golden_settings, numbers):
    tokens = lora_pipe.tokenizer(golden_settings["prompts"], padding="max_length", return_tensors="pt").input_ids
    assert torch.equal(tokens, numbers["traj/prompt_ids"])
    embeds = encode_prompts(lora_pipe, golden_settings["prompts"])
    assert relative(embeds, numbers["traj/prompt_embeds"]) < 1e-5
    assert relative(encode_prompts(lora_pipe, [""]), numbers["traj/negative_embeds"]) < 1e-5

    images, _, latents, log_probs = pipeline_with_logprob(
        lora_pipe,
        prompt_embeds=embeds,
        num_inference_steps=golden_settings["num_inference_steps"],
        guidance_scale=golden_settings["guidance_scale"],
        eta=golden_settings["eta"],
        generator=torch.Generator().manual_seed(golden_settings["seed"] + 5),
        latents=numbers["traj/initial_latents"],
    )
    assert torch.equal(lora_pipe.scheduler.timesteps, numbers["traj/timesteps"])
    assert relative(torch.stack(latents, dim=1), numbers["traj/latents"]) < 1e-4
    torch.testing.assert_close(torch.stack(log_probs, dim=1), numbers["traj/log_probs"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(images, numbers["traj/images"], rtol=0, atol=1e-4)


def test_ppo_update(lora_pipe, golden_dir, golden_settings, numbers):
    """Losses, gradient norm and the weights after one AdamW step, from the golden trajectory."""
    unet, scheduler = lora_pipe.unet, lora_pipe.scheduler
    parameters = lora_parameters(unet)
    optimizer = torch.optim.AdamW(
        parameters,
        lr=golden_settings["learning_rate"],
        betas=tuple(golden_settings["adam_betas"]),
        weight_decay=golden_settings["weight_decay"],
        eps=golden_settings["eps"],
    )
    scheduler.set_timesteps(golden_settings["num_inference_steps"])
    latents = numbers["traj/latents"]
    measured = []
    for step, timestep in enumerate(scheduler.timesteps):
        prediction = guided_noise_prediction(
            unet,
            latents[:, step],
            timestep,
            numbers["traj/prompt_embeds"],
            numbers["traj/negative_embeds"],
            golden_settings["guidance_scale"],
        )
        _, log_prob = ddim_step_with_logprob(
            scheduler, prediction, timestep, latents[:, step], golden_settings["eta"], prev_sample=latents[:, step + 1]
        )
        loss, info = ppo_loss(
            log_prob,
            numbers["ppo/old_log_probs"][:, step],
            numbers["ppo/advantages"],
            golden_settings["clip_range"],
            golden_settings["adv_clip_max"],
        )
        (loss / len(scheduler.timesteps)).backward()
        measured.append(torch.stack([loss.detach(), info["approx_kl"], info["clipfrac"]]))
    measured, expected = torch.stack(measured), numbers["ppo/loss_kl_clipfrac"]
    torch.testing.assert_close(measured[:, 0], expected[:, 0], rtol=1e-3, atol=1e-5)
    # The KL estimate is a square of differences of 1e-4 between numbers near 1, which float32 knows to 1e-7.
    torch.testing.assert_close(measured[:, 1], expected[:, 1], rtol=1e-2, atol=1e-10)
    torch.testing.assert_close(measured[:, 2], expected[:, 2], rtol=0, atol=1e-6)

    norm = torch.nn.utils.clip_grad_norm_(parameters, golden_settings["max_grad_norm"])
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


def test_tracker_is_exact(golden_settings, numbers):
    tracker = PerPromptStatTracker(**golden_settings["stat_tracker"])
    epochs = sorted({key.split("/")[1] for key in numbers if key.startswith("stats/")}, key=lambda name: int(name[5:]))
    assert len(epochs) > 1
    for epoch in epochs:
        prompts, rewards, expected = (
            numbers[f"stats/{epoch}/{name}"].numpy() for name in ("prompt", "reward", "advantage")
        )
        np.testing.assert_array_equal(tracker.update(prompts, rewards), expected)


# The loop of scripts/train.py itself: its update against the golden numbers, and that each option has its effect.


def flat(state: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([state[key].flatten().float() for key in sorted(state)])


@pytest.fixture
def one_update(script, lora_pipe, golden_settings, numbers, monkeypatch):
    """Run the script's `update` on the golden trajectories: its statistics, and the adapters before and after."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def run(**changes):
        latents = numbers["traj/latents"]
        config = load_module(ROOT / "config" / "base.py").get_config()
        config.update_from_flattened_dict(
            {
                "progress": False,
                "sample.num_steps": golden_settings["num_inference_steps"],
                "sample.guidance_scale": golden_settings["guidance_scale"],
                "sample.eta": golden_settings["eta"],
                "sample.batch_size": len(latents),
                "sample.num_batches_per_epoch": 1,
                "train.batch_size": len(latents),
                "train.learning_rate": golden_settings["learning_rate"],
                "train.adam_beta1": golden_settings["adam_betas"][0],
                "train.adam_beta2": golden_settings["adam_betas"][1],
                "train.adam_weight_decay": golden_settings["weight_decay"],
                "train.adam_epsilon": golden_settings["eps"],
                "train.clip_range": golden_settings["clip_range"],
                "train.adv_clip_max": golden_settings["adv_clip_max"],
                "train.max_grad_norm": golden_settings["max_grad_norm"],
            }
            | {key.replace("__", "."): value for key, value in changes.items()}
        )
        accelerator = make_accelerator("no")
        sizes = batch_sizes(config.sample, config.train, 1)
        accelerator.gradient_accumulation_steps = config.train.gradient_accumulation_steps * sizes.forwards
        set_schedule(lora_pipe, config.sample.num_steps)
        parameters = lora_parameters(lora_pipe.unet)
        unet, optimizer = accelerator.prepare(lora_pipe.unet, make_optimizer(config.train, parameters))
        guard = GuardedOptimizer(accelerator, optimizer, config.train.max_grad_norm, config.train.max_skipped_updates)
        job = script.Run(
            config,
            accelerator,
            sizes,
            None,
            lora_pipe,
            unet,
            optimizer,
            guard,
            PromptEmbeddings(lora_pipe),
            None,
            None,
        )
        samples = Trajectories(
            golden_settings["prompts"], lora_pipe.scheduler.timesteps, latents, numbers["ppo/old_log_probs"].float()
        )
        before = lora_state_dict(lora_pipe.unet)
        info = script.update(job, 0, samples, numbers["ppo/advantages"].float())
        info["first_moments"] = [optimizer.state[p]["exp_avg"].flatten() for p in parameters if p in optimizer.state]
        return info, before, lora_state_dict(lora_pipe.unet)

    return run


def test_update_is_the_golden_update(one_update, lora_pipe, golden_dir, numbers):
    info, before, after = one_update()
    assert info["updates"] == 1
    assert info["loss"] == pytest.approx(numbers["ppo/loss_kl_clipfrac"][:, 0].mean().item(), rel=1e-3, abs=1e-5)
    assert info["clipfrac"] == pytest.approx(numbers["ppo/loss_kl_clipfrac"][:, 2].mean().item(), abs=1e-6)
    assert info["grad_norm"] == pytest.approx(numbers["ppo/grad_norm"].item(), rel=1e-3)
    load_lora(lora_pipe.unet, golden_dir / "legacy_lora_after_step")
    expected = lora_state_dict(lora_pipe.unet)
    assert relative(flat(after), flat(expected)) < 1e-3
    assert relative(flat(after) - flat(before), flat(expected) - flat(before)) < 2e-2


@pytest.mark.parametrize(
    "changes",
    [
        {"train__max_grad_norm": 1e-9, "train__adam_epsilon": 1e-4},
        {"train__adv_clip_max": 1e-3, "train__adam_epsilon": 1e-4},
        {"train__kl_coef": 100.0},
        {"train__timestep_window": (0.0, 0.5)},
        {"train__num_inner_epochs": 2},
    ],
    ids=lambda changes: next(iter(changes)).removeprefix("train__"),
)
def test_option_changes_the_update(one_update, lora_pipe, golden_dir, changes):
    """From the same start, the step with the option differs from the step without it by far more than rounding."""
    plain = {key: value for key, value in changes.items() if key == "train__adam_epsilon"}
    _, before, without = one_update(**plain)
    load_lora(lora_pipe.unet, golden_dir / "legacy_lora")
    info, again, with_option = one_update(**changes)
    assert torch.equal(flat(before), flat(again))
    assert relative(flat(with_option) - flat(before), flat(without) - flat(before)) > 0.05
    assert info["updates"] == changes.get("train__num_inner_epochs", 1)


@pytest.mark.parametrize("count", [2, "all"])
def test_timesteps_together_give_the_same_gradients(one_update, lora_pipe, golden_settings, golden_dir, count):
    """Adam's first moments after one update are the gradients, times 1 - beta1; in float64, hardly any is rounding."""
    lora_pipe.unet.double()
    together = golden_settings["num_inference_steps"] if count == "all" else count
    info, *_ = one_update()
    load_lora(lora_pipe.unet, golden_dir / "legacy_lora")
    lora_pipe.unet.double()
    other_info, *_ = one_update(train__timesteps_per_forward=together)
    assert relative(torch.cat(other_info["first_moments"]), torch.cat(info["first_moments"])) < 1e-7
    for key in ("loss", "approx_kl", "clipfrac", "grad_norm", "ratio_mean"):
        assert other_info[key] == pytest.approx(info[key], rel=1e-4, abs=1e-9), key


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++, which torch.compile needs on a CPU")
def test_compiled_blocks_give_the_golden_update(one_update, lora_pipe, golden_dir, numbers):
    lora_pipe.unet.compile_repeated_blocks()
    info, before, after = one_update()
    assert info["grad_norm"] == pytest.approx(numbers["ppo/grad_norm"].item(), rel=1e-3)
    load_lora(lora_pipe.unet, golden_dir / "legacy_lora_after_step")
    expected = lora_state_dict(lora_pipe.unet)
    assert relative(flat(after) - flat(before), flat(expected) - flat(before)) < 2e-2


def test_an_update_that_is_not_finite_is_left_out(one_update, lora_pipe, monkeypatch, numbers):
    advantages = numbers["ppo/advantages"].clone()
    advantages[0] = torch.nan
    monkeypatch.setitem(numbers, "ppo/advantages", advantages)
    info, before, after = one_update()
    assert torch.equal(flat(before), flat(after))
    assert (info["updates"], info["skipped_updates"]) == (0, 1)
    with pytest.raises(UserError, match="2 updates in a row"):
        one_update(train__num_inner_epochs=3, train__max_skipped_updates=2)
    assert torch.equal(flat(before), flat(lora_state_dict(lora_pipe.unet)))


def test_kl_is_measured_to_the_model_without_adapters(one_update, lora_pipe):
    info, _, _ = one_update(train__kl_coef=1e-9)
    assert info["kl_to_base"] > 1e-12
    with torch.no_grad():
        for parameter in lora_parameters(lora_pipe.unet):
            parameter.zero_()
    info, _, _ = one_update(train__kl_coef=1e-9)
    assert info["kl_to_base"] == 0


def test_advantages_reach_their_own_samples(one_update, lora_pipe, golden_dir, numbers, monkeypatch):
    _, before, after = one_update()
    load_lora(lora_pipe.unet, golden_dir / "legacy_lora")
    assert not torch.equal(numbers["ppo/advantages"], numbers["ppo/advantages"].flip(0))
    monkeypatch.setitem(numbers, "ppo/advantages", numbers["ppo/advantages"].flip(0))
    _, _, flipped = one_update()
    assert relative(flat(flipped) - flat(before), flat(after) - flat(before)) > 0.1
    assert np.isfinite(flat(flipped).numpy()).all()
