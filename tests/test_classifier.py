"""The classifier: its files (ours and the published form), preprocessing, initial weights, and refusals."""

import json
from unittest.mock import Mock

import pytest
import timm
import torch
import torchvision.transforms.functional as tvf
from judge_tools import published_file
from refusals import refused
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torchvision.models import efficientnet_b0

from ddpo_pytorch.data.isic import LABELS
from ddpo_pytorch.judges import classifier
from ddpo_pytorch.judges.classifier import ArtifactClassifier, load_classifier, new_classifier, save_classifier

PUBLISHED_ARCH, TORCHVISION_FILE = "torchvision/efficientnet_b0", "efficientnet_b0_rwightman-7f5810bc.pth"
IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


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
    logits = model.logits(IMAGES)
    assert torch.equal(again.logits(IMAGES), logits)
    assert torch.allclose(model.model.get_classifier()(model.features(IMAGES)), logits, atol=1e-5)
    assert torch.equal(again.predict(IMAGES), (torch.sigmoid(logits) > 0.5).long())  # whatever the thresholds


def test_preprocessing_resizes_normalises_and_leaves_its_input_alone():
    images = torch.rand(2, 3, 64, 64)
    before, pixels = images.clone(), ArtifactClassifier(LABELS, 32, "tinynet_e").preprocess(images)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (tvf.resize(images, [32, 32], antialias=True) - mean[:, None, None]) / std[:, None, None]
    assert torch.equal(images, before) and torch.allclose(pixels, expected, atol=1e-6)


def test_files_and_settings_that_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model_state_dict": {"fc.weight": torch.zeros(1)}}, "other.pth")
    published_file("torn.pth", 4)
    state = torch.load("torn.pth", weights_only=False)
    state["model_state_dict"].pop("model.features.0.0.weight")
    torch.save(state, "torn.pth")
    (tmp_path / "text.safetensors").write_text("nothing")
    for name in ("absent.pth", "other.pth", "torn.pth", "text.safetensors"):
        refused(name, load_classifier, name)
    for field, value in ("arch", "efficientnet_zero"), ("thresholds", {"other": 0.5}), ("thresholds", {"ink": 1.5}):
        refused(field[:4], ArtifactClassifier, **{field: value})


def fresh(path, arch="tinynet_e"):
    torch.manual_seed(3)
    return new_classifier(LABELS[:4], 32, arch, str(path)).eval()


BACKBONES = [(source, "tinynet_e") for source in ("timm", "safetensors", "own")] + [("timm", PUBLISHED_ARCH)]
BACKBONES += [(source, "efficientnet_b0") for source in ("torchvision", "published")] + [("published", PUBLISHED_ARCH)]


@pytest.mark.parametrize(("source", "arch"), BACKBONES)
def test_backbones_from_files(tmp_path, source, arch):
    """The features are those of the file's network, by timm's or torchvision's own functions; the head is a new one."""
    torch.manual_seed(0)
    path = tmp_path / ("b.safetensors" if source in ("safetensors", "own") else "b.pth")
    if source == "published":
        network = published_file(path, 6)
    elif source == "own":  # with another head
        own = ArtifactClassifier(LABELS, 48, arch)
        save_classifier(own, path)
        network = own.model
    else:
        network = efficientnet_b0() if source == "torchvision" else timm.create_model(arch.rpartition("/")[2])
        old = {name: value for name, value in network.state_dict().items() if "num_batches" not in name}
        save_file(old, path) if source == "safetensors" else torch.save({"state_dict": old}, path)
    model, network = fresh(path, arch), network.eval()
    pixels = model.preprocess(IMAGES)
    with torch.no_grad():
        if hasattr(network, "forward_head"):
            expected = network.forward_head(network.forward_features(pixels), pre_logits=True)
        else:
            expected = network.avgpool(network.features(pixels)).flatten(1)
    assert torch.allclose(model.features(IMAGES), expected, atol=1e-6) and expected.std() > 0
    weight = [value for name, value in model.named_parameters() if "classifier" in name and value.ndim == 2][0]
    torch.manual_seed(3)
    untrained = ArtifactClassifier(model.labels, 32, arch).state_dict()
    assert any(torch.equal(value, weight) for value in untrained.values())
    assert all(value.requires_grad for value in model.parameters())


def test_backbones_that_cannot_be_loaded(tmp_path, monkeypatch):
    state = timm.create_model("tinynet_e").state_dict()
    torch.save(state, tmp_path / "tiny.pth")
    torch.save(state | {"bn1.weight": torch.zeros(7)}, tmp_path / "few.pth")
    other = ("tiny.pth", "efficientnet_b0", r"tiny.pth holds .*--arch.*efficientnet_b0")
    few = ("few.pth", "tinynet_e", r"few.pth.*bn1.weight.*\(7,\).*\(32,\).*--arch.*tinynet_e")
    for name, arch, message in other, few, ("absent.pth", "tinynet_e", "weights .*absent.pth"):
        refused(message, fresh, tmp_path / name, arch)
    for name in ("timm.create_model", "torchvision.models._api.load_state_dict_from_url"):
        monkeypatch.setattr(name, Mock(side_effect=OSError("no network")))
    for arch, source in (("tinynet_e", "timm/tinynet_e.in1k"), (PUBLISHED_ARCH, TORCHVISION_FILE)):
        refused(f"{arch}.*--weights=none.*--weights=PATH of .*{source}", fresh, "imagenet", arch)


def test_the_published_form_is_the_same_network_by_other_names(tmp_path):
    model = ArtifactClassifier(LABELS[:4], 512, "efficientnet_b0").eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # what initialisation leaves at 0 or 1
            for low, *tensors in (0.8, module.weight, module.running_var), (-0.2, module.bias, module.running_mean):
                for tensor in tensors:
                    nn.init.uniform_(tensor, low, low + 0.4)
            module.num_batches_tracked.fill_(7)
    before, path = torch.random.get_rng_state(), tmp_path / "deep" / "artifact_classifier_train_H4.pth"
    classifier.save_published(model, path, 3, 0.25, 0.875)
    assert torch.equal(torch.random.get_rng_state(), before)  # it is written during training
    payload = torch.load(path, weights_only=True)
    assert list(payload) == ["epoch", "model_state_dict", "optimizer_state_dict", "val_loss", "val_accuracy"]
    assert (payload["epoch"], payload["val_loss"], payload["val_accuracy"]) == (3, 0.25, 0.875)

    # the official reader: torchvision's network as .model with Sequential(Dropout, Linear), and its AdamW
    reader = nn.Module()
    reader.model = efficientnet_b0(weights=None)
    reader.model.classifier = nn.Sequential(nn.Dropout(0.3), nn.Linear(1280, 4))
    assert list(payload["model_state_dict"]) == list(reader.state_dict())
    reader.load_state_dict(payload["model_state_dict"])
    torch.optim.AdamW(reader.parameters()).load_state_dict(payload["optimizer_state_dict"])
    with torch.no_grad():
        expected = model(IMAGES)
        assert expected.std() > 0.01 and torch.allclose(load_classifier(path)(IMAGES), expected, atol=1e-5)
        assert torch.allclose(reader.eval().model(IMAGES), expected, atol=1e-5)
    assert load_classifier(path).features(IMAGES).shape == (2, 1280)
