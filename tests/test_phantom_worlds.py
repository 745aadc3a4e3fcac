"""Phantom worlds of skin and fundus: their pictures, what they depend on, completed after a kill, never mixed."""

import dataclasses
import itertools
import json
from collections import Counter
from functools import partial
from unittest.mock import DEFAULT, Mock

import numpy as np
import pytest
from PIL import Image
from refusals import refused
from script_tools import files_of, read_table

from ddpo_pytorch.data import fundus as fundus_data
from ddpo_pytorch.data.isic import LABELS
from ddpo_pytorch.phantoms import fundus, rating_sets, skin

CLEAN_NEVUS = (0, 0, 0, 0, 0, 1)
SET = dict(seed=2, size=48, resize="stretch", structural=0.0)
SETTINGS = {
    skin: dict(num_train=41, num_val=6, num_test=5, seed=3, size=64),
    fundus: dict(num_train=24, num_val=8, num_test=6, seed=3, size=48, degraded=0.5),
    rating_sets: SET,
}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Rows and files of a world of 20 training images, none of them degraded."""
    folder = tmp_path_factory.mktemp("fundus")
    fundus.write_world(folder, 20, 0, 0, seed=3, size=48)
    return fundus_data.load_split(folder / "splits" / "fundus_train.csv", folder)[:2]


@pytest.fixture(scope="module")
def write(table):
    """Function of a kind of world, a folder and settings; rating sets are of the images of `table`."""
    kinds = {skin: skin.write_world, fundus: fundus.write_world}
    kinds[rating_sets] = partial(rating_sets.write_rating_set, *table)
    return lambda phantom, folder, **settings: kinds[phantom](folder, **settings)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory, write):
    """The folder of each kind of world."""
    folders = {phantom: tmp_path_factory.mktemp("world") for phantom in SETTINGS}
    for phantom, folder in folders.items():
        write(phantom, folder, **SETTINGS[phantom])
    return folders


@pytest.mark.parametrize(("phantom", "drawing"), [(skin, "draw"), (fundus, "draw"), (rating_sets, "save_image")])
def test_an_interrupted_world_is_completed_and_a_complete_one_is_kept(write, tmp_path, monkeypatch, phantom, drawing):
    numbers = {} if phantom is rating_sets else dict(num_train=2, num_val=2, num_test=2)
    settings = SETTINGS[phantom] | numbers
    results = itertools.chain([DEFAULT] * 3, [KeyboardInterrupt], itertools.repeat(DEFAULT))
    draw = Mock(wraps=getattr(phantom, drawing), side_effect=results)
    monkeypatch.setattr(phantom, drawing, draw)
    with pytest.raises(KeyboardInterrupt):
        write(phantom, tmp_path / "world", **settings)
    for _ in range(2):
        write(phantom, tmp_path / "world", **settings)
        drawn = draw.call_count
        write(phantom, tmp_path / "world", **settings)
        assert draw.call_count == drawn
    write(phantom, tmp_path / "straight", **settings)
    assert draw.call_count - drawn == drawn - 1  # the three images from before the interruption were kept
    assert files_of(tmp_path / "straight") == files_of(tmp_path / "world")


OTHERS = [(skin, "seed", 4), (skin, "num_val", 7), (skin, "balanced", True), (fundus, "size", 64)]
OTHERS += [(fundus, "degraded", 0.4), (rating_sets, "seed", 3), (rating_sets, "raters", 1)]
IMPOSSIBLE = [(skin, "num_train", -1), (skin, "size", 8), (fundus, "num_val", 3), (fundus, "seed", -1)]
IMPOSSIBLE += [(fundus, "degraded", 1.5), (fundus, "degraded", float("nan")), (rating_sets, "size", 8)]
IMPOSSIBLE += [(rating_sets, "resize", "fit"), (rating_sets, "mismatched", 1.2), (rating_sets, "structural", -1)]


@pytest.mark.parametrize(("phantom", "name", "value"), OTHERS)
def test_other_worlds_and_files_are_not_overwritten(write, worlds, tmp_path, phantom, name, value):
    before = files_of(worlds[phantom])
    refused(f"was drawn with {name}=", write, phantom, worlds[phantom], **SETTINGS[phantom] | {name: value})
    assert files_of(worlds[phantom]) == before
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(b"somebody's")
    refused("already holds other files", write, phantom, tmp_path, **SETTINGS[phantom])
    assert files_of(tmp_path) == {"images/a.jpg": b"somebody's"}


@pytest.mark.parametrize(("phantom", "name", "value"), IMPOSSIBLE)
def test_impossible_settings_are_refused(write, tmp_path, phantom, name, value):
    refused(f"'{name}': {value!r}", write, phantom, tmp_path / "new", **SETTINGS[phantom] | {name: value})
    assert not (tmp_path / "new").exists()


def test_the_commands_write_worlds_and_report_user_errors(tmp_path, capsys):
    for phantom, option, value in ((skin, "--balanced", True), (fundus, "--degraded=0.5", 0.5)):
        out = tmp_path / phantom.__name__
        phantom.main([f"--out={out}", "--num_train=4", "--num_val=2", "--num_test=2", option])
        assert {Image.open(path).size for path in (out / "images").iterdir()} == {(64, 64)}
        assert json.loads((out / "world.json").read_text())[option[2:].partition("=")[0]] == value
    given = [f"--csv={out / 'splits' / 'fundus_test.csv'}", f"--data_path={out}", f"--out={tmp_path / 'set'}"]
    rating_sets.main([*given, "--limit=1", "--size=32", "--raters=2", "--mismatched=0"])
    record = json.loads((tmp_path / "set" / "record.json").read_text())
    assert (record["images"], record["size"], record["resize"], record["raters"]) == (1, 32, "fov", 2)
    for tool, options in ((skin, given[2:]), (rating_sets, given)):
        with pytest.raises(SystemExit) as stopped:
            tool.main(options)
        message = capsys.readouterr().err
        assert stopped.value.code == 2 and "give a new folder" in message and message.count("\n") == 1
    for limit in (-1, -99):
        refused(f"limit is {limit}", rating_sets.degrade_table, out / "splits" / "fundus_val.csv", out, limit, out=out)


def test_skin_tables_have_the_columns_of_isic_and_the_labels_of_their_images(worlds):
    splits, columns = worlds[skin] / "splits", "image,MEL,NV,dark_corner,hair,gel_border,gel_bubble,ruler,ink,patches"
    for name, indices in (("train", range(41)), ("val", range(41, 47)), ("test", range(47, 52))):
        rows = read_table(splits / f"phantom_{name}.csv")
        assert (splits / f"phantom_{name}.csv").read_text().startswith(f"{columns},vasc,label\n")
        assert [row["image"] for row in rows] == [f"PHANTOM_{index:07d}" for index in indices]
        for row, index in zip(rows, indices, strict=True):
            labels = skin.sample_labels(np.random.default_rng((3, index)))
            assert tuple(int(float(row[name])) for name in LABELS) == labels
            assert {row["MEL"], row["NV"]} == {"0.0", "1.0"} and row["label"] == str(labels[4])
            assert {row[name] for name in ("dark_corner", "gel_border", "patches", "vasc")} == {"0"}
    tables = (read_table(splits / f"phantom_train{part}.csv") for part in ("", "_a", "_b"))
    train, a, b = ([row["image"] for row in rows] for rows in tables)
    assert sorted(a + b) == train and (len(a), len(b)) == (21, 20)


def test_the_fundus_loader_reads_the_fundus_world(worlds):
    folder, patients, tables = worlds[fundus], {}, []
    for name, count in (("train", 24), ("val", 8), ("test", 6)):
        rows, paths, missing = fundus_data.load_split(folder / "splits" / f"fundus_{name}.csv", folder)
        tables += read_table(folder / "splits" / f"fundus_{name}.csv")
        assert (len(rows), len(paths), missing) == (count, count, 0)
        patients[name] = {row.patient for row in rows}
        assert len(patients[name]) == count // 2
        for row in rows:
            finding = row.caption.removeprefix(f"Fundus: The {row.fields['eye']} eye fundus image shows ")
            assert finding.removesuffix(".") in fundus.FINDINGS and row.fields["sex"] in ("Male", "Female")
            assert 25 <= int(row.fields["age"]) <= 85 and row.fields["quality"] in ("1", "2", "3")
    assert all(not patients[one] & patients[other] for one, other in itertools.combinations(patients, 2))
    assert (folder / "captions.csv").read_text().startswith("path,Text,modality,patient,eye,age,sex,quality\n")
    assert read_table(folder / "captions.csv") == tables


def test_a_share_of_training_and_validation_images_is_degraded_and_no_test_image(worlds, tmp_path):
    """Images that are not degraded equal those of a world without degradation, whatever the number of images."""
    fundus.write_world(tmp_path, **SETTINGS[fundus] | {"degraded": 0, "num_test": 8})
    rows, clean = read_table(worlds[fundus] / "captions.csv"), read_table(tmp_path / "captions.csv")
    assert [row | {"quality": "3"} for row in rows] == clean[:-2]
    assert {row["quality"] for row in rows[-6:]} == {"3"} and {row["quality"] for row in rows} == {"1", "2", "3"}
    assert 8 <= sum(row["quality"] != "3" for row in rows[:32]) <= 24  # 16 expected, standard deviation 2.8
    for row in rows:
        same = (worlds[fundus] / row["path"]).read_bytes() == (tmp_path / row["path"]).read_bytes()
        assert same == (row["quality"] == "3")


def test_every_image_is_there_in_three_grades_of_which_the_rating_is_the_lower(worlds, table):
    rated, by_pixels, findings_of = worlds[rating_sets], {}, {}
    captions, rows = {row.caption for row in table[0]}, read_table(rated / "ratings.csv")
    assert tuple(rows[0]) == rating_sets.COLUMNS
    assert Counter((row["quality"], row["alignment"]) for row in rows) == {
        (quality, alignment): count for quality in "321" for alignment, count in (("1", 6), ("3", 14))
    }
    for source in table[0]:
        findings_of.setdefault(source.patient, set()).add(source.caption.split(" shows ")[1])
    for row in rows:
        by_pixels[np.asarray(Image.open(rated / row["image_path"])).tobytes()] = row
        assert int(row["rating"]) == min(int(row["quality"]), int(row["alignment"])) and row["prompt"] in captions
        assert (row["modality"], row["expert_level"], row["rater_id"]) == ("Fundus", "3", "truth")
        if row["alignment"] == "1":  # a swapped caption shares no finding with the true one
            assert findings_of[row["patient"]] != {row["prompt"].split(" shows ")[1]}
    for source, path in zip(*table, strict=True):
        original = by_pixels[np.asarray(Image.open(path)).tobytes()]
        assert original["quality"] == "3" and original["patient"] == source.patient
    assert Counter(row["patient"] for row in rows) == {row.patient: 6 for row in table[0]}
    assert [row["image_path"] for row in rows] == [f"images/{number:06d}.png" for number in range(60)]
    grades = [int(row["quality"]) for row in rows]
    assert abs(np.corrcoef(grades, range(60))[0, 1]) < 0.4  # three standard deviations of chance


def test_degraded_images_are_left_out_and_those_without_vessels_or_structure_are_rated_1(table, tmp_path, caplog):
    rows, paths = list(table[0]), list(table[1])
    rows[0] = dataclasses.replace(rows[0], fields=rows[0].fields | {"quality": "2"})
    rows[1] = dataclasses.replace(rows[1], fields=rows[1].fields | {"quality": ""})
    paths[2] = tmp_path / "haze.png"
    Image.new("RGB", (48, 48), (150, 90, 60)).save(paths[2])
    with caplog.at_level("INFO"):
        rating_sets.write_rating_set(rows, paths, tmp_path / "set", **SET | {"structural": 0.5})
    assert caplog.records[0].args == (20, 1, 1, 18)
    rated = read_table(tmp_path / "set" / "ratings.csv")
    assert Counter(row["quality"] for row in rated) == {"3": 18, "2": 18, "1": 28}
    haze = [row for row in rated if np.asarray(Image.open(tmp_path / "set" / row["image_path"])).std((0, 1)).max() < 1]
    assert [(row["rating"], row["alignment"], row["patient"]) for row in haze] == [("1", "1", rows[2].patient)]
    write, out = rating_sets.write_rating_set, tmp_path / "none"
    refused("none of the 1 images shows a retina", write, rows[2:3], paths[2:3], out, **SET)
    same = [number for number, row in enumerate(table[0]) if row.caption.endswith("normal fundus.")]
    parts = ([part[number] for number in same] for part in table)
    refused("no image shows anything else.*mismatched", write, *parts, out, **SET)
    assert not out.exists()


def picture(labels, seed, size=64):
    return skin.draw(labels, np.random.default_rng(seed), size).astype(float)


def test_labels_are_nearly_as_frequent_as_in_isic_or_balanced():
    """Against shares that were counted in ISIC's table; one image in ten is of a combination drawn from all alike."""
    rng = np.random.default_rng(5)
    labels = np.array([skin.sample_labels(rng) for _ in range(20000)])
    isic, rare = np.array([0.376, 0.1083, 0.134, 0.0167, 0.2291, 0.7709]), np.array([14, 13, 15, 13, 13, 16]) / 29
    wanted = 0.9 * isic + 0.1 * rare  # of the LABELS in order
    assert (np.abs(labels.mean(axis=0) - wanted) < 4 * np.sqrt(wanted * (1 - wanted) / len(labels))).all()
    counts = Counter(map(tuple, labels.tolist()))
    assert len(counts) == 29 and min(counts.values()) > 30  # 70 expected of the rarest
    never = {(0, 1, 0, 1, 1, 0), (1, 1, 0, 1, 1, 0), (1, 1, 1, 1, 1, 0)}
    assert not never & set(counts)
    counts = Counter(skin.sample_labels(rng, balanced=True) for _ in range(32000))
    assert len(counts) == 32
    assert all(850 < count < 1150 for count in counts.values())  # 1000 expected, standard deviation 31


