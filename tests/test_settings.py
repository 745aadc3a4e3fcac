"""Numeric settings: ranges, and that no script starts with a value outside of them."""

import math
import re

import numpy as np
import pytest
from conftest import ROOT
from ml_collections import ConfigDict
from script_tools import load_module

from ddpo_pytorch.generator import finetune_data
from ddpo_pytorch.judges.classifier_training import Recipe
from ddpo_pytorch.metrics.inputs import check_request
from ddpo_pytorch.rlhf import training as rlhf
from ddpo_pytorch.training.setup import batch_sizes, check_training
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.settings import ONE_OR_MORE, POSITIVE, SEED, Range, check_choices, check_pair, check_ranges


@pytest.fixture
def config():
    config = load_module(ROOT / "config" / "base.py").get_config()
    config.sd.output = config.metric.output = config.metric.classifier = "somewhere"
    config.improve.methods = ("ddpo",)
    for name in ("judges", "held_out_judges", "csv", "held_out_csv", "data_path"):
        config.improve[name] = name
    return config


def refused(field, value):
    return pytest.raises(UserError, match=f"^{re.escape(f'{field} is {value!r}')}[; ]")


@pytest.mark.parametrize(
    ("interval", "inside", "outside"),
    [
        (Range("(0, 1]"), (1e-9, 0.5, 1), (0, 1.01, -1, math.nan, "0.5", None, True)),
        (Range("[0, 1)"), (0, 0.999), (1, -1e-9, math.nan)),
        (Range("(0, inf)"), (1e-30, 1e30), (0, math.inf, math.nan)),
        (Range("(0, inf]"), (1, math.inf), (0, math.nan)),
        (Range("[1, inf)", whole=True), (1, 10**30, np.int64(3)), (0, 1.0, 2.5, True, math.inf, "1", (1,))),
        (SEED, (0, 2**32 - 1), (-1, 2**32, 10**40, 1.0)),
    ],
    ids=lambda value: str(value) if isinstance(value, Range) else "",
)
def test_ranges(interval, inside, outside):
    assert all(value in interval for value in inside)
    assert not any(value in interval for value in outside)


def test_errors_name_field_value_and_what_is_allowed():
    settings = ConfigDict({"train": {"learning_rate": math.inf, "batch_size": 2.5}, "kind": "x"})
    with pytest.raises(UserError, match="train.learning_rate is inf.*above 0"):
        check_ranges(settings, {"train.learning_rate": POSITIVE})
    with pytest.raises(UserError, match="train.batch_size is 2.5.*integer, 1 or more"):
        check_ranges(settings.train, {"batch_size": ONE_OR_MORE}, "train.")
    with pytest.raises(UserError, match="kind is 'x'.*a, b"):
        check_choices(settings, {"kind": ("a", "b")})


@pytest.mark.parametrize("value", [0.5, (0.5,), (0.5, 0.5), (0.6, 0.5), (0, 1, 2), (0.0, math.nan), ("0", "1"), None])
def test_pairs_are_two_numbers_in_order(value):
    with refused("train.timestep_window", value):
        check_pair("train.timestep_window", value, Range("[0, 1]"))
    assert check_pair("x", (0, 0.5), Range("[0, 1]")) == (0, 0.5)
    assert check_pair("x", [0.5, 0.5], Range("[0, 1]"), equal=True) == (0.5, 0.5)


def improve(config):
    load_module(ROOT / "scripts" / "improve.py").check_settings(config)


CHECKS = {
    "train": check_training,
    "sd": lambda config: finetune_data.check_settings(config.sd),
    "rlhf": lambda config: rlhf.check_settings(config.rlhf),
    "metric": lambda config: check_request(config.metric),
    "improve": improve,  # with what its scripts will be given
}
BAD = {
    "train": [
        ("seed", 2**32),
        ("seed", None),
        ("sample.guidance_scale", math.nan),
        ("sample.batch_size", 0),
        ("train.batch_size", None),
        *(("train.learning_rate", rate) for rate in (0.0, -1e-4, math.inf, -math.inf, math.nan)),
        ("train.adam_beta1", 1.0),
        ("train.adam_beta2", math.nan),
        ("train.adam_epsilon", 0.0),
        ("train.adam_weight_decay", -1.0),
        ("train.adv_clip_max", 0.0),
        ("train.clip_range", 0.0),
        ("train.clip_range", math.inf),
        ("train.kl_coef", -0.1),
        ("train.lora_rank", 0),
        ("train.max_grad_norm", 0.0),
        ("train.timestep_fraction", 0.0),
        ("train.timesteps_per_forward", 0),
        ("held_out.tolerance", 1.0),
        ("per_prompt_stat_tracking.buffer_size", 1),
        ("per_prompt_stat_tracking.min_count", 1),
        ("per_prompt_stat_tracking.min_count", 17),  # of 16 that are remembered
    ],
    "sd": [
        ("sd.batch_size", 0),
        ("sd.learning_rate", math.nan),
        ("sd.min_snr_gamma", math.inf),
        ("sd.vae_kl_weight", math.nan),
        ("sd.ema_decay", 1.0),
        ("sd.real_share", 0.4),
    ],
    "rlhf": [
        ("rlhf.second_learning_rate", 0.0),
        ("rlhf.replay_share", math.nan),
        ("rlhf.weight_decay", math.inf),
        ("rlhf.importance_range", (2.0, 1.0)),
        ("rlhf.threshold", math.nan),
    ],
    "metric": [("metric.batch_size", 0)],
    "improve": [
        ("train.clip_range", math.nan),
        ("sample.eta", 2.0),
        ("eval.batch_size", 0),
        ("improve.learning_rate", -1.0),
        ("improve.real_share", 0.1),
        ("improve.held_out_images", 1),
        ("improve.kid_tolerance", math.nan),
    ],
}


@pytest.mark.parametrize("script", CHECKS)
def test_scripts_refuse_settings_with_which_they_would_fail_or_learn_nothing(config, script):
    CHECKS[script](config)
    for field, value in BAD[script]:
        before = config[field]
        config.update_from_flattened_dict({field: value})
        with refused(field, value):
            CHECKS[script](config)
        config.update_from_flattened_dict({field: before})


@pytest.mark.parametrize("rate", [0.0, math.inf, math.nan])
def test_classifiers_refuse_such_a_learning_rate(rate):
    with refused("learning_rate", rate):
        Recipe(learning_rate=rate)


@pytest.mark.parametrize("window", [0.5, (0.7, 0.2), (0.0, 1.5), (-0.1, 0.5), (0.5, 0.5)])
def test_timestep_windows(config, window):
    train = ConfigDict(config.train.to_dict() | {"timestep_window": None})
    train.timestep_window = window
    with refused("train.timestep_window", window):
        batch_sizes(config.sample, train, 1)


def test_an_infinite_gradient_norm_clips_nothing_and_is_allowed(config):
    config.train.max_grad_norm = math.inf
    check_training(config)
    config.train.batch_size = 3
    with pytest.raises(UserError, match="make it a multiple"):
        improve(config)
