"""A list of all files of a folder, with their sizes and hashes, by which a torn or changed one is told."""

import json
from pathlib import Path

from ddpo_pytorch.files import path_fault, sha256

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
        files = json.loads(path.read_bytes())["files"]
        if any(path_fault(name) for name in files):
            raise ValueError("it names files outside its folder")
        return {
            str(name): {"bytes": int(about["bytes"]), "sha256": str(about["sha256"])} for name, about in files.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{MANIFEST} is damaged") from error


def file_fault(path: Path, about: dict, thorough: bool = True) -> str | None:
    """What is wrong with a file that a manifest describes, or None. Without `thorough` its content is not read."""
    if not path.is_file():
        return f"{path.name} is not there"
    if (size := path.stat().st_size) != about["bytes"]:
        return f"{path.name} has {size} bytes instead of {about['bytes']}"
    if thorough and sha256(path) != about["sha256"]:
        return f"{path.name} has another content than {MANIFEST} states"
    return None
