"""Passes of images and the sample folder's bookkeeping: threads, seeds, logs that a kill tore, unknown folders."""

import json
import threading

import pytest
import torch
from script_tools import PROMPTS, files_of

from ddpo_pytorch.data.images import save_image
from ddpo_pytorch.data.sample_folder import PartLog, claim_folder, merge_parts, read_entries
from ddpo_pytorch.generator.pipeline import load_pipeline
from ddpo_pytorch.rewards import isic_classifier_reward
from ddpo_pytorch.sampling import Sampler, draw_pass, draw_passes, images_per_pass, plan
from ddpo_pytorch.utils.errors import UserError, difference

pytest_plugins = ["script_tools"]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def one_step(tiny_pipeline_dir):
    return Sampler(load_pipeline(tiny_pipeline_dir), "ddim", 1, 1.0, 1.0)


def test_seeds_depend_on_seed_text_and_index_alone():
    whole = {(job.prompt, job.path[-9:]): job.seed for job in plan([(p, {}) for p in PROMPTS], 5, seed=3)}
    part = {(job.prompt, job.path[-9:]): job.seed for job in plan([(p, {}) for p in reversed(PROMPTS[1:3])], 7, seed=3)}
    shared = whole.keys() & part.keys()
    assert len(shared) == 10 and all(whole[key] == part[key] for key in shared)
    other = {job.seed for job in plan([(p, {}) for p in PROMPTS], 5, seed=4)}
    assert len(set(whole.values()) | other) == 40


def test_images_of_a_pass_on_a_cpu(tiny_pipeline_dir):
    pipe, sizes = load_pipeline(tiny_pipeline_dir), {}
    for side in (8, 16, 32, 64, 128):
        pipe.unet.register_to_config(sample_size=side)
        sizes[side] = images_per_pass(pipe, 20)
    assert sizes == {8: 32, 16: 32, 32: 8, 64: 2, 128: 1}


@pytest.mark.parametrize("scheduler", ["ddim", "dpm++"])
def test_any_number_of_workers_writes_the_same_bytes(scheduler, tiny_pipeline_dir, judges, tmp_path):
    """Eight passes of three images, the last one short, with a judge; twice with five workers."""
    sampler = Sampler(load_pipeline(tiny_pipeline_dir), scheduler, 3, 1.0, 3.0)
    judge = isic_classifier_reward(judges[4])
    jobs = plan([(prompt, {}) for prompt in PROMPTS[:2]], 11, seed=5)
    passes = [jobs[start : start + 3] for start in range(0, len(jobs), 3)]
    drawn = []
    for number, workers in enumerate((1, 2, 5, 5)):
        folder = tmp_path / str(number)
        folder.mkdir()
        with PartLog(folder, 0) as log:
            broken = dict(draw_passes(sampler, passes, workers, 3, folder, log, (), judge, "abc"))
        assert broken == {index: [] for index in range(8)}
        assert len(merge_parts(folder, [job.path for job in jobs])) == 22
        drawn.append(files_of(folder))
    assert len(drawn[0]) == 23 and len(set(drawn[0].values())) == 23
    assert drawn[0] == drawn[1] == drawn[2] == drawn[3]


def test_an_error_while_drawing_ends_the_run(one_step, tmp_path):
    def judge(images, prompts, metadata):
        raise OSError("no more")

    passes = [[job] for job in plan([(PROMPTS[0], {})], 40, seed=5)]
    with PartLog(tmp_path, 0) as log, pytest.raises(OSError, match="no more"):
        list(draw_passes(one_step, passes, 2, 1, tmp_path, log, (), judge, ""))
    assert 0 < len(list(tmp_path.rglob("*.png"))) < 40 and not read_entries(tmp_path)  # the rest was not begun


def test_drawing_takes_turns_and_writing_does_not(one_step, tmp_path, monkeypatch):
    """As on a GPU, where one thread writes while another draws."""
    turn, held = threading.Lock(), []

    def draw(prompts, seeds):
        held.append(turn.locked())
        return one_step(prompts, seeds)

    def save(path, image):
        held.append(turn.locked())
        assert not read_entries(tmp_path)  # the file comes first
        save_image(path, image)

    monkeypatch.setattr("ddpo_pytorch.sampling.save_image", save)
    with PartLog(tmp_path, 0) as log:
        draw_pass(draw, plan([(PROMPTS[0], {})], 2, seed=5), 2, tmp_path, log, turn=turn)
    assert held == [True, False, False] and len(read_entries(tmp_path)) == 2


def test_a_folder_of_unknown_origin_is_not_touched(tmp_path):
    (tmp_path / "images").mkdir()
    with pytest.raises(UserError, match="images but no settings.json"):
        claim_folder(tmp_path, {"seed": 1}, {})
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(UserError, match="settings.json' is damaged"):
        claim_folder(tmp_path, {"seed": 1}, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "settings.json"]


def test_the_log_survives_torn_lines_and_counts_only_images_that_exist(tmp_path):
    for name in ("b", "a", "c"):
        save_image(tmp_path / f"{name}.png", torch.zeros(3, 4, 4))
    (tmp_path / "image_log.part1.jsonl").write_text('{"path_to_img": "b.png", "x": 1}\n{"path_to_im')
    with open(tmp_path / "image_log.part1.jsonl", "ab") as file:
        file.write(b'g": "c\xff.png"}\n[1]\n{"prompt": "x"}\n{"path_to_img": 3}\n{"path_to_img": "c.png", "\xe9')
    (tmp_path / "empty.png").touch()
    with PartLog(tmp_path, 1) as log:
        log.add([{"path_to_img": "a.png"}, {"path_to_img": "gone.png"}, {"path_to_img": "empty.png"}])
    assert list(read_entries(tmp_path)) == ["b.png", "a.png"]
    assert len(merge_parts(tmp_path, ["a.png", "b.png"])) == 2
    entries = json.loads((tmp_path / "image_log.json").read_text())
    assert entries == [{"sampleID": 0, "path_to_img": "a.png"}, {"sampleID": 1, "path_to_img": "b.png", "x": 1}]
    with PartLog(tmp_path, 0) as log:
        log.add([{"path_to_img": "c.png"}])
    assert len(merge_parts(tmp_path)) == 3 and not list(tmp_path.glob("*.jsonl"))
    (tmp_path / "image_log.json").write_text('[{"prompt": "x"}]')
    with pytest.raises(UserError, match="image_log.json' has entries without path_to_img"):
        read_entries(tmp_path)


def test_the_first_difference_of_two_settings():
    long = [f"a prompt of many words, number {number}" for number in range(30)]
    other = [*long[:20], "other", *long[21:]]
    assert difference({"a": 1, "b": long}, {"a": 1, "b": other}) == ("b[20]", repr(long[20]), "'other'")
    assert difference({"b": long}, {"b": long[:7]}) == ("length of b", "30", "7")
    assert difference({"b": long}, {"b": None})[2] == "None" and difference({"b": long}, {"b": long}) is None
