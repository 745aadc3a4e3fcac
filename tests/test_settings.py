"""Numeric settings: ranges, and that no script starts with a value outside of them."""

import math

import numpy as np
import pytest
from conftest import ROOT
from ml_collections import ConfigDict
from script_tools import load_module

from ddpo_pytorch.generator import finetune_data as stage_data
from ddpo_pytorch.judges.classifier_training import Recipe
from ddpo_pytorch.metrics.inputs import check_request
from ddpo_pytorch.rlhf import training as rlhf
from ddpo_pytorch.training.setup import batch_geometry, check_training
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.settings import ONE_OR_MORE, POSITIVE, SEED, Range, check_choices, check_pair, check_ranges

NO_RATES = (0.0, -1e-4, math.inf, -math.inf, math.nan)


@pytest.fixture
def config():
    return load_module(ROOT / "config" / "base.py").get_config()


def refused(check, *expected: str) -> None:
    with pytest.raises(UserError) as caught:
        check()
    assert all(text in str(caught.value) for text in expected) and "\n" not in str(caught.value), str(caught.value)


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


def test_messages_name_field_value_and_what_is_allowed():
    settings = ConfigDict({"train": {"learning_rate": math.inf, "batch_size": 2.5}, "seed": -1, "kind": "x"})
    refused(lambda: check_ranges(settings, {"train.learning_rate": POSITIVE}), "train.learning_rate", "inf", "above 0")
    refused(
        lambda: check_ranges(settings.train, {"batch_size": ONE_OR_MORE}, "train."),
        "train.batch_size",
        "2.5",
        "1 or more",
    )
    refused(lambda: check_ranges({"seed": -1}, {"seed": SEED}), "seed", "-1", "4294967295")
    refused(lambda: check_choices(settings, {"kind": ("a", "b")}), "kind", "'x'", "a, b")


@pytest.mark.parametrize(
    "value", [0.5, (0.5,), (0.5, 0.5), (0.6, 0.5), (0, 1, 2), (0.0, math.nan), ("0", "1"), None, -1]
)
def test_pairs_are_two_numbers_in_order(value):
    refused(lambda: check_pair("train.timestep_window", value, Range("[0, 1]")), "train.timestep_window", repr(value))
    assert check_pair("x", (0, 0.5), Range("[0, 1]")) == (0, 0.5)
    assert check_pair("x", [0.5, 0.5], Range("[0, 1]"), equal=True) == (0.5, 0.5)


@pytest.mark.parametrize("rate", NO_RATES)
def test_no_script_trains_at_such_a_learning_rate(config, rate):
    config.sd.output, config.improve.learning_rate = "somewhere", rate
    config.train.learning_rate = config.sd.learning_rate = config.rlhf.second_learning_rate = rate
    refused(lambda: check_training(config), "train.learning_rate", repr(rate))
    refused(lambda: stage_data.check_settings(config.sd), "sd.learning_rate", repr(rate))
    refused(lambda: rlhf.check_settings(config.rlhf), "rlhf.second_learning_rate", repr(rate))
    refused(lambda: Recipe(learning_rate=rate), "learning_rate", repr(rate))
    improve = load_module(ROOT / "scripts" / "improve.py")
    refused(lambda: improve.check_settings(config), "improve.learning_rate", repr(rate))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", 2**32),
        ("seed", -1),
        ("seed", None),
        ("sample.guidance_scale", math.nan),
        ("sample.batch_size", 0),
        ("train.batch_size", None),
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
)
def test_training_is_refused_where_it_would_fail_or_learn_nothing(config, field, value):
    check_training(config)
    config.update_from_flattened_dict({field: value})
    refused(lambda: check_training(config), field, repr(value))


@pytest.mark.parametrize("window", [0.5, (0.5,), (0.7, 0.2), (0.0, 1.5), (-0.1, 0.5), (0.5, 0.5)])
def test_timestep_windows(config, window):
    train = ConfigDict(config.train.to_dict() | {"timestep_window": None})
    train.timestep_window = window
    refused(lambda: batch_geometry(config.sample, train, 1), "train.timestep_window", repr(window))


def test_an_infinite_gradient_norm_clips_nothing_and_is_allowed(config):
    config.train.max_grad_norm = math.inf
    check_training(config)


@pytest.mark.parametrize(
    ("check", "block", "field", "value"),
    [
        (stage_data.check_settings, "sd", "batch_size", 0),
        (stage_data.check_settings, "sd", "min_snr_gamma", math.inf),
        (stage_data.check_settings, "sd", "vae_kl_weight", math.nan),
        (stage_data.check_settings, "sd", "ema_decay", 1.0),
        (stage_data.check_settings, "sd", "real_share", 0.4),
        (rlhf.check_settings, "rlhf", "replay_share", math.nan),
        (rlhf.check_settings, "rlhf", "weight_decay", math.inf),
        (rlhf.check_settings, "rlhf", "importance_range", (2.0, 1.0)),
        (rlhf.check_settings, "rlhf", "importance_range", (0.2,)),
        (rlhf.check_settings, "rlhf", "threshold", math.nan),
        (check_request, "metric", "batch_size", 0),
    ],
)
def test_settings_of_the_other_scripts(config, check, block, field, value):
    config.sd.output, config.metric.output, config.metric.classifier = "somewhere", "somewhere", "H4"
    config[block][field] = value
    refused(lambda: check(config[block]), f"{block}.{field}", repr(value))


def test_improvement_checks_what_its_scripts_will_be_given(config):
    improve = load_module(ROOT / "scripts" / "improve.py")
    config.improve.methods = ("ddpo",)
    for name in ("judges", "held_out_judges", "csv", "held_out_csv", "data_path"):
        config.improve[name] = name
    improve.check_settings(config)
    for field, value in (
        ("train.clip_range", math.nan),
        ("sample.eta", 2.0),
        ("eval.batch_size", 0),
        ("improve.real_share", 0.1),
        ("improve.held_out_images", 1),
        ("improve.kid_tolerance", math.nan),
    ):
        before = config[field]
        config.update_from_flattened_dict({field: value})
        refused(lambda: improve.check_settings(config), field, repr(value))  # noqa: B023
        config.update_from_flattened_dict({field: before})
    config.train.batch_size = 3
    refused(lambda: improve.check_settings(config), "make it a multiple")
