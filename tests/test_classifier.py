"""The classifier: its files (ours and the published form), its preprocessing, and what it refuses to open."""

import json
import os
import pickle

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as tvf
from safetensors import safe_open
from torch import nn
from torchvision.models import efficientnet_b0

from ddpo_pytorch.data.isic import LABELS
from ddpo_pytorch.judges.classifier import ArtifactClassifier, load_classifier, save_classifier
from ddpo_pytorch.utils.errors import UserError


def published_file(path, heads):
    """A file of the published form: torchvision's names under "model.", Sequential(Dropout, Linear) as head."""
    torch.manual_seed(heads)
    network = efficientnet_b0(weights=None)
    network.classifier = nn.Sequential(nn.Dropout(0.3), nn.Linear(1280, heads))
    state = {f"model.{key}": value for key, value in network.state_dict().items()}
    content = {"epoch": 3, "model_state_dict": state, "optimizer_state_dict": {}}
    torch.save(content | {"val_loss": 0.1, "val_accuracy": np.float64(0.9)}, path)
    return network.eval()


@pytest.mark.parametrize("heads", [4, 6])
def test_published_form_loads_and_computes_the_same(tmp_path, heads):
    network = published_file(tmp_path / "artifact_classifier_test_H4.pth", heads)
    model = load_classifier(tmp_path / "artifact_classifier_train_H4.pth")  # the other official spelling
    assert model.labels == LABELS[:heads] and model.image_size == 512 and not model.training
    pixels = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(pixels), network(pixels))
    assert model.features(torch.rand(1, 3, 40, 40)).shape == (1, 1280)


def test_own_files_describe_themselves(tmp_path):
    torch.manual_seed(0)
    model = ArtifactClassifier(LABELS[:4], 48, "tinynet_e", thresholds={"ink": 0.125}).eval()
    path = tmp_path / "deep" / "H4.safetensors"
    save_classifier(model, path)
    again = load_classifier(path)
    assert (again.labels, again.image_size, again.arch) == (LABELS[:4], 48, "tinynet_e")
    thresholds = {"hair": 0.5, "gel_bubble": 0.5, "ruler": 0.5, "ink": 0.125}
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["artifact_classifier"])["thresholds"] == thresholds == again.thresholds
    images = torch.rand(8, 3, 64, 64)
    logits = model.logits(images)
    assert torch.equal(again.logits(images), logits)
    assert torch.allclose(model.model.get_classifier()(model.features(images)), logits, atol=1e-5)
    assert torch.equal(again.predict(images), (torch.sigmoid(logits) > 0.5).long())  # whatever the thresholds


@pytest.mark.parametrize("thresholds", [{"MEL": 0.5}, {"ink": 1.5}])
def test_wrong_thresholds(thresholds):
    with pytest.raises(UserError, match="thresholds"):
        ArtifactClassifier(LABELS[:4], 32, "tinynet_e", thresholds=thresholds)


def test_preprocessing_resizes_normalises_and_leaves_its_input_alone():
    model = ArtifactClassifier(LABELS, 32, "tinynet_e")
    for size in (32, 64):
        images = torch.rand(2, 3, size, size)
        before = images.clone()
        pixels = model.preprocess(images)
        assert torch.equal(images, before) and pixels.shape[-1] == 32
        resized = tvf.resize(images, [32, 32], antialias=True)
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        assert torch.allclose(pixels, (resized - mean[:, None, None]) / std[:, None, None], atol=1e-6)


class Payload:
    def __reduce__(self):
        return os.mkdir, ("pickle-was-executed",)


def test_files_that_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Payload(), protocol=2))
    torch.save({"model_state_dict": {"fc.weight": torch.zeros(1)}}, tmp_path / "other.pth")
    published_file(tmp_path / "torn.pth", 4)
    state = torch.load("torn.pth", weights_only=False)
    state["model_state_dict"].pop("model.features.0.0.weight")
    torch.save(state, "torn.pth")
    (tmp_path / "text.safetensors").write_text("nothing")
    for name in ("absent.pth", "evil.pth", "other.pth", "torn.pth", "text.safetensors"):
        with pytest.raises(UserError, match=name) as caught:
            load_classifier(name)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "pickle-was-executed").exists()
    with pytest.raises(UserError, match="efficientnet_zero"):
        ArtifactClassifier(arch="efficientnet_zero")
