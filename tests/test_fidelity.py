"""Measures of features against scipy, torch-fidelity, plain loops and known answers; their intervals."""

import math
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import scipy.spatial.distance
import scipy.stats
import torch
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from ddpo_pytorch.data.isic import CAPTIONS
from ddpo_pytorch.metrics import fidelity, memorisation
from ddpo_pytorch.metrics.diversity import within_pairs, within_prompt_diversity
from ddpo_pytorch.metrics.fidelity import frechet_distance, kernel_distance, manifold_metrics, moments
from ddpo_pytorch.metrics.image_sets import ImageSet
from ddpo_pytorch.metrics.intervals import jackknife_half_width
from ddpo_pytorch.metrics.memorisation import authenticity, measure_memorisation, membership_auc, nearest
from ddpo_pytorch.utils.errors import UserError


def normal(seed, count, width, scale=1.0, offset=0.0):
    return np.random.default_rng(seed).normal(offset, scale, (count, width))


def damaged(count, row, value=np.nan):
    features = normal(0, count, 3)
    features[row] = value
    return features


def test_features_that_are_not_usable():
    for measure, error, message in (
        (lambda: fidelity.gaussian(moments(normal(9, 1, 3))), UserError, "at least 2 images in each set, got 1"),
        (lambda: moments(damaged(20, 7), first=20), ValueError, "row 27"),
        (lambda: kernel_distance(normal(0, 5, 3), normal(1, 1, 3), 0), UserError, "at least 2 images.* 5 and 1"),
        (lambda: kernel_distance(normal(0, 9, 3), damaged(9, 4), 0), ValueError, "second set: row 4"),
        (lambda: manifold_metrics(normal(0, 9, 3), normal(1, 5, 3)), UserError, "at least 6.* 9 real and 5 generated"),
        (lambda: manifold_metrics(normal(0, 9, 3), damaged(20, 13), block=4), ValueError, "row 13 holds NaN"),
        (lambda: of_one_prompt(damaged(30, 4, 0)), ValueError, "features: row 4 is zero"),
        (lambda: of_one_prompt(damaged(30, 2)), ValueError, "features: row 2 holds NaN"),
        (lambda: nearest(normal(7, 3, 3), damaged(30, 17, 0), 8), ValueError, "reference features: row 17 is zero"),
        (lambda: nearest(damaged(30, 17), normal(7, 3, 3), 8), ValueError, "query features: row 17 holds NaN"),
    ):
        with pytest.raises(error, match=message):
            measure()
    assert within_prompt_diversity(normal(6, 6, 3), np.repeat([0, 1], 3), 4, 0) is None  # prompts of three images
    assert within_prompt_diversity(normal(6, 6, 3), np.arange(6), 1, 0) is None


@pytest.mark.parametrize(("count", "width"), [(500, 16), (20, 64)])
def test_the_distance_of_a_set_to_itself_is_zero_and_symmetric_even_when_singular(count, width):
    rows = normal(count, count, width, 3, 5), normal(2, count + 5, width, 2, 1)
    x, y = map(moments, rows)
    assert frechet_distance(x, x) < 1e-9 * float(x[1:, 1:].trace()) / count
    assert frechet_distance(x, y) == pytest.approx(frechet_distance(y, x), rel=1e-10)
    assert fidelity.frechet_of_rows(*rows) == pytest.approx(frechet_distance(x, y), rel=1e-9)


def test_the_distance_equals_scipys():
    x, y = normal(3, 200, 24) @ normal(4, 24, 24), normal(5, 150, 24) @ normal(6, 24, 24) + 0.3
    root = scipy.linalg.sqrtm(np.cov(x, rowvar=False) @ np.cov(y, rowvar=False))
    traces = np.trace(np.cov(x, rowvar=False) + np.cov(y, rowvar=False) - 2 * root.real)
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + traces
    assert frechet_distance(moments(x), moments(y)) == pytest.approx(expected, rel=1e-8)


