"""Fundus tables, their faults, images, and splits by patient."""

import pytest
from refusals import refused

from ddpo_pytorch.data import fundus

PLAIN = "path,Text,modality\nimages/1_left.jpg,The left eye shows drusen.,Fundus\n"


def table(tmp_path, text):
    (tmp_path / "captions.csv").write_text(text)
    return tmp_path / "captions.csv"


def test_one_row_in_many_spellings(tmp_path):
    for text in (
        PLAIN.replace("path,Text,modality", "PATH, text, Modal"),
        "path,Text\nimages/1_left.jpg,The left eye shows drusen.\n",
        PLAIN.replace("The left eye", '"The\n  left   eye').replace("drusen.", 'drusen."'),
        PLAIN.replace("The left", "fundus :The left").replace("images/", ".\\images\\"),
        "modality,Text,path\n,The left eye shows drusen.,images/1_left.jpg\n",
        PLAIN.replace("Fundus", "Fundus,,") + "\n,,\n",
    ):
        (row,) = fundus.read_split(table(tmp_path, text))
        found = row.image, row.caption, row.patient, row.number
        assert found == ("images/1_left.jpg", "Fundus: The left eye shows drusen.", "1", 0), text


def test_the_patient_comes_from_the_column_or_the_file_name(tmp_path):
    text = "path,Text,Patient,age\n7_right.jpg,Scar,A,61\n7_right.png,Drusen,,\nx.jpg,Scar,,5\nleft_1.jpg,A,,\n"
    text += "p8/left.jpg,Scar,,\np8/OD.jpg,Scar,,\np9/left.jpg,Scar,,\nleft.jpg,Scar,,\n"
    rows = fundus.read_split(table(tmp_path, text))
    assert [row.patient for row in rows] == ["A", "7", "x", "left_1", "p8", "p8", "p9", "left"]
    assert rows[0].fields["age"] == "61" and [row.number for row in rows] == list(range(8))


SEVEN = "path,Text,modality,patient,eye,age,camera\n1.jpg,Normal.,Fundus,P 1,left,60,Topcon TRC\n"
FIVE = "path,Text,patient,eye,age\n1.jpg,Normal,P1,left,50\n"


def test_unquoted_commas_are_resolved_if_the_other_cells_fit_and_refused_otherwise(tmp_path):
    for text, image, caption, patient in (
        (f"{SEVEN}2.jpg,Drusen, and a scar,Fundus,P 1,right,,Topcon TRC\n", "2.jpg", "Drusen, and a scar", "P 1"),
        ("path,Text\n b.jpg, One,two\n", "b.jpg", "One, two", "b"),
        # empty cells at the end belong to the columns in which they fit
        (f"{FIVE}2.jpg,Drusen, dust,P2,left,\n", "2.jpg", "Drusen, dust", "P2"),
        (f"{FIVE}3.jpg,Scar,P3,right,60,\n", "3.jpg", "Scar", "P3"),
    ):
        row = fundus.read_split(table(tmp_path, text))[-1]
        assert (row.image, row.caption, row.patient) == (image, f"Fundus: {caption}", patient)
    for text, said in (
        # no camera of one word is known, "a" is no path, "dust" may be a patient, notes are free text too
        (f"{SEVEN}2.jpg,Drusen, and a scar,Fundus,P2,right,,Zeiss\n", "line 3: has 8 cells where the header has 7"),
        ("path,Text,modality\na,b.jpg,Text,Fundus\n", "line 2: has 4 cells .* double quotes"),
        ("path,Text,patient\n1.jpg,Normal,P1\n2.jpg,Drusen, dust,\n", "line 3: has 4 cells"),
        ('path,Text,notes\n1.jpg,Normal.,"dim, but sharp"\n2.jpg,Drusen,scar,dim\n', "line 3: has 4 cells"),
    ):
        refused(said, fundus.read_split, table(tmp_path, text))


def test_faults_are_reported_by_line(tmp_path):
    for lines, message in (
        ("1.jpg,Normal,Fundus\n2.jpg,Heart, lungs,CXR", "line 3: modality is 'CXR', before it is 'Fundus'"),
        ("1.jpg,Normal,a: b", "line 2: modality is 'a: b'"),
        (",Normal.,Fundus", "line 2: path '' is empty"),
        ("1.jpg,a\u200db,Fundus", r"line 2: the caption 'a\\u200db' .*U\+200D"),
        ("1.jpg,Fundus:,Fundus", "line 2: the caption is empty"),
        ("..\\1.jpg,Normal.,Fundus", "line 2: path '../1.jpg' leads out"),
        ("1.jpg,A,Fundus\n2.jpg,B,Fundus\n./1.jpg,C,Fundus", "line 4: image '1.jpg' appears twice, first in line 2"),
        ('1.jpg,"A\nB",Fundus\n\n2.jpg,,Fundus', "line 5: the caption is empty"),
        ("1.jpg,A,CT\n2.jpg,B,Fundus\n3.jpg\n4.jpg,,MRI", r"line 3: .*Fundus.*; line 4: .*; line 5: .*MRI"),
        ("", "has a header and no rows"),
    ):
        refused(message, fundus.read_split, table(tmp_path, f"path,Text,modality\n{lines}\n"))


