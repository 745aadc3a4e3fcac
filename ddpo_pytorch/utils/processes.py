"""What one of several processes does for all of them."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.files import locked


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


@contextmanager
def locked_by_main(accelerator: Accelerator, folder: str | Path, instead: str = "another logdir") -> Iterator[None]:
    """Keep a folder for this command, whose main process locks it (`files.locked`); every process calls this.

    Where another command has the folder, all of them end, as in `on_main`.
    """
    with ExitStack() as held:
        on_main(accelerator, held.enter_context, locked(folder, instead))
        yield
