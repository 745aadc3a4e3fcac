"""The image files that a table names: whatever their suffix where it states none, and in any case of letters."""

import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path, PurePosixPath
from typing import TypeVar

from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.files import path_inside

logger = logging.getLogger(__name__)
SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")
T = TypeVar("T")
_LISTED = 5  # missing images that a warning names


def stem_of(name: str) -> str:
    """Return a name without its suffix, if that is one of SUFFIXES in any case."""
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in SUFFIXES else name


def find_images(
    folder: str | Path, names: Sequence[str], key: Callable[[str], str] = str.casefold
) -> list[Path | None]:
    """Return the image file of each name, a path from `folder`; None where there is none.

    A name with a suffix is that file, else the only one that differs from it in the case of letters or the spelling of
    the suffix (.jpeg for .jpg). A name without a suffix is the only file with any of SUFFIXES whose stem has the same
    `key`. Where names differ by case alone, it has to agree. Raises UserError for a name that leads out of the folder
    and for two files of one name.
    """
    folder, names = Path(folder), list(names)
    found = {name: path_inside(folder, name, "image table") for name in names}
    found = {name: path for name, path in found.items() if stem_of(name) != name and path.is_file()}
    taken = set(found.values())

    def group(name: str) -> tuple[str, str, str]:
        path = PurePosixPath(name)
        return str(path.parent).casefold(), key(stem_of(path.name)), _format(name)

    @cache
    def directory(parent: PurePosixPath) -> Path | None:
        return _directory(folder, parent)

    @cache
    def files(place: Path) -> dict[str, list[Path]]:
        by_key: dict[str, list[Path]] = {}
        with os.scandir(place) as entries:
            for entry in entries:  # a pipe or device is kept here, for the reader to refuse by name
                if _format(entry.name) and not entry.is_dir() and os.path.exists(entry.path):
                    by_key.setdefault(key(stem_of(entry.name)), []).append(place / entry.name)
        return by_key

    groups = Counter(map(group, names))
    for name in names:
        path = PurePosixPath(name)
        if name in found or (place := directory(path.parent)) is None:
            continue
        _, stem_key, wanted = group(name)
        candidates = [file for file in files(place).get(stem_key, ()) if file not in taken]
        candidates = [file for file in candidates if wanted in ("", _format(file.name))]
        if groups[group(name)] > 1:
            candidates = [file for file in candidates if file.stem == stem_of(path.name)]
        if len(candidates) > 1:
            one, other = sorted(candidates)[:2]
            raise UserError(f"{str(one)!r} and {str(other)!r} are both the image {name!r}; keep one of them")
        if not candidates and (place / path.name).is_file():  # with no suffix, or with one not in SUFFIXES
            candidates = [place / path.name]
        if candidates:
            found[name] = candidates[0]
            taken.add(candidates[0])
    return [found.get(name) for name in names]


def _format(name: str) -> str:
    suffix = PurePosixPath(name).suffix.lower()
    return {".jpeg": ".jpg", ".tiff": ".tif"}.get(suffix, suffix) if suffix in SUFFIXES else ""


def _directory(folder: Path, parent: PurePosixPath) -> Path | None:
    for part in parent.parts:
        if not (folder / part).is_dir():
            names = [entry.name for entry in os.scandir(folder) if entry.is_dir()]
            twins = [name for name in names if name.casefold() == part.casefold()]
            if len(twins) != 1:
                return None
            (part,) = twins
        folder = folder / part
    return folder


def rows_with_image(
    rows: Sequence[T],
    names: Sequence[str],
    table: str | Path,
    folder: str | Path,
    limit: int = 0,
    key: Callable[[str], str] = str.casefold,
) -> tuple[list[T], list[Path], int]:
    """Return the rows of a table whose image is found, its file, and the number of rows without one (a warning).

    `names` are those of the rows' images, for `find_images`, whose errors it raises. `limit` > 0 keeps the first that
    many rows with an image. Raises UserError where the folder or every image is missing.
    """
    if not Path(folder).is_dir():
        raise UserError(f"image folder {str(folder)!r} does not exist; give that of the images in {str(table)!r}")
    if not rows:
        raise UserError(f"{str(table)!r} has a header and no rows; give one image a line")
    kept, paths, missing = [], [], []
    for row, name, path in zip(rows, names, find_images(folder, names, key), strict=True):
        if limit and len(kept) == limit:
            break
        if path is None:
            missing.append(name)
        else:
            kept.append(row)
            paths.append(path)
    if not kept:
        raise UserError(
            f"none of the {len(missing)} images of {str(table)!r} is in {str(folder)!r}, where the first would be "
            f"{str(Path(folder) / names[0])!r}; give the folder that the names start from"
        )
    if missing:
        named = f"{', '.join(missing[:_LISTED])}{', ...' if missing[_LISTED:] else ''}"
        total = len(kept) + len(missing)
        said = "%d of %d images of %s are not in %s, their rows are skipped: %s"
        logger.warning(said, len(missing), total, table, folder, named)
    return kept, paths, len(missing)
