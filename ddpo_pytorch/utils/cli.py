"""Entry point of every script, paths, and blocks of config/base.py. Imports little, to keep --help fast."""

import argparse
import ast
import errno
import importlib
import inspect
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_dict import placeholder
from ml_collections.config_flags import register_flag_parser_for_type

from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.settings import flat

USER_ERRNOS = {  # of paths that the user chose: permissions, wrong kinds of files, full or read-only disks
    *(errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.EISDIR),
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENAMETOOLONG),
}
flags.disclaim_key_flags()  # so that --help lists flags defined here as those of the script


def define_config(script: str, help_text: str, default: str = "config/base.py") -> flags.FlagValues:
    """Define --config for a script, given its `__file__`; return all flags. `default` is relative to its repository."""
    with _usage_errors():  # without --config, this already reads the overrides on the command line
        config_flags.DEFINE_config_file("config", str(Path(script).resolve().parents[1] / default), help_text)
    return flags.FLAGS


def import_function(path: str, setting: str) -> Callable:
    """Import "module:function" for a setting, also from the current folder. Raises UserError if that fails."""
    module, _, name = path.partition(":")
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        function = getattr(importlib.import_module(module), name)
        if not callable(function):
            raise TypeError("it is not a function")
        return function
    except (ImportError, AttributeError, TypeError, ValueError) as error:  # TypeError: "./file.py" as a relative import
        raise UserError(f"{setting}: {path!r} cannot be imported ({error}); give module:function") from error
    finally:
        sys.path.remove(folder)  # the module may have put others before it


def signature_of(function: Callable) -> inspect.Signature:
    """Return a function's signature; one written in C without any (`dict`, `int`) counts as taking all arguments."""
    try:
        return inspect.signature(function)
    except ValueError:
        return inspect.signature(lambda *values, **named: None)


