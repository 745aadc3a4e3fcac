"""Initial weights from timm's, torchvision's and our own files; the two sets of EfficientNet-B0's names; publishing."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from test_classifier import published_file
from torch import nn
from torchvision.models import efficientnet_b0

from ddpo_pytorch.data.isic import LABELS
from ddpo_pytorch.judges.backbones import (
    TIMM_MODULES,
    TORCHVISION_FILE,
    TORCHVISION_MODULES,
    new_classifier,
    rename_modules,
    save_published,
)
from ddpo_pytorch.judges.classifier import PUBLISHED_ARCH, ArtifactClassifier, load_classifier, save_classifier
from ddpo_pytorch.utils.errors import UserError

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def fresh(path, arch="tinynet_e"):
    torch.manual_seed(3)
    return new_classifier(LABELS[:4], 32, arch, str(path)).eval()


def pooled(network, pixels):
    """Return the features before the head, by timm's or torchvision's own functions."""
    with torch.no_grad():
        if hasattr(network, "forward_head"):
            return network.forward_head(network.forward_features(pixels), pre_logits=True)
        return network.avgpool(network.features(pixels)).flatten(1)


def assert_backbone(model, network):
    """The features are those of `network`, the head is an untrained one."""
    expected = pooled(network.eval(), model.preprocess(IMAGES))
    assert torch.allclose(model.features(IMAGES), expected, atol=1e-6) and expected.std() > 0
    weight = [value for name, value in model.named_parameters() if "classifier" in name and value.ndim == 2][0]
    torch.manual_seed(3)
    untrained = ArtifactClassifier(model.labels, 32, model.arch).state_dict()
    assert any(torch.equal(value, weight) for value in untrained.values())
    assert all(value.requires_grad for value in model.parameters())


@pytest.mark.parametrize("suffix", ["safetensors", "pth", "bin"])
def test_timm_files(tmp_path, suffix):
    torch.manual_seed(0)
    network = timm.create_model("tinynet_e", num_classes=1000)
    path = tmp_path / f"model.{suffix}"
    if suffix == "safetensors":
        save_file(network.state_dict(), path)
    else:
        torch.save(network.state_dict() if suffix == "bin" else {"state_dict": network.state_dict()}, path)
    assert_backbone(fresh(path), network)


@pytest.mark.parametrize("arch", ["efficientnet_b0", PUBLISHED_ARCH])
@pytest.mark.parametrize("source", ["torchvision", "timm", "published"])
def test_files_of_the_papers_backbone(tmp_path, source, arch):
    path = tmp_path / "b0.pth"
    if source == "published":
        network = published_file(path, 6)
    else:
        torch.manual_seed(0)
        network = efficientnet_b0(weights=None) if source == "torchvision" else timm.create_model("efficientnet_b0")
        old = {name: value for name, value in network.state_dict().items() if "num_batches" not in name}
        torch.save(old, path)
    assert_backbone(fresh(path, arch), network)


def test_own_files_with_another_head(tmp_path):
    torch.manual_seed(0)
    own = ArtifactClassifier(LABELS, 48, "tinynet_e")
    save_classifier(own, tmp_path / "H6.safetensors")
    assert_backbone(fresh(tmp_path / "H6.safetensors"), own.model)


def test_files_that_do_not_fit(tmp_path):
    state = timm.create_model("tinynet_e").state_dict()
    torch.save(state, tmp_path / "tiny.pth")
    few = {name: value for name, value in state.items() if name not in ("conv_stem.weight", "bn1.bias")}
    torch.save(few | {"extra": torch.zeros(1), "bn1.weight": torch.zeros(7)}, tmp_path / "few.pth")
    for name, arch, message in (
        ("tiny.pth", "efficientnet_b0", r"'efficientnet_b0': \d+ weights are missing, 0 unexpected"),
        ("few.pth", "tinynet_e", "'tinynet_e': 2 weights are missing, 1 unexpected and 1 of another shape"),
        ("absent.pth", "tinynet_e", "weights .*absent.pth"),
    ):
        with pytest.raises(UserError, match=message):
            fresh(tmp_path / name, arch)


@pytest.mark.parametrize(
    ("arch", "sources"),
    [("efficientnet_b0", ("timm/efficientnet_b0.ra_in1k", TORCHVISION_FILE)), ("tinynet_e", ("timm/tinynet_e.in1k",)),
     (PUBLISHED_ARCH, (TORCHVISION_FILE,))],
)  # fmt: skip
def test_imagenet_weights_that_cannot_be_loaded(arch, sources, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(timm, "create_model", offline)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(UserError) as caught:
        new_classifier(LABELS, 32, arch, "imagenet")
    assert all(name in str(caught.value) for name in (arch, *sources, "--weights=none", "--weights=PATH"))


def randomised(model):
    """Draw everything that initialisation leaves at 0 or 1."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in ((module.weight, 0.8, 1.2), (module.bias, -0.2, 0.2)):
                nn.init.uniform_(tensor, low, high)
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.8, 1.2)
            module.num_batches_tracked.fill_(7)
    return model.eval()


