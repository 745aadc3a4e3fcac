"""The metrics' networks against the packages they come from, files that fail, and the cache of what they compute."""

import itertools
from functools import partial

import lpips
import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from PIL import Image
from refusals import refused
from safetensors.torch import save_file

from ddpo_pytorch.metrics import networks
from ddpo_pytorch.metrics.feature_store import CPU_BATCH, FeatureStore, Network, Rows
from ddpo_pytorch.metrics.image_sets import ImageSet
from ddpo_pytorch.utils.errors import UserError

DINOV2 = networks.ENCODERS["dinov2_vits14"]


@pytest.mark.slow
def test_inception_sees_white_as_white_unless_compatible(random_inception):
    path, network = random_inception
    white, black = torch.ones(1, 3, 64, 64), torch.zeros(1, 3, 64, 64)
    exact, compat = (networks.inception_network(str(path), mode) for mode in ("exact", "compat"))
    assert exact.run(white).shape == (1, 2048)
    torch.testing.assert_close(exact.run(white), network(torch.full((1, 3, 64, 64), 255, dtype=torch.uint8))[0])
    assert (exact.run(white) - exact.run(black)).norm() > 1e-3 * exact.run(black).norm()
    # the official x * 256 wraps 1.0 to 0
    assert torch.equal(compat.run(white), compat.run(black))
    assert exact.key != compat.key and exact.sha256 == compat.sha256
    assert networks.official_uint8(torch.arange(256).float() / 255).tolist() == [*range(255), 0]


def test_lpips_equals_the_lpips_package(alexnet):
    ours, weights = networks.lpips_network(str(alexnet)), torch.load(alexnet)
    reference = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).eval()
    for name, layer in itertools.chain(*(slice_.named_children() for slice_ in reference.net.children())):
        prefix = f"features.{name}."
        layer.load_state_dict({key.removeprefix(prefix): w for key, w in weights.items() if key.startswith(prefix)})
    x, y = torch.rand(2, 3, 3, 64, 64, generator=torch.Generator().manual_seed(8))
    expected = reference(x, y, normalize=True).flatten(1).detach()
    torch.testing.assert_close(ours.run(x, y), expected, rtol=1e-6, atol=0)
    assert expected.min() > 0 and ours.run(x, x).abs().max() == 0


