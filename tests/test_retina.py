"""The fundus phantom: findings are exact, pictures follow from (seed, patient), the fundus loader reads its files."""

import csv
import dataclasses
import logging
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from ddpo_pytorch.data.fundus import load_split, read_split
from ddpo_pytorch.data.images import fov_mask
from ddpo_pytorch.phantoms import fundus as retina
from ddpo_pytorch.utils.errors import UserError

NORMAL, DRUSEN, GLAUCOMA, RETINOPATHY, MYOPIA = retina.FINDINGS
WORLD = dict(num_train=24, num_val=8, num_test=6, seed=3, size=48, degraded=0.5)


def picture(finding, seed=0, size=64, eye="right", **look):
    """(size, size, 3) float; equal seeds are one eye of one patient."""
    rng = np.random.default_rng(seed)
    patient = dataclasses.replace(retina.draw_look(rng), **look)
    return retina.draw(finding, eye, patient, rng, size).astype(float)


def middle(where):
    """Mean (x, y) of the true pixels, in points of a picture 64 wide."""
    rows, columns = np.nonzero(where)
    return (np.array([columns.mean(), rows.mean()]) + 0.5) * 64 / where.shape[1]


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fundus")
    retina.write_world(folder, **WORLD)
    return folder


def test_a_picture_is_a_function_of_its_finding_eye_and_generator():
    image = picture(DRUSEN)
    assert image.shape == (64, 64, 3)
    np.testing.assert_array_equal(image, picture(DRUSEN))
    assert (image != picture(DRUSEN, seed=1)).any(axis=2).mean() > 0.6  # all of the field, not the surround


@pytest.mark.parametrize("size", [64, 100])
def test_the_field_is_a_centred_disc_in_a_black_surround(size):
    """Its area is that of a circle of radius 31 of 64; the rim, half lit, counts by the threshold of the mask."""
    for seed in range(5):
        image = picture(NORMAL, seed, size)
        mask = fov_mask(image.astype(np.uint8))
        assert mask.mean() == pytest.approx(np.pi * (31 / 64) ** 2, rel=0.03)
        np.testing.assert_allclose(middle(mask), 32, atol=0.1)
        assert not image[~mask].max() > 15 and image[0, 0].max() == 0


@pytest.mark.parametrize("size", [64, 96])
@pytest.mark.parametrize("eye", retina.EYES)
def test_the_disc_is_nasal_of_the_macula(eye, size):
    """At the right in a right eye's photograph, at the left in a left eye's, 15 points and more from the macula."""
    nasal = 1 if eye == "right" else -1
    for seed in range(8):
        plain = picture(NORMAL, seed, size, eye, vessel_strength=0.0).sum(axis=2)
        flat = picture(NORMAL, seed, size, eye, vessel_strength=0.0, macula_depth=0.0).sum(axis=2)
        disc, macula = middle(plain > np.percentile(plain, 98.5)), middle(flat - plain > 60)
        assert 15 < nasal * (disc[0] - macula[0]) < 23 and abs(disc[1] - macula[1]) < 4


def test_vessels_arch_above_and_below_the_macula_and_leave_it_free():
    for seed in range(10):
        change = np.abs(picture(NORMAL, seed) - picture(NORMAL, seed, vessel_strength=0.0)).max(axis=2) > 20
        assert change[4:24, 12:40].mean() > 0.08 and change[42:60, 12:40].mean() > 0.08
        assert not change[30:37, 22:29].any()  # the macula of a right eye is at (25.5, 33)


@pytest.mark.parametrize("size", [64, 80])
@pytest.mark.parametrize("finding", list(retina.FINDINGS)[1:])
def test_a_finding_is_seen(finding, size):
    """With against without, same eye: at least 1 % of the pixels change plainly."""
    for seed in range(6):
        change = np.abs(picture(finding, seed, size) - picture(NORMAL, seed, size)).max(axis=2)
        assert (change > 40).mean() > 0.01


