"""train_rlhf.py on striped images whose ratings are known: learned, killed, resumed, refused; after scripts/rate.py."""

import itertools
import re
import shlex
import shutil
from pathlib import Path
from unittest.mock import create_autospec

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from launching import ROOT, Script
from rated_world import PROMPTS, stripes, write_bert, write_config, write_rated_world
from rating_tools import RatePage, write_gallery
from refusals import refused
from safetensors.torch import load_file, save_file
from script_tools import assert_same_training, files_of, options, read_lines, stopped_at_save, succeed

from ddpo_pytorch.data.ratings import read_ratings
from ddpo_pytorch.data.sample_folder import write_log
from ddpo_pytorch.generator.pipeline import load_pipeline
from ddpo_pytorch.judges.policy import TextFeatures, load_judges
from ddpo_pytorch.rlhf import rated_images, training
from ddpo_pytorch.rlhf.rated_images import RatedSet
from ddpo_pytorch.rlhf.training import chosen_samples

SCRIPT, NAMES = "train_rlhf.py", ("selector.safetensors", "policy.safetensors")


@pytest.fixture(scope="module")
def rated(tmp_path_factory):
    return write_rated_world(tmp_path_factory.mktemp("rated") / "world")


@pytest.fixture(scope="module")
def config_file(rated):
    return write_config(rated)


def flags_of(fields: dict) -> dict:
    return {f"rlhf__{name}": str(value) if name == "output" else value for name, value in fields.items()}


@pytest.fixture
def train(run_main, config_file, caplog):
    """Function (fields of rlhf): run the script in this process; its log."""

    def run(**fields):
        caplog.clear()
        run_main(SCRIPT, config_file, **flags_of(fields))
        return caplog.text

    caplog.set_level("INFO")
    return run


@pytest.fixture
def table(rated):
    """Function (change of the world's ratings as a data frame): the path of a table with the result."""

    def write(change):
        path = rated / f"changed_{len(list(rated.iterdir()))}.csv"
        change(pd.read_csv(rated / "ratings.csv")).to_csv(path, index=False)
        return str(path)

    return write


def entries(folder):
    lines = read_lines(folder / "metrics.jsonl")
    return [{name: value for name, value in line.items() if name != "images_per_second"} for line in lines]


