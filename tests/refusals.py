"""Faulty input, which ends with one line."""

import re
from collections.abc import Callable, Sequence

import pytest

from ddpo_pytorch.utils.errors import UserError


def refused(said: str | Sequence[str], call: Callable, /, *arguments: object, **fields: object) -> str:
    """Assert that the call raises a UserError of one line with what is `said`, a regular expression or several texts.

    Return its message.
    """
    with pytest.raises(UserError) as caught:
        call(*arguments, **fields)
    message = str(caught.value)
    assert "\n" not in message
    assert re.search(said, message) if isinstance(said, str) else all(text in message for text in said), message
    return message
