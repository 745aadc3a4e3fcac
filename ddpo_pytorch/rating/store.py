"""Ratings on disk: a journal of every click, and the table of ratings for training that is derived from it.

`ratings.journal.csv` is append-only (time, rate / skip / undo, the columns of the table) and the source of truth. A
click is on disk (fsync) before it is confirmed. `ratings.csv` has the columns of `data.ratings.COLUMNS` and is a valid
table for `read_ratings` at every moment: each rating or undo replaces it atomically. If another program has changed
either file, its content is saved under another name first, so neither a spreadsheet nor a crash changes, loses or
doubles a rating. Only a table without a journal is imported as it is.
"""

import csv
import errno
import io
import itertools
import logging
import os
import time
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path

from ddpo_pytorch.data.ratings import COLUMNS
from ddpo_pytorch.data.tables import number, read_table, table_text, unprotected
from ddpo_pytorch.rating.items import Item
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.files import append, atomic_write, lock, remove_leftovers

JOURNAL_COLUMNS = ("time", "action", *COLUMNS)
ACTIONS = ("rate", "skip", "undo")
TIME = "%Y-%m-%dT%H:%M:%SZ"

logger = logging.getLogger(__name__)
Key = tuple[str, ...]


def rater_name(text: str) -> str:
    """Return a rater's name, stripped and in Unicode's composed form.

    Raises UserError unless it has 1 to 64 printable characters and no comma.
    """
    name = unicodedata.normalize("NFC", text.strip())
    if not 1 <= len(name) <= 64 or not name.isprintable() or "," in name:
        raise UserError(f"the rater's name is {text[:80]!r}; give 1 to 64 printable characters without commas")
    return name


