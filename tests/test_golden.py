"""The numbers of the official implementation (golden/README.md), reproduced with today's libraries.

The golden folder is the shared one's, or any other of the same form: nothing here is specific to its weights.
"""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from refusals import refused
from rl_tools import configured
from safetensors.torch import load_file

from ddpo_pytorch.diffusers_patch.ddim_with_logprob import ddim_step_with_logprob
from ddpo_pytorch.diffusers_patch.pipeline_with_logprob import pipeline_with_logprob
from ddpo_pytorch.generator.lora import load_lora, lora_parameters, lora_state_dict
from ddpo_pytorch.generator.pipeline import PromptEmbeddings, encode_prompts, load_pipeline, set_schedule
from ddpo_pytorch.ppo import ppo_loss
from ddpo_pytorch.rollout import Trajectories
from ddpo_pytorch.stat_tracking import PerPromptStatTracker
from ddpo_pytorch.training.optimizer import GuardedOptimizer, make_optimizer
from ddpo_pytorch.training.setup import batch_sizes
from ddpo_pytorch.utils.distributed import make_accelerator


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


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Norm of the difference over the norm of the golden tensor."""
    return ((ours - theirs).norm() / theirs.norm()).item()


def test_ddim_step(golden_dir, golden_settings, numbers):
    """Log-probs of given latents, and seeded steps, of every prediction type and eta."""
    names = sorted(key.removesuffix("/log_prob") for key in numbers if re.fullmatch("ddim/.+/log_prob", key))
    assert {name.split("/")[1] for name in names} == {"epsilon", "v_prediction", "sample"}
    config = json.loads((golden_dir / "pipeline/scheduler/scheduler_config.json").read_text())
    for name in names:
        eta = float(name.split("/eta")[1])
        scheduler = DDIMScheduler.from_config(config, prediction_type=name.split("/")[1])
        scheduler.set_timesteps(len(numbers["ddim/timesteps"]))
        assert torch.equal(scheduler.timesteps, numbers["ddim/timesteps"])
        inputs = [numbers[f"ddim/{key}"] for key in ("model_output", "t", "sample")]
        scored, log_prob = ddim_step_with_logprob(scheduler, *inputs, eta, prev_sample=numbers["ddim/prev_sample"])
        assert torch.equal(scored, numbers["ddim/prev_sample"])
        torch.testing.assert_close(log_prob, numbers[f"{name}/log_prob"], rtol=1e-5, atol=1e-5)
        generator = torch.Generator().manual_seed(golden_settings["seed"] + 2)
        drawn = ddim_step_with_logprob(scheduler, *inputs, eta, generator=generator)
        expected = numbers[f"{name}/seeded_prev_sample"], numbers[f"{name}/seeded_log_prob"]
        torch.testing.assert_close(drawn, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("folder", "key"), [("legacy_lora", ""), ("legacy_lora_after_step", "_after_step")])
def test_legacy_lora_output(pipe, golden_dir, numbers, folder, key):
    load_lora(pipe.unet, golden_dir / folder)
    with torch.no_grad():
        output = pipe.unet(*(numbers[f"unet/{name}"] for name in ("sample", "t", "encoder_hidden_states"))).sample
    assert relative(output, numbers[f"unet/lora_output{key}"]) < 1e-5


def test_trajectory(lora_pipe, golden_settings, numbers):
    tokens = lora_pipe.tokenizer(golden_settings["prompts"], padding="max_length", return_tensors="pt").input_ids
    assert torch.equal(tokens, numbers["traj/prompt_ids"])
    embeds = encode_prompts(lora_pipe, golden_settings["prompts"])
    assert relative(embeds, numbers["traj/prompt_embeds"]) < 1e-5
    assert relative(encode_prompts(lora_pipe, [""]), numbers["traj/negative_embeds"]) < 1e-5

    given = {name: golden_settings[name] for name in ("num_inference_steps", "guidance_scale", "eta")}
    given |= {"prompt_embeds": embeds, "latents": numbers["traj/initial_latents"]}
    generator = torch.Generator().manual_seed(golden_settings["seed"] + 5)
    images, _, latents, log_probs = pipeline_with_logprob(lora_pipe, **given, generator=generator)
    assert torch.equal(lora_pipe.scheduler.timesteps, numbers["traj/timesteps"])
    assert relative(torch.stack(latents, dim=1), numbers["traj/latents"]) < 1e-4
    torch.testing.assert_close(torch.stack(log_probs, dim=1), numbers["traj/log_probs"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(images, numbers["traj/images"], rtol=0, atol=1e-4)


def test_tracker_is_exact(golden_settings, numbers):
    tracker = PerPromptStatTracker(**golden_settings["stat_tracker"])
    epochs = sorted({key.split("/")[1] for key in numbers if key.startswith("stats/")}, key=lambda name: int(name[5:]))
    assert len(epochs) > 1
    for epoch in epochs:
        *given, expected = (numbers[f"stats/{epoch}/{name}"].numpy() for name in ("prompt", "reward", "advantage"))
        np.testing.assert_array_equal(tracker.update(*given), expected)


# The loop of scripts/train.py itself: its update against the golden numbers, and that each option has its effect.


def flat(state: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([state[key].flatten().float() for key in sorted(state)])


@pytest.fixture
def one_update(script, lora_pipe, golden_settings, numbers, monkeypatch):
    """Run the script's `update` on the golden trajectories: its statistics, and the adapters before and after."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    latents, beta = numbers["traj/latents"], golden_settings["adam_betas"]
    settings = {"progress": False, "sample.batch_size": len(latents), "train.batch_size": len(latents)}
    settings |= {"sample.num_batches_per_epoch": 1, "train.adam_beta1": beta[0], "train.adam_beta2": beta[1]}
    same = ("learning_rate", "clip_range", "adv_clip_max", "max_grad_norm")
    renamed = {"sample.num_steps": "num_inference_steps", "sample.guidance_scale": "guidance_scale"}
    renamed |= {"sample.eta": "eta", "train.adam_weight_decay": "weight_decay", "train.adam_epsilon": "eps"}
    renamed |= {f"train.{name}": name for name in same}
    settings |= {setting: golden_settings[name] for setting, name in renamed.items()}

    def run(**changes):
        config = configured(settings, changes)
        accelerator = make_accelerator("no")
        sizes = batch_sizes(config.sample, config.train, 1)
        accelerator.gradient_accumulation_steps = config.train.gradient_accumulation_steps * sizes.forwards
        set_schedule(lora_pipe, config.sample.num_steps)
        parameters = lora_parameters(lora_pipe.unet)
        unet, optimizer = accelerator.prepare(lora_pipe.unet, make_optimizer(config.train, parameters))
        guard = GuardedOptimizer(accelerator, optimizer, config.train.max_grad_norm, config.train.max_skipped_updates)
        embeddings = PromptEmbeddings(lora_pipe)
        job = script.Run(config, accelerator, sizes, None, lora_pipe, unet, optimizer, guard, embeddings, None, None)
        old = numbers["ppo/old_log_probs"].float()
        samples = Trajectories(golden_settings["prompts"], lora_pipe.scheduler.timesteps, latents, old)
        before = lora_state_dict(lora_pipe.unet)
        info = script.update(job, 0, samples, numbers["ppo/advantages"].float())
        info["first_moments"] = [optimizer.state[p]["exp_avg"].flatten() for p in parameters if p in optimizer.state]
        return info, before, lora_state_dict(lora_pipe.unet)

    return run


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_update_is_the_golden_update(one_update, lora_pipe, golden_dir, numbers, compiled):
    if compiled:  # with the capture of torch.compile; Inductor needs two minutes for the kernels on a CPU
        lora_pipe.unet.compile_repeated_blocks(backend="aot_eager")
    info, before, after = one_update()
    assert info["updates"] == 1
    loss, kl, clipfrac = numbers["ppo/loss_kl_clipfrac"].mean(dim=0).tolist()
    assert info["loss"] == pytest.approx(loss, rel=1e-3, abs=1e-5)
    # a square of differences of 1e-4 between numbers near 1, which float32 knows to 1e-7
    assert info["approx_kl"] == pytest.approx(kl, rel=1e-2, abs=1e-10)
    assert info["clipfrac"] == pytest.approx(clipfrac, abs=1e-6)
    assert info["grad_norm"] == pytest.approx(numbers["ppo/grad_norm"].item(), rel=1e-3)
    # the weights after one step agree, and so does the step itself, which is small beside the weights
    load_lora(lora_pipe.unet, golden_dir / "legacy_lora_after_step")
    expected = lora_state_dict(lora_pipe.unet)
    assert relative(flat(after), flat(expected)) < 1e-3
    assert relative(flat(after) - flat(before), flat(expected) - flat(before)) < 2e-2


