"""A list of all files of a folder, with their sizes and hashes, by which a torn or changed one is told."""

import json
from pathlib import Path

from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.files import path_fault, sha256
from ddpo_pytorch.utils.json_files import COUNT, read_json

MANIFEST = "manifest.json"


def write_manifest(folder: str | Path) -> None:
    """List every file that the folder holds now: {"files": {path in the folder: {"bytes", "sha256"}}}."""
    folder = Path(folder)
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in paths
    }
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=1) + "\n")


def read_manifest(folder: str | Path) -> dict[str, dict] | None:
    """The files that are listed; None where there is no list. Raises ValueError for a damaged one."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        return None
    try:
        files = read_json(path, {"files": {str: {"bytes": COUNT, "sha256": str}}})["files"]
    except UserError as error:
        raise ValueError(f"{MANIFEST} is damaged") from error
    if any(path_fault(name) for name in files):
        raise ValueError(f"{MANIFEST} is damaged: it names files outside its folder")
    return files


def file_fault(path: Path, about: dict, thorough: bool = True) -> str | None:
    """What is wrong with a file that a manifest describes, or None. Without `thorough` its content is not read."""
    if not path.is_file():
        return f"{path.name} is not there"
    if (size := path.stat().st_size) != about["bytes"]:
        return f"{path.name} has {size} bytes instead of {about['bytes']}"
    if thorough and sha256(path) != about["sha256"]:
        return f"{path.name} has another content than {MANIFEST} states"
    return None
