"""The one exception a user should ever read."""

from collections.abc import Mapping
from typing import Any


class UserError(Exception):
    """Something in the command, the configuration or a file is not usable.

    The message is one line: what was given, what is allowed, and what to do. Scripts turn it into that line on standard
    error and exit code 2 (`ddpo_pytorch.run.cli`); everything else keeps its traceback, because it is a defect.
    """


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[str, str, str] | None:
    """The first name, alphabetically, whose values differ between two settings, and both values, cut to be read."""
    for name in sorted({*old, *new}):
        if old.get(name) != new.get(name):
            return name, _short(old.get(name)), _short(new.get(name))
    return None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