def cli(main: Callable[[list[str]], None]) -> None:
    """Run a script's main under absl. Invalid flags and `UserError` become one line on stderr and exit code 2."""

    def run(argv: list[str]) -> None:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            value, least = os.environ.get(name, "1"), 1 if name.endswith("SIZE") else 0
            if not (value.isdecimal() and int(value) >= least) and (name, value) != ("LOCAL_RANK", "-1"):
                _fail(
                    f"the environment variable {name} is {value!r}; launchers set whole numbers from {least}. Unset it"
                )
        # plain lines instead of absl's; only warnings from processes other than the first
        level = logging.INFO if int(os.environ.get("RANK", "0")) == 0 else logging.WARNING
        logging.basicConfig(level=level, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
        logging.getLogger("httpx").setLevel(logging.WARNING)
        for name in ("diffusers", "transformers"):
            if library := sys.modules.get(name):
                library.utils.logging.disable_progress_bar()
        with _one_line_errors():
            if len(argv) > 1:
                raise UserError(f"unexpected argument {argv[1]!r}; options are written --name=value")
            main(argv)

    app.run(run, flags_parser=_parse_flags)


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """End the process with one line for `UserError`, errors of the user's paths, and lost processes."""
    try:
        yield
    except UserError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except RuntimeError as error:
        if (reason := _lost_process(str(error))) is None:
            raise
        _fail(reason)
    except OSError as error:
        if error.errno not in USER_ERRNOS:
            raise
        where = "" if error.filename is None else f": {error.filename!r}"
        _fail(f"{error.strerror}{where}; give another path, or change what is there")


def _parse_flags(argv: list[str]) -> list[str]:
    with _usage_errors():
        if "config" not in flags.FLAGS:
            return flags.FLAGS(argv)
        remaining = flags.FLAGS(_find_config(argv))
        if not isinstance(flags.FLAGS.config, ConfigDict):  # reads the configuration file
            raise UserError("get_config() of the --config file must return a configuration, as in config/base.py")
        _ = flags.FLAGS.config.seed
        return remaining


@contextmanager
def _usage_errors() -> Iterator[None]:
    """End the process with one line for invalid flags, fields and values."""
    try:
        yield
    except (AttributeError, KeyError) as error:
        cause = error.args[0] if error.args else error
        field = cause.args[0] if isinstance(cause, KeyError) and cause.args else cause  # its str() would be quoted
        field = str(field).replace(" Did you", "; did you")  # ml_collections' suggestion
        _fail(f"the configuration has no field {field} (config/base.py lists all of them)")
    except (flags.Error, UserError, IndexError, TypeError, ValueError, OSError) as error:
        text = str(error).strip().splitlines()[-1]  # the last line of a search report or traceback states the cause
        if re.search(r"index out of range|not a valid index|indices must be", text):  # --config.eval.prompts[0]=x
            text = f"an option sets a part of a value ({text}); set the whole value, --config.FIELD=VALUE"
        _fail(text)


def _find_config(argv: list[str]) -> list[str]:
    """Return the command line with an existing file in --config=FILE:NAME.

    A relative path is looked up in the current folder, then in the script's repository.
    """
    found = list(argv)
    for index, word in enumerate(argv):
        option, equals, given = word.partition("=")
        if option not in ("-config", "--config") or (not equals and index + 1 == len(argv)):
            continue  # absl reports a missing value
        if not equals:
            index, given = index + 1, argv[index + 1]
        file, colon, name = given.partition(":")
        tried = [Path(expand(file)), Path(argv[0]).resolve().parents[1] / expand(file)]
        path = next((path for path in tried if path.is_file()), None)
        if path is None:
            neither = " nor ".join(repr(str(path)) for path in tried)
            raise UserError(f"--config={given}: neither {neither} exists; give FILE.py:EXPERIMENT")
        found[index] = (f"{option}=" if equals else "") + f"{path}{colon}{name}"
    return found


def _lost_process(message: str) -> str | None:
    """Translate a torch.distributed error about a lost process; return None for other errors."""
    rank = os.environ.get("RANK", "0")
    if re.search(r"Connection (closed|reset) by peer", message) and "gloo" in message:
        return f"process {rank} has lost another process, which has ended; see its own message for the cause"
    if waited := re.search(r"(?:Timed out waiting|wait timeout after|Timeout\(ms\)=)\s*(\d+)", message):
        option = "--config.process_timeout" if "config" in flags.FLAGS else "--process_timeout"
        waiting = f"process {rank} waited {int(waited[1]) / 1000:g} s for another process"
        reason = "which is still working or has ended; if it is working, raise process_timeout"
        return f"{waiting}, {reason}: {option}=SECONDS"
    return None


def _fail(message: str) -> NoReturn:
    # the error of a data loader's worker arrives as a traceback text that ends with the message
    message = message.rpartition("UserError: ")[2]
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(2)


def expand(path: str) -> str:
    """Expand a leading "~" or "~user". Raises UserError for an unknown user, instead of creating a folder "~user"."""
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise UserError(f"{path!r}: this system has no user {path.split('/')[0][1:]!r}; write ./{path} for a folder")
    return expanded


def expand_config(config: ConfigDict, *required: str) -> ConfigDict:
    """Expand every path of a configuration in place, and return it.

    Every string that starts with "~" counts as a path, since keyword arguments of rewards may have any name; strings in
    tuples are prompts and stay. Raises UserError if `base_log_path`, or a field of `required` (dotted names), is empty.
    """
    texts = (name for name, value in flat(config).items() if isinstance(value, str))
    for name in ("base_log_path", *texts):  # the root first: other paths are derived from it
        try:
            expanded = expand(config[name])
        except UserError as error:
            raise UserError(f"{name}={error}") from error
        if expanded != config[name]:
            config.update_from_flattened_dict({name: expanded})
        if name in ("base_log_path", *required):
            _check_given(expanded, name, f"--config.{name}")
    return config


def expand_flags(values: Any, required: tuple[str, ...], optional: tuple[str, ...] = ()) -> None:
    """Expand path flags of absl in place. Raises UserError for one of `required` that is given but empty."""
    for name in (*required, *optional):
        if (given := getattr(values, name)) is not None:
            setattr(values, name, expand(given))
            if name in required:
                _check_given(given, f"--{name}", f"--{name}")


def add_path(parser: argparse.ArgumentParser, name: str, optional: bool = False, **keywords: Any) -> None:
    """Add a path argument: it is expanded, and an empty one is rejected unless it is `optional`."""

    def convert(text: str) -> str:
        try:
            if not optional:
                _check_given(text, name, name)
            return expand(text)
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    keywords |= {"default": ""} if optional else {"required": True}
    parser.add_argument(name, type=convert, **keywords)


def run_command(parser: argparse.ArgumentParser, run: Callable[..., Any], arguments: Sequence[str] | None) -> None:
    """Parse arguments and pass them to `run` by name, logging to stdout; errors end the process as in `cli`."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    with _one_line_errors():
        run(**vars(parser.parse_args(arguments)))


def _check_given(path: str, name: str, option: str) -> None:
    if not path.strip():
        raise UserError(f"{name} is empty; give {option}=PATH (. is the current folder)")


class Configuration(ConfigDict):
    """A configuration that accepts a dict in place of a block, as in configurations of ddpo-pytorch.

    A dict changes the fields that it names, but replaces a block of keyword arguments. A ConfigDict replaces any block.
    """

    def __setitem__(self, key: str, value: Any) -> None:
        old = self[key] if key in self else None
        if isinstance(old, ConfigDict) and isinstance(value, dict) and not isinstance(old, KeywordArguments):
            old.update(value)
        else:
            super().__setitem__(key, _converted(type(old), value) if isinstance(old, ConfigDict) else value)


class KeywordArguments(ConfigDict):
    """Keyword arguments of user-defined functions, whose names config/base.py cannot know.

    The block is never locked: config files and the command line can set new fields
    (config.reward_fn_kwargs.my_reward.x = 1). The names are checked when the functions are called.
    """

    def lock(self) -> "KeywordArguments":
        return self

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, _converted(KeywordArguments, value))

    def __getattr__(self, name: str) -> Any:
        if name not in self and not name.startswith("_"):
            self[name] = KeywordArguments()
        return super().__getattr__(name)

    def get_type(self, key: str) -> type:
        if key not in self:
            self[key] = placeholder(object)  # accepts any literal on the command line
        return super().get_type(key)

    def update_from_flattened_dict(self, flattened_dict: Mapping[str, Any], strip_prefix: str = "") -> None:
        for key in flattened_dict:
            block, dot, _ = key.removeprefix(strip_prefix).partition(".")
            if key.startswith(strip_prefix) and dot:
                getattr(self, block)
        super().update_from_flattened_dict(flattened_dict, strip_prefix)


class OptionalBlock(ConfigDict):
    """A block that can be disabled by None, in a config file or on the command line."""


class _OptionalBlockParser(flags.ArgumentParser):
    def parse(self, argument: Any) -> Any:
        with suppress(SyntaxError, ValueError):  # a text that is no literal, or a value of a config file
            argument = ast.literal_eval(argument)
        if not isinstance(argument, dict | ConfigDict | None):
            raise ValueError(f"{argument!r} is neither None nor a dict")
        return argument


register_flag_parser_for_type(OptionalBlock, _OptionalBlockParser())


def _converted(kind: type[ConfigDict], value: Any) -> Any:
    """Return a dict, or a block of another class, as an unlocked block of class `kind`; anything else unchanged."""
    is_other = isinstance(value, dict | ConfigDict) and not isinstance(value, kind)
    return kind(value).unlock() if is_other else value
