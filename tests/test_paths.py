"""Paths: "~" is a home folder everywhere, empty ones are refused, scripts run from any folder."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, run_script
from script_tools import load_module

from ddpo_pytorch.augmentation.plan import parse_samples
from ddpo_pytorch.data import fundus, splits
from ddpo_pytorch.metrics.image_sets import named_paths
from ddpo_pytorch.phantoms import fundus as retina
from ddpo_pytorch.phantoms import rating_sets as degradation
from ddpo_pytorch.phantoms import skin as phantom
from ddpo_pytorch.utils.cli import _find_config, expand, expand_config, expand_flags
from ddpo_pytorch.utils.errors import UserError

pytest_plugins = ["script_tools"]

CONFIG_SCRIPTS = {
    "train.py": ("logdir", "pretrained.model"),
    "eval.py": ("logdir", "pretrained.model"),
    "generate.py": ("logdir", "pretrained.model", "improve.judges"),
    "extract_dataset_latents.py": ("logdir",),
    "metric.py": ("metric.output", "metric.cache_dir"),
    "train_sd.py": ("sd.output", "pretrained.model"),
    "train_rlhf.py": ("rlhf.output", "rlhf.ratings", "rlhf.text_encoder"),
    "improve.py": ("improve.output", "improve.judges", "improve.csv", "improve.data_path", "pretrained.model"),
}


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "home"


def test_a_home_folder_is_expanded_at_the_beginning_only(home):
    assert expand("~") == str(home) and expand("~/a b/c") == f"{home}/a b/c"
    assert [expand(path) for path in ("", "a/~/b", "./~", "/~")] == ["", "a/~/b", "./~", "/~"]
    with pytest.raises(UserError, match="'~nobody-of-this-name/x'.*./~nobody-of-this-name/x"):
        expand("~nobody-of-this-name/x")


@pytest.mark.parametrize("scale", ["base", "dgx", "fundus", "mini", "isic128"])
def test_no_path_of_a_configuration_keeps_its_tilde(home, scale):
    module = load_module(ROOT / "config" / f"{scale}.py")
    config = module.get_config("") if scale == "base" else module.get_config("finetune_sd")
    config.base_log_path = "~/out"
    config.sd.latents = "~/latents"
    config.eval.prompts = ("~ 5 mm, a nevus",)
    expand_config(config)
    assert config.logdir == f"{home}/out/logs" and config.metric.cache_dir == f"{home}/out/cache/metrics"
    assert config.sd.latents == f"{home}/latents" and config.eval.prompts == ("~ 5 mm, a nevus",)
    texts = config.to_json_best_effort().replace("~ 5 mm", "")
    assert "~" not in texts
    config.base_log_path = "/other"  # what is derived stays derived
    assert config.rlhf.output == "/other/rlhf"


def test_lists_of_named_paths_are_expanded(home):
    assert named_paths("SD=~/a, RL=b,RL=~", "metric.folders") == [("SD", f"{home}/a"), ("RL", "b"), ("RL", str(home))]
    assert parse_samples(["SD=~/a"]) == {"SD": home / "a"}


@pytest.mark.parametrize(
    ("script", "field"),
    [(script, field) for script, fields in CONFIG_SCRIPTS.items() for field in ("base_log_path", *fields)],
)
def test_an_empty_path_is_refused_by_name_and_nothing_is_written(home, run_main, script, field):
    given = {"base_log_path": "out", "sd.output": "sd", "metric.output": "metrics", "rlhf.ratings": "ratings.csv"}
    given |= {f"improve.{name}": name for name in ("held_out_judges", "csv", "held_out_csv", "data_path")}
    with pytest.raises(UserError) as refused:
        if script == "train.py":
            config = load_module(ROOT / "config" / "base.py").get_config()
            config.update_from_flattened_dict(given | {field: " "})
            load_module(ROOT / "scripts" / script).train(config)
        run_main(script, ROOT / "config" / "base.py", **given | {field: " "})
    assert str(refused.value).startswith(f"{field} is empty") and f"--config.{field}=" in str(refused.value)
    assert not any(Path.cwd().iterdir())


TOOLS = {
    fundus: {"--csv": "table.csv", "--out": "out"},
    splits: {"--splits": "splits"},
    degradation: {"--csv": "table.csv", "--data_path": "images", "--out": "out"},
    retina: {"--out": "out"},
    phantom: {"--out": "out"},
}


@pytest.mark.parametrize(("tool", "name"), [(tool, name) for tool, names in TOOLS.items() for name in names])
@pytest.mark.parametrize("bad", ["", "~nobody-of-this-name/x"])
def test_tools_refuse_empty_paths_and_unknown_homes_by_name(home, capsys, tool, name, bad):
    with pytest.raises(SystemExit) as ended:
        tool.main([f"{option}={value}" for option, value in (TOOLS[tool] | {name: bad}).items()])
    assert ended.value.code == 2 and name in capsys.readouterr().err.splitlines()[-1]
    assert not any(Path.cwd().iterdir())


def test_tools_write_into_the_home_folder(home):
    phantom.main(["--out=~/world", "--num_train=2", "--num_val=1", "--num_test=1"])
    splits.main(["--splits=~/world/splits", "--images=~/world/images", "--list_missing=~/missing.csv"])
    assert sorted(path.name for path in home.iterdir()) == ["missing.csv", "world"]
    assert not any(Path.cwd().iterdir())


def test_a_configuration_is_found_from_any_folder(home):
    (home / "own.py").touch()
    script, base = str(ROOT / "scripts" / "eval.py"), str(ROOT / "config" / "base.py")
    assert _find_config([script, "--config=config/base.py:x", "--y"]) == [script, f"--config={base}:x", "--y"]
    assert _find_config([script, "--config", "~/own.py"]) == [script, "--config", f"{home}/own.py"]
    (Path.cwd() / "config").mkdir()
    (Path.cwd() / "config" / "base.py").touch()
    assert _find_config([script, "--config=config/base.py"]) == [script, "--config=config/base.py"]
    with pytest.raises(UserError, match="nothing.py.*nothing.py"):
        _find_config([script, "--config=config/nothing.py:x"])


def test_flags_that_are_paths(home):
    flags = SimpleNamespace(root="~/a", check="~/b", unpack=None)
    expand_flags(flags, ("root", "unpack"), ("check",))
    assert (flags.root, flags.check, flags.unpack) == (f"{home}/a", f"{home}/b", None)
    with pytest.raises(UserError, match="--root is empty"):
        expand_flags(SimpleNamespace(root=" "), ("root",))


@pytest.mark.slow
def test_eval_runs_from_another_folder(home, tiny_pipeline_dir):
    folder = Path.cwd()
    fields = {"pretrained.model": os.path.relpath(tiny_pipeline_dir, folder), "mixed_precision": "no"}
    fields |= {"sample.num_steps": 2, "base_log_path": "out", "logdir": "~/samples"}
    fields |= {"eval.prompts": "('a nevus',)", "eval.num_samples_per_prompt": 1}
    options = [f"--config.{name}={value}" for name, value in fields.items()]
    settings = {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, ROOT / "scripts" / "eval.py", "--config=config/base.py", *options]
    run = subprocess.run(command, cwd=folder, env=os.environ | settings, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    assert len(list((home / "samples").glob("images/*/*.png"))) == 1 and not any(folder.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "options", "named"),
    [
        ("train.py", ["--config=config/nothing.py:x"], "config/nothing.py"),
        ("train_isic_classifier.py", ["--data_path=x", "--checkpoint_dir="], "--checkpoint_dir is empty"),
        ("augment.py", ["--data_path=x", "--output="], "--output is empty"),
        ("download.py", ["--check=~nobody-of-this-name"], "~nobody-of-this-name"),
        ("rate.py", ["--out="], "--out is empty"),
    ],
)
def test_bad_flags_are_one_line(tmp_path, script, options, named):
    run = run_script(script, *options)
    assert run.returncode == 2 and "Traceback" not in run.stderr
    assert named in run.stderr.strip().splitlines()[-1]
