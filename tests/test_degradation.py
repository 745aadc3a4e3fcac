"""Degraded rating sets: every image in three grades, ratings of known truth, sets completed and not mixed."""

import csv
import dataclasses
import json
import logging
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from script_tools import files_of

from ddpo_pytorch.data import ratings
from ddpo_pytorch.data.fundus import load_split
from ddpo_pytorch.phantoms import fundus, rating_sets
from ddpo_pytorch.utils.errors import UserError

SET = dict(seed=2, size=48, resize="stretch")


def read(folder):
    with open(folder / "ratings.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Rows and files of a world of 20 training images, none of them degraded."""
    folder = tmp_path_factory.mktemp("fundus")
    fundus.write_world(folder, 20, 0, 0, seed=3, size=48)
    return load_split(folder / "splits" / "fundus_train.csv", folder)[:2]


@pytest.fixture(scope="module")
def rated(table, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rated")
    rating_sets.write_rating_set(*table, folder, **SET)
    return folder


def test_every_image_is_there_unchanged_mildly_and_badly_degraded(rated, table):
    rows, by_pixels = read(rated), {}
    assert (rated / "ratings.csv").read_text().splitlines()[0] == ",".join(rating_sets.COLUMNS)
    assert Counter(row["quality"] for row in rows) == {"3": 20, "2": 20, "1": 20}
    for row in rows:
        image = np.asarray(Image.open(rated / row["image_path"]))
        assert image.shape == (48, 48, 3)
        by_pixels[image.tobytes()] = row
    for source, path in zip(*table, strict=True):
        original = by_pixels[np.asarray(Image.open(path)).tobytes()]
        assert original["quality"] == "3" and original["patient"] == source.patient
    assert Counter(row["patient"] for row in rows) == {row.patient: 6 for row in table[0]}


def test_the_rating_is_the_lower_of_quality_and_alignment(rated, table):
    captions, rows = {row.caption for row in table[0]}, read(rated)
    assert Counter((row["quality"], row["alignment"]) for row in rows) == {
        (quality, alignment): count for quality in "321" for alignment, count in (("1", 6), ("3", 14))
    }
    for row in rows:
        assert int(row["rating"]) == min(int(row["quality"]), int(row["alignment"])) and row["prompt"] in captions
        assert (row["modality"], row["expert_level"], row["rater_id"]) == ("Fundus", "3", "truth")


def test_a_swapped_caption_shares_no_finding_with_the_true_one(rated, table):
    findings_of = {}
    for row in table[0]:
        findings_of.setdefault(row.patient, set()).add(row.caption.split(" shows ")[1])
    for row in read(rated):
        if row["alignment"] == "1":
            assert findings_of[row["patient"]] != {row["prompt"].split(" shows ")[1]}
    for caption, other, shared in (
        ("Fundus: The left eye fundus image shows drusen, lens dust.", "Fundus: Right eye shows lens dust.", True),
        ("Fundus: The left eye fundus image shows drusen.", "Fundus: The left eye fundus image shows glaucoma.", False),
        ("Fundus: drusen of the left eye", "Fundus: drusen of the right eye", True),
    ):
        assert bool(rating_sets._findings(caption) & rating_sets._findings(other)) == shared


def test_neither_name_nor_order_reveals_the_grade(rated):
    grades = [int(row["quality"]) for row in read(rated)]
    assert [row["image_path"] for row in read(rated)] == [f"images/{number:06d}.png" for number in range(60)]
    assert abs(np.corrcoef(grades, range(60))[0, 1]) < 0.4  # three standard deviations of chance
    assert abs(np.corrcoef(grades[:-1], grades[1:])[0, 1]) < 0.4


def test_without_mismatches_the_rating_is_the_quality(table, tmp_path):
    rating_sets.write_rating_set(*table, tmp_path, **SET, mismatched=0)
    assert all(row["alignment"] == "3" and row["rating"] == row["quality"] for row in read(tmp_path))


def test_raters_err_by_one_grade_and_less_at_higher_levels(rated, table, tmp_path):
    rating_sets.write_rating_set(*table, tmp_path, **SET, raters=6)
    truth, rows = {row["image_path"]: row for row in read(rated)}, read(tmp_path)
    levels = {row["rater_id"]: row["expert_level"] for row in rows}
    assert levels == {f"rater{n}": level for n, level in zip(range(1, 7), "321321", strict=True)} and len(rows) == 360
    wrong = Counter()
    for row in rows:
        assert int(row["rating"]) == min(int(row["quality"]), int(row["alignment"]))
        for column in ("quality", "alignment"):
            error = abs(int(row[column]) - int(truth[row["image_path"]][column]))
            assert error <= 1
            wrong[row["expert_level"]] += error
    for level, chance in rating_sets.ERRORS.items():
        assert abs(wrong[str(level)] / 240 - chance) < 4 * np.sqrt(chance * (1 - chance) / 240)

    images = ratings.aggregate(ratings.read_ratings(tmp_path / "ratings.csv"), tmp_path)
    assert len(images) == 60 and all(image.path.is_file() and image.ratings == 6 for image in images)
    assert {image.patient for image in images} == {row.patient for row in table[0]}
    np.testing.assert_allclose([image.weight for image in images], 2 / 3)  # of levels 3, 2 and 1


def test_degraded_images_and_those_without_vessels_are_left_out(table, tmp_path, caplog):
    rows, paths = list(table[0]), list(table[1])
    rows[0] = dataclasses.replace(rows[0], fields=rows[0].fields | {"quality": "2"})
    rows[1] = dataclasses.replace(rows[1], fields=rows[1].fields | {"quality": ""})
    paths[2] = tmp_path / "haze.png"
    Image.new("RGB", (48, 48), (150, 90, 60)).save(paths[2])
    with caplog.at_level(logging.INFO):
        rating_sets.write_rating_set(rows, paths, tmp_path / "set", **SET)
    assert caplog.records[0].args == (20, 1, 1, 18)
    assert Counter(row["quality"] for row in read(tmp_path / "set")) == {"3": 18, "2": 18, "1": 18}
    with pytest.raises(UserError, match="none of the 1 images shows a retina"):
        rating_sets.write_rating_set(rows[2:3], paths[2:3], tmp_path / "none", **SET)
    same = [number for number, row in enumerate(table[0]) if row.caption.endswith("normal fundus.")]
    with pytest.raises(UserError, match="no image shows anything else.*mismatched"):
        rating_sets.write_rating_set(*([part[number] for number in same] for part in table), tmp_path / "none", **SET)
    assert not (tmp_path / "none").exists()


def test_an_interrupted_set_is_completed_and_a_complete_one_is_kept(rated, table, tmp_path, monkeypatch):
    real_save, calls = rating_sets.save_image, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 20:
            raise KeyboardInterrupt
        real_save(*arguments)

    monkeypatch.setattr(rating_sets, "save_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rating_sets.write_rating_set(*table, tmp_path, **SET)
    assert not (tmp_path / "ratings.csv").exists()
    for _ in range(2):
        rating_sets.write_rating_set(*table, tmp_path, **SET)
        assert len(calls) == 20 + 41 and files_of(tmp_path) == files_of(rated)


def test_other_sets_sources_and_files_are_not_overwritten(rated, table, tmp_path):
    before = files_of(rated)
    for name, value in {"seed": 3, "size": 64, "resize": "fov", "mismatched": 0.2, "raters": 1}.items():
        with pytest.raises(UserError, match=f"already holds {name} .*{value}"):
            rating_sets.write_rating_set(*table, rated, **SET | {name: value})
    with pytest.raises(UserError, match="already holds images 20, not 19"):
        rating_sets.write_rating_set(table[0][1:], table[1][1:], rated, **SET)
    with pytest.raises(UserError, match="already holds sources"):
        rating_sets.write_rating_set(table[0], [*table[1][1:], table[1][0]], rated, **SET)
    assert files_of(rated) == before
    (tmp_path / "notes.txt").write_text("somebody's")
    with pytest.raises(UserError, match="already holds other files"):
        rating_sets.write_rating_set(*table, tmp_path, **SET)
    (tmp_path / "record.json").write_text("{torn")
    with pytest.raises(UserError, match="record.json"):
        rating_sets.write_rating_set(*table, tmp_path, **SET)
    assert len(files_of(tmp_path)) == 2


@pytest.mark.parametrize("wrong", [{"size": 8}, {"resize": "fit"}, {"mismatched": 1.2}, {"raters": -1}, {"seed": -1}])
def test_impossible_values_are_refused(table, tmp_path, wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(UserError, match=f"{name} {value!r}"):
        rating_sets.write_rating_set(*table, tmp_path / "new", **SET | wrong)
    assert not (tmp_path / "new").exists()


def test_the_command_writes_a_set_and_reports_user_errors(table, tmp_path, capsys, caplog):
    world = table[1][0].parents[1]
    arguments = ["--csv", str(world / "captions.csv"), "--data_path", str(world), "--out", str(tmp_path / "set")]
    with caplog.at_level(logging.INFO):
        rating_sets.main([*arguments, "--limit", "12", "--size", "32", "--raters", "2"])
    assert "72 ratings of 36 images" in caplog.text
    record = json.loads((tmp_path / "set" / "record.json").read_text())
    assert (record["images"], record["size"], record["resize"], record["raters"]) == (12, 32, "fov", 2)
    with pytest.raises(SystemExit) as refused:
        rating_sets.main(arguments)
    assert refused.value.code == 2 and "give a new folder" in capsys.readouterr().err
