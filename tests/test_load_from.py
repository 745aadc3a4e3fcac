"""train.py --config.load_from: where training starts, what does not fit, and what resuming makes of it."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from script_tools import files_of

from ddpo_pytorch.data.isic import CAPTIONS
from ddpo_pytorch.diffusers_patch.pipeline_with_logprob import Sampling
from ddpo_pytorch.generator.lora import lora_state_dict
from ddpo_pytorch.generator.pipeline import PromptEmbeddings, load_pipeline
from ddpo_pytorch.sampling import draw_images
from ddpo_pytorch.training.checkpoints import load_weights
from ddpo_pytorch.utils.errors import UserError

pytest_plugins = ["script_tools"]
LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture
def earlier(rl, tmp_path):
    """The run folder of an epoch of training, under another name than "run"."""
    return rl.train(run_name="earlier")


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
    drawn = [
        draw_images(
            pipe, table, CAPTIONS[:2], [torch.Generator().manual_seed(seed) for seed in (1, 2)], Sampling(2, 5, 1)
        )
        for pipe, table in ((evaluated, PromptEmbeddings(evaluated)), (run.pipe, run.embeddings))
    ]
    torch.testing.assert_close(*drawn, rtol=0, atol=1e-4)
    folder = rl.train(load_from=str(earlier), train__kl_coef=0.1)
    (entry,) = epochs(folder)
    # updates see other batches than the rollout, whose kernels may add up in another order
    assert entry["first_ratio_deviation"] < 1e-5 and entry["kl_to_base"] > 0
    now = load_file(folder / "checkpoint_1" / LORA)
    assert any(not torch.equal(now[name], weights[name]) for name in weights)
    assert epochs(rl.train(run_name="fresh", train__kl_coef=0.1))[0]["kl_to_base"] < entry["kl_to_base"]


def test_what_cannot_be_started_from_is_one_line_and_leaves_nothing(rl, earlier, own_model, tmp_path):
    weights = load_file(earlier / "checkpoint_1" / LORA)
    doubled = {key: torch.cat([value, value], dim=int("lora_B" in key)) for key, value in weights.items()}
    save_file(doubled, tmp_path / "8.safetensors")
    save_file({key: value for key, value in weights.items() if "to_k" not in key}, tmp_path / "few.safetensors")
    unet = str(own_model / "unet" / "diffusion_pytorch_model.safetensors")
    for fields, words in (
        ({"load_from": "/nowhere/adapter"}, ["/nowhere/adapter"]),
        ({"load_from": str(tmp_path / "8.safetensors")}, ["8.safetensors", "train.lora_rank"]),
        ({"load_from": str(tmp_path / "few.safetensors")}, ["few.safetensors", "to_k"]),
        ({"load_from": str(earlier), "train__lora_targets": ("to_q",)}, ["train.lora_targets"]),
        ({"load_from": unet}, [unet, "use_lora=True"]),
        ({"load_from": str(earlier), "use_lora": False}, [LORA, "use_lora=False"]),
    ):
        with pytest.raises(UserError) as caught:
            rl.train(**fields)
        assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words), str(caught.value)
        assert not (tmp_path / "logs" / "run").exists()


def test_a_resumed_run_keeps_its_own_checkpoint(rl, earlier, tmp_path):
    """And whether it started from these weights is compared, wherever they lie now."""
    whole = rl.train(load_from=str(earlier), run_name="whole", num_epochs=2)
    folder = rl.train(load_from=str(earlier))
    moved = shutil.copytree(earlier, tmp_path / "moved")
    rl.train(load_from=str(moved / "checkpoint_1"), num_epochs=2)
    assert files_of(folder / "checkpoint_2") == files_of(whole / "checkpoint_2")
    other = rl.train(run_name="other", seed=3)
    before = files_of(folder)
    for fields in ({"load_from": ""}, {"load_from": str(other)}):
        with pytest.raises(UserError, match="load_from") as caught:
            rl.train(num_epochs=3, **fields)
        assert "\n" not in str(caught.value) and files_of(folder) == before
    rl.train(num_epochs=3, resume_from=str(folder))
    assert (folder / "checkpoint_3").is_dir()