def test_the_distance_at_infinity_removes_most_of_the_bias_and_its_interval_covers_the_truth():
    """Gaussians of 20 dimensions whose means differ by 1 in each: the distance is 20."""
    found = []
    for seed in range(30):
        curve, end = fidelity.size_curve(normal(seed, 200, 20), normal(seed + 99, 200, 20, offset=1.0), seed)
        found.append((curve["200"]["FID"], end.value, end.low <= 20 <= end.high))
        assert list(curve) == ["200", "100", "50"] and curve["50"]["FID"] > curve["200"]["FID"]
    full, infinite, covered = np.mean(found, axis=0)
    assert full - 20 > 0.6 and abs(infinite - 20) < 0.3 and covered > 0.75
    assert fidelity.size_curve(normal(1, 40, 3), normal(2, 40, 3), 0)[1].low is None


def test_the_gaussian_kernel_distance_equals_its_definition():
    x, y = normal(1, 30, 4), normal(2, 20, 4, offset=1.0)
    both = np.concatenate([x, y])
    unit = both / np.linalg.norm(both, axis=1, keepdims=True)
    kernel = np.exp(-scipy.spatial.distance.squareform(scipy.spatial.distance.pdist(unit, "sqeuclidean")) / 200)
    # all rows of the smaller set and as many of the larger one, drawn as for KID
    rows = np.random.RandomState(3).choice(30, 20, replace=False), np.arange(30, 50)
    within = [(kernel[np.ix_(r, r)].sum() - 20) / (20 * 19) for r in rows]
    found = kernel_distance(x, y, 3, subsets=1, kernel=fidelity.gaussian_kernel)
    assert found.value == pytest.approx(sum(within) - 2 * kernel[np.ix_(*rows)].mean(), rel=1e-9)
    assert found.low > 0


@pytest.mark.parametrize("width", [3, 300])
def test_the_two_sample_test_equals_its_definition_and_finds_a_known_difference(width):
    real, fake = normal(1, 120, width), normal(2, 120, width, offset=1.0)
    found, rng = fidelity.two_sample_test(real, fake, 7), np.random.default_rng([7, 5])
    learned, tested = zip(*((x[o[:60]], x[o[60:]]) for x in (real, fake) for o in [rng.permutation(120)]), strict=True)
    learned, tested, side = np.concatenate(learned), np.concatenate(tested), np.repeat([-1, 1], 60)
    mean, scale = learned.mean(axis=0), learned.std(axis=0)
    # ridge regression as least squares with a row sqrt(penalty) for each weight
    rows = np.concatenate([(learned - mean) / scale, width**0.5 * np.eye(width)])
    weights = scipy.linalg.lstsq(rows, np.concatenate([side, np.zeros(width)]))[0]
    right = np.sign((tested - mean) / scale @ weights) == side
    interval = scipy.stats.binomtest(int(right.sum()), 120).proportion_ci(0.95, "exact")
    assert (found.value, found.low, found.high) == pytest.approx((right.mean(), *interval))
    # two Gaussians one unit apart in each of 3 dimensions: the best accuracy is Phi(sqrt(3) / 2)
    assert found.low < (scipy.stats.norm.cdf(3**0.5 / 2) if width == 3 else 1.001) and found.low > 0.5
    same = fidelity.two_sample_test(normal(3, 500, width), normal(4, 500, width), 0)
    assert same.low < 0.5 < same.high and fidelity.two_sample_test(real[:3], fake, 0).value is None


def test_the_jackknife_equals_its_definition():
    fake, real = normal(5, 120, 6, 1.3), moments(normal(6, 200, 6))
    estimate = fidelity.frechet_jackknife([moments(part) for part in np.split(fake, 6)], real)
    left = [frechet_distance(moments(np.delete(fake, slice(20 * i, 20 * i + 20), 0)), real) for i in range(6)]
    error = np.sqrt(5 / 6 * np.square(left - np.mean(left)).sum())
    assert estimate.value == pytest.approx(frechet_distance(moments(fake), real), rel=1e-10) and estimate.n == 120
    assert estimate.high - estimate.value == pytest.approx(scipy.stats.t.ppf(0.975, 5) * error, rel=1e-6)
    assert estimate.low == pytest.approx(max(0.0, 2 * estimate.value - estimate.high), abs=1e-9)


