"""Fundus tables, their faults, images, divisions by patient."""

import subprocess
import sys
import zipfile

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from ddpo_pytorch.data import fundus
from ddpo_pytorch.utils.errors import UserError

PLAIN = "path,Text,modality\nimages/1_left.jpg,The left eye shows drusen.,Fundus\n"


def table(tmp_path, text, name="captions.csv"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    "text",
    [
        PLAIN,
        b"\xef\xbb\xbf" + PLAIN.encode(),
        PLAIN.replace("\n", "\r\n"),
        PLAIN.replace("path,Text,modality", "PATH, text, Modal"),
        PLAIN.replace(",", ", "),
        "path,Text\nimages/1_left.jpg,The left eye shows drusen.\n",
        '"path","Text","modality"\n"images/1_left.jpg" , "The left eye shows drusen." , "fundus" \n',
        PLAIN.replace("The left eye", '"The\n  left   eye').replace("drusen.", 'drusen."'),
        PLAIN.replace("The left", "fundus :The left"),
        PLAIN.replace("images/", ".\\images\\"),
        "modality,Text,path\n,The left eye shows drusen.,images/1_left.jpg\n",
        PLAIN.replace("Fundus", "Fundus,,") + "\n,,\n",
        PLAIN.replace("modality", "modality,").replace("Fundus", "Fundus,"),
    ],
)
def test_one_row_in_many_spellings(tmp_path, text):
    (row,) = fundus.read_split(table(tmp_path, text))
    assert (row.image, row.caption) == ("images/1_left.jpg", "Fundus: The left eye shows drusen.")
    assert (row.patient, row.eye, row.number) == ("1", "left", 0)


def test_columns_of_the_table_tell_patient_and_eye_before_names_do(tmp_path):
    text = "path,Text,Patient,EYE,age\n"
    text += "7_right.jpg,Both: the left and the right eye,A,OS,61\n7_right.png,Drusen,,,\nx.jpg,An OD image,,?,5\n"
    text += "left_1.jpg,The left and the right eye,,,\n"
    rows = fundus.read_split(table(tmp_path, text))
    assert [(row.patient, row.eye) for row in rows] == [("A", "left"), ("7", "right"), ("x", "right"), ("left_1", "")]
    assert rows[0].fields["age"] == "61" and [row.number for row in rows] == [0, 1, 2, 3]


def test_unquoted_commas_are_resolved_where_the_other_cells_fit(tmp_path):
    text = "path,Text,modality,patient,eye,age,camera\n"
    text += "1.jpg,Normal.,Fundus,P 1,left,60,Topcon TRC\n"
    text += "2.jpg,Drusen, lens dust, and a scar,Fundus,P2,right,,Zeiss\n"  # no cell of two words is known as a camera
    with pytest.raises(UserError, match=r"captions.csv' line 3: has 9 cells where the header has 7"):
        fundus.read_split(table(tmp_path, text))
    rows = fundus.read_split(table(tmp_path, text.replace("Zeiss", "Topcon TRC").replace("P2", "P 1")))
    assert rows[1].caption == "Fundus: Drusen, lens dust, and a scar"
    assert (rows[1].patient, rows[1].eye) == ("P 1", "right")
    # the first columns are checked as well, and with nothing but captions after the path all commas are theirs.
    for line, resolved in (("a,b.jpg,Text,Fundus", False), ("b.jpg,Text,and,more", True), (" b.jpg, One,two", True)):
        header = "path,Text,modality\n" if line.endswith("Fundus") else "path,Text\n"
        path = table(tmp_path, header + line + "\n")
        if resolved:
            (row,) = fundus.read_split(path)
            assert row.image == "b.jpg" and row.caption.count(", ") == line.count(",") - 1
        else:
            with pytest.raises(UserError, match="line 2: has 4 cells .* double quotes"):
                fundus.read_split(path)


def test_empty_cells_at_the_end_belong_to_the_columns_where_they_fit(tmp_path):
    header = "path,Text,patient,eye,age\n1.jpg,Normal,P1,left,50\n"
    text = header + "2.jpg,Drusen, dust,P2,left,\n3.jpg,Scar,P3,right,60,\n"
    rows = fundus.read_split(table(tmp_path, text))
    assert [(row.caption, row.patient, row.eye) for row in rows[1:]] == [
        ("Fundus: Drusen, dust", "P2", "left"),
        ("Fundus: Scar", "P3", "right"),
    ]
    with pytest.raises(UserError, match="line 3: has 4 cells"):  # is "dust" a patient?
        fundus.read_split(table(tmp_path, "path,Text,patient\n1.jpg,Normal,P1\n2.jpg,Drusen, dust,\n"))


