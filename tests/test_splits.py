"""Sets of split tables: the command that checks them, lesions in two splits, and regrouped splits without any."""

import hashlib
import json
import re
import runpy
import sys

import numpy as np
import pytest
from PIL import Image
from refusals import refused
from script_tools import files_of

from ddpo_pytorch.data import splits
from ddpo_pytorch.data.splits import RECORD, count_labels

HEADER = "image,MEL,NV,hair,gel_bubble,ruler,ink,site\n"


def write_table(folder, name, images, seed=0):
    rng = np.random.default_rng(seed)
    lines = []
    for image in images:
        mel, *artifacts = (rng.random(5) < (0.25, 0.4, 0.1, 0.15, 0.03)).astype(int)
        lines.append(",".join([image, f"{mel:.1f}", f"{1 - mel:.1f}", *map(str, artifacts), f'"arm, {image}"']))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.csv").write_text(HEADER + "\n".join([*lines, ""]))


def write_metadata(path, lesions):
    rows = [f"{image},{lesion},male" for image, lesion in lesions.items()]
    path.write_text("\n".join(["image,lesion_id,sex", *rows]))


@pytest.fixture
def folder(tmp_path):
    """Three splits of 60, 20 and 20 images; phantom_train_a.csv is a part of one of them, as the phantom world has."""
    for seed, (split, part) in enumerate({"train": range(60), "val": range(60, 80), "test": range(80, 100)}.items()):
        write_table(tmp_path / "splits", f"isic2019_{split}", [f"I{number:03d}" for number in part], seed)
    write_table(tmp_path / "splits", "isic2019_train_a", ["I000"])
    (tmp_path / "splits" / "._isic2019_train.csv").write_bytes(b"\0\xff of another system")
    return tmp_path / "splits"


@pytest.fixture
def command(caplog, capsys):
    """Run the command in this process; return its exit code, log and errors."""

    def run(*arguments):
        caplog.clear()
        code = 0
        try:
            splits.main([str(argument) for argument in arguments])
        except SystemExit as error:
            code = error.code
        return code, "\n".join([*caplog.messages, capsys.readouterr().err])

    caplog.set_level("INFO")
    return run


def test_an_image_is_the_same_with_slashes_of_any_system_and_in_any_case(tmp_path):
    write_table(tmp_path, "a_train", ["part/I1"])
    write_table(tmp_path, "a_val", ["part\\i1.jpg"])
    tables = splits.find_splits(tmp_path)["a"]
    refused("'part/i1.jpg' is in .*a_train.csv' and .*a_val.csv'", splits.read_splits, tables)
    write_metadata(tmp_path / "metadata.csv", {"part\\I1": "L1"})
    assert list(splits.read_metadata(tmp_path / "metadata.csv")) == ["part/i1"]


def test_the_official_splits_equal_the_paper(shared, caplog, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["isic", "--splits", str(shared / "data" / "splits")])
    with caplog.at_level("INFO"):
        runpy.run_module("ddpo_pytorch.data.isic", run_name="__main__")
    lines = [line.split() for message in caplog.messages for line in message.splitlines()]
    assert [line[0][:8] for line in lines[:3]] == ["9b573686", "7300aa82", "f79b6bda"]
    assert lines[3:7] == [
        ["table", "1", "images", "MEL", "NV", "hair", "gel", "ink", "ruler"],
        ["train", "12004", "2750", "9254", "4514", "1300", "201", "1608"],
        ["val", "2119", "454", "1665", "802", "228", "34", "308"],
        ["test", "2493", "537", "1956", "989", "257", "37", "341"],
    ]
    assert lines[7][:4] == ["table", "2", "MEL", "hair"]
    assert lines[8:] == [["#", "real", "543", "260", "4", "440", "3051", "489", "21", "520"]]


