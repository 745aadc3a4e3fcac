"""Expert ratings: the table and its faults, means over raters, agreement, splits by patient."""

import itertools

import numpy as np
import pytest
import torch
from refusals import refused
from script_tools import save_pictures
from torchmetrics.functional.classification import multiclass_cohen_kappa

from ddpo_pytorch.data import ratings

HEADER = ",".join(ratings.COLUMNS) + "\n"


@pytest.fixture
def folder(tmp_path):
    save_pictures(tmp_path, *(f"{number}.png" for number in range(1, 7)))
    return tmp_path


def table(folder, lines, header=HEADER):
    path = folder / "ratings.csv"
    path.write_text(header + "\n".join([*lines, ""]))
    return path


def test_tables_with_all_and_with_the_least_columns(folder):
    header = "\ufeffImage_Path, Rating, Modal, Expert_Level, Prompt, Rater_ID, Quality, Alignment, patient\n"
    lines = ["1.png, 3, Fundus, 2, Fundus: drusen, and dust, anna, 2, , P1", './2.png,1,fundus,3,"normal",bob,1,3,P2']
    first, second = ratings.read_ratings(table(folder, lines, header))
    assert first == ratings.Rating(
        *("1.png", 3.0, 2.0, "Fundus: drusen, and dust", "anna", "P1", folder / "1.png", {"quality": 2.0})
    )
    assert (second.image, second.prompt, second.apart["alignment"]) == ("2.png", "Fundus: normal", 3.0)
    (one, two) = ratings.aggregate([first, second])
    assert (one.quality, one.alignment, one.reward("quality"), one.reward("alignment")) == (2, 3, 0.5, 1)
    assert (two.quality, two.alignment, two.weight) == (1, 3, 1)
    (row,) = ratings.read_ratings(table(folder, ["1.png,2,normal"], "image_path,rating,prompt\n"))
    assert (row.expert_level, row.rater_id, row.patient) == (3, "", "1")


def test_criteria_are_averaged_over_the_raters_who_gave_them(folder):
    header = "image_path,rating,prompt,expert_level,rater_id,disc,Artifacts\n"
    rows = ratings.read_ratings(table(folder, ["1.png,2,x,3,a,3,", "1.png,2,x,1,b,1,2", "2.png,1,x,3,a,,"], header))
    one, two = ratings.aggregate(rows)
    assert (one.criteria, two.criteria) == ({"disc": 2.5, "artifacts": 2.0}, {}) and one.reward("disc") == 0.75
    assert np.isnan(two.reward("disc")) and np.isnan(one.reward("vessels"))
    refused("disc is '4'", ratings.read_ratings, table(folder, ["1.png,2,x,3,a,4,1"], header))


@pytest.fixture
def tree(tmp_path):
    """base/ratings/ratings.csv beside base/samples and base/data; a file outside of base."""
    save_pictures(tmp_path, "base/samples/SD/1.png", "base/data/1.png", "base/ratings/images/1.png", "secret/1.png")
    return tmp_path


def test_a_table_names_images_of_other_folders_that_are_allowed(tree, monkeypatch):
    names = ["../samples/SD/1.png", "../data/1.png", "images/1.png", f"{tree}/base/data/../samples/SD/1.png"]
    lines = [f"{name},2,Fundus,3,normal {number},a" for number, name in enumerate(names)]
    path, places = table(tree / "base/ratings", lines), ["samples/SD/1.png", "data/1.png", "ratings/images/1.png"]
    rows = ratings.read_ratings(path, within=tree / "base")
    assert [row.image for row in rows] == [*names[:3], names[0]]
    assert [row.path for row in rows] == [tree / "base" / place for place in (*places, places[0])]
    assert [image.path for image in ratings.aggregate(rows)] == [row.path for row in rows]
    refused("line 2: path.* leads out .*rlhf.data_path.*; line 3.*; line 5", ratings.read_ratings, path)
    folders = {"root": tree / "base/data", "within": tree / "base/samples"}
    refused("line 4: image 'images/1.png'", ratings.read_ratings, path, **folders)
    table(tree / "base/ratings", lines[:3])  # as the message says; and all of it moved, behind a link
    (tree / "base").rename(tree / "moved")
    (tree / "moved/ratings").rename(tree / "elsewhere")
    (tree / "moved/ratings").symlink_to(tree / "elsewhere")
    monkeypatch.chdir(tree)
    for folders in ({"root": "moved"}, {"within": "moved"}):
        found = ratings.read_ratings("moved/ratings/ratings.csv", **folders)
        assert [str(row.path) for row in found] == [f"moved/{place}" for place in places]