def test_two_columns_of_free_text_are_not_told_apart(tmp_path):
    text = 'path,Text,notes\n1.jpg,Normal.,"dim, but sharp"\n2.jpg,Drusen,scar,dim\n'
    with pytest.raises(UserError, match="line 3: has 4 cells"):
        fundus.read_split(table(tmp_path, text))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("1.jpg,Normal.,OCT", "line 2: modality is 'OCT'; only Fundus"),
        ("1.jpg,Heart, lungs,CXR", "line 2: modality is 'CXR'; only Fundus"),
        (",Normal.,Fundus", "line 2: the path of the image is empty"),
        ("1.jpg, ,Fundus", "line 2: the caption is empty"),
        ("1.jpg,a\u200db,Fundus", r"line 2: the caption 'a\\u200db' .*U\+200D"),
        ("1.jpg,Fundus:,Fundus", "line 2: the caption is empty"),
        ("1.jpg,Normal.", "line 2: has 2 cells where the header has 3$"),
        ("a/../../1.jpg,Normal.,Fundus", "line 2: path '../1.jpg' leads out"),
        ("..\\1.jpg,Normal.,Fundus", "line 2: path '../1.jpg' leads out"),
        ("1.jpg,A,Fundus\n2.jpg,B,Fundus\n./1.jpg,C,Fundus", "line 4: image '1.jpg' appears twice, first in line 2"),
        ('1.jpg,"A\nB",Fundus\n\n2.jpg,,Fundus', "line 5: the caption is empty"),
        ('1.jpg,A,Fundus\n2.jpg,"B,Fundus\n3.jpg,C,Fundus\n', "line 3: a double quote is opened and not closed"),
        ('1.jpg,"A,Fundus\n2.jpg,B,Fundus\n3.jpg,"C",Fundus\n', "line 2: a double quote is opened and not closed"),
        ("1.jpg,A,CT\n2.jpg,B,Fundus\n3.jpg\n4.jpg,,MRI", r"line 2: .*CT.*; line 4: .*; line 5: .*MRI"),
        ("", "has a header and no rows"),
    ],
)
def test_faults_are_told_by_line(tmp_path, lines, message):
    with pytest.raises(UserError, match=message) as error:
        fundus.read_split(table(tmp_path, f"path,Text,modality\n{lines}\n"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,Text\n1.jpg,A\n", "lacks the columns path; its first line has image, Text"),
        ("path;Text\n", "lacks the columns path, Text"),
        ("", "lacks the columns path, Text"),
        ("path,Text,modal,Modality\n", "has the column 'modality' twice"),
        ("path,Text\n1.jpg,Stra\xdfe\n".encode("latin-1"), "cannot be read as UTF-8"),
    ],
)
def test_unusable_tables(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        fundus.read_split(table(tmp_path, text))
    with pytest.raises(UserError, match="does not exist"):
        fundus.read_split(tmp_path / "none.csv")


def test_load_split_counts_missing_images(tmp_path):
    path = table(tmp_path, "path,Text\n1.jpg,A\nsub\\2.jpg,B\n3.jpg,C\n")
    (tmp_path / "sub").mkdir()
    for name in ("sub/2.jpg", "3.jpg"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    rows, paths, missing = fundus.load_split(path, tmp_path)
    assert [row.number for row in rows] == [1, 2] and missing == 1
    assert paths == [tmp_path / "sub" / "2.jpg", tmp_path / "3.jpg"]
    assert [row.image for row in fundus.load_split(path, tmp_path, limit=1)[0]] == ["sub/2.jpg"]
    absolute = table(tmp_path, f"path,Text\n{tmp_path}/3.jpg,A\n", "absolute.csv")
    with pytest.raises(UserError, match="absolute.csv' line 2"):
        fundus.load_split(absolute, tmp_path)
    with pytest.raises(UserError, match="none of the 3 images .* the first would be .*sub/1.jpg"):
        fundus.load_split(table(tmp_path, "path,Text\n1.jpg,A\n2.png,B\n4.jpg,C\n"), tmp_path / "sub")
    with pytest.raises(UserError, match="image folder .* does not exist"):
        fundus.load_split(path, tmp_path / "none")


def test_images_that_the_reader_refuses_are_named_and_counted(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8)
    Image.fromarray(rgb).save(tmp_path / "good.png")
    Image.fromarray(rgb).save(tmp_path / "good.jpg")
    Image.fromarray(rgb[..., 0]).save(tmp_path / "grey.png")
    Image.fromarray(np.dstack([rgb, rgb[..., 0]])).save(tmp_path / "alpha.png")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "good.jpg").read_bytes()[:-80])
    (tmp_path / "text.png").write_text("no image")
    good = [tmp_path / "good.png", tmp_path / "good.jpg", tmp_path / "grey.png"]
    fundus.check_images(good)
    bad = [tmp_path / f"{name}" for name in ("alpha.png", "cut.jpg", "text.png", "none.png")]
    for path in bad:
        with pytest.raises(UserError, match=path.name):
            fundus.check_images([*good, path])
    with pytest.raises(UserError, match=r"alpha.png' .*\(and 3 more of 7 images\)$"):
        fundus.check_images([*good, *bad])


