"""The images to rate, from sample folders and fundus tables, each with its prompt. Nothing else is ever served."""

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
    """One question: image file, its path in the table of ratings, prompt, modality (or ""), (width, height).

    `image_path` starts from the folder of the table of ratings, as `read_ratings` expects, so that table and images can
    be moved together.
    """

    path: Path
    image_path: str
    prompt: str
    modality: str
    size: tuple[int, int]

    @property
    def key(self) -> tuple[str, str]:
        """(image_path, prompt), which each rater rates once."""
        return self.image_path, self.prompt


def sample_items(folder: str | Path, table: str | Path) -> list[Item]:
    """Return the images in `image_log.json` of a sample folder.

    Raises UserError for a missing folder, log, prompt or image, and for an entry that leads out of the folder.
    """
    if not Path(folder).is_dir():
        raise UserError(f"image folder {str(folder)!r} does not exist; give a folder that scripts/eval.py has written")
    entries = read_log(folder)
    if not entries:
        raise UserError(f"{str(folder)!r} lists no images in image_log.json; give a folder that eval.py has written")
    items = []
    for number, entry in enumerate(entries, 1):
        where = f"{str(folder)!r} image_log.json entry {number}"
        name, prompt = entry.get("path_to_img"), entry.get("prompt")
        if not all(isinstance(text, str) and text for text in (name, prompt)):
            raise UserError(f"{where}: it needs the texts path_to_img and prompt; draw the samples again elsewhere")
        items.append(_item(Path(folder) / name, prompt, folder, table, where))
    return items


def table_items(csv: str | Path, data_path: str | Path, table: str | Path) -> tuple[list[Item], int]:
    """Return the images of a fundus table with their captions, and the number of rows without an image.

    Raises UserError as `fundus.load_split` does, and for an image outside `data_path`.
    """
    rows, paths, missing = load_split(csv, data_path)
    items = [
        _item(Path(path), row.caption, data_path, table, f"{str(csv)!r}: image {row.image!r}")
        for row, path in zip(rows, paths, strict=True)
    ]
    return items, missing


def _item(path: Path, prompt: str, folder: str | Path, table: str | Path, where: str) -> Item:
    path = Path(os.path.abspath(path))
    resolved = path.resolve()
    if not resolved.is_relative_to(Path(folder).resolve()):
        raise UserError(f"{where}: {str(path)!r} leads out of {str(folder)!r}; only images inside it are shown")
    if not resolved.is_file():
        raise UserError(f"{where}: there is no file {str(path)!r}; run the command that wrote the folder again")
    # links are not followed here: a user may move folders as they are named
    image_path = Path(os.path.relpath(path, os.path.abspath(Path(table).parent))).as_posix()
    if not prompt.isprintable() or not image_path.isprintable():
        # each row of the table is one line of the file, which tells a torn row from a complete one
        raise UserError(f"{where}: its prompt or path holds line breaks or control characters; write them as spaces")
    if tidy_path(image_path.strip()) != image_path:
        raise UserError(f"{where}: path {image_path!r} has backslashes or outer spaces; rename the file or folder")
    prompt = " ".join(prompt.split())  # as `read_ratings` reads it
    modality = MODALITY if prompt.lower().startswith(f"{MODALITY.lower()}:") else ""
    try:
        with open_image(resolved) as image:
            return Item(resolved, image_path, prompt, modality, image.size)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def distinct(items: Sequence[Item]) -> list[Item]:
    """Return each (image, prompt) once, sorted, so that questions do not depend on the order of the folders."""
    return sorted({item.key: item for item in items}.values(), key=lambda item: item.key)
