"""The only exception that users should ever see, and helpers for its messages."""

from collections.abc import Mapping
from typing import Any


class UserError(Exception):
    """An error in the command, the configuration or a file.

    The message is one line: what was given, what is allowed, and what to do. Scripts print it and exit with code 2
    (`ddpo_pytorch.utils.cli.cli`); any other exception is a bug and keeps its traceback.
    """


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Return "name=before, now it is after" of the first name, alphabetically, whose values differ, or "".

    Of two lists, names the first element that differs, "<name>[<number>]", or else their lengths.
    """
    for name in sorted({*old, *new}):
        before, now = old.get(name), new.get(name)
        if before == now:
            continue
        if name not in old:  # written by an earlier version of this program
            return f"{name}=(not recorded), now it is {shorten(now)}"
        if isinstance(before, list | tuple) and isinstance(now, list | tuple):
            different = [index for index, pair in enumerate(zip(before, now, strict=False)) if pair[0] != pair[1]]
            if not different:
                return f"length of {name}={len(before)}, now it is {len(now)}"
            name, before, now = f"{name}[{different[0]}]", before[different[0]], now[different[0]]
        return f"{name}={shorten(before)}, now it is {shorten(now)}"
    return ""


def describe_value(value: Any) -> str:
    """Return the type of a value, with shape or types of elements, for an error message."""
    kind = type(value).__name__
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"a {kind} of shape {tuple(value.shape)} and type {value.dtype}"
    if isinstance(value, tuple | list):
        return f"a {kind} of {len(value)} ({', '.join(sorted({type(one).__name__ for one in value})) or 'empty'})"
    return f"{shorten(value)} ({kind})"


def one_line(error: BaseException, length: int = 200) -> str:
    """Return the message of an error, or its type if there is none, as one line of up to `length` characters."""
    return " ".join(str(error).split())[:length] or type(error).__name__


def shorten(value: Any) -> str:
    """Return the representation of a value, in up to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
