"""Expert ratings: the table and its faults, means over raters, agreement, splits by patient."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.functional.classification import multiclass_cohen_kappa

from ddpo_pytorch.data import ratings
from ddpo_pytorch.utils.errors import UserError

HEADER = ",".join(ratings.COLUMNS) + "\n"
# the reliability data of Krippendorff's "Computing Krippendorff's Alpha-Reliability" (2011), section E: observers by
# units, 0 where an observer is silent; its ordinal alpha is given as 0.815.
OBSERVERS = """
1 2 3 3 2 1 4 1 2 0 0 0
1 2 3 3 2 2 4 1 2 5 0 3
0 3 3 3 2 3 4 2 2 5 1 0
1 2 3 3 2 4 4 1 2 5 1 0
"""


@pytest.fixture
def folder(tmp_path):
    for number in range(1, 7):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{number}.png")
    return tmp_path


def table(folder, lines, header=HEADER):
    path = folder / "ratings.csv"
    path.write_text(header + "\n".join([*lines, ""]))
    return path


def test_a_table_with_all_columns(folder):
    header = "\ufeffImage_Path, Rating, Modal, Expert_Level, Prompt, Rater_ID, Quality, Alignment, patient\n"
    lines = ["1.png, 3, Fundus, 2, Fundus: drusen, and dust, anna, 2, , P1", './2.png,1,fundus,3,"normal",bob,1,3,P2']
    first, second = ratings.read_ratings(table(folder, lines, header))
    assert first == ratings.Rating(
        *("1.png", 3.0, "Fundus", 2.0, "Fundus: drusen, and dust", "anna", 2.0, None, "P1", 2, folder / "1.png")
    )
    assert (second.image, second.prompt, second.alignment, second.line) == ("2.png", "Fundus: normal", 3.0, 3)
    (one, two) = ratings.aggregate([first, second])
    assert (one.quality, one.alignment, one.reward("quality"), one.reward("alignment")) == (2, 3, 0.5, 1)
    assert (two.quality, two.alignment, two.weight, two.ratings) == (1, 3, 1, 1)


def test_a_table_with_the_least_columns(folder):
    (row,) = ratings.read_ratings(table(folder, ["1.png,2,normal"], "image_path,rating,prompt\n"))
    assert (row.modality, row.expert_level, row.rater_id, row.patient) == ("Fundus", 3, "", "1")


def test_paths_start_from_the_root(folder):
    path = table(folder / "..", [f"{folder}/1.png,2,Fundus,3,normal,a", "2.png,3,Fundus,3,normal,a"])
    rows = ratings.read_ratings(path, folder)
    assert [(row.image, row.path) for row in rows] == [("1.png", folder / "1.png"), ("2.png", folder / "2.png")]
    assert [image.path for image in ratings.aggregate(rows, "moved")] == [
        ratings.Path("moved/1.png"),
        ratings.Path("moved/2.png"),
    ]
    with pytest.raises(UserError, match=r"line 3: image '2.png'"):
        ratings.read_ratings(path)  # from the table's folder, in which the absolute path of line 2 lies
    with pytest.raises(UserError, match=r"line 2: path '../1.png' leads out .*; line 3: .*'2.png'"):
        ratings.read_ratings(path, folder / "inner")
    path.unlink()


@pytest.fixture
def tree(tmp_path):
    """base/ratings/ratings.csv beside base/samples and base/data; a file outside of base."""
    for path in ("base/samples/SD/1.png", "base/data/1.png", "base/ratings/images/1.png", "secret/1.png"):
        (tmp_path / path).parent.mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / path)
    return tmp_path


def test_a_table_names_images_of_other_folders_that_are_allowed(tree):
    names = ["../samples/SD/1.png", "../data/1.png", "images/1.png", f"{tree}/base/data/../samples/SD/1.png"]
    lines = [f"{name},2,Fundus,3,normal {number},a" for number, name in enumerate(names)]
    path = table(tree / "base/ratings", lines)
    rows = ratings.read_ratings(path, within=tree / "base")
    assert [(row.image, row.path) for row in rows] == [
        (n, (tree / "base/ratings" / n).resolve()) for n in names[:3]
    ] + [(names[0], tree / "base/samples/SD/1.png")]
    assert [image.path for image in ratings.aggregate(rows)] == [row.path for row in rows]
    with pytest.raises(UserError) as error:
        ratings.read_ratings(path)
    assert all(word in str(error.value) for word in ("line 2", "line 3", "line 5", "rlhf.data_path"))
    path = table(tree / "base/ratings", lines[:3])  # as the message says; and all of it moved
    (tree / "base").rename(tree / "moved")
    path = tree / "moved/ratings/ratings.csv"
    for folders in ({"root": tree / "moved"}, {"within": tree / "moved"}):
        assert [row.path for row in ratings.read_ratings(path, **folders)] == [
            tree / "moved" / name for name in ("samples/SD/1.png", "data/1.png", "ratings/images/1.png")
        ]


def test_relative_folders_and_links_to_folders(tree, monkeypatch):
    (tree / "base/ratings").rename(tree / "elsewhere")
    (tree / "base/ratings").symlink_to(tree / "elsewhere")
    table(tree / "base/ratings", ["../data/1.png,2,Fundus,3,normal,a"])
    monkeypatch.chdir(tree)
    (row,) = ratings.read_ratings("base/ratings/ratings.csv", within="base")
    assert str(row.path) == "base/data/1.png" and row.image == "../data/1.png"


@pytest.mark.parametrize(
    "name",
    ["../../secret/1.png", "{tree}/secret/1.png", "../data/../../secret/1.png", "..\\..\\secret\\1.png", ".."]
    + ["/etc/hostname", "../../../../../../../../etc/hostname", "C:\\1.png", "//host/1.png", "../../basement/1.png"],
)
def test_a_table_points_to_no_file_elsewhere(tree, name):
    (tree / "basement").mkdir()
    Image.new("RGB", (4, 4)).save(tree / "basement/1.png")
    path = table(tree / "base/ratings", [f"images/1.png,2,Fundus,3,x,a\n{name.format(tree=tree)},2,Fundus,3,x,a"])
    for folders in ({}, {"within": tree / "base"}, {"root": tree / "base"}, {"root": tree / "base/data"}):
        with pytest.raises(UserError) as error:
            ratings.read_ratings(path, **folders)
        assert "line 3: " in str(error.value)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["1.png,0,Fundus,3,normal,a"], "line 2: rating is '0'.*1 to 3"),
        *(([f"1.png,{text},Fundus,3,normal,a"], f"line 2: rating is '{text}'") for text in ("3.01", "good", "", "nan")),
        (["1.png,3,Fundus,0,normal,a"], "line 2: expert_level is '0'.*1 to 3"),
        (["1.png,3,Fundus,,normal,a"], "line 2: expert_level is ''"),
        (["1.png,3,Fundus,3,,a"], "line 2: the caption is empty"),
        (["1.png,3,OCT,3,normal,a"], "line 2: modality is 'OCT'"),
        ([",3,Fundus,3,normal,a"], "line 2: the path of the image is empty"),
        (["9.png,3,Fundus,3,normal,a"], "line 2: image '9.png'"),
        (["../x/1.png,3,Fundus,3,normal,a"], "line 2: path '../x/1.png' leads out"),
        (["/etc/1.png,3,Fundus,3,normal,a"], "line 2: path '.*etc/1.png' leads out"),
        (["1.png,3,Fundus,3"], "line 2: .*4 cells"),
        (["1.png,3,Fundus,3,normal,a", "2.png,3,Fundus,3,x,y,an expert"], "line 3: .*7 cells"),
        (
            ["1.png,3,Fundus,3,normal,a", "2.png,2,Fundus,3,normal,a", "./1.png,2,Fundus,3,Fundus: normal,a"],
            "line 4: rater 'a'.*'1.png'.*line 2",
        ),
        (
            ["1.png,9,Fundus,9,normal,a", "2.png,2,Fundus,3,normal,a", "9.png,2,Fundus,3,normal,a"],
            r"line 2: expert_level is '9'.*; line 2: rating is '9'.*; line 4: image '9.png'",
        ),
        ([], "ratings.csv.*no rows"),
    ],
)
def test_faults_are_reported_by_line(folder, lines, message):
    with pytest.raises(UserError, match=message) as error:
        ratings.read_ratings(table(folder, lines))
    assert "\n" not in str(error.value)


def test_faults_of_optional_columns(folder):
    header = "image_path,rating,prompt,quality,patient\n"
    with pytest.raises(UserError, match="line 2: quality is '4'"):
        ratings.read_ratings(table(folder, ["1.png,3,normal,4,"], header))
    with pytest.raises(UserError, match="line 3: image '1.png'.*'B'.*line 2.*'A'"):
        ratings.read_ratings(table(folder, ["1.png,3,normal,,A", "1.png,3,drusen,,B"], header))
    with pytest.raises(UserError, match="rating, prompt"):
        ratings.read_ratings(table(folder, [], "image_path,Text\n"))
    with pytest.raises(UserError, match="none.csv"):
        ratings.read_ratings(folder / "none.csv")


def test_mean_over_raters_is_weighted_by_level_which_changes_no_rating(folder):
    lines = ["1.png,3,Fundus,1,normal,a", "1.png,1,Fundus,3,normal,b", "1.png,3,Fundus,1,drusen,a"]
    lines += ["2.png,1,Fundus,2,normal,", "2.png,2,Fundus,2,normal,", "2.png,3,Fundus,2,normal,"]
    images = ratings.aggregate(ratings.read_ratings(table(folder, lines)))
    assert [(image.image, image.prompt) for image in images] == [
        ("1.png", "Fundus: normal"),
        ("1.png", "Fundus: drusen"),
        ("2.png", "Fundus: normal"),
    ]
    assert [image.quality for image in images] == [1.5, 3, 2]  # (1 * 3 + 3 * 1) / 4; level 1's rating of 3 stays 3
    assert [image.weight for image in images] == pytest.approx([2 / 3, 1 / 3, 2 / 3])
    assert [image.ratings for image in images] == [2, 1, 3]
    assert [image.reward("quality") for image in images] == [0.25, 1, 0.5]


def rated(*qualities, patients=None):
    return [
        ratings.RatedImage(f"{i}.png", ratings.Path(f"{i}.png"), "Fundus: x", q, 3.0, 1.0, p, 1)
        for i, (q, p) in enumerate(zip(qualities, patients or map(str, range(len(qualities))), strict=True))
    ]


def test_absent_classes():
    assert ratings.check_classes(rated(1, 2, 3)) == ""
    assert ratings.check_classes(rated(1.4, 1.5, 2.5)) == ""
    assert "rated 1 (quality; there are 2 of 2, 1 of 3)" in ratings.check_classes(rated(2, 2, 3))
    assert "no image is rated 2" in ratings.check_classes(rated(1, 3))
    with pytest.raises(UserError, match="2 images are rated 2 .*quality"):
        ratings.check_classes(rated(2, 1.5))
    with pytest.raises(UserError, match="3 images are rated 3 .*alignment"):
        ratings.check_classes(rated(1, 2, 3), "alignment")


def test_division_by_patient():
    patients = [str(number // 3) for number in range(90)]
    images = rated(*([1, 2, 3] * 30), patients=patients)
    train, val = ratings.split_by_patient(images, 0.2, seed=0)
    assert {image.patient for image in train}.isdisjoint(image.patient for image in val)
    assert (len(train), len(val)) == (72, 18) and sorted(train + val, key=images.index) == images
    assert ratings.split_by_patient(images[::-1], 0.2, seed=0)[1] == val[::-1]
    assert ratings.split_by_patient(images, 0.2, seed=1)[1] != val
    for share in (0, 1, float("nan")):
        with pytest.raises(UserError, match="validation share"):
            ratings.split_by_patient(images, share, seed=0)
    with pytest.raises(UserError, match="1 patient"):
        ratings.split_by_patient(images[:3], 0.2, seed=0)


def test_alpha_of_the_published_example():
    observers = np.array([line.split() for line in OBSERVERS.split("\n") if line], int)
    units = [[value for value in unit if value] for unit in observers.T]
    assert ratings.ordinal_alpha(units) == pytest.approx(0.815, abs=0.0005)


def test_alpha_equals_the_disagreement_of_all_pairs():
    """Another way to the same number: mean distances of pairs within units and of all pairs, ranks by counting."""
    rng = np.random.default_rng(3)
    units = [rng.choice([1, 2, 3], size=size, p=[0.2, 0.3, 0.5]).tolist() for size in rng.integers(1, 5, 40)]
    kept = [unit for unit in units if len(unit) > 1]
    pool = [value for unit in kept for value in unit]

    def distance(one, other):
        low, high = sorted((one, other))
        between = sum(low <= value <= high for value in pool)
        return (between - (pool.count(low) + pool.count(high)) / 2) ** 2

    observed = sum(distance(a, b) / (len(unit) - 1) for unit in kept for a, b in itertools.permutations(unit, 2)) / len(
        pool
    )
    expected = np.mean([distance(a, b) for a, b in itertools.permutations(pool, 2)])
    assert ratings.ordinal_alpha(units) == pytest.approx(1 - observed / expected, rel=1e-12)
    assert ratings.ordinal_alpha([[1, 1], [2, 2], [3, 3, 3]]) == pytest.approx(1)
    assert ratings.ordinal_alpha([[1], [2]]) is None and ratings.ordinal_alpha([[2, 2], [2, 2]]) is None


def test_kappa_equals_torchmetrics():
    rng = np.random.default_rng(5)
    first = rng.integers(1, 4, 50)
    second = np.clip(first + rng.integers(-1, 2, 50), 1, 3)
    expected = multiclass_cohen_kappa(torch.tensor(first - 1), torch.tensor(second - 1), 3, weights="quadratic")
    assert ratings.quadratic_kappa(first, second) == pytest.approx(float(expected), rel=1e-6)
    assert ratings.quadratic_kappa([2, 2], [2, 2]) is None


def test_agreement_of_a_table(folder):
    marks = {"a": "112233", "b": "112233", "c": "332211"}
    lines = [f"{i}.png,{m},Fundus,3,normal,{name}" for name, row in marks.items() for i, m in enumerate(row, 1)]
    rows = ratings.read_ratings(table(folder, [*lines, "1.png,1,Fundus,3,drusen,d"]))
    found = ratings.agreement(rows)
    assert found["kappa"] == pytest.approx((1 - 1 - 1) / 3)  # a with b agrees, c with both is the reverse
    assert found["alpha"] == pytest.approx(
        ratings.ordinal_alpha([[1, 1, 3], [1, 1, 3], [2, 2, 2], [2, 2, 2], [3, 3, 1], [3, 3, 1]])
    )
    assert {key: found[key] for key in ("images", "pairs", "raters", "rater_pairs")} == {
        "images": 6,
        "pairs": 18,
        "raters": 4,
        "rater_pairs": 3,
    }
    alone = ratings.agreement([row for row in rows if row.rater_id == "a"])
    assert alone["alpha"] is None and alone["kappa"] is None and alone["pairs"] == 0
