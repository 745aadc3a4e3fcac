"""train.py --config.load_from: where training starts, what does not fit, and what resuming makes of it."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from script_tools import files_of

from ddpo_pytorch.data.isic import ARTIFACTS, CAPTIONS
from ddpo_pytorch.diffusers_patch.pipeline_with_logprob import pipeline_with_logprob
from ddpo_pytorch.generator.lora import lora_state_dict
from ddpo_pytorch.generator.pipeline import PromptEmbeddings, load_pipeline
from ddpo_pytorch.judges.classifier import ArtifactClassifier, save_classifier
from ddpo_pytorch.training.checkpoints import load_weights
from ddpo_pytorch.utils.errors import UserError

pytest_plugins = ["script_tools"]
LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture
def earlier(rl, tmp_path):
    """The run folder of an epoch of training, under another name than "run"."""
    return rl.train(run_name="earlier")


def images(pipe, table):
    noise = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    embeds = {"prompt_embeds": table(CAPTIONS[:2]), "negative_prompt_embeds": table.negative}
    return pipeline_with_logprob(pipe, **embeds, num_inference_steps=2, eta=1.0, generator=noise)[0]


def epochs(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_training_starts_from_an_adapter_as_eval_reads_it(rl, earlier, own_model, tmp_path):
    """A run folder, a checkpoint or a file; the same weights and images as eval.py's, and a ratio of 1."""
    weights = load_file(earlier / "checkpoint_1" / LORA)
    assert all(value.any() for value in weights.values())
    evaluated = load_pipeline(own_model)
    load_weights(evaluated.unet, earlier)
    torch.save(weights, tmp_path / "adapter.bin")
    for place in (earlier, earlier / "checkpoint_1", earlier / "checkpoint_1" / LORA, tmp_path / "adapter.bin"):
        run = rl.set_up(load_from=str(place))
        started = lora_state_dict(run.pipe.unet)
        assert started.keys() == weights.keys()
        assert all(torch.equal(started[name], weights[name]) for name in weights)
    expected = images(evaluated, PromptEmbeddings(evaluated))
    torch.testing.assert_close(images(run.pipe, run.embeddings), expected, rtol=0, atol=1e-4)
    folder = rl.train(load_from=str(earlier), train__kl_coef=0.1)
    (entry,) = epochs(folder)
    # updates see other batches than the rollout, whose kernels may add up in another order
    assert entry["first_ratio_deviation"] < 1e-5 and entry["kl_to_base"] > 0
    now = load_file(folder / "checkpoint_1" / LORA)
    assert any(not torch.equal(now[name], weights[name]) for name in weights)
    assert epochs(rl.train(run_name="fresh", train__kl_coef=0.1))[0]["kl_to_base"] < entry["kl_to_base"]


def test_the_first_held_out_evaluation_is_of_the_adapter(rl, tmp_path):
    torch.manual_seed(7)
    save_classifier(ArtifactClassifier(ARTIFACTS, 32, "tinynet_e"), tmp_path / "H4.safetensors")
    judge = {"held_out__every": 1, "held_out__images_per_prompt": 1}
    judge["held_out__classifier"] = str(tmp_path / "H4.safetensors")

    def evaluations(folder):
        return [json.loads(line) for line in (folder / "held_out.jsonl").read_text().splitlines()]

    before = evaluations(rl.train(run_name="earlier", **judge))
    after = evaluations(rl.train(load_from=str(tmp_path / "logs" / "earlier"), **judge))
    assert [entry["epoch"] for entry in after] == [0, 1]
    assert after[0] | {"epoch": 1} == before[1]


def test_what_cannot_be_started_from_is_one_line_and_leaves_nothing(rl, earlier, own_model, tmp_path):
    weights = load_file(earlier / "checkpoint_1" / LORA)
    name = next(iter(weights))
    save_file(
        {key: torch.cat([value, value], dim=int("lora_B" in key)) for key, value in weights.items()},
        tmp_path / "8.safetensors",
    )
    save_file({key: value for key, value in weights.items() if "to_k" not in key}, tmp_path / "few.safetensors")
    save_file(weights | {name: torch.full_like(weights[name], torch.nan)}, tmp_path / "nan.safetensors")
    (tmp_path / "page.safetensors").write_text("<html>")
    unet = str(own_model / "unet" / "diffusion_pytorch_model.safetensors")
    for fields, words in (
        ({"load_from": "/nowhere/adapter"}, ["/nowhere/adapter"]),
        ({"load_from": str(tmp_path / "logs")}, [str(tmp_path / "logs")]),
        ({"load_from": str(tmp_path / "8.safetensors")}, ["8.safetensors", "train.lora_rank"]),
        ({"load_from": str(tmp_path / "few.safetensors")}, ["few.safetensors", "to_k"]),
        ({"load_from": str(earlier), "train__lora_targets": ("to_q",)}, ["train.lora_targets"]),
        ({"load_from": str(earlier), "train__lora_rank": 2}, ["(4, ", "(2, "]),
        ({"load_from": str(tmp_path / "nan.safetensors")}, ["nan.safetensors", name]),
        ({"load_from": str(tmp_path / "page.safetensors")}, ["page.safetensors"]),
        ({"load_from": unet}, [unet, "use_lora=True"]),
        ({"load_from": str(earlier), "use_lora": False}, [LORA, "use_lora=False"]),
    ):
        with pytest.raises(UserError) as caught:
            rl.train(**fields)
        assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words), str(caught.value)
        assert not (tmp_path / "logs" / "run").exists()


def test_a_full_fine_tune_starts_from_a_full_unet(rl):
    earlier = rl.train(run_name="earlier", use_lora=False)
    weights = load_file(earlier / "checkpoint_1" / "unet.safetensors")
    started = rl.set_up(use_lora=False, load_from=str(earlier)).pipe.unet.state_dict()
    assert all(torch.equal(started[name], weights[name]) for name in weights)
    folder = rl.train(use_lora=False, load_from=str(earlier))
    assert epochs(folder)[0]["first_ratio_deviation"] < 1e-5
    rl.train(use_lora=False, load_from=str(earlier), num_epochs=2)
    assert (folder / "checkpoint_2").is_dir()
    with pytest.raises(UserError, match="load_from|model.unet"):
        rl.train(use_lora=False, num_epochs=3)


def test_a_resumed_run_keeps_its_own_checkpoint(rl, earlier, tmp_path):
    """And whether it started from these weights is compared, wherever they lie now."""
    whole = rl.train(load_from=str(earlier), run_name="whole", num_epochs=2)
    folder = rl.train(load_from=str(earlier))
    moved = shutil.copytree(earlier, tmp_path / "moved")
    rl.train(load_from=str(moved / "checkpoint_1"), num_epochs=2)
    assert files_of(folder / "checkpoint_2") == files_of(whole / "checkpoint_2")
    other = rl.train(run_name="other", seed=3)
    before = files_of(folder)
    for fields in (
        {"load_from": ""},
        {"load_from": str(other)},
        {"load_from": str(other), "resume_from": str(folder)},
    ):
        with pytest.raises(UserError, match="load_from") as caught:
            rl.train(num_epochs=3, **fields)
        assert "\n" not in str(caught.value) and files_of(folder) == before
    rl.train(num_epochs=3, resume_from=str(folder))
    assert (folder / "checkpoint_3").is_dir()
    with pytest.raises(UserError, match="load_from"):  # a run that started from no adapter
        rl.train(run_name="other", seed=3, load_from=str(earlier), num_epochs=2)