def test_the_change_of_pairs_leaves_the_same_pairs_out():
    real, before = normal(6, 200, 6), normal(5, 117, 6, 1.3)  # groups of 12 and 11
    after, indices = before + normal(8, 117, 6, 0.1, 0.1), np.arange(117)
    distances = [fidelity.frechet(real, np.arange(200), rows, indices, 42) for rows in (before, after)]
    change = fidelity.frechet_change(*distances)
    parts = np.array_split(np.random.default_rng([42, 1]).permutation(117), 10)
    values = [frechet_distance(moments(rows), moments(real)) for rows in (before, after)]
    left = [[frechet_distance(moments(np.delete(x, p, 0)), moments(real)) for p in parts] for x in (before, after)]
    half = jackknife_half_width(values[1] - values[0], np.subtract(*reversed(left)), [len(part) for part in parts])
    assert change.value == pytest.approx(values[1] - values[0], rel=1e-9) and change.n == 117
    assert [change.low, change.high] == pytest.approx([change.value - half, change.value + half], rel=1e-5)
    assert half < 0.5 * min(one.high - one.value for one in distances)  # what the pairs have in common cancels
    few = [fidelity.frechet(real, np.arange(200), before, np.arange(count), 42) for count in (12, 19)]
    assert fidelity.frechet_change(*few).low is None


@pytest.mark.parametrize("size", [100, 60])  # of 300 rows: all products once, those of each subset
def test_the_kernel_distance_equals_torch_fidelity_on_the_same_subsets(size):
    x, y = normal(1, 300, 40, 2.0, 0.5).astype(np.float32), normal(2, 250, 40, 1.5).astype(np.float32)
    rows = [torch.from_numpy(side.astype(np.float64)) for side in (x, y)]
    theirs = kid_features_to_metric(*rows, kid_subsets=20, kid_subset_size=size, rng_seed=2020, verbose=False)
    estimate = kernel_distance(x, y, 2020, subsets=20, subset_size=size)
    assert estimate.value == pytest.approx(theirs["kernel_inception_distance_mean"], abs=1e-9, rel=1e-9)
    deviation = theirs["kernel_inception_distance_std"]
    assert f"sd {deviation:.3g} over 20 subsets of {size}" in estimate.how and estimate.n == 300
    three = kernel_distance(normal(0, 3, 4), normal(1, 9, 4), 0)
    assert three.value is not None and three.low is None and three.high is None


@pytest.mark.slow
@pytest.mark.parametrize(("scale", "offset"), [(1.3, 0.3), (1.0, 0.0)])
def test_the_kernel_distance_is_unbiased_and_its_interval_covers_the_truth(scale, offset):
    truth = 0.0  # of equal distributions
    if offset:
        sets = [(normal(s, 2000, 6), normal(s + 99, 2000, 6, scale, offset)) for s in range(4)]
        truth = np.mean([kernel_distance(x, y, 0, 1, 2000).value for x, y in sets])
    sets = [(normal([s, 1], 120, 6), normal([s, 2], 150, 6, scale, offset)) for s in range(150)]
    estimates = [kernel_distance(*pair, seed, 10, 40) for seed, pair in enumerate(sets)]
    held = np.mean([estimate.low <= truth <= estimate.high for estimate in estimates])
    assert 0.90 < held < (0.99 if offset else 1.01)
    values = np.array([estimate.value for estimate in estimates])
    assert abs(values.mean() - truth) < 4 * values.std() / len(values) ** 0.5


def values(found):
    return {name: one.value for name, one in found.items()}


def by_loops(real, fake, k):
    """Return the definitions, from distances of single pairs."""

    def radii(rows):
        return [sorted(np.linalg.norm(a - b) for j, b in enumerate(rows) if i != j)[k - 1] for i, a in enumerate(rows)]

    table = np.array([[np.linalg.norm(f - r) for r in real] for f in fake])
    inside, recalled = table < radii(real), table <= np.array(radii(fake))[:, None]
    density = {"density": inside.sum() / (k * len(fake)), "coverage": inside.any(axis=0).mean()}
    return {"precision": inside.any(axis=1).mean(), "recall": recalled.any(axis=0).mean()} | density


