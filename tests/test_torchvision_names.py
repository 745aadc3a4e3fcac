"""timm's and torchvision's EfficientNet-B0 are one network under two sets of names; the published form is written."""

import pytest
import timm
import torch
from torch import nn
from torchvision.models import efficientnet_b0

from ddpo_pytorch.data.isic import LABELS
from ddpo_pytorch.judges.classifier import PUBLISHED_ARCH, ArtifactClassifier, load_classifier
from ddpo_pytorch.judges.torchvision_names import TORCHVISION_MODULES, save_published, to_timm, to_torchvision
from ddpo_pytorch.utils.errors import UserError


def scrambled(model):
    """Random numbers for everything that initialisation leaves at 0 or 1."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in ((module.weight, 0.8, 1.2), (module.bias, -0.2, 0.2)):
                nn.init.uniform_(tensor, low, high)
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.8, 1.2)
            module.num_batches_tracked.fill_(7)
    return model.eval()


@pytest.fixture(scope="module")
def networks():
    torch.manual_seed(0)
    return timm.create_model("efficientnet_b0", num_classes=6), efficientnet_b0(weights=None, num_classes=6)


def test_names_are_a_bijection_and_logits_agree_both_ways(networks):
    ours, theirs = networks
    assert len(set(TORCHVISION_MODULES.values())) == len(TORCHVISION_MODULES)
    pixels = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        for source, target, there, back in (
            (ours, theirs, to_torchvision, to_timm),
            (theirs, ours, to_timm, to_torchvision),
        ):
            state = scrambled(source).state_dict()
            renamed = there(state)
            assert renamed.keys() == target.state_dict().keys() and len(renamed) == 360
            assert back(renamed).keys() == state.keys()
            assert all(back(renamed)[key] is state[key] for key in state)
            target.load_state_dict(renamed)
            logits = source(pixels)
            assert logits.std() > 0.01
            assert torch.allclose(target.eval()(pixels), logits, atol=1e-5)


def test_layers_agree_in_all_that_is_not_a_tensor(networks):
    ours, theirs = networks
    for name, other in TORCHVISION_MODULES.items():
        a, b = ours.get_submodule(name), theirs.get_submodule(other)
        if isinstance(a, nn.BatchNorm2d):
            assert (a.eps, a.momentum) == (b.eps, b.momentum) == (1e-5, 0.1)
        elif isinstance(a, nn.Conv2d):
            assert type(a) is type(b) is nn.Conv2d
            for field in ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"):
                assert getattr(a, field) == getattr(b, field), (name, field)
    for network in networks:
        found = {type(m) for m in network.modules() if type(m).__module__ == "torch.nn.modules.activation"}
        assert found == {nn.SiLU, nn.Sigmoid}


@pytest.mark.parametrize("arch", ["efficientnet_b0", PUBLISHED_ARCH])
@pytest.mark.parametrize("heads", [4, 6])
def test_published_form_is_written_and_loads_back(tmp_path, arch, heads):
    model = scrambled(ArtifactClassifier(LABELS[:heads], 512, arch))
    before = torch.random.get_rng_state()
    path = tmp_path / "deep" / f"artifact_classifier_train_H{heads}.pth"
    save_published(model, path, 3, 0.25, torch.tensor(0.875))
    assert torch.equal(torch.random.get_rng_state(), before)  # training goes on as if nothing had been written
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    payload = torch.load(path, weights_only=True)
    assert list(payload) == ["epoch", "model_state_dict", "optimizer_state_dict", "val_loss", "val_accuracy"]
    assert (payload["epoch"], payload["val_loss"], payload["val_accuracy"]) == (3, 0.25, 0.875)

    # what reads it elsewhere: torchvision's network as .model with Sequential(Dropout, Linear), and its AdamW.
    reader = nn.Module()
    reader.model = efficientnet_b0(weights=None)
    reader.model.classifier = nn.Sequential(nn.Dropout(0.3), nn.Linear(1280, heads))
    assert list(payload["model_state_dict"]) == list(reader.state_dict())
    reader.load_state_dict(payload["model_state_dict"])
    torch.optim.AdamW(reader.parameters()).load_state_dict(payload["optimizer_state_dict"])

    loaded = load_classifier(path)
    assert loaded.labels == LABELS[:heads] and set(loaded.thresholds.values()) == {0.5}
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(pixels)
        assert torch.allclose(loaded(pixels), expected, atol=1e-5)
        assert torch.allclose(reader.eval().model(pixels), expected, atol=1e-5)


def test_what_cannot_be_renamed_or_published(tmp_path):
    state = timm.create_model("efficientnet_b0", num_classes=4).state_dict()
    with pytest.raises(UserError, match="torchvision's EfficientNet-B0: .* unknown"):
        to_timm(state)
    with pytest.raises(UserError, match="1 modules, 'conv_stem' missing"):
        to_torchvision({key: value for key, value in state.items() if key != "conv_stem.weight"})
    with pytest.raises(UserError, match="1 modules, 'extra' unknown"):
        to_torchvision(state | {"extra.weight": torch.zeros(1)})
    for model, message in (
        (ArtifactClassifier(LABELS[:4], 32, "tinynet_e"), "holds EfficientNet-B0 and no 'tinynet_e'"),
        (ArtifactClassifier(LABELS[:3], 512), "has heads for"),
    ):
        with pytest.raises(UserError, match=message):
            save_published(model, tmp_path / "H.pth", 0, 0.0, 0.0)
    assert not any(tmp_path.iterdir())
