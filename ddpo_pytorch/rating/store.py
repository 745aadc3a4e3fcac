"""Ratings on disk: a journal of every click, and the table of ratings for training that is derived from it.

`ratings.journal.csv` (time, action, the columns of the table) is the source of truth: a click is on disk (fsync) before
it is confirmed. Ratings of hidden repeats are only in the journal. `ratings.csv` is always valid for `read_ratings`:
each click replaces it atomically. If another program has changed either file, its content is first saved under another
name, so neither a spreadsheet nor a crash changes, loses or duplicates a rating. Only a table without a journal is
imported as it is.
"""

import calendar
import errno
import itertools
import logging
import os
import time
import unicodedata
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from ddpo_pytorch.data import ratings
from ddpo_pytorch.data.tables import number, read_table, table_text
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.files import append, lock, remove_leftovers, write_file

# `other`: the image that image_path is compared with. All but `mode` are empty if not asked.
OPTIONAL = (*ratings.APART, "other", *ratings.CRITERIA, "mode")
COLUMNS = (*ratings.COLUMNS, *OPTIONAL)
JOURNAL_COLUMNS = ("time", "action", *COLUMNS)
ACTIONS = ("rate", "skip", "undo", "repeat", "unrepeat")
TIME, EXAMPLE = "%Y-%m-%dT%H:%M:%SZ", "2026-01-31T12:00:00Z"

logger = logging.getLogger(__name__)
Key = tuple[Any, ...]
Question = tuple[str, str, str]  # image_path, prompt, other


@dataclass(frozen=True)
class Item:
    """An image: file, path from the ratings table, prompt, modality (or ""), (width, height), patient (or "")."""

    path: Path
    image_path: str
    prompt: str
    modality: str
    size: tuple[int, int]
    patient: str = ""
    rival: "Item | None" = None  # the question is then which of the two is better

    @property
    def key(self) -> tuple[str, str, str]:
        """(image_path, prompt, path of the rival or ""), which each rater rates once."""
        return self.image_path, self.prompt, self.rival.image_path if self.rival else ""


class Answer(NamedTuple):
    """A rating: its question, whether it is a hidden repeat, the rater's name, and cells by column."""

    question: Question
    repeat: bool
    reader: str
    cells: dict[str, str]


def rater_name(text: str) -> str:
    """Return a rater's name, stripped, in NFC. UserError unless it has 1 to 64 printable characters and no commas."""
    name = unicodedata.normalize("NFC", text.strip())
    if not 1 <= len(name) <= 64 or not name.isprintable() or "," in name:
        raise UserError(f"the rater's name is {text[:80]!r}; give 1 to 64 printable characters without commas")
    return name


