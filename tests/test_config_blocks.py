"""Blocks of config/base.py that a user may change: keyword arguments of new functions, and None for a block."""

import sys

import pytest
from absl import flags
from conftest import ROOT
from ml_collections import ConfigDict, config_flags
from script_tools import load_module

FILE = ROOT / "config" / "base.py"


@pytest.fixture
def config():
    return load_module(FILE).get_config()


def parsed(monkeypatch, *words: str) -> ConfigDict:
    """The configuration of a command line."""
    monkeypatch.setattr(sys, "argv", ["script", f"--config={FILE}", *words])
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", str(FILE), flag_values=values)
    values(sys.argv)
    return values.config


def test_a_file_may_set_arguments_that_do_not_exist_yet(config):
    config.reward_fn_kwargs.my_reward.x = 3
    config.reward_fn_kwargs.other = {"y": {"z": 1}}
    config.prompt_fn_kwargs.nouns_file = "nouns.txt"
    config.lock()
    assert config.reward_fn_kwargs.to_dict()["my_reward"] == {"x": 3}
    assert config.reward_fn_kwargs.to_dict()["other"] == {"y": {"z": 1}}
    assert config.prompt_fn_kwargs.to_dict() == {"path": None, "low": None, "high": None, "nouns_file": "nouns.txt"}
    assert set(config.reward_fn_kwargs) == {"fundus_alignment", "isic_classifier_reward", "my_reward", "other"}


@pytest.mark.parametrize("kind", [dict, ConfigDict])
def test_a_dict_takes_the_place_of_a_block_as_in_ddpo_pytorch(config, kind):
    config.prompt_fn_kwargs = kind({"nouns_file": "a.txt", "low": 1})
    config.per_prompt_stat_tracking = kind({"buffer_size": 32, "min_count": 4})
    assert config.prompt_fn_kwargs.to_dict() == {"nouns_file": "a.txt", "low": 1}
    assert config.per_prompt_stat_tracking.to_dict() == {"buffer_size": 32, "min_count": 4}
    config.prompt_fn_kwargs.high = 2
    config.per_prompt_stat_tracking = None
    assert config.to_dict()["per_prompt_stat_tracking"] is None


def test_the_command_line_may_set_them(monkeypatch):
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


def test_other_blocks_refuse_names_that_do_not_exist(monkeypatch, config):
    with pytest.raises(AttributeError, match="learning_rat"):
        config.train.learning_rat = 1.0
    with pytest.raises((AttributeError, KeyError), match="learning_rat"):
        parsed(monkeypatch, "--config.train.learning_rat=1.0")


def test_paths_still_follow_the_root(config):
    config.base_log_path = "elsewhere"
    assert config.reward_fn_kwargs.fundus_alignment.judges == "elsewhere/rlhf"
