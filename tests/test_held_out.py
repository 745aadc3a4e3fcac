"""Held-out evaluation during training: the same noise every time, no trace in the training, the best one kept."""

import json
import logging
import shutil

import pytest
import torch
from accelerate import Accelerator
from rl_tools import PROMPTS, weights

from ddpo_pytorch.data.isic import labels_of
from ddpo_pytorch.diffusers_patch.pipeline_with_logprob import Sampling
from ddpo_pytorch.generator.pipeline import PromptEmbeddings, load_pipeline
from ddpo_pytorch.judges.classifier import load_classifier
from ddpo_pytorch.rewards import isic_classifier_reward
from ddpo_pytorch.training.checkpoints import find_weights
from ddpo_pytorch.training.held_out import Evaluation, HeldOut
from ddpo_pytorch.utils.errors import UserError

TIMES = {"rollout_samples_per_second", "update_samples_per_second", "peak_memory_gib", "seconds"}


def evaluations(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "held_out.jsonl").read_text().splitlines()]


def progress(checkpoint) -> dict:
    return json.loads((checkpoint / "progress.json").read_text())


def test_base_is_scored_as_by_hand(held_out, train, drawn, judge):
    """APR and reward of epoch 0 from images drawn one by one and counted here."""
    folder, epochs = train()
    captions, images = drawn
    predictions = load_classifier(judge).predict(images)
    aligned = [tuple(row.tolist()) == labels_of(text)[:4] for row, text in zip(predictions, captions, strict=True)]
    rewarding = load_classifier(held_out["reward_fn_kwargs.isic_classifier_reward.classifier"]).predict(images)
    stated = torch.tensor([labels_of(text) for text in captions])
    base, *later = evaluations(folder)
    assert len({tuple(row.tolist()) for row in predictions}) > 2  # a judge that tells images apart
    assert base["epoch"] == 0 and base["apr"] == sum(aligned) / len(aligned)
    assert base["apr_by_prompt"] == {text: sum(aligned[4 * i : 4 * i + 4]) / 4 for i, text in enumerate(PROMPTS)}
    assert base["reward"] == pytest.approx((rewarding == stated).double().mean().item(), abs=1e-12)
    assert [entry["epoch"] for entry in later] == [1, 2]
    assert [(entry["held_out_apr"], entry["held_out_reward"]) for entry in epochs] == [
        (entry["apr"], entry["reward"]) for entry in later
    ]
    assert len({entry["reward"] for entry in (base, *later)}) > 1  # weights do change what is measured


def test_training_is_the_same_with_and_without(held_out, train):
    with_it, epochs = train(run_name="with")
    without, plain = train(run_name="without", held_out__every=0)
    assert not (without / "held_out.jsonl").exists() and not (without / "best").exists()
    for left, right in zip(epochs, plain, strict=True):
        assert {key: left[key] for key in right.keys() - TIMES} == {key: right[key] for key in right.keys() - TIMES}
        assert left.keys() - right.keys() == {"held_out_apr", "held_out_reward"}
    for key, value in weights(without, 2).items():
        assert torch.equal(value, weights(with_it, 2)[key])
    assert (with_it / "grid_0002.png").read_bytes() == (without / "grid_0002.png").read_bytes()


def test_does_not_depend_on_the_global_generator_or_the_batch(tiny_pipeline_dir, judge, classifier):
    pipe = load_pipeline(tiny_pipeline_dir)
    pipe.set_progress_bar_config(disable=True)
    prompts = [(text, {"label": list(labels_of(text))}) for text in PROMPTS]
    held_out = HeldOut(load_classifier(judge), prompts, 4, 42, Sampling(3, 5.0, 1.0))
    reward, found = isic_classifier_reward(classifier), []
    for size in (4, 5, 12):
        torch.manual_seed(size)
        state = torch.get_rng_state()
        found.append(held_out.evaluate(pipe, PromptEmbeddings(pipe), reward, size, Accelerator(cpu=True)))
        assert torch.equal(torch.get_rng_state(), state)
    assert found[0].apr_by_prompt == found[1].apr_by_prompt == found[2].apr_by_prompt


