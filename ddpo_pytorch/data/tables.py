"""The one reader and the one writer of CSV tables: split tables, metadata, captions, ratings, per-image results.

Tables are written by people and by spreadsheets: headers in any case, spaces after commas, captions with commas that
nobody quoted. Rows with faults are collected with their lines, so that one message describes several of them.
"""

import csv
import io
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.files import atomic_write, open_regular

# other spellings of columns' names, as `_spelling` returns them
SYNONYMS = {"modal": "modality"}
DESCRIBED = 3  # faults of a table that a message describes; the others are counted
_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
# what begins with a sign and is no formula: a number, perhaps with its interval
_VALUE = re.compile(rf"{_NUMBER.pattern}( \[{_NUMBER.pattern}, {_NUMBER.pattern}\])?|[-+](inf|nan)")
# what a cell has to begin with for a spreadsheet to run it; also the full-width forms that some of them accept
_FORMULA = tuple("=+-@\t\r\n＝＋－＠")
# what the cells of well-known columns look like; it decides where a caption with unquoted commas ends.
_FORMS = {
    "path": re.compile(r".+\.(png|jpe?g|tiff?|bmp|webp|ppm)", re.IGNORECASE),
    "modality": re.compile(r"[A-Za-z]*"),
    "eye": re.compile(r"left|right|l|r|od|os|", re.IGNORECASE),
    **dict.fromkeys(("age", "rating", "expert_level", "quality", "alignment"), re.compile(f"({_NUMBER.pattern})?")),
}
_FORMS["image_path"] = _FORMS["path"]
# between the quote that closes a cell, empty or not, and the comma; it is not CSV, but is written
_SPACE_AFTER_QUOTE = re.compile(r'((?<!")"|(?<![^,\s])"")[ \t]+(?=,|\r?\n?$)')
_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "vertical bars"}


@dataclass(frozen=True)
class Faults:
    """What is wrong with the rows of a table, as (line, text). `refuse` raises it."""

    path: str
    found: list[tuple[int, str]] = field(default_factory=list)

    def add(self, line: int, text: str) -> None:
        self.found.append((line, text))

    def refuse(self) -> None:
        """Raise UserError that describes the first faults and counts the others. Return if there are none."""
        if not self.found:
            return
        ordered = sorted(self.found, key=lambda fault: fault[0])
        text = "; ".join(f"line {line}: {_cut(text)}" for line, text in ordered[:DESCRIBED])
        if others := ordered[DESCRIBED:]:
            lines = list(dict.fromkeys(str(line) for line, _ in others))
            named = f"{', '.join(lines[:10])}{', ...' if lines[10:] else ''}"
            text += f" (and {len(others)} more fault{'s'[: len(others) > 1]}, in line{'s'[: len(lines) > 1]} {named})"
        raise UserError(f"{self.path!r} {text}")


def read_table(
    path: str | Path, columns: Sequence[str], what: str, optional: Sequence[str] = (), free_text: str = ""
) -> tuple[list[tuple[int, dict[str, str]]], Faults]:
    """Return (line, cells by column) of every row, and the faults so far, to which the caller adds.

    All `columns` have to be there. Their names and those of `optional` columns match in any case, with spaces or
    underscores, and are returned in the given spelling; other columns keep theirs. Cells are stripped, and what
    `protected` has put before a formula is removed. Empty lines are skipped. Cells of the column `free_text` may hold
    commas that are not quoted, and their white space becomes single spaces: a row with too many cells is resolved where
    all others look as they do in other rows; otherwise it is a fault, like a row with too few. `what` names the table
    in errors.

    Raises UserError for a missing or undecodable file, another separator than the comma, an unclosed quote, and a
    missing or repeated column.
    """
    if not os.path.exists(path):
        raise UserError(f"{what} {str(path)!r} does not exist; give a CSV with the columns {', '.join(columns)}")
    where = f"{what} {str(path)!r}"
    with open_regular(path) as file:
        text = _decode(file.read(), where)
    records = list(_records(text, where))
    header = _header(records[0][1] if records else [], columns, optional, where, _separator_hint(text))
    free = header.index(free_text) if free_text else None
    faults, rows, long = Faults(str(path)), [], []
    for line, cells in records[1:]:
        if len(cells) == len(header):
            rows.append((line, cells))
        elif len(cells) > len(header):
            long.append((line, cells))
        else:
            faults.add(line, _miscounted(cells, header))
    seen = [{cells[index] for _, cells in rows} for index in range(len(header))]
    for line, cells in long:
        resolved = _resolve(cells, header, free, seen)
        if resolved:
            rows.append((line, resolved))
        elif free_text:
            text = f"{_miscounted(cells, header)}, and the commas may belong to more than one column"
            faults.add(line, f"{text}; put the cell of {free_text} in double quotes")
        else:
            faults.add(line, f"{_miscounted(cells, header)}; put cells that hold commas in double quotes")
    named = []
    for line, cells in sorted(rows):
        fields = {name: unprotected(cell) for name, cell in zip(header, cells, strict=True) if name}
        if free_text:
            fields[free_text] = " ".join(fields[free_text].split())
        named.append((line, fields))
    return named, faults


