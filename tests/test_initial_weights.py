"""What a classifier starts from: backbones of timm's, torchvision's and our own files, and files that do not fit."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from test_classifier import published_file
from torchvision.models import efficientnet_b0

from ddpo_pytorch.data.isic import LABELS
from ddpo_pytorch.judges.backbones import TORCHVISION_FILE, new_classifier
from ddpo_pytorch.judges.classifier import PUBLISHED_ARCH, ArtifactClassifier, save_classifier
from ddpo_pytorch.utils.errors import UserError

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def fresh(path, arch="tinynet_e", heads=4):
    torch.manual_seed(3)
    return new_classifier(LABELS[:heads], 32, arch, str(path)).eval()


def assert_new_head(model):
    weight = [value for name, value in model.named_parameters() if "classifier" in name and value.ndim == 2][0]
    torch.manual_seed(3)
    untrained = ArtifactClassifier(model.labels, 32, model.arch).state_dict()
    assert any(torch.equal(value, weight) for value in untrained.values())


@pytest.mark.parametrize("suffix", ["safetensors", "pth", "bin"])
def test_timm_files(tmp_path, suffix, caplog):
    caplog.set_level("INFO")
    torch.manual_seed(0)
    network = timm.create_model("tinynet_e", num_classes=1000).eval()
    path = tmp_path / f"model.{suffix}"
    if suffix == "safetensors":
        save_file(network.state_dict(), path)
    else:
        torch.save(network.state_dict() if suffix == "bin" else {"state_dict": network.state_dict()}, path)
    model = fresh(path)
    pixels = model.preprocess(IMAGES)
    with torch.no_grad():
        expected = network.forward_head(network.forward_features(pixels), pre_logits=True)
    assert torch.allclose(model.features(IMAGES), expected, atol=1e-6) and model.logits(IMAGES).shape == (2, 4)
    assert_new_head(model)
    assert f"backbone from {path}" in caplog.text and "timm's names" in caplog.text


@pytest.mark.parametrize("arch", ["efficientnet_b0", PUBLISHED_ARCH])
@pytest.mark.parametrize("source", ["torchvision", "timm", "published"])
def test_files_of_the_papers_backbone(tmp_path, source, arch, caplog):
    caplog.set_level("INFO")
    path = tmp_path / "b0.pth"
    if source == "published":
        network = published_file(path, 6)
    else:
        torch.manual_seed(0)
        network = efficientnet_b0(weights=None) if source == "torchvision" else timm.create_model("efficientnet_b0")
        old = {name: value for name, value in network.state_dict().items() if "num_batches" not in name}
        torch.save(old, path)
    model, network = fresh(path, arch), network.eval()
    pixels = model.preprocess(IMAGES)
    with torch.no_grad():
        if source == "timm":
            expected = network.forward_head(network.forward_features(pixels), pre_logits=True)
        else:
            expected = network.avgpool(network.features(pixels)).flatten(1)
    assert torch.allclose(model.features(IMAGES), expected, atol=1e-6) and expected.std() > 0
    assert_new_head(model)
    assert f"{'timm' if source == 'timm' else 'torchvision'}'s names" in caplog.text


def test_own_files_with_another_head(tmp_path):
    torch.manual_seed(0)
    own = ArtifactClassifier(LABELS, 48, "tinynet_e").eval()
    save_classifier(own, tmp_path / "H6.safetensors")
    model = fresh(tmp_path / "H6.safetensors")
    assert model.labels == LABELS[:4] and model.image_size == 32
    own.image_size = 32
    assert torch.equal(model.features(IMAGES), own.features(IMAGES))
    assert_new_head(model)
    assert all(value.requires_grad for value in model.parameters())


def test_files_that_do_not_fit(tmp_path, monkeypatch):
    network = timm.create_model("tinynet_e")
    state = network.state_dict()
    torch.save(state, tmp_path / "tiny.pth")
    torch.save({"state_dict": {"a": 1}}, tmp_path / "numbers.pth")
    (tmp_path / "torn.pth").write_bytes((tmp_path / "tiny.pth").read_bytes()[:1000])
    (tmp_path / "text.safetensors").write_text("nothing")
    few = {name: value for name, value in state.items() if name not in ("conv_stem.weight", "bn1.bias")}
    torch.save(few | {"extra": torch.zeros(1), "bn1.weight": torch.zeros(7)}, tmp_path / "few.pth")
    for name, arch, message in (
        (
            "tiny.pth",
            "efficientnet_b0",
            r"does not fit 'efficientnet_b0': of its weights \d+ are missing, 0 unexpected",
        ),
        ("few.pth", "tinynet_e", "of its weights 2 are missing, 1 unexpected and 1 of another shape, the first"),
        ("numbers.pth", "tinynet_e", "other things than tensors"),
        ("torn.pth", "tinynet_e", "holds more than plain tensors"),
        ("text.safetensors", "tinynet_e", "not a readable safetensors"),
        ("absent.pth", "tinynet_e", "allowed are imagenet, none and the path of a file"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            fresh(tmp_path / name, arch)
        assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arch", "named"),
    [("efficientnet_b0", ("timm/efficientnet_b0.ra_in1k", TORCHVISION_FILE)), ("tinynet_e", ("timm/tinynet_e.in1k",)),
     (PUBLISHED_ARCH, (TORCHVISION_FILE,))],
)  # fmt: skip
def test_imagenet_weights_that_cannot_be_had(arch, named, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(timm, "create_model", offline)
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(UserError, match="ImageNet weights") as caught:
        new_classifier(LABELS, 32, arch, "imagenet")
    assert all(name in str(caught.value) for name in (*named, "--weights=none", "--weights=PATH"))
