"""Questions of the rating page: images with prompts under unguessable ids, and each rater's progress."""

import hashlib
import hmac
import os
import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ddpo_pytorch.data.fundus import load_split, modality_of
from ddpo_pytorch.data.images import open_image, upright_size
from ddpo_pytorch.data.sample_folder import read_log
from ddpo_pytorch.data.tables import tidy_path
from ddpo_pytorch.rating.store import Item, Store
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.randomness import Stream, generator_of, text_number


def sample_items(folder: str | Path, table: str | Path) -> list[Item]:
    """Return the images in `image_log.json` of a sample folder. Raises UserError for an unusable entry."""
    items = []
    for number, entry in enumerate(read_log(folder), 1):
        where, path = f"{str(folder)!r} image_log.json entry {number}", Path(folder) / entry["path_to_img"]
        if not (prompt := entry.get("prompt")):
            raise UserError(f"{where}: a prompt is required; sample again into another folder")
        items.append(_item(path, prompt, folder, table, where, entry.get("patient") or ""))
    if not items:
        raise UserError(f"{str(folder)!r} has no image_log.json with images; give a folder that scripts/eval.py wrote")
    return items


def table_items(csv: str | Path, data_path: str | Path, table: str | Path) -> list[Item]:
    """Return the images of a fundus table with their captions; rows without an image are skipped."""
    rows, paths, _ = load_split(csv, data_path)
    named = [(path, row, f"{str(csv)!r}: image {row.image!r}") for row, path in zip(rows, paths, strict=True)]
    return [_item(path, row.caption, data_path, table, where, row.patient) for path, row, where in named]


def _item(path: Path, prompt: str, folder: str | Path, table: str | Path, where: str, patient: str) -> Item:
    path, resolved = Path(os.path.abspath(path)), path.resolve()
    # links are not resolved here, so that linked folders can be moved
    image_path = Path(os.path.relpath(path, os.path.abspath(Path(table).parent))).as_posix()
    prompt = " ".join(filter(None, prompt.split(" ")))  # as `read_ratings` reads it
    # each row of the table must be one line of the file, so that a torn row can be detected
    plain = (prompt + image_path + patient).isprintable() and tidy_path(image_path.strip()) == image_path
    try:
        if not resolved.is_relative_to(Path(folder).resolve()):
            raise UserError(f"{str(path)!r} leads out of {str(folder)!r}; only images inside it are shown")
        if not resolved.is_file():
            raise UserError(f"there is no file {str(path)!r}; run the command that wrote the folder again")
        if not plain:
            fault = "has line breaks, control characters, backslashes or outer spaces"
            raise UserError(f"prompt or path {image_path!r} {fault}")
        with open_image(resolved) as image:
            size = upright_size(image)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return Item(resolved, image_path, prompt, modality_of(prompt), size, patient)


def distinct(items: Sequence[Item]) -> list[Item]:
    """Return each (image, prompt) once, sorted, so that questions do not depend on the order of folders."""
    return sorted({item.key: item for item in items}.values(), key=lambda item: item.key)


def pair_items(first: Sequence[Item], second: Sequence[Item]) -> list[Item]:
    """Return the first source's images with their rivals: of each prompt, the second source's n-th image by name."""
    groups: dict[str, tuple[list[Item], list[Item]]] = {item.prompt: ([], []) for item in distinct(first)}
    for side, items in enumerate((first, second)):
        for item in distinct(items):
            groups.get(item.prompt, ([], []))[side].append(item)
    return [replace(item, rival=rival) for pair in groups.values() for item, rival in zip(*pair, strict=False)]


def order_for(count: int, seed: int, rater: str, repeats: float = 0) -> list[int]:
    """Return a permutation of `count` questions that depends only on the seed and the rater's name.

    A share `repeats`, at most one half, is asked again after half of the others, with `count` added to the number.
    """
    generator, half = generator_of(seed, Stream.ORDER, text_number(rater)), count // 2
    order = torch.randperm(count, generator=generator).tolist()
    again = torch.randperm(half, generator=generator)[: round(repeats * count)].tolist()
    places = [*enumerate(order), *((position + half + 0.5, count + order[position]) for position in again)]
    return [number for _, number in sorted(places)]


class Progress:
    """One rater's questions, by number. Those `rated` in earlier sessions (oldest first) can be undone, too.

    A skipped question is asked again after all others; if skipped a second time, it is postponed.
    """

    def __init__(self, order: list[int], rated: list[int]):
        done = set(rated)
        self.total, self.waiting = len(order), [number for number in order if number not in done]
        self.postponed: list[int] = []
        self.history = [(number, "rate") for number in rated]

    def answer(self, number: int, action: str) -> None:
        """Record the "rate" or "skip" of a question."""
        self._remove(number)
        if action == "skip":
            again = (number, "skip") not in self.history and self.waiting  # the only one left would be next again
            (self.waiting if again else self.postponed).append(number)
        self.history.append((number, action))

    def undo(self) -> None:
        """Undo the last answer, so that its question is asked next."""
        number, action = self.history.pop()
        if action == "skip":
            self._remove(number)
        self.waiting.insert(0, number)

    def _remove(self, number: int) -> None:
        (self.waiting if number in self.waiting else self.postponed).remove(number)


