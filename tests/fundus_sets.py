"""Fundus sample folders and tiny judges for the tests of metric.py; a pytest plugin for its fixtures."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity.feature_extractor_inceptionv3 as inception_module
from judge_tools import threshold_between
from PIL import Image
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from ddpo_pytorch.data.images import load_image
from ddpo_pytorch.data.sample_folder import folder_name, write_log
from ddpo_pytorch.generator.from_scratch import build_bert
from ddpo_pytorch.judges.policy import POLICY_FILE, SELECTOR_FILE, Policy, TextFeatures, save_policy
from ddpo_pytorch.judges.selector import Selector, save_selector
from ddpo_pytorch.judges.vit import VisionSizes

PROMPTS = (
    "Fundus: The left eye fundus image shows drusen, lens dust.",
    "Fundus: The right eye fundus image shows normal fundus.",
    "Fundus: The left eye fundus image shows glaucoma.",
)
SIZE = 64


def draw_retina(rng: np.random.Generator, size: int = SIZE, noise: float = 4) -> np.ndarray:
    """uint8 (size, size, 3): an orange disc with a bright spot and dark lines, black around."""
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    tone = np.array([170, 90, 40]) * rng.uniform(0.7, 1.2, 3)
    picture = tone * (1.1 - rng.uniform(0.1, 1) * (x**2 + y**2)[..., None] / size**2)
    picture[(x - size / 5) ** 2 + y**2 < (size / 12) ** 2] *= 1.4
    for angle in rng.uniform(0, np.pi, 4):
        picture[np.abs(x * np.sin(angle) - y * np.cos(angle)) < size / 90] *= 0.6
    picture += rng.normal(0, noise, picture.shape)
    picture[x**2 + y**2 > (0.47 * size) ** 2] = 0
    return picture.clip(0, 255).astype(np.uint8)


def write_fundus(folder: Path, counts: dict[str, int], seed: int, noise: float = 4, drawn: int | None = 7) -> Path:
    """A sample folder of drawn retinas; with `drawn`, its log has a seed for every image, as eval.py writes it."""
    rng, entries = np.random.default_rng(seed), []
    for caption, count in counts.items():
        for index in range(count):
            path = f"images/{folder_name(caption)}/{index:05d}.png"
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw_retina(rng, noise=noise)).save(folder / path)
            entry = {"prompt": caption, "path_to_img": path}
            entries.append(entry | ({} if drawn is None else {"seed": 1000 * drawn + len(entries)}))
    write_log(folder, entries)
    if drawn is not None:
        (folder / "settings.json").write_text(json.dumps({"settings": {"seed": drawn, "num_steps": 3}, "about": {}}))
    return folder


def images_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("images/*/*.png"))


@pytest.fixture(scope="session")
def fundus_judges(tmp_path_factory, fundus_sets) -> Path:
    """A folder as train_rlhf.py writes it: random judges whose scores differ, half of the real images pass."""
    folder = tmp_path_factory.mktemp("fundus-judges")
    torch.manual_seed(3)
    for part in zip(("tokenizer", "text_encoder"), build_bert(PROMPTS, 32, 1), strict=True):
        part[1].save_pretrained(folder / "bert" / part[0])
    sizes = VisionSizes(image_size=32, patch_size=8, width=32, layers=1, heads=2)
    selector, policy = Selector(sizes).eval(), Policy(sizes, TextFeatures(folder / "bert")).eval()
    images = torch.stack([load_image(path) for path in images_of(fundus_sets["real"])])
    captions = [PROMPTS[number % 3] for number in range(len(images))]
    with torch.no_grad():
        for judge, scores in ((selector, selector.score), (policy, lambda x: policy.score(x, captions))):
            for name, weights in judge.named_parameters():
                if name.endswith("weight") and weights.dim() > 1:
                    weights *= 4
            logits = torch.logit(scores(images))
            judge.head[-1].weight *= 1.5 / logits.std()
            judge.head[-1].bias *= 0
            judge.head[-1].bias -= torch.logit(scores(images)).mean()
    selector.threshold = threshold_between(selector.score(images))
    save_selector(selector, folder / SELECTOR_FILE)
    save_policy(policy, folder / POLICY_FILE)
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


@pytest.fixture
def fundus_fields(fundus_sets, fundus_judges, tmp_path):
    """Function of overrides: the fields of metric.py for these sets, with a cache of the test's own."""

    def build(**overrides) -> dict:
        usual = {"real_path": fundus_sets["real"], "fake_path": fundus_sets["better"], "fake_name": "better"}
        usual |= {"compare_path": fundus_sets["base"], "compare_name": "base", "judges": fundus_judges}
        usual |= {"output": tmp_path / "out", "cache_dir": tmp_path / "cache", "alexnet": "", "inception": ""}
        usual |= {"classifier": "", "quality": ("legacy", "fov"), "extractors": ("inception", "judge")}
        chosen = usual | overrides
        return {f"metric__{key}": str(value) if isinstance(value, Path) else value for key, value in chosen.items()}

    return build


@pytest.fixture(scope="module")
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
