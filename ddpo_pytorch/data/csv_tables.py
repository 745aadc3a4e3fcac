"""Tables written by people: headers in any case, spaces after commas, captions with commas that nobody quoted.

Every fault is found before any is told, and each is told with the line on which its row begins.
"""

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ddpo_pytorch.errors import UserError

# spellings of a column's name, in small letters, beside its own
SYNONYMS = {"modal": "modality"}
# what the cells of well-known columns look like; it decides where a caption with unquoted commas ends.
_NUMBER = re.compile(r"[-+]?\d*\.?\d*", re.ASCII)
_FORMS = {
    "path": re.compile(r".+\.(png|jpe?g|tiff?|bmp|webp|ppm)", re.IGNORECASE),
    "modality": re.compile(r"[A-Za-z]*"),
    "eye": re.compile(r"left|right|l|r|od|os|", re.IGNORECASE),
    **dict.fromkeys(("age", "rating", "expert_level", "quality", "alignment"), _NUMBER),
}
_FORMS["image_path"] = _FORMS["path"]


@dataclass(frozen=True)
class Faults:
    """What is wrong with a table, as (line, what); `refuse` raises it."""

    path: str
    found: list[tuple[int, str]]

    def add(self, line: int, text: str) -> None:
        self.found.append((line, text))

    def refuse(self) -> None:
        """Raise UserError with the first fault and the lines of the others. Does nothing where there is none."""
        if not self.found:
            return
        (line, text), *others = sorted(self.found, key=lambda fault: fault[0])
        more = ""
        if others:
            lines = list(dict.fromkeys(str(number) for number, _ in others))
            named = f"{', '.join(lines[:10])}{', ...' if lines[10:] else ''}"
            more = (
                f" (and {len(others)} further fault{'s' * (len(others) > 1)}, in line{'s' * (len(lines) > 1)} {named})"
            )
        raise UserError(f"{self.path!r} line {line}: {text}{more}")


def read_table(
    path: str | Path, columns: Sequence[str], free_text: str, what: str
) -> tuple[list[tuple[int, dict[str, str]]], Faults]:
    """(first line, cells by column) of every row, and the faults so far, to which the caller adds his own.

    `columns` must be there, in any case; `free_text` is the one whose cells may hold commas that are not quoted. Other
    columns are carried along, their names in small letters. Cells are stripped, and white space in the free text
    becomes one space. Empty lines are passed over. A row with too many cells is resolved where all but the free text
    look as they do in other rows; otherwise it is a fault, like one with too few. `what` names the table in errors.

    Raises UserError for a missing or undecodable file, an unclosed quote, a missing or repeated column.
    """
    if not Path(path).is_file():
        raise UserError(f"{what} {str(path)!r} does not exist; give a CSV with the columns {', '.join(columns)}")
    records = list(_records(path, what))
    header = _header(records[0][1] if records else [], columns, f"{what} {str(path)!r}")
    faults, rows, long = Faults(str(path), []), [], []
    for line, cells in records[1:]:
        if len(cells) == len(header):
            rows.append((line, cells))
        elif len(cells) > len(header):
            long.append((line, cells))
        else:
            faults.add(line, f"{_cells(len(cells))} where the header has {len(header)}")
    seen = [{cells[index] for _, cells in rows} for index in range(len(header))]
    for line, cells in long:
        resolved = _resolve(cells, header, header.index(free_text), seen)
        if resolved is None:
            faults.add(
                line,
                f"{_cells(len(cells))} where the header has {len(header)}, and which commas belong to {free_text} "
                "cannot be told; put that cell in double quotes",
            )
        else:
            rows.append((line, resolved))
    named = []
    for line, cells in sorted(rows):
        fields = {name: cell for name, cell in zip(header, cells, strict=True) if name}
        named.append((line, fields | {free_text: " ".join(fields[free_text].split())}))
    return named, faults


def choice(fields: Mapping[str, str], name: str, default: str = "") -> str:
    """The cell of an optional column; `default` where the table lacks it or the cell is empty."""
    return fields.get(name) or default


def _cells(number: int) -> str:
    return f"has {number} cell{'s' * (number > 1)}"


def _records(path: str | Path, what: str) -> Iterator[tuple[int, list[str]]]:
    """(first line, stripped cells) of the records that are not empty."""
    first = 1
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:  # spreadsheets put a byte-order mark first
            # a blank between a closing quote and the comma is not CSV, but is written
            lines = (re.sub(r'(?<!")"[ \t]+(?=,|\r?\n?$)', '"', line) for line in file)
            reader = csv.reader(lines, skipinitialspace=True, strict=True)
            for record in reader:
                cells = [cell.strip() for cell in record]
                if any(cells):
                    yield first, cells
                first = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{what} {str(path)!r} line {first}: a double quote is opened and not closed, or text follows a closed one "
            f"({error}); write a quote inside a quoted cell twice"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{what} {str(path)!r} cannot be read as UTF-8 ({error}); save it as UTF-8 CSV") from error


def _header(cells: Sequence[str], columns: Sequence[str], where: str) -> list[str]:
    spelled = {name.lower(): name for name in columns}
    names = [SYNONYMS.get(cell.lower(), cell.lower()) for cell in cells]
    names = [spelled.get(name, name) for name in names]
    absent = [name for name in columns if name not in names]
    if absent:
        raise UserError(
            f"{where} lacks the columns {', '.join(absent)}; its first line has {', '.join(cells) or 'none'}"
        )
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        raise UserError(f"{where} has the column {twice[0]!r} twice; remove or rename one of them")
    return names


def _resolve(cells: Sequence[str], header: Sequence[str], free: int, seen: Sequence[set[str]]) -> list[str] | None:
    """As many cells as the header has, or None where no reading of the surplus, or more than one, fits the columns."""
    end = free + len(cells) - len(header) + 1
    readings = []
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
    if name in _FORMS:
        return bool(_FORMS[name].fullmatch(cell))
    if any("," in other for other in seen):
        return False  # another column of free text
    return cell in seen or not any(" " in text for text in (cell, *seen))
