"""Commands that meet a full disk or a folder in use end with one line; later they end as if nothing had been."""

import os
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
from refusals import refused
from script_tools import call_main, files_of, limited, load_flag_script

from ddpo_pytorch.generator.pipeline import load_pipeline, save_model
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.files import DiskFull, locked

PAGE = 4096  # bytes by which a small file system counts


@contextmanager
def disk(folder: Path, size: int):
    """Mount a file system of `size` bytes; yield a function that enlarges it."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
    if os.getuid() or not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no small file system may be mounted here")
    try:
        yield lambda larger: subprocess.run(["mount", "-o", f"remount,size={larger}", folder], check=True)
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture
def commands(run_main, config_file, world, train_stage, train):
    """By name, functions that write a folder, and leave in it what does not depend on times and places."""
    table = {"dataset__csv": str(world / "splits" / "phantom_val.csv"), "dataset__data_path": str(world / "images")}

    def stage_one(out):
        train_stage(out, sd__stage="vae", sd__save_every=1, sd__grid_every=2, sd__cache_dir=str(out / "cache"))
        for path in (*out.glob("*.jsonl"), *(out / "cache").glob("*")):  # a cache that may do without
            path.unlink()

    def reinforce(out):
        run, epochs = train(logdir=str(out), num_epochs=3, sample__num_batches_per_epoch=1, sample__num_steps=2)
        assert [entry["epoch"] for entry in epochs] == [0, 1, 2]
        for path in run.glob("*.json*"):
            path.unlink()

    def main(name, **fields):
        return lambda out: run_main(name, config_file, logdir=str(out), **fields)

    commands = {"extraction": main("extract_dataset_latents.py", dataset__image_size=32, **table)}
    commands["evaluation"] = main("eval.py", eval__classifier="", sample__num_steps=1)
    return commands | {"vae": stage_one, "training": reinforce}


@pytest.mark.slow
@pytest.mark.parametrize("name, share", [("extraction", 0.05), ("evaluation", 0.6), ("vae", 0.6), ("training", 0.6)])
def test_a_disk_with_room_for_a_share_and_then_for_all(commands, tmp_path, name, share):
    run = commands[name]
    run(tmp_path / "reference")
    expected = files_of(tmp_path / "reference")
    needed = sum(-(-len(content) // PAGE) * PAGE for content in expected.values())
    with disk(tmp_path / "disk", max(4 * PAGE, int(share * needed))) as enlarge:
        refused(str(tmp_path / "disk"), run, tmp_path / "disk" / "out")
        left = files_of(tmp_path / "disk")
        assert not [name for name in left if name.endswith((".tmp", ".partial")) or "/.lock" in name]
        for name, content in left.items():
            if name.endswith((".png", ".safetensors")):
                assert expected[name.removeprefix("out/")] == content
        enlarge(8 * needed)
        run(tmp_path / "disk" / "out")
        assert files_of(tmp_path / "disk" / "out") == expected


def test_a_whole_model_on_a_full_disk(tiny_pipeline_dir, tmp_path):
    folder, pipe = shutil.copytree(tiny_pipeline_dir / "vae", tmp_path / "vae").parent, load_pipeline(tiny_pipeline_dir)
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    before = weights.read_bytes()
    with limited(len(before) // 2), pytest.raises(DiskFull, match=str(folder)) as caught:
        save_model(pipe, folder)
    assert "\n" not in str(caught.value) and weights.read_bytes() == before
    save_model(pipe, folder)
    load_pipeline(folder)


COMMANDS = {
    "train_sd.py": {"sd__stage": "vae", "sd__output": "{}"},
    "extract_dataset_latents.py": {"logdir": "{}"},
    "eval.py": {"logdir": "{}"},
    "generate.py": {"logdir": "{}"},
    "train_rlhf.py": {"rlhf__ratings": "no.csv", "rlhf__output": "{}"},
    "metric.py": {"metric__fake_path": "samples", "metric__output": "{}"},
    # flags
    "train_isic_classifier.py": ["--checkpoint_dir={}", "--data_path=x"],
    "augment.py": ["--output={}", "--data_path=x", "--samples=SD=y"],
    "download.py": ["--root={}"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_second_command_is_refused(run_main, config_file, tmp_path, name):
    folder, given = tmp_path / "out", COMMANDS[name]
    with locked(folder), pytest.raises(UserError, match="^[^\n]*out' is being written[^\n]*$"):
        if isinstance(given, list):
            call_main(load_flag_script(name), *(option.format(folder) for option in given))
        else:
            run_main(name, config_file, **{field: value.format(folder) for field, value in given.items()})
    assert files_of(tmp_path) == {}
