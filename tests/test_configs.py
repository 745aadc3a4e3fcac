"""Configurations: experiments at every scale, the paper's arithmetic, one root, blocks that users change."""

import re
import sys

import pytest
from absl import flags
from conftest import ROOT
from ml_collections import ConfigDict, config_flags
from script_tools import load_module

from ddpo_pytorch.training.setup import batch_sizes, check_training

FILE = ROOT / "config" / "base.py"
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
    return load_module(ROOT / "config" / f"{name}.py")


@pytest.mark.parametrize("scale", ["dgx", "mini", "isic128"])
@pytest.mark.parametrize("experiment", OFFICIAL)
def test_every_file_has_every_official_experiment_below_one_root(scale, experiment):
    config = load(scale).get_config(experiment)
    check_training(config)
    batch_sizes(config.sample, config.train, 4)
    config.base_log_path = "/elsewhere"
    assert "rl4med-out" not in config.to_json_best_effort() and "/elsewhere" in config.logdir


@pytest.mark.parametrize("experiment", ["train_rlhf", "improve", "ddpo", "real_images", "evaluate_metric"])
def test_fundus_experiments_exist_at_both_scales(experiment):
    fundus = load("fundus")
    large, small = fundus.get_config(experiment), fundus.get_config(f"{experiment}_mini")
    assert (large.sd.image_size, small.sd.image_size) == (512, 64)
    small.base_log_path = "/elsewhere"
    assert "rl4med-out" not in small.to_json_best_effort()


def test_unknown_fields_and_experiments_fail_by_name():
    for name in ("mini", "fundus"):
        with pytest.raises(ValueError, match="'nope' is unknown"):
            load(name).get_config("nope_mini" if name == "fundus" else "nope")
    with pytest.raises(AttributeError, match="learnin_rate"):
        load("mini").get_config(OFFICIAL[0]).train.learnin_rate = 1.0


@pytest.mark.parametrize(("suffix", "processes"), [("", 4), ("_16gb", 1), ("_24gb", 1), ("_80gb", 1)])
def test_paper_arithmetic(suffix, processes):
    config = load("dgx").get_config(f"prompt_image_alignment_classifier_isic{suffix}")
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


def test_every_field_of_base_is_explained():
    """Each setting has a comment above it, or shares that of the lines right before it."""
    lines = FILE.read_text().splitlines()
    blocks = "config|sample|train|sd|rlhf|improve|metric|evaluation|dataset|pretrained|early_stop|held_out"
    setting = re.compile(rf"    ({blocks})[.\w]* = ")
    begin = next(i for i, line in enumerate(lines) if 'base_log_path = "' in line)
    for previous, line in zip(lines[begin - 1 :], lines[begin:], strict=False):
        if setting.match(line) and not re.search(r"ConfigDict\(\)|OptionalBlock\(\)", line):
            assert previous.strip().startswith("#") or setting.match(previous), line


# Blocks that users change


@pytest.fixture
def config():
    return load("base").get_config()


def parsed(monkeypatch, *words: str) -> ConfigDict:
    """Return the configuration of a command line."""
    monkeypatch.setattr(sys, "argv", ["script", f"--config={FILE}", *words])
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", str(FILE), flag_values=values)
    values(sys.argv)
    return values.config


def test_a_file_can_set_arguments_of_new_functions(config):
    config.reward_fn_kwargs.my_reward.x = 3
    config.reward_fn_kwargs.other = {"y": {"z": 1}}
    config.prompt_fn_kwargs.nouns_file = "nouns.txt"
    config.lock()
    assert config.reward_fn_kwargs.to_dict()["my_reward"] == {"x": 3}
    assert config.reward_fn_kwargs.to_dict()["other"] == {"y": {"z": 1}}
    assert config.prompt_fn_kwargs.to_dict() == {"path": None, "low": None, "high": None, "nouns_file": "nouns.txt"}
    assert set(config.reward_fn_kwargs) == {"fundus_alignment", "isic_classifier_reward", "my_reward", "other"}


@pytest.mark.parametrize("kind", [dict, ConfigDict])
def test_a_dict_replaces_a_block_as_in_ddpo_pytorch(config, kind):
    config.prompt_fn_kwargs = kind({"nouns_file": "a.txt", "low": 1})
    config.per_prompt_stat_tracking = kind({"buffer_size": 32, "min_count": 4})
    assert config.prompt_fn_kwargs.to_dict() == {"nouns_file": "a.txt", "low": 1}
    assert config.per_prompt_stat_tracking.to_dict() == {"buffer_size": 32, "min_count": 4}
    config.prompt_fn_kwargs.high = 2
    config.per_prompt_stat_tracking = None
    assert config.to_dict()["per_prompt_stat_tracking"] is None


def test_the_command_line_can_set_them(monkeypatch):
    config = parsed(
        monkeypatch,
        "--config.reward_fn_kwargs.my_reward.x=3",
        "--config.reward_fn_kwargs.my_reward.file=a/b c.txt",
        "--config.reward_fn_kwargs.isic_classifier_reward.classifier=H6",
        "--config.prompt_fn_kwargs.nouns_file=nouns.txt",
        "--config.per_prompt_stat_tracking=None",
    )
    assert config.reward_fn_kwargs.to_dict()["my_reward"] == {"x": 3, "file": "a/b c.txt"}
    assert config.reward_fn_kwargs.isic_classifier_reward.classifier == "H6"
    assert config.prompt_fn_kwargs.nouns_file == "nouns.txt" and config.per_prompt_stat_tracking is None
    with pytest.raises((AttributeError, KeyError), match="learning_rat"):
        parsed(monkeypatch, "--config.train.learning_rat=1.0")