@pytest.mark.parametrize(
    "name",
    ["../../secret/1.png", "{tree}/secret/1.png", "../data/../../secret/1.png", "..\\..\\secret\\1.png", ".."]
    + ["/etc/hostname", "C:\\1.png", "//host/1.png", "../../basement/1.png"],
)
def test_a_table_points_to_no_file_elsewhere(tree, name):
    save_pictures(tree, "basement/1.png")
    path = table(tree / "base/ratings", [f"images/1.png,2,Fundus,3,x,a\n{name.format(tree=tree)},2,Fundus,3,x,a"])
    for folders in ({}, {"within": tree / "base"}, {"root": tree / "base"}, {"root": tree / "base/data"}):
        refused("line 3: ", ratings.read_ratings, path, **folders)


def test_generated_images_have_no_patient_and_other_modalities_their_own_prefix(folder):
    """Two captions' 00000.png are two patients; photographs of one name without the eye are one."""
    lines = ["1.png,3,OCT,3,drusen,a", "2.png,3,oct,3,OCT: drusen,a", "3.png,2,,3,OCT: scar,a"]
    for place in ("made/images/x/00000.png", "made/images/y/00000.png", "a/7_left.png", "b/7_right.png"):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).hardlink_to(folder / "1.png")
        lines.append(f"{place},3,OCT,3,drusen,a")
    (folder / "made/image_log.json").write_text("[]")
    rows = ratings.read_ratings(table(folder, lines))
    assert [row.prompt for row in rows[:3]] == ["OCT: drusen", "OCT: drusen", "OCT: scar"]
    assert [row.patient for row in rows[3:]] == ["made/images/x/00000.png", "made/images/y/00000.png", "7", "7"]


GOOD, LEAST = "1.png,3,Fundus,3,normal,a", "image_path,rating,prompt,quality,patient\n"


@pytest.mark.parametrize(
    ("header", "lines", "message"),
    [
        (HEADER, ["1.png,3.01,Fundus,3,normal,a"], "line 2: rating is '3.01'"),
        (HEADER, ["1.png,3,Fundus,0,normal,a"], "line 2: expert_level is '0'.*1 to 3"),
        (HEADER, ["1.png,3,Fundus,3,,a"], "line 2: the caption is empty"),
        (HEADER, [GOOD, "2.png,3,OCT,3,normal,a"], "line 3: modality is 'OCT'"),
        (HEADER, [",3,Fundus,3,normal,a"], "line 2: the path of the image is empty"),
        (HEADER, [GOOD, "2.png,3,Fundus,3,x,y,an expert"], "line 3: .*7 cells"),  # fundus tables resolve such commas
        (HEADER, [GOOD, "./1.png,2,Fundus,3,Fundus: normal,a"], "line 3: rater 'a'.*'1.png'.*line 2"),
        (HEADER, ["1.png,9,Fundus,9,normal,a", "9.png,2,Fundus,3,normal,a"],
         r"line 2: expert_level is '9'.*; line 2: rating is '9'.*; line 3: image '9.png'"),
        (HEADER, [], "ratings.csv.*no rows"),
        (LEAST, ["1.png,3,normal,4,"], "line 2: quality is '4'"),
        (LEAST, ["1.png,3,normal,,A", "1.png,3,drusen,,B"], "line 3: image '1.png'.*'B'.*line 2.*'A'"),
    ],
)  # fmt: skip
def test_faults_are_reported_by_line(folder, header, lines, message):
    refused(message, ratings.read_ratings, table(folder, lines, header))


def test_mean_over_raters_is_weighted_by_level_which_changes_no_rating(folder):
    lines = ["1.png,3,Fundus,1,normal,a", "1.png,1,Fundus,3,normal,b", "1.png,3,Fundus,1,drusen,a"]
    lines += ["2.png,1,Fundus,2,normal,", "2.png,2,Fundus,2,normal,", "2.png,3,Fundus,2,normal,"]
    images = ratings.aggregate(ratings.read_ratings(table(folder, lines)))
    keys = [("1.png", "Fundus: normal"), ("1.png", "Fundus: drusen"), ("2.png", "Fundus: normal")]
    assert [(image.image, image.prompt) for image in images] == keys
    assert [image.quality for image in images] == [1.5, 3, 2]  # (1 * 3 + 3 * 1) / 4; level 1's rating of 3 stays 3
    assert [image.weight for image in images] == pytest.approx([2 / 3, 1 / 3, 2 / 3])


