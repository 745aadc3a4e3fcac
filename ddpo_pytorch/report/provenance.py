"""Settings as names and values."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ddpo_pytorch.utils.json_files import read_json

LONG = 8  # entries of a list that are written out


def read_config(run: str | Path) -> dict:
    """Return a training run's config.json, {} where there is none. Raises UserError for a damaged file."""
    path = Path(run) / "config.json"
    return read_json(path) if path.is_file() else {}


def flatten(tree: Mapping, prefix: str = "") -> list[tuple[str, str]]:
    """Return ("a.b", text) of every leaf of a nested mapping; a long list becomes its length and first entry."""
    rows = []
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            rows += flatten(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", _text(value)))
    return rows


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value or "(empty)"
    if value is None or isinstance(value, bool):
        return {None: "(none)", True: "yes", False: "no"}[value]
    if isinstance(value, list | tuple):
        if len(value) > LONG:
            return f"{len(value)} entries, the first: {_text(value[0])}"
        return ", ".join(_text(entry) for entry in value) or "(empty)"
    return json.dumps(value)
