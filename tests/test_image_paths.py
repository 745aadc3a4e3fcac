"""Image files by the names of tables: suffixes, case, ISIC's `_downsampled`, missing files, two files of one name."""

import pytest
from PIL import Image

from ddpo_pytorch.data import fundus, isic, splits
from ddpo_pytorch.data.images import find_images
from ddpo_pytorch.utils.errors import UserError

HEADER = "image,MEL,NV,hair,gel_bubble,ruler,ink\n"


def save(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / name, format="PNG")


def isic_table(folder, *names):
    (folder / "t.csv").write_text(HEADER + "".join(f"{name},1,0,0,0,0,0\n" for name in names))
    return folder / "t.csv"


def fundus_table(folder, *names):
    (folder / "f.csv").write_text("path,Text\n" + "".join(f"{name},A\n" for name in names))
    return folder / "f.csv"


@pytest.mark.parametrize("image", ["ISIC_7", "ISIC_7_downsampled", "isic_7", "ISIC_7.JPEG"])
@pytest.mark.parametrize("file", ["ISIC_7.jpg", "ISIC_7.JPEG", "ISIC_7.tif", "ISIC_7_downsampled.png", "Isic_7.Jpg"])
def test_ids_of_isic_are_found_under_any_suffix_and_case(image, file, tmp_path):
    save(tmp_path, file, "ISIC_77.jpg")
    rows, paths, missing = isic.load_split(isic_table(tmp_path, image), tmp_path)
    assert (paths, missing, len(rows)) == ([tmp_path / file], 0, 1)


@pytest.mark.parametrize("path", ["images/1_left.jpg", "IMAGES/1_LEFT.JPG", "images/1_left.jpeg"])
@pytest.mark.parametrize("file", ["images/1_left.jpg", "images/1_left.JPG", "Images/1_Left.JPEG"])
def test_paths_of_fundus_tables_are_found_in_any_case(path, file, tmp_path):
    save(tmp_path, file, "images/1_right.jpg")
    if file[0] == "I":
        (tmp_path / "images" / "1_right.jpg").unlink()
        (tmp_path / "images").rmdir()
    assert fundus.load_split(fundus_table(tmp_path, path), tmp_path)[1:] == ([tmp_path / file], 0)


@pytest.mark.parametrize(
    "twins", [("F.jpg", "F.png"), ("F.jpg", "F.JPG"), ("F.jpg", "F_downsampled.jpg"), ("F.jpg", "f.jpeg")]
)
def test_two_files_of_one_id_are_an_error_by_name(twins, tmp_path):
    save(tmp_path, *twins)
    table = isic_table(tmp_path, "F")
    for load in (isic.load_split, lambda path, folder: splits.check_images({"t": isic.read_split(path)}, folder)):
        with pytest.raises(UserError) as error:
            load(table, tmp_path)
        assert all(name in str(error.value) for name in twins)


def test_names_that_differ_by_case_or_suffix_alone_keep_their_own_files(tmp_path):
    save(tmp_path, "a.jpg", "A.png", "b.jpg")
    assert find_images(tmp_path, ["a", "A"]) == [tmp_path / "a.jpg", tmp_path / "A.png"]
    assert find_images(tmp_path, ["b.jpg", "b.png"]) == [tmp_path / "b.jpg", None]
    assert find_images(tmp_path, ["c", "sub/a"]) == [None, None]
    (tmp_path / "c.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "sub.jpg").mkdir()
    assert find_images(tmp_path, ["c", "sub"]) == [None, None]


@pytest.mark.parametrize("kind", ["isic", "fundus"])
def test_missing_images_are_named_and_counted(kind, tmp_path, caplog):
    names = [f"I{number:02d}" for number in range(20)]
    suffix = "" if kind == "isic" else ".jpg"
    save(tmp_path, *(f"{name}.jpg" for name in names[8:]))
    table = {"isic": isic_table, "fundus": fundus_table}[kind](tmp_path, *(name + suffix for name in names))
    load = {"isic": isic, "fundus": fundus}[kind].load_split
    rows, paths, missing = load(table, tmp_path)
    assert [row.number for row in rows] == list(range(8, 20)) and missing == 8
    assert paths == [tmp_path / f"{name}.jpg" for name in names[8:]]
    (record,) = caplog.records
    assert record.levelname == "WARNING" and {8, 20} <= {*record.args}
    assert all(name in record.getMessage() for name in (*names[:5], "t.csv" if kind == "isic" else "f.csv"))
    assert "I06" not in record.getMessage()
    (tmp_path / "other").mkdir()
    assert [row.number for row in load(table, tmp_path, limit=2)[0]] == [8, 9]
    with pytest.raises(UserError, match="none of the 20 images .* the first would be .*other/I00"):
        load(table, tmp_path / "other")
    with pytest.raises(UserError, match="nowhere' does not exist"):
        load(table, tmp_path / "nowhere")
    caplog.clear()
    for name in names[:8]:
        save(tmp_path, f"{name}.jpg")
    load(table, tmp_path)
    assert not caplog.records
