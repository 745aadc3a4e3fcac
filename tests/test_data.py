"""ISIC's labels and captions, image files, names of sample folders, and tables as they are read and written."""

import csv
import dataclasses
import hashlib
import io
import struct
from types import SimpleNamespace
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from PIL import Image
from refusals import refused

from ddpo_pytorch.data import fundus, images, isic, metadata, sample_folder
from ddpo_pytorch.data.ratings import read_ratings
from ddpo_pytorch.data.splits import read_metadata
from ddpo_pytorch.data.tables import protected, table_text, unprotected


def test_captions_and_labels_belong_together_and_labels_are_not_searched_for():
    assert [isic.caption_of(isic.labels_of(caption)) for caption in isic.CAPTIONS] == list(isic.CAPTIONS)
    refused("not one of the 32", isic.labels_of, "a dermoscopic image with melanoma (MEL) showing pink hair")
    refused("exactly one of MEL and NV", isic.caption_of, (0, 0, 0, 0, 1, 1))


def test_broken_images_are_named(tmp_path):
    whole = tmp_path / "whole.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(whole)
    huge = b"BM" + struct.pack("<13I", 54, 0, 54, 40, 100_000, 100_000, 1 + (24 << 16), *[0] * 6)
    broken = {"torn": whole.read_bytes()[:900], "text": b"not an image", "empty": b"", "huge": huge, "absent": None}
    for name, content in broken.items():
        if content is not None:
            (tmp_path / f"{name}.jpg").write_bytes(content)
        refused(f"{name}.jpg' cannot be read as an image", images.load_image, tmp_path / f"{name}.jpg")


def test_grid_places_images_row_by_row_and_every_8_bit_level_survives():
    batch = torch.stack([torch.full((3, 4, 4), value) for value in (0.0, 0.5, 1.0)])
    grid = np.asarray(images.image_grid(batch, columns=2, padding=1))
    assert grid.shape == (11, 11, 3) and [grid[place][0] for place in ((1, 1), (1, 6), (6, 1))] == [0, 128, 255]
    assert torch.equal(images.to_uint8(torch.arange(256) / 255), torch.arange(256, dtype=torch.uint8))
    assert images.to_uint8(torch.tensor([-0.1, 1.1])).tolist() == [0, 255]


ODD = [
    *("cup/disc ratio 0.6", "x/../../../../escape/x", "/etc/passwd", "C:\\images\\x", ".hidden", ".", "..", ""),
    *("a b", "a_b", "a%5Fb", "a%5fb", "a\tb", "a\nb", "a\0b", "a b ", " a b", "a  b", "A b", "\udc80"),
    *("50% drusen", "50%20drusen", "50%2", "%", "%%2F", "ä/ß", "😀‍/"),
    *("x" * 255, "x" * 256, "ä" * 128, "ä" * 127 + "/", "/" * 86, "y" * 400 + "1", "y" * 400 + "2"),
]


def test_captions_name_folders_ordinary_ones_as_in_the_official_code_and_no_two_the_same():
    ordinary = ["Fundus: The left eye shows drusen, 50% of the macula (grade 2).", "a.b", "ä b", "%", "x" * 255]
    for caption in (*isic.CAPTIONS, *ordinary):
        assert sample_folder.folder_name(caption) == caption.replace(" ", "_")
    names = [sample_folder.folder_name(caption) for caption in ODD]
    assert len(set(names)) == len(ODD)
    for caption, name in zip(ODD, names, strict=True):
        assert 0 < len(name.encode()) <= 255 and name.isprintable() and not set("/\\ ") & set(name) and name[0] != "."
        if "%FF" in name:
            assert len(caption.encode()) > 85 or not caption
            assert name.endswith(hashlib.sha256(caption.encode()).hexdigest()[:16])
        else:
            assert unquote(name.replace("_", " "), errors="surrogatepass") == caption


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
    path = tmp_path / "table.csv"
    for name in "ab":
        Image.new("RGB", (4, 4)).save(tmp_path / f"{name}.png")

    def read(content):
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return reader(path)

    return SimpleNamespace(text=text, read=read, reader=reader, column=column, path=path)


def test_spellings_that_mean_the_same_table(table):
    def values(content):
        found = table.read(content)
        return found if isinstance(found, dict) else [dataclasses.asdict(row) for row in found]

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


def test_what_cannot_be_read_and_missing_and_repeated_columns_are_named_by_line(table):
    text, (header, rest) = table.text, table.text.split("\n", 1)
    first, second, *_ = header.split(",")
    for content, *said in (
        (f"{header.replace(table.column, 'other')}\n{rest}", table.column, "other"),
        (f"{header}, {first.upper()} ,{second.lower()}\n{rest}", repr(first), repr(second)),
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
        assert len(refused([str(table.path), *said], table.read, content)) < 800
    assert "remove" not in refused("regular file", table.reader, table.path.parent)  # a folder given by mistake


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
            refused([f"line 2: {name} is {cell!r}"], read, tmp_path / "t.csv")


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
