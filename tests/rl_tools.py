"""Runs of train.py in this process on the tiny model, and a judge of its images; a pytest plugin."""

import itertools
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from common_fixtures import forget
from safetensors.torch import load_file
from script_tools import files_of, load_module, options, read_config, read_lines

from ddpo_pytorch.data.images import to_uint8
from ddpo_pytorch.data.isic import ARTIFACTS, CAPTIONS, LABELS
from ddpo_pytorch.diffusers_patch.pipeline_with_logprob import pipeline_with_logprob
from ddpo_pytorch.generator.pipeline import load_pipeline
from ddpo_pytorch.judges.classifier import ArtifactClassifier, save_classifier
from ddpo_pytorch.utils.randomness import Stream, derived_seed

PROMPTS = CAPTIONS[:3]
# settings of four samples of two steps and two updates an epoch, with a pass in place of two of each step
LIGHT = {"sample.num_steps": 2, "sample.num_batches_per_epoch": 1, "train.batch_size": 2}
LIGHT |= {"sample.guidance_scale": 1.0, "train.cfg": False}
REWARD = "reward_fn_kwargs.isic_classifier_reward.classifier"
TIMES = {"rollout_samples_per_second", "update_samples_per_second", "peak_memory_gib", "seconds"}


@pytest.fixture(scope="module")
def script():
    return load_module("scripts/train.py")


@pytest.fixture
def classifier(judges) -> Path:
    return judges[6]


@pytest.fixture
def settings(tiny_pipeline_dir, classifier, tmp_path) -> dict:
    return usual_settings(tiny_pipeline_dir, classifier, tmp_path)


def usual_settings(model: Path, classifier: Path, folder: Path) -> dict:
    """Overrides of config/base.py: 8 samples an epoch of 3 steps in 2 updates, on the tiny pipeline."""
    usual = {"pretrained.model": str(model), "logdir": str(folder / "logs"), "run_name": "run", "log_with": ""}
    usual |= {"mixed_precision": "no", "num_epochs": 2, "save_freq": 1, "per_prompt_stat_tracking.min_count": 2}
    usual |= {"sample.num_steps": 3, "sample.batch_size": 4, "sample.num_batches_per_epoch": 2}
    usual |= {"train.batch_size": 4, "train.learning_rate": 1e-2, "train.clip_range": 1e-3}
    return usual | {REWARD: str(classifier)}


def configured(settings: dict, overrides: dict):
    """config/base.py with these settings, for a run that knows of no earlier one."""
    forget()
    return read_config("config/base.py", settings | overrides)


def train_with(script, settings: dict, overrides: dict) -> tuple[Path, list[dict]]:
    """Run the script's `train` in this process, grids with log_images only; the run folder and its logged epochs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        if not overrides.get("log_images"):
            patch.setattr(script, "save_grid", lambda *arguments: arguments[-1].write_bytes(b"16 images"))
        folder = script.train(configured(settings, overrides))
    return folder, read_lines(folder / "metrics.jsonl")


def untimed(epochs: list[dict]) -> list[dict]:
    return [{key: value for key, value in entry.items() if key not in TIMES} for entry in epochs]


def content(folder: Path) -> dict:
    """All that a run leaves, without the times and the settings of each start."""
    files = {name: data for name, data in files_of(folder).items() if not name.startswith("config")}
    files["metrics.jsonl"] = untimed(read_lines(folder / "metrics.jsonl"))
    return files | {"best": os.readlink(folder / "best")}


@pytest.fixture
def train(script, settings):
    return lambda **overrides: train_with(script, settings, overrides)


def weights(folder: Path, epoch: int, name: str = "pytorch_lora_weights.safetensors") -> dict[str, torch.Tensor]:
    return load_file(folder / f"checkpoint_{epoch}" / name)


def as_flags(settings: dict, **overrides) -> list[str]:
    return options("config/base.py", **settings | {key.replace("__", "."): value for key, value in overrides.items()})


def divide_evenly(model: ArtifactClassifier, images: torch.Tensor) -> ArtifactClassifier:
    """Shift each logit so that half of the images are above 0: an untrained head sees the same in all images."""
    ordered = model.eval().logits(images).sort(dim=0).values
    middle = ordered[len(images) // 2 - 1 : len(images) // 2 + 1].mean(dim=0)
    with torch.no_grad():
        model.model.get_classifier().bias -= middle
    return model


@pytest.fixture(scope="module")
def drawn(tiny_pipeline_dir) -> tuple[list[str], torch.Tensor]:
    """The images of the held-out set one by one, through the pipeline alone; as they would be stored."""
    pipe, images = load_pipeline(tiny_pipeline_dir), []
    settings = {"num_inference_steps": 3, "guidance_scale": 5.0, "eta": 1.0}
    pipe.set_progress_bar_config(disable=True)
    for number, index in itertools.product(range(len(PROMPTS)), range(4)):
        generator = torch.Generator().manual_seed(derived_seed(42, Stream.HELD_OUT, number, index))
        image, *_ = pipeline_with_logprob(pipe, PROMPTS[number], generator=[generator], **settings)
        images.append(to_uint8(image).float() / 255)
    return [caption for caption in PROMPTS for _ in range(4)], torch.cat(images)


@pytest.fixture(scope="module")
def judge(drawn, tmp_path_factory):
    """An H=4 judge that tells the tiny pipeline's images apart."""
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("judge") / "H4.safetensors"
    save_classifier(divide_evenly(ArtifactClassifier(ARTIFACTS, 32, "tinynet_e"), drawn[1]), path)
    return path


@pytest.fixture
def held_out(settings, judge, drawn, tmp_path):
    settings |= watching(judge, drawn, tmp_path)
    return settings


def watching(judge: Path, drawn: tuple, folder: Path) -> dict:
    """Settings that evaluate every epoch 4 images of each of 3 captions; the reward tells images apart, too."""
    torch.manual_seed(4)
    rewarding = folder / "H6.safetensors"
    save_classifier(divide_evenly(ArtifactClassifier(LABELS, 32, "tinynet_e"), drawn[1]), rewarding)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    found = {"prompt_fn": "from_file", "prompt_fn_kwargs.path": str(folder / "prompts.txt"), REWARD: str(rewarding)}
    return found | {"held_out.every": 1, "held_out.images_per_prompt": 4, "held_out.classifier": str(judge)}


@pytest.fixture
def own_model(tiny_pipeline_dir, tmp_path):
    """A copy of the tiny model, to be changed."""
    return shutil.copytree(tiny_pipeline_dir, tmp_path / "model")


@pytest.fixture
def rl(script, own_model, settings, tmp_path, monkeypatch):
    """`rl.train(**fields)` and `rl.set_up(**fields)`: the script's functions with these changes of its settings.

    Beside the model lie H6.safetensors, which rewards, and prompts.txt with four captions; runs go to logs/run.
    """
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    shutil.copy(settings[REWARD], tmp_path / "H6.safetensors")
    (tmp_path / "prompts.txt").write_text("\n".join(CAPTIONS[:4]) + "\n")
    settings |= LIGHT | {"pretrained.model": str(own_model), "num_epochs": 1, "prompt_fn": "from_file"}
    settings |= {REWARD: str(tmp_path / "H6.safetensors"), "prompt_fn_kwargs.path": str(tmp_path / "prompts.txt")}
    return SimpleNamespace(
        train=lambda **fields: train_with(script, settings, fields)[0],
        set_up=lambda **fields: script.set_up(configured(settings, fields)),
    )
