"""Distances between features of real and generated images: Frechet, kernel, two-sample test, precision, recall, ...

Not torchmetrics' Frechet distance, which is neither symmetric nor 0 for equal sets with fewer images than features.
"""

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import cycle
from typing import Any

import numpy as np
import torch
from scipy import stats
from torchmetrics.image.kid import maximum_mean_discrepancy, poly_kernel

from ddpo_pytorch.metrics.image_sets import ImageSet, Samples
from ddpo_pytorch.metrics.intervals import JACKKNIFE_GROUPS, Estimate, bootstrap_mean, finite, jackknife_half_width
from ddpo_pytorch.utils.cores import on_all_cores, one_thread, product
from ddpo_pytorch.utils.errors import UserError

PAIRWISE_IMAGES = 10_000  # larger sets are subsampled for all but the Frechet distance, since costs are quadratic
NEIGHBOURS = 5
# Squared distances closer than this share of the largest squared norm count as equal, since an image in both sets lies
# exactly on the boundary of some balls.
ROUNDING = 1e-12


@one_thread()
def moments(features: np.ndarray, first: int = 0) -> torch.Tensor:
    """Return the additive moments (1 + F, 1 + F) of (N, F) features f: the sum of g g^T with g = (1, f), in float64."""
    features = torch.from_numpy(np.insert(finite(features, "features", first), 0, 1, axis=1))
    return features.T @ features


