"""train_rlhf.py on striped images whose ratings are known: learned, killed, resumed, refused."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from rated_world import PROMPTS, read_table, write_config, write_rated_world, write_table
from safetensors.torch import load_file
from script_tools import assert_same_training, files_of, options, succeed

from ddpo_pytorch.generator.pipeline import load_pipeline
from ddpo_pytorch.judges.policy import load_judges
from ddpo_pytorch.rlhf.training import chosen_samples
from ddpo_pytorch.utils import training_state
from ddpo_pytorch.utils.errors import UserError

pytest_plugins = ["script_tools"]
SCRIPT, NAMES = "train_rlhf.py", ("selector.safetensors", "policy.safetensors")


@pytest.fixture(scope="module")
def rated(tmp_path_factory):
    return write_rated_world(tmp_path_factory.mktemp("rated") / "world")


@pytest.fixture(scope="module")
def config_file(rated):
    return write_config(rated)


@pytest.fixture
def train(run_main, config_file, caplog):
    """Function (fields of rlhf): run the script in this process; its log."""

    def run(**fields):
        caplog.clear()
        fields["output"] = str(fields["output"])
        run_main(SCRIPT, config_file, **{f"rlhf__{name}": value for name, value in fields.items()})
        return caplog.text

    caplog.set_level(logging.INFO)
    return run


def entries(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_speed(folder):
    return [{name: value for name, value in entry.items() if name != "images_per_second"} for entry in entries(folder)]


@pytest.mark.slow
def test_both_judges_learn_what_experts_mean(train, rated, tmp_path):
    log = train(output=tmp_path, num_epochs=16, batch_size=8)
    written = entries(tmp_path)
    assert [(entry["epoch"], entry["stage"]) for entry in written] == [(n, 1 + n // 16) for n in range(32)]
    rates = [entry["learning_rate"] for entry in written]
    assert rates[0] == 3e-3 and rates[16] == 1e-3 and rates[15] < 1e-4
    assert rates == sorted(rates[:16], reverse=True) + sorted(rates[16:], reverse=True)
    first, last = written[15], written[-1]
    assert first["selector"]["spearman"] > 0.85 and first["selector"]["auc"] > 0.95 and first["selector"]["mae"] < 0.15
    assert last["policy"]["auc"] > 0.95 and last["policy"]["mae"] < 0.25
    assert 0.4 < first["selector"]["pass_rate"] < 0.9 and "selector" not in last  # frozen in stage 2
    selector, policy = load_judges(tmp_path)
    assert selector.calibration["how"] == "best J for ratings of 2 or more" and selector.calibration["J"] > 0.8
    assert (selector.origin["stage"], policy.origin["stage"], policy.origin["epochs"]) == (1, 2, 32)
    assert "alpha None" in log
    # their scores of a good and a bad image
    sharp, flat = (torch.from_numpy(_picture(rated, number)) for number in (2, 0))
    assert selector.passes(torch.stack([sharp, flat])).tolist() == [True, False]
    red, blue = policy.score(torch.stack([sharp, sharp]), PROMPTS)  # number 2 is red
    assert red > 0.6 > 0.4 > blue
    with pytest.raises(UserError, match="stage 2 .*rlhf.output"):
        train(output=tmp_path, num_epochs=16, batch_size=8)


def _picture(rated, number):
    with Image.open(rated / f"images/{number:03d}.png") as image:
        return np.asarray(image).transpose(2, 0, 1).astype("float32") / 255


def test_stages_apart_are_the_stages_together(train, tmp_path):
    train(output=tmp_path / "together")
    train(output=tmp_path / "apart", stages=(1,))
    first = files_of(tmp_path / "apart")
    with pytest.raises(UserError, match="stage 1 .* finished"):
        train(output=tmp_path / "apart", stages=(1,))
    with pytest.raises(UserError, match="rlhf.width=32.* 16"):
        train(output=tmp_path / "apart", width=16)
    assert files_of(tmp_path / "apart") == first
    train(output=tmp_path / "apart", stages=(2,))
    found = files_of(tmp_path / "apart")
    assert found["policy_stage_1.safetensors"] == first["policy.safetensors"] != found["policy.safetensors"]
    assert found["selector.safetensors"] == first["selector.safetensors"]
    assert sorted(found) == sorted((*NAMES, "policy_stage_1.safetensors", "metrics.jsonl"))  # and no state
    assert all(found[name] == files_of(tmp_path / "together")[name] for name in NAMES)
    assert without_speed(tmp_path / "apart") == without_speed(tmp_path / "together")


@pytest.fixture
def stopped(train, monkeypatch):
    """Function (number, fields): run the script until it has saved its state that often."""

    def run(number, **fields):
        save, calls = training_state.save_state, []

        def stopping(*arguments):
            calls.append(save(*arguments))
            if len(calls) == number:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(training_state, "save_state", stopping)
            train(**fields)

    return run


@pytest.mark.parametrize(("saves", "changed"), [(1, {"batch_size": 8}), (3, {"second_learning_rate": 1e-4})])
def test_resuming_equals_an_uninterrupted_training(train, stopped, tmp_path, saves, changed):
    settings = {"importance": True, "objective": "log", "warmup_steps": 8}
    train(output=tmp_path / "whole", **settings)
    stopped(saves, output=tmp_path / "stopped", **settings)
    with open(tmp_path / "stopped/metrics.jsonl", "a") as file:
        file.write('{"epoch": 9')  # torn by the kill
    with pytest.raises(UserError, match=f"rlhf.{next(iter(changed))}"):
        train(output=tmp_path / "stopped", **settings, **changed)
    log = train(output=tmp_path / "stopped", **settings)
    assert f"stage_{1 + saves // 2}.unfinished.pt: 1 epochs" in log
    one, other = files_of(tmp_path / "whole"), files_of(tmp_path / "stopped")
    assert all(one[name] == other[name] for name in one if name != "metrics.jsonl") and one.keys() == other.keys()
    assert without_speed(tmp_path / "whole") == without_speed(tmp_path / "stopped")


def test_a_state_belongs_to_its_text_encoder_and_autoencoder(train, stopped, rated, tiny_pipeline_dir, tmp_path):
    """At the same path: a tokenizer with two words swapped; another autoencoder."""
    bert, model = (shutil.copytree(place, tmp_path / place.name) for place in (rated / "bert", tiny_pipeline_dir))
    fields = {"output": tmp_path / "out", "text_encoder": str(bert), "autoencoder": str(model), "stages": (1,)}
    stopped(1, **fields)
    tokenizer = (bert / "tokenizer.json").read_text()
    content = json.loads(tokenizer)
    numbers = content["model"]["vocab"]
    numbers["red"], numbers["blue"] = numbers["blue"], numbers["red"]
    (bert / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="text encoder"):
        train(**fields)
    (bert / "tokenizer.json").write_text(tokenizer)
    pipe = load_pipeline(model)
    pipe.vae.quant_conv.bias.data += 0.1
    pipe.save_pretrained(model)
    with pytest.raises(UserError, match="training ratings"):
        train(**fields)
    assert (tmp_path / "out" / "stage_1.unfinished.pt").is_file()


@pytest.mark.parametrize("stage", [1, 2])
def test_killed_after_the_last_file(train, tmp_path, stage):
    stages = tuple(range(1, stage + 1))
    train(output=tmp_path, stages=stages, num_epochs=1)
    before = files_of(tmp_path)
    (tmp_path / f"stage_{stage}.unfinished.pt").write_bytes(b"left over")
    train(output=tmp_path, stages=stages, num_epochs=1)
    assert files_of(tmp_path) == before


def test_given_thresholds(train, tmp_path):
    """One that everything passes, then one that nothing passes."""
    train(output=tmp_path, num_epochs=1, threshold=0.0, stages=(1,))
    selector, _ = load_judges(tmp_path)
    assert selector.threshold == 0.0 and entries(tmp_path)[0]["selector"]["pass_rate"] == 1
    before = files_of(tmp_path)
    with pytest.raises(UserError, match="passes none of 96"):
        train(output=tmp_path, stages=(2,), threshold=1.0)
    assert files_of(tmp_path) == before
    assert "96 of 96" in train(output=tmp_path, num_epochs=1, threshold=0.0)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.9])
def test_samples_of_the_second_stage(share):
    passed = torch.rand(100, generator=torch.Generator().manual_seed(0)) < 0.4
    chosen = chosen_samples(passed, share, seed=3)
    kept, replayed = int(passed[chosen].sum()), int((~passed[chosen]).sum())
    assert kept == int(passed.sum()) and replayed == min(100 - kept, round(share / (1 - share) * kept))
    assert torch.equal(chosen, chosen.unique()) and torch.equal(chosen, chosen_samples(passed, share, seed=3))
    if share == 0.25:
        assert not torch.equal(chosen, chosen_samples(passed, share, seed=4))


def test_settings_reach_the_training(train, rated, tmp_path):
    """Expert levels, the objective and the flips change the weights of stage 1."""
    rows = read_table(rated / "ratings.csv")
    levels = str(write_table(rated / "levels.csv", [row | {"expert_level": 1 + n % 3} for n, row in enumerate(rows)]))
    found = []
    for number, fields in enumerate(({}, {"ratings": levels}, {"objective": "delta"}, {"flip": False})):
        train(output=tmp_path / str(number), num_epochs=1, stages=(1,), **fields)
        found.append(load_file(tmp_path / str(number) / NAMES[1])["head.8.weight"])
    assert not any(torch.equal(found[0], changed) for changed in found[1:])


def test_stage_2_weighs_and_starts_where_stage_1_ended(train, tmp_path):
    train(output=tmp_path / "0", num_epochs=1, stages=(1,))
    shutil.copytree(tmp_path / "0", tmp_path / "1")
    found = []
    for number in (0, 1):
        train(
            output=tmp_path / str(number), num_epochs=1, stages=(2,), importance=bool(number), second_learning_rate=1e-5
        )
        found.append(load_file(tmp_path / str(number) / NAMES[1])["head.8.weight"])
    before = load_file(tmp_path / "0" / "policy_stage_1.safetensors")["head.8.weight"]
    assert not torch.equal(*found) and not torch.equal(found[0], before)
    assert (found[0] - before).abs().max() < 1e-4  # a handful of small steps of Adam away


def test_one_rating_for_both_by_two_experts(train, rated, tmp_path):
    rows = []
    for row in read_table(rated / "ratings.csv"):
        del row["quality"], row["alignment"]
        rows += [row, row | {"rater_id": "b", "rating": min(3, int(row["rating"]) + 1), "expert_level": 1}]
    log = train(ratings=str(write_table(rated / "flat.csv", rows)), output=tmp_path, num_epochs=1)
    assert "240 ratings of 120 images" in log and "alpha 0." in log and "raters 2" in log


def test_tables_that_cannot_train(train, rated, tmp_path):
    rows = read_table(rated / "ratings.csv")

    def refused(message, **tables):
        paths = {name: str(write_table(rated / f"{name}_{len(message)}.csv", table)) for name, table in tables.items()}
        with pytest.raises(UserError, match=message):
            train(output=tmp_path / "out", **paths)
        assert not (tmp_path / "out").exists()

    refused("all 96 images are rated 3", ratings=[row | {"quality": 3} for row in rows])
    fair = [row | {"quality": 2 + int(row["rating"]) % 2} for row in rows]
    refused("24 images of quality 2 or more and 0 below 2", ratings=fair)
    refused("rating is '4'", ratings=[rows[0] | {"rating": 4}, *rows[1:]])
    refused("share the image", val_ratings=rows[:12])
    refused("share the patient 'p0'", ratings=rows[::2], val_ratings=rows[1::2])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("ratings", "", "rlhf.ratings"),
        ("stages", (2,), "out.*rlhf.stages"),
        ("stages", (2, 1), r"rlhf.stages.*\(2, 1\)"),
        ("objective", "abs", "rlhf.objective.*'abs'"),
        ("threshold", 1.5, "rlhf.threshold.*1.5"),
        ("replay_share", 1.0, "rlhf.replay_share.*1.0"),
        ("num_epochs", 0, "rlhf.num_epochs.*0"),
        ("image_size", 30, "image_size 30.*patch_size 8"),
    ],
)
def test_settings_out_of_range(train, tmp_path, field, value, message):
    with pytest.raises(UserError, match=message):
        train(output=tmp_path / "out", **{field: value})
    assert not (tmp_path / "out").exists()


def test_a_missing_rating_is_reported(train, rated, tmp_path):
    rows = [row for row in read_table(rated / "ratings.csv") if row["quality"] != "2"]
    log = train(ratings=str(write_table(rated / "no_twos.csv", rows)), output=tmp_path, num_epochs=1)
    assert "no image is rated 2" in log and (tmp_path / NAMES[1]).exists()


def test_a_loss_that_is_not_finite_stops_the_training(train, tmp_path):
    with pytest.raises(UserError, match="loss is nan .* stage 1"):
        train(output=tmp_path, learning_rate=1e30)
    assert not (tmp_path / NAMES[0]).exists()


@pytest.mark.slow
def test_killed_for_real(train, config_file, tmp_path):
    fields = {"rlhf__num_epochs": 6, "rlhf__output": tmp_path / "killed"}
    settings = {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, f"scripts/{SCRIPT}", *options(config_file, **fields)]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | settings, stderr=subprocess.DEVNULL)
    while not (tmp_path / "killed/stage_1.unfinished.pt").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / NAMES[1]).exists()
    assert "resuming from" in train(num_epochs=6, stages=(1,), output=tmp_path / "killed")
    train(num_epochs=6, stages=(1,), output=tmp_path / "whole")
    one, other = files_of(tmp_path / "whole"), files_of(tmp_path / "killed")
    assert all(one[name] == other[name] for name in NAMES)


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(train, config_file, tmp_path):
    fields = {"rlhf__dropout": 0.0, "rlhf__importance": False, "rlhf__threshold": 0.0}  # 96 images in both stages
    succeed(SCRIPT, *options(config_file, **fields, rlhf__batch_size=8, rlhf__output=tmp_path / "two"), processes=2)
    train(**{name[6:]: value for name, value in fields.items()}, output=tmp_path / "one")
    for name in NAMES:
        one, two = load_file(tmp_path / "one" / name), load_file(tmp_path / "two" / name)
        # softmax cancels the keys' bias, whose gradient is nothing but rounding
        assert_same_training(one, two, but={"qkv.bias": slice(32, 64)})
    for one, two in zip(entries(tmp_path / "one"), entries(tmp_path / "two"), strict=True):
        assert one["policy"] == pytest.approx(two["policy"], abs=1e-4) and one["loss"] == pytest.approx(
            two["loss"], abs=1e-4
        )