@pytest.mark.slow
def test_both_judges_learn_what_experts_mean(train, table, tmp_path):
    """And criteria: vessels as the quality, rated for one half of the images; artifacts the other way round."""

    def add_criteria(rows):
        return rows.assign(vessels=rows.rating.where(rows.index % 2 == 0), artifacts=4 - rows.rating)

    log = train(ratings=table(add_criteria), output=tmp_path, num_epochs=16, batch_size=8)
    written = entries(tmp_path)
    assert [(entry["epoch"], entry["stage"]) for entry in written] == [(n, 1 + n // 16) for n in range(32)]
    rates = [entry["learning_rate"] for entry in written]
    assert rates[0] == 3e-3 and rates[16] == 1e-3 and rates[15] < 1e-4
    first, last = written[15]["selector"], written[-1]
    assert first["spearman"] > 0.85 and first["auc"] > 0.95 and first["mae"] < 0.15 and 0.4 < first["pass_rate"] < 0.9
    assert first["spearman_vessels"] > 0.8 and first["spearman_artifacts"] > 0.8
    assert last["policy"]["auc"] > 0.95 and last["policy"]["mae"] < 0.25 and "selector" not in last  # frozen in stage 2
    selector, policy = load_judges(tmp_path)
    assert selector.calibration["J"] > 0.8 and policy.origin["epochs"] == 32 and "alpha None" in log
    # their scores of a good and a bad image
    rng = np.random.default_rng(5)
    pixels = torch.from_numpy(np.stack([stripes(quality, False, rng) for quality in (3, 1)])).permute(0, 3, 1, 2) / 255
    assert selector.accepts(selector.score(pixels)).tolist() == [True, False]
    assert selector.criteria == ("vessels", "artifacts")
    (_, sharp, faults), (_, blurred, more_faults) = selector.score_all(pixels)
    assert sharp > blurred and more_faults > faults
    red, blue = policy.score(pixels[[0, 0]], PROMPTS)
    assert red > 0.6 > 0.4 > blue


@pytest.mark.slow
def test_stages_apart_and_stopped_trainings_end_like_an_uninterrupted_one(train, table, tmp_path):
    settings = {"ratings": table(lambda rows: rows[:48]), "objective": "log", "warmup_steps": 8}
    apart, whole = tmp_path / "apart", tmp_path / "whole"
    train(output=whole, **settings)
    train(output=apart, stages=(1,), **settings)
    first = files_of(apart)
    for stages in ((1,), (1, 2)):
        refused("apart' holds judges .*rlhf.output", train, output=apart, stages=stages)
    assert files_of(apart) == first
    train(output=apart, stages=(2,), **settings)
    found = files_of(apart)
    assert found["policy_stage_1.safetensors"] == first["policy.safetensors"] != found["policy.safetensors"]
    assert found["selector.safetensors"] == first["selector.safetensors"]
    # and no state
    assert found.keys() == {*NAMES, "policy_stage_1.safetensors", "metrics.jsonl", "probes.md", "findings.md"}
    refused("stage 2 in .* is finished", train, output=apart, stages=(2,))

    for saves, changed in ((1, {"batch_size": 8}), (3, {"second_learning_rate": 1e-4}), (4, {"width": 16})):
        output = tmp_path / str(saves)
        output.mkdir()
        (output / "policy_stage_1.safetensors").write_bytes(b"of an earlier training")
        with stopped_at_save(saves):
            train(output=output, **settings)
        if saves < 4:
            with open(output / "metrics.jsonl", "a") as file:
                file.write('{"epoch": 9')  # torn by the kill
        refused(f"rlhf.{next(iter(changed))}", train, output=output, **settings, **changed)
        assert f"stage_{1 + saves // 3}.unfinished.pt: {2 - saves % 2} epochs" in train(output=output, **settings)
    for output in (apart, *(tmp_path / str(saves) for saves in (1, 3, 4))):
        one, other = files_of(whole), files_of(output)
        assert all(one[name] == other[name] for name in one if name != "metrics.jsonl") and one.keys() == other.keys()
        assert entries(whole) == entries(output)


def test_a_state_belongs_to_its_text_encoder_and_autoencoder(train, rated, tiny_pipeline_dir, tmp_path):
    bert, model = (shutil.copytree(place, tmp_path / place.name) for place in (rated / "bert", tiny_pipeline_dir))
    fields = {"output": tmp_path / "out", "text_encoder": str(bert), "autoencoder": str(model), "stages": (1,)}
    with stopped_at_save(1):
        train(**fields)
    write_bert(bert, seed=1)
    refused("text encoder", train, **fields)
    write_bert(bert)
    pipe = load_pipeline(model)
    pipe.vae.quant_conv.bias.data += 0.1
    pipe.save_pretrained(model)
    refused("training ratings", train, **fields)


def test_given_thresholds_and_other_sizes(train, tmp_path):
    """A threshold that everything passes, then one that nothing passes. The second stage refuses other sizes."""
    train(output=tmp_path, num_epochs=1, threshold=0.0, stages=(1,))
    selector, _ = load_judges(tmp_path)
    assert selector.threshold == 0.0 and entries(tmp_path)[0]["selector"]["pass_rate"] == 1
    before = files_of(tmp_path)
    refused("passes none of 96", train, output=tmp_path, stages=(2,), threshold=1.0)
    for field, value in (("image_size", 8), ("policy_layers", 1), ("stem", "conv"), ("text_tokens", 8)):
        refused(f"rlhf.{field}=.* {value!r}", train, output=tmp_path, stages=(2,), **{field: value})
    assert files_of(tmp_path) == before
    other = shutil.copytree(tmp_path, tmp_path / "other")
    assert "measured on other images" in train(output=other, num_epochs=1, val_share=0.4, stages=(2,))
    log = train(output=tmp_path, num_epochs=1, threshold=0.0, stages=(2,))
    assert "96 of 96" in log and "measured on other images" not in log


def test_samples_of_the_second_stage():
    passed = torch.rand(100, generator=torch.Generator().manual_seed(0)) < 0.4
    for share in (0.0, 0.25, 0.9):
        chosen = chosen_samples(passed, share, seed=3)
        kept, replayed = int(passed[chosen].sum()), int((~passed[chosen]).sum())
        assert kept == int(passed.sum()) and replayed == min(100 - kept, round(share / (1 - share) * kept))
        assert torch.equal(chosen, chosen.unique()) and torch.equal(chosen, chosen_samples(passed, share, seed=3))


@pytest.mark.slow
def test_settings_reach_the_training(train, table, tmp_path):
    """Expert levels, the objective, flips and stage 2 change weights of the Policy."""
    usual = {"ratings": table(lambda rows: rows[:48]), "num_epochs": 1, "stages": (1,)}
    levels = table(lambda rows: rows[:48].assign(expert_level=1 + rows.index[:48] % 3))
    changes = {"plain": {}, "levels": {"ratings": levels}, "delta": {"objective": "delta"}, "still": {"flip": False}}
    changes |= {"captions": {"wrong_captions": 0.5}, "plain 2": {"stages": (2,), "second_learning_rate": 1e-5}}
    found = []
    for name, fields in changes.items():
        output = tmp_path / name.removesuffix(" 2")
        train(**usual | {"output": output} | fields)
        found.append(load_file(output / NAMES[1])["head.8.weight"])
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(found, 2))
    before = load_file(tmp_path / "plain" / "policy_stage_1.safetensors")["head.8.weight"]
    assert torch.equal(before, found[0])
    assert (found[-1] - before).abs().max() < 1e-4  # a handful of small steps of Adam away


def spy(monkeypatch, owner, name, function=None):
    """Put a mock in the place of a function or method, which calls `function`, or the original."""
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, mock := create_autospec(original, side_effect=function or original))
    return mock