@pytest.mark.parametrize(("k", "block"), [(1, 1000), (5, 7)])
def test_neighbours_and_their_intervals_equal_plain_loops(k, block):
    real, fake = normal(1, 45, 4), normal(2, 38, 4, 0.8, 0.5)
    # far from the origin squared distances would cancel
    expected, found = by_loops(real, fake, k), manifold_metrics(real + 1e6, fake + 1e6, k, block, seed=3)
    assert len({round(value, 6) for value in expected.values()}) == 4 and 0 < expected["recall"] < 1
    assert values(found) == pytest.approx(expected, abs=1e-12)
    parts = np.array_split(np.random.default_rng([3, 9]).permutation(38), 10)
    left = [by_loops(real, np.delete(fake, part, 0), k) for part in parts]
    for name in ("recall", "coverage"):
        half = jackknife_half_width(expected[name], np.array([one[name] for one in left]), [len(p) for p in parts])
        one = found[name]
        assert (one.low, one.high) == pytest.approx((max(0, one.value - half), min(1, one.value + half)))
    few = manifold_metrics(real, fake[:19], k)
    assert few["coverage"].low is None and few["precision"].low < few["precision"].value


@pytest.mark.slow
@pytest.mark.parametrize(("count", "width", "scale", "offset"), [(60, 4, 1.0, 0.0), (150, 8, 0.8, 0.3)])
def test_intervals_of_neighbours_cover_the_mean_over_generated_sets(count, width, scale, offset):
    """With these real images, as the intervals say."""
    real = normal(1, count, width)
    found = [manifold_metrics(real, normal(s, count, width, scale, offset), seed=s) for s in range(100, 300)]
    for name in found[0]:
        truth = np.mean([one[name].value for one in found])
        assert 0.85 < np.mean([one[name].low <= truth <= one[name].high for one in found]), name


def test_precision_and_recall_equal_torch_fidelity():
    real, fake = normal(3, 400, 10), normal(4, 300, 10, 0.9, 0.3)
    options = {"prc_neighborhood": 3, "prc_batch_size": 128, "save_cpu_ram": True, "verbose": False}
    theirs = prc_features_to_metric(torch.from_numpy(fake), torch.from_numpy(real), **options)
    ours = values(manifold_metrics(real, fake, k=3, block=128))
    for name in ("precision", "recall"):
        assert ours[name] == pytest.approx(theirs[name], abs=1e-6)
    assert 0.1 < ours["recall"] < ours["precision"] < 1


def test_sets_that_are_equal_far_apart_or_collapsed():
    for width in (3, 500):
        real = normal(5, 150, width, offset=100.0).astype(np.float32)
        for block in (16, 150):  # the k-th neighbour lies on the ball's edge, however the distance is rounded
            assert set(values(manifold_metrics(real, real.copy(), 5, block)).values()) == {1.0}
    real = normal(6, 100, 5)
    apart = manifold_metrics(real, normal(7, 100, 5, offset=50.0))
    assert set(values(apart).values()) == {0.0} and apart["density"].high is None
    for name in ("precision", "recall", "coverage"):  # of nothing the exact binomial interval
        assert (apart[name].low, apart[name].high) == pytest.approx((0, 1 - 0.025**0.01))
    collapsed = values(manifold_metrics(real, normal(8, 100, 5, 0.01)))
    assert collapsed["precision"] == 1 and collapsed["density"] > 1.2
    assert collapsed["recall"] < 0.05 and collapsed["coverage"] < 0.5


def test_pairs_cover_every_generated_image_deal_reals_evenly_and_depend_on_the_seed_alone():
    def samples(name, counts):
        return [(Path(name) / f"{i:03d}.png", caption) for caption, count in counts.items() for i in range(count)]

    a, b, c, d = CAPTIONS[:4]

    def paired(fake, real, seed):
        return [(fake[i][0], real[j][0], fake[i][1]) for i, j in fidelity.pair_images(fake, real, seed)]

    fake, real = samples("fake", {a: 7, b: 2, c: 3}), samples("real", {a: 3, b: 5, d: 4})
    pairs = paired(fake, real, 0)
    assert sorted((fake_path, caption) for fake_path, _, caption in pairs) == sorted(fake[:9])
    used = [real_path for _, real_path, caption in pairs if caption == a]
    assert sorted(used.count(path) for path in set(used)) == [2, 2, 3]
    assert len({real_path for _, real_path, caption in pairs if caption == b}) == 2
    assert paired(fake[::-1], real[::-1], 0) == pairs != paired(fake, real, 2)
    assert paired(fake[:7], real[:3], 0) == [pair for pair in pairs if pair[2] == a]


