"""Ratings on disk: a table for training, and a journal of every click.

`ratings.csv` has the columns of `data.ratings.COLUMNS` and is a valid table for `read_ratings` at every moment: a
rating appends a line, and an undo, which takes one away, writes the file whole under the same name.
`ratings.journal.csv` beside it is only ever appended to (time, rate / skip / undo, the columns): who clicked what and
when, undone or not. Each click is on disk (fsync) before it is confirmed: first in the journal, then in the table. A
crash in between is mended at the next start from the journal's last line, and a line that a crash cut off is dropped.
"""

import csv
import errno
import io
import logging
import os
import time
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path

from ddpo_pytorch.data.ratings import COLUMNS
from ddpo_pytorch.errors import UserError
from ddpo_pytorch.files import atomic_write, lock
from ddpo_pytorch.rating.items import Item

JOURNAL_COLUMNS = ("time", "action", *COLUMNS)

logger = logging.getLogger(__name__)


def rater_name(text: str) -> str:
    """A rater's name without spaces around it, in Unicode's composed form.

    Raises UserError unless it has 1 to 64 printable characters and no comma.
    """
    name = unicodedata.normalize("NFC", text.strip())
    if not 1 <= len(name) <= 64 or not name.isprintable() or "," in name:
        raise UserError(f"the rater's name is {text[:80]!r}; give 1 to 64 printable characters without commas")
    return name


class Store:
    """The table at `path` and its journal, for this process alone. Not safe for threads: the caller holds a lock."""

    def __init__(self, path: str | Path):
        """Make or open both files. Raises UserError for another table, a faulty line, or a second process."""
        self.path = Path(path)
        self.journal = self.path.with_name(f"{self.path.stem}.journal.csv")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.journal.is_dir() or self.path.is_dir():
            raise UserError(f"{str(self.path)!r} is a folder, or its journal is; give a file such as ratings.csv")
        self._rows: dict[tuple[str, str, str], list[str]] = {}
        self._unknown = 0
        for path, columns in ((self.journal, JOURNAL_COLUMNS), (self.path, COLUMNS)):
            _read(path, columns)  # a file of somebody else's is refused before anything is written
        taken = f"{str(self.journal)!r} is being written by another rating page; end that one, or give another --out"
        self._lock = lock(self.journal, taken, "rating page")
        new = not self.path.exists()
        clicks = _open(self.journal, JOURNAL_COLUMNS)
        for number, cells in enumerate(_open(self.path, COLUMNS), 2):
            self._check(cells, number)
        if clicks and not new:  # the journal of a table that was moved away tells nothing about a new one
            self._mend(clicks[-1])

    def __len__(self) -> int:
        return len(self._rows) + self._unknown

    def rated(self, rater: str) -> list[tuple[str, str]]:
        """(image_path, prompt) of what a rater has rated, in the order of the table."""
        return [(image_path, prompt) for image_path, prompt, name in self._rows if name == rater]

    def rate(self, item: Item, rating: int, expert_level: int, rater: str) -> None:
        """Append one rating to both files. Raises OSError, with both files as before, when it cannot be written."""
        cells = [item.image_path, str(rating), item.modality, str(expert_level), item.prompt, rater]
        self._click("rate", cells, lambda: _append(self.path, cells))
        self._rows[(*item.key, rater)] = cells

    def skip(self, item: Item, rater: str) -> None:
        """Append a skip to the journal."""
        self._click("skip", [item.image_path, "", item.modality, "", item.prompt, rater])

    def undo(self, item: Item, rater: str) -> None:
        """Append an undo to the journal and take the rater's line, if there is one, out of the table."""
        key = (*item.key, rater)
        cells = self._rows.get(key)
        if cells is None:
            self._click("undo", [item.image_path, "", item.modality, "", item.prompt, rater])
        else:
            self._click("undo", cells, lambda: self._remove(cells))
            del self._rows[key]

    def _click(self, action: str, cells: list[str], change: Callable[[], None] = lambda: None) -> None:
        size = self.journal.stat().st_size
        _append(self.journal, [time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), action, *cells])
        try:
            change()
        except OSError:
            os.truncate(self.journal, size)  # the click did not happen: no next start may make up for it
            raise

    def _remove(self, cells: list[str]) -> None:
        # out of the file as it is now: what somebody else has changed in it since stays.
        lines = self.path.read_bytes().splitlines(keepends=True)
        line = _line(cells)
        _write(self.path, b"".join(one for one in lines if one.rstrip(b"\r\n") != line.rstrip(b"\n")))

    def _check(self, cells: list[str], number: int) -> None:
        where, (image_path, rating, _, level, prompt, rater) = f"{str(self.path)!r} line {number}", cells
        if not (_is_rating(rating) and _is_rating(level)):
            raise UserError(f"{where}: rating {rating!r} of expert level {level!r}; both are 1 to 3. Correct the line")
        if not rater:  # of somebody unknown, as often as there are lines
            self._unknown += 1
            return
        if (key := (image_path, prompt, rater)) in self._rows:
            raise UserError(f"{where}: {rater!r} rates {image_path!r} a second time; remove one of the lines")
        self._rows[key] = cells

    def _mend(self, last: list[str]) -> None:
        """Do in the table what the journal's last click says, if a crash came between the two."""
        _, action, *cells = last
        key = (cells[0], cells[4], cells[5])
        if action == "rate" and key not in self._rows:
            _append(self.path, cells)
            self._rows[key] = cells
            logger.warning("%s: added the last click, which only the journal had", self.path)
        elif action == "undo" and self._rows.get(key) == cells:
            self._remove(cells)
            del self._rows[key]
            logger.warning("%s: removed the last line, which had been undone", self.path)