def test_sets_need_not_be_complete_and_parts_of_splits_do_not_count(folder, tmp_path, command):
    assert {name: list(paths) for name, paths in splits.find_splits(folder).items()} == {"isic2019": [*splits.SPLITS]}
    (folder / "isic2019_train.csv").rename(folder / "phantom_train.csv")
    (folder / "isic2019_val.csv").unlink()
    code, said = command("--splits", folder)
    assert code == 0 and said.count("# real") == 1 and said.count("table 1") == 2
    code, said = command("--splits", tmp_path / "nowhere")
    assert code == 2 and said.count("\n") == 1 and "does not exist or holds no *_train.csv" in said


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("a,1,0,0,0,0,0,arm,leg", "line 2: has 9 cells where the header has 8"),
        (",1,0,0,0,0,0,arm", "line 2: the image id '' is empty"),
        ("a,0,0,0,0,0,0,arm", "line 2: MEL and NV are (0, 0)"),
        ("a,1,0,0,0,,2,arm", "line 2: ruler is '', ink is '2'"),
        ("a,1,0,0,0,0,0,x\nb,1,0,0,0,0,0,x\na_downsampled,1,0,0,0,0,0,x", "line 4: image 'a_downsampled' appears"),
        ("I000_downsampled,1,0,0,0,0,0,x", "image 'I000_downsampled' is in"),
    ],
)
def test_faulty_tables_are_named(folder, command, row, expected):
    (folder / "isic2019_val.csv").write_text(f"{HEADER}{row}\n")
    code, said = command("--splits", folder)
    assert code == 2 and expected in said and "isic2019_val.csv" in said


