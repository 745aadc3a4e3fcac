"""Blocks of a configuration that may be changed in ways that ConfigDict does not allow: see config/base.py."""

import ast
from collections.abc import Mapping
from typing import Any

from absl import flags
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder
from ml_collections.config_flags import register_flag_parser_for_type


class Configuration(ConfigDict):
    """A configuration in which a dict may take the place of a block, as configurations of ddpo-pytorch write it."""

    def __setitem__(self, key: str, value: Any) -> None:
        old = self[key] if key in self else None
        super().__setitem__(key, _converted(type(old), value) if isinstance(old, ConfigDict) else value)


class KeywordArguments(ConfigDict):
    """Keyword arguments of functions that users add, whose names config/base.py cannot know.

    The block is never locked: config files may set fields that do not exist yet (config.reward_fn_kwargs.my_reward.x =
    1), and so may the command line. Whoever calls the functions checks the names.
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
            self[key] = placeholder(object)  # the command line may give any literal
        return super().get_type(key)

    def update_from_flattened_dict(self, flattened_dict: Mapping[str, Any], strip_prefix: str = "") -> None:
        for key in flattened_dict:
            block, dot, _ = key.removeprefix(strip_prefix).partition(".")
            if key.startswith(strip_prefix) and dot:
                getattr(self, block)
        super().update_from_flattened_dict(flattened_dict, strip_prefix)


class OptionalBlock(ConfigDict):
    """A block that None switches off, in a config file or on the command line."""


class _OptionalBlockParser(flags.ArgumentParser):
    def parse(self, argument: Any) -> Any:
        try:
            value = ast.literal_eval(argument) if isinstance(argument, str) else argument
        except (SyntaxError, ValueError):
            value = argument
        if not isinstance(value, dict | ConfigDict | None):
            raise ValueError(f"{argument!r} is neither None nor a dict")
        return value


register_flag_parser_for_type(OptionalBlock, _OptionalBlockParser())


def _converted(kind: type[ConfigDict], value: Any) -> Any:
    """Return a dict, or a block of another class, as a block of class `kind`; anything else as it is."""
    if not isinstance(value, dict | ConfigDict) or isinstance(value, kind):
        return value
    block = kind()
    for name, inner in value.items():
        block[name] = inner
    return block
