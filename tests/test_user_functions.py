"""Prompt functions and rewards of a user, and warnings of trainings that learn nothing or break down."""

import json
import random
import sys

import numpy as np
import pytest
import torch
from ml_collections import ConfigDict
from refusals import refused
from rl_tools import configured

from ddpo_pytorch.prompts import PROMPT_LISTS, PROMPTS
from ddpo_pytorch.rewards import REWARDS
from ddpo_pytorch.training.health import HealthCheck, check_groups
from ddpo_pytorch.training.setup import make_task, try_reward
from ddpo_pytorch.utils.cli import import_function


def test_functions_as_in_ddpo_pytorch(train, monkeypatch):
    """Without a list of prompts: keyword arguments, per_prompt_stat_tracking=None, the parts of a sum in the log."""
    calls = []

    def prompt(nouns="cat,dog", low=1, high=3):
        return f"{random.randint(low, high)} {random.choice(nouns.split(','))}s"

    def make_reward(scale=1.0):
        def reward(images, prompts, metadata):
            calls.append((scale, prompts))
            return [scale * image.mean() for image in images], {}

        return reward

    monkeypatch.setitem(PROMPTS, "mine", prompt)
    monkeypatch.setitem(REWARDS, "mine", make_reward)
    own = {"prompt_fn": "mine", "prompt_fn_kwargs": {"nouns": "bird,fish", "low": 2}}
    own |= {"reward_fn": "mine:2.0,jpeg_incompressibility:-0.1", "reward_fn_kwargs.mine.scale": 3.0}
    folder, (entry,) = train(num_epochs=1, per_prompt_stat_tracking=None, **own)
    assert {scale for scale, _ in calls} == {3.0}
    texts = {text for _, prompts in calls for text in prompts}
    assert texts <= {f"{number} {noun}s" for number in (2, 3) for noun in ("bird", "fish")}
    total = 2.0 * entry["reward_mine_mean"] - 0.1 * entry["reward_jpeg_incompressibility_mean"]
    assert entry["reward_mean"] == pytest.approx(total, rel=1e-12)
    assert entry["reward_mine_std"] > 0 and entry["reward_jpeg_incompressibility_std"] > 0
    # over the whole batch their standard deviation is 1, but for the 1e-6 that is added to that of the rewards
    assert entry["advantage_std"] == pytest.approx(1, abs=2e-6 / entry["reward_std"])
    written = json.loads((folder / "config.json").read_text())
    assert written["per_prompt_stat_tracking"] is None and written["train"]["advantage"] == "global"
    # with other arguments, or without normalization over the batch, it is another run
    fewer = {key: value for key, value in own.items() if "scale" not in key} | {"per_prompt_stat_tracking": None}
    refused("reward_fn_kwargs.mine.scale='?3.0", train, num_epochs=2, **fewer)
    refused("train.advantage=.global", train, num_epochs=2, **own)


def test_a_users_module_may_extend_the_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "extending.py").write_text("import sys\nsys.path.insert(0, 'deps')\ndef reward(): return 7\n")
    assert import_function("extending:reward", "reward_fn")() == 7
    assert sys.path[0] == "deps" and str(tmp_path) not in sys.path


@pytest.mark.parametrize("name", ["dict", "int", "type", "print"])
@pytest.mark.parametrize("field", ["reward_fn", "prompt_fn"])
def test_functions_that_state_no_arguments(settings, field, name):
    config, device = configured(settings, {field: f"builtins:{name}"}), torch.device("cpu")
    if name == "type":  # raises by itself, as functions of users may
        pytest.raises(TypeError, make_task, config, device)
    else:
        refused(f"{name}' returned .*; it must return a", make_task, config, device)


