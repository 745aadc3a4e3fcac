"""Check settings: each script has a table of field -> `Range`, which `check_ranges` applies."""

import math
from collections.abc import Collection, Mapping
from numbers import Integral, Real
from typing import Any, NamedTuple

from ddpo_pytorch.utils.errors import UserError


class Range(NamedTuple):
    """Numbers in an interval, in mathematical notation: "(0, 1]" excludes 0 and includes 1.

    `whole` allows integers only. NaN and booleans are never inside, infinity only if the interval includes it.
    """

    interval: str
    whole: bool = False

    def __contains__(self, value: object) -> bool:
        if not isinstance(value, Integral if self.whole else Real) or isinstance(value, bool):
            return False
        low, high = self._bounds()
        above = low < value if self.interval[0] == "(" else low <= value
        return above and (value < high if self.interval[-1] == ")" else value <= high)

    def __str__(self) -> str:
        low, high = self._bounds()
        kind = "an integer" if self.whole else "a finite number" if self.interval.endswith("inf)") else "a number"
        if high < math.inf:
            return f"{kind} in {self.interval}"
        if low == -math.inf:
            return kind
        return f"{kind} above {low:g}" if self.interval[0] == "(" else f"{kind}, {low:g} or more"

    def _bounds(self) -> tuple[float, float]:
        low, _, high = self.interval[1:-1].partition(",")
        return float(low), float(high)


ONE_OR_MORE = Range("[1, inf)", whole=True)
UP_TO_A_MILLION = Range("[1, 1000000]", whole=True)  # for what is listed in memory
ZERO_OR_MORE = Range("[0, inf)", whole=True)
FINITE = Range("(-inf, inf)")
POSITIVE = Range("(0, inf)")
NOT_NEGATIVE = Range("[0, inf)")
SHARE = Range("[0, 1]")
BELOW_ONE = Range("[0, 1)")
SEED = Range("[0, 4294967295]", whole=True)  # NumPy's generators take 32 bits


def check_ranges(settings: Mapping[str, Any], ranges: Mapping[str, Range], prefix: str = "") -> None:
    """Raise UserError naming the first setting (a field, or "block.field" of a ConfigDict) that is outside its range.

    `prefix` goes before the names in the message, e.g. "sd." if `settings` is that block.
    """
    for name, allowed in ranges.items():
        if (value := settings[name]) not in allowed:
            raise UserError(f"{prefix}{name} is {value!r}; it must be {allowed}")


def check_choices(settings: Mapping[str, Any], choices: Mapping[str, Collection[str]], prefix: str = "") -> None:
    """Raise UserError naming the first setting that is not among its choices."""
    for name, allowed in choices.items():
        if (value := settings[name]) not in allowed:
            raise UserError(f"{prefix}{name} is {value!r}; allowed are {', '.join(allowed)}")


def check_pair(name: str, value: Any, allowed: Range) -> tuple[float, float]:
    """Return a setting of two ascending numbers. Raises UserError."""
    numbers = isinstance(value, tuple | list) and len(value) == 2 and all(one in allowed for one in value)
    if not numbers or value[0] >= value[1]:
        raise UserError(f"{name} is {value!r}; it must be two numbers, the lower one first, each {allowed}")
    return value[0], value[1]


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the fields of a configuration and of its blocks by dotted names."""
    fields: dict[str, Any] = {}
    for name, value in settings.items():
        fields |= flat(value, f"{prefix}{name}.") if hasattr(value, "items") else {prefix + name: value}
    return fields
