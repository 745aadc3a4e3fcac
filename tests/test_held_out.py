"""Held-out evaluation during training: the same noise every time, no trace in the training, the best one kept."""

import json
import logging
import shutil
from unittest.mock import Mock

import pytest
import torch
from refusals import refused
from rl_tools import LIGHT, PROMPTS, configured, train_with, untimed, usual_settings, watching, weights
from script_tools import read_lines

from ddpo_pytorch.data.isic import ARTIFACTS, labels_of
from ddpo_pytorch.judges.classifier import load_classifier
from ddpo_pytorch.rewards import REWARDS
from ddpo_pytorch.training.checkpoints import find_weights
from ddpo_pytorch.training.held_out import Evaluation, HeldOut
from ddpo_pytorch.training.run_state import is_finished
from ddpo_pytorch.training.setup import make_task


def progress(checkpoint) -> dict:
    return json.loads((checkpoint / "progress.json").read_text())


@pytest.fixture(scope="module")
def watched(script, tiny_pipeline_dir, judge, drawn, tmp_path_factory):
    """Settings, folder and log of a run of two epochs; to be left as it is."""
    folder = tmp_path_factory.mktemp("watched")
    # batches of 8 of the 12 images: they neither begin nor end where a caption does
    settings = usual_settings(tiny_pipeline_dir, judge, folder) | watching(judge, drawn, folder)
    settings |= {"sample.batch_size": 8, "sample.num_batches_per_epoch": 1}
    return settings, *train_with(script, settings, {})


def test_base_is_scored_as_by_hand(watched, drawn, judge):
    """APR and reward of epoch 0 from images drawn one by one and counted here."""
    settings, folder, epochs = watched
    captions, images = drawn
    predictions = load_classifier(judge).predict(images)
    aligned = [tuple(row.tolist()) == labels_of(text)[:4] for row, text in zip(predictions, captions, strict=True)]
    rewarding = load_classifier(settings["reward_fn_kwargs.isic_classifier_reward.classifier"]).predict(images)
    stated = torch.tensor([labels_of(text) for text in captions])
    base, *later = read_lines(folder / "held_out.jsonl")
    assert len({tuple(row.tolist()) for row in predictions}) > 2  # a judge that tells images apart
    assert base["epoch"] == 0 and base["apr"] == sum(aligned) / len(aligned)
    assert base["apr_by_prompt"] == {text: sum(aligned[4 * i : 4 * i + 4]) / 4 for i, text in enumerate(PROMPTS)}
    assert base["reward"] == pytest.approx((rewarding == stated).double().mean().item(), abs=1e-12)
    assert [entry["epoch"] for entry in later] == [1, 2]
    logged = [(entry["held_out_apr"], entry["held_out_reward"]) for entry in epochs]
    assert logged == [(entry["apr"], entry["reward"]) for entry in later]
    assert len({entry["reward"] for entry in (base, *later)}) > 1  # weights do change what is measured


def test_training_is_the_same_with_and_without(watched, script):
    settings, with_it, epochs = watched
    without, plain = train_with(script, settings, {"run_name": "without", "held_out__every": 0})
    assert not (without / "held_out.jsonl").exists() and not (without / "best").exists()
    for left, right in zip(untimed(epochs), untimed(plain), strict=True):
        assert left == right | {key: left[key] for key in ("held_out_apr", "held_out_reward")}
    torch.testing.assert_close(weights(without, 2), weights(with_it, 2), rtol=0, atol=0)


def scripted(monkeypatch, values) -> None:
    """Evaluations that return these (apr, reward) in turn, in place of what the judge says."""
    monkeypatch.setattr(HeldOut, "evaluate", Mock(side_effect=[Evaluation(*value, {}) for value in values]))


