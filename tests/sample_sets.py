"""Sample folders of skin and retinas and tiny judges for the tests of metric.py; a pytest plugin for its fixtures."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity.feature_extractor_inceptionv3 as inception_module
import torchvision
from judge_tools import FUNDUS_PROMPTS, threshold_between, write_judges
from rl_tools import divide_evenly
from torch.optim.swa_utils import update_bn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from ddpo_pytorch.data.images import load_image, save_image
from ddpo_pytorch.data.isic import CAPTIONS, LABELS
from ddpo_pytorch.data.sample_folder import folder_name, write_log
from ddpo_pytorch.generator.from_scratch import build_bert
from ddpo_pytorch.judges.classifier import ArtifactClassifier, save_classifier
from ddpo_pytorch.judges.policy import SELECTOR_FILE
from ddpo_pytorch.judges.selector import load_selector, save_selector
from ddpo_pytorch.phantoms import fundus as retina


def write_samples(
    folder: Path, counts: dict[str, int], seed: int, size: int = 64, drawn: int | None = None, picture=None
) -> Path:
    """A sample folder of noise pictures that differ in colour and contrast, or of what `picture` draws.

    With `drawn` its log has a seed for every image, a function of `drawn` and the image's name, as eval.py writes it.
    """
    generator, entries = torch.Generator().manual_seed(seed), []
    for number, (caption, count) in enumerate(counts.items()):
        for index in range(count):
            tone = torch.rand(3, 1, 1, generator=generator)
            image = picture() if picture else tone + 0.3 * torch.randn(3, size, size, generator=generator)
            path = f"images/{folder_name(caption)}/{index}.png"
            save_image(folder / path, image.clamp(0, 1))
            place = CAPTIONS.index(caption) if caption in CAPTIONS else number
            made = {"seed": 1000 * (drawn or 0) + 100 * place + index, "reward": f"{index / 10:.4f}"}
            entries.append({"prompt": caption, "path_to_img": path} | (made if drawn else {}))
    write_log(folder, entries)
    if drawn:
        (folder / "settings.json").write_text(json.dumps({"settings": {"seed": drawn, "num_steps": 3}, "about": {}}))
    return folder


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


@pytest.fixture(scope="session")
def alexnet(tmp_path_factory) -> Path:
    """Random weights in torchvision's form, without the classifier, which LPIPS does not use."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("alexnet") / "alexnet.pth"
    layers = torchvision.models.alexnet(weights=None).features
    torch.save({f"features.{name}": value for name, value in layers.state_dict().items()}, path)
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
        update_bn([model.preprocess(pictures)], model)
        model.model.classifier.weight *= 20
    path = tmp_path_factory.mktemp("lively") / "h4.safetensors"
    save_classifier(divide_evenly(model, pictures), path)
    return path


@pytest.fixture
def fields(sets, lively_judge, tmp_path):
    """Function (alexnet, overrides): the fields of metric.py for the usual sets, with a cache of the test's own."""

    usual = {"real_path": sets["real"], "fake_path": sets["rl"], "compare_path": sets["sd"], "inception": ""}
    usual |= {"output": tmp_path / "out", "cache_dir": tmp_path / "cache", "classifier": lively_judge}
    return lambda alexnet="", **overrides: metric_fields(usual | {"alexnet": alexnet} | overrides)


def metric_fields(values: dict) -> dict:
    return {f"metric__{key}": str(value) if isinstance(value, Path) else value for key, value in values.items()}


@pytest.fixture
def measured(config_file, fields, run_main, tmp_path):
    """Function of overrides: metrics.json of these folders, of one model unless they name others."""

    def run(fail_if=(), sanity=False, **overrides) -> dict:
        run_main("metric.py", config_file, fail_if, sanity, **fields(**{"compare_path": ""} | overrides))
        return read(tmp_path / "out")

    return run


def images_of(folder: Path, caption: str = "") -> list[Path]:
    return sorted(folder.glob(f"images/{folder_name(caption) if caption else '*'}/*.*"))


PROMPTS = (*FUNDUS_PROMPTS, "Fundus: The left eye fundus image shows glaucoma.")


def write_fundus(folder: Path, counts: dict[str, int], seed: int, noise: float = 4, drawn: int | None = 7) -> Path:
    """Write a sample folder of phantom eyes, 64 px, with noise of this standard deviation in the field."""
    rng = np.random.default_rng(seed)

    def picture() -> torch.Tensor:
        eye = retina.draw("normal fundus", "left", retina.draw_look(rng), rng)
        noisy = eye + eye.any(axis=2, keepdims=True) * rng.normal(0, noise, eye.shape)
        return torch.from_numpy(noisy.clip(0, 255)).permute(2, 0, 1) / 255

    return write_samples(folder, counts, seed, drawn=drawn, picture=picture)


@pytest.fixture(scope="session")
def fundus_judges(tmp_path_factory, fundus_sets) -> Path:
    """A folder as train_rlhf.py writes it: random judges whose scores differ, half of the real images pass."""
    folder = tmp_path_factory.mktemp("fundus-judges")
    for name, part in zip(("tokenizer", "text_encoder"), build_bert(PROMPTS, 32, 1), strict=True):
        part.save_pretrained(folder / "bert" / name)
    selector = load_selector(write_judges(folder, folder / "bert", seed=3) / SELECTOR_FILE)
    images = torch.stack([load_image(path) for path in images_of(fundus_sets["real"])])
    selector.threshold = threshold_between(selector.score(images))
    save_selector(selector, folder / SELECTOR_FILE)
    return folder


@pytest.fixture(scope="session")
def fundus_sets(tmp_path_factory) -> dict[str, Path]:
    """Real images, and two models on shared noise, of which the second draws with more noise."""
    folder = tmp_path_factory.mktemp("fundus-sets")
    counts = {PROMPTS[0]: 5, PROMPTS[1]: 4, PROMPTS[2]: 1}
    return {
        "real": write_fundus(folder / "real", {PROMPTS[0]: 6, PROMPTS[1]: 7}, 0, drawn=None),
        "base": write_fundus(folder / "base", counts, 1),
        "better": write_fundus(folder / "better", counts, 2, noise=12),
    }


@pytest.fixture(scope="session")
def fundus_usual(fundus_sets, fundus_judges) -> dict:
    usual = {"real_path": fundus_sets["real"], "fake_path": fundus_sets["better"], "fake_name": "better"}
    usual |= {"compare_path": fundus_sets["base"], "compare_name": "base", "judges": fundus_judges, "classifier": ""}
    return usual | {"quality": ("legacy", "fov"), "extractors": ("inception", "judge")}


@pytest.fixture(scope="session")
def random_inception(tmp_path_factory):
    """A file in the form of torch-fidelity's weights, with random numbers: (path, the network that holds them)."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:  # build it without the download it insists on
        patch.setattr(inception_module, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *args: None)
        network = FeatureExtractorInceptionV3("reference", ["2048"])
    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv2d):  # keeps activations of order 1 (and out of slow denormal numbers)
            torch.nn.init.kaiming_normal_(layer.weight)
    torch.save(network.state_dict(), path)
    return path, network
