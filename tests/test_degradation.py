"""The degraded rating set: every image in three grades, ratings that are the truth, sets finished and not mixed."""

import csv
import dataclasses
import json
import logging
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from ddpo_pytorch.data import ratings
from ddpo_pytorch.data.fundus import load_split
from ddpo_pytorch.phantoms import fundus as retina
from ddpo_pytorch.phantoms import rating_sets as degradation
from ddpo_pytorch.phantoms.rating_sets import COLUMNS
from ddpo_pytorch.utils.errors import UserError

SET = dict(seed=2, size=48, resize="stretch")


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read(folder):
    with open(folder / "ratings.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Rows and files of a world of 20 training images, none of them degraded."""
    folder = tmp_path_factory.mktemp("fundus")
    retina.write_world(folder, 20, 0, 0, seed=3, size=48)
    return load_split(folder / "splits" / "fundus_train.csv", folder)[:2]


@pytest.fixture(scope="module")
def rated(table, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rated")
    degradation.write_rating_set(*table, folder, **SET)
    return folder


def test_every_image_is_there_as_it_is_mildly_and_badly_spoilt(rated, table):
    rows, by_pixels = read(rated), {}
    assert (rated / "ratings.csv").read_text().splitlines()[0] == ",".join(COLUMNS)
    assert Counter(row["quality"] for row in rows) == {"3": 20, "2": 20, "1": 20}
    assert {path.name for path in (rated / "images").iterdir()} == {row["image_path"].split("/")[1] for row in rows}
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
    finding = {row.caption: row.caption.split(" shows ")[1] for row in table[0]}
    of_patient = {}
    for row in table[0]:
        of_patient.setdefault(row.patient, set()).add(finding[row.caption])
    swapped = [row for row in read(rated) if row["alignment"] == "1"]
    for row in swapped:
        assert of_patient[row["patient"]] != {finding[row["prompt"]]}
    for caption, other, shared in (
        ("Fundus: The left eye fundus image shows drusen, lens dust.", "Fundus: Right eye shows lens dust.", True),
        ("Fundus: The left eye fundus image shows drusen.", "Fundus: The left eye fundus image shows glaucoma.", False),
        ("Fundus: drusen of the left eye", "Fundus: drusen of the right eye", True),
    ):
        assert bool(degradation._findings(caption) & degradation._findings(other)) == shared


def test_the_ratings_reader_aggregates_the_set(table, tmp_path):
    degradation.write_rating_set(*table, tmp_path, **SET, raters=3)
    images = ratings.aggregate(ratings.read_ratings(tmp_path / "ratings.csv"), tmp_path)
    assert len(images) == 60 and all(image.path.is_file() and image.ratings == 3 for image in images)
    assert {image.patient for image in images} == {row.patient for row in table[0]}
    np.testing.assert_allclose([image.weight for image in images], 2 / 3)  # of levels 3, 2 and 1


def test_neither_name_nor_order_gives_the_grade_away(rated):
    grades = [int(row["quality"]) for row in read(rated)]
    assert [row["image_path"] for row in read(rated)] == [f"images/{number:06d}.png" for number in range(60)]
    assert abs(np.corrcoef(grades, range(60))[0, 1]) < 0.4  # three standard deviations of chance
    assert abs(np.corrcoef(grades[:-1], grades[1:])[0, 1]) < 0.4


def test_without_mismatches_the_rating_is_the_quality(table, tmp_path):
    degradation.write_rating_set(*table, tmp_path / "set", **SET, mismatched=0)
    for row in read(tmp_path / "set"):
        assert row["alignment"] == "3" and row["rating"] == row["quality"]


def test_raters_err_by_one_grade_and_the_less_the_higher_their_level(table, tmp_path):
    degradation.write_rating_set(*table, tmp_path / "many", **SET, raters=6)
    degradation.write_rating_set(*table, tmp_path / "truth", **SET)
    truth = {row["image_path"]: row for row in read(tmp_path / "truth")}
    rows = read(tmp_path / "many")
    levels = {row["rater_id"]: row["expert_level"] for row in rows}
    assert levels == {f"rater{n}": level for n, level in zip(range(1, 7), "321321", strict=True)} and len(rows) == 360
    wrong = Counter()
    for row in rows:
        assert int(row["rating"]) == min(int(row["quality"]), int(row["alignment"]))
        for column in ("quality", "alignment"):
            error = abs(int(row[column]) - int(truth[row["image_path"]][column]))
            assert error <= 1
            wrong[row["expert_level"]] += error
    for level, chance in degradation.ERRORS.items():
        assert abs(wrong[str(level)] / 240 - chance) < 4 * np.sqrt(chance * (1 - chance) / 240)


def test_images_known_to_be_spoilt_or_that_show_no_vessels_are_left_out(table, tmp_path, caplog):
    rows, paths = list(table[0]), list(table[1])
    rows[0] = dataclasses.replace(rows[0], fields=rows[0].fields | {"quality": "2"})
    rows[1] = dataclasses.replace(rows[1], fields=rows[1].fields | {"quality": ""})
    paths[2] = tmp_path / "haze.png"
    Image.new("RGB", (48, 48), (150, 90, 60)).save(paths[2])
    with caplog.at_level(logging.INFO):
        degradation.write_rating_set(rows, paths, tmp_path / "set", **SET)
    assert "20 images, of which 1 have a lower quality in the table and 1 show no vessels; 18 are taken" in caplog.text
    assert Counter(row["quality"] for row in read(tmp_path / "set")) == {"3": 18, "2": 18, "1": 18}
    with pytest.raises(UserError, match="none of the 1 images shows a retina"):
        degradation.write_rating_set(rows[2:3], paths[2:3], tmp_path / "none", **SET)


def test_an_interrupted_set_is_finished_and_a_complete_one_left_alone(rated, table, tmp_path, monkeypatch):
    folder, real_save, calls = tmp_path / "set", degradation.save_image, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 20:
            raise KeyboardInterrupt
        real_save(*arguments)

    monkeypatch.setattr(degradation, "save_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        degradation.write_rating_set(*table, folder, **SET)
    assert not (folder / "ratings.csv").exists()
    degradation.write_rating_set(*table, folder, **SET)
    assert len(calls) == 20 + 41 and contents(folder) == contents(rated)
    degradation.write_rating_set(*table, folder, **SET)
    assert len(calls) == 20 + 41 and contents(folder) == contents(rated)


@pytest.mark.parametrize("other", [{"seed": 3}, {"size": 64}, {"resize": "fov"}, {"mismatched": 0.2}, {"raters": 1}])
def test_another_set_is_not_overwritten(rated, table, other):
    before = contents(rated)
    with pytest.raises(UserError, match=f"holds a rating set of {next(iter(other))} .*; give a new folder"):
        degradation.write_rating_set(*table, rated, **SET | other)
    assert contents(rated) == before


def test_other_sources_and_other_files_are_not_overwritten(rated, table, tmp_path):
    before = contents(rated)
    with pytest.raises(UserError, match="rating set of images 20, not 19"):
        degradation.write_rating_set(table[0][1:], table[1][1:], rated, **SET)
    with pytest.raises(UserError, match="rating set of sources"):
        degradation.write_rating_set(table[0], [*table[1][1:], table[1][0]], rated, **SET)
    assert contents(rated) == before
    (tmp_path / "notes.txt").write_text("somebody's")
    with pytest.raises(UserError, match="holds something else"):
        degradation.write_rating_set(*table, tmp_path, **SET)
    (tmp_path / "record.json").write_text("{torn")
    with pytest.raises(UserError, match="record.json"):
        degradation.write_rating_set(*table, tmp_path, **SET)
    assert len(contents(tmp_path)) == 2


@pytest.mark.parametrize("wrong", [{"size": 8}, {"resize": "fit"}, {"mismatched": 1.2}, {"raters": -1}, {"seed": -1}])
def test_impossible_values_are_refused(table, tmp_path, wrong):
    with pytest.raises(UserError, match="size >= 32, resize of stretch"):
        degradation.write_rating_set(*table, tmp_path / "new", **SET | wrong)
    assert not (tmp_path / "new").exists()


def test_captions_that_all_say_the_same_cannot_be_swapped(table, tmp_path):
    same = [number for number, row in enumerate(table[0]) if row.caption.endswith("normal fundus.")]
    rows, paths = ([part[number] for number in same] for part in table)
    with pytest.raises(UserError, match="no image shows anything else.*set mismatched to 0"):
        degradation.write_rating_set(rows, paths, tmp_path / "new", **SET)
    assert not (tmp_path / "new").exists()


def test_command_line_writes_a_set_and_reports_user_errors(table, tmp_path, capsys, caplog):
    world = table[1][0].parents[1]
    arguments = ["--csv", str(world / "captions.csv"), "--data_path", str(world), "--out", str(tmp_path / "set")]
    with caplog.at_level(logging.INFO):
        degradation.main([*arguments, "--limit", "12", "--size", "32", "--raters", "2"])
    assert "72 ratings of 36 images" in caplog.text
    record = json.loads((tmp_path / "set" / "record.json").read_text())
    assert (record["images"], record["size"], record["resize"], record["raters"]) == (12, 32, "fov", 2)
    with pytest.raises(SystemExit) as refused:
        degradation.main(arguments)
    assert refused.value.code == 2 and "give a new folder" in capsys.readouterr().err
