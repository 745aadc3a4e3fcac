"""The phantom world: labels are exact, pictures follow from (seed, index), and the ISIC loader reads its files."""

import csv
import itertools
import logging
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from ddpo_pytorch.data.isic import LABELS, load_split
from ddpo_pytorch.phantoms import skin as phantom
from ddpo_pytorch.utils.errors import UserError

ISIC_COLUMNS = "image,MEL,NV,dark_corner,hair,gel_border,gel_bubble,ruler,ink,patches,vasc,label"
ISIC_FREQUENCIES = {"hair": 0.38, "gel_bubble": 0.11, "ruler": 0.14, "ink": 0.016, "MEL": 0.225, "NV": 0.775}
CLEAN_NEVUS = (0, 0, 0, 0, 0, 1)


def picture(labels, seed=0, size=64):
    return phantom.draw(labels, np.random.default_rng(seed), size).astype(float)


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def drawn_labels():
    rng = np.random.default_rng(5)
    return np.array([phantom.sample_labels(rng) for _ in range(20000)])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    phantom.write_world(folder, 41, 6, 5, seed=3)
    return folder


def test_labels_are_as_frequent_as_in_isic(drawn_labels):
    wanted = np.array([ISIC_FREQUENCIES[name] for name in LABELS])
    error = np.sqrt(wanted * (1 - wanted) / len(drawn_labels))
    assert (np.abs(drawn_labels.mean(axis=0) - wanted) < 4 * error).all()


def test_exactly_the_unseen_combinations_are_missing(drawn_labels):
    """The rarest combination that can occur has probability 0.0014: 20000 draws miss it with probability 1e-12."""
    everything = {(*four, mel, 1 - mel) for four in itertools.product((0, 1), repeat=4) for mel in (0, 1)}
    assert len(phantom.UNSEEN) == 14 and phantom.UNSEEN < everything
    assert {tuple(labels) for labels in drawn_labels.tolist()} == everything - phantom.UNSEEN


def test_a_picture_is_a_function_of_its_labels_and_generator():
    labels = (1, 1, 1, 1, 1, 0)
    image = phantom.draw(labels, np.random.default_rng(8))
    assert image.shape == (64, 64, 3) and image.dtype == np.uint8
    np.testing.assert_array_equal(image, phantom.draw(labels, np.random.default_rng(8)))
    assert (image != phantom.draw(labels, np.random.default_rng(9))).mean() > 0.9


@pytest.mark.parametrize("index", range(4), ids=LABELS[:4])
@pytest.mark.parametrize("size", [64, 96])
def test_an_artifact_is_seen_when_present_and_leaves_the_rest_alone(index, size):
    """On against off, same patient: at least 1 % of the pixels change plainly, and at most 60 % change at all."""
    labels = tuple(int(k == index) if k < 4 else value for k, value in enumerate(CLEAN_NEVUS))
    for seed in range(20):
        change = np.abs(picture(labels, seed, size) - picture(CLEAN_NEVUS, seed, size)).max(axis=2)
        assert (change > 40).mean() > 0.01
        assert (change > 0).mean() < 0.6


def test_a_balanced_world_shows_every_occurring_combination_equally_often():
    rng = np.random.default_rng(4)
    counts = Counter(phantom.sample_labels(rng, balanced=True) for _ in range(18000))
    assert len(counts) == 18 and not phantom.UNSEEN & set(counts)
    assert all(850 < count < 1150 for count in counts.values())  # 1000 expected, standard deviation 31


def test_unseen_combinations_are_drawn_on_request():
    rng = np.random.default_rng(5)
    drawn = {phantom.sample_labels(rng, balanced=True, unseen=True) for _ in range(1000)}
    assert len(drawn) == 32 and phantom.UNSEEN < drawn


def test_ink_is_violet_and_nothing_else_is():
    def violet_share(labels, seed):
        red, green, blue = np.moveaxis(picture(labels, seed), 2, 0)
        return ((blue > red + 20) & (blue > green + 50)).mean()

    for seed in range(20):
        assert violet_share((0, 0, 0, 1, 0, 1), seed) > 0.005
        assert violet_share((1, 1, 1, 0, 1, 0), seed) == 0


def test_melanoma_has_more_colours_than_a_nevus():
    """Spread of the colours in the middle of the picture, where the lesion always is."""

    def spread(labels, seed):
        return picture(labels, seed)[26:38, 26:38].std(axis=(0, 1)).mean()

    seeds = range(40)
    nevus = np.median([spread(CLEAN_NEVUS, seed) for seed in seeds])
    melanoma = np.median([spread((0, 0, 0, 0, 1, 0), seed) for seed in seeds])
    assert melanoma > 2 * nevus


