"""The kinds of image tables that there are: modules of the same functions, chosen by name in a configuration.

Each has `load_split(csv, data_path, limit) -> (rows, files, number of rows without an image)` and
`caption_list(rows) -> captions`, in an order that is the same whenever the captions are.
"""

from pathlib import Path
from types import ModuleType
from typing import Protocol

from ddpo_pytorch.data import fundus, isic
from ddpo_pytorch.data.splits import drop_broken, read_splits
from ddpo_pytorch.utils.errors import UserError

KINDS: dict[str, ModuleType] = {"isic": isic, "fundus": fundus}


class Row(Protocol):
    """A line of a table: its caption, every column as text, its number from 0."""

    caption: str
    fields: dict[str, str]
    number: int


def source(kind: str) -> ModuleType:
    """The module of that name. Raises UserError that lists the names."""
    if kind not in KINDS:
        raise UserError(f"tables of the kind {kind!r} are not read; allowed are {', '.join(KINDS)}")
    return KINDS[kind]


def find_rows(kind: str, csv: str | Path, data_path: str | Path, limit: int, skip_broken: bool):
    """`load_split` of that kind: rows with an image, their files, the number of rows without one.

    `skip_broken` leaves damaged images out; of fundus images, which are all decoded here, others raise UserError.
    """
    rows, paths, missing = source(kind).load_split(csv, data_path, limit)
    if skip_broken:
        rows, paths = drop_broken(rows, paths)
    if kind == "fundus":
        fundus.check_images(paths)
    return rows, paths, missing


def check_apart(kind: str, train: Path, val: Path) -> None:
    """Raise UserError for an image, or in fundus tables a patient, that is in both tables."""
    if kind == "isic":
        read_splits({"train": train, "val": val})
        return
    ours, theirs = ({row.patient for row in fundus.read_split(path)} for path in (train, val))
    if both := sorted(ours & theirs):
        raise UserError(
            f"patient {both[0]!r} is in {str(train)!r} and in {str(val)!r} (and {len(both) - 1} more are); split by "
            "patient: python -m ddpo_pytorch.data.fundus --csv TABLE --out DIR"
        )
