"""One rater's way through the questions: what is asked next, what was put off, what can be undone."""

import torch

from ddpo_pytorch.utils.randomness import Stream, generator_of, text_number


def order_for(count: int, seed: int, rater: str) -> list[int]:
    """The rater's own order of `count` questions: a permutation that depends on the seed and the name only."""
    return torch.randperm(count, generator=generator_of(seed, Stream.ORDER, text_number(rater))).tolist()


class Progress:
    """Questions by number. A skipped one comes again once after all others, and is then put off to the next session."""

    def __init__(self, order: list[int], rated: list[int]):
        """`rated`: what the rater has rated in earlier sessions, oldest first; it can be undone, newest first."""
        done = set(rated)
        self.total = len(order)
        self.waiting = [number for number in order if number not in done]
        self.put_off: list[int] = []
        self._history = [(number, "rate") for number in rated]
        self._skipped: list[int] = []  # a question as often as it was skipped

    @property
    def open(self) -> int:
        """Questions without a rating."""
        return len(self.waiting) + len(self.put_off)

    @property
    def undoable(self) -> int:
        """The number of clicks that `undo` can take back."""
        return len(self._history)

    @property
    def last(self) -> int | None:
        """The question that `undo` would bring back."""
        return self._history[-1][0] if self._history else None

    def asks(self, number: int) -> bool:
        """Whether this question has no rating yet."""
        return number in self.waiting or number in self.put_off

    def rate(self, number: int) -> None:
        self._take(number)
        self._history.append((number, "rate"))

    def skip(self, number: int) -> None:
        self._take(number)
        again = number not in self._skipped and self.waiting  # the only one left would come again at once
        (self.waiting if again else self.put_off).append(number)
        self._skipped.append(number)
        self._history.append((number, "skip"))

    def undo(self) -> None:
        """Ask the last question again, now."""
        number, action = self._history.pop()
        if action == "skip":
            self._take(number)
            self._skipped.remove(number)
        self.waiting.insert(0, number)

    def ask_put_off(self) -> None:
        """Ask once more what was put off."""
        self.waiting, self.put_off = self.waiting + self.put_off, []

    def _take(self, number: int) -> None:
        (self.waiting if number in self.waiting else self.put_off).remove(number)
