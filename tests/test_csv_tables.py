"""Rules of every table that is read, and cells that no spreadsheet runs in every table that is written."""

import csv
import dataclasses
import io
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from ddpo_pytorch.data import fundus, isic
from ddpo_pytorch.data.ratings import read_ratings
from ddpo_pytorch.data.splits import read_metadata, write_splits
from ddpo_pytorch.data.tables import number, protected, read_table, table_text, unprotected
from ddpo_pytorch.metrics import tables
from ddpo_pytorch.metrics.evaluation import write_per_image
from ddpo_pytorch.utils.errors import UserError

# text of each table, its reader, and a required column
TABLES = {
    "isic": ("image,MEL,NV,hair,gel_bubble,ruler,ink\na,1,0,0,1,0,0\nb,0,1,1,0,0,1\n", isic.read_split, "gel_bubble"),
    "metadata": ("image,lesion_id,source\na,L1,BCN\nb,,HAM\n", read_metadata, "lesion_id"),
    "fundus": ("path,Text,modality,patient\na.png,Drusen,Fundus,P1\nb.png,Scar,Fundus,P2\n", fundus.read_split, "Text"),
    "ratings": ("image_path,rating,prompt,rater_id\na.png,3,Drusen,Ann\nb.png,1,Scar,Ann\n", read_ratings, "rating"),
}


@pytest.fixture(params=TABLES)
def table(request, tmp_path):
    """A table of each kind, and `read(content)` for other contents."""
    text, reader, column = TABLES[request.param]
    for name in "ab":
        Image.new("RGB", (4, 4)).save(tmp_path / f"{name}.png")

    def read(content):
        (tmp_path / "table.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
        return reader(tmp_path / "table.csv")

    return SimpleNamespace(text=text, read=read, column=column, path=tmp_path / "table.csv")


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.partition("\n")[0].upper() + text[text.index("\n") :],
        lambda text: text.replace("_", " ", 1).replace("image", "Image", 1),
        lambda text: text.replace(",", ", "),
        lambda text: text.replace(",", " ,\t"),
        lambda text: "".join(f'"{line}"\n'.replace(",", '","') for line in text.splitlines()),
        lambda text: "".join(f'"{line}"\n'.replace(",", '" , "') for line in text.splitlines()),
        lambda text: b"\xef\xbb\xbf" + text.encode(),
        lambda text: f"\ufeff\ufeff{text}",
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text.replace("\n", "\r"),
        lambda text: text.rstrip("\n"),
        lambda text: text.replace("\n", ",\n"),
        lambda text: text.replace("\n", ",,,\n").replace(",,,\n", "\n", 1),
    ],
)
def test_spellings_that_mean_the_same_table(table, change):
    def values(found):
        rows = found.values() if isinstance(found, dict) else found
        rows = [row if isinstance(row, dict) else dataclasses.asdict(row) for row in rows]
        return [{key: value for key, value in row.items() if key != "line"} for row in rows]

    assert values(table.read(change(table.text))) == values(table.read(table.text))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text.replace(",", ";"), ["semicolons"]),
        (lambda text: text.replace(",", "\t"), ["tabs"]),
        (lambda text: "".join(f'"{line}"\n'.replace(",", '";"') for line in text.splitlines()), ["semicolons"]),
        (lambda text: text.encode("utf-16"), ["UTF-16"]),
        (lambda text: text.encode("utf-16-le"), ["line 1", "NUL"]),
        (lambda text: text.replace("b", "\0", 1), ["NUL"]),
        (lambda text: text + "a\0", ["line 4", "NUL"]),
        (lambda text: text.encode() + b"\xff", ["line 4", "UTF-8"]),
        (lambda text: text + '"x\n' * 3, ["line 4", "quote"]),
        (lambda text: text + "x" * 200_000 + "\n", ["line 4"]),
        (lambda text: text + "x\n", ["line 4", "1 cell "]),
        (lambda text: text + "x\n\ny" + ",z" * 30 + "\n", ["line 4", "1 cell ", "line 6", "31 cells"]),
        (lambda text: "", ["lacks", "none"]),
        (lambda text: "\n\n", ["lacks", "none"]),
    ],
)
def test_what_cannot_be_read_is_named_by_line(table, change, said):
    with pytest.raises(UserError) as error:
        table.read(change(table.text))
    message = str(error.value)
    assert "\n" not in message and str(table.path) in message and len(message) < 800
    assert all(word in message for word in said), message