def test_rewards_are_tried_on_the_device_and_on_the_sizes_to_come(settings, train, monkeypatch):
    tried = set()

    def reward(images, prompts, metadata):
        tried.add((images.device.type, *images.shape))
        return [0.01 * index for index in range(len(prompts))], {}

    monkeypatch.setitem(REWARDS, "mine", lambda: reward)
    config, device = configured(settings, {"reward_fn": "mine"}), torch.device("meta")
    try_reward(config, make_task(config, device), device, (16, 24))
    assert tried == {("meta", 4, 3, 16, 24)}
    tried.clear()
    train(num_epochs=1, reward_fn="mine")
    assert tried == {("cpu", 4, 3, 64, 64)}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"train__advantage": "group"}, "8 samples.*sample.images_per_prompt"),
        ({"held_out__every": 1}, "'mine'.*PROMPT_LISTS"),
        ({"prompt_fn_kwargs": {"noun": "bird"}}, "prompt_fn_kwargs.*noun"),
        ({"reward_fn": "mine", "reward_fn_kwargs.mine.scale": float("nan")}, "'mine'.*nan"),
        ({"prompt_fn": "numbers"}, "'numbers'.*7"),
        ({"prompt_fn": "unlisted"}, "'unlisted'.*'a dog'.*PROMPT_LISTS"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_work_is_refused_first(train, tmp_path, monkeypatch, overrides, expected):
    monkeypatch.setitem(PROMPTS, "numbers", lambda: 7)
    monkeypatch.setitem(PROMPTS, "unlisted", lambda: random.choice(["a cat", "a dog"]))
    monkeypatch.setitem(PROMPT_LISTS, "unlisted", lambda: ["a cat"])
    monkeypatch.setitem(REWARDS, "mine", lambda scale=1.0: lambda images, *_: ([scale] * len(images), {}))
    monkeypatch.setitem(PROMPTS, "mine", lambda nouns="a": f"{nouns} {random.random()}")  # no prompt occurs twice
    refused(expected, train, **{"prompt_fn": "mine", "reward_fn": "jpeg_compressibility"} | overrides)
    assert not (tmp_path / "logs").exists()


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
            health.check_epoch(epoch, prompts, np.array(advantages), HEALTHY | changed)
        return caplog.messages

    caplog.set_level("WARNING")
    return run


def test_an_epoch_that_teaches_nothing_is_warned_of_once_and_a_healthy_run_never(check):
    assert not check(*[(SPREAD, {})] * 5)
    assert not check(*[(SPREAD, {"grad_norm": norm, "clipfrac": 0.2}) for norm in (1e-4, 3e-4, 2e-4, 9e-4, 5e-4)])
    assert not check((SPREAD, {"grad_norm": float("nan"), "clipfrac": float("nan")}))
    for advantages, changed in (
        ([1e-11, -1e-11], {}),  # what rounding leaves of equal rewards
        ([5e-4, -5e-4], {"reward_std": 1e-9}),  # a reward too small for its units
        (SPREAD, {"grad_norm": 0.0}),
    ):
        (message,) = check((SPREAD, {}), *[(advantages, changed)] * 3)
        assert "epoch 1 " in message and "zero" not in message


def test_clipped_ratios_and_exploding_gradients_are_warned_of_once(check):
    message, *more = check(*[(SPREAD, {"clipfrac": 0.464})] * 3)
    assert not more and "epoch 0" in message and "46%" in message and "train.learning_rate" in message
    norms = (3.1e-3, 4e-4, 8.5e-3, 0.2433, 0.5)  # of the mini world at 20 times its learning rate
    message, *more = check(*[(SPREAD, {"grad_norm": norm}) for norm in norms])
    assert not more and "epoch 3" in message and "0.243" in message and "0.0031" in message


def test_prompts_that_are_alone(check):
    (message,) = check(*[(SPREAD, {})] * 2, advantage="group", prompts=["a", "a", "b", "c"])
    assert "2 of 3 prompts" in message and "sample.images_per_prompt" in message
    assert not check((SPREAD, {}), advantage="group")
    assert not check((SPREAD, {}), advantage="per_prompt", prompts=["a", "b"])
    refused("first epoch's 3 samples.*sample.images_per_prompt", check_groups, "group", ["a", "b", "c"])
    check_groups("group", ["a", "b", "a"])
    check_groups("global", ["a", "b", "c"])
