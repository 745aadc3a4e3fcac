"""Image statistics, SSIM, MS-SSIM and the inception score against independent computations."""

import math
import warnings
from unittest.mock import ANY

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch_fidelity.metric_isc import isc_features_to_metric
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure
from torchmetrics.functional.image.ssim import _ssim_update

from ddpo_pytorch.metrics.image_statistics import (
    FOV,
    LEGACY,
    ROUNDING,
    distances,
    fov_quality,
    inception_score,
    legacy_quality,
    split_count,
    summary,
)
from ddpo_pytorch.metrics.intervals import Estimate
from ddpo_pytorch.metrics.ssim import SCALES, ms_ssim, pairs_by_name, scale_count, ssim
from ddpo_pytorch.utils.errors import UserError


def noise_image(height: int, width: int, seed: int) -> np.ndarray:
    """uint8 (H, W, 3): smooth colours with noise."""
    rng = np.random.default_rng(seed)
    smooth = np.cumsum(np.cumsum(rng.normal(size=(height, width, 3)), axis=0), axis=1)
    smooth = (smooth - smooth.min()) / np.ptp(smooth)
    return (np.clip(0.8 * smooth + 0.1 * rng.random((height, width, 3)), 0, 1) * 255).astype(np.uint8)


def retina(size: int = 96, seed: int = 0, noise: float = 4, vessels: bool = True) -> np.ndarray:
    """uint8 (size, size, 3): an orange disc with dark lines on black."""
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    rng = np.random.default_rng(seed)
    picture = np.zeros((size, size, 3)) + np.array([180, 90, 40]) * (1.1 - 0.3 * (x**2 + y**2)[..., None] / size**2)
    if vessels:
        for angle in (0.3, 1.2, 2.2):
            picture[np.abs(x * np.sin(angle) - y * np.cos(angle)) < size / 96] *= 0.6
    picture += rng.normal(0, noise, picture.shape)
    picture[x**2 + y**2 > (0.47 * size) ** 2] = 0
    return picture.clip(0, 255).astype(np.uint8)


def mirrored(index: int, length: int) -> int:
    """Number of the pixel that a filter sees at `index`: the image, mirrored with its border pixel repeated."""
    index %= 2 * length
    return index if index < length else 2 * length - 1 - index


