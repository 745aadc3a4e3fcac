"""What the numbers say, in sentences: who draws what prompts state, what the judge can know of it, what was lost."""

from collections.abc import Mapping

from ddpo_pytorch.report.cells import bounds, count, counted, dig, finite, in_words, plain, share
from ddpo_pytorch.report.quality_sentences import copy_sentences, diversity_sentences
from ddpo_pytorch.report.wording import DERMOSCOPIC, FUNDUS, Wording, difference_of, wording_of

# the least p of a test that flips the signs of G prompts is 2 / 2^G: above 0.05 for fewer than these
FEW_PROMPTS = 6


def main_judge(result: Mapping) -> str | None:
    """Name of the judge of APR: the first one; of Selector and Policy together, "fundus"."""
    if wording_of(result) is FUNDUS:
        return result["kind"]
    return next(iter(result.get("judges") or {}), None)


def apr_of(values: Mapping | None, judge: str | None) -> dict:
    """APR, or alignment, of a model or the real images as a quantity; without bounds if only the ratio was written."""
    for words in (DERMOSCOPIC, FUNDUS):
        if found := dig(values, "alignment", judge, words.key):
            return found
    return {"value": dig(values, "APR")}


def findings(result: Mapping) -> list[str]:
    """A claim a comparison and what it rests on, the main one first; else APR of each model; else that there is none.

    No sentence holds a path: why images are not pairs stands in the notes of the table below.
    """
    models, judge, sentences = result.get("models") or {}, main_judge(result), []
    words = wording_of(result)
    for one in result.get("comparisons") or []:
        if verdict(one):
            sentences += [_claim(one, models, judge, words), _basis(one)]
    if sentences:
        return sentences
    alone = []
    for name, values in models.items():
        apr = apr_of(values, judge)
        if finite(apr.get("value")) is not None:
            images = counted(values.get("images"), "image")
            alone.append(words.alone.format(value=in_words(apr, share), images=images, name=name))
    if alone:
        return [*alone, "There is no comparison of two models here."]
    return [words.unmeasured]


def verdict(comparison: Mapping) -> str:
    """better, worse, unclear (the interval contains 0, or interval and test disagree), unknown (no interval), or "".

    Tests count only where they give a p: at p >= 0.05 a difference whose interval lies beside 0 is still unclear.
    """
    difference = difference_of(comparison)
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


def _claim(comparison: Mapping, models: Mapping, judge: str | None, words: Wording) -> str:
    word, base, other = verdict(comparison), comparison["from"], comparison["to"]
    before, after = (share(_compared_apr(comparison, side, models, judge)) for side in ("from", "to"))
    difference = difference_of(comparison)
    points = plain(abs(difference["value"]), ".1f", 100)
    prompts = _shared_prompts(comparison, models)
    sides = words.claim.format(other=other, base=base, after=after, before=before) + prompts
    details = _bounds_and_tests(comparison)
    if word == "better":
        return f"{sides}: a gain of {points} percentage points{details}."
    if word == "worse":
        return f"{sides}: {other} got worse, by {points} percentage points{details}."
    if word == "unknown":
        return f"{sides}; without an interval, chance cannot be told from a difference{details}."
    reason = "whose interval contains 0"
    if not finite(difference["low"]) <= 0 <= finite(difference["high"]):
        reason = "on which interval and test disagree"
    signed = plain(difference["value"], "+.1f", 100)
    return f"{sides}: a difference of {signed} percentage points, {reason}; none can be claimed{details}."


def _compared_apr(comparison: Mapping, side: str, models: Mapping, judge: str | None) -> float | None:
    """APR over the images that are compared; older measurements give only that over all images of the model."""
    found = (finite(comparison.get(f"{side}_{words.key}")) for words in (DERMOSCOPIC, FUNDUS))
    compared = next((value for value in found if value is not None), None)
    return apr_of(models.get(comparison[side]), judge).get("value") if compared is None else compared


def _shared_prompts(comparison: Mapping, models: Mapping) -> str:
    """ ", over the N prompts that both have" where a model has more than these; else ""."""
    shared = finite(comparison.get("prompts"))
    numbers = [dig(models, comparison[side], "images_by_prompt") or {} for side in ("from", "to")]
    most = max(sum(bool(number) for number in own.values()) for own in numbers)
    if shared is None or shared >= most:
        return ""
    return (
        ", over the one prompt that both have" if shared == 1 else f", over the {count(shared)} prompts that both have"
    )


