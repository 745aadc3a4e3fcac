"""JSON from files that a crash, a person or a stranger may have changed: parsed, checked, and refused in one line."""

import json
import math
from pathlib import Path
from typing import Any

from ddpo_pytorch.utils.errors import UserError

COUNT = range(2**53)  # the shape of an integer of 0 or more; 2**53 is the limit up to which a float counts exactly
DEEPEST = 64  # levels of lists and objects; files of this program have fewer than 10
ADVICE = "restore it from a copy, or move it away"


class OneOf(tuple):
    """A shape of which each element is an allowed alternative."""


def read_json(path: str | Path, shape: Any = dict, advice: str = ADVICE) -> Any:
    """Return the content of a JSON file, as `parse_json` does. OSError where it cannot be read."""
    path = Path(path)
    return parse_json(path.read_bytes(), shape, repr(str(path)), advice)


def parse_json(text: str | bytes, shape: Any, source: str, advice: str = ADVICE) -> Any:
    """Parse JSON and check it against a shape; raise UserError that names `source` and the first value at fault.

    A shape is a type (float: any finite number), a range of integers, None, `OneOf` of several shapes, `[shape]` for a
    list, a tuple of shapes for a list of exactly these, `{str: shape}` for an object with any names, or `{"name":
    shape, "name?": shape}` for one that has at least these names, those with a question mark if it likes.

    Refused whatever the shape: names that appear twice in an object, more than DEEPEST levels, integers beyond 64
    bits and text that is not Unicode. NaN and infinity are refused where the shape has a number.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_int=_int64)
        problem = _unusable(value)
    except RecursionError:
        problem = "it is nested too deeply"
    except ValueError as error:
        problem = f"it is not JSON: {' '.join(str(error).split())[:200]}"
    if problem:
        raise UserError(f"{source} is damaged ({problem}); {advice}")
    return checked(value, shape, source, advice)


def checked(value: Any, shape: Any, source: str, advice: str = ADVICE) -> Any:
    """Return a value that has been parsed already. Raises UserError, as `parse_json` does, for another shape."""
    if problem := _mismatch(value, shape):
        raise UserError(f"{source} is damaged ({problem}); {advice}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{_shown(next(name for name in names if names.count(name) > 1))} appears twice")
    return found


def _int64(digits: str) -> int:
    if len(digits) > 20 or not -(2**63) <= int(digits) < 2**64:
        raise ValueError(f"the integer {_shown(digits)} has more than 64 bits")
    return int(digits)


def _unusable(value: Any) -> str | None:
    """Return what is wrong with a value of any shape, or None."""
    level, depth = [value], 0
    while level:
        if (depth := depth + 1) > DEEPEST:
            return f"it is nested more than {DEEPEST} levels deep"
        for text in (part for part in level if isinstance(part, str) and not part.isascii()):
            try:
                text.encode()
            except UnicodeEncodeError:
                return f"{_shown(text)} is not Unicode"
        inner = []
        for part in level:
            if isinstance(part, dict):
                inner += [*part, *part.values()]
            elif isinstance(part, list):
                inner += part
        level = inner
    return None


def _mismatch(value: Any, shape: Any, name: str = "") -> str | None:
    """Return how a value differs from a shape, or None. `name` is where the value stands."""
    if isinstance(shape, OneOf):
        return None if any(_mismatch(value, one) is None for one in shape) else _mismatch(value, shape[0], name)
    if isinstance(shape, dict) and isinstance(value, dict):
        if str in shape:
            return _first(_mismatch(part, shape[str], _inside(name, key)) for key, part in value.items())
        if lacking := [key for key in shape if not key.endswith("?") and key not in value]:
            return f"{_inside(name, lacking[0])} is missing"
        known = {key.removesuffix("?"): part for key, part in shape.items()}
        return _first(_mismatch(value[key], part, _inside(name, key)) for key, part in known.items() if key in value)
    if isinstance(shape, list) and isinstance(value, list):
        return _first(_mismatch(part, shape[0], f"{name}[{number}]") for number, part in enumerate(value))
    if isinstance(shape, tuple) and isinstance(value, list) and len(value) == len(shape):
        parts = zip(value, shape, strict=True)
        return _first(_mismatch(part, one, f"{name}[{number}]") for number, (part, one) in enumerate(parts))
    if _fits(value, shape):
        return None
    return f"{name or 'it'} is {_shown(value)} instead of {_described(shape)}"


def _fits(value: Any, shape: Any) -> bool:
    if isinstance(value, bool):
        return shape is bool
    if shape is float:
        return isinstance(value, int | float) and math.isfinite(value)
    if isinstance(shape, range):
        return isinstance(value, int) and value in shape
    if shape is None:
        return value is None
    return isinstance(shape, type) and isinstance(value, shape)


def _described(shape: Any) -> str:
    if isinstance(shape, range):
        return f"an integer from {shape[0]} to {shape[-1]}"
    if isinstance(shape, tuple):
        return f"a list of {len(shape)}"
    if isinstance(shape, dict | list):
        shape = type(shape)
    names = {dict: "an object", list: "a list", float: "a finite number", int: "an integer", str: "a text"}
    return names.get(shape, str(shape))


def _first(problems: Any) -> str | None:
    return next((problem for problem in problems if problem), None)


def _inside(name: str, key: str) -> str:
    return f"{name}.{_shown(key)}" if name else _shown(key)


def _shown(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