def gaussian(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean (F,) and unbiased covariance (F, F) of moments. Raises UserError below two samples."""
    count, total = int(x[0, 0]), x[0, 1:]
    if count < 2:
        raise UserError(f"a Frechet distance needs at least 2 images in each set, got {count}")
    mean = total / count
    return mean, (x[1:, 1:] - count * torch.outer(mean, mean)) / (count - 1)


@one_thread()
def frechet_distance(x: torch.Tensor, y: torch.Tensor) -> float:
    """Return |mx - my|^2 + tr(Cx + Cy - 2 (Cx Cy)^(1/2)), the Frechet distance of two Gaussians (Heusel et al. 2017).

    x and y are `moments`. With C = A A^T, tr (Cx Cy)^(1/2) is the sum of the singular values of Ax^T Ay.
    """
    return _distance(*_mean_and_root(x), *_mean_and_root(y))


@one_thread()
def frechet_of_rows(x: np.ndarray, y: np.ndarray) -> float:
    """Return `frechet_distance` of features (N, F) and (M, F), faster for fewer images than features."""
    sides = []
    for rows in map(torch.from_numpy, (x, y)):
        mean = rows.mean(0)
        sides += [mean, torch.linalg.qr((rows - mean) / (len(rows) - 1) ** 0.5, mode="r").R.T]
    return _distance(*sides)


def _distance(mean_x: torch.Tensor, root_x: torch.Tensor, mean_y: torch.Tensor, root_y: torch.Tensor) -> float:
    cross = torch.linalg.svdvals(root_x.T @ root_y).sum()
    traces = root_x.square().sum() + root_y.square().sum() - 2 * cross
    return max(0.0, float((mean_x - mean_y).square().sum() + traces))


def _mean_and_root(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean (F,) and A (F, r) with A A^T = covariance, without directions of rounding noise."""
    mean, covariance = gaussian(x)
    values, vectors = torch.linalg.eigh(covariance)
    keep = values > values.max() * len(values) * torch.finfo(values.dtype).eps
    return mean, vectors[:, keep] * values[keep].sqrt()


@one_thread()
def frechet_jackknife(groups: Sequence[torch.Tensor], real: torch.Tensor) -> Estimate:
    """Return the Frechet distance to `real` of all groups, random parts of the generated images; all are `moments`.

    The interval is clipped at 0, takes `real` as given and does not cover the bias of few images.
    """
    (mean_y, root_y), total = _mean_and_root(real), sum(groups)

    def quick_distance(x: torch.Tensor) -> float:
        """Return the distance, accurate to 1e-8 of the variances, by eigenvalues of Ay^T Cx Ay; ten times as fast."""
        mean_x, covariance = gaussian(x)
        cross = torch.linalg.eigvalsh(root_y.T @ covariance @ root_y).clamp(min=0).sqrt().sum()
        traces = covariance.trace() + root_y.square().sum() - 2 * cross
        return float((mean_x - mean_y).square().sum() + traces)

    value, sizes = _distance(*_mean_and_root(total), mean_y, root_y), [int(group[0, 0]) for group in groups]
    *left_out, full = on_all_cores(quick_distance, [*(total - group for group in groups), total])
    half = jackknife_half_width(full, np.array(left_out), sizes)
    how = f"jackknife over {len(groups)} random groups of the generated images"
    estimate = Estimate.around(value, half, sum(sizes), how, (0, np.inf))
    return replace(estimate, left_out=np.array(left_out) + value - full)


def frechet_change(before: Estimate, after: Estimate) -> Estimate:
    """Return the difference of two distances to the same real images, of sets that are pairs image by image.

    The jackknife leaves the same pairs out of both, so that what they have in common cancels.
    """
    change = after.value - before.value
    if before.left_out is None or after.left_out is None:
        return Estimate(change, None, None, after.n, "no interval of either distance")
    sizes = [len(part) for part in np.array_split(np.arange(after.n), len(after.left_out))]
    half = jackknife_half_width(change, after.left_out - before.left_out, sizes)
    return Estimate.around(change, half, after.n, f"jackknife over {len(sizes)} random groups of pairs")


def frechet(real: Any, real_part: np.ndarray, fake: Any, fake_part: np.ndarray, seed: int) -> Estimate:
    """Return the Frechet distance of generated to real `Rows` at these indices, with a jackknife interval."""

    def moments_of(rows: Any, indices: np.ndarray, block: int = 4096) -> torch.Tensor:  # read a block at a time
        return sum(moments(rows[indices[at : at + block]], at) for at in range(0, len(indices), block))

    reference, number = moments_of(real, real_part), len(fake_part)
    if number < 2 * JACKKNIFE_GROUPS:
        value = frechet_distance(moments_of(fake, fake_part), reference)
        estimate = Estimate(value, None, None, number, f"no interval below {2 * JACKKNIFE_GROUPS} images")
    else:
        order = np.random.default_rng([seed, 1]).permutation(fake_part)
        groups = [moments_of(fake, part) for part in np.array_split(order, JACKKNIFE_GROUPS)]
        estimate = frechet_jackknife(groups, reference)
    fewest, features = min(number, len(real_part)), len(reference) - 1
    singular = f"; {fewest} images of {features} features: biased upwards" if fewest <= features else ""
    return replace(estimate, how=estimate.how + singular)


def gaussian_kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return exp(-|a - b|^2 / 2 sigma^2) (N, M) of normalised rows a of x, b of y; sigma = 10 (CMMD, 2401.09603)."""
    x, y = torch.nn.functional.normalize(x), torch.nn.functional.normalize(y)
    return torch.exp((x @ y.T - 1) / 100)


def kernel_distance(
    x: Any, y: Any, seed: int, subsets: int = 100, subset_size: int = 1000, kernel: Callable = poly_kernel
) -> Estimate:
    """Return the squared MMD of features x (N, F) and y (M, F), by default with (a.b / F + 1)^3, averaged over subsets.

    Each subset draws m = min(subset_size, N, M) rows of both sets without replacement, as torch-fidelity for this seed.
    Published tables print the standard deviation over subsets after +- (here in `how`); it depends on m and is not a
    confidence interval. The interval is value +- 1.96 se, from Hoeffding's decomposition (1948):

        se^2 = 4 z_x / N + 4 z_y / M + 2 w_x / N^2 + 2 w_y / M^2 + sd^2 / subsets

    If h(a) is the mean kernel of image a with the other x minus that with y, z_x is var h(x) (near 0 for similar sets)
    and w_x the variance that single pairs add. No interval below 4 rows in a set; raises UserError below two.
    """
    size = min(subset_size, len(x), len(y))
    if size < 2:
        raise UserError(f"a kernel distance needs at least 2 images in each set, got {len(x)} and {len(y)}")
    x, y = finite(x, "first set"), finite(y, "second set")
    rng = np.random.RandomState(seed % 2**32)  # the legacy generator, as in torch-fidelity
    drawn = [[rng.choice(len(rows), size, replace=False) for rows in (x, y)] for _ in range(subsets)]

    def kernels(a: np.ndarray, b: np.ndarray) -> tuple[torch.Tensor, ...]:
        first, second = torch.tensor(a), torch.tensor(b)  # copies: alignment can change the last bits of a product
        return kernel(first, first), kernel(second, second), kernel(first, second)

    full = None
    if subsets > 1 and max(len(x), len(y)) <= 4 * size:  # cheaper than the products of every subset; at most 400 MB
        with one_thread():
            full = kernels(x, y)

    def estimate(rows: list[np.ndarray]) -> tuple[float, list[tuple[float, float]]]:
        """Return the unbiased squared MMD of a subset, and the variances (z, w) of both sets."""
        i, j = rows
        if full is None:
            within_x, within_y, between = kernels(x[i], y[j])
        else:
            within_x, within_y, between = full[0][i][:, i], full[1][j][:, j], full[2][i][:, j]
        value = float(maximum_mean_discrepancy(within_x, between, within_y))
        if size < 4:
            return value, [(0.0, 0.0)] * 2
        return value, [_variances(within_x.numpy(), between.numpy()), _variances(within_y.numpy(), between.numpy().T)]

    results = on_all_cores(estimate, drawn)
    values, variances = (np.array(column) for column in zip(*results, strict=True))
    value, deviation = float(values.mean()), float(values.std())
    how = f"U-statistic standard error; sd {deviation:.3g} over {subsets} subsets of {size}"
    if size < 4:
        return Estimate(value, None, None, len(x), f"fewer than 4 images: no interval; {how}")
    counts = np.array([len(x), len(y)])
    images, pairs = np.maximum(variances.mean(axis=0), 0).T
    half = 1.96 * float(np.sqrt((4 * images / counts + 2 * pairs / counts**2).sum() + deviation**2 / subsets))
    return Estimate.around(value, half, len(x), how)


def _variances(within: np.ndarray, between: np.ndarray) -> tuple[float, float]:
    """Return (z, w) of one set from its kernels (m, m) and those with the other set.

    h from m images has the variance z + w / m. Errors of h from separate halves are independent: their covariance is z.
    """
    size = len(within)
    np.fill_diagonal(within, 0)
    index, halves = np.arange(size), []
    for start, stop in ((0, size // 2), (size // 2, size)):
        others = stop - start - ((start <= index) & (index < stop))  # images in the half, without the row's own
        halves.append(within[:, start:stop].sum(axis=1) / others - between[:, start:stop].mean(axis=1))
    first, second = (values - values.mean() for values in halves)
    shared = (first * second).sum() / (size - 1)
    total = within.sum(axis=1) / (size - 1) - between.mean(axis=1)
    return float(shared), float(size * (total.var(ddof=1) - shared))


@one_thread()
def two_sample_test(real: np.ndarray, fake: np.ndarray, seed: int) -> Estimate:
    """Return the share of unseen images that a linear classifier assigns to the right set; 0.5 is chance.

    As Lopez-Paz and Oquab (2017): ridge regression to -1 and 1 on standardised features, with their number as penalty,
    on random halves of equal size of real (N, F) and fake (M, F). The interval covers the choice of test images.
    """
    rng, size = np.random.default_rng([seed, 5]), min(len(real), len(fake)) // 2
    if size < 2:
        return Estimate.missing("fewer than 4 images in a set")
    drawn = [rows[rng.permutation(len(rows))[: 2 * size]] for rows in (real, fake)]
    learned, tested = (torch.from_numpy(np.concatenate([x[part] for x in drawn])) for part in np.s_[:size, size:])
    mean, deviation = learned.mean(0), learned.std(0, correction=0)
    learned, tested = ((x - mean) / torch.where(deviation > 0, deviation, 1) for x in (learned, tested))
    target, features = torch.tensor([-1.0, 1.0]).repeat_interleave(size).double(), learned.shape[1]
    penalty = features * torch.eye(min(features, 2 * size), dtype=torch.float64)
    if features < 2 * size:
        weights = torch.linalg.solve(learned.T @ learned + penalty, learned.T @ target)
    else:
        weights = learned.T @ torch.linalg.solve(learned @ learned.T + penalty, target)
    correct = (tested @ weights > 0) == (target > 0)
    result = Estimate.binomial(float(correct.double().mean()), 2 * size, 2 * size)
    return replace(result, how=f"{result.how}: half of {4 * size} images, a linear classifier learned from the others")


def size_curve(real: np.ndarray, fake: np.ndarray, seed: int) -> tuple[dict[str, dict[str, float]], Estimate]:
    """Return mean "FID" and "KID" of disjoint parts of n, n/2 and n/4 images per side (n, F), and FID at infinity.

    The bias of a Frechet distance falls as 1 / n: a line fitted in 1 / n meets 0 at the distance of infinitely many
    images (Chong and Forsyth 2020), which may be negative. t interval over fifths of the images.
    """
    rng, size = np.random.default_rng([seed, 6]), len(fake)
    real, fake = real[rng.permutation(size)], fake[rng.permutation(size)]
    ranges = [(0, size), *((part * size // 5, (part + 1) * size // 5) for part in range(5 * (size >= 80)))]
    lengths = [[(stop - start) // parts for parts in (1, 2, 4)] for start, stop in ranges]
    jobs = [
        slice(start + part * length, start + (part + 1) * length)
        for (start, _), counts in zip(ranges, lengths, strict=True)
        for parts, length in zip((1, 2, 4), counts, strict=True)
        for part in range(parts)
    ]
    distances = np.array(on_all_cores(lambda part: frechet_of_rows(real[part], fake[part]), jobs)).reshape(-1, 7)
    kernels = [kernel_distance(real[part], fake[part], seed, subsets=1 + 9 * (size > 1000)).value for part in jobs[:7]]
    rows = [*distances, np.array(kernels)]
    *means, kernel_means = ([part.mean() for part in np.split(row, [1, 3])] for row in rows)  # of 1, 2 and 4 parts
    ends = [float(np.polyfit(1 / np.array(counts), row, 1)[1]) for counts, row in zip(lengths, means, strict=True)]
    curve = {
        str(number): {"FID": float(distance), "KID": float(kernel)}
        for number, distance, kernel in zip(lengths[0], means[0], kernel_means, strict=True)
    }
    if len(ranges) == 1:
        return curve, Estimate(ends[0], None, None, size, "no interval below 80 images")
    half = float(stats.t.ppf(0.975, 4) * np.std(ends[1:], ddof=1) / 5**0.5)
    return curve, Estimate.around(ends[0], half, size, "t interval over five fifths of the images")


def manifold_metrics(
    real: np.ndarray, fake: np.ndarray, k: int = NEIGHBOURS, block: int = 250, prompts: Any = None, seed: int = 0
) -> dict[str, Estimate]:
    """Return "precision", "recall", "density" and "coverage" of fake (M, F) features against real (N, F) ones.

    The ball of a sample reaches to its k-th nearest neighbour in its own set. precision: share of fake samples inside
    any real ball; recall: share of real samples inside any fake ball (Kynkaanniemi et al. 2019, k = 3; closed balls).
    density: mean number of real balls around a fake sample / k, about 1 for equal distributions; coverage: share of
    real balls that contain a fake sample (Naeem et al. 2020, k = 5; open balls).

    Intervals take the real samples as given. Precision and density are means over fake samples, resampled within their
    `prompts` (M,). Recall and coverage depend on numbers of samples, and repeated ones would shrink balls to points:
    they use a jackknife or, if no group changes them, a binomial interval. Raises UserError below k + 1 samples.
    """
    if not 1 <= k < min(len(real), len(fake)):
        got = f"{len(real)} real and {len(fake)} generated"
        raise UserError(f"precision and recall with k={k} need at least {k + 1} images in each set, got {got}")
    real, fake = finite(real, "real features"), finite(fake, "generated features")
    centre = real.mean(axis=0)  # keeps |a|^2 + |b|^2 - 2 a.b from cancelling if all features lie far from 0
    real, fake = real - centre, fake - centre
    slack = ROUNDING * max(np.square(features).sum(axis=1).max() for features in (real, fake))
    groups = JACKKNIFE_GROUPS if len(fake) >= max(2 * JACKKNIFE_GROUPS, 2 * k) else 1
    parts = np.array_split(np.random.default_rng([seed, 9]).permutation(len(fake)), groups)
    order, group_of = np.concatenate(parts), np.repeat(np.arange(groups), [len(part) for part in parts])
    fake, left = fake[order], range(groups if groups > 1 else 0)
    (real_radius,), fake_radius = _radii(real, k, block), _radii(fake, k, block, [group_of != group for group in left])

    def count(start: int) -> tuple[np.ndarray, ...]:
        distance = _squared_distances(fake[start : start + block], real)  # (block, N)
        inside, own_group = distance < real_radius - slack, group_of[start : start + block, None]
        recalled = [distance <= radius[start : start + block, None] + slack for radius in fake_radius]
        precise = (distance <= real_radius + slack).any(axis=1)
        recalled = [near & (own_group != group - 1) for group, near in enumerate(recalled)]
        covered = [inside, *(inside & (own_group != group) for group in left)]
        return precise, inside.sum(axis=1), *(np.any(hits, axis=1) for hits in (recalled, covered))

    precise, inside, recalled, covered = zip(*on_all_cores(count, range(0, len(fake), block)), strict=True)
    how, prompts = f"k = {k}; ", np.zeros(len(fake)) if prompts is None else prompts[order]

    def of_real(blocks: Sequence[np.ndarray]) -> Estimate:
        value, *left_out = np.any(blocks, axis=0).mean(axis=1).tolist()
        if not left_out:
            return Estimate(value, None, None, len(fake), f"no interval below {2 * JACKKNIFE_GROUPS} images")
        if not (half := jackknife_half_width(value, np.array(left_out), [len(part) for part in parts])):
            return Estimate.binomial(value, len(real), len(fake))
        how = f"jackknife over {groups} random groups of the generated images"
        return Estimate.around(value, half, len(fake), how, (0, 1))

    precise, inside = np.concatenate(precise), np.concatenate(inside) / k
    density = bootstrap_mean(inside, prompts, seed, resample_groups=False, share=False)
    if not inside.any():
        density = Estimate(0.0, None, None, len(fake), "no interval: no image lies in a ball")
    precision = bootstrap_mean(precise, prompts, seed, resample_groups=False)
    metrics = {"precision": precision, "recall": of_real(recalled), "density": density, "coverage": of_real(covered)}
    return {name: replace(estimate, how=how + estimate.how) for name, estimate in metrics.items()}


def _squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return squared distances (A, B) of rows of a (A, F) to rows of b (B, F)."""
    return np.square(a).sum(axis=1)[:, None] + np.square(b).sum(axis=1) - 2 * product(a, b)


def _radii(features: np.ndarray, k: int, block: int, parts: Sequence[np.ndarray] = ()) -> np.ndarray:
    """Return squared distances (1 + G, N) to the k-th nearest other row, of all and of each of G masks (N,) `parts`."""

    def radii(start: int) -> np.ndarray:
        distance = _squared_distances(features[start : start + block], features)
        rows = np.arange(len(distance))
        distance[rows, start + rows] = np.inf
        counted = (distance, *(distance[:, part] for part in parts))
        return np.stack([np.partition(columns, k - 1, axis=1)[:, k - 1] for columns in counted])

    return np.concatenate(on_all_cores(radii, range(0, len(features), block)), axis=1)


def pair_images(fake: Samples, real: Samples, seed: int) -> list[tuple[int, int]]:
    """Return (index of fake, of real) for every generated image whose caption has real images: the pairs of table 3.

    Real images of a caption are dealt out in an order that depends only on seed and caption, and reused if too few.
    """
    fakes, reals, pairs = defaultdict(list), defaultdict(list), []
    for groups, samples in ((fakes, fake), (reals, real)):
        for index in sorted(range(len(samples)), key=samples.__getitem__):
            groups[samples[index][1]].append(index)
    for caption, indices in fakes.items():
        random.Random(f"{seed} {caption}").shuffle(reals[caption])
        pairs += zip(indices, cycle(reals[caption]), strict=False)
    return pairs


def measure_fidelity(extractor: str, real: ImageSet, fake: ImageSet, parts: Sequence[np.ndarray], seed: int) -> dict:
    """Return distances of all real and generated images, and of `parts`, indices of both with equal prompt mixes."""

    def subsample(indices: np.ndarray) -> np.ndarray:
        if len(indices) <= PAIRWISE_IMAGES:
            return indices
        return np.sort(np.random.default_rng([seed, 2]).permutation(indices)[:PAIRWISE_IMAGES])

    ours, theirs = fake.rows[extractor], real.rows[extractor]
    everything = np.arange(len(theirs)), np.arange(len(ours))
    result = {"unmatched": {"n": len(ours), "n_real": len(theirs)}, "matched": {"n": len(parts[1])}}
    for name, (real_part, fake_part) in (("unmatched", everything), ("matched", parts)):
        if min(len(real_part), len(fake_part)) < 2:
            continue
        drawn = subsample(fake_part)
        x, y = theirs[subsample(real_part)], ours[drawn]
        subsets = 1 if max(len(x), len(y)) <= 1000 else 100
        pairwise = {"KID": kernel_distance(x, y, seed)}
        pairwise["MMD"] = kernel_distance(x, y, seed, subsets, kernel=gaussian_kernel)
        result[name]["FID"] = frechet(theirs, real_part, ours, fake_part, seed)
        if name == "matched" and len(x) >= 16:
            result[name]["C2ST"] = two_sample_test(x, y, seed)
            result[name]["curve"], result[name]["FID_infinity"] = size_curve(x, y, seed)
        if name == "matched" and len(x) > NEIGHBOURS:
            pairwise |= manifold_metrics(x, y, prompts=fake.groups[drawn], seed=seed)
        reduced = max(len(real_part), len(fake_part)) > PAIRWISE_IMAGES
        note = f"; {PAIRWISE_IMAGES} images drawn by the seed from each larger set" if reduced else ""
        result[name] |= {key: replace(estimate, how=estimate.how + note) for key, estimate in pairwise.items()}
    return result
