"""APR by hand, Frechet distances against closed forms and other implementations, LPIPS pairing, tables."""

import itertools
from pathlib import Path

import lpips
import numpy as np
import pytest
import scipy.linalg
import torch
import torch_fidelity.feature_extractor_inceptionv3 as inception_module
import torchvision
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from ddpo_pytorch.data.images import list_samples, save_image
from ddpo_pytorch.data.isic import CAPTIONS, LABELS, folder_name, labels_of
from ddpo_pytorch.errors import UserError
from ddpo_pytorch.metrics.alignment import count_alignment
from ddpo_pytorch.metrics.fidelity import (
    Moments,
    add_distances,
    frechet_distance,
    lpips_by_prompt,
    moments,
    pair_images,
    weighted_mean,
)
from ddpo_pytorch.metrics.networks import URL_ALEXNET, inception_features, lpips_distance, weight_file
from ddpo_pytorch.metrics.report import comparison, table2, table3


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# --- APR ---


def test_apr_by_hand():
    hair, gel_ruler, none = CAPTIONS[8], CAPTIONS[16 + 6], CAPTIONS[0]
    captions = [hair, hair, gel_ruler, gel_ruler, none]
    predictions = torch.tensor([[1, 0, 0, 0], [1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]])
    counts = count_alignment(captions, predictions, LABELS[:4])
    assert counts.total == 5 and counts.apr() == 3 / 5
    assert counts.apr_by_prompt() == {none: 1.0, hair: 0.5, gel_ruler: 0.5}
    single = counts.apr_single_artifact()
    assert len(single) == 8 and single["MEL", "hair"] == 0.5 and single["NV", "hair"] is None
    assert counts.images_by_prompt()[gel_ruler] == 2 and sum(counts.images_by_prompt().values()) == 5
    assert counts.label_accuracy() == {"hair": 1.0, "gel_bubble": 1.0, "ruler": 0.8, "ink": 0.8}


def test_apr_counts_every_label_the_judge_has():
    # six heads: the same artifacts but the wrong disease is not aligned
    predictions = torch.tensor([[1, 0, 0, 0, 1, 0], [1, 0, 0, 0, 0, 1]])
    assert count_alignment([CAPTIONS[8]] * 2, predictions, LABELS).apr() == 0.5
    # columns are found by name, not by position
    assert count_alignment([CAPTIONS[1]], torch.tensor([[1, 0]]), ("ink", "hair")).apr() == 1.0


def test_apr_sums_over_uneven_shares():
    captions = [CAPTIONS[i % 32] for i in range(101)]
    predictions = torch.randint(0, 2, (101, 4), generator=seeded(0))
    whole = count_alignment(captions, predictions, LABELS[:4])
    parts = [count_alignment(captions[i::3], predictions[i::3], LABELS[:4]) for i in range(3)]
    empty = count_alignment([], torch.empty(0), LABELS[:4])
    assert torch.equal((parts[0] + parts[1] + parts[2] + empty).table, whole.table)
    stated = np.array([labels_of(caption)[:4] for caption in captions])
    assert whole.apr() == np.mean((predictions.numpy() == stated).all(1))
    assert empty.apr() is None and empty.apr_by_prompt() == {} and empty.label_accuracy() == {}


# --- Frechet distance ---


def test_frechet_distance_of_a_set_to_itself_is_zero_even_when_singular():
    for count, width in ((500, 16), (20, 64), (2, 8)):
        features = torch.randn(count, width, generator=seeded(count)) * 3 + 5
        own = moments(features)
        assert frechet_distance(own, own) < 1e-9 * float(own.outer.trace()) / count


def test_frechet_distance_is_symmetric():
    for count in (12, 300):
        x = moments(torch.randn(count, 32, generator=seeded(1)))
        y = moments(torch.randn(count + 5, 32, generator=seeded(2)) * 2 + 1)
        assert frechet_distance(x, y) == pytest.approx(frechet_distance(y, x), rel=1e-10)


def gaussian_moments(mean, covariance, count=1000):
    """Moments of a set with exactly this mean and unbiased covariance."""
    mean, covariance = torch.as_tensor(mean).double(), torch.as_tensor(covariance).double()
    return Moments(
        torch.tensor(float(count)).double(), count * mean, (count - 1) * covariance + count * torch.outer(mean, mean)
    )


