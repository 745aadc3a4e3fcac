"""CSV tables written by people and spreadsheets: one reader, one writer, and rules for cells."""

import csv
import io
import os
import posixpath
import re
import unicodedata
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.files import open_regular, write_file

T = TypeVar("T")
SYNONYMS = (("modality", "modal"), ("path", "file_name"))  # normalised column names, either for the other
DESCRIBED = 3  # faults of a table that a message quotes; the others are counted
_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
# text that begins with a sign but is not a formula: a number, optionally with its interval
_VALUE = re.compile(rf"{_NUMBER.pattern}( \[{_NUMBER.pattern}, {_NUMBER.pattern}\])?|[-+](inf|nan)")
# first characters of cells that spreadsheets evaluate; some accept the full-width forms
_FORMULA = tuple("=+-@\t\r\n＝＋－＠")
# formats of well-known columns, which determine where a caption with unquoted commas ends
_FORMS = {
    **dict.fromkeys(("path", "image_path"), re.compile(r".+\.(png|jpe?g|tiff?|bmp|webp|ppm|dcm)", re.IGNORECASE)),
    "modality": re.compile(r"[A-Za-z]*"),
    "eye": re.compile(r"left|right|l|r|od|os|", re.IGNORECASE),
    **dict.fromkeys(("age", "rating", "expert_level", "quality", "alignment"), re.compile(f"({_NUMBER.pattern})?")),
}
# spaces between a closing quote and the comma: invalid CSV, but common
_SPACE_AFTER_QUOTE = re.compile(r'((?<!")"|(?<![^,\s])"")[ \t]+(?=,|\r?\n?$)')
_COMMAS = "cells are separated by commas, not by semicolons or tabs"
# control and format characters, surrogates, and separators other than the space
_INVISIBLE_CATEGORIES = ("Cc", "Cf", "Cs", "Zl", "Zp", "Zs")
# printable characters without a glyph: joiners, fillers, variation selectors, the blank Braille pattern
_BLANK = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]")
_CONTROL_NAMES = {"\0": "NUL", "\t": "tab", "\n": "line feed", "\r": "carriage return"}


@dataclass(frozen=True)
class Row:
    """A row about an image: its path or id, its caption, every column as text, and the row's number from 0.

    ISIC tables also determine labels (in the order of `isic.LABELS`), fundus tables a patient.
    """

    image: str
    caption: str
    fields: dict[str, str]
    number: int
    labels: tuple[int, ...] = ()
    patient: str = ""


def read_table(
    path: str | Path,
    what: str,
    columns: Sequence[str],
    make: Callable[[dict[str, str], int, int, list[str]], tuple[T, Hashable, str]],
    optional: Sequence[str] = (),
    free_text: str = "",
    content: bytes | None = None,
    advice: str = "",
) -> list[T]:
    """Return the rows of a table (or of `content`, if given), made by `make(cells by column, number, line, faults)`.

    `make` appends to `faults` and returns the row, a key that must be unique (unless None), and the row's name.
    `columns` (required) and `optional` match in any case and with spaces or underscores, and are passed as spelled
    here; other columns keep their names. Cells are stripped and `unprotected`, empty lines skipped. White space in the
    column `free_text` becomes single spaces, and it may contain unquoted commas: a row with too many cells is resolved
    if its other cells then look like those of other rows.

    Raises UserError with `what` for a missing or undecodable file, another separator, an unclosed quote, a missing or
    repeated column, and, given `advice`, no rows; and with line numbers for faults and rows of another length.
    """
    where = f"{what} {str(path)!r}"
    if content is None:
        if not os.path.exists(path):
            raise UserError(f"{where} does not exist; give a CSV with the columns {', '.join(columns)}")
        with open_regular(path, "give a file") as file:
            content = file.read()
    (_, first), *records = list(_records(content, where)) or [(1, [])]
    header = _header(first, columns, optional, where)
    free = header.index(free_text) if free_text else None
    regular = [cells for _, cells in records if len(cells) == len(header)]
    seen = [set(column) for column in zip(*regular, strict=True)] or [set()] * len(header)
    rows: list[T] = []
    faults: list[tuple[int, str]] = []
    lines: dict[Hashable, int] = {}
    for line, cells in records:
        if len(cells) > len(header):
            cells = _resolve(cells, header, free, seen) or cells
        if len(cells) != len(header):
            quoted = f"the cell of {free_text}" if free_text else "cells that hold commas"
            hint = f"; put {quoted} in double quotes" if len(cells) > len(header) else ""
            faults.append((line, f"has {len(cells)} cells where the header has {len(header)}{hint}"))
            continue
        fields = {name: unprotected(cell) for name, cell in zip(header, cells, strict=True) if name}
        if free_text:
            fields[free_text] = " ".join(fields[free_text].split())
        row_faults: list[str] = []
        row, key, name = make(fields, len(rows), line, row_faults)
        if key is not None and not row_faults and (before := lines.setdefault(key, line)) != line:
            row_faults = [f"{name} appears twice, first in line {before}; remove one of them"]
        faults += [(line, fault) for fault in row_faults]
        rows.append(row)
    if faults:
        message = "; ".join(f"line {line}: {_cut(text)}" for line, text in faults[:DESCRIBED])
        if others := list(dict.fromkeys(str(line) for line, _ in faults[DESCRIBED:])):
            listed = f"{', '.join(others[:10])}{', ...' if others[10:] else ''}"
            message += f" (and {len(faults) - DESCRIBED} more, in line {listed})"
        raise UserError(f"{str(path)!r} {message}")
    if advice and not rows:
        raise UserError(f"{where} has a header and no rows; {advice}")
    return rows


def tidy_path(text: str) -> str:
    """Return a path with forward slashes and without `./` and `a/../`; "" for an empty cell."""
    return posixpath.normpath(text.replace("\\", "/")) if text else ""