@pytest.mark.parametrize("labels", [(0, 0, 0, 0, 1, 1), (0, 0, 0, 0, 0, 0), (2, 0, 0, 0, 0, 1), (0, 0, 0, 1)])
def test_labels_that_describe_no_picture_are_refused(labels):
    with pytest.raises(UserError, match="one of MEL, NV set"):
        phantom.draw(labels, np.random.default_rng(0))


def test_split_files_have_the_isic_columns_and_the_labels_of_their_images(world):
    for name, indices in (("train", range(41)), ("val", range(41, 47)), ("test", range(47, 52))):
        path = world / "splits" / f"phantom_{name}.csv"
        assert path.read_text().splitlines()[0] == ISIC_COLUMNS
        rows = read(path)
        assert [row["image"] for row in rows] == [f"PHANTOM_{index:07d}" for index in indices]
        for row, index in zip(rows, indices, strict=True):
            labels = phantom.sample_labels(np.random.default_rng((3, index)))
            assert tuple(int(float(row[name])) for name in LABELS) == labels
            assert (row["MEL"], row["NV"]) in {("0.0", "1.0"), ("1.0", "0.0")}
            assert row["label"] == str(labels[4])
            assert {row[name] for name in ("dark_corner", "gel_border", "patches", "vasc")} == {"0"}


def test_train_a_and_b_are_disjoint_halves_of_train(world):
    train, a, b = (
        {row["image"] for row in read(world / "splits" / f"phantom_{n}.csv")} for n in ("train", "train_a", "train_b")
    )
    assert a | b == train and not a & b
    assert (len(a), len(b)) == (21, 20)


def test_the_isic_loader_reads_the_world(world):
    rows, paths, missing = load_split(world / "splits" / "phantom_test.csv", world / "images")
    assert len(rows) == len(paths) == 5 and missing == 0
    index = 47
    rng = np.random.default_rng((3, index))
    expected = phantom.draw(phantom.sample_labels(rng), rng).astype(float)
    stored = np.asarray(Image.open(paths[0]).convert("RGB"), float)
    assert np.abs(stored - expected).mean() < 2  # JPEG at quality 95


def test_an_image_does_not_depend_on_how_many_there_are(world, tmp_path):
    phantom.write_world(tmp_path / "small", 3, 1, 0, seed=3)
    for path in (tmp_path / "small" / "images").iterdir():
        assert path.read_bytes() == (world / "images" / path.name).read_bytes()


def test_a_complete_world_is_left_alone_and_an_interrupted_one_is_finished(tmp_path, monkeypatch):
    folder = tmp_path / "world"
    real_draw, calls = phantom.draw, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real_draw(*arguments)

    monkeypatch.setattr(phantom, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        phantom.write_world(folder, 4, 1, 1, seed=1)
    assert not (folder / "splits").exists()
    phantom.write_world(folder, 4, 1, 1, seed=1)
    assert len(calls) == 4 + 3  # three were drawn before the interruption and are not drawn again
    finished = contents(folder)
    phantom.write_world(folder, 4, 1, 1, seed=1)
    assert len(calls) == 4 + 3 and contents(folder) == finished

    monkeypatch.undo()
    phantom.write_world(tmp_path / "straight", 4, 1, 1, seed=1)
    assert contents(tmp_path / "straight") == finished


@pytest.mark.parametrize(
    "other", [{"seed": 4}, {"num_train": 42}, {"num_val": 7}, {"size": 32}, {"balanced": True}, {"unseen": True}]
)
def test_another_world_is_not_overwritten(world, other):
    before = contents(world)
    with pytest.raises(UserError, match="already holds"):
        phantom.write_world(world, **({"num_train": 41, "num_val": 6, "num_test": 5, "seed": 3} | other))
    assert contents(world) == before


def test_a_folder_of_other_images_is_refused(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "ISIC_0000000.jpg").write_bytes(b"somebody's")
    before = contents(tmp_path)
    with pytest.raises(UserError, match="already holds other images"):
        phantom.write_world(tmp_path, 2, 1, 1, seed=0)
    assert contents(tmp_path) == before


def test_impossible_numbers_are_refused(tmp_path):
    with pytest.raises(UserError, match=">= 0"):
        phantom.write_world(tmp_path / "new", -1, 1, 1, seed=0)
    assert not (tmp_path / "new").exists()


def test_command_line_writes_a_world_and_reports_user_errors(tmp_path, capsys, caplog):
    arguments = ["--out", str(tmp_path), "--num_train", "4", "--num_val", "2", "--num_test", "1", "--seed", "7"]
    arguments += ["--balanced"]
    with caplog.at_level(logging.INFO):
        phantom.main(arguments)
    assert "7 of 7 phantom images" in caplog.text
    assert len(list((tmp_path / "images").iterdir())) == 7
    assert '"balanced": true' in (tmp_path / "world.json").read_text()
    with pytest.raises(SystemExit) as refused:
        phantom.main(["--out", str(tmp_path), "--seed", "8"])
    assert refused.value.code == 2 and "already holds" in capsys.readouterr().err