def scripted(monkeypatch, values) -> None:
    """Evaluations that return these (apr, reward) in turn, in place of what the judge says."""
    rest = iter(values)
    monkeypatch.setattr(HeldOut, "evaluate", lambda *args, **kwargs: Evaluation(*next(rest), {}))


def test_best_outlives_the_others_and_can_be_loaded(held_out, train, monkeypatch):
    scripted(monkeypatch, [(0.2, 0.5), (0.6, 0.5), (0.6, 0.6), (0.3, 0.4)])
    folder, _ = train(num_epochs=3, num_checkpoint_limit=1)
    assert sorted(path.name for path in folder.glob("*checkpoint_*")) == ["checkpoint_1", "checkpoint_3"]
    assert (folder / "best").resolve() == (folder / "checkpoint_1").resolve()
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
    state = progress(folder / "best")  # the first of two equals
    assert state["epoch"] == 1 and state["held_out"]["best"] == {"epoch": 1, "apr": 0.6, "reward": 0.5}
    assert find_weights(folder / "best") == folder / "best" / "pytorch_lora_weights.safetensors"
    assert find_weights(folder) == folder / "checkpoint_3" / "pytorch_lora_weights.safetensors"


def test_a_copy_of_best_is_resumed(held_out, train, monkeypatch, tmp_path):
    scripted(monkeypatch, [(0.2, 0.5), (0.6, 0.5), (0.4, 0.6), (0.3, 0.6)] + [(0.4, 0.6), (0.3, 0.6)])
    folder, epochs = train(num_epochs=3)
    shutil.copytree(folder / "best", tmp_path / "logs" / "copy" / "best")
    copy, resumed = train(num_epochs=3, run_name="", resume_from=str(tmp_path / "logs" / "copy" / "best"))
    assert [entry["reward_mean"] for entry in resumed] == [entry["reward_mean"] for entry in epochs[1:]]
    assert progress(copy / "checkpoint_3") == progress(folder / "checkpoint_3")
    for key, value in weights(folder, 3).items():
        assert torch.equal(value, weights(copy, 3)[key])


def test_collapse_stops_training(held_out, train, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    scripted(monkeypatch, [(0.5, 0.5), (0.6, 0.6), (0.5, 0.7), (0.4, 0.8), (0.9, 0.9)])
    folder, epochs = train(num_epochs=6, save_freq=10, held_out__patience=2, held_out__tolerance=0.05)
    assert len(epochs) == 3 and (folder / "checkpoint_3").is_dir() and progress(folder / "best")["epoch"] == 1
    assert "the reward rose from 0.6000 to 0.8000 while APR fell from 0.6000 to 0.4000" in caplog.text
    assert f"after 1 epochs, is {folder / 'best'}" in caplog.text
    assert "held-out APR 0.4000 reward 0.8000" in caplog.text


def test_evaluations_that_cannot_be_compared_are_refused(held_out, train):
    folder, _ = train(num_epochs=1)
    with pytest.raises(UserError, match="images_per_prompt=4, now it is 2.*held_out.every=0"):
        train(num_epochs=2, resume_from=str(folder), held_out__images_per_prompt=2)
    _, epochs = train(num_epochs=2, resume_from=str(folder), held_out__every=0)
    assert "held_out_apr" not in epochs[1] and progress(folder / "checkpoint_2")["held_out"]["best"] is not None


def test_no_judge_is_refused_first(held_out, train, judge, tmp_path):
    copied = shutil.copyfile(judge, tmp_path / "another name.safetensors")
    (tmp_path / "cats.txt").write_text("a cat\n")
    rewarding = held_out["reward_fn_kwargs.isic_classifier_reward.classifier"]
    for wrong, expected in (
        ({"held_out__classifier": rewarding}, "ink, MEL, NV; give the H=4"),
        ({"reward_fn_kwargs.isic_classifier_reward.classifier": str(copied)}, "which gives the reward"),
        ({"held_out__classifier": "/nowhere/H4.pth"}, "/nowhere/H4.pth"),
        ({"prompt_fn_kwargs.path": str(tmp_path / "cats.txt")}, "'a cat' is not one of the 32"),
    ):
        with pytest.raises(UserError) as caught:
            train(**wrong)
        assert expected in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "logs").exists()
