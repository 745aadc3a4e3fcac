"""Settings, versions and hashes as tables of names and values."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddpo_pytorch.report.cells import count, counted
from ddpo_pytorch.utils.json_files import read_json

LONG = 8  # entries of a list that are written out


@dataclass(frozen=True)
class Listing:
    """Names and values in two columns. `folded`: long, shown on demand on screen."""

    title: str
    rows: list[tuple[str, str]]
    folded: bool = False


def flatten(tree: Mapping, prefix: str = "") -> list[tuple[str, str]]:
    """("a.b", text) of every leaf of a nested mapping; a long list is its length and first entry."""
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


def listings(result: Mapping, runs: Sequence[Path]) -> list[Listing]:
    """Everything that tells where the numbers come from; what metrics.json lacks is left out."""
    found = [
        Listing("Weights and networks", _networks(result)),
        Listing("Images", _images(result)),
        Listing("Settings of the measurement", flatten(result.get("settings") or {})),
        Listing("Versions", flatten({**(result.get("versions") or {}), **_created(result)})),
    ]
    for name, values in (result.get("models") or {}).items():
        for number, folder in enumerate(values.get("folders") or [], 1):
            if folder.get("made_with"):
                several = f", folder {number}" if len(values["folders"]) > 1 else ""
                found.append(Listing(f"How {name} was sampled{several}", flatten(folder["made_with"])))
    for run in runs:
        if config := read_config(run):
            found.append(Listing(f"Training run {Path(run).name}", flatten(config), folded=True))
    return [listing for listing in found if listing.rows]


def read_config(run: str | Path) -> dict:
    """A training run's config.json, {} where there is none. Raises UserError for a file that cannot be read."""
    path = Path(run) / "config.json"
    if not path.is_file():
        return {}
    return read_json(path)


def _created(result: Mapping) -> dict:
    return {"measured at": result["created"]} if result.get("created") else {}


def _networks(result: Mapping) -> list[tuple[str, str]]:
    rows = []
    for name, judge in (result.get("judges") or {}).items():
        labels = ", ".join(judge.get("labels") or ())
        rows.append((f"judge {name}", _joined(judge.get("file"), judge.get("what"), labels, _hash(judge))))
    for name, network in (result.get("networks") or {}).items():
        features = counted(network["features"], "feature") if network.get("features") else ""
        rows.append((name, _joined(network.get("what"), features, _hash(network))))
    return rows


def _images(result: Mapping) -> list[tuple[str, str]]:
    sets = {f"{name} images": values for name, values in (result.get("sets") or {}).items()}
    for name, values in (result.get("models") or {}).items():
        folders = values.get("folders") or []
        for number, folder in enumerate(folders, 1):
            sets[f"{name}, folder {number}" if len(folders) > 1 else name] = folder
    return [(name, _set(values)) for name, values in sets.items()]


def _set(values: Mapping) -> str:
    parts = [values.get("path"), counted(values.get("images"), "image")]
    for key, word in (
        ("identical_images", "identical to another"),
        ("black_images", "black"),
        ("copies_of_training_images", "also among the training images"),
        ("near_copies_of_training_images", "nearly among the training images"),
        ("copies_of_real_images", "also among the real images"),
        ("near_copies_of_real_images", "nearly among the real images"),
    ):
        if values.get(key) is not None:
            parts.append(f"{count(values[key])} {word}")
    return _joined(*parts, _hash(values))


def _hash(values: Mapping) -> str:
    return f"sha256 {values['sha256']}" if values.get("sha256") else ""


def _joined(*parts: str | None) -> str:
    return "; ".join(str(part) for part in parts if part)