def _open(path: Path, columns: Sequence[str]) -> list[list[str]]:
    """Cells of every line but the header, which a new file gets; a torn last line is dropped."""
    rows, torn = _read(path, columns)
    size = path.stat().st_size if path.exists() else 0
    if rows is None:
        _append(path, columns, replaced=size)
    elif torn:
        os.truncate(path, size - len(torn))
        text = torn.decode(errors="replace")
        logger.warning("%s: dropped line %d, which was cut off: %r", path, len(rows) + 2, text)
    return rows or []


def _read(path: Path, columns: Sequence[str]) -> tuple[list[list[str]] | None, bytes]:
    """Cells of every whole line but the header, and what follows them; None for a file without a whole header.

    Raises UserError for another header, a line of another length, and what is no UTF-8 CSV.
    """
    content = path.read_bytes() if path.exists() else b""
    if _line(columns).startswith(content) and not content.endswith(b"\n"):
        return None, content
    end = content.rfind(b"\n") + 1
    try:
        header, *rows = csv.reader(io.StringIO(content[:end].decode("utf-8-sig"), newline=""))
    except (ValueError, csv.Error):
        header, rows = [], []
    if header != list(columns):
        raise UserError(
            f"{str(path)!r} is another file (its first line is not {','.join(columns)}); give another --out"
        )
    for number, cells in enumerate(rows, 2):
        if len(cells) != len(columns):
            raise UserError(f"{str(path)!r} line {number} does not have {len(columns)} cells; correct or remove it")
    return rows, content[end:]


def _is_rating(text: str) -> bool:
    try:
        return 1 <= float(text) <= 3
    except ValueError:
        return False


def _line(cells: Sequence[str]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().encode()


def _append(path: Path, cells: Sequence[str], replaced: int = 0) -> None:
    """Append a line, in place of the last `replaced` bytes, and wait until it is on disk; one that does not fit is
    taken back."""
    with open(path, "ab", buffering=0) as file:
        size = file.truncate(file.seek(0, os.SEEK_END) - replaced)
        line = _line(cells)
        try:
            if file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            os.fsync(file.fileno())
        except OSError:
            file.truncate(size)
            raise


def _write(path: Path, content: bytes) -> None:
    """Write a file whole, on disk with its name before this returns."""
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