def of_one_prompt(features):
    """(Vendi score, pairwise distance) of all rows."""
    result = within_prompt_diversity(features, np.zeros(len(features)), len(features), 0)
    assert all(estimate.low is None and estimate.high is None for estimate in result.values())
    return result["vendi"].value, result["pairwise_distance"].value


@pytest.mark.parametrize("shape", [(20, 50), (50, 20), (2, 4)])
def test_scores_equal_their_definitions(shape):
    features = normal(1, *shape) + 0.5
    kernel = np.array([[1 - scipy.spatial.distance.cosine(a, b) for a in features] for b in features])
    values = np.clip(np.linalg.eigvalsh(kernel / len(features)), 0, None)
    vendi, distance = of_one_prompt(features)
    assert vendi == pytest.approx(math.exp(scipy.stats.entropy(values)), rel=1e-9)
    assert distance == pytest.approx(scipy.spatial.distance.pdist(features, "cosine").mean(), rel=1e-10)
    assert of_one_prompt(features.astype(np.float32) * 1e25) == pytest.approx(of_one_prompt(features), rel=1e-6)
    assert of_one_prompt(np.ones((40, 6))) == pytest.approx((1, 0), abs=1e-9)
    assert of_one_prompt(np.eye(12) * 7) == pytest.approx((12, 1))  # all different
    assert of_one_prompt(np.repeat(np.eye(5), 8, axis=0))[0] == pytest.approx(5)  # five kinds
    assert of_one_prompt(np.repeat(np.eye(2), [1, 3], axis=0))[0] == pytest.approx(4 / 3**0.75)


def test_complete_prompts_are_averaged_and_small_ones_left_out():
    features, groups = normal(4, 60, 10) + 0.5, np.random.default_rng(0).permutation(np.repeat([2, 5, 7], 20))
    result = within_prompt_diversity(features, groups, 20, 0)
    for number, name in enumerate(("vendi", "pairwise_distance")):
        scores = [of_one_prompt(features[groups == group])[number] for group in (2, 5, 7)]
        estimate = result[name]
        assert estimate.value == pytest.approx(np.mean(scores), rel=1e-12) and estimate.n == 60
        # some of 200 draws of three prompts hold one of them three times
        assert (estimate.low, estimate.high) == pytest.approx((min(scores), max(scores)), rel=1e-9)
    assert within_prompt_diversity(features, groups, 20, 0) == result
    result = within_prompt_diversity(normal(5, 100, 300), np.repeat([0, 1, 2, 3], [50, 30, 15, 5]), 15, 1)["vendi"]
    assert 13 < result.value < 15 and result.n == 45  # nearly orthogonal rows count about once each


def test_pairs_form_a_circle_within_each_prompt_by_seed_and_keys_alone():
    groups = np.array([0] * 6 + [1] * 2 + [2] + [3] * 3)
    keys = [f"{group}/{i}" for i, group in enumerate(groups)]
    pairs = within_pairs(groups, 0, keys)
    assert all(groups[a] == groups[b] and a != b for a, b in pairs)
    assert [sum(groups[a] == group for a, _ in pairs) for group in range(4)] == [6, 1, 0, 3]
    partner, position, visited = dict(pairs), 0, set()
    while position not in visited:  # one circle, not two smaller ones
        visited.add(position)
        position = partner[position]
    assert visited == set(range(6))
    order = np.random.default_rng(0).permutation(12)  # another order of the files, other numbers for the prompts
    moved = [keys[i] for i in order]
    named = [(keys[a], keys[b]) for a, b in pairs]
    assert [(moved[a], moved[b]) for a, b in within_pairs(9 - groups[order], 0, moved)] == named
    assert [(keys[a], keys[b]) for a, b in within_pairs(groups, 4, keys)] != named


def test_nearest_equals_scipy_copies_are_at_distance_zero_and_ties_go_to_the_first():
    query, reference = normal(1, 45, 12) + 0.2, normal(2, 131, 12) + 0.2
    table = scipy.spatial.distance.cdist(query, reference, "cosine")
    for block in (7, 1000):
        distances, indices = nearest(query, reference, block)
        np.testing.assert_allclose(distances, table.min(axis=1), atol=1e-13)
        np.testing.assert_array_equal(indices, table.argmin(axis=1))
    reference = np.abs(normal(5, 300, 2048)).astype(np.float32)
    reference[200:] = reference[:100]  # every one of these is there twice
    query = reference[[3, 250, 99, 150, 210]] * np.array([[1], [1], [1000], [1], [1e-30]], dtype=np.float32)
    for block in (1, 90, 1000):
        distances, indices = nearest(query, reference, block)
        assert distances.min() >= 0 and distances.max() < 1e-12
        assert indices.tolist() == [3, 50, 99, 150, 10]
    assert nearest(np.array([[1.0, 1]]), np.array([[-2.0, -2]]))[0] == pytest.approx(2)


