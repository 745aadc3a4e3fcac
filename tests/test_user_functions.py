"""Prompt functions and rewards of a user's own in scripts/train.py, and settings with which it would learn nothing."""

import itertools
import json
import logging
import random

import pytest

from ddpo_pytorch.prompts import PROMPTS
from ddpo_pytorch.rewards import REWARDS
from ddpo_pytorch.utils.errors import UserError


@pytest.fixture
def mine(monkeypatch):
    """A prompt function as ddpo-pytorch documents them, without a list of its prompts, and a reward with arguments."""
    calls = []

    def prompt(nouns="cat,dog", low=1, high=3):
        return f"{random.randint(low, high)} {random.choice(nouns.split(','))}s"

    def make_reward(scale=1.0):
        def reward(images, prompts, metadata):
            calls.append((scale, len(images), sorted(set(prompts))))
            return [scale * image.mean() for image in images], {}

        return reward

    monkeypatch.setitem(PROMPTS, "mine", prompt)
    monkeypatch.setitem(REWARDS, "mine", make_reward)
    return calls


def test_functions_as_in_ddpo_pytorch(mine, train, caplog):
    """Their keyword arguments, per_prompt_stat_tracking=None, and the parts of a sum in the log."""
    own = {"prompt_fn": "mine", "prompt_fn_kwargs": {"nouns": "bird,fish", "low": 2}}
    own |= {"reward_fn": "mine:2.0,jpeg_incompressibility:-0.1", "reward_fn_kwargs.mine.scale": 3.0}
    folder, (entry,) = train(num_epochs=1, per_prompt_stat_tracking=None, **own)
    assert {scale for scale, _, _ in mine} == {3.0}
    texts = {text for _, _, prompts in mine for text in prompts}
    assert texts <= {f"{number} {noun}s" for number in (2, 3) for noun in ("bird", "fish")}
    total = 2.0 * entry["reward_mine_mean"] - 0.1 * entry["reward_jpeg_incompressibility_mean"]
    assert entry["reward_mean"] == pytest.approx(total, rel=1e-12)
    assert entry["reward_mine_std"] > 0 and entry["reward_jpeg_incompressibility_std"] > 0
    # over the whole batch their standard deviation is 1, but for the 1e-6 that is added to that of the rewards
    assert entry["advantage_std"] == pytest.approx(1, abs=2e-6 / entry["reward_std"])
    written = json.loads((folder / "config.json").read_text())
    assert written["per_prompt_stat_tracking"] is None and written["train"]["advantage"] == "global"
    # with other arguments, or without normalization over the batch, it is another run
    with pytest.raises(UserError, match="reward_fn_kwargs.mine.scale='?3.0"):
        fewer = {key: value for key, value in own.items() if "scale" not in key}
        train(num_epochs=2, per_prompt_stat_tracking=None, **fewer)
    with pytest.raises(UserError, match="train.advantage=.global"):
        train(num_epochs=2, **own)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"train__advantage": "group"}, ("8 samples", "sample.images_per_prompt")),
        ({"held_out__every": 1}, ("'mine'", "PROMPT_LISTS")),
        ({"prompt_fn_kwargs": {"noun": "bird"}}, ("prompt_fn_kwargs", "noun")),
        ({"reward_fn": "mine", "reward_fn_kwargs.mine.scal": 1}, ("reward_fn_kwargs.mine", "scal")),
        ({"reward_fn": "mine", "reward_fn_kwargs.mine.scale": float("nan")}, ("'mine'", "nan")),
        ({"reward_fn": "none"}, ("'none'", "None")),
        ({"reward_fn": "none:0.5,jpeg_compressibility"}, ("'none'", "None")),
        ({"per_prompt_stat_tracking.min_count": 1}, ("min_count", "1")),
        ({"train__timestep_window": (0.5,)}, ("train.timestep_window", "0.5")),
        ({"prompt_fn": "numbers"}, ("'numbers'", "7")),
    ],
    ids=lambda value: "" if isinstance(value, tuple) else "-".join(value),
)
def test_what_cannot_work_is_refused_first(mine, train, tmp_path, monkeypatch, overrides, expected):
    monkeypatch.setitem(REWARDS, "none", lambda: lambda images, prompts, metadata: (None, {}))
    monkeypatch.setitem(PROMPTS, "numbers", lambda: 7)
    monkeypatch.setitem(PROMPTS, "mine", lambda nouns="a": f"{nouns} {random.random()}")  # no prompt occurs twice
    with pytest.raises(UserError) as caught:
        train(**({"prompt_fn": "mine", "reward_fn": "jpeg_compressibility"} | overrides))
    message = str(caught.value)
    assert all(text in message for text in expected) and "\n" not in message, message
    assert not (tmp_path / "logs").exists()


def test_a_constant_reward_and_prompts_that_are_alone_are_warned_of(train, monkeypatch, caplog):
    monkeypatch.setitem(REWARDS, "constant", lambda: lambda images, prompts, metadata: ([0.1] * len(images), {}))
    caplog.set_level(logging.WARNING)
    numbers = itertools.cycle([0, 0, 1, 1, 2, 2, 3, 4])  # of the 8 samples of an epoch
    monkeypatch.setitem(PROMPTS, "some", lambda: f"prompt {next(numbers)}")
    _, (first, second) = train(prompt_fn="some", reward_fn="constant", train__advantage="group")
    assert first["zero_std_share"] == second["zero_std_share"] == 1.0 and first["grad_norm"] == 0
    warnings = [record.getMessage() for record in caplog.records if record.name == "ddpo_pytorch.training.health"]
    assert len(warnings) == 2 and "2 of 5 prompts" in warnings[0] and "epoch 0 taught" in warnings[1]


def test_functions_of_a_module_need_no_entry(train, tmp_path, monkeypatch):
    """`module:function` is found from the current folder, and its keyword arguments go by the function's name."""
    (tmp_path / "my_functions.py").write_text(
        "def cats():\n    return 'a cat', {}\n\n"
        "def shade(scale=1.0):\n    return lambda images, prompts, metadata: ([scale * i.mean() for i in images], {})\n"
    )
    monkeypatch.chdir(tmp_path)
    own = {"prompt_fn": "my_functions:cats", "reward_fn": "my_functions:shade:2,jpeg_compressibility:0"}
    _, (entry,) = train(num_epochs=1, **own | {"reward_fn_kwargs.shade.scale": 3.0})
    assert entry["reward_mean"] == pytest.approx(2 * entry["reward_shade_mean"]) and entry["reward_mean"] > 2
    for field, path in (("prompt_fn", "my_functions:dogs"), ("reward_fn", "no_module:shade")):
        with pytest.raises(UserError, match=f"{field}: '{path}'"):
            train(num_epochs=1, run_name="other", **own | {field: path})