def test_mirrored_images_have_mirrored_captions(train, tmp_path, monkeypatch):
    monkeypatch.setattr(rated_images, "mirrored_caption", lambda prompt: f"{prompt}, mirrored")
    flips = spy(monkeypatch, RatedSet, "flips", lambda rated, *_: torch.ones(len(rated)).bool())
    features = spy(monkeypatch, TextFeatures, "__call__")
    train(output=tmp_path, num_epochs=1, stages=(1,))
    mirrored = [text for call in features.call_args_list for text in call.args[1] if text.endswith(", mirrored")]
    assert len(mirrored) == sum(len(call.args[0]) for call in flips.call_args_list) > 60


def test_wrong_captions_give_the_policy_alone_no_reward(train, tmp_path, monkeypatch):
    """All images have the first one's caption: the Policy's rewards are 0 but for the first image."""
    sources = spy(monkeypatch, RatedSet, "caption_sources", lambda rated, *_: torch.zeros(len(rated)).long())
    advantages, features = spy(monkeypatch, training, "advantages"), spy(monkeypatch, TextFeatures, "__call__")
    train(output=tmp_path, num_epochs=1, stages=(1,), wrong_captions=0.4, flip=False)
    rewards = [call.args[0].count_nonzero().item() for call in advantages.call_args_list]
    batches = len(rewards) // 2  # rewards of the Selector and of the Policy by turns
    assert sources.call_args.args[1] == 0.4 and sum(rewards[1::2]) <= 1 and min(rewards[::2]) > 2
    sources.assert_called_once()
    assert sum(len(set(call.args[1])) == 1 for call in features.call_args_list) == batches


