"""Phantom worlds of skin and fundus: functions of their settings, completed after a kill, never mixed."""

import csv
import itertools
import json
import logging
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from script_tools import files_of

from ddpo_pytorch.data import fundus as fundus_data
from ddpo_pytorch.data import isic
from ddpo_pytorch.data.isic import LABELS
from ddpo_pytorch.phantoms import fundus, skin
from ddpo_pytorch.utils.errors import UserError

SETTINGS = {
    skin: dict(num_train=41, num_val=6, num_test=5, seed=3, size=64),
    fundus: dict(num_train=24, num_val=8, num_test=6, seed=3, size=48, degraded=0.5),
}


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """The folder of each kind of world."""
    folders = {phantom: tmp_path_factory.mktemp("world") for phantom in SETTINGS}
    for phantom, folder in folders.items():
        phantom.write_world(folder, **SETTINGS[phantom])
    return folders


@pytest.fixture(params=SETTINGS, ids=["skin", "fundus"])
def world(request, worlds):
    return SimpleNamespace(phantom=request.param, folder=worlds[request.param], settings=SETTINGS[request.param])


def test_images_do_not_depend_on_how_many_there_are(world, tmp_path):
    world.phantom.write_world(tmp_path, **world.settings | dict(num_train=4, num_val=2, num_test=0))
    for path in (tmp_path / "images").iterdir():
        assert path.read_bytes() == (world.folder / "images" / path.name).read_bytes()


