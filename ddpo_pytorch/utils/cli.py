"""The entry point of every script: usage errors become one line and exit code 2. Light, so that --help is quick."""

import errno
import logging
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from absl import app, flags
from ml_collections import config_flags

from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.paths import expand

# what the system says about places that a user chose: permissions, kinds of files, disks that are full or read-only
USER_ERRNOS = {
    *(errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.EISDIR),
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENAMETOOLONG),
}


flags.disclaim_key_flags()  # --help lists what is defined here as a flag of the script


def define_config(script: str, help_text: str) -> None:
    """Define the flag --config of a script (its `__file__`), by default config/base.py of the script's repository."""
    base = Path(script).resolve().parents[1] / "config" / "base.py"
    config_flags.DEFINE_config_file("config", str(base), help_text)


def _find_config(argv: list[str]) -> list[str]:
    """Return the command line with an existing file in --config=FILE:NAME.

    A relative one is looked for where the user stands, then in the repository of the script.
    """
    found = list(argv)
    for place, word in enumerate(argv):
        option, equals, given = word.partition("=")
        if option not in ("-config", "--config"):
            continue
        if not equals:
            if place + 1 == len(argv):
                break  # absl says that a value is missing
            place, given = place + 1, argv[place + 1]
        file, colon, name = given.partition(":")
        path = Path(expand(file))
        own = Path(argv[0]).resolve().parents[1] / path
        if not path.is_file():
            if not own.is_file():
                tried = f"{str(path)!r} nor {str(own)!r}"
                raise UserError(f"--config={given}: there is neither {tried}; give FILE.py:EXPERIMENT")
            path = own
        found[place] = (f"{option}=" if equals else "") + f"{path}{colon}{name}"
    return found


def cli(main: Callable[[list[str]], None]) -> None:
    """Run a script's main under absl. Unusable flags and `UserError` become one line on stderr and exit code 2."""
    app.run(_reporting(main), flags_parser=_parse_flags)


def _parse_flags(argv: list[str]) -> list[str]:
    try:
        remaining = flags.FLAGS(_find_config(argv) if "config" in flags.FLAGS else argv)
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
        except RuntimeError as error:
            if (reason := _lost_process(str(error))) is None:
                raise
            _fail(UserError(reason))
        except OSError as error:
            if error.errno not in USER_ERRNOS:
                raise
            where = "" if error.filename is None else f": {error.filename!r}"
            _fail(UserError(f"{error.strerror}{where}; give another path, or change what is there"))

    return run


def _lost_process(message: str) -> str | None:
    """Return what an error of torch.distributed means to a user; None for other errors."""
    rank = os.environ.get("RANK", "0")
    if re.search(r"Connection (closed|reset) by peer", message) and "gloo" in message:
        return f"process {rank} has lost another one, which has ended; what that one says is the cause"
    if waited := re.search(r"(?:Timed out waiting|wait timeout after|Timeout\(ms\)=)\s*(\d+)", message):
        option = "--config.process_timeout" if "config" in flags.FLAGS else "--process_timeout"
        return (
            f"process {rank} waited {int(waited[1]) / 1000:g} s for another one, which still worked or has ended; if "
            f"it worked, raise process_timeout: {option}=SECONDS"
        )
    return None


def _fail(error: BaseException) -> NoReturn:
    # an error from a data loader's worker arrives as the text of its whole traceback; its message stands at the end.
    message = str(error).rpartition("UserError: ")[2]
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(2)
