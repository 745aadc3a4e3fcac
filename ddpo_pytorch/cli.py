"""The entry point of every script: usage errors become one line and exit code 2. Light, so that --help is quick."""

import errno
import logging
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from absl import app, flags

from ddpo_pytorch.errors import UserError

# what the system says about places that a user chose: permissions, kinds of files, disks that are full or read-only
USER_ERRNOS = {
    *(errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.EISDIR),
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENAMETOOLONG),
}


def cli(main: Callable[[list[str]], None]) -> None:
    """Run a script's main under absl. Unusable flags and `UserError` become one line on stderr and exit code 2."""
    app.run(_reporting(main), flags_parser=_parse_flags)


def _parse_flags(argv: list[str]) -> list[str]:
    try:
        remaining = flags.FLAGS(argv)
        if "config" in flags.FLAGS:
            _ = flags.FLAGS.config.seed  # a configuration file that does not exist is noticed only here
        return remaining
    except (AttributeError, KeyError) as error:
        field = str(error.args[0] if error.args else error).strip().splitlines()[0]
        _fail(UserError(f"the configuration has no such field: {field}; config/base.py lists all of them"))
    except (flags.Error, UserError, TypeError, ValueError, OSError) as error:
        # several lines are a report of where it was looked for, or a traceback; the last one says what is wrong.
        _fail(UserError(str(error).strip().splitlines()[-1]))


def _reporting(main: Callable[[list[str]], None]) -> Callable[[list[str]], None]:
    def run(argv: list[str]) -> None:
        # absl has put its own handler in place by now; people read plain lines.
        level = logging.INFO if int(os.environ.get("RANK", "0")) == 0 else logging.WARNING
        logging.basicConfig(level=level, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
        logging.getLogger("httpx").setLevel(logging.WARNING)
        for name in ("diffusers", "transformers"):
            if library := sys.modules.get(name):
                library.utils.logging.disable_progress_bar()
        try:
            if len(argv) > 1:
                raise UserError(f"unexpected argument {argv[1]!r}; options are written --name=value")
            main(argv)
        except UserError as error:
            _fail(error)
        except OSError as error:
            if error.errno not in USER_ERRNOS:
                raise
            where = "" if error.filename is None else f": {error.filename!r}"
            _fail(UserError(f"{error.strerror}{where}; give another path, or change what is there"))

    return run


def _fail(error: BaseException) -> NoReturn:
    # an error from a data loader's worker arrives as the text of its whole traceback; its message stands at the end.
    message = str(error).rpartition("UserError: ")[2]
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(2)