def test_division_by_patient():
    images = [ratings.RatedImage(f"{n}.png", None, "Fundus: x", 1 + n % 3, 3.0, 1.0, str(n // 3)) for n in range(90)]
    train, val = ratings.split_by_patient(images, 0.2, seed=0)
    assert {image.patient for image in train}.isdisjoint(image.patient for image in val)
    assert (len(train), len(val)) == (72, 18) and sorted(train + val, key=images.index) == images
    assert ratings.split_by_patient(images[::-1], 0.2, seed=0)[1] == val[::-1]
    assert ratings.split_by_patient(images, 0.2, seed=1)[1] != val
    for some, share, message in ((images, 1, "validation share"), (images[:3], 0.2, "1 patient")):
        refused(message, ratings.split_by_patient, some, share, seed=0)


def test_alpha_of_the_published_example_and_by_all_pairs():
    """Another way to the same number: mean distances of pairs within units and of all pairs, ranks by counting."""
    # the reliability data of Krippendorff's "Computing Krippendorff's Alpha-Reliability" (2011), section E: of four
    # observers the values of twelve units, 0 where one is silent; its ordinal alpha is given as 0.815
    observers = "123321412000", "123322412503", "033323422510", "123324412510"
    published = [[int(value) for value in unit if value != "0"] for unit in zip(*observers, strict=True)]
    assert ratings.ordinal_alpha(published) == pytest.approx(0.815, abs=0.0005)
    kept = [unit for unit in published if len(unit) > 1]
    pool = [value for unit in kept for value in unit]

    def distance(one, other):
        low, high = sorted((one, other))
        between = sum(low <= value <= high for value in pool)
        return (between - (pool.count(low) + pool.count(high)) / 2) ** 2

    pairs = [distance(a, b) / (len(unit) - 1) for unit in kept for a, b in itertools.permutations(unit, 2)]
    expected = np.mean([distance(a, b) for a, b in itertools.permutations(pool, 2)])
    assert ratings.ordinal_alpha(published) == pytest.approx(1 - sum(pairs) / len(pool) / expected, rel=1e-12)
    assert ratings.ordinal_alpha([[1, 1], [2, 2], [3, 3, 3]]) == pytest.approx(1)
    assert ratings.ordinal_alpha([[1], [2]]) is None and ratings.ordinal_alpha([[2, 2], [2, 2]]) is None


def test_fleiss_kappa_of_the_published_example():
    """Fleiss 1971 as in its usual worked table: 10 subjects, 14 raters, 5 categories, kappa 0.210."""
    counts = """0 0 0 0 14|0 2 6 4 2|0 0 3 5 6|0 3 9 2 0|2 2 8 1 1|7 7 0 0 0|3 2 6 3 0|2 5 3 2 2|6 5 2 1 0|0 2 2 3 7"""
    units = [np.repeat(range(5), np.array(row.split(), int)).tolist() for row in counts.split("|")]
    assert ratings.fleiss_kappa(units) == pytest.approx(0.210, abs=0.0005)
    assert ratings.fleiss_kappa([[1, 1], [3, 3]]) == 1 and ratings.fleiss_kappa([[1, 1], [1, 1]]) is None


def test_agreement_of_a_table(folder):
    marks = {"a": "112233", "b": "113223", "c": "332211"}
    lines = [f"{i}.png,{m},Fundus,3,normal,{name}" for name, row in marks.items() for i, m in enumerate(row, 1)]
    rows = ratings.read_ratings(table(folder, [*lines, "1.png,1,Fundus,3,drusen,d"]))
    values = [torch.tensor([int(mark) - 1 for mark in row]) for row in marks.values()]
    pairs = itertools.combinations(values, 2)
    kappa = np.mean([float(multiclass_cohen_kappa(*pair, 3, weights="quadratic")) for pair in pairs])
    expected = {"kappa": kappa, "alpha": ratings.ordinal_alpha((torch.stack(values).T + 1).tolist())}
    expected |= {"images": 6, "pairs": 18, "raters": 4, "rater_pairs": 3}
    assert ratings.agreement(rows) == pytest.approx(expected, rel=1e-6)
    alone = ratings.agreement([row for row in rows if row.rater_id == "a"])
    assert (alone["alpha"], alone["kappa"], alone["pairs"]) == (None, None, 0)
