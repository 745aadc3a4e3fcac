"""Commands that meet a full disk end with one line; with more room, the same command ends as if nothing had been."""

import os
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
from script_tools import files_of

from ddpo_pytorch.utils.errors import UserError

pytest_plugins = ["script_tools", "stage_tools", "sample_sets"]
PAGE = 4096  # bytes by which a small file system counts
TIMES = ("images_per_second", "peak_memory_gib")


@contextmanager
def disk(folder: Path, size: int):
    """Mount a file system of `size` bytes; yield a function that enlarges it."""
    if os.getuid() or not shutil.which("mount"):
        pytest.skip("only root can mount a small file system")
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")
    try:
        yield lambda larger: subprocess.run(["mount", "-o", f"remount,size={larger}", folder], check=True)
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def used(folder: Path) -> int:
    return sum(-(-path.stat().st_size // PAGE) * PAGE for path in folder.rglob("*") if path.is_file())


def check(run, tmp_path: Path, share: float) -> None:
    """Let `run(folder)` write a folder on a disk with room for a share of it, then with room for all."""
    run(tmp_path / "reference")
    expected, needed = files_of(tmp_path / "reference"), used(tmp_path / "reference")
    with disk(tmp_path / "disk", max(4 * PAGE, int(share * needed))) as enlarge:
        with pytest.raises(UserError) as caught:
            run(tmp_path / "disk" / "out")
        assert "\n" not in str(caught.value) and str(tmp_path / "disk") in str(caught.value)
        left = files_of(tmp_path / "disk")
        assert not [name for name in left if name.endswith((".tmp", ".partial")) or "/.lock" in name]
        for name, content in left.items():
            if name.endswith((".png", ".safetensors")):
                assert expected[name.removeprefix("out/")] == content
        enlarge(8 * needed)
        run(tmp_path / "disk" / "out")
        assert files_of(tmp_path / "disk" / "out") == expected


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.05, 0.6])
def test_extraction(run_main, config_file, world, tmp_path, share):
    fields = {"dataset__csv": str(world / "splits" / "phantom_val.csv"), "dataset__data_path": str(world / "images")}
    fields |= {"dataset__image_size": 32, "progress": False}
    check(lambda out: run_main("extract_dataset_latents.py", config_file, logdir=str(out), **fields), tmp_path, share)


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.05, 0.6])
def test_evaluation(run_main, config_file, tmp_path, share):
    fields = {"eval__classifier": "", "eval__num_samples_per_prompt": 2, "sample__num_steps": 1, "progress": False}
    check(lambda out: run_main("eval.py", config_file, logdir=str(out), **fields), tmp_path, share)


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.05, 0.6])
def test_stage_one(train_stage, tmp_path, share):
    def run(out):
        train_stage(out, sd__stage="vae", sd__save_every=1, sd__grid_every=2, sd__cache_dir=str(out / "cache"))
        for path in (*out.glob("*.jsonl"), *(out / "cache").glob("*")):  # times; a cache that may do without
            path.unlink()

    check(run, tmp_path, share)


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.05, 0.6])
def test_metrics(run_main, config_file, fields, tmp_path, share):
    def run(out):
        run_main("metric.py", config_file, **fields(output=out / "tables", cache_dir=out / "cache"))
        for path in out.glob("tables/metrics*"):  # names of folders and times
            path.unlink()

    check(run, tmp_path, share)
