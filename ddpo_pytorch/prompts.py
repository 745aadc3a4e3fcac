"""Prompt functions, selected by `prompt_fn` and `prompt_fn_kwargs` of a configuration.

A prompt function returns a prompt, or `(prompt, metadata)`, and takes its randomness from the argument `rng`; one
without that parameter, as in ddpo-pytorch, may use random, NumPy or PyTorch (see `draw_prompt`). Rewards receive the
metadata, `{"label": [hair, gel_bubble, ruler, ink, MEL, NV]}` (0/1) for an ISIC caption, else `{}`. To use your own
function, set `prompt_fn="my_module:my_function"`, or register it in `PROMPTS`, and in `PROMPT_LISTS` if eval.py should
be able to enumerate its prompts.
"""

import logging
import random
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache, partial
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from ddpo_pytorch.data import fundus
from ddpo_pytorch.data.isic import CAPTIONS, labels_of
from ddpo_pytorch.data.tables import invisible_character
from ddpo_pytorch.utils.cli import import_function, signature_of
from ddpo_pytorch.utils.errors import UserError, describe_value
from ddpo_pytorch.utils.json_files import read_json
from ddpo_pytorch.utils.randomness import seeded_globals
from ddpo_pytorch.utils.settings import ZERO_OR_MORE, Range, check_ranges

logger = logging.getLogger(__name__)
Prompt = tuple[str, dict[str, Any]]
Rng = random.Random | np.random.Generator | None
TEMPLATES = ("The {eye} eye fundus image shows {finding}.",)  # ODIR's
EYES, SEVERITIES = ("left", "right"), ("mild", "moderate", "severe")
_table_rows = cache(fundus.read_split)


def isic_all(rng: Rng = None) -> Prompt:
    """Return one of the 32 ISIC captions, drawn uniformly."""
    return describe(_choose(CAPTIONS, rng))


def isic_all_idx(idx: int, rng: Rng = None) -> Prompt:
    """Return caption `idx`, in [0, 32), of the official order. Raises UserError out of range."""
    check_ranges({"idx": idx}, {"idx": Range(f"[0, {len(CAPTIONS) - 1}]", whole=True)}, "prompt_fn_kwargs.")
    return describe(CAPTIONS[idx])


def from_file(path: str | Path, low: int | None = None, high: int | None = None, rng: Rng = None) -> Prompt:
    """Return one of the lines [low, high) of a prompt file, drawn uniformly (see `read_prompts`)."""
    return describe(_choose(read_prompts(path, low, high), rng))


def fundus_table(path: str | Path, rng: Rng = None) -> Prompt:
    """Return the caption of an image drawn uniformly from a fundus table (see `data.fundus.read_split`)."""
    return describe(_choose(_table_rows(path), rng).caption)


def composed(path: str | Path, templates: Sequence[str] = TEMPLATES, rng: Rng = None) -> Prompt:
    """Draw a finding of `compose` uniformly, then one of its prompts, and return that."""
    return describe(_choose(_choose(compose(path, tuple(templates)), rng), rng))


@cache
def compose(path: str | Path, templates: tuple[str, ...] = TEMPLATES) -> list[list[str]]:
    """Return the distinct prompts of each finding: every template x severity x eye.

    Findings and their SEVERITIES come from the captions that match a template and name a single finding. `path` is a
    fundus table, or a model folder of train_sd.py (its training captions). Spellings that differ only in spaces and
    hyphens count as one finding. Raises UserError for a template without {finding}, or if no caption matches.
    """
    if Path(path).is_dir():
        index = Path(path) / "latents" / "train" / "index.json"
        if not index.is_file():
            raise UserError(f"{str(path)!r} has no {str(index)!r} with training captions; give the training table")
        captions = read_json(index, {"captions": [str]})["captions"]
    else:
        captions = fundus.caption_list(_table_rows(path))
    if wrong := [template for template in templates if "{finding}" not in template]:
        raise UserError(f"prompt_fn_kwargs.templates has {wrong[0]!r}, which lacks {{finding}} (and perhaps {{eye}})")
    forms = [re.escape(one).replace(r"\{eye\}", "(?:left|right)") for one in templates]
    patterns = [form.replace(r"\{finding\}", "([^,;]+)") for form in forms]
    modality = ""
    findings: dict[str, dict[str, str]] = defaultdict(dict)  # wording in the captions, by finding and severity
    for caption in captions:
        modality = fundus.modality_of(caption)
        text = caption.removeprefix(f"{modality}: ")
        for match in filter(None, (re.fullmatch(pattern, text, re.IGNORECASE) for pattern in patterns)):
            severity, _, rest = match[1].strip().lower().partition(" ")
            severity, name = (severity, rest) if severity in SEVERITIES else ("", match[1].lower())
            findings[re.sub(r"\W", "", name)].setdefault(severity, match[1].strip())
    if not findings:
        raise UserError(f"no caption of {str(path)!r} matches {templates}; give prompt_fn_kwargs.templates")
    forms = [f"{modality}: {template}" if modality else template for template in templates]
    forms = list(dict.fromkeys(form.replace("{eye}", eye) for form in forms for eye in EYES))
    return [[form.replace("{finding}", words) for words in one.values() for form in forms] for one in findings.values()]


