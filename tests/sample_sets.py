"""Sample folders for the tests of metric.py; a pytest plugin for its fixtures."""

import json
from pathlib import Path

import pytest
import torch
import torchvision

from ddpo_pytorch.data.images import save_image
from ddpo_pytorch.data.isic import CAPTIONS, LABELS
from ddpo_pytorch.data.sample_folder import folder_name, write_log
from ddpo_pytorch.judges.classifier import ArtifactClassifier, save_classifier


def write_samples(folder: Path, counts: dict[str, int], seed: int, size: int = 64, drawn: int | None = None) -> Path:
    """A sample folder of noise pictures that differ in colour and contrast.

    With `drawn` its log has a seed for every image, a function of `drawn` and the image's name, as eval.py writes it.
    """
    generator, entries = torch.Generator().manual_seed(seed), []
    for caption, count in counts.items():
        for index in range(count):
            tone = torch.rand(3, 1, 1, generator=generator)
            image = (tone + 0.3 * torch.randn(3, size, size, generator=generator)).clamp(0, 1)
            path = f"images/{folder_name(caption)}/{index}.png"
            save_image(folder / path, image)
            if drawn is not None:
                noise = 1000 * drawn + 100 * CAPTIONS.index(caption) + index
                entries.append({"prompt": caption, "path_to_img": path, "seed": noise, "reward": f"{index / 10:.4f}"})
    write_log(folder, entries)
    if drawn is not None:
        (folder / "settings.json").write_text(json.dumps({"settings": {"seed": drawn, "num_steps": 3}, "about": {}}))
    return folder


def numbers(value, path=""):
    """Every number of a nested structure by its path."""
    if isinstance(value, dict):
        return {k: v for key, part in value.items() for k, v in numbers(part, f"{path}/{key}").items()}
    if isinstance(value, list):
        return {k: v for key, part in enumerate(value) for k, v in numbers(part, f"{path}/{key}").items()}
    return {path: value} if isinstance(value, (int, float)) else {}


def read(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict[str, Path]:
    folder, single = tmp_path_factory.mktemp("sets"), CAPTIONS[8]
    counts = {single: 4, CAPTIONS[0]: 3, CAPTIONS[31]: 2}
    return {
        "real": write_samples(folder / "real", {single: 5, CAPTIONS[0]: 6, CAPTIONS[17]: 2}, 0),
        "sd": write_samples(folder / "sd", counts, 1, drawn=88),
        "rl": write_samples(folder / "rl", counts, 2, drawn=88),
        "more": write_samples(folder / "more", counts | {CAPTIONS[31]: 4}, 3, drawn=89),
    }


@pytest.fixture(scope="module")
def alexnet(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("alexnet") / "alexnet.pth"
    torch.save(torchvision.models.alexnet(weights=None).state_dict(), path)
    return path


@pytest.fixture(scope="session")
def lively_judge(tmp_path_factory) -> Path:
    """A classifier of random weights that sees differences: its normalisations are fitted to such pictures."""
    torch.manual_seed(0)
    model = ArtifactClassifier(LABELS[:4], 32, "tinynet_e").train()
    generator = torch.Generator().manual_seed(0)
    tones = torch.rand(64, 3, 1, 1, generator=generator)
    pictures = (tones + 0.3 * torch.randn(64, 3, 64, 64, generator=generator)).clamp(0, 1)
    with torch.no_grad():
        for _ in range(60):  # running statistics are averages over about the last ten
            model(model.preprocess(pictures))
        model.model.classifier.weight *= 20
        model.eval()
        model.model.classifier.bias -= model.logits(pictures).median(dim=0).values
    path = tmp_path_factory.mktemp("lively") / "h4.safetensors"
    save_classifier(model, path)
    return path


@pytest.fixture
def fields(sets, lively_judge, tmp_path):
    """Function (alexnet, overrides): the fields of metric.py for the usual sets, with a cache of the test's own."""

    def build(alexnet="", **overrides) -> dict:
        usual = {"real_path": sets["real"], "fake_path": sets["rl"], "compare_path": sets["sd"]}
        usual |= {"output": tmp_path / "out", "cache_dir": tmp_path / "cache", "alexnet": alexnet, "inception": ""}
        usual["classifier"] = lively_judge
        return {f"metric__{key}": str(value) for key, value in (usual | overrides).items()}

    return build
