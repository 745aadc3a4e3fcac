"""Configurations: the same experiments at every scale, the paper's arithmetic, one root, no unknown fields."""

import importlib.util
import re

import pytest
from conftest import ROOT

from ddpo_pytorch.training.setup import batch_sizes, check_training

# the six of the official code, the one-GPU variants, and stage (i)
OFFICIAL = (
    "preprocess_isic_real_data",
    "prompt_image_alignment_classifier_isic",
    "prompt_image_alignment_classifier_isic_eval_rl",
    "prompt_image_alignment_classifier_isic_eval",
    "evaluate_metric_rl",
    "evaluate_metric_sd",
    "prompt_image_alignment_classifier_isic_16gb",
    "prompt_image_alignment_classifier_isic_24gb",
    "prompt_image_alignment_classifier_isic_80gb",
    "finetune_sd",
    "finetune_sd_24gb",
    "train_vae",
)


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "config" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("scale", ["dgx", "mini", "isic128"])
@pytest.mark.parametrize("experiment", OFFICIAL)
def test_every_file_has_every_official_experiment(scale, experiment):
    config = load(scale).get_config(experiment)
    check_training(config)
    batch_sizes(config.sample, config.train, 4)


@pytest.mark.parametrize(
    ("experiment", "processes"),
    [
        ("prompt_image_alignment_classifier_isic", 4),
        ("prompt_image_alignment_classifier_isic_16gb", 1),
        ("prompt_image_alignment_classifier_isic_24gb", 1),
        ("prompt_image_alignment_classifier_isic_80gb", 1),
    ],
)
def test_paper_arithmetic(experiment, processes):
    config = load("dgx").get_config(experiment)
    geometry = batch_sizes(config.sample, config.train, processes)
    assert (geometry.samples, geometry.updates, geometry.train_timesteps) == (256, 2, 50)


def test_official_defaults():
    config = load("dgx").get_config("prompt_image_alignment_classifier_isic")
    assert (config.sample.num_steps, config.sample.eta, config.sample.guidance_scale) == (50, 1.0, 5.0)
    assert (config.train.learning_rate, config.train.clip_range, config.train.adv_clip_max) == (3e-4, 1e-4, 5)
    assert (config.train.adam_weight_decay, config.train.adam_epsilon, config.train.max_grad_norm) == (1e-4, 1e-8, 1.0)
    assert (config.per_prompt_stat_tracking.buffer_size, config.per_prompt_stat_tracking.min_count) == (32, 16)
    assert (config.seed, config.num_epochs, config.save_freq, config.mixed_precision) == (42, 200, 1, "fp16")
    assert (config.train.kl_coef, config.train.advantage, config.early_stop.patience) == (0.0, "per_prompt", 0)
    evaluation = load("dgx").get_config("prompt_image_alignment_classifier_isic_eval")
    assert (evaluation.seed, evaluation.eval.num_samples_per_prompt, evaluation.eval.batch_size) == (88, 960, 20)


@pytest.mark.parametrize("scale", ["dgx", "mini", "isic128"])
@pytest.mark.parametrize("experiment", OFFICIAL)
def test_overriding_the_root_moves_every_path(scale, experiment):
    config = load(scale).get_config(experiment)
    config.base_log_path = "/elsewhere"
    text = config.to_json_best_effort()
    assert "rl4med-out" not in text
    assert "/elsewhere" in config.logdir


def test_unknown_fields_and_experiments_fail_by_name():
    config = load("mini").get_config(OFFICIAL[0])
    with pytest.raises(AttributeError, match="learnin_rate"):
        config.train.learnin_rate = 1.0
    with pytest.raises(ValueError, match=r"'nope' is unknown.*prompt_image_alignment_classifier_isic"):
        load("mini").get_config("nope")


def test_every_field_of_base_is_explained():
    """Each setting has a comment above it, or shares that of the lines right before it."""
    lines = (ROOT / "config" / "base.py").read_text().splitlines()
    setting = re.compile(r"    (config|sample|train|sd|metric|evaluation|dataset|pretrained|early_stop)[.\w]* = ")
    begin = next(i for i, line in enumerate(lines) if "base_log_path" in line and "=" in line)
    for previous, line in zip(lines[begin - 1 :], lines[begin:], strict=False):
        if setting.match(line) and "ConfigDict()" not in line:
            assert previous.strip().startswith("#") or setting.match(previous), line