def _choose(items: Sequence[Any], rng: Rng) -> Any:
    return items[int((rng or random).random() * len(items))]  # both kinds of generators have random()


def describe(prompt: str) -> Prompt:
    """Return a prompt with its metadata: the labels of an ISIC caption, else {}."""
    return prompt, {"label": list(labels_of(prompt))} if prompt in CAPTIONS else {}


def read_prompts(path: str | Path, low: int | None = None, high: int | None = None) -> list[str]:
    """Return the prompts [low, high) of a text file with one prompt per line; `path` may be the name of an asset.

    Blank lines, a byte-order mark and surrounding spaces are dropped; repeated prompts are kept, with a warning. Raises
    UserError for a missing file, an empty range, or a line that `check_prompt` rejects.
    """
    where, given = f"prompt file {str(path)!r}", {"low": low, "high": high}
    given = {name: value for name, value in given.items() if value is not None}
    check_ranges(given, dict.fromkeys(given, ZERO_OR_MORE), "prompt_fn_kwargs.")
    places = Path(path), resources.files("ddpo_pytorch") / "assets" / str(path)
    if (source := next((place for place in places if place.is_file()), None)) is None:
        raise UserError(f"{where} does not exist; give a path, or an asset such as isic_prompts.txt")
    prompts = _parse_prompts(where, source.read_bytes())
    if not (chosen := list(prompts[low:high])):
        remedy = "change prompt_fn_kwargs.low and .high" if prompts else "write one prompt per line"
        raise UserError(f"{where} has {len(prompts)} prompts, none in [{low}, {high}); {remedy}")
    return chosen


@lru_cache(maxsize=8)  # every draw reads the file again
def _parse_prompts(where: str, content: bytes) -> tuple[str, ...]:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"{where} line {line} is not UTF-8 text ({error}); save it as UTF-8") from error
    prompts, first_lines = [], {}
    for number, line in enumerate(re.split("\r\n|\r|\n", text), start=1):
        if prompt := line.strip():
            check_prompt(prompt, f"{where} line {number}")
            if (first := first_lines.setdefault(prompt, number)) != number:
                logger.warning("%s: line %d repeats line %d, %r", where, number, first, prompt)
            prompts.append(prompt)
    return tuple(prompts)


def check_prompt(prompt: str, where: str = "prompt") -> None:
    """Raise UserError for a prompt that is blank or holds invisible characters. `where` prefixes the message."""
    fault = "is blank; describe an image" if not prompt.strip() else invisible_character(prompt)
    if fault:
        raise UserError(f"{where}: {prompt!r} {fault}")


def given_prompts(prompts: Sequence[Any], kind: str = "isic") -> list[str]:
    """Return the texts of `eval.prompts`, for kind "fundus" with the modality as a prefix, as in training.

    Raises UserError as `check_prompt` does, and for what is no text.
    """
    for number, prompt in enumerate(prompts, start=1):
        where = f"eval.prompts, prompt {number}"
        if not isinstance(prompt, str):
            raise UserError(f"{where} is {describe_value(prompt)}; give texts: \"('one','two')\"")
        check_prompt(prompt, where)
    return [text if kind == "isic" or fundus.modality_of(text) else fundus.caption_of(text) for text in prompts]


