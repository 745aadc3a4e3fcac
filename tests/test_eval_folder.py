"""eval.py's workers and its folder: any number of threads, one run at a time, lost files, more images, damaged logs."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_script
from script_tools import PROMPTS, files_of, options, succeed

from ddpo_pytorch.data.images import save_image
from ddpo_pytorch.data.isic import labels_of
from ddpo_pytorch.data.sample_folder import PartLog, folder_name, merge_parts, read_entries
from ddpo_pytorch.generator.pipeline import load_pipeline
from ddpo_pytorch.rewards import isic_classifier_reward
from ddpo_pytorch.sampling import Sampler, draw_pass, draw_passes, plan
from ddpo_pytorch.utils.errors import UserError, difference
from ddpo_pytorch.utils.files import locked

pytest_plugins = ["script_tools"]
FOLDERS = [f"images/{folder_name(prompt)}" for prompt in PROMPTS]


def log_of(folder: Path) -> list[dict]:
    return json.loads((folder / "image_log.json").read_text())


def images_of(folder: Path) -> dict[str, bytes]:
    return {path: data for path, data in files_of(folder).items() if path.startswith("images/")}


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("scheduler", ["ddim", "dpm++"])
def test_any_number_of_workers_writes_the_same_bytes(scheduler, tiny_pipeline_dir, judges, one_thread, tmp_path):
    """Eight passes of three images, the last one short, with a judge; twice with five workers."""
    sampler = Sampler(load_pipeline(tiny_pipeline_dir), scheduler, 4, 1.0, 3.0)
    judge = isic_classifier_reward(judges[4])
    jobs = plan([(prompt, {}) for prompt in PROMPTS[:2]], 11, seed=5)
    passes = [jobs[start : start + 3] for start in range(0, len(jobs), 3)]
    drawn = []
    for number, workers in enumerate((1, 2, 5, 5)):
        folder = tmp_path / str(number)
        folder.mkdir()
        with PartLog(folder, 0) as log:
            found = dict(draw_passes(sampler, passes, workers, 3, folder, log, (), judge, "abc"))
        assert found == {index: [] for index in range(8)}
        assert merge_parts(folder, [job.path for job in jobs]) == 22
        drawn.append(files_of(folder))
    assert len(drawn[0]) == 23 and len(set(drawn[0].values())) == 23
    assert drawn[0] == drawn[1] == drawn[2] == drawn[3]


def test_an_error_while_drawing_ends_the_run(tiny_pipeline_dir, one_thread, tmp_path):
    def judge(images, prompts, metadata):
        raise OSError("no more")

    sampler = Sampler(load_pipeline(tiny_pipeline_dir), "ddim", 1, 1.0, 1.0)
    passes = [[job] for job in plan([(PROMPTS[0], {})], 40, seed=5)]
    with PartLog(tmp_path, 0) as log, pytest.raises(OSError, match="no more"):
        list(draw_passes(sampler, passes, 2, 1, tmp_path, log, (), judge, ""))
    assert 0 < len(list(tmp_path.rglob("*.png"))) < 40 and not read_entries(tmp_path)  # the rest was not begun


def test_drawing_takes_turns_and_writing_does_not(tiny_pipeline_dir, one_thread, tmp_path, monkeypatch):
    """As on a GPU, where one thread writes while another draws."""
    turn, held = threading.Lock(), []
    sampler = Sampler(load_pipeline(tiny_pipeline_dir), "ddim", 1, 1.0, 1.0)

    def draw(prompts, seeds):
        held.append(turn.locked())
        return sampler(prompts, seeds)

    def save(path, image):
        held.append(turn.locked())
        assert not read_entries(tmp_path)  # the file comes first
        save_image(path, image)

    monkeypatch.setattr("ddpo_pytorch.sampling.save_image", save)
    with PartLog(tmp_path, 0) as log:
        draw_pass(draw, plan([(PROMPTS[0], {})], 2, seed=5), 2, tmp_path, log, turn=turn)
    assert held == [True, False, False] and len(read_entries(tmp_path)) == 2


def test_other_prompts_join_a_folder_and_more_than_planned_is_told(config_file, run_main, tmp_path, caplog):
    folder = tmp_path / "a"
    fields = {"logdir": str(folder), "sample__num_steps": 2, "eval__num_samples_per_prompt": 2}
    run_main("eval.py", config_file, **fields, eval__prompts=(PROMPTS[1], PROMPTS[0]))
    first = images_of(folder)
    run_main("eval.py", config_file, **fields, eval__prompts=PROMPTS[:3])
    assert len(first) == 4 and first.items() <= images_of(folder).items() and len(images_of(folder)) == 6
    assert [entry["prompt"] for entry in log_of(folder)] == [prompt for prompt in PROMPTS[:3] for _ in range(2)]
    assert "image_log.json" not in caplog.text and "asks for" not in caplog.text
    stray = shutil.copy(folder / FOLDERS[2] / "00000.png", folder / FOLDERS[2] / "foreign.png")
    fields["eval__num_samples_per_prompt"] = 1
    run_main("eval.py", config_file, **fields, eval__prompts=(PROMPTS[2], PROMPTS[0]))
    places = [f"{FOLDERS[prompt]}/0000{index}.png" for prompt in (2, 0, 1) for index in range(2)]
    assert [entry["path_to_img"] for entry in log_of(folder)] == places
    assert [entry["sampleID"] for entry in log_of(folder)] == list(range(6))
    extra = folder / min(places[1], *places[3:])
    assert f"4 images are more than this command asks for, the first is {extra}" in caplog.text
    assert f"1 files are not in image_log.json, but metric.py would count them, the first is {stray}" in caplog.text


def test_an_incomplete_folder_is_told_and_completed(config_file, run_main, tmp_path, monkeypatch):
    """One file is lost and one is emptied while the run goes on."""
    folder = tmp_path / "a"
    fields = {"logdir": str(folder), "sample__num_steps": 2, "eval__classifier": ""}
    lost, emptied = (f"{FOLDERS[1]}/0000{index}.png" for index in (0, 2))

    def save(path, image):
        save_image(path, image)
        if str(path).endswith(lost):
            path.unlink()
        if str(path).endswith(emptied):
            path.write_bytes(b"")

    with monkeypatch.context() as patch:
        patch.setattr("ddpo_pytorch.sampling.save_image", save)
        with pytest.raises(UserError) as caught:
            run_main("eval.py", config_file, **fields)
    start = f"2 of 12 images are not in {str(folder)!r}, the first is {lost}"
    assert str(caught.value) == f"{start}; run the same command again"
    assert len(log_of(folder)) == 10
    run_main("eval.py", config_file, **fields)
    run_main("eval.py", config_file, **fields | {"logdir": str(tmp_path / "b")})
    assert files_of(folder) == files_of(tmp_path / "b") and len(log_of(folder)) == 12


@pytest.mark.parametrize("image_format", ["png", "jpg"])
def test_damaged_images_are_drawn_again(image_format, config_file, run_main, tmp_path, caplog):
    """One is cut, one changed in its middle, one is no image, one a pipe, which must not block."""
    fields = {"logdir": str(tmp_path), "sample__num_steps": 1, "eval__classifier": ""}
    fields |= {"eval__image_format": image_format, "eval__num_samples_per_prompt": 2, "eval__prompts": PROMPTS[:2]}
    run_main("eval.py", config_file, **fields)
    before = files_of(tmp_path)
    cut, changed, text, pipe = (tmp_path / entry["path_to_img"] for entry in log_of(tmp_path))
    data = changed.read_bytes()
    cut.write_bytes(cut.read_bytes()[:-100])
    changed.write_bytes(data[:300] + bytes([data[300] ^ 1]) + data[301:] if image_format == "png" else data[:-1])
    text.write_text("<html>")
    pipe.unlink()
    os.mkfifo(pipe)
    run_main("eval.py", config_file, **fields)
    assert files_of(tmp_path) == before
    assert "3 images are damaged" in caplog.text  # the fourth is missing


def test_a_folder_is_written_by_one_run_at_a_time(config_file, run_main, tmp_path):
    fields = {"logdir": str(tmp_path / "a"), "sample__num_steps": 1, "eval__classifier": ""}
    with locked(tmp_path / "a"):
        with pytest.raises(UserError, match="is being written by another run; wait for its end"):
            run_main("eval.py", config_file, **fields)
        assert files_of(tmp_path / "a") == {".lock": b""}
    (tmp_path / "a" / ".lock").touch()  # of a run that was killed
    run_main("eval.py", config_file, **fields)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["image_log.json", "images", "settings.json"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("image_log.json", '{"a": 1}', "image_log.json' is damaged"),
        ("image_log.json", "[1]", "image_log.json' is damaged"),
        ("image_log.json", '[{"prompt": "x"}]', "image_log.json' has entries without path_to_img"),
        ("settings.json", '{"settings": null}', "settings.json' is damaged"),
        ("settings.json", "[]", "settings.json' is damaged"),
    ],
)
def test_damaged_bookkeeping(name, text, message, config_file, run_main, tmp_path):
    fields = {"logdir": str(tmp_path / "a"), "sample__num_steps": 1, "eval__num_samples_per_prompt": 1}
    run_main("eval.py", config_file, **fields)
    (tmp_path / "a" / name).write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        run_main("eval.py", config_file, **fields)
    assert "\n" not in str(caught.value)


def test_the_first_difference_of_two_settings():
    long = [f"a prompt of many words, number {number}" for number in range(30)]
    other = [*long[:20], "other", *long[21:]]
    assert difference({"a": 1, "b": long}, {"a": 1, "b": other}) == ("b[20]", repr(long[20]), "'other'")
    assert difference({"b": long}, {"b": long[:7]}) == ("length of b", "30", "7")
    assert difference({"b": long}, {"b": None})[2] == "None" and difference({"b": long}, {"b": long}) is None


def test_a_judge_of_four_attributes_states_four_labels(config_file, judges, run_main, tmp_path):
    fields = {"sample__num_steps": 1, "eval__num_samples_per_prompt": 1, "eval__classifier": str(judges[4])}
    run_main("eval.py", config_file, logdir=str(tmp_path / "x"), **fields)
    for entry in log_of(tmp_path / "x"):
        assert entry["labels"] == list(labels_of(entry["prompt"]))[:4] and len(entry["predictions"]) == 4


def test_a_prompt_that_is_cut_is_told(config_file, run_main, tmp_path, caplog):
    short, words = " ".join("a" * 75), " ".join("a" * 76)  # and two tokens around them, of 77
    fields = {"sample__num_steps": 1, "eval__num_samples_per_prompt": 1, "eval__classifier": ""}
    run_main("eval.py", config_file, logdir=str(tmp_path / "x"), eval__prompts=(short, words), **fields)
    assert f"1 prompts exceed 77 tokens and are truncated, the first is {words!r}" in caplog.text


@pytest.mark.slow
def test_what_only_the_main_process_notices_ends_all_with_one_line(config_file, tmp_path):
    fields = {"logdir": tmp_path / "x", "sample__num_steps": 1, "eval__num_samples_per_prompt": 1}
    succeed("eval.py", *options(config_file, **fields))
    result = run_script("eval.py", *options(config_file, **fields, seed=43), processes=2)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode != 0 and len(errors) == 1 and "made with seed 42, now it is 43" in errors[0]
    assert "exitcode  : 2" in result.stderr and "exitcode  : 1" not in result.stderr


@pytest.mark.slow
def test_nodes_without_a_common_folder_are_told(config_file, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": str(port), "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    nodes = [
        subprocess.Popen(
            [sys.executable, "scripts/eval.py", *options(config_file, logdir=tmp_path / f"disk{rank}")],
            cwd=ROOT,
            env=os.environ | common | {"RANK": str(rank)},
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    errors = [node.communicate(timeout=300)[1].decode() for node in nodes]
    assert [node.returncode for node in nodes] == [2, 2], errors
    assert f"error: process 1 does not see {str(tmp_path / 'disk0')!r}: several nodes need a common logdir" in errors[0]
    assert "error: " not in errors[1] and not list(tmp_path.rglob("*.png"))
