"""Statistics of the metrics by a number of PyTorch's threads, as JSON: `python thread_statistics.py THREADS`."""

import json
import sys

import numpy as np
import torch

from ddpo_pytorch.judges.classifier_report import Report
from ddpo_pytorch.metrics import diversity, fidelity, memorisation


def statistics(threads: int) -> dict[str, list[str]]:
    torch.set_num_threads(threads)
    rng, found = np.random.default_rng(0), {}
    for count, width in ((500, 700), (63, 1280)):  # sizes at which products by several threads differ
        x, y = rng.standard_normal((count, width)), rng.standard_normal((count, width)) + 0.1
        parts = [fidelity.moments(part) for part in np.array_split(x, 3)]
        real = fidelity.moments(y)
        frechet, kid = fidelity.frechet_jackknife(parts, real), fidelity.kernel_distance(x, y, 0, subsets=3)
        spread = diversity.within_prompt_diversity(x, np.arange(count) % 9, 7, 0, replicates=20).values()
        found[count] = [frechet.value, frechet.low, fidelity.frechet_distance(parts[0], real), kid.value, kid.high]
        near = fidelity.manifold_metrics(x, y, block=100).values()
        found[count] += [estimate.high for estimate in (*near, *spread)]
        found[count] += [memorisation.nearest(x, y, block=100)[0].sum()]
    labels = torch.tensor(rng.integers(0, 2, (3000, 1)))
    report = Report(labels + torch.tensor(rng.standard_normal((3000, 1))), labels, ("hair",), resamples=50)
    found["ece"] = [value for row in report.rows for value in row.values()]
    return {str(key): [str(value) for value in values] for key, values in found.items()}


if __name__ == "__main__":
    print(json.dumps(statistics(int(sys.argv[1]))))
