"""What is rated: images of sample folders and of fundus tables, each with its prompt. Nothing else is ever served."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ddpo_pytorch.data.fundus import MODALITY, load_split, tidy_path
from ddpo_pytorch.data.images import open_image
from ddpo_pytorch.data.sample_folder import read_log
from ddpo_pytorch.utils.errors import UserError


@dataclass(frozen=True)
class Item:
    """One question: an image file, its path as the table of ratings states it, the prompt, the modality (or ""), and
    (width, height) of the file.

    The path starts from the folder of the table of ratings, from which `read_ratings` finds it: images in other folders
    are found as long as these lie where they lay from the table, so that all can be moved together.
    """

    path: Path
    image_path: str
    prompt: str
    modality: str
    size: tuple[int, int]

    @property
    def key(self) -> tuple[str, str]:
        """What may be rated once by each rater."""
        return self.image_path, self.prompt


def sample_items(folder: str | Path, table: str | Path) -> list[Item]:
    """The images that the `image_log.json` of a sample folder lists, each with its prompt.

    Raises UserError for a missing folder, log, prompt or image, and for an entry that leads out of the folder.
    """
    if not Path(folder).is_dir():
        raise UserError(f"image folder {str(folder)!r} does not exist; give a folder that scripts/eval.py has written")
    entries = read_log(folder)
    if not entries:
        raise UserError(f"{str(folder)!r} lists no images in image_log.json; give a folder that eval.py has written")
    items = []
    for number, entry in enumerate(entries, 1):
        where, name, prompt = f"{str(folder)!r} image_log.json entry {number}", *_fields(entry)
        if not name or not prompt:
            raise UserError(f"{where}: it needs the texts path_to_img and prompt; make the samples again elsewhere")
        items.append(_item(Path(folder) / name, prompt, folder, table, where))
    return items


def _fields(entry: dict) -> tuple[str, str]:
    values = (entry.get("path_to_img"), entry.get("prompt"))
    return tuple(value if isinstance(value, str) else "" for value in values)


def table_items(csv: str | Path, data_path: str | Path, table: str | Path) -> tuple[list[Item], int]:
    """The images of a fundus table, each with its caption, and the number of rows without an image.

    Raises UserError as `fundus.load_split` does, and for an image outside `data_path`.
    """
    rows, paths, missing = load_split(csv, data_path)
    items = [
        _item(Path(path), row.caption, data_path, table, f"{str(csv)!r}: image {row.image!r}")
        for row, path in zip(rows, paths, strict=True)
    ]
    return items, missing


def _item(path: Path, prompt: str, folder: str | Path, table: str | Path, where: str) -> Item:
    path, inside = Path(os.path.abspath(path)), Path(folder).resolve()
    resolved = path.resolve()
    if not resolved.is_relative_to(inside):
        raise UserError(f"{where}: {str(path)!r} leads out of {str(folder)!r}; only images inside it are shown")
    if not resolved.is_file():
        raise UserError(f"{where}: there is no file {str(path)!r}; run what wrote the folder again, or drop the entry")
    # links on the way are not followed: the folders are named as the user sees them, in which a table may be moved
    image_path = Path(os.path.relpath(path, os.path.abspath(Path(table).parent))).as_posix()
    if not prompt.isprintable() or not image_path.isprintable():
        # each row of the table is one line of the file, so that a torn one can be told from a whole one.
        raise UserError(f"{where}: its prompt or path holds line breaks or control characters; write them as spaces")
    if tidy_path(image_path.strip()) != image_path:
        raise UserError(f"{where}: a table cannot hold the path {image_path!r}; use no backslashes and outer spaces")
    prompt = " ".join(prompt.split())  # as `read_ratings` reads it
    modality = MODALITY if prompt.lower().startswith(f"{MODALITY.lower()}:") else ""
    return Item(resolved, image_path, prompt, modality, _size(resolved, where))


def _size(path: Path, where: str) -> tuple[int, int]:
    try:
        with open_image(path) as image:
            return image.size
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def distinct(items: Sequence[Item]) -> list[Item]:
    """Each (image, prompt) once, sorted: the questions do not depend on the order of the folders."""
    return sorted({item.key: item for item in items}.values(), key=lambda item: item.key)
