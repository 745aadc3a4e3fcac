"""The questions of the rating page under unguessable ids, and every rater's progress through them."""

import hashlib
import hmac
import secrets
import threading
from collections.abc import Sequence

import torch

from ddpo_pytorch.rating.items import Item
from ddpo_pytorch.rating.store import Store
from ddpo_pytorch.utils.randomness import Stream, generator_of, text_number


def order_for(count: int, seed: int, rater: str) -> list[int]:
    """Return a permutation of `count` questions that depends on the seed and the rater's name only."""
    return torch.randperm(count, generator=generator_of(seed, Stream.ORDER, text_number(rater))).tolist()


class Progress:
    """One rater's questions, by number.

    A skipped question is asked again after all others; skipped a second time, it is postponed until `ask_skipped`.

    Args:
        order: all questions.
        rated: questions rated in earlier sessions, oldest first; they can be undone, newest first.
    """

    def __init__(self, order: list[int], rated: list[int]):
        done = set(rated)
        self.total = len(order)
        self.waiting = [number for number in order if number not in done]
        self.postponed: list[int] = []
        self._history = [(number, "rate") for number in rated]
        self._skipped: list[int] = []  # one entry per skip

    @property
    def open(self) -> int:
        """The number of questions without a rating."""
        return len(self.waiting) + len(self.postponed)

    @property
    def undoable(self) -> int:
        """The number of clicks that `undo` can take back."""
        return len(self._history)

    @property
    def last(self) -> int | None:
        """The question that `undo` would bring back."""
        return self._history[-1][0] if self._history else None

    def asks(self, number: int) -> bool:
        """Return whether a question has no rating yet."""
        return number in self.waiting or number in self.postponed

    def rate(self, number: int) -> None:
        self._remove(number)
        self._history.append((number, "rate"))

    def skip(self, number: int) -> None:
        self._remove(number)
        again = number not in self._skipped and self.waiting  # the only one left would come again at once
        (self.waiting if again else self.postponed).append(number)
        self._skipped.append(number)
        self._history.append((number, "skip"))

    def undo(self) -> None:
        """Ask the last question again, now."""
        number, action = self._history.pop()
        if action == "skip":
            self._remove(number)
            self._skipped.remove(number)
        self.waiting.insert(0, number)

    def ask_skipped(self) -> None:
        """Ask the postponed questions once more."""
        self.waiting, self.postponed = self.waiting + self.postponed, []

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

    def state(self, rater: str) -> dict:
        """Return what the page shows: counts, this question and the next one."""
        with self._lock:
            return self._state(self._progress(rater))

    def answer(self, rater: str, name: str, rating: int | None = None, expert_level: int = 0) -> dict:
        """Save a rating, or a skip (None), to disk; return the new state.

        An item that the rater has already rated, in another window, keeps that rating; the state then says "already".
        """
        with self._lock:
            progress, number = self._progress(rater), self._number_of[name]
            if not progress.asks(number):
                return self._state(progress) | {"already": True}
            if rating is None:
                self._store.skip(self._items[number], rater)
                progress.skip(number)
            else:
                self._store.rate(self._items[number], rating, expert_level, rater)
                progress.rate(number)
            return self._state(progress)

    def undo(self, rater: str, undoable: int | None = None) -> dict:
        """Take back the rater's last click, if there is one; return the new state.

        `undoable` is the page's count of clicks. If it is outdated, because another window has clicked or the answer to
        this undo was lost, nothing is undone and the state says "already".
        """
        with self._lock:
            progress = self._progress(rater)
            if undoable not in (None, progress.undoable):
                return self._state(progress) | {"already": True}
            if progress.last is not None:
                self._store.undo(self._items[progress.last], rater)
                progress.undo()
            return self._state(progress)

    def ask_skipped(self, rater: str) -> dict:
        """Ask the postponed questions again; return the new state."""
        with self._lock:
            progress = self._progress(rater)
            progress.ask_skipped()
            return self._state(progress)

    def close(self) -> None:
        """Close the store once the click in progress is saved."""
        with self._lock:
            self._store.close()

    def _progress(self, rater: str) -> Progress:
        if rater not in self._raters:
            rated = [self._numbers[key] for key in self._store.rated(rater) if key in self._numbers]
            self._raters[rater] = Progress(order_for(len(self._items), self._seed, rater), rated)
        return self._raters[rater]

    def _state(self, progress: Progress) -> dict:
        shown = [{"id": self._ids[n], "prompt": self._items[n].prompt} for n in progress.waiting[:2]]
        return {
            "total": progress.total,
            "rated": progress.total - progress.open,
            "skipped": len(progress.postponed),
            "undo": progress.undoable,
            "current": shown[0] if shown else None,
            "next": shown[1] if len(shown) > 1 else None,
        }