def test_huge_cells_and_many_faults_make_no_huge_message(table):
    header, first, _ = table.text.splitlines()
    cells, messages = first.split(","), []
    for line in (",".join(["x" * 100_000] * len(cells)), ",".join([*cells[:-1], *"yz" * 500])):
        for text in (table.text + f"{line}\n{line}\n" * 5, f"{header},{line}\n", line, f"{line}\n{table.text}"):
            try:
                table.read(text)
            except UserError as error:
                messages.append(str(error))
    assert len(messages) >= 6 and all("\n" not in message and len(message) < 2000 for message in messages)


def test_missing_and_repeated_columns_are_named(table):
    header, rest = table.text.split("\n", 1)
    with pytest.raises(UserError) as error:
        table.read(f"{header.replace(table.column, 'other')}\n{rest}")
    assert table.column in str(error.value) and "other" in str(error.value)
    columns = header.split(",")
    with pytest.raises(UserError) as error:
        table.read(f"{header}, {columns[0].upper()} ,{columns[1].lower()}\n{rest}")
    assert repr(columns[0]) in str(error.value) and repr(columns[1]) in str(error.value)
    with pytest.raises(UserError, match="regular file"):
        read_table(table.path.parent, columns, "table")


def test_the_first_faults_are_described_and_the_others_counted(tmp_path):
    path = tmp_path / "split.csv"
    rows = ["a,2,0,0,0,0,0", "b,1,1,0,0,0,0", "c,1,0,1,0,0", "d,1,0,0,0,0,0", "D,1,0,0,0,0,0", "d,1,0,x,y,0,0"]
    path.write_text("\n".join([TABLES["isic"][0].split("\n")[0], *rows, ""]))
    with pytest.raises(UserError, match=r"line 2: MEL is '2'.*line 3.*\(1, 1\).*line 4.*6 cells.*2 more, in line 7"):
        isic.read_split(path)


@pytest.mark.parametrize("cell", ["1", "1.0", " 1", "1. ", "+1", "1e0", '"1"', "01", "1.000"])
def test_labels_and_ratings_are_numbers_in_any_plain_spelling(tmp_path, cell):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "split.csv").write_text(f"image,MEL,NV,hair,gel_bubble,ruler,ink\na,{cell},0,{cell},0,0,0\n")
    assert isic.read_split(tmp_path / "split.csv")[0].labels == (1, 0, 0, 0, 1, 0)
    (tmp_path / "ratings.csv").write_text(f"image_path,rating,prompt\na.png,{cell},x\n")
    assert read_ratings(tmp_path / "ratings.csv")[0].rating == 1


@pytest.mark.parametrize(
    "cell", ["1,0", "1;0", "", "nan", "inf", "1_0", "0x1", "yes", "1e999", "١", "１", "1 0", "--1"]
)
def test_other_spellings_are_refused_with_their_text(tmp_path, cell):
    assert number(cell) is None or not 0 <= number(cell) <= 3
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "split.csv").write_text(f'image,MEL,NV,hair,gel_bubble,ruler,ink\na,1,0,"{cell}",0,0,0\n')
    with pytest.raises(UserError) as error:
        isic.read_split(tmp_path / "split.csv")
    assert f"line 2: hair is {cell!r}" in str(error.value)
    (tmp_path / "ratings.csv").write_text(f'image_path,rating,prompt\na.png,"{cell}",x\n')
    with pytest.raises(UserError) as error:
        read_ratings(tmp_path / "ratings.csv")
    assert f"line 2: rating is {cell!r}" in str(error.value)


