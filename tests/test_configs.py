"""Configurations: experiments at every scale, the paper's arithmetic, blocks that users change, ranges of numbers."""

import inspect
import math
import re
import sys

import numpy as np
import pytest
from absl import flags
from launching import ROOT
from ml_collections import ConfigDict, config_flags
from refusals import refused
from script_tools import load_config, load_module

from ddpo_pytorch.generator import finetune_data
from ddpo_pytorch.metrics.inputs import check_request
from ddpo_pytorch.rlhf import training as rlhf
from ddpo_pytorch.training.setup import batch_sizes, check_training
from ddpo_pytorch.utils import cli
from ddpo_pytorch.utils.cli import _parse_flags, define_config
from ddpo_pytorch.utils.settings import SEED, Range, check_pair

FILE = ROOT / "config" / "base.py"
# the six of the official code, the one-GPU variants, and stage (i)
STAGE_TWO = "prompt_image_alignment_classifier_isic"
OFFICIAL = [f"{STAGE_TWO}{suffix}" for suffix in ("", "_eval", "_eval_rl", "_16gb", "_24gb", "_80gb")]
OFFICIAL += ["preprocess_isic_real_data", "evaluate_metric_rl", "evaluate_metric_sd", "finetune_sd", "finetune_sd_24gb"]
BASIS = {"mini": "dgx", "isic128": "dgx", "odir128": "fundus"}
SIZES = [("dgx", "", 512), ("isic128", "", 128), ("mini", "", 64)]
SIZES += [("fundus", "", 512), ("fundus", "_mini", 64), ("odir128", "", 128)]


def experiments(file: str) -> set[str]:
    """Return the names of a file's experiments: its public functions without arguments."""
    functions = inspect.getmembers(load_config(file), inspect.isfunction)
    return {name for name, one in functions if name[0] != "_" and not inspect.signature(one).parameters}


@pytest.mark.parametrize(("file", "suffix", "size"), SIZES)
def test_every_experiment_has_one_root_and_the_sizes_of_its_file(file, suffix, size):
    """Those of the file itself, and of the one that it is based on."""
    basis = BASIS.get(file, file)
    names = experiments(file) | experiments(basis)
    large, small = ({name for name in names if name.endswith("_mini") == mini} for mini in (False, True))
    assert len(large) > 8 and (basis != "dgx" or set(OFFICIAL) <= large)
    for experiment in {name + suffix for name in large} | (small if suffix else set()):
        config = load_config(file).get_config(experiment)
        assert config.sd.image_size == config.dataset.image_size == size
        assert basis == "dgx" or config.rlhf.image_size == size
        check_training(config)
        batch_sizes(config.sample, config.train, 4)
        rlhf.check_settings(config.rlhf)
        config.base_log_path = "/elsewhere"
        assert "rl4med-out" not in config.to_json_best_effort() and "/elsewhere" in config.logdir


def test_unknown_fields_and_experiments_fail_by_name():
    unknown = [("dgx", "nope"), ("mini", "nope"), ("mini", "base"), ("mini", "at_scale_of"), ("isic128", "nope")]
    unknown += [("fundus", "nope_mini"), ("odir128", "nope"), ("odir128", "improve_mini"), ("odir128", "mini")]
    for file, name in unknown:
        with pytest.raises(ValueError, match=f"'{name}' is unknown") as caught:
            load_config(file).get_config(name)
        names, basis = re.split(r"[ ,]+", str(caught.value).partition(".py has ")[2]), BASIS.get(file, file)
        assert {key for key in experiments(basis) if not re.search(r"_(mini|\d+gb)$", key)} <= set(names)
        assert experiments(file) <= set(names) and (file != "fundus" or "improve_mini" in names)
        for known in names:
            load_config(file).get_config(known)
    with pytest.raises(AttributeError, match="learnin_rate"):
        load_config("mini").get_config(OFFICIAL[0]).train.learnin_rate = 1.0


def test_a_window_of_whole_steps_is_not_rounded_to_others(config):
    first = (50, (0.0, 0.28), (0, 14)), (50, (0.0, 0.14), (0, 7))
    for steps, window, expected in *first, (100, (0.29, 1.0), (29, 100)), (10, (0.25, 0.75), (2, 8)):
        config.sample.num_steps, config.train.timestep_window = steps, window
        assert batch_sizes(config.sample, config.train, 1).timestep_window == expected