def memorised(distances, indices, captions, baseline=None):
    """The measures of generated images at these distances from these training images, of thumbnails."""
    fake, train = (ImageSet(Path(), tuple(map(Path, map(str, range(n)))), captions, ()) for n in (len(captions), 10))
    return measure_memorisation("thumbnail", fake, train, (distances, indices), baseline, 0)


def test_the_share_strictly_closer_than_the_quantile_and_the_closest_with_each_training_image_once(monkeypatch):
    baseline, captions = np.linspace(0.1, 1.1, 101), (*CAPTIONS[:1] * 2, *CAPTIONS[1:2] * 3)
    found = memorised(np.array([0.05, 0.11, 0.1099, 0.5, 0.6]), np.arange(5), captions, baseline)
    share, threshold = found["share_closer"], found["threshold"]
    assert threshold == pytest.approx(0.11) and share.value == pytest.approx(2 / 5) and share.n == 5
    share = memorised(np.array([threshold, 0.5]), np.arange(2), captions[:2], baseline)["share_closer"]
    assert share.value == 0 and share.low == 0 and 0 < share.high < 1
    distances, indices = np.array([0.5, 0.1, 0.3, 0.1, 0.2, 0.0]), np.array([7, 4, 9, 8, 4, 7])
    for count, expected in ((3, "513"), (16, "5132")):
        monkeypatch.setattr(memorisation, "CLOSEST", count)
        pairs = memorised(distances, indices, CAPTIONS[:6])["closest"]
        assert "".join(Path(pair["path"]).name for pair in pairs) == expected
        assert [pair["distance"] for pair in pairs] == [0.0, 0.1, 0.1, 0.3][: len(pairs)]


def test_authenticity_equals_plain_loops_and_finds_copies_with_noise():
    train, fake = normal(1, 50, 4), normal(2, 40, 4)
    fake[:10] = train[:10] + 1e-4 * fake[:10]
    table = scipy.spatial.distance.cdist(fake, train, "cosine")
    own = scipy.spatial.distance.cdist(train, train, "cosine") + 9 * np.eye(50)
    expected = [table[i].min() > own[table[i].argmin()].min() for i in range(40)]
    found = authenticity(train, *nearest(fake, train, block=7), np.arange(40) % 3, 0)
    assert found.value == np.mean(expected) and not any(expected[:10]) and 0 < found.low < found.value < found.high
    assert nearest(train, train, block=7, excluded=np.arange(50))[0] == pytest.approx(own.min(axis=1), abs=1e-12)


def test_membership_is_the_share_of_pairs_in_order_and_its_interval_covers_the_truth():
    train, val = normal(1, 60, 1)[:, 0], normal(2, 45, 1, offset=0.5)[:, 0].round(1)
    found, pairs = membership_auc(train, val), (train[:, None] < val) + 0.5 * (train[:, None] == val)
    assert found.value == pytest.approx(pairs.mean())
    # DeLong's variance
    error = np.sqrt(pairs.mean(axis=1).var(ddof=1) / 60 + pairs.mean(axis=0).var(ddof=1) / 45)
    assert (found.low, found.high) == pytest.approx((found.value - 1.96 * error, found.value + 1.96 * error))
    truth = scipy.stats.norm.cdf(0.5 / 2**0.5)
    draws = [membership_auc(normal(s, 60, 1)[:, 0], normal(s + 999, 60, 1, offset=0.5)[:, 0]) for s in range(200)]
    assert np.mean([one.low <= truth <= one.high for one in draws]) > 0.88
    # the same images under a model that has learned: noise that both share drops out of the difference
    change = membership_auc(train - 0.3, val, (train, val))
    assert 0 < change.low < change.value == pytest.approx(membership_auc(train - 0.3, val).value - found.value)
    assert change.high - change.low < found.high - found.low and membership_auc(train, val + 99).low is None
