"""How a user's mistake is refused."""

import pytest

from ddpo_pytorch.utils.errors import UserError


def refused(message: str, function, /, *arguments, **named) -> None:
    """Assert that the call raises a `UserError` of one line that matches `message`."""
    with pytest.raises(UserError, match=message) as caught:
        function(*arguments, **named)
    assert "\n" not in str(caught.value), caught.value