def test_each_finding_changes_what_it_should():
    for seed in range(8):
        normal = picture(NORMAL, seed, vessel_strength=0.0)
        change = {name: picture(name, seed, vessel_strength=0.0) - normal for name in retina.FINDINGS}
        assert not change[NORMAL].any()
        spots = np.abs(change[DRUSEN]).max(axis=2) > 40
        assert np.hypot(*(middle(spots) - (25.5, 33))) < 6 and change[DRUSEN][spots].mean(axis=0)[1] > 40
        cup = np.abs(change[GLAUCOMA]).max(axis=2) > 10
        assert change[GLAUCOMA].min() > -1 and 0.005 < cup.mean() < 0.025  # a pale ring of at most 6 points radius
        red, green, _ = np.moveaxis(change[RETINOPATHY], 2, 0)
        assert (red < -40).mean() > 0.01 and (green > 30).mean() > 0.004  # blood, lipid
        pale = (change[MYOPIA] + normal)[..., 2] > 150  # the atrophy: large, white, between disc and macula
        assert 0.03 < pale.mean() < 0.2 and 32 < middle(pale)[0] < 46
        assert change[MYOPIA][fov_mask(normal.astype(np.uint8))].mean() > 10


@pytest.mark.parametrize("finding, eye", [("cataract", "left"), (NORMAL, "both"), ("", "right")])
def test_what_cannot_be_drawn_is_refused(finding, eye):
    with pytest.raises(UserError, match="findings: normal fundus, drusen"):
        picture(finding, eye=eye)


def test_findings_are_as_frequent_as_stated_in_either_eye():
    rng = np.random.default_rng(5)
    drawn = [retina.draw_findings(rng) for _ in range(20000)]
    wanted = retina.FINDINGS
    assert sum(wanted.values()) == pytest.approx(1)
    for side in range(2):
        counts = Counter(pair[side] for pair in drawn)
        for name, chance in wanted.items():
            assert abs(counts[name] / 20000 - chance) < 4 * np.sqrt(chance * (1 - chance) / 20000)
    alike = retina.SAME + (1 - retina.SAME) * sum(chance**2 for chance in wanted.values())
    assert sum(left == right for left, right in drawn) / 20000 == pytest.approx(alike, abs=0.014)  # 4 standard errors


def test_the_fundus_loader_reads_the_world(world):
    patients = {}
    for name, count in (("train", 24), ("val", 8), ("test", 6)):
        rows, paths, missing = load_split(world / "splits" / f"fundus_{name}.csv", world)
        assert (len(rows), len(paths), missing) == (count, count, 0)
        patients[name] = Counter(row.patient for row in rows)
        assert set(patients[name].values()) == {2}
        for row in rows:
            finding = row.caption.split(" shows ")[1].removesuffix(".")
            assert finding in retina.FINDINGS
            assert row.caption == f"Fundus: The {row.eye} eye fundus image shows {finding}."
            assert row.fields["modality"] == "Fundus" and row.fields["sex"] in ("Male", "Female")
            assert 25 <= int(row.fields["age"]) <= 85 and row.fields["quality"] in ("1", "2", "3")
    assert len(patients["train"] | patients["val"] | patients["test"]) == 12 + 4 + 3  # nobody is in two splits


def test_captions_hold_every_row_once_in_odirs_columns(world):
    rows = read(world / "captions.csv")
    assert (world / "captions.csv").read_text().startswith("path,Text,modality,patient,eye,age,sex,quality\n")
    parts = [read(world / "splits" / f"fundus_{name}.csv") for name in ("train", "val", "test")]
    assert rows == [row for part in parts for row in part]
    assert {path.name for path in (world / "images").iterdir()} == {row["path"].split("/")[1] for row in rows}
    assert len(read_split(world / "captions.csv")) == len(rows)


def test_two_eyes_of_a_patient_look_more_alike_than_two_patients():
    """Mean colour of the field, normal eyes."""

    def colour(seed, eye):
        image = picture(NORMAL, seed, 48, eye)
        return image[fov_mask(image.astype(np.uint8))].mean(axis=0)

    left, right = (np.array([colour(seed, eye) for seed in range(20)]) for eye in retina.EYES)
    own = np.abs(left - right).mean()
    assert own < 0.5 * np.abs(left - np.roll(right, 1, axis=0)).mean()


