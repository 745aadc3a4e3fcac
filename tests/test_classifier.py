"""The classifier: its files (ours and the published form), its preprocessing, and what it refuses to open."""

import json
import os
import pickle

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as tvf
from safetensors import safe_open
from safetensors.torch import save_file
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
    torch.save(
        {
            "epoch": 3,
            "model_state_dict": state,
            "optimizer_state_dict": {},
            "val_loss": 0.1,
            "val_accuracy": np.float64(0.9),
        },
        path,
    )
    return network.eval()


@pytest.mark.parametrize("heads", [4, 6])
def test_published_form_loads_and_computes_the_same(tmp_path, heads):
    network = published_file(tmp_path / "H.pth", heads)
    model = load_classifier(tmp_path / "H.pth")
    assert model.labels == LABELS[:heads] and model.image_size == 512 and not model.training
    pixels = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(pixels), network(pixels))
    assert model.features(torch.rand(1, 3, 40, 40)).shape == (1, 1280)


def test_own_files_describe_themselves(tmp_path):
    torch.manual_seed(0)
    model = ArtifactClassifier(LABELS[:4], 48, "tinynet_e").eval()
    save_classifier(model, tmp_path / "deep" / "H4.safetensors")
    again = load_classifier(tmp_path / "deep" / "H4.safetensors")
    assert (again.labels, again.image_size, again.arch) == (LABELS[:4], 48, "tinynet_e")
    images = torch.rand(3, 3, 64, 64)
    assert torch.equal(again.logits(images), model.logits(images))
    head = model.model.get_classifier()
    assert torch.allclose(head(model.features(images)), model.logits(images), atol=1e-5)
    assert torch.equal(model.predict(images), (torch.sigmoid(model.logits(images)) > 0.5).long())
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["H4.safetensors"]


def test_thresholds_are_kept_and_leave_predictions_alone(tmp_path):
    torch.manual_seed(0)
    model = ArtifactClassifier(LABELS[:4], 32, "tinynet_e", thresholds={"ink": 0.125}).eval()
    save_classifier(model, tmp_path / "H4.safetensors")
    with safe_open(tmp_path / "H4.safetensors", framework="pt") as file:
        metadata = file.metadata()
    thresholds = {"hair": 0.5, "gel_bubble": 0.5, "ruler": 0.5, "ink": 0.125}
    assert json.loads(metadata["artifact_classifier"])["thresholds"] == thresholds
    again = load_classifier(tmp_path / "H4.safetensors")
    assert again.thresholds == thresholds
    images = torch.rand(8, 3, 32, 32)
    assert torch.equal(again.predict(images), (again.logits(images) > 0).long())

    about = {"labels": LABELS[:4], "image_size": 32, "arch": "tinynet_e"}  # as before thresholds were kept
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(weights, tmp_path / "old.safetensors", {"artifact_classifier": json.dumps(about)})
    assert set(load_classifier(tmp_path / "old.safetensors").thresholds.values()) == {0.5}
    for wrong in ({"MEL": 0.5}, {"ink": 1.5}):
        with pytest.raises(UserError, match="thresholds .* are not numbers in"):
            ArtifactClassifier(LABELS[:4], 32, "tinynet_e", thresholds=wrong)


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
    expected = {
        "absent.pth": "does not exist",
        "evil.pth": "holds more than plain tensors",
        "other.pth": "not a published classifier",
        "torn.pth": "does not fit",
        "text.safetensors": "not a readable safetensors",
    }
    for name, message in expected.items():
        with pytest.raises(UserError, match=message) as caught:
            load_classifier(name)
        assert name in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "pickle-was-executed").exists()
    with pytest.raises(UserError, match="unknown to timm"):
        ArtifactClassifier(arch="efficientnet_zero")


def test_the_other_published_spelling_is_found(tmp_path):
    published_file(tmp_path / "artifact_classifier_test_H4.pth", 4)
    assert len(load_classifier(tmp_path / "artifact_classifier_train_H4.pth").labels) == 4
