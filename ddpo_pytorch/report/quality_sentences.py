"""What the numbers say of spread, of nearness to training images and of copies, in sentences."""

from collections.abc import Mapping

from ddpo_pytorch.report.cells import bounds, count, counted, dig, finite, in_words, plain, share

# counts of a folder, and what is said of one such image and of several
COPIES = {
    "copies_of_training_images": ("is pixel for pixel a training image", "are pixel for pixel training images"),
    "near_copies_of_training_images": ("is a near copy of a training image", "are near copies of training images"),
    "copies_of_real_images": ("is pixel for pixel a real image", "are pixel for pixel real images"),
    "near_copies_of_real_images": ("is a near copy of a real image", "are near copies of real images"),
}


def pairs_of_models(result: Mapping) -> list[tuple[str, str]]:
    """(from, to) of the comparisons; without any, the first model with each of the others."""
    models = list(result.get("models") or {})
    named = [(one["from"], one["to"]) for one in result.get("comparisons") or []]
    named = [pair for pair in named if set(pair) <= set(models)]
    return named or [(models[0], other) for other in models[1:]]


def diversity_sentences(result: Mapping) -> list[str]:
    """For each pair of models and each measure of spread, how it changed, and whether the intervals overlap."""
    models, lines = result.get("models") or {}, []
    for base, other in pairs_of_models(result):
        for what, keys, form in _spreads(models[base]):
            before, after = dig(models[base], *keys), dig(models[other], *keys)
            values = [finite(dig(one, "value")) for one in (before, after)]
            if None in values:
                continue
            same = plain(values[0], form) == plain(values[1], form)  # as far as digits are shown
            words = "is the same" if same else "fell" if values[1] < values[0] else "rose"
            change = f"from {in_words(before, _as(form), form, 1)} to {in_words(after, _as(form), form, 1)}"
            overlap = _overlap(before, after)
            lines.append(f"From {base} to {other}, {what} {words}, {change}{overlap}.")
    return lines


def _as(form: str):
    return lambda value: plain(value, form)


def _spreads(values: Mapping) -> list[tuple[str, tuple, str]]:
    spreads = []
    for extractor in values.get("diversity") or {}:
        spreads.append((f"the Vendi score ({extractor})", ("diversity", extractor, "vendi"), ".2f"))
        spreads.append((f"the pairwise distance ({extractor})", ("diversity", extractor, "pairwise_distance"), ".4g"))
    return [*spreads, ("LPIPS within prompts", ("perception", "LPIPS_within"), ".3f")]


def _overlap(first: Mapping, second: Mapping) -> str:
    if not bounds(first) or not bounds(second):
        return ""
    apart = first["high"] < second["low"] or second["high"] < first["low"]
    return "; the intervals do not overlap" if apart else "; the intervals overlap"


def memorisation_sentences(result: Mapping) -> list[str]:
    """For each model and extractor: the share of images nearer to training images than real ones are.

    That there is no copy is said too; where there are some, `copy_sentences` says so.
    """
    lines = []
    for name, values in (result.get("models") or {}).items():
        for extractor, found in (values.get("memorisation") or {}).items():
            closer, threshold, copies = found.get("share_closer"), finite(found.get("threshold")), found.get("copies")
            sentence = ""
            if finite(dig(closer, "value")) is not None and threshold is not None:
                more = finite(closer.get("low")) is not None and closer["low"] > 0.01
                sentence = (
                    f"{in_words(closer, share)} of the images are closer to a training image than {threshold:.4g}, the "
                    f"distance below which 1\u00a0% of held-out real images are{'; that is more' if more else ''}. "
                )
            if copies == 0 == _copies(values, "copies_of_training_images"):
                sentence += "No image is pixel for pixel a training image."
            if sentence:
                lines.append(f"{name} ({extractor}): {sentence.strip()}")
    return lines


def copy_sentences(result: Mapping) -> list[str]:
    """For each model with images that are, or nearly are, training or real images: how many."""
    lines = []
    for name, values in (result.get("models") or {}).items():
        found, parts = {key: _copies(values, key) for key in COPIES}, []
        for key, number in found.items():
            exact = found[key.removeprefix("near_")] if key.startswith("near_") else 0
            included = ", exact ones included" if 0 < exact <= number else ""
            if number:
                parts.append(f"{count(number)} {COPIES[key][number > 1]}{included}")
        if parts:
            lines.append(f"Of {counted(values.get('images'), 'image')} of {name}, {'; '.join(parts)}.")
    return lines


def _copies(values: Mapping, key: str) -> int:
    """A count of `COPIES` over a model's folders; that of training images also from `memorisation`."""
    number = sum(int(finite(folder.get(key)) or 0) for folder in values.get("folders") or [])
    if key == "copies_of_training_images":
        blocks = (values.get("memorisation") or {}).values()
        number = max([number, *(int(finite(dig(block, "copies")) or 0) for block in blocks)])
    return number
