"""Results of reader studies on the rating page; intervals resample images and take the readers as given."""

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from ddpo_pytorch.data.ratings import fleiss_kappa, ordinal_alpha
from ddpo_pytorch.metrics.intervals import Estimate, bootstrap_mean, jackknife
from ddpo_pytorch.rating.store import Answer, Question

TITLES = {"rate": "Ratings by experts", "real": "Photograph or generated?", "pair": "Preferences of readers"}
ANSWERED = ("rating", "quality", "alignment")
ALL = "all readers"


def mean_over_images(values: Iterable[tuple[Question, float]]) -> Estimate:
    """Average (question, value) pairs over the readers of each question, then over questions."""
    by_question = defaultdict(list)
    for question, value in values:
        by_question[question].append(float(value))
    means = np.array([statistics.fmean(ratings) for ratings in by_question.values()])
    if len(means) and np.isin(means, (0, 1)).all():
        return Estimate.binomial(means.mean(), len(means), len(means))
    return bootstrap_mean(means, np.zeros(len(means)), 0, resample_groups=False)


def agreement(measure: Callable[[list], float | None], answers: Sequence[Answer], column: str) -> Estimate:
    """Return a measure in [-1, 1] of the agreement in a column between readers of the same image."""
    units = defaultdict(list)
    for answer in answers:
        if answer.cells[column]:
            units[answer.question].append(float(answer.cells[column]))
    several = [unit for unit in units.values() if len(unit) > 1]
    if not several or measure(several) is None:
        return Estimate.missing("no image has two readers, or all answers are equal")
    if all(len(set(unit)) == 1 for unit in several):  # of which no jackknife sees how rare disagreement is
        return Estimate(measure(several), None, None, len(several), "no interval: all readers agree")
    return jackknife(lambda rows: measure([several[i] for i in rows]) or 0.0, len(several), 0, (-1, 1))


def summarise(
    answers: Sequence[Answer], mode: str, seconds: Callable, synthetic: Mapping[Question, bool], names: Sequence = ()
) -> dict[str, dict[str, Estimate]]:
    """Return estimates by reader, all readers together last, and by title.

    seconds(reader): times between a reader's answers. synthetic: whether a question's image is generated (mode "real").
    names: of the sources of images and of their rivals (mode "pair"); an answer of 3 prefers the image to its rival.
    """
    first = [answer for answer in answers if not answer.repeat]
    known = {(answer.reader, answer.question): answer.cells for answer in first}
    readers = list(dict.fromkeys(answer.reader for answer in first))
    estimates: dict[str, dict[str, Estimate]] = {}
    for reader in [*readers, ALL] if len(readers) > 1 else readers:
        chosen, result = [answer for answer in answers if reader in (ALL, answer.reader)], {}
        once = [(answer.question, float(answer.cells["rating"])) for answer in chosen if not answer.repeat]
        if mode == "real":
            result["accuracy"] = mean_over_images((q, (r < 2) == synthetic[q]) for q, r in once)
        if mode == "pair":
            result[f"{names[1]} preferred to {names[0]}"] = mean_over_images((q, (3 - r) / 2) for q, r in once)
        if again := [(answer, known.get((answer.reader, answer.question))) for answer in chosen if answer.repeat]:
            same = [(answer.question, all(answer.cells[c] == b[c] for c in ANSWERED)) for answer, b in again if b]
            result["same answer to repeated images"] = mean_over_images(same)
        if reader != ALL and (times := seconds(reader)):
            how = "median, of this reader's answers alone"
            result["seconds an image"] = Estimate(statistics.median(times), None, None, len(times), how)
        estimates[reader] = result
    if len(readers) > 1 and mode == "rate":
        for column in ANSWERED[1:] if any(answer.cells["quality"] for answer in first) else ANSWERED[:1]:
            estimates[ALL][f"Krippendorff's alpha, {column}"] = agreement(ordinal_alpha, first, column)
    elif len(readers) > 1:
        estimates[ALL]["Fleiss' kappa"] = agreement(fleiss_kappa, first, "rating")
    return estimates


def lines(estimates: Mapping[str, Mapping[str, Estimate]]) -> list[str]:
    """Return each estimate as a line of text."""
    shown = []
    for reader, result in estimates.items():
        for name, estimate in result.items():
            value = "not known" if estimate.value is None else f"{estimate.value:.2f}"
            ends = f"({estimate.how})" if estimate.low is None else f"[{estimate.low:.2f}, {estimate.high:.2f}]"
            shown.append(f"{reader}, {name}: {value} {ends}, n = {estimate.n}")
    return shown


def preferences(answers: Sequence[Answer]) -> list[tuple[str, str, str, str]]:
    """Return (prompt, chosen, rejected, rater) of each answer with a preference, without hidden repeats."""
    rows = []
    for image, prompt, rival, answer in ((*answer.question, answer) for answer in answers if not answer.repeat):
        if (rating := float(answer.cells["rating"])) != 2:
            rows.append((prompt, *((image, rival) if rating > 2 else (rival, image)), answer.reader))
    return rows