def test_generated_images_are_no_patients(train, rated, tmp_path):
    """Half of the images are of patients, whom held-out judges may not share; the others lie in a sample folder."""
    folder = shutil.copytree(rated, tmp_path / "samples" / "images")
    (tmp_path / "samples" / "image_log.json").write_text("[]")
    ratings = pd.read_csv(folder / "ratings.csv")
    ratings.assign(patient=ratings.patient.where(ratings.index % 2 == 0)).to_csv(folder / "ratings.csv", index=False)
    train(output=tmp_path / "out", ratings=str(folder / "ratings.csv"), data_path="", num_epochs=1, stages=(1,))
    assert len(load_judges(tmp_path / "out")[0].origin["patients"]) == 60


def test_a_backbone_starts_from_its_file(train, tmp_path):
    torch.manual_seed(7)
    network = timm.create_model("test_efficientnet")
    save_file(network.state_dict(), tmp_path / "network.safetensors")
    fields = dict(backbone="test_efficientnet", backbone_weights=str(tmp_path / "network.safetensors"))
    log = train(output=tmp_path / "out", num_epochs=1, stages=(1,), learning_rate=1e-7, **fields)
    for name in NAMES:  # a handful of steps of Adam away
        weights = load_file(tmp_path / "out" / name)
        torch.testing.assert_close(weights["encoder.vit.conv_stem.weight"], network.conv_stem.weight, rtol=0, atol=1e-5)
    selector, policy = load_judges(tmp_path / "out")
    assert selector.features == policy.features == 256 and "network.safetensors" in log
    assert policy.head[0].in_features == 256 + policy.text.width and selector.sizes.backbone == "test_efficientnet"
    refused("'imagenett'", train, output=tmp_path / "other", **fields | {"backbone_weights": "imagenett"})


def test_one_rating_for_both_by_two_experts(train, table, tmp_path):
    def change(rows):
        rows = rows.drop(columns=["quality", "alignment"])[rows.rating != 2]
        return pd.concat([rows, rows.assign(rater_id="b", rating=(rows.rating + 1).clip(upper=3), expert_level=1)])

    log = train(ratings=table(change), output=tmp_path, num_epochs=1, stages=(1,))
    assert "160 ratings of 80 images" in log and "alpha 0." in log and "raters 2" in log
    assert "no image is rated 2" in log and (tmp_path / NAMES[1]).exists()


def test_tables_and_settings_that_cannot_train(train, table, tmp_path):
    wrong = {"stages": (2, 1), "objective": "abs", "threshold": 1.5, "image_size": 0, "pool": "nowhere"}
    for message, fields in (
        ("96 images are rated 3", {"ratings": lambda rows: rows.assign(quality=3)}),
        ("24 .* quality 2 or more and 0 below 2", {"ratings": lambda rows: rows.assign(quality=2 + rows.rating % 2)}),
        ("rating is '4'", {"ratings": lambda rows: rows.assign(rating=rows.rating.replace(2, 4))}),
        ("share the image", {"val_ratings": lambda rows: rows[:12]}),
        ("share the patient 'p0'", {"ratings": lambda rows: rows[::2], "val_ratings": lambda rows: rows[1::2]}),
        ("rlhf.ratings", {"ratings": ""}),
        ("out.*rlhf.stages", {"stages": (2,)}),
        ("image_size 30.*patch_size 8", {"image_size": 30}),
        *((rf"{name}.*{re.escape(repr(value))}", {name: value}) for name, value in wrong.items()),
        *((rf"rlhf.text_tokens is {count}; .*\[2, 65535\]", {"text_tokens": count}) for count in (1, 65536)),
    ):
        given = {name: table(value) if callable(value) else value for name, value in fields.items()}
        refused(message, train, output=tmp_path / "out", **given)
        assert not (tmp_path / "out").exists(), message
    pool = {"prompt": "Fundus: a.", "path_to_img": "images/a/1.png", "passed": True, "selector": 7.0, "policy": 0.5}
    write_log(tmp_path / "pool", [pool])
    refused("rlhf.pool .*images/a/1.png: selector is 7.0", train, output=tmp_path / "out", pool=str(tmp_path / "pool"))
    refused("loss is nan .* stage 1", train, output=tmp_path / "out", learning_rate=1e30)
    assert not (tmp_path / "out" / NAMES[0]).exists()