def _bounds_and_tests(comparison: Mapping) -> str:
    interval = bounds(difference_of(comparison), "+.1f", 100)
    parts = [f"95\u00a0% interval {interval}"] if interval else []
    parts += [f"{name} < 0.001" if p < 0.001 else f"{name} = {p:.3f}" for name, p in _tests(comparison).items()]
    return f" ({'; '.join(parts)})" if parts else ""


def _basis(comparison: Mapping) -> str:
    """What a claim rests on: the pairs, and the prompts where they are too few to speak for others."""
    if comparison.get("paired"):
        sentence = f"Compared: {counted(comparison.get('pairs'), 'pair')} from the same noise"
        if comparison.get("gained") is not None and comparison.get("lost") is not None:
            sentence += f", of which {count(comparison['gained'])} gained and {count(comparison['lost'])} lost"
        sentence += "."
    else:
        sentence = "The two models' images are not paired; the note under the table says why."
    prompts = finite(comparison.get("prompts"))
    if prompts is not None and prompts < FEW_PROMPTS and finite(comparison.get("p_by_prompt")) is None:
        these = "this one prompt" if prompts == 1 else f"these {count(prompts)} prompts"
        claimed = verdict(comparison) in ("better", "worse")
        only = f"The claim is about {these} only" if claimed else f"Compared were {these} only"
        sentence += f" {only}: with fewer than {FEW_PROMPTS}, no test over prompts has any power."
    return sentence


def pairing_note(comparison: Mapping) -> str:
    """Why the images of two models are not pairs, with the file that shows it; "" where they are."""
    if comparison.get("paired"):
        return ""
    reason = comparison.get("reason") or "no reason was recorded"
    return f"{comparison['to']} and {comparison['from']} are not paired: {reason}"


def remarks(result: Mapping) -> list[str]:
    """What must be known beside the main claim: the judge's ceiling, over-optimised reward, copies, lost diversity."""
    models, lines = result.get("models") or {}, ceiling_sentences(result)
    for comparison in result.get("comparisons") or []:
        rewards = [finite(dig(models, comparison[side], "reward")) for side in ("from", "to")]
        word = verdict(comparison)
        if None not in rewards and rewards[1] > rewards[0] and word in ("worse", "unclear"):
            rose, measure = word == "unclear" and difference_of(comparison)["value"] > 0, wording_of(result).measure
            apr = f"no gain in {measure} can be claimed" if rose else f"{measure} did not"
            lines.append(
                f"The reward rose from {rewards[0]:.3f} to {rewards[1]:.3f} while {apr}: {comparison['to']} may have "
                "learned the errors of the reward."
            )
    lines += copy_sentences(result)
    for name, values in models.items():
        if black := values.get("black_images"):
            are = "is black and is counted as it is" if black == 1 else "are black and are counted as they are"
            lines.append(f"{counted(black, 'image')} of {name} {are}.")
    return lines + [line for line in diversity_sentences(result) if "fell" in line][:1]


def ceiling_sentences(result: Mapping) -> list[str]:
    """How far the judge agrees with the captions of real images, once for all models with one mix of captions.

    Without any model's `ceiling`, the agreement with the real images as they are.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    words = wording_of(result)
    for name, values in (result.get("models") or {}).items():
        ceiling, held = values.get("ceiling"), finite(values.get("ceiling_share"))
        if finite(dig(ceiling, "value")) is not None:
            only = f" (as far as there are real ones: for {share(held)} of the images)" if partial(held) else ""
            groups.setdefault((only, in_words(ceiling, share)), []).append(name)
    if groups:
        return [
            words.ceiling.format(names=" and ".join(names), only=only, value=agreement)
            for (only, agreement), names in groups.items()
        ]
    real = apr_of(result.get("real"), main_judge(result))
    if finite(real.get("value")) is None:
        return []
    images = counted(dig(result, "real", "images"), "real image")
    return [words.ceiling_as_is.format(images=images, value=in_words(real, share))]


def partial(ceiling_share: float | None) -> bool:
    """Whether some of a model's images have captions without real images."""
    return ceiling_share is not None and ceiling_share < 1