def test_best_outlives_the_others_and_can_be_loaded_and_resumed(held_out, train, monkeypatch, tmp_path):
    scripted(monkeypatch, [(0.2, 0.5), (0.6, 0.5), (0.6, 0.6), (0.3, 0.4)] + [(0.6, 0.6), (0.3, 0.4)])
    held_out |= LIGHT | {"num_epochs": 3, "num_checkpoint_limit": 1}
    folder, epochs = train()
    assert sorted(path.name for path in folder.glob("*checkpoint_*")) == ["checkpoint_1", "checkpoint_3"]
    assert (folder / "best").resolve() == (folder / "checkpoint_1").resolve()
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
    state = progress(folder / "best")  # the first of two equals
    assert state["epoch"] == 1 and state["held_out"]["best"] == {"epoch": 1, "apr": 0.6, "reward": 0.5}
    assert find_weights(folder / "best") == folder / "best" / "pytorch_lora_weights.safetensors"
    assert find_weights(folder) == folder / "checkpoint_3" / "pytorch_lora_weights.safetensors"

    shutil.copytree(folder / "best", tmp_path / "logs" / "copy" / "best")
    copy, resumed = train(run_name="", resume_from=str(tmp_path / "logs" / "copy" / "best"))
    assert [entry["reward_mean"] for entry in resumed] == [entry["reward_mean"] for entry in epochs[1:]]
    assert progress(copy / "checkpoint_3") == progress(folder / "checkpoint_3")
    torch.testing.assert_close(weights(folder, 3), weights(copy, 3), rtol=0, atol=0)


def test_collapse_stops_training(held_out, train, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    scripted(monkeypatch, [(0.5, 0.5), (0.6, 0.6), (0.5, 0.7), (0.4, 0.8), (0.9, 0.9)])
    held_out |= LIGHT
    stopping = {"num_epochs": 6, "save_freq": 10, "held_out__patience": 2, "held_out__tolerance": 0.05}
    folder, epochs = train(**stopping)
    assert is_finished(folder, configured(held_out, stopping))
    assert not is_finished(folder, configured(held_out, stopping | {"held_out__patience": 3}))
    assert len(epochs) == 3 and (folder / "checkpoint_3").is_dir() and progress(folder / "best")["epoch"] == 1
    assert "the reward rose from 0.6000 to 0.8000 while APR fell from 0.6000 to 0.4000" in caplog.text
    assert f"after 1 epochs, is {folder / 'best'}" in caplog.text
    assert "held-out APR 0.4000 reward 0.8000" in caplog.text


def test_evaluations_that_cannot_be_compared_are_refused(watched, script):
    settings, folder, _ = watched
    resumed = {"resume_from": str(shutil.copytree(folder, folder.with_name("copy"), symlinks=True)), "num_epochs": 3}
    other = resumed | {"held_out__images_per_prompt": 2}
    refused("images_per_prompt=4, now it is 2.*held_out.every=0", train_with, script, settings, other)
    folder, epochs = train_with(script, settings, resumed | {"held_out__every": 0})
    assert "held_out_apr" not in epochs[2] and progress(folder / "checkpoint_3")["held_out"]["best"] is not None


def test_no_judge_is_refused_first_and_a_reward_of_ones_own_may_have_any(held_out, train, judge, monkeypatch, tmp_path):
    monkeypatch.setitem(REWARDS, "mine", lambda classifier: lambda images, prompts, metadata: ([], {}))
    own = {"reward_fn": "mine", "reward_fn_kwargs.mine.classifier": "svm.onnx"}
    assert make_task(configured(held_out, own), torch.device("cpu")).held_out.judge.labels == ARTIFACTS
    copied = shutil.copyfile(judge, tmp_path / "another name.safetensors")
    (tmp_path / "cats.txt").write_text("a cat\n")
    rewarding = held_out["reward_fn_kwargs.isic_classifier_reward.classifier"]
    for wrong, expected in (
        ({"held_out__classifier": rewarding}, "ink, MEL, NV; give the H=4"),
        ({"reward_fn_kwargs.isic_classifier_reward.classifier": str(copied)}, "which gives the reward"),
        ({"held_out__classifier": "/nowhere/H4.pth"}, "/nowhere/H4.pth"),
        ({"prompt_fn_kwargs.path": str(tmp_path / "cats.txt")}, "'a cat' is not one of the 32"),
    ):
        refused([expected], train, **wrong)
    assert not (tmp_path / "logs").exists()
