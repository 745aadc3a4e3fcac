"""Bootstrap replicates of means over images in prompts, from the sums of each prompt.

A replicate needs the sum of n resampled images of a prompt, not the images. Where images have few distinct values (0
and 1) that sum comes from one multinomial draw of their counts; else n images are drawn and summed, a few replicates at
a time. Either way 70,000 images and 2,000 replicates take seconds and little memory.
"""

from collections.abc import Sequence

import numpy as np

CHUNK = 2_000_000  # numbers drawn at a time
FEW = 8  # distinct values up to which counts are drawn


class Sample:
    """Values (N, V) of N images in G prompts (sorted by number), and what resampling needs of them.

    counts (G,), means (G, V), mean (V,): over all images. noise (G, V): variance of a prompt's resampled mean.
    """

    def __init__(self, values: np.ndarray, groups: np.ndarray):
        order = np.argsort(groups, kind="stable")
        self.groups, self.starts, self.counts = np.unique(groups[order], return_index=True, return_counts=True)
        self.images = len(values)
        self._values = values[order]
        self.means = np.add.reduceat(self._values, self.starts) / self.counts[:, None]
        self.mean = values.mean(axis=0)
        residuals = self._values - np.repeat(self.means, self.counts, axis=0)
        self.noise = np.add.reduceat(residuals**2, self.starts) / (self.counts**2)[:, None]
        self.weights = self.counts / self.images
        self._levels, self._shares = self._distinct(values, order)

    def _distinct(self, values: np.ndarray, order: np.ndarray) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Distinct rows (C, V) and their share in every prompt (G, C); None where there are many."""
        if len(np.unique(values[:1000], axis=0)) > FEW:
            return None, None
        levels, index = np.unique(values, axis=0, return_inverse=True)
        if len(levels) > FEW:
            return None, None
        prompts = np.repeat(np.arange(len(self.counts)), self.counts)
        cells = np.bincount(
            prompts * len(levels) + index.reshape(-1)[order], minlength=len(self.counts) * len(levels)
        ).reshape(len(self.counts), len(levels))
        return levels, cells / self.counts[:, None]

    @property
    def cost(self) -> int:
        """Random numbers of one replicate."""
        return self.images if self._levels is None else len(self.counts) * len(self._levels)

    def draw(self, prompts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Means (..., V) of as many images as each of these prompts (...) has, drawn from it with replacement."""
        counts = self.counts[prompts]
        if self._levels is not None:
            return rng.multinomial(counts, self._shares[prompts]) @ self._levels / counts[..., None]
        lengths = counts.reshape(-1)
        picks = rng.random(int(lengths.sum()))
        picks *= np.repeat(lengths, lengths)
        images = picks.astype(np.int64)
        images += np.repeat(self.starts[prompts].reshape(-1), lengths)
        ends = np.cumsum(lengths)
        sums = np.add.reduceat(self._values[images], ends - lengths)
        return sums.reshape(*prompts.shape, -1) / counts[..., None]


def replicate_means(
    samples: Sequence[Sample], seed: int | Sequence[int], *, resample_groups: bool, replicates: int
) -> list[np.ndarray]:
    """(replicates, V) bootstrap means over all images of each sample; samples have the same G prompts.

    Without `resample_groups`, every prompt keeps its place and its images are resampled. With it, G prompts are drawn
    with replacement (the same ones for all samples) and images within them. The spread of the prompts' means already
    holds the noise of their images, which the second step adds again; so the prompts' means are first pulled towards
    the overall mean such that both steps together have the variance of the first alone, or that of the images where it
    is larger (the shrinkage of the two-stage bootstrap, Davison and Hinkley 1997, section 3.8). Otherwise intervals are
    up to 1.4 times too wide where prompts hardly differ. As any bootstrap they are too narrow for few prompts: by 3 %
    for 20, by 11 % for 5.
    """
    rng, prompts = np.random.default_rng(seed), len(samples[0].counts)
    chunk = max(1, CHUNK // max(prompts, sum(sample.cost for sample in samples)))
    pull = _shrinkage(samples) if resample_groups else 1.0
    results: list[list[np.ndarray]] = [[] for _ in samples]
    for start in range(0, replicates, chunk):
        rows = min(chunk, replicates - start)
        drawn = np.broadcast_to(np.arange(prompts), (rows, prompts))
        if resample_groups:
            drawn = rng.integers(0, prompts, (rows, prompts))
        for sample, result in zip(samples, results, strict=True):
            own = sample.means[drawn]
            means = sample.draw(drawn, rng) - own + sample.mean + pull * (own - sample.mean)
            weights = sample.counts[drawn][..., None]
            result.append((weights * means).sum(axis=1) / weights.sum(axis=1))
    return [np.concatenate(result) for result in results]


def _shrinkage(samples: Sequence[Sample]) -> np.ndarray:
    """Factor (V,) for the prompts' deviations: sqrt(1 - images' variance / prompts' variance), at least 0.

    For two samples the variances are those of the difference of their means.
    """
    signs = (1,) if len(samples) == 1 else (-1, 1)
    parts = [
        sign * sample.weights[:, None] * (sample.means - sample.mean)
        for sign, sample in zip(signs, samples, strict=True)
    ]
    between = (sum(parts) ** 2).sum(axis=0)
    within = sum((sample.weights[:, None] ** 2 * sample.noise).sum(axis=0) for sample in samples)
    return np.sqrt(np.clip(1 - within / np.where(between > 0, between, np.inf), 0, 1)) * (between > 0)
