"""CSV tables that people and spreadsheets write: one reader, one writer, and the rules of their cells.

Headers come in any case, with spaces after commas, and captions with commas that nobody quoted. pandas reads such rows
without an error and shifts their cells. Rows with faults are collected by line, so that one message lists several.
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

SYNONYMS = {"modal": "modality"}  # of column names, as `_normalized` returns them
DESCRIBED = 3  # faults of a table that a message describes; the others are counted
_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
# text that begins with a sign and is no formula: a number, perhaps with its interval
_VALUE = re.compile(rf"{_NUMBER.pattern}( \[{_NUMBER.pattern}, {_NUMBER.pattern}\])?|[-+](inf|nan)")
# first characters of the cells that spreadsheets run; some of them accept the full-width forms
_FORMULA = tuple("=+-@\t\r\n＝＋－＠")
# cells of well-known columns; they decide where a caption with unquoted commas ends
_FORMS = {
    **dict.fromkeys(("path", "image_path"), re.compile(r".+\.(png|jpe?g|tiff?|bmp|webp|ppm)", re.IGNORECASE)),
    "modality": re.compile(r"[A-Za-z]*"),
    "eye": re.compile(r"left|right|l|r|od|os|", re.IGNORECASE),
    **dict.fromkeys(("age", "rating", "expert_level", "quality", "alignment"), re.compile(f"({_NUMBER.pattern})?")),
}
# spaces between a closing quote and the comma, which are not CSV, but common
_SPACE_AFTER_QUOTE = re.compile(r'((?<!")"|(?<![^,\s])"")[ \t]+(?=,|\r?\n?$)')
_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "vertical bars"}
# control and format characters, surrogates, and separators other than the plain space
_INVISIBLE_CATEGORIES = ("Cc", "Cf", "Cs", "Zl", "Zp", "Zs")
# printable characters without a shape: joiners, fillers, variation selectors, the blank Braille pattern
_INVISIBLE_RANGES = (
    *((0x034F, 0x034F), (0x115F, 0x1160), (0x17B4, 0x17B5), (0x180B, 0x180F), (0x2800, 0x2800), (0x3164, 0x3164)),
    *((0xFE00, 0xFE0F), (0xFFA0, 0xFFA0), (0xE0100, 0xE01EF)),
)
_CONTROL_NAMES = {"\0": "NUL", "\t": "tab", "\n": "line feed", "\r": "carriage return"}


@dataclass(frozen=True)
class Faults:
    """Faults in the rows of a table, as (line, text). `refuse` raises them."""

    path: str
    entries: list[tuple[int, str]] = field(default_factory=list)

    def add(self, line: int, text: str) -> None:
        self.entries.append((line, text))

    def refuse(self) -> None:
        """Raise UserError that describes the first faults and counts the others. Return if there are none."""
        if not self.entries:
            return
        ordered = sorted(self.entries, key=lambda fault: fault[0])
        message = "; ".join(f"line {line}: {_cut(text)}" for line, text in ordered[:DESCRIBED])
        if others := ordered[DESCRIBED:]:
            lines = list(dict.fromkeys(str(line) for line, _ in others))
            listed = f"{', '.join(lines[:10])}{', ...' if lines[10:] else ''}"
            message += f" (and {len(others)} more, in line {listed})"
        raise UserError(f"{self.path!r} {message}")


def read_table(
    path: str | Path, columns: Sequence[str], what: str, optional: Sequence[str] = (), free_text: str = ""
) -> tuple[list[tuple[int, dict[str, str]]], Faults]:
    """Return (line, cells by column) of every row, and the faults so far, to which the caller adds.

    The names of `columns`, which are required, and of `optional` ones match in any case, with spaces or underscores,
    and are returned in the given spelling; other columns keep theirs. Cells are stripped and `unprotected`, empty lines
    skipped. Cells of the column `free_text` may hold unquoted commas, and their white space becomes single spaces: a
    row with too many cells is resolved if all other cells look as in other rows, else it is a fault, like a row with
    too few. `what` names the table in errors.

    Raises UserError for a missing or undecodable file, another separator than the comma, an unclosed quote, and a
    missing or repeated column.
    """
    where = f"{what} {str(path)!r}"
    if not os.path.exists(path):
        raise UserError(f"{where} does not exist; give a CSV with the columns {', '.join(columns)}")
    with open_regular(path) as file:
        text = _decode(file.read(), where)
    (_, first), *records = list(_records(text, where)) or [(1, [])]
    header = _header(first, columns, optional, where, _separator_hint(text))
    free = header.index(free_text) if free_text else None
    regular = [cells for _, cells in records if len(cells) == len(header)]
    seen = [set(column) for column in zip(*regular, strict=True)] or [set()] * len(header)
    table, faults = [], Faults(str(path))
    for line, cells in records:
        if len(cells) > len(header) and (resolved := _resolve(cells, header, free, seen)):
            cells = resolved
        if len(cells) != len(header):
            hint = ""
            if len(cells) > len(header):
                hint = f"; put {f'the cell of {free_text}' if free_text else 'cells that hold commas'} in double quotes"
            faults.add(line, f"has {len(cells)} cell{'s'[: len(cells) > 1]} where the header has {len(header)}{hint}")
            continue
        fields = {name: unprotected(cell) for name, cell in zip(header, cells, strict=True) if name}
        if free_text:
            fields[free_text] = " ".join(fields[free_text].split())
        table.append((line, fields))
    return table, faults


def choice(fields: Mapping[str, str], name: str, default: str = "") -> str:
    """Return the cell of an optional column; `default` if the table lacks it or the cell is empty."""
    return fields.get(name) or default


def number(text: str) -> float | None:
    """Return the number of a cell in plain ASCII, such as "1", "1.0" or "1e-3"; None for any other text."""
    return float(text) if _NUMBER.fullmatch(text) else None


def table_text(header: Sequence[str], rows: Iterable[Sequence[Any] | Mapping[str, Any]]) -> str:
    """Return a table as CSV, from rows of cells in the header's order or by column.

    Cells are `protected` unless they are numbers; None is an empty cell.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    all_quoted = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL)
    for row in (header, *rows):
        values = [row.get(name) for name in header] if isinstance(row, Mapping) else row
        cells = [
            value if value is None or isinstance(value, int | float) else protected(str(value)) for value in values
        ]
        # csv does not quote a lone carriage return, which ends a line for readers
        quoted = any(isinstance(cell, str) and "\r" in cell for cell in cells)
        (all_quoted if quoted else writer).writerow(cells)
    return text.getvalue()


