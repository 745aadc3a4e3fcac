"""Prompt functions, chosen by name: `prompt_fn` and `prompt_fn_kwargs` of a configuration.

Each returns one `(prompt, metadata)`. Metadata of an ISIC caption is `{"label": [hair, gel_bubble, ruler, ink, MEL,
NV]}` (0/1), otherwise `{}`; rewards receive it. To add a set, write such a function and enter it in `PROMPTS`, and in
`PROMPT_LISTS` if eval.py is to run over the whole of it.
"""

import inspect
import random
import unicodedata
from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

from ddpo_pytorch.data import fundus
from ddpo_pytorch.data.isic import CAPTIONS, labels_of
from ddpo_pytorch.errors import UserError

Prompt = tuple[str, dict[str, Any]]


class UniformSource(Protocol):
    """`random.Random` or `numpy.random.Generator`: the one method of both that is used here."""

    def random(self) -> float: ...


def isic_all(rng: UniformSource | None = None) -> Prompt:
    """One of the 32 ISIC captions, uniformly."""
    return _describe(_choose(CAPTIONS, rng))


def isic_all_idx(idx: int, rng: UniformSource | None = None) -> Prompt:
    """Caption number `idx` in [0, 32) of the official order; `rng` is accepted and unused. UserError out of range."""
    if not 0 <= idx < len(CAPTIONS):
        raise UserError(f"prompt index {idx} is out of range; isic_all_idx takes 0 to {len(CAPTIONS) - 1}")
    return _describe(CAPTIONS[idx])


def from_file(
    path: str | Path, low: int | None = None, high: int | None = None, rng: UniformSource | None = None
) -> Prompt:
    """One of the lines [low, high) of a prompt file, uniformly. See `read_prompts` for the paths and errors."""
    return _describe(_choose(read_prompts(path, low, high), rng))


def fundus_table(path: str | Path, rng: UniformSource | None = None) -> Prompt:
    """One of the distinct captions of a fundus table, uniformly. See `data.fundus.read_split` for its errors."""
    return _describe(_choose(_table_captions(path), rng))


@cache
def _table_captions(path: str | Path) -> tuple[str, ...]:
    return fundus.caption_list(fundus.read_split(path))


def read_prompts(path: str | Path, low: int | None = None, high: int | None = None) -> list[str]:
    """Lines [low, high) of a text file without blank ones: an absolute path, one from the current folder, or an asset.

    Raises UserError when no such file exists or no prompt remains.
    """
    asset = resources.files("ddpo_pytorch") / "assets" / str(path)
    source = Path(path) if Path(path).is_file() else asset
    if not source.is_file():
        raise UserError(
            f"prompt file {str(path)!r} does not exist; give a path, or the name of a file in ddpo_pytorch/assets "
            "such as isic_prompts.txt"
        )
    try:
        lines = [line.strip() for line in source.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise UserError(f"prompt file {str(path)!r} is not UTF-8 text ({error}); give one prompt a line") from error
    prompts = [line for line in lines if line][low:high]
    if not prompts:
        raise UserError(f"prompt file {str(path)!r} has no prompts in lines [{low}, {high}); widen low and high")
    return prompts


PROMPTS: dict[str, Callable[..., Prompt]] = {
    "isic_all": isic_all,
    "isic_all_idx": isic_all_idx,
    "from_file": from_file,
    "fundus_table": fundus_table,
}
PROMPT_LISTS: dict[str, Callable[..., Sequence[str]]] = {
    "isic_all": lambda: CAPTIONS,
    "isic_all_idx": lambda: CAPTIONS,
    "from_file": read_prompts,
    "fundus_table": _table_captions,
}


def check_prompt(prompt: str) -> None:
    """Raise UserError for a prompt that is blank or no single line of text; all others can be trained and drawn."""
    if not prompt.strip():
        raise UserError(f"prompt {prompt!r} is blank; describe an image")
    # control characters, line separators, and halves of UTF-16 pairs, which no text file can hold
    if any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in prompt):
        raise UserError(f"prompt {prompt!r} has characters that cannot be printed; give one line of plain text")


def get_prompt_fn(name: str, **kwargs: Any) -> Callable[..., Prompt]:
    """The prompt function of that name with these keyword arguments; those that are None are left out.

    Raises UserError that lists the names, or for keyword arguments that do not fit.
    """
    function = _look_up(PROMPTS, name)
    kwargs = _given(kwargs)
    try:
        inspect.signature(function).bind(**kwargs)
    except TypeError as error:
        raise UserError(f"prompt_fn_kwargs {kwargs} do not fit prompt function {name!r} ({error})") from error
    return partial(function, **kwargs)


def all_prompts(name: str, **kwargs: Any) -> list[Prompt]:
    """Every prompt that function `name` can return with these keyword arguments, in order and without repetition."""
    list_fn, kwargs = _look_up(PROMPT_LISTS, name), _given(kwargs)
    try:
        prompts = list_fn(**kwargs)
    except TypeError as error:
        raise UserError(f"prompt_fn_kwargs {kwargs} do not fit prompt function {name!r} ({error})") from error
    return [_describe(prompt) for prompt in dict.fromkeys(prompts)]


def _look_up(table: dict[str, Callable], name: str) -> Callable:
    if name not in table:
        raise UserError(f"prompt function {name!r} is unknown; ddpo_pytorch/prompts.py has {', '.join(sorted(table))}")
    return table[name]


def _given(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in kwargs.items() if value is not None}


def _choose(prompts: Sequence[str], rng: UniformSource | None) -> str:
    return prompts[int((rng or random).random() * len(prompts))]


def _describe(prompt: str) -> Prompt:
    return prompt, {"label": list(labels_of(prompt))} if prompt in CAPTIONS else {}
