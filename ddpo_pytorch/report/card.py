"""The model card and data card, in the order of the FDA's scorecard for synthetic medical data.

Seven criteria (arXiv 2406.11143): congruence, coverage, constraint, completeness, compliance, comprehension,
consistency. Sentences state what metrics.json holds; what it does not hold is a marked gap for a person to fill.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ddpo_pytorch.report.cells import count, counted, dig, finite, in_folders, in_words, plain, share
from ddpo_pytorch.report.findings import apr_of, ceiling_sentences, main_judge
from ddpo_pytorch.report.headline import all_missing
from ddpo_pytorch.report.quality_sentences import copy_sentences, diversity_sentences, memorisation_sentences
from ddpo_pytorch.report.quality_tables import distance_name
from ddpo_pytorch.report.wording import wording_of

MINI = "assets/mini/"

FLAWS = {
    "identical_images": "Images identical to another one",
    "black_images": "Black images",
    "copies_of_training_images": "Images that are also among the training images",
    "near_copies_of_training_images": "Images that are copies or near copies of training images",
}


@dataclass(frozen=True)
class Entry:
    """A heading of the card, its sentences, and gaps that a person has to fill."""

    title: str
    sentences: list[str]
    gaps: Sequence[str] = ()


def model_card(result: Mapping, configs: Sequence[Mapping], embedded: int) -> list[Entry]:
    """Intended use, then the seven criteria.

    `configs`: settings of the training runs. `embedded`: number of real and training images that the page shows.
    """
    made = [
        Entry("Intended use", _use(result)),
        Entry("Congruence: like real images?", _congruence(result)),
        Entry("Coverage: their whole variety?", _coverage(result)),
        Entry("Constraint: what was asked for?", _constraint(result)),
        Entry("Completeness: what was measured?", _completeness(result)),
        _compliance(result, configs, embedded),
        Entry("Comprehension: what do the numbers not say?", _limits(result)),
        Entry("Consistency: the same again?", _consistency(result, configs)),
    ]
    return [entry for entry in made if entry.sentences or entry.gaps]


def _use(result: Mapping) -> list[str]:
    names = " and ".join(result.get("models") or {}) or "The models"
    return [sentence.format(names=names) for sentence in wording_of(result).use]


def _congruence(result: Mapping) -> list[str]:
    lines, judged = [], False
    for name, values in (result.get("models") or {}).items():
        for extractor, block in (values.get("fidelity") or {}).items():
            fid = dig(block, "matched", "FID")
            if finite(dig(fid, "value")) is not None:
                number = in_folders(dig(block, "matched", "n"), values.get("folders"))
                lines.append(
                    f"{name}: {distance_name(extractor)} {in_words(fid, plain, '.2f', 1)} ({extractor} features) on "
                    f"{number}, with equally many real and generated images of every caption."
                )
                judged |= extractor == "judge"
    if judged:
        lines.append(wording_of(result).caution)
    return lines or ["Likeness to real images was not measured."]


def _coverage(result: Mapping) -> list[str]:
    lines, models = [], result.get("models") or {}
    for name, values in models.items():
        numbers = values.get("images_by_prompt") or {}
        drawn = sum(bool(number) for number in numbers.values())
        if drawn:
            lines.append(f"{name} was sampled for {drawn} of the {len(numbers)} captions.")
    real = dig(result, "sets", "real", "images_by_prompt")
    if real is not None:
        absent = sum(not number for number in real.values())
        lines.append(f"Captions without a real image to compare with: {absent} of {len(real)}.")
    return lines + diversity_sentences(result)


def _constraint(result: Mapping) -> list[str]:
    judge, lines = main_judge(result), []
    for name, values in (result.get("models") or {}).items():
        apr = apr_of(values, judge)
        if finite(apr.get("value")) is not None:
            lines.append(wording_of(result).meaning.format(name=name, value=in_words(apr, share)))
    ceilings = ceiling_sentences(result)
    if lines and not ceilings:
        measure = wording_of(result).measure
        lines.append(f"The judge's own error on real images was not measured, so the ceiling of {measure} is unknown.")
    return lines + ceilings


def _completeness(result: Mapping) -> list[str]:
    lines = [f"Not measured: {name} ({reason})" for name, reason in all_missing(result).items()]
    return lines or ["metrics.json names nothing that could not be measured."]


def _compliance(result: Mapping, configs: Sequence[Mapping], embedded: int) -> Entry:
    sentences, gaps = [], []
    if any(MINI in str(dig(config, "pretrained", "model")) for config in configs):
        sentences.append("The trained runs began from the mini weights of the phantom world: no patient data.")
    else:
        gaps.append("training data of the generator, and its licence")
    if MINI in str(dig(result, "settings", "classifier")):
        sentences.append(
            f"The judge of {wording_of(result).measure} ({main_judge(result)}) has mini weights, trained on phantoms."
        )
    sentences.append(wording_of(result).licences)
    if embedded:
        sentences.append(
            f"This page holds {counted(embedded, 'thumbnail')} of real or training images: pass it on as their licence "
            "allows."
        )
    sentences += copy_sentences(result)
    if "train" in (result.get("sets") or {}):
        sentences += memorisation_sentences(result)
    else:
        sentences.append("Whether images repeat training images was not measured.")
    return Entry("Compliance: licences, privacy", sentences, gaps)


def _limits(result: Mapping) -> list[str]:
    lines = list(wording_of(result).limits)
    small = []
    for name, values in (result.get("models") or {}).items():
        number = _least_images(values)
        if number is not None and number < 2048:
            small.append(f"{name} ({in_folders(number, values.get('folders'))})")
    if small:
        lines.append(f"Below 2,048 images Frechet distances are strongly biased: {', '.join(small)}.")
    return lines


def _least_images(values: Mapping) -> int | None:
    """Of how few generated images a Frechet distance of this model was taken; where none was, its smallest folder."""
    parts = [block.get(kind) for block in (values.get("fidelity") or {}).values() for kind in ("matched", "unmatched")]
    numbers = [dig(part, "n") for part in parts if finite(dig(part, "FID", "value")) is not None]
    sizes = [folder.get("images") for folder in values.get("folders") or []] or [values.get("images")]
    return min((int(number) for number in numbers or sizes if finite(number) is not None), default=None)


def _consistency(result: Mapping, configs: Sequence[Mapping]) -> list[str]:
    lines = []
    for name, values in (result.get("models") or {}).items():
        folders = values.get("folders") or []
        seeds = [str(seed) for seed in (dig(f, "made_with", "seed") for f in folders) if seed is not None]
        if seeds:
            lines.append(f"{name}: generation seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)}.")
        elif folders:
            lines.append(f"{name}: {counted(len(folders), 'folder')}, no seed recorded.")
    if (seed := dig(result, "settings", "seed")) is not None:
        lines.append(f"Seed of the measurement: {seed}.")
    seeds = [str(config["seed"]) for config in configs if config.get("seed") is not None]
    if seeds:
        lines.append(f"Training seeds of the curves: {', '.join(seeds)}.")
    lines.append("Intervals cover the choice of images and prompts; they do not cover that of training seeds.")
    return lines


def data_card(result: Mapping, files: Mapping[str, str | Path | None]) -> list[Entry]:
    """Real and training images: where from, how many, which splits. `files`: an image file of "real" and of "train"."""
    made, sets = [], result.get("sets") or {}
    for key, title in (("real", "Real images"), ("train", "Training images")):
        if key not in sets:
            continue
        values = sets[key]
        by_prompt = values.get("images_by_prompt") or {}
        sentences = [f"{counted(values.get('images'), 'image')} in {values.get('path')}."]
        if any(by_prompt.values()):
            held = sum(bool(number) for number in by_prompt.values())
            sentences.append(f"They cover {held} of the {len(by_prompt)} captions.")
        for flaw, words in FLAWS.items():
            if values.get(flaw):
                sentences.append(f"{words}: {count(values[flaw])}.")
        shared = wording_of(result).shared
        gaps = [f"split (train, validation or test), and whether {shared} are shared between splits"]
        name = Path(files[key]).name if files.get(key) else ""
        origin = next((world for start, world in wording_of(result).origins.items() if name.startswith(start)), "")
        if origin:
            sentences.append(f"Files are named as those of {origin} ({name}).")
        else:
            gaps.insert(0, "source and licence")
        made.append(Entry(title, sentences, gaps))
    return made