def by_loops(pixels: np.ndarray) -> list[float]:
    """The five legacy numbers by loops over pixels; grey levels by the integer formula of PIL's documentation."""
    height, width = pixels.shape[:2]
    red, green, blue = (pixels[..., i].astype(int) for i in range(3))
    grey = ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16) / 255
    mean = sum(map(float, grey.flat)) / grey.size
    spread = math.sqrt(sum((float(v) - mean) ** 2 for v in grey.flat) / grey.size)
    at = lambda i, j: grey[mirrored(i, height), mirrored(j, width)]  # noqa: E731
    slopes, low = [], np.zeros_like(grey)
    kernel = [math.exp(-(k**2) / 8) for k in range(-8, 9)]  # scipy cuts a Gaussian at 4 sigma
    kernel = [k / sum(kernel) for k in kernel]
    for i in range(height):
        for j in range(width):
            rows = zip((-1, 0, 1), (1, 2, 1), strict=True)
            slopes.append(abs(sum(weight * (at(i + d, j + 1) - at(i + d, j - 1)) for d, weight in rows)))
            low[i, j] = sum(
                a * sum(b * at(i + di, j + dj) for dj, b in zip(range(-8, 9), kernel, strict=True))
                for di, a in zip(range(-8, 9), kernel, strict=True)
            )
    high = grey - low
    centre, border = [], []
    for i in range(height):
        for j in range(width):
            if height // 4 <= i < 3 * height // 4 and width // 4 <= j < 3 * width // 4:
                centre.append(grey[i, j])
            vertical = i < height // 4 or i >= 3 * height // 4
            border += [grey[i, j]] * (vertical + (j < width // 4 or j >= 3 * width // 4))
    return [
        mean / (spread + 1e-8),
        float(grey.max() - grey.min()),
        sum(slopes) / len(slopes),
        math.sqrt(float(((high - high.mean()) ** 2).mean())),
        sum(centre) / len(centre) - sum(border) / len(border),
    ]


@pytest.mark.parametrize(("height", "width"), [(16, 16), (13, 18), (7, 5), (21, 10)])
def test_legacy_equals_loops_over_pixels(height, width):
    image = noise_image(height, width, height)
    assert legacy_quality(image) == pytest.approx(by_loops(image), abs=1e-6, rel=1e-6)


@pytest.mark.parametrize("level", [0, 1, 128, 255])
def test_flat_images_have_numbers_and_no_warnings(level):
    image = np.full((32, 32, 3), level, np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = dict(zip(LEGACY, legacy_quality(image), strict=True))
        inside = fov_quality(image)
    assert found["SNR"] == pytest.approx(level / 255 / 1e-8, rel=1e-6)
    assert [found[name] for name in LEGACY[1:]] == pytest.approx([0, 0, 0, 0], abs=1e-12)
    if inside is not None:
        assert np.isfinite(inside).all() and inside[FOV.index("Entropy")] == 0
    with pytest.raises(ValueError, match="quarter bands need 4 x 4"):
        legacy_quality(image[:3])


def test_the_field_of_view_numbers_by_hand():
    """A disc without noise nor vessels, of which every number is known; then what each defect does."""
    size = 128
    y, x = np.mgrid[:size, :size] - 63.5
    disc = np.zeros((size, size, 3), np.uint8)
    disc[x**2 + y**2 < 60**2] = (150, 90, 40)
    flat = dict(zip(FOV, fov_quality(disc), strict=True))
    level = (0.299 * 150 + 0.587 * 90 + 0.114 * 40) / 255
    assert flat["SNR"] == pytest.approx(level / ROUNDING) and flat["Uniformity"] == pytest.approx(1)
    for name in ("RMS contrast", "Michelson contrast", "Sharpness", "Vessel visibility", "Entropy"):
        assert flat[name] == pytest.approx(0, abs=1e-12), name  # the rim is not seen
    halves = disc.copy()
    halves[:, 64:, 1][halves[:, 64:, 1] > 0] = 60
    half = dict(zip(FOV, fov_quality(halves), strict=True))
    assert half["Michelson contrast"] == pytest.approx(30 / 150) and half["Entropy"] == pytest.approx(1, abs=1e-3)
    assert half["RMS contrast"] == pytest.approx(15 / 255, rel=1e-3)
    assert half["Uniformity"] == pytest.approx(1 - 15 / 75, abs=0.01)
    noisy = disc.astype(float)
    noisy[disc[..., 1] > 0] += np.random.default_rng(0).normal(0, 5, (int((disc[..., 1] > 0).sum()), 1))
    noise = dict(zip(FOV, fov_quality(noisy.round().clip(0, 255).astype(np.uint8)), strict=True))
    # of white noise the median of 3 x 3 takes little away: the estimate is near its deviation
    assert level * 255 / noise["SNR"] == pytest.approx(5, rel=0.15)


def test_defects_move_the_field_of_view_numbers_the_right_way():
    good = dict(zip(FOV, fov_quality(retina()), strict=True))
    blurred = Image.fromarray(retina()).filter(ImageFilter.GaussianBlur(2))
    defects = {
        "SNR": retina(noise=20),
        "Vessel visibility": retina(vessels=False),
        "Sharpness": np.array(blurred),
        "Uniformity": (retina() * np.linspace(0.35, 1, 96)[:, None]).astype(np.uint8),
    }
    for name, image in defects.items():
        assert fov_quality(image)[FOV.index(name)] < 0.95 * good[name], name
    assert fov_quality(np.zeros((64, 64, 3), np.uint8)) is None


def test_a_black_surround_does_not_change_what_is_measured_inside():
    small = retina(128)
    wide = np.zeros((128, 192, 3), np.uint8)
    wide[:, 32:160] = small
    kept = [FOV.index(name) for name in ("RMS contrast", "Michelson contrast", "Uniformity")]
    near, far = np.array(fov_quality(small))[kept], np.array(fov_quality(wide))[kept]
    assert far == pytest.approx(near, rel=0.05)
    assert abs(legacy_quality(wide)[0] - legacy_quality(small)[0]) > 0.2  # unlike the document's numbers


def test_distances_to_the_real_set():
    rng = np.random.default_rng(0)
    real, own = rng.normal(3, 2, 400), rng.normal(4, 1, 300)
    groups = [rng.integers(0, 40, len(side)) for side in (own, real)]
    found = distances(own, groups[0], real, groups[1], 7)
    difference, spread = own.mean() - real.mean(), real.std(ddof=1)
    assert found["difference"].value == pytest.approx(difference)
    half = 1.96 * math.sqrt(own.var() / 300 + real.var() / 400)
    ends = found["difference"].low - difference, found["difference"].high - difference
    assert ends == pytest.approx((-half, half), rel=0.25)  # prompts do not differ
    assert found["standardised"].value == pytest.approx(difference / spread)
    levels = np.linspace(0, 1, 20001)[1:-1]
    by_quantiles = np.abs(np.quantile(own, levels) - np.quantile(real, levels)).mean() / spread
    assert found["wasserstein"] == pytest.approx(by_quantiles, rel=0.01)
    assert summary(np.ones(30), groups[0][:30], 7)["mean"] == Estimate(1, 1, 1, 30, ANY)  # no share of anything
    same = distances(real, groups[1], real, groups[1], 7)
    assert same["wasserstein"] == 0 == same["difference"].value
    wide = distances(3 * (real - real.mean()), groups[1], real - real.mean(), groups[1], 0)  # equal means, other spread
    assert abs(wide["difference"].value) < 1e-12 and wide["wasserstein"] > 1
    flat = distances(own, groups[0], np.ones(5), np.zeros(5), 7)
    assert flat["wasserstein"] is None and flat["standardised"].value is None and flat["difference"].value > 2


def random_pair(side: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.from_numpy(np.stack([noise_image(side, side + 3, seed + i) for i in range(3)])).permute(0, 3, 1, 2) / 255
    y = (0.7 * x + 0.3 * torch.rand(x.shape, generator=torch.Generator().manual_seed(seed))).clamp(0, 1)
    return x.double(), y.double()


def test_ssim_equals_torchmetrics_inside_the_border():
    x, y = random_pair(40)
    _, full = _ssim_update(x, y, data_range=1.0, return_full_image=True)
    expected = full[..., 5:-5, 5:-5].flatten(1).mean(1)
    assert torch.allclose(ssim(x, y), expected, atol=1e-10) and 0.1 < expected[0] < 0.95
    assert torch.equal(ssim(x, x), torch.ones(3, dtype=torch.float64))
    assert torch.allclose(ssim(x.float(), y.float()), expected, atol=1e-5)
    with pytest.raises(ValueError, match="11 px or more"):
        ssim(x[..., :10], y[..., :10])


def test_ssim_of_flat_images_is_its_luminance_term():
    x, y = torch.full((1, 3, 20, 20), 0.2), torch.full((1, 3, 20, 20), 0.6)
    assert float(ssim(x, y)) == pytest.approx((2 * 0.12 + 1e-4) / (0.04 + 0.36 + 1e-4), rel=1e-6)


@pytest.mark.parametrize(("side", "scales"), [(16, 1), (32, 2), (64, 3), (128, 4), (180, 5)])
def test_ms_ssim_equals_a_product_of_torchmetrics_terms(side, scales):
    x, y = (images[:1] for images in random_pair(side, seed=side))
    assert scale_count(side) == scales
    weights, expected, a, b = np.array(SCALES[:scales]), torch.ones(1, dtype=torch.float64), x, y
    weights = weights * sum(SCALES) / weights.sum()
    for scale in range(scales):
        if scale < scales - 1:
            _, term = _ssim_update(a, b, data_range=1.0, return_contrast_sensitivity=True)
        else:
            _, full = _ssim_update(a, b, data_range=1.0, return_full_image=True)
            term = full[..., 5:-5, 5:-5].flatten(1).mean(1)
        expected = expected * term ** weights[scale]
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    assert torch.allclose(ms_ssim(x, y), expected, atol=1e-10)
    assert torch.allclose(ms_ssim(x, x), torch.ones(1, dtype=torch.float64))
    if scales == 5:  # theirs takes the last scale's border in as well
        whole = multiscale_structural_similarity_index_measure(x, y, data_range=1.0, reduction="none")
        assert torch.allclose(ms_ssim(x, y), whole, atol=0.03)


def test_pairs_by_name():
    assert pairs_by_name(["a/1", "a/2", "b/1"], ["b/1", "a/1", "c/9"], "x") == [(0, 1), (2, 0)]
    with pytest.raises(UserError, match="'pairs'.* 'a/1'"):
        pairs_by_name(["a/1"], ["a/2"], "'pairs'")


@pytest.mark.parametrize("splits", [1, 10])
def test_the_inception_score_is_that_of_torch_fidelity(splits):
    logits = torch.randn(53, 100, generator=torch.Generator().manual_seed(1)) * 3
    expected = isc_features_to_metric(logits, splits=splits, shuffle=False)
    mean, spread = inception_score(logits.numpy(), splits)
    assert mean == pytest.approx(expected["inception_score_mean"], rel=1e-9)
    assert spread == pytest.approx(expected["inception_score_std"], abs=1e-9)


def test_the_inception_score_lies_between_one_and_the_classes():
    rng = np.random.default_rng(0)
    assert inception_score(np.tile(rng.normal(size=50), (40, 1)))[0] == pytest.approx(1, abs=1e-12)
    sure = 1000 * np.eye(8)[np.arange(80) % 8]
    assert inception_score(sure)[0] == pytest.approx(8, rel=1e-9) and inception_score(sure)[1] == pytest.approx(0)
    for scale in (1e-3, 1, 30, 1e4):
        for _ in range(5):
            assert inception_score(scale * rng.normal(size=(20, 1008)))[0] >= 1
    counts = {1: 1, 19: 1, 20: 1, 1999: 1, 2000: 2, 9_999: 9, 10_000: 10, 50_000: 10}
    assert {images: split_count(images) for images in counts} == counts
    with pytest.raises(ValueError, match="needs as many images"):
        inception_score(sure[:5])


def test_the_inception_score_does_not_fall_where_images_are_divided():
    """Clusters as a generator's images form them: one image more changes the score by some percent at most."""
    rng = np.random.default_rng(0)
    logits = 3 * rng.normal(size=(60, 1008))[rng.integers(0, 60, 2001)] + 2 * rng.normal(size=(2001, 1008))
    for images in (20, 100, 2000):
        before, after = (inception_score(logits[:n], split_count(n))[0] for n in (images - 1, images))
        assert after == pytest.approx(before, rel=0.1)