def test_an_interrupted_world_is_completed_and_a_complete_one_is_kept(world, tmp_path, monkeypatch):
    numbers = world.settings | dict(num_train=2, num_val=2, num_test=2, size=32)
    real_draw, calls = world.phantom.draw, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real_draw(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(world.phantom, "draw", interrupted)
        with pytest.raises(KeyboardInterrupt):
            world.phantom.write_world(tmp_path / "world", **numbers)
        assert not (tmp_path / "world" / "splits").exists()
        for _ in range(2):
            world.phantom.write_world(tmp_path / "world", **numbers)
        assert len(calls) == 4 + 3  # the three images from before the interruption are kept
    world.phantom.write_world(tmp_path / "straight", **numbers)
    assert files_of(tmp_path / "straight") == files_of(tmp_path / "world")


@pytest.mark.parametrize(
    ("phantom", "other"),
    [
        *((skin, {name: value}) for name, value in {"seed": 4, "num_train": 42, "num_val": 7, "size": 32}.items()),
        *((skin, {name: True}) for name in ("balanced", "unseen")),
        *((fundus, {name: value}) for name, value in {"seed": 4, "num_test": 8, "size": 64, "degraded": 0.4}.items()),
    ],
)
def test_other_worlds_and_files_are_not_overwritten(worlds, tmp_path, phantom, other):
    before = files_of(worlds[phantom])
    with pytest.raises(UserError, match=f"already holds {next(iter(other))}"):
        phantom.write_world(worlds[phantom], **SETTINGS[phantom] | other)
    assert files_of(worlds[phantom]) == before
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(b"somebody's")
    with pytest.raises(UserError, match="already holds other files"):
        phantom.write_world(tmp_path, **SETTINGS[phantom])
    assert files_of(tmp_path) == {"images/a.jpg": b"somebody's"}


@pytest.mark.parametrize(
    ("phantom", "wrong"),
    [
        *((skin, {name: value}) for name, value in {"num_train": -1, "size": 8, "seed": -1}.items()),
        *((fundus, {name: value}) for name, value in {"num_val": 3, "num_train": -2, "size": 16, "seed": -1}.items()),
        (fundus, {"degraded": 1.5}),
    ],
)
def test_impossible_settings_are_refused(tmp_path, phantom, wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(UserError, match=f"'{name}': {value}"):
        phantom.write_world(tmp_path / "new", **SETTINGS[phantom] | wrong)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("phantom", "option"), [(skin, ["--balanced"]), (fundus, ["--degraded", "0.5"])])
def test_the_command_writes_a_world_and_reports_user_errors(tmp_path, capsys, caplog, phantom, option):
    arguments = ["--out", str(tmp_path), "--num_train", "4", "--num_val", "2", "--num_test", "2"]
    with caplog.at_level(logging.INFO):
        phantom.main([*arguments, *option])
    assert "8 of 8" in caplog.text
    assert {Image.open(path).size for path in (tmp_path / "images").iterdir()} == {(64, 64)}
    assert json.loads((tmp_path / "world.json").read_text())[option[0][2:]] in (True, 0.5)
    with pytest.raises(SystemExit) as refused:
        phantom.main(["--out", str(tmp_path), "--seed", "8"])
    message = capsys.readouterr().err
    assert refused.value.code == 2 and "already holds" in message and message.count("\n") == 1


def test_skin_tables_have_the_columns_of_isic_and_the_labels_of_their_images(worlds):
    splits, columns = worlds[skin] / "splits", "image,MEL,NV,dark_corner,hair,gel_border,gel_bubble,ruler,ink,patches"
    for name, indices in (("train", range(41)), ("val", range(41, 47)), ("test", range(47, 52))):
        rows = read(splits / f"phantom_{name}.csv")
        assert (splits / f"phantom_{name}.csv").read_text().startswith(f"{columns},vasc,label\n")
        assert [row["image"] for row in rows] == [f"PHANTOM_{index:07d}" for index in indices]
        for row, index in zip(rows, indices, strict=True):
            labels = skin.sample_labels(np.random.default_rng((3, index)))
            assert tuple(int(float(row[name])) for name in LABELS) == labels
            assert {row["MEL"], row["NV"]} == {"0.0", "1.0"} and row["label"] == str(labels[4])
            assert {row[name] for name in ("dark_corner", "gel_border", "patches", "vasc")} == {"0"}
    train, a, b = ([row["image"] for row in read(splits / f"phantom_train{part}.csv")] for part in ("", "_a", "_b"))
    assert sorted(a + b) == train and (len(a), len(b)) == (21, 20)


def test_the_isic_loader_reads_the_skin_world(worlds):
    folder = worlds[skin]
    rows, paths, missing = isic.load_split(folder / "splits" / "phantom_test.csv", folder / "images")
    assert len(rows) == len(paths) == 5 and missing == 0
    rng = np.random.default_rng((3, 47))
    expected = skin.draw(skin.sample_labels(rng), rng).astype(float)
    stored = np.asarray(Image.open(paths[0]).convert("RGB"), float)
    assert np.abs(stored - expected).mean() < 2  # JPEG at quality 95


def test_the_fundus_loader_reads_the_fundus_world(worlds):
    folder, patients, tables = worlds[fundus], {}, []
    for name, count in (("train", 24), ("val", 8), ("test", 6)):
        rows, paths, missing = fundus_data.load_split(folder / "splits" / f"fundus_{name}.csv", folder)
        tables += read(folder / "splits" / f"fundus_{name}.csv")
        assert (len(rows), len(paths), missing) == (count, count, 0)
        patients[name] = Counter(row.patient for row in rows)
        assert set(patients[name].values()) == {2}
        for row in rows:
            finding = row.caption.split(" shows ")[1].removesuffix(".")
            assert finding in fundus.FINDINGS
            assert row.caption == f"Fundus: The {row.eye} eye fundus image shows {finding}."
            assert row.fields["modality"] == "Fundus" and row.fields["sex"] in ("Male", "Female")
            assert 25 <= int(row.fields["age"]) <= 85 and row.fields["quality"] in ("1", "2", "3")
    assert all(not patients[one] & patients[other] for one, other in itertools.combinations(patients, 2))
    assert (folder / "captions.csv").read_text().startswith("path,Text,modality,patient,eye,age,sex,quality\n")
    assert read(folder / "captions.csv") == tables
    assert sorted(f"images/{path.name}" for path in (folder / "images").iterdir()) == sorted(r["path"] for r in tables)


def test_a_share_of_training_and_validation_images_is_degraded_and_no_test_image(worlds, tmp_path):
    """Images that are not degraded equal those of a world without degradation."""
    fundus.write_world(tmp_path, **SETTINGS[fundus] | {"degraded": 0})
    rows, clean = read(worlds[fundus] / "captions.csv"), read(tmp_path / "captions.csv")
    assert [row | {"quality": "3"} for row in rows] == clean
    assert {row["quality"] for row in rows[-6:]} == {"3"} and {row["quality"] for row in rows} == {"1", "2", "3"}
    assert 8 <= sum(row["quality"] != "3" for row in rows[:32]) <= 24  # 16 expected, standard deviation 2.8
    for row in rows:
        same = (worlds[fundus] / row["path"]).read_bytes() == (tmp_path / row["path"]).read_bytes()
        assert same == (row["quality"] == "3")