@pytest.mark.slow
def test_two_processes_that_are_killed_learn_what_one_learns(train, config_file, tmp_path):
    fields = {"dropout": 0.0, "threshold": 0.0}  # 96 images in both stages
    given = options(config_file, **flags_of(fields | {"batch_size": 8, "output": tmp_path / "two"}))
    Script(f"scripts/{SCRIPT}", *given, processes=2).kill_when((tmp_path / "two/stage_1.unfinished.pt").exists)
    assert not (tmp_path / "two" / NAMES[1]).exists()
    assert "resuming from" in succeed(SCRIPT, *given, processes=2).stderr
    train(**fields, output=tmp_path / "one")
    for name in NAMES:
        one, two = load_file(tmp_path / "one" / name), load_file(tmp_path / "two" / name)
        # softmax cancels the keys' bias, whose gradient is nothing but rounding
        assert_same_training(one, two, but={"qkv.bias": slice(32, 64)})
    for one, two in zip(entries(tmp_path / "one"), entries(tmp_path / "two"), strict=True):
        assert one["policy"] == pytest.approx(two["policy"], abs=1e-4)
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-4)


@pytest.mark.slow
def test_the_documented_commands_end_in_trained_judges(tmp_path, monkeypatch):
    """Of docs/fundus.md, one after another, in a folder of the user's own; then everything is moved."""
    pytest.importorskip("fastapi", reason="fastapi absent")
    monkeypatch.chdir(tmp_path)
    for name in ("scripts", "config"):
        (tmp_path / name).symlink_to(ROOT / name)
    write_bert(tmp_path / "bert")
    text = (ROOT / "docs/fundus.md").read_text()
    command = r"^(?:python|accelerate launch) scripts/{} (.*)$"
    rate, learn = (shlex.split(re.search(command.format(name), text, re.M)[1]) for name in ("rate.py", SCRIPT))
    following = dict(zip(rate, rate[1:], strict=False))
    table, data, samples, out = (Path(following[f"--{name}"]) for name in ("csv", "data_path", "images", "out"))
    write_gallery(samples, 9)
    rows = pd.DataFrame(write_gallery(data, 6, suffix="jpg", shade=100))
    table.parent.mkdir(parents=True, exist_ok=True)
    rows.rename(columns={"path_to_img": "path", "prompt": "Text"}).to_csv(table, index=False)

    page = RatePage(*rate, cwd=tmp_path)
    state = page.post("state", "Ann")
    while state["current"]:
        state = page.rate("Ann", state, 1 + state["rated"] % 3)
    assert state["rated"] == 15 and page.end() == 0

    sizes = {"text_encoder": "bert", "text_tokens": 16, "image_size": 32, "patch_size": 8, "width": 32, "heads": 2}
    sizes |= {"selector_layers": 1, "policy_layers": 1, "num_epochs": 1, "batch_size": 16}
    learn += [f"--config.rlhf.{name}={size}" for name, size in sizes.items()]
    result = Script(f"scripts/{SCRIPT}", *learn, "--config.mixed_precision=no", cwd=tmp_path).result()
    assert result.returncode == 0, result.stderr[-2000:]
    assert "15 ratings of 15 images" in result.stderr and list(tmp_path.glob("**/selector.safetensors"))

    Path("rl4med-out").rename("moved")
    assert len(read_ratings(Path("moved", *out.parts[1:]), within="moved")) == 15