def write_table(path: str | Path, header: Sequence[str], rows: Iterable[Sequence[Any] | Mapping[str, Any]]) -> None:
    """Write `table_text` in UTF-8, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(table_text(header, rows).encode())


def protected(cell: str) -> str:
    """Return a cell as it is written: with an apostrophe before a formula that a spreadsheet would run.

    A formula with apostrophes in front gets one more, so that `unprotected` restores every cell.
    """
    return f"'{cell}" if _is_formula(cell) else cell


def unprotected(cell: str) -> str:
    """Return the cell that `protected` was given."""
    return cell[1:] if cell.startswith("'") and _is_formula(cell) else cell


def _is_formula(cell: str) -> bool:
    cell = cell.lstrip("'")
    return cell.startswith(_FORMULA) and not _VALUE.fullmatch(cell)


def invisible_character(text: str) -> str | None:
    """Return a fault that names the first invisible character of a text, or None.

    Invisible are tabs, line breaks, NUL, byte-order marks, zero-width joiners and the like, and every space but the
    plain one. Nobody sees them in a prompt, but a tokenizer does.
    """
    for position, character in enumerate(text, start=1):
        shapeless = any(low <= ord(character) <= high for low, high in _INVISIBLE_RANGES)
        if character != " " and (shapeless or unicodedata.category(character) in _INVISIBLE_CATEGORIES):
            name = unicodedata.name(character, _CONTROL_NAMES.get(character, "a control character"))
            return f"has the invisible character U+{ord(character):04X} ({name}) at position {position}; delete it"
    return None


def _cut(text: str, longest: int = 300) -> str:
    """Return a text for a message, shortened if it quotes a huge cell."""
    return text if len(text) <= longest else f"{text[: longest // 2]} ... {text[-longest // 2 :]}"


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
    """Return advice for a table of which the first line has more of another separator than commas, or ""."""
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
        hint = f"a double quote is opened and not closed, or text follows a closed one ({error})"
        raise UserError(f"{where} line {first}: {_separator_hint(text) * (not count) or hint}") from error


def _normalized(name: str) -> str:
    """Return a column's name for comparison: lower case, underscores for spaces, no byte-order mark."""
    name = "_".join(name.replace("\ufeff", " ").lower().split())
    return SYNONYMS.get(name, name)


def _header(cells: Sequence[str], columns: Sequence[str], optional: Sequence[str], where: str, hint: str) -> list[str]:
    known = {_normalized(name): name for name in (*columns, *optional)}
    names = [_normalized(cell) for cell in cells]
    if absent := [name for name in columns if _normalized(name) not in names]:
        first = f"its first line has {_cut(', '.join(filter(None, cells))) or 'none'}"
        raise UserError(f"{where} lacks the columns {', '.join(absent)}; {hint or first}")
    if twice := sorted({name for name in names if name and names.count(name) > 1}):
        listed = _cut(", ".join(repr(known.get(name, name)) for name in twice))
        raise UserError(f"{where} has the column {listed} twice; remove or rename one of each")
    return [known.get(name, cell) for name, cell in zip(names, cells, strict=True)]


def _resolve(
    cells: Sequence[str], header: Sequence[str], free: int | None, seen: Sequence[set[str]]
) -> list[str] | None:
    """Return as many cells as the header has; None unless exactly one reading of the surplus fits."""
    readings = []
    if free is not None:
        end = free + len(cells) - len(header) + 1
        if cells[end - 1]:  # a text does not end in a comma
            readings.append([*cells[:free], ", ".join(cells[free:end]), *cells[end:]])
    if not any(cells[len(header) :]):  # spreadsheets fill rows up with empty cells
        readings.append(list(cells[: len(header)]))
    others = [index for index in range(len(header)) if index != free]
    readings = [cells for cells in readings if all(_fits(cells[index], header[index], seen[index]) for index in others)]
    return readings[0] if len(readings) == 1 else None


def _fits(cell: str, name: str, seen: set[str]) -> bool:
    """Return whether a cell looks like those `seen` in its column."""
    if form := _FORMS.get(name.lower()):
        return bool(form.fullmatch(cell))
    if any("," in other for other in seen):
        return False  # another column of free text
    return cell in seen or not any(" " in text for text in (cell, *seen))