def test_frechet_distance_matches_the_closed_form_of_diagonal_gaussians():
    mean_x, mean_y = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.0, 1.0, 0.5])
    std_x, std_y = torch.tensor([1.0, 2.0, 0.1]), torch.tensor([3.0, 0.5, 0.1])
    expected = ((mean_x - mean_y) ** 2).sum() + ((std_x - std_y) ** 2).sum()
    got = frechet_distance(gaussian_moments(mean_x, std_x.diag() ** 2), gaussian_moments(mean_y, std_y.diag() ** 2))
    assert got == pytest.approx(float(expected), rel=1e-6)


def test_frechet_distance_matches_scipy():
    x = torch.randn(200, 24, generator=seeded(3)) @ torch.randn(24, 24, generator=seeded(4))
    y = torch.randn(150, 24, generator=seeded(5)) @ torch.randn(24, 24, generator=seeded(6)) + 0.3
    a, b = x.double().numpy(), y.double().numpy()
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root.real)
    assert frechet_distance(moments(x), moments(y)) == pytest.approx(expected, rel=1e-8)


def test_moments_add_up_over_uneven_batches_and_refuse_one_sample():
    features = torch.randn(37, 8, generator=seeded(7))
    whole, parts = moments(features), Moments.zeros(8)
    for part in features.split([1, 20, 16]):
        parts.add(part)
    for one, other in zip(whole.gaussian(), parts.gaussian(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(whole.gaussian()[1], np.cov(features.double().numpy(), rowvar=False), atol=1e-12)
    with pytest.raises(UserError, match="at least 2 images in each set, got 1"):
        moments(features[:1]).gaussian()


# --- the networks of FID and LPIPS ---


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


@pytest.mark.slow
def test_inception_features_see_white_as_white(random_inception):
    path, network = random_inception
    features = inception_features(str(path))
    white, black = torch.ones(1, 3, 64, 64), torch.zeros(1, 3, 64, 64)
    assert features(white).shape == (1, 2048)
    torch.testing.assert_close(features(white), network(torch.full((1, 3, 64, 64), 255, dtype=torch.uint8))[0])
    # the official x * 256 wraps 1.0 to 0, which makes these two equal
    assert (features(white) - features(black)).norm() > 1e-3 * features(black).norm()


def test_lpips_equals_the_lpips_package(tmp_path):
    torch.manual_seed(0)
    alexnet = torchvision.models.alexnet(weights=None)
    torch.save(alexnet.state_dict(), tmp_path / "alexnet.pth")
    ours = lpips_distance(str(tmp_path / "alexnet.pth"))
    reference = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).eval()
    layers = itertools.chain(*(slice_.named_children() for slice_ in reference.net.children()))
    for name, layer in layers:
        layer.load_state_dict(alexnet.features[int(name)].state_dict())
    x, y = torch.rand(2, 3, 3, 64, 64, generator=seeded(8))
    sums = torch.zeros(2, 2, dtype=torch.float64)
    add_distances(sums, ours, x, y, [0, 1, 0])
    values = reference(x, y, normalize=True).flatten().double().detach()
    expected = torch.tensor([[values[0] + values[2], 2], [values[1], 1]], dtype=torch.float64)
    torch.testing.assert_close(sums, expected, rtol=1e-6, atol=0)
    assert values.min() > 0 and ours(x, x).abs().max() == 0
    assert weighted_mean(sums) == pytest.approx(float(values.mean()))
    assert lpips_by_prompt(sums, ["a", "b"])["a"] == pytest.approx(float((values[0] + values[2]) / 2))


def test_weight_files_that_cannot_be_had(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert inception_features("auto") is None and lpips_distance("auto") is None and lpips_distance("") is None
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 3
    assert messages[0].startswith("FID is n/a") and "--config.metric.inception=FILE" in messages[0]
    assert messages[1].startswith("LPIPS is n/a") and URL_ALEXNET in messages[1]
    with pytest.raises(UserError, match="metric.alexnet='nope.pth' does not exist"):
        lpips_distance("nope.pth")
    cached = tmp_path / "checkpoints" / URL_ALEXNET.rsplit("/", 1)[1]
    cached.parent.mkdir()
    cached.write_bytes(b"x")
    assert weight_file("auto", URL_ALEXNET, "LPIPS", "f") == cached
    with pytest.raises(UserError, match="is not a file of plain tensors"):
        lpips_distance("auto")
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "wrong.pth")
    for load in (lpips_distance, inception_features):
        with pytest.raises(UserError, match="are not torch"):
            load(str(tmp_path / "wrong.pth"))


# --- LPIPS pairs ---


def samples(name, counts):
    return [(Path(name) / f"{i:03d}.png", caption) for caption, count in counts.items() for i in range(count)]


def test_pairs_cover_every_generated_image_and_deal_reals_evenly():
    a, b, c, d = CAPTIONS[:4]
    fake, real = samples("fake", {a: 7, b: 2, c: 3}), samples("real", {a: 3, b: 5, d: 4})
    pairs = pair_images(fake, real, seed=0)
    assert sorted((fake_path, caption) for fake_path, _, caption in pairs) == sorted(fake[:9])
    used = [real_path for _, real_path, caption in pairs if caption == a]
    assert sorted(used.count(path) for path in set(used)) == [2, 2, 3]
    assert len({real_path for _, real_path, caption in pairs if caption == b}) == 2


def test_pairs_depend_on_the_seed_and_on_nothing_else():
    fake, real = samples("fake", {c: 30 for c in CAPTIONS[:3]}), samples("real", {c: 30 for c in CAPTIONS[:3]})
    pairs = pair_images(fake, real, 1)
    assert pair_images(list(reversed(fake)), list(reversed(real)), 1) == pairs
    assert pair_images(fake, real, 2) != pairs
    first = [pair for pair in pairs if pair[2] == CAPTIONS[0]]
    assert pair_images(fake[:30], real[:30], 1) == first
    assert [p[1].name for p in first] != [p[1].name for p in pairs if p[2] == CAPTIONS[1]]


# --- tables ---


def test_tables_have_the_papers_layout():
    base = {"APR": 0.1828, "FID": 121.47, "LPIPS": 0.6, "FD_judge": None, "reward": 0.8, "images": 32000}
    base["APR_by_prompt"] = {CAPTIONS[8]: 0.6374, CAPTIONS[1]: 0.002, CAPTIONS[18]: 0.8}
    tuned = base | {"APR": 0.6314, "FID": None, "FD_judge": 0.123456, "APR_by_prompt": {}}
    rows = [
        line.strip("| ").split("|") for line in table2({"SD": base, "SD+RL": tuned}, {CAPTIONS[8]: 543}).split("\n")
    ]
    cells = [[cell.strip() for cell in row] for row in rows]
    assert "MEL Hair,MEL Gel,MEL Ink,MEL Ruler,NV Hair,NV Gel,NV Ink,NV Ruler".split(",") == cells[0][-8:]
    assert cells[2] == ["# Real Sample", "543", *["0"] * 7]
    assert cells[3] == ["APR ↑ (%) SD", "63.74", "n/a", "0.20", "n/a", "n/a", "n/a", "n/a", "80.00"]
    assert cells[4] == ["APR ↑ (%) SD+RL", *["n/a"] * 8]
    assert "# Real" not in table2({"SD": base})
    lines = table3({"SD": base, "SD+RL": tuned}).splitlines()
    assert [cell.strip() for cell in lines[2].strip("|").split("|")] == [
        "SD",
        "18.28",
        "121.47",
        "0.600",
        "n/a",
        "0.800",
        "32000",
    ]
    assert [cell.strip() for cell in lines[3].strip("|").split("|")] == [
        "SD+RL",
        "63.14",
        "n/a",
        "0.600",
        "0.1235",
        "0.800",
        "32000",
    ]
    assert len({len(line) for line in lines}) == 1


def test_comparison_puts_the_same_captions_below_each_other(tmp_path):
    sets = {}
    for name, value in (("SD", 0.2), ("SD+RL", 0.8)):
        for caption in CAPTIONS[:9]:
            save_image(tmp_path / name / "images" / folder_name(caption) / "0.png", torch.full((3, 8, 8), value))
        sets[name] = list_samples(tmp_path / name)
    sheet = np.asarray(comparison(sets))
    assert sheet.shape == (4 * 12, 8 * 5 + 8 * 10 + 2, 3)  # two rows of captions for each set
    assert [int(sheet[row * 12 + 6, 46, 0]) for row in range(4)] == [51, 204, 51, 204]