class Store:
    """The table at `path` and its journal, for this process alone. Not thread-safe.

    Raises UserError for a file of another kind, a faulty line, or a second process.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if self.path.suffix != ".csv":  # tables of one name and two suffixes would share a journal
            raise UserError(f"--out is {str(self.path)!r}; give a file whose name ends in .csv, such as ratings.csv")
        self.journal = self.path.with_name(f"{self.path.stem}.journal.csv")
        if self.journal.is_dir() or self.path.is_dir():
            raise UserError(f"{str(self.path)!r} is a folder, or its journal is; give a file such as ratings.csv")
        self._read()  # refuses foreign files before anything is written
        self.path.parent.mkdir(parents=True, exist_ok=True)
        taken = f"{str(self.path)!r} is being written by another rating page; end that one, or give another --out"
        self._lock = lock(self.path.with_name(f".{self.path.stem}.lock"), taken)
        remove_leftovers(self.path.parent, depth=0)
        self._clicks, dropped = self._read()
        if dropped:
            text = dropped.decode(errors="replace")
            logger.warning("%s: dropped line %d, which was cut off: %r", self.journal, len(self._clicks) + 2, text)
        self._rows = _replay(self._clicks)
        if _bytes(self.journal) != (content := _content(JOURNAL_COLUMNS, self._clicks)):
            _replace(self.journal, content)
        self._signature = _signature(self.journal)
        if self._rows and not self.path.exists():
            logger.warning("%s: restored from the journal, with %d ratings", self.path, len(self._rows))
        self._table = b""  # as it was last written
        self._write_table(self._rows, _replay(self._clicks[:-1]))

    def __len__(self) -> int:
        return len(self._rows)

    def close(self) -> None:
        """Restore the table if another program has changed it, and release the lock; later clicks raise OSError."""
        self._write_table(self._rows, self._rows)
        self._lock.release()

    def rated(self, rater: str) -> list[tuple[str, str]]:
        """Return (image_path, prompt) of what a rater has rated, in the order of the table."""
        return [(cells[0], cells[4]) for cells in self._rows.values() if cells[5] == rater]

    def rate(self, item: Item, rating: int, expert_level: int, rater: str) -> None:
        """Record a rating. Raises OSError, with nothing recorded, if it cannot be written."""
        self._click("rate", [item.image_path, str(rating), item.modality, str(expert_level), item.prompt, rater])

    def skip(self, item: Item, rater: str) -> None:
        """Record a skip, in the journal only."""
        self._click("skip", [item.image_path, "", item.modality, "", item.prompt, rater])

    def undo(self, item: Item, rater: str) -> None:
        """Record an undo and remove the rater's row, if any, from the table. Raises OSError as `rate` does."""
        skipped = [item.image_path, "", item.modality, "", item.prompt, rater]
        self._click("undo", self._rows.get((*item.key, rater), skipped))

    def _click(self, action: str, cells: list[str]) -> None:
        if not self._lock.is_locked:
            raise OSError(errno.ESHUTDOWN, "the server has stopped")
        click = [time.strftime(TIME, time.gmtime()), action, *cells]
        rows = _replay([click], self._rows)
        if _signature(self.journal) != self._signature:  # moved, removed or written to by another program
            content, actual = _content(JOURNAL_COLUMNS, self._clicks), _bytes(self.journal)
            if actual != content:
                if not content.startswith(actual):
                    _save_edited(self.journal, actual)
                _replace(self.journal, content)
        size = self.journal.stat().st_size
        try:
            with open(self.journal, "ab", buffering=0) as file:
                append(file, _content(click))
                os.fsync(file.fileno())
            self._write_table(rows, self._rows)
        except OSError:
            os.truncate(self.journal, size)  # the click was refused: a restart must not replay it
            raise
        finally:
            self._signature = _signature(self.journal)
        self._clicks.append(click)
        self._rows = rows

    def _write_table(self, rows: dict[Key, list[str]], before: dict[Key, list[str]]) -> None:
        """Write `rows` to the table. If another program has changed it since it held `before`, save a copy first."""
        content, actual = _content(COLUMNS, rows.values()), _bytes(self.path)
        if actual != content:
            if actual != self._table and not (self._is_part(actual, rows) or self._is_part(actual, before)):
                _save_edited(self.path, actual)
            _replace(self.path, content)
        self._table = content

    def _is_part(self, content: bytes, rows: dict[Key, list[str]]) -> bool:
        """Return whether a table holds nothing but these rows, or the first of them, in any spelling of CSV."""
        if _content(COLUMNS, rows.values()).startswith(content):
            return True
        try:
            held = self._rows_of(content)
        except UserError:
            return False
        return held == list(rows.values())[: len(held)]

    def _rows_of(self, table: bytes) -> list[list[str]]:
        """Return the rows of a table whose last line may lack its end. Raises UserError as `_parse` does."""
        return self._parse(self.path, table.rstrip(b"\r\n") + b"\n", COLUMNS)[0]

    def _read(self) -> tuple[list[list[str]], bytes]:
        """Return the journal's clicks, and an unfinished last line to drop; without a journal, the table as clicks.

        An unfinished line is a click that a crash cut off, unless the table shows that it was confirmed. Raises
        UserError for files that are no journal or table of ratings.
        """
        content = _bytes(self.journal)
        if _content(JOURNAL_COLUMNS).startswith(content):  # absent, or cut off in its first line
            return self._read_table(), b""
        clicks, tail = self._parse(self.journal, content, JOURNAL_COLUMNS)
        for line, (_, action, *cells) in enumerate(clicks, 2):
            if action not in ACTIONS or (action == "rate" and not _is_rating(cells)):
                raise UserError(
                    f"{str(self.journal)!r} line {line}: action {action!r}, rating {cells[1]!r} of expert level "
                    f"{cells[3]!r}; correct the line, or move the journal away to start from the table"
                )
        if click := self._confirmed(tail, _replay(clicks)):
            return [*clicks, click], b""
        return clicks, tail

    def _confirmed(self, tail: bytes, rows: dict[Key, list[str]]) -> list[str] | None:
        """Return the click of an unfinished last line if the table shows it, else None."""
        try:
            line = _content(JOURNAL_COLUMNS) + tail + b"\n"
            ((_, action, *cells),) = clicks = self._parse(self.journal, line, JOURNAL_COLUMNS)[0]
            table = {_key(row): row for row in self._rows_of(_bytes(self.path))}
        except (UserError, ValueError):
            return None
        key = _key(cells)
        shown = table.get(key) == cells if action == "rate" else key in rows and key not in table
        return clicks[0] if shown else None

    def _read_table(self) -> list[list[str]]:
        """Return the rows of a table without a journal as clicks made now. Raises UserError for any fault."""
        content = _bytes(self.path)
        if not content:
            return []
        try:
            table, faults = read_table(self.path, COLUMNS, "ratings table", free_text="prompt")
            header = next(csv.reader(io.StringIO(content.decode("utf-8-sig"), newline="")))
            if len(list(filter(None, header))) > len(COLUMNS):
                raise UserError(f"its columns are not {', '.join(COLUMNS)} alone")
        except UserError as error:
            raise UserError(f"{str(self.path)!r} is another file ({error}); give another --out") from error
        now, clicks, lines = time.strftime(TIME, time.gmtime()), [], {}
        for line, fields in table:
            cells = [fields[name] for name in COLUMNS]
            cells[0] = self._tidy(cells[0])
            if not _is_rating(cells):
                faults.add(line, f"rating {cells[1]!r} of expert level {cells[3]!r}; both are 1 to 3")
            if cells[5] and (first := lines.setdefault(_key(cells), line)) != line:
                again = f"{cells[5]!r} rates {cells[0]!r} a second time, first in line {first}"
                faults.add(line, f"{again}; remove one of the lines")
            clicks.append([now, "rate", *cells])
        faults.refuse()
        return clicks

    def _parse(self, path: Path, content: bytes, columns: Sequence[str]) -> tuple[list[list[str]], bytes]:
        """Return the cells of every complete line after the header, and the unfinished rest.

        Raises UserError for another header, a line of another length, and content that is not UTF-8 CSV.
        """
        end = content.rfind(b"\n") + 1
        try:
            header, *rows = csv.reader(io.StringIO(content[:end].decode("utf-8-sig"), newline=""))
        except (ValueError, csv.Error):
            header, rows = [], []
        if header != list(columns):
            raise UserError(
                f"{str(path)!r} is another file, or was changed by another program: its first line is not "
                f"{','.join(columns)}; move it away, or give another --out"
            )
        for line, cells in enumerate(rows, 2):
            if cells and len(cells) != len(columns):
                raise UserError(f"{str(path)!r} line {line} does not have {len(columns)} cells; correct or remove it")
        rows, image = [[unprotected(cell) for cell in cells] for cells in rows if cells], columns.index("image_path")
        for cells in rows:
            cells[image] = self._tidy(cells[image])
        return rows, content[end:]

    def _tidy(self, image_path: str) -> str:
        """Return a path relative to the table's folder, as items have it."""
        folder = os.path.abspath(self.path.parent)
        return os.path.relpath(os.path.join(folder, image_path), folder)