def test_images_are_counted_listed_and_decoded(folder, tmp_path, command):
    images, listed = tmp_path / "images", tmp_path / "new" / "missing.csv"
    images.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    for number in range(72):
        Image.fromarray(pixels).save(images / f"I{number:03d}{'_downsampled' * (number == 3)}.jpg")
    code, said = command("--splits", folder, "--images", images, "--list_missing", listed)
    assert code == 0 and "0 images are broken" in said and "60 images, 0 missing\n" in said
    assert "12 images, 8 missing: I072, I073, I074, I075, I076, ...\n" in said
    lines = listed.read_text().splitlines()
    assert lines[:2] == ["split,image", "val,I072"] and lines[-1] == "test,I099" and len(lines) == 1 + 28
    assert command("--splits", folder, "--images", images, "--list_missing", listed)[0] == 2

    whole = (images / "I000.jpg").read_bytes()
    (images / "I001.jpg").write_bytes(whole[: len(whole) // 2])
    (images / "I002.jpg").write_bytes(whole[:-2])
    (images / "I070.jpg").write_text("<html>not found</html> 100%d")
    code, said = command("--splits", folder, "--images", images)
    assert code == 2 and "3 images are broken" in said
    assert all(f"{images / name}.jpg' cannot be read as an image" in said for name in ("I001", "I002", "I070"))
    assert said.rstrip().splitlines()[-1].startswith("error: 3 broken images")
    code, said = command("--splits", folder, "--images", tmp_path / "nowhere")
    assert code == 2 and "none of the 100 images" in said


def test_lesions_in_several_splits_are_counted(folder, tmp_path, command):
    # L1: train, train, val; L2: val, test; L3: train only; I062 has no lesion_id; the others are not in the file.
    lesions = {"I000": "L1", "I001_downsampled": "L1", "I060": "L1", "I061": "L2", "I080": "L2", "I002": "L3"}
    write_metadata(tmp_path / "meta.csv", lesions | {"I003": "L3", "I062": "", "I998": "L1"})
    code, said = command("--splits", folder, "--metadata", tmp_path / "meta.csv")
    assert code == 0 and "7 of 100 images have a lesion_id" in said
    assert "2 lesions, with 5 images, are in more than one split" in said
    found = re.findall(r"^(\w+) +(\d) images \((\S+) %\) .* also in (\w+)$", said, re.M)
    expected = "train 2 3.3 val", "val 1 5.0 train", "val 1 5.0 test", "test 1 5.0 val"
    assert [" ".join(groups) for groups in found] == [*expected]


def test_regrouped_splits_share_no_lesion_and_keep_sizes_rows_and_labels(folder, tmp_path, command):
    rng, owner = np.random.default_rng(5), {}
    lesions = {f"I{number:03d}": f"L{number if number > 60 else rng.integers(20)}" for number in rng.permutation(97)}
    write_metadata(tmp_path / "meta.csv", lesions)
    for seed, name in ((7, "out"), (7, "again"), (8, "other")):
        given = ("--splits", folder, "--metadata", tmp_path / "meta.csv", "--seed", seed)
        code, said = command(*given, "--regroup", tmp_path / name)
        assert code == 0 and "0 lesions, with 0 images" in said
    out, again, other = (files_of(tmp_path / name) for name in ("out", "again", "other"))
    assert out == again and out["isic2019_test.csv"] != other["isic2019_test.csv"]
    before, after = (splits.read_splits(splits.find_splits(path)["isic2019"]) for path in (folder, tmp_path / "out"))
    assert {name: len(rows) for name, rows in after.items()} == {"train": 60, "val": 20, "test": 20}
    record = json.loads(out[RECORD])
    assert record["seed"] == 7 and set(record["made_from"]) == {*(f"isic2019_{s}.csv" for s in after), "meta.csv"}
    for name, rows in after.items():
        assert all(owner.setdefault(lesions[row.image], name) == name for row in rows if row.image in lesions)
        old, new = count_labels(before[name]), count_labels(rows)
        assert all(abs(old[label] - new[label]) <= max(3, 0.1 * old[label]) for label in old), (old, new)
        digest = hashlib.sha256(out[f"isic2019_{name}.csv"]).hexdigest()
        assert record["files"][f"isic2019_{name}.csv"] == {"sha256": digest, "images": len(rows), **new}
    every = [{row.image: row.fields for rows in part.values() for row in rows} for part in (before, after)]
    assert every[0] == every[1] and out["isic2019_val.csv"].decode().startswith(HEADER)
    (tmp_path / "out" / "isic2019_val.csv").write_bytes(out["isic2019_val.csv"].replace(b"arm", b"leg"))
    assert "was changed after splits.json" in command("--splits", tmp_path / "out")[1]


def test_unusable_requests_write_nothing(folder, tmp_path, command):
    meta, out = tmp_path / "meta.csv", tmp_path / "out"
    write_metadata(meta, {"I000": "L1"})
    (tmp_path / "twice.csv").write_text("image,lesion_id\nI000,L1\nI000_downsampled,L2\n")
    (tmp_path / "foreign.csv").write_text("image,lesion_id\nX,L1\n")
    write_table(tmp_path / "single", "isic2019_train", ["I000"])
    write_table(tmp_path / "two", "a_train", ["I000"])
    write_table(tmp_path / "two", "b_train", ["I001"])
    write_table(tmp_path / "mixed", "a_train", ["I000"])
    (tmp_path / "mixed" / "a_val.csv").write_text(HEADER.replace("site", "place") + "I001,1,0,0,0,0,0,arm\n")
    for place, source, target, expected in (
        (folder, None, out, "--regroup needs --metadata"),
        (folder, tmp_path / "absent.csv", out, "metadata .* does not exist"),
        (folder, tmp_path / "twice.csv", out, "line 3: image 'I000_downsampled' appears twice"),
        (folder, tmp_path / "foreign.csv", out, "none of the 100 images"),
        (folder, meta, tmp_path / "single", "single' exists already"),
        (tmp_path / "single", meta, out, "only the split train"),
        (tmp_path / "two", meta, out, "holds the splits a, b"),
        (tmp_path / "mixed", meta, out, "columns of the split tables differ"),
    ):
        refused(expected, splits.check_folder, str(place), metadata=str(source or ""), regroup_to=str(target))
    assert command("--splits", folder, "--list_missing", out)[0] == 2
    assert not out.exists() and not list(tmp_path.glob(".*"))