_FUNCTIONS = (isic_all, isic_all_idx, from_file, fundus_table, composed)
PROMPTS: dict[str, Callable[..., Prompt]] = {function.__name__: function for function in _FUNCTIONS}
PROMPT_LISTS: dict[str, Callable[..., Sequence[str]]] = {
    "isic_all": lambda: CAPTIONS,
    "isic_all_idx": lambda: CAPTIONS,
    "from_file": read_prompts,
    "fundus_table": lambda path: fundus.caption_list(_table_rows(path)),
    "composed": lambda path, templates=TEMPLATES: [p for one in compose(path, tuple(templates)) for p in one],
}


def get_prompt_fn(name: str, /, **kwargs: Any) -> Callable[..., Prompt]:
    """Return prompt function `name` (in PROMPTS, or "module:function"), bound to the arguments that are not None.

    Raises UserError for an unknown name, listing the known ones, and for arguments that the function does not accept.
    """
    if ":" not in name and name not in PROMPTS:
        known = f"PROMPTS in ddpo_pytorch/prompts.py has {', '.join(sorted(PROMPTS))}"
        raise UserError(f"prompt function {name!r} is unknown; {known}; add it there, or give module:function")
    chosen = _bind(name, import_function(name, "prompt_fn") if ":" in name else PROMPTS[name], kwargs)
    chosen.__name__ = name  # for messages: it may be registered under another name than its own
    return chosen


def draw_prompt(function: Callable[..., Any], seed: int) -> Prompt:
    """Call a prompt function so that its result depends on the seed alone; return prompt and metadata.

    A function with the parameter `rng` gets a `random.Random`; for any other, the global generators of random, NumPy
    and PyTorch are seeded during the call. Raises UserError as `as_prompt` does.
    """
    name = getattr(function, "__name__", str(function))
    if "rng" in signature_of(function).parameters:
        return as_prompt(function(rng=random.Random(seed)), name)
    with seeded_globals(seed):
        return as_prompt(function(), name)


def as_prompt(result: Any, name: str) -> Prompt:
    """Convert the result of prompt function `name`, a prompt or a (prompt, dict) pair, to a pair.

    Raises UserError for anything else, and for a prompt that `check_prompt` rejects.
    """
    pair = (result, {}) if isinstance(result, str) else result
    fits = isinstance(pair, tuple | list) and len(pair) == 2
    if not fits or not isinstance(pair[0], str) or not isinstance(pair[1], Mapping):
        allowed = "a prompt, or a prompt and a dict of metadata, as in `return prompt, {}`"
        raise UserError(f"prompt function {name!r} returned {describe_value(result)}; it must return {allowed}")
    check_prompt(pair[0], f"prompt function {name!r}")
    return str(pair[0]), pair[1]


def all_prompts(name: str, /, **kwargs: Any) -> list[Prompt]:
    """Return every distinct prompt that function `name` can return with these keyword arguments, in order.

    Raises UserError for a name without an entry in PROMPT_LISTS, and for arguments that it does not accept.
    """
    if name not in PROMPT_LISTS:
        known = f"PROMPT_LISTS in ddpo_pytorch/prompts.py has {', '.join(sorted(PROMPT_LISTS))}"
        advice = "give eval.prompts to eval.py and generate.py, held_out.every=0 to train.py"
        fault = f"the prompts of prompt function {name!r} are unknown"
        raise UserError(f"{fault}; {known}; add it there to list them, or {advice}")
    prompts: dict[str, Any] = {}
    for listed in _bind(name, PROMPT_LISTS[name], kwargs)():
        text, metadata = as_prompt(listed, name)
        prompts.setdefault(text, metadata or describe(text)[1])
    if not prompts:
        raise UserError(f"the list of prompt function {name!r} in PROMPT_LISTS is empty")
    return list(prompts.items())


def _bind(name: str, function: Callable, kwargs: Mapping[str, Any]) -> partial:
    """Bind the keyword arguments that are not None. Raises UserError if the function does not accept them."""
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    signature = signature_of(function)
    parameters = signature.parameters
    try:
        signature.bind(**{key: None for key in parameters if key == "rng"} | kwargs)
    except TypeError as error:
        accepted = ", ".join(key for key in parameters if key != "rng") or "none"
        fault = f"do not fit prompt function {name!r}, which takes {accepted}"
        raise UserError(f"prompt_fn_kwargs {kwargs} {fault} ({error})") from error
    return partial(function, **kwargs)