def test_a_share_of_training_and_validation_images_is_degraded_and_no_test_image(world, tmp_path):
    """What is not degraded is the same picture as in a world without."""
    retina.write_world(tmp_path / "clean", **WORLD | {"degraded": 0})
    rows, clean = read(world / "captions.csv"), read(tmp_path / "clean" / "captions.csv")
    assert [row | {"quality": "3"} for row in rows] == clean
    assert {row["quality"] for row in rows[-6:]} == {"3"} and {row["quality"] for row in rows} == {"1", "2", "3"}
    assert 8 <= sum(row["quality"] != "3" for row in rows[:32]) <= 24  # of 32, 16 expected, standard deviation 2.8
    for row in rows:
        same = (world / row["path"]).read_bytes() == (tmp_path / "clean" / row["path"]).read_bytes()
        assert same == (row["quality"] == "3")


def test_an_image_does_not_depend_on_how_many_there_are(world, tmp_path):
    retina.write_world(tmp_path / "small", **WORLD | dict(num_train=4, num_val=2, num_test=0))
    for path in (tmp_path / "small" / "images").iterdir():
        assert path.read_bytes() == (world / "images" / path.name).read_bytes()


def test_a_complete_world_is_left_alone_and_an_interrupted_one_is_finished(tmp_path, monkeypatch):
    folder, numbers = tmp_path / "world", dict(num_train=2, num_val=2, num_test=2, seed=1, size=32, degraded=0.5)
    real_draw, calls = retina.draw, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real_draw(*arguments)

    monkeypatch.setattr(retina, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        retina.write_world(folder, **numbers)
    assert not (folder / "splits").exists()
    retina.write_world(folder, **numbers)
    assert len(calls) == 4 + 3  # three were drawn before the interruption and are not drawn again
    finished = contents(folder)
    retina.write_world(folder, **numbers)
    assert len(calls) == 4 + 3 and contents(folder) == finished

    monkeypatch.undo()
    retina.write_world(tmp_path / "straight", **numbers)
    assert contents(tmp_path / "straight") == finished


@pytest.mark.parametrize("other", [{"seed": 4}, {"num_train": 26}, {"num_test": 8}, {"size": 64}, {"degraded": 0.4}])
def test_another_world_is_not_overwritten(world, other):
    before = contents(world)
    with pytest.raises(UserError, match="already holds"):
        retina.write_world(world, **WORLD | other)
    assert contents(world) == before


def test_a_folder_of_other_images_is_refused(tmp_path):
    (tmp_path / "captions.csv").write_text("somebody's")
    with pytest.raises(UserError, match="already holds other images"):
        retina.write_world(tmp_path, **WORLD)
    assert contents(tmp_path).keys() == {(tmp_path / "captions.csv").relative_to(tmp_path)}


@pytest.mark.parametrize("wrong", [{"num_val": 3}, {"num_train": -2}, {"size": 16}, {"degraded": 1.5}, {"seed": -1}])
def test_impossible_values_are_refused(tmp_path, wrong):
    with pytest.raises(UserError, match="even numbers >= 0, size >= 32 and degraded in"):
        retina.write_world(tmp_path / "new", **WORLD | wrong)
    assert not (tmp_path / "new").exists()


def test_command_line_writes_a_world_and_reports_user_errors(tmp_path, capsys, caplog):
    arguments = ["--out", str(tmp_path), "--num_train", "4", "--num_val", "2", "--num_test", "2", "--size", "32"]
    with caplog.at_level(logging.INFO):
        retina.main([*arguments, "--degraded", "0.5"])
    assert "8 of 8 fundus images" in caplog.text
    assert {Image.open(path).size for path in (tmp_path / "images").iterdir()} == {(32, 32)}
    assert '"degraded": 0.5' in (tmp_path / "world.json").read_text()
    with pytest.raises(SystemExit) as refused:
        retina.main(["--out", str(tmp_path), "--seed", "8"])
    assert refused.value.code == 2 and "already holds" in capsys.readouterr().err