def choice(fields: Mapping[str, str], name: str, default: str = "") -> str:
    """Return the cell of an optional column; `default` where the table lacks it or the cell is empty."""
    return fields.get(name) or default


def number(text: str) -> float | None:
    """Return the number that a cell states in plain ASCII, such as "1", "1.0" or "1e-3"; None for any other text."""
    return float(text) if _NUMBER.fullmatch(text) else None


def table_text(header: Sequence[str], rows: Iterable[Sequence[Any] | Mapping[str, Any]]) -> str:
    """Return a table as CSV. Rows are cells in the header's order, or by column.

    Cells are `protected` unless they are numbers; None is an empty cell.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    all_quoted = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL)
    for row in (header, *rows):
        values = [row.get(name) for name in header] if isinstance(row, Mapping) else row
        cells = [one if one is None or isinstance(one, int | float) else protected(str(one)) for one in values]
        # the module does not quote a lone carriage return, which ends a line for readers
        quoted = any(isinstance(cell, str) and "\r" in cell for cell in cells)
        (all_quoted if quoted else writer).writerow(cells)
    return text.getvalue()


def write_table(path: str | Path, header: Sequence[str], rows: Iterable[Sequence[Any] | Mapping[str, Any]]) -> None:
    """Write a table as `table_text` states it, in UTF-8; the file appears whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(table_text(header, rows).encode())


def protected(cell: str) -> str:
    """Return a cell as a file holds it: with an apostrophe in front where a spreadsheet would run it as a formula.

    One that begins with apostrophes and a formula gets one more, so that `unprotected` restores every cell.
    """
    return f"'{cell}" if _runs(cell) else cell


def unprotected(cell: str) -> str:
    """Return the cell that `protected` was given."""
    return cell[1:] if cell.startswith("'") and _runs(cell) else cell


def _runs(cell: str) -> bool:
    """Tell whether a cell, without apostrophes in front, is a formula to a spreadsheet."""
    cell = cell.lstrip("'")
    return cell.startswith(_FORMULA) and not _VALUE.fullmatch(cell)


def _cut(text: str, longest: int = 300) -> str:
    """Return a text for a message, without the end of one that quotes a huge cell."""
    return text if len(text) <= longest else f"{text[: longest // 2]} ... {text[-longest // 2 :]}"


def _miscounted(cells: Sequence[str], header: Sequence[str]) -> str:
    return f"has {len(cells)} cell{'s'[: len(cells) > 1]} where the header has {len(header)}"


def _decode(content: bytes, where: str) -> str:
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{where} is in UTF-16; save it as CSV in UTF-8")
    if b"\0" in content:
        line = content[: content.index(b"\0")].count(b"\n") + 1
        raise UserError(f"{where} line {line}: there is a NUL byte, as in UTF-16 or binary files; save it as UTF-8 CSV")
    try:
        return content.decode("utf-8-sig")  # spreadsheets put a byte-order mark first
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"{where} line {line} cannot be read as UTF-8 ({error}); save it as UTF-8 CSV") from error


def _separator_hint(text: str) -> str:
    """Return what to do about a table whose first line has more of another separator than commas, or ""."""
    first = text.lstrip().partition("\n")[0]
    separator = max(_SEPARATORS, key=first.count)
    if first.count(separator) <= first.count(","):
        return ""
    return f"its cells seem to be separated by {_SEPARATORS[separator]}; save it as CSV with commas"