@pytest.mark.slow
def test_dinov2_takes_timms_file_with_its_own_position_embeddings(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model(DINOV2, pretrained=False, num_classes=0).eval()  # 518 px, as published
    save_file(model.state_dict(), tmp_path / f"{DINOV2}.safetensors")
    network = networks.encoder_network("dinov2_vits14", str(tmp_path))
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    features = network.run(images)
    assert features.shape == (2, 384) and not torch.equal(features[0], features[1])
    # the same weights in timm's own model of that size
    small = timm.create_model(DINOV2, pretrained=False, num_classes=0, img_size=224).eval()
    small.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(model.state_dict(), small))
    pixels = torch.nn.functional.interpolate(images, (224, 224), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        torch.testing.assert_close(features, small((pixels - mean) / std), rtol=1e-4, atol=1e-5)


def test_any_encoder_of_timm_takes_timms_file(tmp_path):
    """A head is dropped, CLIP's projection kept; numbers in half precision, as they are often stored, are read."""
    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet", pretrained=False).eval()
    save_file({k: v.half() for k, v in model.state_dict().items()}, tmp_path / "test_efficientnet.safetensors")
    images = torch.rand(2, 3, 160, 160, generator=torch.Generator().manual_seed(1))
    network = networks.encoder_network("test_efficientnet", str(tmp_path))
    expected = model.forward_head(model.forward_features((images - 0.5) / 0.5), True)
    torch.testing.assert_close(network.run(images), expected, rtol=1e-5, atol=1e-2, check_dtype=False)
    assert "test_efficientnet; 160 px" in network.what


@pytest.mark.parametrize(
    ("flag", "load", "url"),
    [
        ("inception", networks.inception_network, networks.URL_INCEPTION_V3),
        ("alexnet", networks.lpips_network, networks.URL_ALEXNET),
        ("encoders", partial(networks.encoder_network, "dinov2_vits14"), networks.URL_ENCODER.format(DINOV2)),
    ],
)
def test_weight_files_that_cannot_be_had(flag, load, url, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    for option, error, message in (
        ("", networks.Unavailable, f"metric.{flag}"),
        ("auto", networks.Unavailable, f"{url}.*metric.{flag}=FILE"),
        ("download", networks.Unavailable, f"{url}.*metric.{flag}=FILE"),
        ("nope.pth", UserError, f"metric.{flag}='nope.pth'"),
    ):
        with pytest.raises(error, match=message):
            load(option)
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "wrong.pth")
    refused("wrong.pth", load, str(tmp_path / "wrong.pth"))
    if flag == "alexnet":  # a cached file is found
        (cached := tmp_path / "checkpoints" / url.rsplit("/", 1)[1]).parent.mkdir()
        cached.write_bytes(b"x")
        refused(f"{cached}.* is a text file", load, "auto")


def red_images(folder, count):
    """Write images of which the red of the n-th is n."""
    paths = tuple(folder / f"{number}.png" for number in range(count))
    for number, path in enumerate(paths):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(path)
    names = tuple(map(str, range(count)))
    return ImageSet(folder, paths, names, names)


def test_each_device_and_precision_has_results_of_its_own(tmp_path, monkeypatch):
    """The meta device stands in for a GPU: any device but the CPU is told apart in the same way."""
    images, computed = red_images(tmp_path, 3), []

    def run(batch):
        computed.append(batch.device.type)
        return torch.full((len(batch), 1), float(len(computed)))

    def first_row(device, tf32):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
        monkeypatch.setattr(Accelerator, "device", torch.device(device))
        store = FeatureStore(tmp_path / "cache", Accelerator(cpu=True), 4, progress=False)
        return store.features("images", images, [Network("n", "n", "", "key", run)])["n"][:1].item()

    settings = [("cpu", False), ("meta", False), ("meta", True)]
    assert [first_row(*one) for one in settings] == [1, 2, 3] == [first_row(*one) for one in settings]
    assert computed == ["cpu", "meta", "meta"] and first_row("cpu", True) == pytest.approx(1)  # TF32 is a GPU's


@pytest.mark.parametrize("with_captions", [False, True])
def test_a_cpu_takes_a_stored_part_in_small_batches(with_captions, tmp_path):
    images, seen = red_images(tmp_path, CPU_BATCH + 8), []

    def run(batch, captions=()):
        seen.append((len(batch), tuple(captions)))
        return batch[:, 0].amax((1, 2))[:, None] * 255

    store = FeatureStore(tmp_path / "cache", Accelerator(cpu=True), 256, progress=False)
    rows = store.features("images", images, [Network("n", "n", "", "key", run, reads_captions=with_captions)])["n"]
    assert [round(row) for row in rows[:][:, 0]] == list(range(CPU_BATCH + 8))
    names = tuple(map(str, range(CPU_BATCH + 8)))
    parts = (names[:CPU_BATCH], names[CPU_BATCH:]) if with_captions else ((), ())
    assert seen == [(CPU_BATCH, parts[0]), (8, parts[1])]


def test_a_chunk_of_another_width_is_named(tmp_path):
    files = [tmp_path / f"{number}.npy" for number in range(2)]
    for file, width in zip(files, (3, 1), strict=True):  # numpy would spread the one column over three
        np.save(file, np.ones((2, width), np.float32))
    rows = Rows(files, 4, 2)
    assert rows[:2].shape == (2, 3)
    refused("1.npy' is damaged .1 columns, not 3", rows.__getitem__, slice(1, 3))
