"""A tiny Stable Diffusion with BERT, and tiny judges; a pytest plugin for their fixtures."""

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import efficientnet_b0

from ddpo_pytorch.generator import from_scratch as scratch
from ddpo_pytorch.generator.from_scratch import build_bert
from ddpo_pytorch.generator.pipeline import save_model
from ddpo_pytorch.judges.policy import POLICY_FILE, SELECTOR_FILE, Policy, TextFeatures, save_policy
from ddpo_pytorch.judges.selector import Selector, save_selector
from ddpo_pytorch.judges.vit import VisionSizes

FUNDUS_PROMPTS = (
    "Fundus: The left eye fundus image shows drusen, lens dust.",
    "Fundus: The right eye fundus image shows normal fundus.",
)


@pytest.fixture(scope="session")
def bert_pipeline_dir(tmp_path_factory):
    """A random Stable Diffusion of 8 x 8 latents and 32 px with a BERT of 24 tokens."""
    torch.manual_seed(2)
    tokenizer, encoder = build_bert(FUNDUS_PROMPTS, 32, 1, 24)
    vae, unet = scratch.build_vae((8, 8, 8), 32), scratch.build_unet((16, 32), (False, True), 32, 8)
    folder = tmp_path_factory.mktemp("bert-sd") / "model"
    save_model(scratch.assemble(vae, encoder, tokenizer, unet), folder)
    return folder


def write_judges(folder, text_encoder, seed, threshold=0.5, criteria=()):
    """Random judges whose scores differ between images: their last layers are enlarged."""
    torch.manual_seed(seed)
    sizes = VisionSizes(image_size=32, patch_size=8, width=32, layers=1, heads=2, mlp_ratio=2.0, dropout=0.0)
    selector, policy = Selector(sizes, criteria), Policy(sizes, TextFeatures(text_encoder, 24))
    policy.fit_text(FUNDUS_PROMPTS)
    with torch.no_grad():
        for judge in (selector, policy):
            judge.head[-1].weight.mul_(10)
    selector.threshold, policy.origin = threshold, {"stage": 2, "epochs": 0}
    save_selector(selector, folder / SELECTOR_FILE)
    save_policy(policy, folder / POLICY_FILE)
    return folder


def threshold_between(scores) -> float:
    """Return a threshold that passes some of `scores` (N,), N >= 4, and that no rounding can carry a score across.

    It lies in the middle of the widest gap between neighbours of the inner half. A score itself, or their median, would
    pass or fail its own image by the last digit, which another batch size or processor changes.
    """
    ordered = torch.as_tensor(scores, dtype=torch.float64).sort().values
    inner = ordered[len(ordered) // 4 : len(ordered) - len(ordered) // 4]
    gaps = inner.diff()
    widest = int(gaps.argmax())
    assert gaps[widest] > 1e-4, f"the scores lie too close together: {inner.tolist()}"
    return inner[widest : widest + 2].mean().item()


@pytest.fixture(scope="session")
def judges_dir(bert_pipeline_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("judges")
    return write_judges(folder, bert_pipeline_dir, seed=3, threshold=0.1, criteria=("disc", "artifacts"))


def published_file(path, heads):
    """Write a file of the published form: torchvision's names under "model.", Sequential(Dropout, Linear) as head."""
    torch.manual_seed(heads)
    network = efficientnet_b0(weights=None)
    network.classifier = nn.Sequential(nn.Dropout(0.3), nn.Linear(1280, heads))
    state = {f"model.{key}": value for key, value in network.state_dict().items()}
    content = {"epoch": 3, "model_state_dict": state, "optimizer_state_dict": {}}
    torch.save(content | {"val_loss": 0.1, "val_accuracy": np.float64(0.9)}, path)
    return network.eval()


def by_definition(logits, labels, pos_weight, gamma):
    """Return the classifier's loss term by term, in double precision."""
    p = torch.sigmoid(logits.double())
    positive = labels * pos_weight * (1 - p) ** gamma * -p.log()
    return (positive + (1 - labels) * p**gamma * -(1 - p).log()).mean()
