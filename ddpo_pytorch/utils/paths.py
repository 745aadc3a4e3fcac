"""Paths as users write them: "~" is a home folder, and an empty path never means the current folder."""

import argparse
import os
from collections.abc import Iterator
from functools import partial
from typing import Any

from ml_collections import ConfigDict

from ddpo_pytorch.utils.errors import UserError


def expand(path: str) -> str:
    """Return `path` with a leading "~" or "~user" replaced by that user's home folder.

    Raises UserError where there is no such user, instead of naming a folder "~user".
    """
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise UserError(f"{path!r}: this system has no user {path.split('/')[0][1:]!r}; write ./{path} for a folder")
    return expanded


def expand_config(config: ConfigDict, *required: str) -> ConfigDict:
    """Expand every path of a configuration in place, and return it.

    Every text that begins with "~" is taken to be a path, since the keyword arguments of rewards have any name; texts
    within tuples are prompts and stay as they are. Raises UserError for `base_log_path`, or a field of `required` (by
    its dotted name), that is empty.
    """
    _expand_field(config, "base_log_path")  # first: other paths are derived from it
    for name in _texts(config):
        _expand_field(config, name)
    for name in ("base_log_path", *required):
        _check_given(config[name], name, f"--config.{name}")
    return config


def expand_flags(values: Any, required: tuple[str, ...], optional: tuple[str, ...] = ()) -> None:
    """Expand the paths among absl's flags in place. Raises UserError for one of `required` that is given and empty."""
    for name in (*required, *optional):
        if (given := getattr(values, name)) is not None:
            setattr(values, name, expand(given))
            if name in required:
                _check_given(given, f"--{name}", f"--{name}")


def add_path(parser: argparse.ArgumentParser, name: str, optional: bool = False, **keywords: Any) -> None:
    """Add an argument that is a path: expanded, and refused where it is empty unless it is `optional`."""
    keywords |= {"default": ""} if optional else {"required": True}
    parser.add_argument(name, type=partial(_argument, name=name, optional=optional), **keywords)


def _argument(text: str, name: str, optional: bool) -> str:
    try:
        if not optional:
            _check_given(text, name, name)
        return expand(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _check_given(path: str, name: str, option: str) -> None:
    if not path.strip():
        raise UserError(f"{name} is empty; give {option}=PATH (. is the current folder)")


def _expand_field(config: ConfigDict, name: str) -> None:
    try:
        expanded = expand(config[name])
    except UserError as error:
        raise UserError(f"{name}={error}") from error
    if expanded != config[name]:
        config.update_from_flattened_dict({name: expanded})


def _texts(config: ConfigDict, prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of all fields that hold a text."""
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            yield from _texts(value, f"{prefix}{name}.")
        elif isinstance(value, str):
            yield prefix + name