def test_official_defaults_the_papers_arithmetic_and_what_fundus_images_start_from():
    odir, fundus = load_config("odir128"), load_config("fundus")
    assert odir.get_config("real_images").pretrained.model == "" and not fundus.get_config("ddpo").rlhf.backbone
    assert odir.get_config("train_rlhf_held_out").rlhf.backbone != odir.get_config("train_rlhf").rlhf.backbone
    for suffix, processes in ("_16gb", 1), ("_24gb", 1), ("_80gb", 1), ("", 4):
        config = load_config("dgx").get_config(STAGE_TWO + suffix)
        geometry = batch_sizes(config.sample, config.train, processes)
        assert (geometry.samples, geometry.updates, geometry.train_timesteps) == (256, 2, 50)
    assert (config.sample.num_steps, config.sample.eta, config.sample.guidance_scale) == (50, 1.0, 5.0)
    assert (config.train.learning_rate, config.train.clip_range, config.train.adv_clip_max) == (3e-4, 1e-4, 5)
    assert (config.train.adam_weight_decay, config.train.adam_epsilon, config.train.max_grad_norm) == (1e-4, 1e-8, 1.0)
    assert (config.per_prompt_stat_tracking.buffer_size, config.per_prompt_stat_tracking.min_count) == (32, 16)
    assert (config.seed, config.num_epochs, config.save_freq, config.mixed_precision) == (42, 200, 1, "fp16")
    assert (config.train.kl_coef, config.train.advantage, config.early_stop.patience) == (0.0, "per_prompt", 0)
    evaluation = load_config("dgx").get_config(f"{STAGE_TWO}_eval")
    assert (evaluation.seed, evaluation.eval.num_samples_per_prompt, evaluation.eval.batch_size) == (88, 960, 20)


@pytest.mark.parametrize("kind", [dict, ConfigDict])
def test_a_dict_replaces_a_block_as_in_ddpo_pytorch(config, kind):
    config.prompt_fn_kwargs = kind({"nouns_file": "a.txt", "low": 1})
    config.per_prompt_stat_tracking = kind({"buffer_size": 32, "min_count": 4})
    assert config.prompt_fn_kwargs.to_dict() == {"nouns_file": "a.txt", "low": 1}
    assert config.per_prompt_stat_tracking.to_dict() == {"buffer_size": 32, "min_count": 4}
    config.per_prompt_stat_tracking = kind({"min_count": 8})
    rest = {"buffer_size": 32} if kind is dict else {}  # a dict changes what it names
    assert config.per_prompt_stat_tracking.to_dict() == rest | {"min_count": 8}
    train = config.train = ConfigDict({"batch_size": 3})  # as ddpo-pytorch's files begin a block
    train.learning_rate = 1.0
    assert config.train.to_dict() == {"batch_size": 3, "learning_rate": 1.0}
    config.prompt_fn_kwargs.high = 2
    config.per_prompt_stat_tracking = None
    assert config.to_dict()["per_prompt_stat_tracking"] is None


def test_the_command_line_can_set_them(monkeypatch):
    def parsed(*words: str) -> ConfigDict:
        values = flags.FlagValues()
        config_flags.DEFINE_config_file("config", str(FILE), flag_values=values)
        monkeypatch.setattr(sys, "argv", ["script", f"--config={FILE}", *(f"--config.{word}" for word in words)])
        values(sys.argv)
        return values.config

    mine = ("reward_fn_kwargs.my_reward.x=3", "reward_fn_kwargs.my_reward.file=a/b c.txt")
    theirs = ("reward_fn_kwargs.isic_classifier_reward.classifier=H6", "prompt_fn_kwargs.nouns_file=nouns.txt")
    config = parsed(*mine, *theirs, "per_prompt_stat_tracking=None")
    assert config.reward_fn_kwargs.to_dict()["my_reward"] == {"x": 3, "file": "a/b c.txt"}
    assert config.reward_fn_kwargs.isic_classifier_reward.classifier == "H6"
    assert config.prompt_fn_kwargs.nouns_file == "nouns.txt" and config.per_prompt_stat_tracking is None
    tracking = parsed("per_prompt_stat_tracking={'buffer_size': 64}").per_prompt_stat_tracking
    assert tracking.to_dict() == {"buffer_size": 64, "min_count": 16}


# parts of values cannot be set alone
OVERRIDES = dict.fromkeys(("eval.prompts[0]=3", "pretrained.model.x=3"), "--config.FIELD=VALUE")
OVERRIDES |= {"train.learning_rat=1": "'learning_rat'"}


@pytest.mark.parametrize("override", OVERRIDES)
def test_a_bad_override_of_the_default_file_is_one_line(monkeypatch, capsys, override):
    monkeypatch.setattr(sys, "argv", ["script", f"--config.{override}"])
    with pytest.raises(SystemExit) as caught:
        define_config(str(ROOT / "scripts" / "train.py"), "experiment")
    (line,) = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2 and line.startswith("error: ") and "\\n" not in line and OVERRIDES[override] in line