@pytest.mark.parametrize("index", range(4), ids=LABELS[:4])
def test_an_artifact_is_seen_and_leaves_the_rest_unchanged(index):
    """With and without, same patient: at least 1 % of the pixels change plainly, and at most 60 % at all."""
    labels = (*(int(number == index) for number in range(4)), *CLEAN_NEVUS[4:])
    for seed, size in zip(range(10), (64, 96) * 5, strict=True):
        change = np.abs(picture(labels, seed, size) - picture(CLEAN_NEVUS, seed, size)).max(axis=2)
        assert (change > 40).mean() > 0.01 and (change > 0).mean() < 0.6


def test_only_ink_is_violet_and_melanoma_has_more_colours_than_a_nevus():
    def violet_share(labels, seed):
        red, green, blue = np.moveaxis(picture(labels, seed), 2, 0)
        return ((blue > red + 20) & (blue > green + 50)).mean()

    def median_spread(labels):  # in the middle of the picture, where the lesion always is
        return np.median([picture(labels, seed)[26:38, 26:38].std(axis=(0, 1)).mean() for seed in range(40)])

    for seed in range(20):
        assert violet_share((0, 0, 0, 1, 0, 1), seed) > 0.005
        assert violet_share((1, 1, 1, 0, 1, 0), seed) == 0
    assert median_spread((0, 0, 0, 0, 1, 0)) > 2 * median_spread(CLEAN_NEVUS)
    for impossible in ((0, 0, 0, 0, 1, 1), (2, 0, 0, 0, 0, 1), (0, 0, 0, 1)):
        refused("one of MEL, NV set", picture, impossible, 0)