def number(text: str) -> float | None:
    """Return the number in a cell of plain ASCII, such as "1", "1.0" or "1e-3"; None for any other text."""
    return float(text) if _NUMBER.fullmatch(text) else None


def table_text(header: Sequence[str], rows: Iterable[Sequence[Any] | Mapping[str, Any]]) -> str:
    """Return rows, given in the header's order or by column, as CSV; text is `protected`, None is an empty cell."""
    lines: list[str] = []
    writer = csv.writer(SimpleNamespace(write=lines.append))  # ends lines in CR LF, and quotes cells with either
    for row in (header, *rows):
        values = [row.get(name) for name in header] if isinstance(row, Mapping) else row
        writer.writerow([x if x is None or isinstance(x, int | float) else protected(str(x)) for x in values])
    return "".join(line.removesuffix("\r\n") + "\n" for line in lines)


def write_table(path: str | Path, header: Sequence[str], rows: Iterable[Sequence[Any] | Mapping[str, Any]]) -> None:
    """Write `table_text` in UTF-8, atomically."""
    write_file(path, table_text(header, rows))


def protected(cell: str) -> str:
    """Return a cell as it is written: with an extra apostrophe before a formula that a spreadsheet would evaluate."""
    return f"'{cell}" if _is_formula(cell) else cell


def unprotected(cell: str) -> str:
    """Undo `protected`."""
    return cell[1:] if cell.startswith("'") and _is_formula(cell) else cell


def _is_formula(cell: str) -> bool:
    cell = cell.lstrip("'")
    return cell.startswith(_FORMULA) and not _VALUE.fullmatch(cell)


def invisible_character(text: str) -> str | None:
    """Return a fault with the first character that is invisible to people but not to tokenizers, or None."""
    for position, character in enumerate(text, start=1):
        invisible = unicodedata.category(character) in _INVISIBLE_CATEGORIES or _BLANK.match(character)
        if character != " " and invisible:
            name = unicodedata.name(character, _CONTROL_NAMES.get(character, "a control character"))
            return f"has the invisible character U+{ord(character):04X} ({name}) at position {position}; delete it"
    return None


def _cut(text: str) -> str:
    return text if len(text) <= 300 else f"{text[:150]} ... {text[-150:]}"  # a fault may quote a huge cell


def _records(content: bytes, where: str) -> Iterator[tuple[int, list[str]]]:
    """Yield (first line, stripped cells) of non-empty records. Raises UserError unless they are text."""
    try:
        text, bad = content.decode("utf-8-sig"), content.find(b"\0")  # spreadsheets put a byte-order mark first
    except UnicodeDecodeError as error:
        text, bad = "", error.start
    if bad >= 0:
        line = content[:bad].count(b"\n") + 1
        raise UserError(f"{where} line {line}: byte {content[bad]:#04x} is not text; save the table as CSV in UTF-8")
    first = 1
    lines = (_SPACE_AFTER_QUOTE.sub(r"\1", line) for line in io.StringIO(text, newline=""))
    reader = csv.reader(lines, skipinitialspace=True, strict=True)
    try:
        for record in reader:
            cells = [cell.strip() for cell in record]
            if any(cells):
                yield first, cells
            first = reader.line_num + 1
    except csv.Error as error:
        hint = f"a double quote is opened but not closed, or text follows a closed one ({error})"
        raise UserError(f"{where} line {first}: {hint}; {_COMMAS}") from error


def _normalized(name: str) -> str:
    """Return a column's name for comparison: lower case, underscores for spaces, no byte-order mark."""
    return "_".join(name.replace("\ufeff", " ").lower().split())


def _header(cells: Sequence[str], columns: Sequence[str], optional: Sequence[str], where: str) -> list[str]:
    known = {_normalized(name): name for name in (*columns, *optional)}
    names = [_normalized(cell) for cell in cells]
    for wanted, synonym in (*SYNONYMS, *(pair[::-1] for pair in SYNONYMS)):
        if wanted in known and wanted not in names:
            names = [wanted if name == synonym else name for name in names]
    if absent := [name for name in columns if _normalized(name) not in names]:
        first = _cut(", ".join(filter(None, cells))) or "none"
        raise UserError(f"{where} lacks the columns {', '.join(absent)}; its first line has {first}; {_COMMAS}")
    if twice := sorted({name for name in names if name and names.count(name) > 1}):
        listed = _cut(", ".join(repr(known.get(name, name)) for name in twice))
        raise UserError(f"{where} has the column {listed} twice; remove or rename one of each")
    return [known.get(name, cell) for name, cell in zip(names, cells, strict=True)]


def _resolve(cells: list[str], header: list[str], free: int | None, seen: list[set[str]]) -> list[str] | None:
    """Return as many cells as the header has; None unless exactly one reading of the surplus fits."""
    readings = []
    if free is not None and cells[end := free + len(cells) - len(header)]:  # texts do not end in a comma
        readings.append([*cells[:free], ", ".join(cells[free : end + 1]), *cells[end + 1 :]])
    if not any(cells[len(header) :]):  # spreadsheets pad rows with empty cells
        readings.append(cells[: len(header)])
    others = [index for index in range(len(header)) if index != free]
    readings = [cells for cells in readings if all(_fits(cells[index], header[index], seen[index]) for index in others)]
    return readings[0] if len(readings) == 1 else None


def _fits(cell: str, name: str, seen: set[str]) -> bool:
    """Return whether a cell looks like those `seen` in its column, which is not free text."""
    if form := _FORMS.get(name.lower()):
        return bool(form.fullmatch(cell))
    known = cell in seen or not any(" " in text for text in (cell, *seen))
    return known and not any("," in other for other in seen)
