"""What one of several processes does for all of them."""

import sys
from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ddpo_pytorch.errors import UserError


def on_main(accelerator: Accelerator, function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function` returns on the main process, on every process; where it fails there, all of them end.

    The others wait meanwhile. The main process raises what `function` raised (UserError or OSError), the others exit
    with code 2 and say nothing.
    """
    value, failure = None, None
    if accelerator.is_main_process:
        try:
            value = function(*arguments)
        except (UserError, OSError) as error:
            failure = error
    value, failed = broadcast_object_list([value, failure is not None])
    if failure is not None:
        raise failure
    if failed:
        sys.exit(2)  # the main process says why
    return value
