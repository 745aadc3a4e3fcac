"""Kinds of image tables: modules with `load_split` and `caption_list`, chosen by name in a configuration."""

from pathlib import Path
from types import ModuleType

from ddpo_pytorch.data import fundus, isic
from ddpo_pytorch.data.splits import drop_broken, read_splits
from ddpo_pytorch.data.tables import Row
from ddpo_pytorch.utils.errors import UserError

KINDS: dict[str, ModuleType] = {"isic": isic, "fundus": fundus}


def find_rows(
    kind: str, csv: str | Path, data_path: str | Path, limit: int, skip_broken: bool
) -> tuple[list[Row], list[Path], int]:
    """Call `load_split` of that kind; `skip_broken` drops damaged images, for which fundus tables otherwise raise."""
    rows, paths, missing = KINDS[kind].load_split(csv, data_path, limit)
    if skip_broken:
        rows, paths = drop_broken(rows, paths)
    elif kind == "fundus":
        fundus.check_images(paths)
    return rows, paths, missing


def check_apart(kind: str, train: Path, val: Path) -> None:
    """Raise UserError if an image (fundus tables: a patient) is in both tables."""
    if kind == "isic":
        read_splits({"train": train, "val": val})
        return
    patients = [{row.patient for row in fundus.read_split(path)} for path in (train, val)]
    if both := sorted(set.intersection(*patients)):
        who = f"patient {both[0]!r} and {len(both) - 1} more are in both {str(train)!r} and {str(val)!r}"
        raise UserError(f"{who}; split by patient: python -m ddpo_pytorch.data.fundus --csv TABLE --out DIR")