class Store:
    """The table at `path` and its journal, for answers of one `mode`, locked for this process. Not thread-safe.

    Raises UserError for a table of another mode; rows of earlier versions may lack the mode.
    """

    def __init__(self, path: str | Path, mode: str = "rate"):
        self.path, self.mode = Path(path), mode
        self.journal = self.path.with_name(f"{self.path.stem}.journal.csv")
        # tables that differ only in the suffix would share a journal
        if self.path.suffix != ".csv" or self.journal.is_dir() or self.path.is_dir():
            raise UserError(f"--out is {str(self.path)!r}; give a file whose name ends in .csv, such as ratings.csv")
        self._read()  # raises for foreign files before anything is written
        self.path.parent.mkdir(parents=True, exist_ok=True)
        taken = f"{str(self.path)!r} is being written by another rating page; stop that one, or give another --out"
        self._lock = lock(self.path.with_name(f".{self.path.stem}.lock"), taken)
        remove_leftovers(self.path.parent, depth=0)
        self._clicks, dropped = self._read()
        if dropped:
            text = dropped.decode(errors="replace")
            logger.warning("%s: dropped the truncated line %d: %r", self.journal, len(self._clicks) + 2, text)
        self._rows = _replay(self._clicks)
        if _bytes(self.journal) != (content := _content(JOURNAL_COLUMNS, self._clicks)):
            write_file(self.journal.resolve(), content, durable=True)
        columns = _bytes(self.path).partition(b"\n")[0].count(b",") + 1  # fewer in a table of an earlier version
        _restore(self.path, _table(self._rows), _table(_replay(self._clicks[:-1])), _table(self._rows, columns))

    def __len__(self) -> int:
        return sum(not key[-1] for key in self._rows)

    def close(self) -> None:
        """Restore the table if another program has changed it, and release the lock; later clicks raise OSError."""
        _restore(self.path, _table(self._rows))
        self._lock.release()

    def answers(self, questions: Container[Question]) -> list[Answer]:
        """Return the ratings of these questions in order, as if each pair had been asked in the question's order."""
        answers = []
        for key, cells in self._rows.items():
            if question := _asked(cells, questions):
                row = dict(zip(COLUMNS, cells, strict=True))
                if question[0] != row["image_path"]:
                    row |= {"image_path": question[0], "other": question[2], "rating": f"{4 - float(row['rating']):g}"}
                answers.append(Answer(question, key[-1], row["rater_id"], row))
        return answers

    def seconds(self, rater: str, questions: Container[Question]) -> list[float]:
        """Return the seconds between a rater's ratings of these questions, without breaks of over five minutes."""
        clicks = [click for click in self._clicks if click[0] and click[1] in ("rate", "repeat") and click[7] == rater]
        clicks = [click for click in clicks if _asked(click[2:], questions)]
        times = [calendar.timegm(time.strptime(click[0], TIME)) for click in clicks]
        return [after - before for before, after in itertools.pairwise(times) if after - before <= 300]

    def click(self, action: str, item: Item, rater: str, **answers: int | None) -> None:
        """Record one of ACTIONS. Raises OSError, and records nothing, if it cannot be written.

        `answers`: rating, expert_level, alignment and those of `ratings.CRITERIA` that were given. With an alignment,
        the rating is only the quality, and the lower of the two is stored as the rating.
        """
        if not self._lock.is_locked:
            raise OSError(errno.ESHUTDOWN, "the server has stopped")
        names = ("rating", "expert_level", "alignment", *ratings.CRITERIA)
        rating, level, alignment, *criteria = (str(answers.get(name) or "") for name in names)
        both, lower = (rating, alignment) if alignment else ("", ""), min(rating, alignment or rating)
        cells = [item.image_path, lower, item.modality, level, item.prompt, rater, *both, item.patient, item.key[2]]
        cells += [*criteria, self.mode]
        if action in ("undo", "unrepeat"):
            cells = self._rows.get(_key(cells, action), cells)
        click = [time.strftime(TIME, time.gmtime()), action, *cells]
        rows, before = _replay([click], self._rows), _table(self._rows)
        journal = _content(JOURNAL_COLUMNS, self._clicks)
        _restore(self.journal, journal)
        try:
            append(self.journal, _content(click))
            _restore(self.path, _table(rows), before)
        except OSError:
            os.truncate(self.journal, len(journal))  # the click failed, so a restart must not replay it
            raise
        self._clicks.append(click)
        self._rows = rows

    def _read(self) -> tuple[list[list[str]], bytes]:
        """Return the journal's clicks and an incomplete last line to drop; without a journal, the table as clicks.

        The latter have no time. An incomplete line is a click interrupted by a crash, unless the table shows that it
        was confirmed.
        """
        table, journal = _bytes(self.path), _bytes(self.journal)
        if _content(JOURNAL_COLUMNS).startswith(journal):  # missing, or truncated in its first line
            return [["", "rate", *cells] for cells in self._parse(self.path, COLUMNS, table)] if table else [], b""
        end = journal.rfind(b"\n") + 1
        clicks, tail = self._parse(self.journal, JOURNAL_COLUMNS, journal[:end]), journal[end:]
        try:
            longer = self._parse(self.journal, JOURNAL_COLUMNS, journal + b"\n")
        except UserError:
            return clicks, tail
        after, before = (_table(_replay(some)).rstrip(b"\n") for some in (longer, clicks))
        shown = table.rstrip(b"\r\n") == after != before
        return (longer, b"") if shown else (clicks, tail)

    def _parse(self, path: Path, columns: Sequence[str], content: bytes) -> list[list[str]]:
        """Return the cells of every row of the table or the journal. Raises UserError for foreign or faulty files."""
        folder = os.path.abspath(path.parent)

        def make(fields: dict[str, str], index: int, line: int, faults: list[str]) -> tuple[list[str], Key | None, str]:
            cells, action = [fields.get(name, "") for name in columns], fields.get("action", "rate")
            image, rating, _, level, _, rater = (fields[name] for name in ratings.COLUMNS)
            if set(fields) - set(columns):
                faults.append(f"the columns are not {', '.join(columns)} alone")
            rated = all(1 <= (number(cell) or 0) <= 3 for cell in (rating, level)) or action not in ("rate", "repeat")
            if action not in ACTIONS or not rated:
                faults.append(f"{action} with rating {rating!r} of expert level {level!r}; both are 1 to 3")
            try:
                time.strptime(fields.get("time") or EXAMPLE, TIME)  # optional
            except ValueError:
                faults.append(f"time is {fields['time']!r}; it must be in UTC, such as {EXAMPLE}")
            if (mode := ratings.mode_of(fields)) not in ("", self.mode):
                faults.append(f"it is an answer of --mode={mode}, now the mode is {self.mode}")
            cells[columns.index("image_path")] = os.path.relpath(os.path.join(folder, image), folder)  # as in `Item`
            return cells, _key(cells, action) if path == self.path and rater else None, f"{rater!r} rating {image!r}"

        try:
            first = columns[: -len(OPTIONAL)]
            return read_table(path, "table of ratings", first, make, OPTIONAL, free_text="prompt", content=content)
        except UserError as error:
            raise UserError(f"{error}; correct it, move {str(path)!r} away, or give another --out") from error


