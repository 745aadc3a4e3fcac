"""Rules of every table that is read, and cells that no spreadsheet runs in every table that is written."""

import csv
import dataclasses
import io
from types import SimpleNamespace

import pytest
from PIL import Image

from ddpo_pytorch.data import fundus, isic, metadata
from ddpo_pytorch.data.ratings import read_ratings
from ddpo_pytorch.data.splits import read_metadata
from ddpo_pytorch.data.tables import protected, table_text, unprotected
from ddpo_pytorch.utils.errors import UserError

# text of each table, its reader, and a required column
TABLES = {
    "isic": ("image,MEL,NV,hair,gel_bubble,ruler,ink\na,1,0,0,1,0,0\nb,0,1,1,0,0,1\n", isic.read_split, "gel_bubble"),
    "metadata": ("image,lesion_id\na,L1\nb,L2\n", read_metadata, "lesion_id"),
    "fundus": ("path,Text,modality,patient\na.png,'=x,Fundus,P1\nb.png,Scar,Fundus,P2\n", fundus.read_split, "Text"),
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

    return SimpleNamespace(text=text, read=read, reader=reader, column=column, path=tmp_path / "table.csv")


def test_spellings_that_mean_the_same_table(table):
    def values(content):
        found = table.read(content)
        rows = found.values() if isinstance(found, dict) else found
        rows = [row if isinstance(row, dict) else dataclasses.asdict(row) for row in rows]
        return [{key: value for key, value in row.items() if key != "line"} for row in rows]

    text, (header, rest) = table.text, table.text.split("\n", 1)
    for same in (
        f"{header.upper()}\n{rest}",
        text.replace("_", " ", 1).replace("image", "Image", 1).replace(",", " ,\t"),
        "".join(f'"{line}"\n'.replace(",", '" , "') for line in text.splitlines()),
        b"\xef\xbb\xbf" + text.encode(),
        text.replace("\n", "\r\n"),
        text.rstrip("\n").replace("\n", "\r"),
        text.replace("\n", ",,,\n").replace(",,,\n", "\n", 1),
    ):
        assert values(same) == values(text)


def test_what_cannot_be_read_is_named_by_line(table):
    text = table.text
    for content, *said in (
        (text.replace(",", "\t"), "tabs"),
        ("".join(f'"{line}"\n'.replace(",", '";"') for line in text.splitlines()), "semicolons", ";"),
        (text.encode("utf-16"), "line 1", "UTF-8"),
        (text + "a\0", "line 4", "0x00"),
        (text.encode() + b"\xff", "line 4", "UTF-8"),
        (text + '"x\n' * 3, "line 4", "quote"),
        (text + "x" * 200_000 + "\n", "line 4"),
        (text + "x\n\ny" + ",z" * 30 + "\n", "line 4", "1 cells", "line 6", "31 cells"),
        (text + "x\n" * 9, "line 4", "line 5", "line 6", "6 more, in line 7, 8, 9"),
        ("\n\n", "lacks", "none"),
    ):
        with pytest.raises(UserError) as error:
            table.read(content)
        message = str(error.value)
        assert "\n" not in message and str(table.path) in message and len(message) < 800
        assert all(word in message for word in said), message


def test_missing_and_repeated_columns_are_named(table):
    header, rest = table.text.split("\n", 1)
    with pytest.raises(UserError) as error:
        table.read(f"{header.replace(table.column, 'other')}\n{rest}")
    assert table.column in str(error.value) and "other" in str(error.value)
    columns = header.split(",")
    with pytest.raises(UserError) as error:
        table.read(f"{header}, {columns[0].upper()} ,{columns[1].lower()}\n{rest}")
    assert repr(columns[0]) in str(error.value) and repr(columns[1]) in str(error.value)
    with pytest.raises(UserError, match="regular file") as error:
        table.reader(table.path.parent)
    assert "remove" not in str(error.value)  # a folder that was given by mistake


def test_a_synonym_stands_for_a_column_that_is_absent(tmp_path):
    for read, text, cells in (
        (metadata.read_metadata, "file_name,text,path\na.png,x,b.png\n", {"file_name": "a.png", "path": "b.png"}),
        (metadata.read_metadata, "path,text\na.png,x\n", {"file_name": "a.png"}),
        (fundus.read_split, "file_name,Text,path\na.png,x,b.png\n", {"file_name": "a.png", "path": "b.png"}),
        (fundus.read_split, "path,Text,modal,modality\na.png,x,y,OCT\n", {"modality": "OCT", "modal": "y"}),
        (fundus.read_split, "file_name,Text,modal\na.png,x,OCT\n", {"path": "a.png", "modality": "OCT"}),
    ):
        (tmp_path / "table.csv").write_text(text)
        (row,) = read(tmp_path / "table.csv")
        assert cells.items() <= row.fields.items()


def test_labels_and_ratings_are_numbers_in_plain_spellings(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    labels = ("hair", 'image,MEL,NV,hair,gel_bubble,ruler,ink\na,1,0,"{}",0,0,0\n', isic.read_split)
    for name, table, read in (labels, ("rating", 'image_path,rating,prompt\na.png,"{}",x\n', read_ratings)):
        for cell in (" 1.0", "+1", "1e0", "01", "1"):
            (tmp_path / "t.csv").write_text(table.format(cell))
            (row,) = read(tmp_path / "t.csv")
            assert (row.labels[0] if name == "hair" else row.rating) == 1
        for cell in ("1,0", "", "nan", "1_0", "0x1", "1e999", "１", "1 0"):
            (tmp_path / "t.csv").write_text(table.format(cell))
            with pytest.raises(UserError) as error:
                read(tmp_path / "t.csv")
            assert f"line 2: {name} is {cell!r}" in str(error.value)


FORMULAS = ["=1+1", "=cmd|' /C calc'!A0", "+1+1", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "＝1", "'=1", "''@x", "-a"]
PLAIN = ["-1", "-1e-3", "-0.12 [-0.5, +0.3]", "-inf", "", "'", "'quoted'", "'-1", "a=1", "x, y", 'say "x"', "a\nb"]


@pytest.mark.parametrize("cell", [*FORMULAS, *PLAIN])
def test_formulas_are_quoted_and_read_back_as_they_were(cell):
    text = table_text(["name", cell], [[cell, 1.5], ["\r", None]])
    (_, head), (first, value), (second, empty) = csv.reader(io.StringIO(text, newline=""))
    assert unprotected(first) == unprotected(head) == cell and unprotected(second) == "\r"
    assert (value, empty) == ("1.5", "")
    assert (first == cell) == (cell in PLAIN) == (protected(cell) == cell)
    assert first[:1] not in ("=", "@", "\t", "\r", "＝") and (first[:1] not in ("+", "-") or cell in PLAIN)