def test_texts_that_name_a_side():
    for text in ("The left eye", "RIGHT fundus", "inferotemporal vein", "Nasal margin", "OD, normal", "at 3 o'clock"):
        assert fundus.names_side(text), text
    for text in ("Fundus: normal retina", "bright spots", "od", "drusen at the macula"):
        assert not fundus.names_side(text), text


def many_rows(tmp_path, patients=60):
    lines = [
        f"images/{p}_{eye}.jpg,The {eye} eye shows {('drusen', 'glaucoma', 'nothing')[p % 3]}"
        for p in range(patients)
        for eye in ("left", "right")[: 1 + p % 2]
    ]
    return table(tmp_path, "path,Text\n" + "\n".join(lines) + "\n")


def test_division_keeps_patients_together_and_shares_near(tmp_path):
    rows = fundus.read_split(many_rows(tmp_path))
    splits = fundus.split_by_patient(rows, 0.2, 0.1, seed=1)
    assert sorted(row.number for part in splits.values() for row in part) == list(range(90))
    patients = {name: {row.patient for row in part} for name, part in splits.items()}
    assert not patients["train"] & patients["val"] and not patients["train"] & patients["test"]
    assert not patients["val"] & patients["test"]
    assert [len(part) for part in splits.values()] == [63, 18, 9]
    assert {row.caption for row in splits["val"]} == {row.caption for row in rows}
    again = fundus.split_by_patient(rows[::-1], 0.2, 0.1, seed=1)
    assert {name: {row.image for row in part} for name, part in again.items()} == {
        name: {row.image for row in part} for name, part in splits.items()
    }
    assert fundus.split_by_patient(rows, 0.2, 0.1, seed=2) != splits
    assert list(fundus.split_by_patient(rows, 0.2, 0, seed=1)) == ["train", "val"]
    for val, test in ((0.5, 0.5), (-0.1, 0.1), (float("nan"), 0)):
        with pytest.raises(UserError, match="none may be negative"):
            fundus.split_by_patient(rows, val, test, seed=1)
    with pytest.raises(UserError, match="2 patients cannot be divided into the shares"):
        fundus.split_by_patient(rows[:3], 0.2, 0.2, seed=1)


def test_command_writes_tables_that_read_back(tmp_path, capsys):
    path = table(tmp_path, many_rows(tmp_path).read_text() + 'images/x.jpg,"A scar, with dust"\nimages/y.jpg,A, b\n')
    arguments = ["--csv", str(path), "--out", str(tmp_path / "out")]
    command = [sys.executable, "-m", "ddpo_pytorch.data.fundus", *arguments]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    fundus.main(arguments)  # the same again changes nothing
    rows = {name: fundus.read_split(tmp_path / "out" / f"fundus_{name}.csv") for name in fundus.SPLITS}
    for (name, part), line in zip(rows.items(), run.stdout.splitlines(), strict=True):
        counts = (len({row.patient for row in part}), len(part), len({row.caption for row in part}))
        assert line.split(maxsplit=1) == [name, "{} patients, {} images, {} captions".format(*counts)]
    original = {row.image: row.caption for row in fundus.read_split(path)}
    assert {row.image: row.caption for part in rows.values() for row in part} == original
    with pytest.raises(UserError, match=r"fundus_val.csv' exists and holds something else"):
        (tmp_path / "out" / "fundus_train.csv").unlink()
        fundus.write_splits(tmp_path / "out", {"train": rows["train"], "val": rows["test"]})
    assert not (tmp_path / "out" / "fundus_train.csv").exists()
    with pytest.raises(SystemExit) as stop:
        fundus.main([*arguments, "--val", "2"])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.startswith("error: val 2.0, test 0.15") and message.count("\n") == 1


def test_real_table(shared, tmp_path):
    rows = fundus.read_split(shared / "data" / "odir-128" / "captions.csv")
    assert len(rows) == 2449 and len(fundus.caption_list(rows)) == 265
    assert all(row.eye == row.fields["eye"] and row.patient == row.fields["patient"] for row in rows)
    assert all(row.patient == fundus.patient_of(row.image) and fundus.names_side(row.caption) for row in rows)
    with zipfile.ZipFile(shared / "data" / "odir-128" / "images.zip") as archive:
        archive.extractall(tmp_path)
    rows, paths, missing = fundus.load_split(shared / "data" / "odir-128" / "captions.csv", tmp_path)
    assert len(rows) == 2449 and missing == 0
    fundus.check_images(paths)
