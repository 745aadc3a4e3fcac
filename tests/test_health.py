"""Warnings of trainings that learn nothing or break down: each once, and none in a healthy run."""

import logging

import numpy as np
import pytest
from ml_collections import ConfigDict

from ddpo_pytorch.training.health import HealthCheck, check_groups
from ddpo_pytorch.utils.errors import UserError

HEALTHY = {"reward_mean": 0.7, "reward_std": 0.2, "zero_std_share": 0.1, "clipfrac": 0.0, "grad_norm": 4e-4}
SPREAD = np.array([-1.0, 0.5, 0.5])


@pytest.fixture
def check(caplog):
    """Function (epochs, advantage mode): warnings of epochs of (advantages, changed numbers), in turn."""

    def run(*epochs, advantage="per_prompt", prompts=("a", "a", "b", "b")):
        caplog.clear()
        settings = {"advantage": advantage, "adv_clip_max": 5.0, "clip_range": 1e-4, "learning_rate": 3e-4}
        health = HealthCheck(ConfigDict(settings))
        for epoch, (advantages, changed) in enumerate(epochs):
            health.check_prompts(epoch, prompts)
            health.check_epoch(epoch, np.array(advantages), HEALTHY | changed)
        return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]

    return run


def test_a_healthy_run_is_not_warned_of(check):
    assert not check(*[(SPREAD, {})] * 5)
    assert not check(*[(SPREAD, {"grad_norm": norm, "clipfrac": 0.2}) for norm in (1e-4, 3e-4, 2e-4, 9e-4, 5e-4)])
    assert not check((SPREAD, {"grad_norm": float("nan"), "clipfrac": float("nan")}))


@pytest.mark.parametrize(
    ("advantages", "changed"),
    [
        ([0.0, 0.0], {"zero_std_share": 1.0, "reward_std": 0.0}),
        ([1e-11, -1e-11], {}),  # what rounding leaves of equal rewards
        ([5e-4, -5e-4], {"reward_std": 1e-9}),  # a reward too small for its units
        (SPREAD, {"grad_norm": 0.0}),
    ],
)
def test_an_epoch_that_teaches_nothing_is_warned_of_once(check, advantages, changed):
    (message,) = check((SPREAD, {}), *[(advantages, changed)] * 3)
    assert "epoch 1 " in message and "zero" not in message


def test_clipped_ratios_and_exploding_gradients_are_warned_of_once(check):
    message, *more = check(*[(SPREAD, {"clipfrac": 0.464})] * 3)
    assert not more and "epoch 0" in message and "46%" in message and "train.learning_rate" in message
    norms = (3.1e-3, 4e-4, 8.5e-3, 0.2433, 0.5)  # of the mini world at 20 times its learning rate
    message, *more = check(*[(SPREAD, {"grad_norm": norm}) for norm in norms])
    assert not more and "epoch 3" in message and "0.243" in message and "0.0031" in message


def test_prompts_that_are_alone(check, caplog):
    (message,) = check(*[(SPREAD, {})] * 2, advantage="group", prompts=["a", "a", "b", "c"])
    assert "2 of 3 prompts" in message and "sample.images_per_prompt" in message
    assert not check((SPREAD, {}), advantage="group")
    assert not check((SPREAD, {}), advantage="per_prompt", prompts=["a", "b"])
    with pytest.raises(UserError, match="first epoch's 3 samples.*sample.images_per_prompt"):
        check_groups("group", ["a", "b", "c"])
    check_groups("group", ["a", "b", "a"])
    check_groups("global", ["a", "b", "c"])


def test_other_processes_are_silent(caplog):
    health = HealthCheck(ConfigDict({"advantage": "group"}), active=False)
    health.check_prompts(0, ["a", "b"])
    assert not caplog.records
