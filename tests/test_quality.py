"""Image statistics, SSIM, MS-SSIM and the inception score against independent computations."""

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from torch_fidelity.metric_isc import isc_features_to_metric
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as ms_ssim_of_torchmetrics
from torchmetrics.functional.image.ssim import _ssim_update

from ddpo_pytorch.metrics import image_statistics as statistics
from ddpo_pytorch.metrics.ssim import SCALES, ms_ssim, scale_count, ssim


def noise_image(height: int, width: int, seed: int) -> np.ndarray:
    """uint8 (H, W, 3): smooth colours with noise."""
    rng = np.random.default_rng(seed)
    smooth = np.cumsum(np.cumsum(rng.normal(size=(height, width, 3)), axis=0), axis=1)
    smooth = (smooth - smooth.min()) / np.ptp(smooth)
    return (np.clip(0.8 * smooth + 0.1 * rng.random((height, width, 3)), 0, 1) * 255).astype(np.uint8)


def by_slices(pixels: np.ndarray) -> list[float]:
    """The five legacy numbers by sums over windows; grey levels by PIL's integer formula."""
    height, width = pixels.shape[:2]
    red, green, blue = (pixels[..., i].astype(int) for i in range(3))
    grey = ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16) / 255
    near, wide = np.pad(grey, 1, mode="symmetric"), np.pad(grey, 8, mode="symmetric")
    slopes = sum(w * (near[i : i + height, 2:] - near[i : i + height, :-2]) for i, w in enumerate((1, 2, 1)))
    kernel = np.exp(-(np.arange(-8, 9) ** 2) / 8)  # scipy cuts a Gaussian at 4 sigma
    low = np.einsum("hwij,i,j", np.lib.stride_tricks.sliding_window_view(wide, (17, 17)), kernel, kernel)
    low /= kernel.sum() ** 2
    rows, columns = ((np.arange(n) < n // 4) | (np.arange(n) >= 3 * n // 4) for n in (height, width))
    outside = rows[:, None].astype(int) + columns  # the border counts corners twice
    uniformity = np.average(grey, weights=outside == 0) - np.average(grey, weights=outside)
    return [grey.mean() / (grey.std() + 1e-8), np.ptp(grey), np.abs(slopes).mean(), (grey - low).std(), uniformity]


def in_the_field(image: np.ndarray) -> dict[str, float]:
    return dict(zip(statistics.FOV, statistics.fov_quality(image), strict=True))


@pytest.mark.parametrize(("height", "width"), [(16, 16), (7, 10)])
def test_legacy_equals_sums_over_pixels(height, width):
    image = noise_image(height, width, height)
    assert statistics.legacy_quality(image) == pytest.approx(by_slices(image), abs=1e-6, rel=1e-6)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("level", [0, 128])
def test_flat_images_have_numbers_and_no_warnings(level):
    image = np.full((32, 32, 3), level, np.uint8)
    inside = in_the_field(image) if level else statistics.fov_quality(image)
    assert statistics.legacy_quality(image) == pytest.approx([level / 255 / 1e-8, 0, 0, 0, 0], rel=1e-6, abs=1e-12)
    # of black there is no field of view
    assert (np.isfinite([*inside.values()]).all() and inside["Entropy"] == 0) if level else inside is None
    with pytest.raises(ValueError, match="quarter bands need 4 x 4"):
        statistics.legacy_quality(image[:3])


def test_the_field_of_view_numbers_by_hand():
    """A disc without noise nor vessels, of which every number is known; then what each defect does."""
    size = 128
    y, x = np.mgrid[:size, :size] - 63.5
    disc = np.zeros((size, size, 3), np.uint8)
    disc[x**2 + y**2 < 60**2] = (150, 90, 40)
    flat = in_the_field(disc)
    level = (0.299 * 150 + 0.587 * 90 + 0.114 * 40) / 255
    assert flat["SNR"] == pytest.approx(level / statistics.ROUNDING) and flat["Uniformity"] == pytest.approx(1)
    for name in ("RMS contrast", "Michelson contrast", "Sharpness", "Vessel visibility", "Entropy"):
        assert flat[name] == pytest.approx(0, abs=1e-12), name  # the rim is not seen
    halves = disc.copy()
    halves[:, 64:, 1][halves[:, 64:, 1] > 0] = 60
    half = in_the_field(halves)
    assert half["Michelson contrast"] == pytest.approx(30 / 150) and half["Entropy"] == pytest.approx(1, abs=1e-3)
    assert half["RMS contrast"] == pytest.approx(15 / 255, rel=1e-3)
    assert half["Uniformity"] == pytest.approx(1 - 15 / 75, abs=0.01)
    noisy = disc.astype(float)
    noisy[disc[..., 1] > 0] += np.random.default_rng(0).normal(0, 5, (int((disc[..., 1] > 0).sum()), 1))
    noise = in_the_field(noisy.round().clip(0, 255).astype(np.uint8))
    # of white noise the median of 3 x 3 takes little away: the estimate is near its deviation
    assert level * 255 / noise["SNR"] == pytest.approx(5, rel=0.15)


def test_distances_to_the_real_set():
    rng = np.random.default_rng(0)
    real, own = rng.normal(3, 2, 400), rng.normal(4, 1, 300)
    groups = [rng.integers(0, 40, len(side)) for side in (own, real)]
    found = statistics.distances(own, groups[0], real, groups[1], 7)
    difference, spread = own.mean() - real.mean(), real.std(ddof=1)
    assert found["difference"].value == pytest.approx(difference)
    half = 1.96 * np.sqrt(own.var() / 300 + real.var() / 400)
    ends = found["difference"].low - difference, found["difference"].high - difference
    assert ends == pytest.approx((-half, half), rel=0.25)  # prompts do not differ
    assert found["standardised"].value == pytest.approx(difference / spread)
    levels = np.linspace(0, 1, 20001)[1:-1]
    by_quantiles = np.abs(np.quantile(own, levels) - np.quantile(real, levels)).mean() / spread
    assert found["wasserstein"].value == pytest.approx(by_quantiles, rel=0.01)
    # of shifted normals of one width it is the difference of means, whose error it then has
    shifted = statistics.distances(rng.normal(5, 2, 300), groups[0], real, groups[1], 7)["wasserstein"]
    assert shifted.high - shifted.low == pytest.approx(2 * scipy.stats.t.ppf(0.975, 9) * 300**-0.5, rel=0.5)
    flat = statistics.distances(own, groups[0], np.ones(5), np.zeros(5), 7)
    assert flat["wasserstein"].value is None and flat["standardised"].value is None and flat["difference"].value > 2


def random_pair(side: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.from_numpy(np.stack([noise_image(side, side + 3, seed + i) for i in range(3)])).permute(0, 3, 1, 2) / 255
    y = (0.7 * x + 0.3 * torch.rand(x.shape, generator=torch.Generator().manual_seed(seed))).clamp(0, 1)
    return x.double(), y.double()


def inside(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """SSIM by torchmetrics where the window lies inside."""
    _, full = _ssim_update(x, y, data_range=1.0, return_full_image=True)
    return full[..., 5:-5, 5:-5].flatten(1).mean(1)


def test_ssim_equals_torchmetrics_inside_the_border():
    x, y = random_pair(40)
    expected = inside(x, y)
    assert torch.allclose(ssim(x, y), expected, atol=1e-10) and 0.1 < expected[0] < 0.95
    assert torch.equal(ssim(x, x), torch.ones(3, dtype=torch.float64))
    assert torch.allclose(ssim(x.float(), y.float()), expected, atol=1e-5)


@pytest.mark.parametrize(("side", "scales"), [(16, 1), (64, 3), (180, 5)])
def test_ms_ssim_equals_a_product_of_torchmetrics_terms(side, scales):
    x, y = (images[:1] for images in random_pair(side, seed=side))
    assert scale_count(side) == scales
    weights, expected, a, b = np.array(SCALES[:scales]), torch.ones(1, dtype=torch.float64), x, y
    for scale, weight in enumerate(weights * sum(SCALES) / weights.sum()):
        if scale < scales - 1:
            _, term = _ssim_update(a, b, data_range=1.0, return_contrast_sensitivity=True)
        else:
            term = inside(a, b)
        expected = expected * term**weight
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    assert torch.allclose(ms_ssim(x, y), expected, atol=1e-10)
    if scales == 5:  # theirs takes the last scale's border in as well
        whole = ms_ssim_of_torchmetrics(x, y, data_range=1.0, reduction="none")
        assert torch.allclose(ms_ssim(x, y), whole, atol=0.03)


@pytest.mark.parametrize("splits", [1, 10])
def test_the_inception_score_is_that_of_torch_fidelity(splits):
    logits = torch.randn(53, 100, generator=torch.Generator().manual_seed(1)) * 3
    expected = isc_features_to_metric(logits, splits=splits, shuffle=False)
    mean, spread = statistics.inception_score(logits.numpy(), splits)
    assert mean == pytest.approx(expected["inception_score_mean"], rel=1e-9)
    assert spread == pytest.approx(expected["inception_score_std"], abs=1e-9)
    # it lies between 1 and the number of classes
    rng = np.random.default_rng(0)
    assert statistics.inception_score(np.tile(rng.normal(size=50), (40, 1)))[0] == pytest.approx(1, abs=1e-12)
    sure = 1000 * np.eye(8)[np.arange(80) % 8]
    assert statistics.inception_score(sure) == (pytest.approx(8, rel=1e-9), pytest.approx(0))
    assert statistics.inception_score(1e-3 * rng.normal(size=(20, 1008)))[0] >= 1
    saturated = np.array([[1000.0, 256, 0]] + [[1000, 0, 0]] * 2000)  # the marginal of the second class underflows
    assert statistics.inception_score(saturated, 1) == (pytest.approx(1), 0)
    assert [statistics.split_count(images) for images in (1, 1999, 2000, 50_000)] == [1, 1, 2, 10]
