"""Scripts whose models and data are local files neither ask nor send other machines anything."""

import json
import os
import subprocess
import sys

import pytest
from launching import ROOT
from rated_world import write_config, write_rated_world
from sample_sets import write_samples
from script_tools import options, read_lines

from ddpo_pytorch.data.isic import CAPTIONS


@pytest.mark.slow
def test_local_files_need_no_network_and_images_stay_here(config_file, bert_pipeline_dir, judges_dir, judges, tmp_path):
    """No variable makes a library avoid the network; a script that looks outside shows that this would be noticed."""
    # scripts of every kind of model as briefly as they run, on local files; fields as by default, but for sizes
    train = {"logdir": tmp_path / "logs", "run_name": "run", "num_epochs": 1, "sample__batch_size": 4}
    train |= {"sample__num_batches_per_epoch": 1, "train__batch_size": 2, "held_out__every": 1}
    train |= {"sample__num_steps": 2, "sample__guidance_scale": 1.0, "train__cfg": False}
    train |= {"held_out__classifier": judges[4], "held_out__images_per_prompt": 1, "log_with": "wandb"}
    train["reward_fn_kwargs__isic_classifier_reward__classifier"] = judges[6]
    generate = {"pretrained__model": bert_pipeline_dir, "improve__judges": judges_dir, "improve__images_per_prompt": 1}
    generate |= {"reward_fn": "fundus_alignment", "prompt_fn": "from_file", "improve__max_attempts": 2}
    generate |= {"logdir": tmp_path / "generated", "improve__num_candidates": 1, "sample__guidance_scale": 1.0}
    samples = write_samples(tmp_path / "real", {CAPTIONS[6]: 2, CAPTIONS[7]: 2}, 0)
    metric = {"fake_path": samples, "real_path": samples, "output": tmp_path / "out", "cache_dir": tmp_path / "metrics"}
    rated = write_config(write_rated_world(tmp_path / "rated", 24))
    rlhf = {"rlhf__output": tmp_path / "rlhf", "rlhf__num_epochs": 1, "rlhf__batch_size": 8}
    flags = {"train.py": options(config_file, **train), "generate.py": options(config_file, **generate)}
    flags["metric.py"] = options(config_file, **{f"metric__{key}": value for key, value in metric.items()})
    flags["train_rlhf.py"] = options(rated, **rlhf)
    commands = {name: [f"scripts/{name}", *given] for name, given in flags.items()}
    (tmp_path / "look.py").write_text("import urllib.request\nurllib.request.urlopen('http://192.0.2.1/')")
    commands["look.py"] = [tmp_path / "look.py"]
    own = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "WANDB_", "TRANSFORMERS_"))}
    own |= {"HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf"), "TORCH_HOME": str(tmp_path / "torch")}
    own |= {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "WANDB_MODE": "offline"}
    given = json.dumps([[str(word) for word in command] for command in commands.values()])
    launcher = [sys.executable, "tests/offline.py", tmp_path / "notes"]
    result = subprocess.run(launcher, cwd=ROOT, env=own, input=given, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    notes = read_lines(tmp_path / "notes")
    found = {name: [what for n, what in notes if n == number] for number, name in enumerate(commands)}
    assert found.pop("look.py") == ["socket.getaddrinfo 192.0.2.1", 1]
    assert found == {name: [0] for name in found}, result.stderr[-5000:]
    # Weights & Biases has recorded a run with pictures in its folder, and has none of them
    (record,) = (tmp_path / "logs" / "run" / "wandb").glob("offline-run-*")
    files = [path for path in record.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files) and list((tmp_path / "logs" / "run").rglob("*.png"))
    assert not any(path.suffix in (".png", ".jpg") or "media" in path.parts for path in files)
    for path in files:
        content = path.read_bytes()
        assert b"\x89PNG\r\n" not in content and b"\xff\xd8\xff" not in content and b"image-file" not in content