def test_a_quality_is_a_number_from_1_to_3(tmp_path):
    lines = "1.jpg,A,{}\n2.jpg,B,2.0\n3.jpg,C,\n"
    rows = fundus.read_split(table(tmp_path, "path,Text,Quality\n" + lines.format(3)))
    assert [fundus.quality_of(row) for row in rows] == [3, 2, 3]
    assert [fundus.is_good(row) for row in rows] == [True, False, True]
    for quality in ("good", "0", "4", "nan"):  # 0 is EyeQ's good
        path = table(tmp_path, "path,Text,quality\n" + lines.format(quality))
        refused(f"line 2: quality.*'{quality}'", fundus.read_split, path)


def test_the_caption_of_a_mirror_image_names_the_other_eye():
    for caption, other in (
        ("The left eye fundus image shows drusen.", "The right eye fundus image shows drusen."),
        ("Right eye, RIGHT-sided; left", "Left eye, LEFT-sided; right"),
        ("Fundus: OD, not od; OS", "Fundus: OS, not od; OD"),
        ("bright spots, a nasal and an inferotemporal vein",) * 2,
    ):
        assert (fundus.mirrored_caption(caption), fundus.mirrored_caption(other)) == (other, caption)
    for caption in ("a haemorrhage at 3 o'clock", "a leftward shift"):
        assert fundus.mirrored_caption(caption) is None


EYES = [(patient, eye) for patient in range(60) for eye in ("left", "right")[: 1 + patient % 2]]
MANY = [f"images/{p}_{eye}.jpg,The {eye} eye shows {('drusen', 'scar', 'dust')[p % 3]}\n" for p, eye in EYES]


def test_splits_keep_patients_together_and_shares_near(tmp_path):
    rows = fundus.read_split(table(tmp_path, "".join(["path,Text\n", *MANY])))
    splits = fundus.split_by_patient(rows, 0.2, 0.1, seed=1)
    assert sorted(row.number for part in splits.values() for row in part) == list(range(90))
    patients = [{row.patient for row in part} for part in splits.values()]
    assert sum(map(len, patients)) == len(set.union(*patients)) == 60
    assert {name: len(part) for name, part in splits.items()} == {"train": 63, "val": 18, "test": 9}
    assert {row.caption for row in splits["val"]} == {row.caption for row in rows}
    reordered = fundus.split_by_patient(rows[::-1], 0.2, 0.1, seed=1)
    assert all({*map(id, reordered[name])} == {*map(id, part)} for name, part in splits.items())
    assert fundus.split_by_patient(rows, 0.2, 0.1, seed=2) != splits
    assert list(fundus.split_by_patient(rows, 0.2, 0, seed=1)) == ["train", "val"]
    for val, test in ((0.5, 0.5), (-0.1, 0.1), (float("nan"), 0)):
        refused(f"val {val}, test {test}", fundus.split_by_patient, rows, val, test, seed=1)
    refused("2 patients cannot be divided into the shares", fundus.split_by_patient, rows[:3], 0.2, 0.2, seed=1)


def test_the_command_writes_tables_that_read_back(tmp_path, capsys, caplog):
    lines = ["path,Text\n", *MANY, 'images/x.jpg,"A scar, with dust"\n', "images/y.jpg,A, b\n"]
    path = table(tmp_path, "".join(lines))
    arguments = ["--csv", str(path), "--out", str(tmp_path / "out")]
    with caplog.at_level("INFO"):
        for _ in range(2):  # the same again changes nothing
            fundus.main(arguments)
    rows = {name: fundus.read_split(tmp_path / "out" / f"fundus_{name}.csv") for name in ("train", "val", "test")}
    for (name, part), line in zip(rows.items(), caplog.messages[:3], strict=True):
        counts = (len({row.patient for row in part}), len(part), len({row.caption for row in part}))
        assert line.split(maxsplit=1) == [name, "{} patients, {} images, {} captions".format(*counts)]
    original = {row.image: row.caption for row in fundus.read_split(path)}
    assert {row.image: row.caption for part in rows.values() for row in part} == original
    (tmp_path / "out" / "fundus_train.csv").unlink()
    for option, message in (("--seed=1", "fundus_val.csv' exists and holds"), ("--val=2", "val 2.0, test 0.15")):
        with pytest.raises(SystemExit) as stop:
            fundus.main([*arguments, option])
        said = capsys.readouterr().err
        assert stop.value.code == 2 and message in said and said.count("\n") == 1
    assert not (tmp_path / "out" / "fundus_train.csv").exists()
