"""The captions of a report: the 32 of ISIC, or, of other images, those that its sets hold."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from ddpo_pytorch.data.isic import CAPTIONS, short_caption

SHOWN = 8


def vocabulary_of(captions: Iterable[str]) -> tuple[str, ...]:
    """All ISIC captions in the official order if there are no others among these, else these, sorted; "" is none."""
    held = {caption for caption in captions if caption}
    return CAPTIONS if held <= set(CAPTIONS) else tuple(sorted(held))


def in_order(captions: Iterable[str]) -> list[str]:
    """Each caption once: ISIC's in the official order, then others by name."""
    held = set(captions)
    return [caption for caption in CAPTIONS if caption in held] + sorted(held - set(CAPTIONS))


def lacking_images(folder: str | Path, captions: Iterable[str]) -> str:
    """Return the warning that a folder has no image of these captions."""
    ordered = in_order(captions)
    return f"{folder} has no image of {len(ordered)} of its captions: {listed(ordered)}"


def listed(captions: Sequence[str]) -> str:
    """Captions in a sentence: ISIC's in few letters, all of them; of others the first few, and how many more."""
    if set(captions) <= set(CAPTIONS):
        return ", ".join(map(short_caption, captions))
    more = f" and {len(captions) - SHOWN} more" if len(captions) > SHOWN else ""
    return ", ".join(repr(caption) for caption in captions[:SHOWN]) + more