class Questions:
    """Items under unguessable ids (`number_of` questions, `files` of images), and each rater's progress. Thread-safe.

    `repeats`: see `order_for`. `examples`: (rating, file) of reference images. `summarise` returns the lines to show a
    rater at the end.
    """

    def __init__(
        self,
        items: Sequence[Item],
        store: Store,
        seed: int,
        repeats: float = 0,
        examples: Sequence[tuple[int, Path]] = (),
        summarise: Callable[[str], list[str]] = lambda rater: [],
    ):
        self._items, self._count = [*items, *items], len(items)  # a repeat has the number of its item plus the count
        self._store, self._seed, self._repeats, self._summarise = store, seed, repeats, summarise
        self._secret, self._lock = secrets.token_bytes(32), threading.Lock()
        self._raters: dict[str, Progress] = {}
        self._numbers = {item.key: number for number, item in enumerate(items)}
        self.number_of = {self._id("question", number): number for number in range(len(self._items))}
        self.files: dict[str, Path] = {}
        for number, item in enumerate(self._items):
            # a pair's id differs from its images' ids, which would reveal which folder is which
            for kind, one in (("question", item), ("first", item), ("second", item.rival or item)):
                self.files[self._id(kind, number)] = one.path
        self.examples = [(rating, self._id("example", number)) for number, (rating, _) in enumerate(examples)]
        self.files |= {name: path for (_, name), (_, path) in zip(self.examples, examples, strict=True)}

    def _id(self, kind: str, number: int) -> str:
        return hmac.new(self._secret, f"{kind} {number}".encode(), hashlib.sha256).hexdigest()[:32]

    def act(self, action: str, rater: str, name: str = "", **given: int | None) -> dict:
        """Save a "rate", "skip" or "undo" to disk, or ask skipped questions "again"; return the state for the page.

        The state has "already" if nothing was done because another window has rated the image, or has clicked since the
        page counted `undoable` clicks. `given`: rating, expert_level, alignment, criteria and undoable. For a pair, the
        page's rating is 3 for the image shown first; the stored rating is 3 for the item, 1 for its rival.
        """
        with self._lock:
            if rater not in self._raters:
                order = order_for(self._count, self._seed, rater, self._repeats)
                answered = (answer for answer in self._store.answers(self._numbers) if answer.reader == rater)
                rated = [self._numbers[answer.question] + self._count * answer.repeat for answer in answered]
                self._raters[rater] = Progress(order, [number for number in rated if number in set(order)])
            progress, already, undoable = self._raters[rater], {}, given.pop("undoable", None)
            if action == "again":
                progress.waiting, progress.postponed = progress.waiting + progress.postponed, []
            elif action in ("rate", "skip"):
                number = self.number_of[name]
                if number not in progress.waiting + progress.postponed:
                    already = {"already": True}
                else:
                    self._click(action, number, rater, given if action == "rate" else {})
                    progress.answer(number, action)
            elif action == "undo" and undoable not in (None, len(progress.history)):
                already = {"already": True}
            elif action == "undo" and progress.history:
                self._click(action, progress.history[-1][0], rater, {})
                progress.undo()
            shown = [self._question(number, rater) for number in progress.waiting[:2]]
            return already | {
                "total": progress.total,
                "rated": progress.total - len(progress.waiting) - len(progress.postponed),
                "skipped": len(progress.postponed),
                "undo": len(progress.history),
                "summary": [] if shown else self._summarise(rater),
                "current": shown[0] if shown else None,
                "next": shown[1] if len(shown) > 1 else None,
            }

    def _click(self, action: str, number: int, rater: str, given: dict[str, int | None]) -> None:
        if number >= self._count:
            action = {"rate": "repeat", "undo": "unrepeat"}.get(action, action)
        answers = {name: value for name, value in given.items() if value is not None}
        if answers and self._is_swapped(number, rater):
            answers["rating"] = 4 - answers["rating"]
        self._store.click(action, self._items[number], rater, **answers)

    def _question(self, number: int, rater: str) -> dict[str, Any]:
        """Return id, prompt and, for a pair, the images in the order in which this rater sees them."""
        question: dict[str, Any] = {"id": self._id("question", number), "prompt": self._items[number].prompt}
        if self._items[number].rival:
            images = [self._id("first", number), self._id("second", number)]
            question["images"] = images[::-1] if self._is_swapped(number, rater) else images
        return question

    def _is_swapped(self, number: int, rater: str) -> bool:
        """Return whether this rater sees a pair's rival first; a hidden repeat has the opposite order."""
        generator = generator_of(self._seed, Stream.ORDER, text_number(rater), number % self._count)
        drawn = bool(torch.randint(2, (1,), generator=generator))
        return bool(self._items[number].rival) and drawn != (number >= self._count)

    def close(self) -> None:
        """Close the store once the click in progress is saved."""
        with self._lock:
            self._store.close()