def _replay(clicks: Iterable[Sequence[str]], before: Mapping[Key, list[str]] | None = None) -> dict[Key, list[str]]:
    """Return the rows of the table after these clicks. A second rating replaces the first."""
    rows = dict(before or {})
    for place, (_, action, *cells) in enumerate(clicks):
        key = _key(cells) if cells[5] else (str(place),)  # unknown raters may repeat
        if action in ("rate", "undo"):
            rows.pop(key, None)
        if action == "rate":
            rows[key] = cells
    return rows


def _key(cells: Sequence[str]) -> Key:
    return cells[0], cells[4], cells[5]


def _is_rating(cells: Sequence[str]) -> bool:
    return all((value := number(cell)) is not None and 1 <= value <= 3 for cell in (cells[1], cells[3]))


def _content(header: Sequence[str], rows: Iterable[Sequence[str]] = ()) -> bytes:
    return b"".join(_line(tuple(cells)) for cells in (header, *rows))


@cache
def _line(cells: tuple[str, ...]) -> bytes:
    """Return a row of a file; cached, since every click writes all rows again."""
    return table_text(cells, []).encode()


def _bytes(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


def _signature(path: Path) -> tuple[int, ...] | None:
    """Return identity, size and time of a file, which change when another program writes it."""
    try:
        state = path.stat()
    except FileNotFoundError:
        return None
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns


def _save_edited(path: Path, content: bytes) -> None:
    names = (path.with_name(f"{path.stem}.edited-{number}.csv") for number in itertools.count(1))
    copy = next(name for name in names if not name.exists())
    _replace(copy, content)
    logger.warning("%s was changed by another program and is restored; the other content is in %s", path, copy)


def _replace(path: Path, content: bytes) -> None:
    with atomic_write(path.resolve(), durable=True) as temporary:
        temporary.write_bytes(content)
