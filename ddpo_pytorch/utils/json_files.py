"""Parse and check JSON files that a crash or a stranger may have changed; errors are one line."""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ddpo_pytorch.utils.errors import UserError, one_line, shorten

COUNT = range(2**53)  # shape of an integer of 0 or more; floats are exact up to 2**53
DEEPEST = 64  # levels of nesting; files of this program have fewer than 10
SURROGATE = re.compile("[\ud800-\udfff]")  # half of a character
ADVICE = "restore it from a copy, or move it away"
TYPES = {dict: "an object", list: "a list", float: "a finite number", int: "an integer", str: "a text"}


class OneOf(tuple):
    """A shape that allows any of its elements."""


def read_json(path: str | Path, shape: Any = dict, advice: str = ADVICE) -> Any:
    """Return the content of a JSON file, as `parse_json` does. Raises OSError if it cannot be read."""
    path = Path(path)
    return parse_json(path.read_bytes(), shape, repr(str(path)), advice)


def parse_json(text: str | bytes, shape: Any, source: str, advice: str = ADVICE) -> Any:
    """Parse JSON and check it against a shape. Raises UserError naming `source` and the first bad value.

    A shape is a type (float: any finite number), a range of integers, None, `OneOf` several shapes, `[shape]` for a
    list, a tuple of shapes for a list of exactly these, `{str: shape}` for an object with any names, or `{"name":
    shape, "name?": shape}` for an object with at least these names; a question mark makes one optional.

    Always rejected: repeated names in an object, more than DEEPEST levels, integers beyond 64 bits and text that is not
    Unicode. NaN and infinity are rejected where the shape has a number.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_int=_int64)
        _check_any(value, 0)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else one_line(error)
        raise UserError(f"{source} is damaged (it is not usable JSON: {reason}); {advice}") from error
    return check_shape(value, shape, source, advice)


def check_shape(value: Any, shape: Any, source: str, advice: str = ADVICE) -> Any:
    """Return `value`, which was parsed from JSON. Raises UserError, as `parse_json` does, if it has another shape."""
    if problem := _mismatch(value, shape, ""):
        raise UserError(f"{source} is damaged ({problem}); {advice}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"{shorten(name)} appears twice")
    return result


def _int64(digits: str) -> int:
    if len(digits) > 20 or not -(2**63) <= int(digits) < 2**64:
        raise ValueError(f"the integer {shorten(digits)} has more than 64 bits")
    return int(digits)


def _check_any(value: Any, depth: int) -> None:
    """Raise for a value that is unusable whatever the shape."""
    if depth == DEEPEST:
        raise RecursionError
    if isinstance(value, str) and not value.isascii() and SURROGATE.search(value):
        raise ValueError(f"{shorten(value)} is not Unicode")
    if isinstance(value, dict | list):
        for part in (*value, *value.values()) if isinstance(value, dict) else value:
            _check_any(part, depth + 1)


def _mismatch(value: Any, shape: Any, name: str) -> str | None:
    """Return how a value differs from a shape, or None. `name` is the value's position, e.g. "'files'[3]"."""
    children: Iterable[tuple[Any, Any, str]]  # values, their shapes and positions
    if isinstance(shape, OneOf):
        return None if any(_mismatch(value, one, name) is None for one in shape) else _mismatch(value, shape[0], name)
    if isinstance(value, list) and isinstance(shape, list):
        shape = tuple(shape * len(value))
    if isinstance(value, dict) and isinstance(shape, dict):
        prefix = f"{name}." if name else ""
        known = {key.removesuffix("?"): part for key, part in shape.items() if key is not str}
        if missing := [key for key in shape if key is not str and key[-1] != "?" and key not in value]:
            return f"{prefix}{shorten(missing[0])} is missing"
        if str in shape:
            known = dict.fromkeys(value, shape[str])
        children = ((value[key], part, f"{prefix}{shorten(key)}") for key, part in known.items() if key in value)
    elif isinstance(value, list) and isinstance(shape, tuple) and len(shape) == len(value):
        children = ((part, shape[number], f"{name}[{number}]") for number, part in enumerate(value))
    elif _fits(value, shape):
        return None
    else:
        return f"{name or 'it'} is {shorten(value)} instead of {_describe(shape)}"
    return next(filter(None, (_mismatch(*child) for child in children)), None)


def _fits(value: Any, shape: Any) -> bool:
    if isinstance(value, bool):  # an int to Python
        return shape is bool
    if shape is float:
        return isinstance(value, int | float) and math.isfinite(value)
    if isinstance(shape, range):
        return isinstance(value, int) and value in shape
    return value is None if shape is None else isinstance(shape, type) and isinstance(value, shape)


def _describe(shape: Any) -> str:
    if isinstance(shape, range):
        return f"an integer from {shape[0]} to {shape[-1]}"
    if isinstance(shape, tuple):
        return f"a list of {len(shape)}"
    return TYPES.get(type(shape) if isinstance(shape, dict | list) else shape, str(shape))
