"""The questions of the rating page: images with prompts under unguessable ids, and every rater's progress."""

import hashlib
import hmac
import os
import secrets
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ddpo_pytorch.data.fundus import load_split, modality_of, tidy_path
from ddpo_pytorch.data.images import open_image
from ddpo_pytorch.data.sample_folder import read_log
from ddpo_pytorch.rating.store import Store
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.randomness import Stream, generator_of, text_number


@dataclass(frozen=True)
class Item:
    """One image: file, path from the table of ratings, prompt, modality (or ""), (width, height), patient (or "")."""

    path: Path
    image_path: str
    prompt: str
    modality: str
    size: tuple[int, int]
    patient: str = ""

    @property
    def key(self) -> tuple[str, str]:
        """(image_path, prompt), which each rater rates once."""
        return self.image_path, self.prompt


def sample_items(folder: str | Path, table: str | Path) -> list[Item]:
    """Return the images in `image_log.json` of a sample folder. Raises UserError for an unusable entry."""
    entries, items = read_log(folder), []
    if not entries:
        raise UserError(f"{str(folder)!r} has no image_log.json with images; give a folder that scripts/eval.py wrote")
    for number, entry in enumerate(entries, 1):
        where = f"{str(folder)!r} image_log.json entry {number}"
        name, prompt = entry.get("path_to_img"), entry.get("prompt")
        if not name or not prompt:
            raise UserError(f"{where}: it needs the texts path_to_img and prompt; draw the samples again elsewhere")
        items.append(_item(Path(folder) / name, prompt, folder, table, where, entry.get("patient") or ""))
    return items


def table_items(csv: str | Path, data_path: str | Path, table: str | Path) -> tuple[list[Item], int]:
    """Return the images of a fundus table with their captions, and the number of rows without an image."""
    rows, paths, missing = load_split(csv, data_path)
    named = [(path, row, f"{str(csv)!r}: image {row.image!r}") for row, path in zip(rows, paths, strict=True)]
    return [_item(path, row.caption, data_path, table, where, row.patient) for path, row, where in named], missing


def _item(path: Path, prompt: str, folder: str | Path, table: str | Path, where: str, patient: str) -> Item:
    path, resolved = Path(os.path.abspath(path)), path.resolve()
    # links are not followed here: a user may move folders as they are named
    image_path = Path(os.path.relpath(path, os.path.abspath(Path(table).parent))).as_posix()
    prompt = " ".join(filter(None, prompt.split(" ")))  # as `read_ratings` reads it
    fault = ""
    if not resolved.is_relative_to(Path(folder).resolve()):
        fault = f"{str(path)!r} leads out of {str(folder)!r}; only images inside it are shown"
    elif not resolved.is_file():
        fault = f"there is no file {str(path)!r}; run the command that wrote the folder again"
    elif not (prompt + image_path + patient).isprintable() or tidy_path(image_path.strip()) != image_path:
        # each row of the table is one line of the file, which tells a torn row from a complete one
        fault = f"prompt or path {image_path!r} has line breaks, control characters, backslashes or outer spaces"
    try:
        if fault:
            raise UserError(fault)
        with open_image(resolved) as image:
            size = image.size
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return Item(resolved, image_path, prompt, modality_of(prompt), size, patient)


def distinct(items: Sequence[Item]) -> list[Item]:
    """Return each (image, prompt) once, sorted, so that questions do not depend on the order of the folders."""
    return sorted({item.key: item for item in items}.values(), key=lambda item: item.key)


def order_for(count: int, seed: int, rater: str) -> list[int]:
    """Return a permutation of `count` questions that depends on the seed and the rater's name only."""
    return torch.randperm(count, generator=generator_of(seed, Stream.ORDER, text_number(rater))).tolist()


class Progress:
    """One rater's questions, by number; those `rated` in earlier sessions, oldest first, can be undone too.

    A skipped question is asked again after all others; skipped a second time, it is postponed.
    """

    def __init__(self, order: list[int], rated: list[int]):
        done = set(rated)
        self.total, self.waiting = len(order), [number for number in order if number not in done]
        self.postponed: list[int] = []
        self.history = [(number, "rate") for number in rated]

    def answer(self, number: int, action: str) -> None:
        """Note the "rate" or "skip" of a question."""
        self._remove(number)
        if action == "skip":
            again = (number, "skip") not in self.history and self.waiting  # the only one left would come at once
            (self.waiting if again else self.postponed).append(number)
        self.history.append((number, action))

    def undo(self) -> None:
        """Ask the last question again, now."""
        number, action = self.history.pop()
        if action == "skip":
            self._remove(number)
        self.waiting.insert(0, number)

    def _remove(self, number: int) -> None:
        (self.waiting if number in self.waiting else self.postponed).remove(number)


class Questions:
    """Items under unguessable ids, and the progress of every rater. Thread-safe."""

    def __init__(self, items: Sequence[Item], store: Store, seed: int):
        self._items, self._store, self._seed = list(items), store, seed
        self._numbers = {item.key: number for number, item in enumerate(items)}
        secret = secrets.token_bytes(32)
        self._ids = [hmac.new(secret, b"%d" % i, hashlib.sha256).hexdigest()[:32] for i in range(len(self._items))]
        self._number_of = {name: number for number, name in enumerate(self._ids)}
        self._raters: dict[str, Progress] = {}
        self._lock = threading.Lock()

    def item(self, name: str) -> Item | None:
        """Return the item of an id, None for any other text."""
        number = self._number_of.get(name)
        return None if number is None else self._items[number]

    def act(self, action: str, rater: str, name: str = "", **given: int | None) -> dict:
        """Save a "rate", "skip" or "undo" to disk, or ask "again" what was skipped; return what the page shows.

        The state says "already" if nothing was done, because another window has rated the image, or has clicked since
        the page counted `undoable` clicks. `given` are rating, expert_level, alignment and undoable.
        """
        with self._lock:
            if rater not in self._raters:
                rated = [self._numbers[key] for key in self._store.rated(rater) if key in self._numbers]
                self._raters[rater] = Progress(order_for(len(self._items), self._seed, rater), rated)
            progress, already = self._raters[rater], {}
            if action == "again":
                progress.waiting, progress.postponed = progress.waiting + progress.postponed, []
            elif action in ("rate", "skip"):
                number = self._number_of[name]
                if number not in progress.waiting + progress.postponed:
                    already = {"already": True}
                else:
                    names = ("rating", "expert_level", "alignment") if action == "rate" else ()
                    cells = [given.get(one) for one in names]
                    self._store.click(action, self._items[number], rater, *cells)
                    progress.answer(number, action)
            elif action == "undo" and given.get("undoable") not in (None, len(progress.history)):
                already = {"already": True}
            elif action == "undo" and progress.history:
                self._store.click(action, self._items[progress.history[-1][0]], rater)
                progress.undo()
            shown = [{"id": self._ids[number], "prompt": self._items[number].prompt} for number in progress.waiting[:2]]
            return already | {
                "total": progress.total,
                "rated": progress.total - len(progress.waiting) - len(progress.postponed),
                "skipped": len(progress.postponed),
                "undo": len(progress.history),
                "seconds": None if shown else self._store.seconds(rater),
                "current": shown[0] if shown else None,
                "next": shown[1] if len(shown) > 1 else None,
            }

    def close(self) -> None:
        """Close the store once the click in progress is saved."""
        with self._lock:
            self._store.close()
