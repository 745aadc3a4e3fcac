"""The pipelines of runs/: commands resolve, each reads what an earlier one writes, finished stages are skipped."""

import os
import subprocess
from pathlib import Path

import pytest
from launching import ROOT
from test_readme import build, check_script

RUNS = sorted(path for path in (ROOT / "runs").glob("*.sh") if path.stem != "common")


def commands(script: Path, **environment: str) -> list[list[str]]:
    """Return what a dry run prints, as words."""
    result = subprocess.run(
        ["bash", script], env=os.environ | {"DRY_RUN": "1"} | environment, capture_output=True, text=True, check=True
    )
    return [line.split() for line in result.stdout.splitlines()]


@pytest.mark.parametrize("script", RUNS, ids=lambda path: path.stem)
def test_commands_resolve_and_fit_together(script, monkeypatch):
    monkeypatch.chdir(ROOT)
    built = {}
    for command in commands(script):
        if any(word.startswith("scripts/") for word in command):
            check_script(tuple(command), monkeypatch)
            place = next(i for i, word in enumerate(command) if word.startswith("scripts/"))
            if "--config" in command:
                built.setdefault(command[place][8:], []).append(
                    build(command[place], command[place + 1 :], monkeypatch)
                )
    (train,), (metric,), (real,), samples = (
        built[f"{name}.py"] for name in ("train", "metric", "extract_dataset_latents", "eval")
    )
    assert metric.metric.real_path == real.logdir
    assert [metric.metric.compare_path, metric.metric.fake_path] == [config.logdir for config in samples]
    assert [config.load_from for config in samples] == ["", f"{train.logdir}/{train.run_name}"]
    assert all(len({config.base_log_path for config in (train, metric, real, one)}) == 1 for one in samples)


def test_one_gpu_takes_the_size_of_the_card():
    for size in ("16", "80"):
        (train,) = [line for line in commands(ROOT / "runs" / "one_gpu.sh", GB=size) if "scripts/train.py" in line]
        assert train[-1].endswith(f"_{size}gb")


def test_a_rerun_skips_finished_stages_and_repeats_the_one_that_failed(tmp_path):
    script = f"OUT={tmp_path}; source {ROOT}/runs/common.sh; cd {tmp_path}\n"
    script += "stage one 1s bash -c 'echo ran >> one'; stage two 1s test -e ready; stage three 1s touch three"
    codes = []
    for _ in range(2):
        codes.append(subprocess.run(["bash", "-c", script], capture_output=True).returncode)
        (tmp_path / "ready").touch()
    assert codes == [1, 0] and (tmp_path / "one").read_text() == "ran\n" and (tmp_path / "three").exists()
    assert {path.name for path in (tmp_path / "stages").iterdir()} == {"one", "two", "three"}