@pytest.mark.parametrize("returned", ["{'seed': 3}", "None"])
def test_a_file_that_returns_no_configuration_is_refused(monkeypatch, capsys, tmp_path, returned):
    (tmp_path / "own.py").write_text(f"def get_config(): return {returned}\n")
    monkeypatch.setattr(flags, "FLAGS", flags.FlagValues())
    config_flags.DEFINE_config_file("config", flag_values=flags.FLAGS)
    with pytest.raises(SystemExit) as caught:
        _parse_flags([str(tmp_path / "scripts/script.py"), f"--config={tmp_path / 'own.py'}"])
    assert caught.value.code == 2 and "get_config() of the --config file must" in capsys.readouterr().err


@pytest.fixture
def config():
    config = load_config("base").get_config()
    config.sd.output = config.metric.output = config.metric.classifier = "somewhere"
    config.improve.methods = ("ddpo",)
    config.improve.update({name: name for name in ("judges", "held_out_judges", "csv", "held_out_csv", "data_path")})
    return config


def test_ranges_and_pairs_of_two_numbers_in_order():
    for interval, inside, outside in (
        (Range("(0, 1]"), (1e-9, 0.5, 1), (0, 1.01, -1, math.nan, "0.5", None, True)),
        (Range("[0, 1)"), (0, 0.999), (1, -1e-9, math.nan)),
        (Range("(0, inf)"), (1e-30, 1e30), (0, math.inf, math.nan)),
        (Range("(0, inf]"), (1, math.inf), (0, math.nan)),
        (Range("[1, inf)", whole=True), (1, 10**30, np.int64(3)), (0, 1.0, 2.5, True, math.inf, "1", (1,))),
        (SEED, (0, 2**32 - 1), (-1, 2**32, 10**40, 1.0)),
    ):
        assert all(value in interval for value in inside)
        assert not any(value in interval for value in outside)
    for value in (0.5, (0.5,), (0.5, 0.5), (0.6, 0.5), (0.0, 1.5), (0.0, math.nan), ("0", "1"), None):
        said = f"^train.timestep_window is {re.escape(repr(value))}[; ]"
        refused(said, check_pair, "train.timestep_window", value, Range("[0, 1]"))
    assert check_pair("x", (0, 0.5), Range("[0, 1]")) == (0, 0.5)


BAD = {"train.learning_rate": (0.0, math.inf, math.nan), "train.adam_beta1": (1.0,), "train.adam_weight_decay": (-1.0,)}
BAD |= {"train.clip_range": (0.0,), "train.kl_coef": (-0.1,), "train.timestep_fraction": (0.0,), "seed": (2**32, None)}
BAD |= {"sample.guidance_scale": (math.nan,), "sample.batch_size": (0,), "sample.num_batches_per_epoch": (0,)}
BAD |= {"held_out.tolerance": (1.0, math.nan), "early_stop.patience": (-1,)}
BAD |= {"per_prompt_stat_tracking.min_count": (1, 17)}  # 16 are remembered
BAD_SD = {"sd.batch_size": (0,), "sd.min_snr_gamma": (math.inf,), "sd.ema_decay": (1.0,), "sd.real_share": (0.4,)}
BAD_IMPROVE = {"train.clip_range": (math.nan,), "eval.batch_size": (0,), "improve.real_share": (0.1,)}
BAD_IMPROVE |= {"improve.num_candidates": (11,)}  # of 10 attempts
BAD_RLHF = {"rlhf.second_learning_rate": (0.0,), "rlhf.threshold": (math.nan,)}
CHECKS = {
    "train": (check_training, BAD),
    "sd": (lambda config: finetune_data.check_settings(config.sd), BAD_SD),
    "rlhf": (lambda config: rlhf.check_settings(config.rlhf), BAD_RLHF),
    "metric": (lambda config: check_request(config.metric), {"metric.batch_size": (0,)}),
    # with what its scripts will be given
    "improve": (lambda config: load_module(ROOT / "scripts" / "improve.py").check_settings(config), BAD_IMPROVE),
}


@pytest.mark.parametrize("script", CHECKS)
def test_scripts_refuse_settings_with_which_they_would_fail_or_learn_nothing(config, script):
    check, bad = CHECKS[script]
    check(config)
    for field, values in bad.items():
        before = config[field]
        for value in values:
            config.update_from_flattened_dict({field: value})
            refused(f"^{field} is {re.escape(repr(value))}[; ]", check, config)
        config.update_from_flattened_dict({field: before})


def test_an_interrupted_command_says_so_in_one_line(capsys):
    with pytest.raises(SystemExit) as caught, cli._one_line_errors():
        raise KeyboardInterrupt
    assert caught.value.code == 130 and capsys.readouterr().err == "interrupted\n"
