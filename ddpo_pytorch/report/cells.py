"""Numbers and tables as they stand on the page: text, interval, footnotes. Values stay as metric.py gave them."""

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

NOT_AVAILABLE = "n/a"
MINUS = "\u2212"


@dataclass(frozen=True)
class Cell:
    """A number as text, its 95 % interval in small type below, and the letter of a footnote."""

    text: str
    small: str = ""
    mark: str = ""


@dataclass(frozen=True)
class Head:
    """A header cell: text, small type below it, and how many columns it spans."""

    text: str
    small: str = ""
    span: int = 1


@dataclass
class Table:
    """A table of the page. `header` holds one or two rows of heads, the first column's head left out.

    `rows`: (head, cells). `notes`: footnotes, a letter each in their order. `wide`: many columns, for small type.
    """

    title: str
    corner: str
    header: Sequence[Sequence[Head]]
    rows: list[tuple[Head, list[Cell]]]
    text: str = ""
    notes: list[str] = field(default_factory=list)
    wide: bool = False

    @property
    def starts(self) -> set[int]:
        """Columns with which a group of the upper header row begins; empty for a header of one row."""
        ends = itertools.accumulate(head.span for head in self.header[0])
        return (
            {end - head.span for end, head in zip(ends, self.header[0], strict=True)} if len(self.header) > 1 else set()
        )

    def note(self, reason: str) -> str:
        """The letter of the footnote with this text, added where it is new."""
        if reason not in self.notes:
            self.notes.append(reason)
        return letter(self.notes.index(reason))


def letter(index: int) -> str:
    """a, b, ..., z, aa, bb, ... for 0, 1, ..."""
    return chr(ord("a") + index % 26) * (index // 26 + 1)


def finite(value: Any) -> float | None:
    """The value as a float; None for None, NaN, infinity and what is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def plain(value: Any, form: str = ".2f", scale: float = 1.0) -> str:
    """`scale * value` in `form` with a true minus sign, or "n/a"."""
    number = finite(value)
    return NOT_AVAILABLE if number is None else format(number * scale, form).replace("-", MINUS)


def percent(ratio: Any, form: str = ".2f") -> str:
    """A ratio in percent, without the sign."""
    return plain(ratio, form, 100)


def share(ratio: Any) -> str:
    """A ratio in percent, for a sentence."""
    text = percent(ratio, ".1f")
    return text if text == NOT_AVAILABLE else f"{text}\u00a0%"


def count(value: Any) -> str:
    """An integer with thousands set apart, or "n/a"."""
    return NOT_AVAILABLE if finite(value) is None else f"{int(value):,}"


def counted(value: Any, noun: str) -> str:
    """A number of things: "1 image", "2 images"; the noun's plural takes an s."""
    return f"{count(value)} {noun}{'' if finite(value) == 1 else 's'}"


def in_folders(number: Any, folders: Sequence[Mapping] | None, least: bool = False) -> str:
    """`number` images of one folder: "512 images", or "3 folders of 512 images" where a model has several.

    `least`: the number is that of the smallest folder, and others may hold more.
    """
    folders = folders or []
    if len(folders) < 2:
        return counted(number, "image")
    more = " or more" if least and len({folder.get("images") for folder in folders}) > 1 else ""
    return f"{len(folders)} folders of {counted(number, 'image')}{more}"


def bounds(quantity: Mapping | None, form: str = ".2f", scale: float = 1.0) -> str:
    """The interval "[low, high]" of a quantity {"value", "low", "high", ...}; "" where it has none."""
    low, high = (finite((quantity or {}).get(key)) for key in ("low", "high"))
    return "" if low is None or high is None else f"[{plain(low, form, scale)}, {plain(high, form, scale)}]"


def estimate(quantity: Mapping | None, form: str = ".2f", scale: float = 1.0, ends: str = "") -> Cell:
    """A quantity as a cell; `ends` is the form of the interval's ends where columns are many."""
    return Cell(plain((quantity or {}).get("value"), form, scale), bounds(quantity, ends or form, scale))


def in_words(quantity: Mapping | None, show: Callable[[Any], str], form: str = ".1f", scale: float = 100) -> str:
    """A quantity for a sentence: value, and its interval in brackets."""
    interval = bounds(quantity, form, scale)
    return show((quantity or {}).get("value")) + (f" {interval}" if interval else "")


def dig(tree: Any, *keys: Any) -> Any:
    """tree[k1][k2]..., or None where a level is absent or null."""
    for key in keys:
        if not isinstance(tree, Mapping) or tree.get(key) is None:
            return None
        tree = tree[key]
    return tree


def methods(quantities: Iterable[Mapping | None]) -> str:
    """How the intervals of these quantities were made, each way once; "" without any.

    Ways that differ in numbers only ("exact binomial, 24 trials", "..., 16 trials") are one, with dots for the numbers.
    """
    ways = defaultdict(set)
    for quantity in quantities:
        if quantity and quantity.get("how") and bounds(quantity):
            ways[re.sub(r"\d[\d.,e+-]*\b", "\u2026", quantity["how"])].add(quantity["how"])
    return "; ".join(next(iter(texts)) if len(texts) == 1 else pattern for pattern, texts in ways.items())


def union(mappings: Iterable[Mapping | None]) -> list:
    """The keys of several mappings, each once, in the order in which they appear."""
    return list(dict.fromkeys(key for mapping in mappings for key in mapping or {}))