def test_both_sets_of_names_are_one_network():
    torch.manual_seed(0)
    ours, theirs = timm.create_model("efficientnet_b0", num_classes=6), efficientnet_b0(weights=None, num_classes=6)
    pixels = torch.randn(2, 3, 96, 96)
    for source, target, modules in ((ours, theirs, TORCHVISION_MODULES), (theirs, ours, TIMM_MODULES)):
        renamed = rename_modules(randomised(source).state_dict(), modules)
        assert renamed.keys() == target.state_dict().keys() and len(renamed) == 360
        target.load_state_dict(renamed)
        with torch.no_grad():
            logits = source(pixels)
            assert logits.std() > 0.01 and torch.allclose(target.eval()(pixels), logits, atol=1e-5)
    for name, other in TORCHVISION_MODULES.items():
        a, b = ours.get_submodule(name), theirs.get_submodule(other)
        if isinstance(a, nn.BatchNorm2d):
            assert (a.eps, a.momentum) == (b.eps, b.momentum) == (1e-5, 0.1)
        elif isinstance(a, nn.Conv2d):
            assert type(a) is type(b) is nn.Conv2d
            for field in ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"):
                assert getattr(a, field) == getattr(b, field), (name, field)
    for network in (ours, theirs):
        activations = {type(m) for m in network.modules() if type(m).__module__ == "torch.nn.modules.activation"}
        assert activations == {nn.SiLU, nn.Sigmoid}


@pytest.mark.parametrize(("arch", "heads"), [("efficientnet_b0", 4), ("efficientnet_b0", 6), (PUBLISHED_ARCH, 6)])
def test_published_form_is_written_and_loads_back(tmp_path, arch, heads):
    model = randomised(ArtifactClassifier(LABELS[:heads], 512, arch))
    before = torch.random.get_rng_state()
    path = tmp_path / "deep" / f"artifact_classifier_train_H{heads}.pth"
    save_published(model, path, 3, 0.25, torch.tensor(0.875))
    assert torch.equal(torch.random.get_rng_state(), before)  # it is written during training
    payload = torch.load(path, weights_only=True)
    assert list(payload) == ["epoch", "model_state_dict", "optimizer_state_dict", "val_loss", "val_accuracy"]
    assert (payload["epoch"], payload["val_loss"], payload["val_accuracy"]) == (3, 0.25, 0.875)

    # the official reader: torchvision's network as .model with Sequential(Dropout, Linear), and its AdamW
    reader = nn.Module()
    reader.model = efficientnet_b0(weights=None)
    reader.model.classifier = nn.Sequential(nn.Dropout(0.3), nn.Linear(1280, heads))
    assert list(payload["model_state_dict"]) == list(reader.state_dict())
    reader.load_state_dict(payload["model_state_dict"])
    torch.optim.AdamW(reader.parameters()).load_state_dict(payload["optimizer_state_dict"])

    loaded, pixels = load_classifier(path), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(pixels)
        assert torch.allclose(loaded(pixels), expected, atol=1e-5)
        assert torch.allclose(reader.eval().model(pixels), expected, atol=1e-5)


@pytest.mark.parametrize(("labels", "arch"), [(LABELS[:4], "tinynet_e"), (LABELS[:3], "efficientnet_b0")])
def test_models_that_the_published_form_cannot_hold(tmp_path, labels, arch):
    with pytest.raises(UserError, match="published file"):
        save_published(ArtifactClassifier(labels, 32, arch), tmp_path / "H.pth", 0, 0.0, 0.0)
    assert not any(tmp_path.iterdir())