def _records(text: str, where: str) -> Iterator[tuple[int, list[str]]]:
    """Yield (first line, stripped cells) of the records that are not empty."""
    first, count = 1, 0
    lines = (_SPACE_AFTER_QUOTE.sub(r"\1", line) for line in io.StringIO(text, newline=""))
    reader = csv.reader(lines, skipinitialspace=True, strict=True)
    try:
        for record in reader:
            cells = [cell.strip() for cell in record]
            if any(cells):
                count += 1
                yield first, cells
            first = reader.line_num + 1
    except csv.Error as error:
        hint = (
            f"a double quote is opened and not closed, or text follows a closed one ({error}); write a quote inside a "
            "quoted cell twice"
        )
        raise UserError(f"{where} line {first}: {_separator_hint(text) * (not count) or hint}") from error


def _spelling(name: str) -> str:
    """Return a column's name as names are compared: in small letters, underscores for spaces, no byte-order mark."""
    name = "_".join(name.replace("\ufeff", " ").lower().split())
    return SYNONYMS.get(name, name)


def _header(cells: Sequence[str], columns: Sequence[str], optional: Sequence[str], where: str, hint: str) -> list[str]:
    known = {_spelling(name): name for name in (*columns, *optional)}
    spelled = [_spelling(cell) for cell in cells]
    if absent := [name for name in columns if _spelling(name) not in spelled]:
        found = f"its first line has {_cut(', '.join(filter(None, cells))) or 'none'}"
        raise UserError(f"{where} lacks the columns {', '.join(absent)}; {hint or found}")
    if twice := sorted({name for name in spelled if name and spelled.count(name) > 1}):
        names = _cut(", ".join(repr(known.get(name, name)) for name in twice))
        raise UserError(f"{where} has the column{'s'[: len(twice) > 1]} {names} twice; remove or rename one of each")
    return [known.get(spelling, cell) for spelling, cell in zip(spelled, cells, strict=True)]


def _resolve(
    cells: Sequence[str], header: Sequence[str], free: int | None, seen: Sequence[set[str]]
) -> list[str] | None:
    """Return as many cells as the header has; None where no reading of the surplus, or more than one, fits."""
    readings = []
    if free is not None:
        end = free + len(cells) - len(header) + 1
        if cells[end - 1]:  # a text does not end in a comma
            readings.append([*cells[:free], ", ".join(cells[free:end]), *cells[end:]])
    if not any(cells[len(header) :]):  # spreadsheets fill rows up with empty cells
        readings.append(list(cells[: len(header)]))
    others = [index for index in range(len(header)) if index != free]
    fitting = [
        reading for reading in readings if all(_fits(reading[index], header[index], seen[index]) for index in others)
    ]
    return fitting[0] if len(fitting) == 1 else None


def _fits(cell: str, name: str, seen: set[str]) -> bool:
    if form := _FORMS.get(name.lower()):
        return bool(form.fullmatch(cell))
    if any("," in other for other in seen):
        return False  # another column of free text
    return cell in seen or not any(" " in text for text in (cell, *seen))


# control and format characters, halves of UTF-16 pairs, and separators, of which only the plain space is seen
_CATEGORIES = ("Cc", "Cf", "Cs", "Zl", "Zp", "Zs")
# printable, but without a shape of their own: joiners, fillers, variation selectors, the blank Braille pattern
_OTHERS = frozenset(
    chr(code)
    for low, high in (
        *((0x034F, 0x034F), (0x115F, 0x1160), (0x17B4, 0x17B5), (0x180B, 0x180F), (0x2800, 0x2800), (0x3164, 0x3164)),
        *((0xFE00, 0xFE0F), (0xFFA0, 0xFFA0), (0xE0100, 0xE01EF)),
    )
    for code in range(low, high + 1)
)
_CONTROL_NAMES = {"\0": "NUL", "\t": "tab", "\n": "line feed", "\r": "carriage return"}


def invisible_character(text: str) -> str | None:
    """Return which character of a text is invisible and what to do about it, to follow the text; None if all are seen.

    Invisible are tabs, line breaks, NUL, byte-order marks, zero-width joiners and the like, and spaces other than the
    plain one.
    """
    for place, character in enumerate(text, start=1):
        unseen = character in _OTHERS or unicodedata.category(character) in _CATEGORIES
        if unseen and character != " ":
            name = unicodedata.name(character, _CONTROL_NAMES.get(character, "a control character"))
            return (
                f"has the invisible character U+{ord(character):04X} ({name}) at position {place}; delete it, or type "
                "a plain space in its place"
            )
    return None
