"""The loop of scripts/train.py itself: its update against the golden numbers, and that each option has its effect."""

import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_golden import golden_dir, lora_pipe, numbers, pipe, relative, settings  # noqa: F401 (fixtures)
from test_train import load_module, script  # noqa: F401 (fixture)

from ddpo_pytorch.generator.lora import load_lora, lora_parameters, lora_state_dict
from ddpo_pytorch.generator.pipeline import PromptEmbeddings, set_schedule
from ddpo_pytorch.rollout import Trajectories
from ddpo_pytorch.training.optimizer import GuardedOptimizer, make_optimizer
from ddpo_pytorch.training.setup import batch_geometry
from ddpo_pytorch.utils.distributed import make_accelerator
from ddpo_pytorch.utils.errors import UserError


def flat(state: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([state[key].flatten().float() for key in sorted(state)])


@pytest.fixture
def one_update(script, lora_pipe, settings, numbers, monkeypatch):  # noqa: F811
    """Run the script's `update` on the golden trajectories: its statistics, and the adapters before and after."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def run(**changes):
        latents = numbers["traj/latents"]
        config = load_module(ROOT / "config" / "base.py").get_config()
        config.update_from_flattened_dict(
            {
                "progress": False,
                "sample.num_steps": settings["num_inference_steps"],
                "sample.guidance_scale": settings["guidance_scale"],
                "sample.eta": settings["eta"],
                "sample.batch_size": len(latents),
                "sample.num_batches_per_epoch": 1,
                "train.batch_size": len(latents),
                "train.learning_rate": settings["learning_rate"],
                "train.adam_beta1": settings["adam_betas"][0],
                "train.adam_beta2": settings["adam_betas"][1],
                "train.adam_weight_decay": settings["weight_decay"],
                "train.adam_epsilon": settings["eps"],
                "train.clip_range": settings["clip_range"],
                "train.adv_clip_max": settings["adv_clip_max"],
                "train.max_grad_norm": settings["max_grad_norm"],
            }
            | {key.replace("__", "."): value for key, value in changes.items()}
        )
        accelerator = make_accelerator("no")
        geometry = batch_geometry(config.sample, config.train, 1)
        accelerator.gradient_accumulation_steps = config.train.gradient_accumulation_steps * geometry.forwards
        set_schedule(lora_pipe, config.sample.num_steps)
        parameters = lora_parameters(lora_pipe.unet)
        unet, optimizer = accelerator.prepare(lora_pipe.unet, make_optimizer(config.train, parameters))
        guard = GuardedOptimizer(accelerator, optimizer, config.train.max_grad_norm, config.train.max_skipped_updates)
        job = script.Run(
            config,
            accelerator,
            geometry,
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
            settings["prompts"], lora_pipe.scheduler.timesteps, latents, numbers["ppo/old_log_probs"].float()
        )
        before = lora_state_dict(lora_pipe.unet)
        info = script.update(job, 0, samples, numbers["ppo/advantages"].float())
        info["first_moments"] = [optimizer.state[p]["exp_avg"].flatten() for p in parameters if p in optimizer.state]
        return info, before, lora_state_dict(lora_pipe.unet)

    return run


def test_update_is_the_golden_update(one_update, lora_pipe, golden_dir, numbers):  # noqa: F811
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
def test_option_changes_the_update(one_update, lora_pipe, golden_dir, changes):  # noqa: F811
    """From the same start, the step with the option differs from the step without it by far more than rounding."""
    plain = {key: value for key, value in changes.items() if key == "train__adam_epsilon"}
    _, before, without = one_update(**plain)
    load_lora(lora_pipe.unet, golden_dir / "legacy_lora")
    info, again, with_option = one_update(**changes)
    assert torch.equal(flat(before), flat(again))
    assert relative(flat(with_option) - flat(before), flat(without) - flat(before)) > 0.05
    assert info["updates"] == changes.get("train__num_inner_epochs", 1)


@pytest.mark.parametrize("count", [2, "all"])
def test_timesteps_together_give_the_same_gradients(one_update, lora_pipe, settings, golden_dir, count):  # noqa: F811
    """Adam's first moments after one update are the gradients, times 1 - beta1; in float64, hardly any is rounding."""
    lora_pipe.unet.double()
    together = settings["num_inference_steps"] if count == "all" else count
    info, *_ = one_update()
    load_lora(lora_pipe.unet, golden_dir / "legacy_lora")
    lora_pipe.unet.double()
    other_info, *_ = one_update(train__timesteps_per_forward=together)
    assert relative(torch.cat(other_info["first_moments"]), torch.cat(info["first_moments"])) < 1e-7
    for key in ("loss", "approx_kl", "clipfrac", "grad_norm", "ratio_mean"):
        assert other_info[key] == pytest.approx(info[key], rel=1e-4, abs=1e-9), key


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++, which torch.compile needs on a CPU")
def test_compiled_blocks_give_the_golden_update(one_update, lora_pipe, golden_dir, numbers):  # noqa: F811
    lora_pipe.unet.compile_repeated_blocks()
    info, before, after = one_update()
    assert info["grad_norm"] == pytest.approx(numbers["ppo/grad_norm"].item(), rel=1e-3)
    load_lora(lora_pipe.unet, golden_dir / "legacy_lora_after_step")
    expected = lora_state_dict(lora_pipe.unet)
    assert relative(flat(after) - flat(before), flat(expected) - flat(before)) < 2e-2


def test_an_update_that_is_not_finite_is_left_out(one_update, lora_pipe, monkeypatch, numbers):  # noqa: F811
    advantages = numbers["ppo/advantages"].clone()
    advantages[0] = torch.nan
    monkeypatch.setitem(numbers, "ppo/advantages", advantages)
    info, before, after = one_update()
    assert torch.equal(flat(before), flat(after))
    assert (info["updates"], info["skipped_updates"]) == (0, 1)
    with pytest.raises(UserError, match="2 updates in a row had a gradient that is not finite"):
        one_update(train__num_inner_epochs=3, train__max_skipped_updates=2)
    assert torch.equal(flat(before), flat(lora_state_dict(lora_pipe.unet)))


def test_kl_is_measured_to_the_model_without_adapters(one_update, lora_pipe):  # noqa: F811
    info, _, _ = one_update(train__kl_coef=1e-9)
    assert info["kl_to_base"] > 1e-12
    with torch.no_grad():
        for parameter in lora_parameters(lora_pipe.unet):
            parameter.zero_()
    info, _, _ = one_update(train__kl_coef=1e-9)
    assert info["kl_to_base"] == 0


def test_advantages_reach_their_own_samples(one_update, lora_pipe, golden_dir, numbers, monkeypatch):  # noqa: F811
    _, before, after = one_update()
    load_lora(lora_pipe.unet, golden_dir / "legacy_lora")
    assert not torch.equal(numbers["ppo/advantages"], numbers["ppo/advantages"].flip(0))
    monkeypatch.setitem(numbers, "ppo/advantages", numbers["ppo/advantages"].flip(0))
    _, _, flipped = one_update()
    assert relative(flat(flipped) - flat(before), flat(after) - flat(before)) > 0.1
    assert np.isfinite(flat(flipped).numpy()).all()