def _replay(clicks: Iterable[Sequence[str]], before: Mapping[Key, list[str]] | None = None) -> dict[Key, list[str]]:
    """Return the rows of the table after these clicks; a second rating replaces the first."""
    rows = dict(before or {})
    for position, (_, action, *cells) in enumerate(clicks):
        key = _key(cells, action) if cells[5] else (position, False)  # unnamed raters may rate twice
        if action != "skip":
            rows.pop(key, None)
        if action in ("rate", "repeat"):
            rows[key] = cells
    return rows


def _key(cells: Sequence[str], action: str) -> Key:
    """Return what is rated once: a pair is the same in both orders."""
    return frozenset((cells[0], cells[9])), cells[4], cells[5], action in ("repeat", "unrepeat")


def _asked(cells: Sequence[str], questions: Container[Question]) -> Question | None:
    """Return the one of these questions that a row answers (pairs in either order), or None."""
    image, prompt, other = cells[0], cells[4], cells[9]
    return next((one for one in ((image, prompt, other), (other, prompt, image)) if one in questions), None)


def _table(rows: Mapping[Key, list[str]], columns: int = len(COLUMNS)) -> bytes:
    return _content(COLUMNS[:columns], (cells[:columns] for key, cells in rows.items() if not key[-1]))


def _content(header: Sequence[str], rows: Iterable[Sequence[str]] = ()) -> bytes:
    return b"".join(_line(tuple(cells)) for cells in (header, *rows))


@cache
def _line(cells: tuple[str, ...]) -> bytes:
    """Return a row as bytes; cached, since every click rewrites all rows."""
    return table_text(cells, []).encode()


def _bytes(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


def _restore(path: Path, content: bytes, *before: bytes) -> None:
    """Write a file unless it has this content; first copy what it held, except a prefix of `content` or `before`."""
    if (actual := _bytes(path)) == content:
        return
    if not any(expected.startswith(actual) for expected in (content, *before)):
        names = (path.with_name(f"{path.stem}.edited-{number}.csv") for number in itertools.count(1))
        copy = next(name for name in names if not name.exists())
        write_file(copy, actual, durable=True)
        logger.warning("%s was changed by another program and is restored; the other content is in %s", path, copy)
    write_file(path.resolve(), content, durable=True)