@pytest.mark.slow
def test_options_change_the_update(one_update, lora_pipe, golden_dir):
    """From the same start, the step with the option differs from the step without it by far more than rounding."""
    plain, half = {}, {"train__timestep_window": (0.0, 0.5)}  # plain: the step without options, by Adam's epsilon
    for changes in (
        {"train__max_grad_norm": 1e-9, "train__adam_epsilon": 1e-4},
        {"train__adv_clip_max": 1e-3, "train__adam_epsilon": 1e-4},
        {"train__kl_coef": 100.0},
        {"train__num_inner_epochs": 2},
        {"train__timestep_window": (0.0, 1.0)},
    ):
        epsilon = {key: value for key, value in changes.items() if key == "train__adam_epsilon"}
        steps = []
        for options in [changes] if str(epsilon) in plain else [changes, epsilon]:
            load_lora(lora_pipe.unet, golden_dir / "legacy_lora")
            info, before, after = one_update(**half | options)
            assert info["updates"] == options.get("train__num_inner_epochs", 1)
            steps.append(flat(after) - flat(before))
        without = plain.setdefault(str(epsilon), steps[-1])
        assert relative(steps[0], without) > 0.05


@pytest.mark.slow
def test_timesteps_together_give_the_same_gradients(one_update, lora_pipe, golden_settings, golden_dir):
    """Adam's first moments after one update are the gradients, times 1 - beta1; in float64, hardly any is rounding."""
    steps, window = golden_settings["num_inference_steps"], {"train__timestep_window": (0.0, 0.5)}
    lora_pipe.unet.double()
    info, *_ = one_update(**window)
    load_lora(lora_pipe.unet, golden_dir / "legacy_lora")
    lora_pipe.unet.double()
    other_info, *_ = one_update(**window, train__timesteps_per_forward=steps // 2)
    assert relative(torch.cat(other_info["first_moments"]), torch.cat(info["first_moments"])) < 1e-7
    for key in ("loss", "approx_kl", "clipfrac", "grad_norm", "ratio_mean"):
        assert other_info[key] == pytest.approx(info[key], rel=1e-4, abs=1e-9), key


def test_an_update_that_is_not_finite_is_left_out(one_update, lora_pipe, monkeypatch, numbers):
    advantages = numbers["ppo/advantages"].clone()
    advantages[0] = torch.nan
    monkeypatch.setitem(numbers, "ppo/advantages", advantages)
    info, before, after = one_update()
    assert torch.equal(flat(before), flat(after))
    assert (info["updates"], info["skipped_updates"]) == (0, 1)
    refused("2 updates in a row", one_update, train__num_inner_epochs=3, train__max_skipped_updates=2)
    assert torch.equal(flat(before), flat(lora_state_dict(lora_pipe.unet)))


def test_kl_is_measured_to_the_model_without_adapters(one_update, lora_pipe):
    assert one_update(train__kl_coef=1e-9)[0]["kl_to_base"] > 1e-12
    with torch.no_grad():
        for parameter in lora_parameters(lora_pipe.unet):
            parameter.zero_()
    assert one_update(train__kl_coef=1e-9)[0]["kl_to_base"] == 0


def test_loss_gradient_and_info_equal_the_formula():
    """The loss is the mean of PPO's equation 7, in plain floats."""
    old, change, advantages = torch.randn(3, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    log_prob = (old + 0.2 * change).requires_grad_()
    loss, info = ppo_loss(log_prob, old, 4 * advantages, clip_range=0.1, adv_clip_max=5)
    loss.backward()
    changes, clipped = (0.2 * change).tolist(), [min(max(a, -5), 5) for a in (4 * advantages).tolist()]
    ratios = [math.exp(one) for one in changes]
    gains = [min(r * a, min(max(r, 0.9), 1.1) * a) for r, a in zip(ratios, clipped, strict=True)]
    assert loss.item() == pytest.approx(-sum(gains) / 64, rel=1e-12)
    # a ratio beyond the clip range in the direction that pays has no gradient, one in the other is pulled back
    pulls = [-r * a / 64 if r * a == gain else 0.0 for r, a, gain in zip(ratios, clipped, gains, strict=True)]
    assert log_prob.grad.tolist() == pytest.approx(pulls, rel=1e-12) and 0 < pulls.count(0.0) < info["clipfrac"] * 64
    expected = {"approx_kl": sum(one**2 for one in changes) / 128, "ratio_mean": sum(ratios) / 64}
    expected["approx_kl_k3"] = sum(r - 1 - one for r, one in zip(ratios, changes, strict=True)) / 64
    expected |= {"clipfrac": sum(abs(r - 1) > 0.1 for r in ratios) / 64}
    expected |= {"ratio_max_deviation": max(abs(r - 1) for r in ratios)}
    assert {key: info[key].item() for key in expected} == pytest.approx(expected) and 0 < info["clipfrac"] < 1
    with pytest.raises(ValueError, match="one shape"):
        ppo_loss(torch.zeros(4), torch.zeros(4), torch.zeros(4, 1), 0.1, 5)


def test_same_policy_is_plain_policy_gradient_and_k3_keeps_its_digits_for_tiny_changes():
    """At ratio 1 the gradient is REINFORCE's, -advantage / B, and every diagnostic of change is exactly zero."""
    log_prob = torch.tensor([-1.2, 0.3, -0.7], requires_grad=True)
    advantages = torch.tensor([1.0, -2.0, 0.5])
    loss, info = ppo_loss(log_prob, log_prob.detach().clone(), advantages, 1e-4, 5)
    loss.backward()
    torch.testing.assert_close(log_prob.grad, -advantages / 3)
    assert info["ratio_mean"] == 1
    for key in ("approx_kl", "approx_kl_k3", "clipfrac", "ratio_max_deviation"):
        assert info[key] == 0 and info[key].ndim == 0 and not info[key].requires_grad
    # at log-ratios of 1e-4, the size of clip_range, k3 is 5e-9: float32's own ratio - 1 is off by more than that
    _, info = ppo_loss(torch.full((8,), 1e-4), torch.zeros(8), torch.ones(8), 1e-4, 5)
    assert info["approx_kl_k3"].item() == pytest.approx(5e-9, rel=1e-2)
    assert info["approx_kl"].item() == pytest.approx(5e-9, rel=1e-5)
