"""What the numbers say, in sentences: who draws what prompts state, what was lost for it, how near training images."""

from collections.abc import Mapping

from ddpo_pytorch.report.cells import bounds, count, dig, finite, in_words, plain, share


def main_judge(result: Mapping) -> str | None:
    """Name of the judge of APR: the first one."""
    return next(iter(result.get("judges") or {}), None)


def apr_of(values: Mapping | None, judge: str | None) -> dict:
    """APR of a model, or of the real images, as a quantity; without bounds where only the ratio was written."""
    return dig(values, "alignment", judge, "APR") or {"value": dig(values, "APR")}


def findings(result: Mapping) -> list[str]:
    """One sentence a comparison, the main one first; else the APR of each model; else that there is none."""
    models, judge = result.get("models") or {}, main_judge(result)
    sentences = [_compared(one, models, judge) for one in result.get("comparisons") or []]
    sentences = [sentence for sentence in sentences if sentence]
    if sentences:
        return sentences
    alone = []
    for name, values in models.items():
        apr = apr_of(values, judge)
        if finite(apr.get("value")) is not None:
            alone.append(
                f"The judge finds in {in_words(apr, share)} of {count(values.get('images'))} images of {name} exactly "
                "the artifacts that the prompt states."
            )
    if alone:
        return [*alone, "There is no comparison of two models here."]
    return ["APR was not measured: nothing can be said about how often images show what their prompts state."]


def verdict(comparison: Mapping) -> str:
    """better, worse, unclear (the interval contains 0, or interval and test disagree), unknown (no interval), or "".

    Tests count only where they give a p: at p >= 0.05 a difference whose interval lies beside 0 is still unclear.
    """
    difference = comparison.get("APR") or {}
    value, low, high = (finite(difference.get(key)) for key in ("value", "low", "high"))
    if value is None:
        return ""
    if low is None or high is None:
        return "unknown"
    if low <= 0 <= high or any(p >= 0.05 for p in _tests(comparison).values()):
        return "unclear"
    return "better" if low > 0 else "worse"


def _tests(comparison: Mapping) -> dict[str, float]:
    """p over images and, where metric.py gives it, over prompts, whose images are not independent."""
    named = {"p": finite(comparison.get("p")), "p over prompts": finite(comparison.get("p_by_prompt"))}
    return {name: p for name, p in named.items() if p is not None}


def _compared(comparison: Mapping, models: Mapping, judge: str | None) -> str:
    word = verdict(comparison)
    if not word:
        return ""
    base, other = comparison["from"], comparison["to"]
    before, after = (share(apr_of(models.get(name), judge).get("value")) for name in (base, other))
    difference = comparison["APR"]
    points = plain(abs(difference["value"]), ".1f", 100)
    sides = f"{other} shows what its prompt states in {after} of its images, {base} in {before}"
    details = _evidence(comparison)
    if word == "better":
        return f"{sides}: a gain of {points} percentage points ({details})."
    if word == "worse":
        return f"{sides}: {other} got worse, by {points} percentage points ({details})."
    if word == "unknown":
        return f"{sides}; without an interval, chance cannot be told from a difference ({details})."
    reason = "whose interval contains 0"
    if not finite(difference["low"]) <= 0 <= finite(difference["high"]):
        reason = "on which interval and test disagree"
    signed = plain(difference["value"], "+.1f", 100)
    return f"{sides}: a difference of {signed} percentage points, {reason}; none can be claimed ({details})."


def _evidence(comparison: Mapping) -> str:
    interval = bounds(comparison["APR"], "+.1f", 100)
    parts = [f"95\u00a0% interval {interval}"] if interval else []
    parts += [f"{name} < 0.001" if p < 0.001 else f"{name} = {p:.3f}" for name, p in _tests(comparison).items()]
    if comparison.get("paired"):
        pair = f"{count(comparison.get('pairs'))} pairs from the same noise"
        if comparison.get("gained") is not None and comparison.get("lost") is not None:
            pair += f", of which {count(comparison['gained'])} gained and {count(comparison['lost'])} lost"
        parts.append(pair)
    else:
        parts.append(f"not paired: {comparison.get('reason') or 'no reason was recorded'}")
    return "; ".join(parts)


def pairs_of_models(result: Mapping) -> list[tuple[str, str]]:
    """(from, to) of the comparisons; without any, the first model with each of the others."""
    models = list(result.get("models") or {})
    named = [(one["from"], one["to"]) for one in result.get("comparisons") or []]
    named = [pair for pair in named if set(pair) <= set(models)]
    return named or [(models[0], other) for other in models[1:]]


def remarks(result: Mapping) -> list[str]:
    """What must be known beside the main sentence: the judge's own error, over-optimised reward, lost diversity."""
    models, judge, lines = result.get("models") or {}, main_judge(result), []
    ceiling = apr_of(result.get("real"), judge)
    if finite(ceiling.get("value")) is not None:
        lines.append(
            f"On {count(dig(result, 'real', 'images'))} real images the same judge agrees with the caption in "
            f"{in_words(ceiling, share)}: the rest is its own error."
        )
    for comparison in result.get("comparisons") or []:
        rewards = [finite(dig(models, comparison[side], "reward")) for side in ("from", "to")]
        if None not in rewards and rewards[1] > rewards[0] and verdict(comparison) in ("worse", "unclear"):
            lines.append(
                f"The reward rose from {rewards[0]:.3f} to {rewards[1]:.3f} while APR did not: {comparison['to']} may "
                "have learned the errors of the reward."
            )
    black = {name: values.get("black_images") or 0 for name, values in models.items()}
    lines += [f"{count(n)} images of {name} are black and are counted as they are." for name, n in black.items() if n]
    return lines + [line for line in diversity_sentences(result) if "fell" in line][:1]


def diversity_sentences(result: Mapping) -> list[str]:
    """For each pair of models and each measure of spread, how it changed, and whether the intervals overlap."""
    models, lines = result.get("models") or {}, []
    for base, other in pairs_of_models(result):
        for what, keys, form in _spreads(models[base]):
            before, after = dig(models[base], *keys), dig(models[other], *keys)
            values = [finite(dig(one, "value")) for one in (before, after)]
            if None in values:
                continue
            words = "is the same" if values[0] == values[1] else "fell" if values[1] < values[0] else "rose"
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
    """For each model and extractor: the share of images nearer to training images than real ones are, and copies."""
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
            if copies is not None:
                number = (
                    "No image is" if copies == 0 else "1 image is" if copies == 1 else f"{count(copies)} images are"
                )
                sentence += f"{number} pixel for pixel a training image."
            if sentence:
                lines.append(f"{name} ({extractor}): {sentence.strip()}")
    return lines