FORMULAS = [
    *("=1+1", "=cmd|' /C calc'!A0", "+1+1", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "＝1", "'=1", "''@x", "-", "=", "-a"),
]
PLAIN = [
    *("-1", "+1.5", "-1e-3", "-0.12 [-0.5, +0.3]", "-inf", "", "'", "'quoted'", "'-1"),
    *("a=1", "x, y", 'say "x"', "a\nb"),
]


@pytest.mark.parametrize("cell", [*FORMULAS, *PLAIN])
def test_formulas_are_quoted_and_read_back_as_they_were(cell):
    text = table_text(["name", cell], [[cell, 1.5], ["\r", None]])
    (_, head), (first, value), (second, empty) = csv.reader(io.StringIO(text, newline=""))
    assert unprotected(first) == unprotected(head) == cell and unprotected(second) == "\r"
    assert (value, empty) == ("1.5", "")
    assert (first == cell) == (cell in PLAIN) == (protected(cell) == cell)
    assert first[:1] not in ("=", "@", "\t", "\r", "＝") and (first[:1] not in ("+", "-") or cell in PLAIN)


def test_tables_with_formulas_keep_them_through_a_division(tmp_path):
    cells = ["=1+1", "'=1", "-1", "+x", "@y"]
    path = tmp_path / "captions.csv"
    path.write_text(
        table_text(["path", "Text", "note"], [[f"{n}.png", f"=x {n}", cell] for n, cell in enumerate(cells)])
    )
    assert "\n0.png,'=x 0,'=1+1\n" in path.read_text()
    rows = fundus.read_split(path)
    assert [row.caption for row in rows] == [f"Fundus: =x {n}" for n in range(5)]
    assert [row.fields["note"] for row in rows] == cells
    fundus.write_table(tmp_path / "again.csv", rows)
    assert (tmp_path / "again.csv").read_bytes() == path.read_bytes()
    path.write_text(TABLES["isic"][0].replace("\n", ",note\n", 1).replace("0\n", "0,'=cmd\n").replace("1\n", "1,-5\n"))
    rows = isic.read_split(path)
    assert [row.fields["note"] for row in rows] == ["=cmd", "-5"]
    write_splits(tmp_path / "new", "isic", {"train": rows}, {})
    assert (tmp_path / "new" / "isic_train.csv").read_text().endswith(",'=cmd\nb,0,1,1,0,0,1,-5\n")


def test_results_hold_no_formula_of_a_caption_or_a_model(tmp_path):
    """Model names, folders and captions are the user's text; numbers stay numbers, negative ones too."""
    images = SimpleNamespace(
        folder=tmp_path / "@samples",
        paths=[tmp_path / "@samples" / "=x" / "0.png"],
        captions=["=HYPERLINK(1)"],
        entry=lambda index: {"seed": 7},
    )
    folder = SimpleNamespace(images=images, columns={"score": np.array([-0.5])}, aligned=np.array([1.0]))
    write_per_image(tmp_path / "per_image.csv", {"+model": [folder]})
    (row,) = csv.DictReader(open(tmp_path / "per_image.csv", newline=""))
    assert row["model"] == "'+model" and row["path"] == "'=x/0.png" and row["caption"] == "'=HYPERLINK(1)"
    assert (row["seed"], row["aligned"], row["score"]) == ("7", "1", "-0.5")
    table = pd.DataFrame({"Model": ["=SD", "RL"], "KID": ["-0.10 [-0.20, 0.10]", "n/a"]})
    text = tables.to_csv(table)
    assert text == 'Model,KID\n\'=SD,"-0.10 [-0.20, 0.10]"\nRL,n/a\n'
