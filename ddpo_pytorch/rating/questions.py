"""The questions under ids that tell nothing, and the progress of every rater."""

import hashlib
import hmac
import secrets
import threading
from collections.abc import Sequence

from ddpo_pytorch.rating.items import Item
from ddpo_pytorch.rating.progress import Progress, order_for
from ddpo_pytorch.rating.store import Store


class Questions:
    """Items under ids that cannot be guessed, and the progress of every rater. Safe for threads."""

    def __init__(self, items: Sequence[Item], store: Store, seed: int):
        self._items, self._store, self._seed = list(items), store, seed
        self._numbers = {item.key: number for number, item in enumerate(items)}
        secret = secrets.token_bytes(32)
        self._ids = [hmac.new(secret, b"%d" % i, hashlib.sha256).hexdigest()[:32] for i in range(len(self._items))]
        self._number_of = {name: number for number, name in enumerate(self._ids)}
        self._raters: dict[str, Progress] = {}
        self._lock = threading.Lock()

    def item(self, name: str) -> Item | None:
        """The item of an id, None for any other text."""
        number = self._number_of.get(name)
        return None if number is None else self._items[number]

    def state(self, rater: str) -> dict:
        """What the page shows: counts, this question and the next one."""
        with self._lock:
            return self._state(self._progress(rater))

    def answer(self, rater: str, name: str, rating: int | None = None, expert_level: int = 0) -> dict:
        """Rate an item, or skip it (None), on disk at once; the new state.

        An item that the rater has rated meanwhile, in another window, keeps that rating; the state then says "already".
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
        """Take the rater's last click back, if there is one; return the new state.

        `undoable` is what the page knew of it. If another window has clicked since, or this undo is a second try after
        an answer that was lost, nothing is undone, and the state says "already".
        """
        with self._lock:
            progress = self._progress(rater)
            if undoable not in (None, progress.undoable):
                return self._state(progress) | {"already": True}
            if progress.last is not None:
                self._store.undo(self._items[progress.last], rater)
                progress.undo()
            return self._state(progress)

    def ask_put_off(self, rater: str) -> dict:
        """Ask again what was skipped twice."""
        with self._lock:
            progress = self._progress(rater)
            progress.ask_put_off()
            return self._state(progress)

    def close(self) -> None:
        """Close the store after the click that is being saved."""
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
            "skipped": len(progress.put_off),
            "undo": progress.undoable,
            "current": shown[0] if shown else None,
            "next": shown[1] if len(shown) > 1 else None,
        }
