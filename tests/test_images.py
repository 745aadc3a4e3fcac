"""Images: as squares, fields of view, the cache of decoded ones, and the files that tables name."""

import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from ddpo_pytorch.data import fundus, isic, splits
from ddpo_pytorch.data.images import (
    DecodedImages,
    ImageFiles,
    decoded,
    find_images,
    fov_mask,
    fov_square,
    load_image,
    loader_options,
)
from ddpo_pytorch.utils.errors import UserError


@pytest.fixture
def files(tmp_path) -> ImageFiles:
    rng, paths = np.random.default_rng(0), []
    for number, shape in enumerate([(40, 60, 3), (33, 33, 3), (50, 20, 3), (24, 24, 3), (64, 48, 3)]):
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(paths[-1])
    return ImageFiles(paths, torch.arange(5), 24)


def test_the_cache_holds_the_decoded_images(files, tmp_path):
    files.resize = "pad"
    cached = decoded(files, tmp_path / "cache")
    assert isinstance(cached, DecodedImages) and torch.equal(cached.targets, files.targets)
    (path,) = (tmp_path / "cache").iterdir()  # without temporary files
    written = path.stat().st_mtime_ns
    again = decoded(files, tmp_path / "cache")
    assert again.path == path and path.stat().st_mtime_ns == written
    cached[0]  # mapped in this process; workers map it again
    for source in (files, cached):
        batches = list(DataLoader(source, 2, shuffle=False, **loader_options(2)))
        assert torch.equal(torch.cat([targets for _, targets in batches]), torch.arange(5))
        assert torch.equal(torch.cat([images for images, _ in batches]), torch.stack([files[i][0] for i in range(5)]))


def test_another_size_resize_file_or_reader_gets_another_cache(files, tmp_path, monkeypatch):
    paths = {decoded(files, tmp_path / "cache").path}
    for changes in ({"size": 16}, {"resize": "crop"}, {"paths": files.paths[:4]}):
        other = ImageFiles(files.paths, files.targets, files.size)
        other.__dict__.update(changes)
        paths.add(decoded(other, tmp_path / "cache").path)
    os.utime(files.paths[0], ns=(1, 1))
    paths.add(decoded(files, tmp_path / "cache").path)
    monkeypatch.setattr("ddpo_pytorch.data.images.READER_VERSION", 1)
    paths.add(decoded(files, tmp_path / "cache").path)
    assert len(paths) == 6


def test_without_a_writable_cache_images_are_decoded_on_every_access(files, tmp_path, monkeypatch, caplog):
    def full(file, header):
        raise OSError(28, "No space left on device")

    assert decoded(files, "") is files
    assert decoded(files, files.paths[0] / "below a file") is files and "Not a directory" in caplog.text
    with monkeypatch.context() as patch:
        patch.setattr(np.lib.format, "write_array_header_1_0", full)
        assert decoded(files, tmp_path / "cache") is files and "No space left" in caplog.text
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
        assert decoded(files, tmp_path / "cache") is files and "no room" in caplog.text
    assert not list((tmp_path / "cache").iterdir())


def test_damage_is_reported_and_leaves_no_cache(files, tmp_path):
    cached = decoded(files, tmp_path / "cache")
    cached.path.write_bytes(cached.path.read_bytes()[:100])
    with pytest.raises(UserError, match="is shorter than its 5 images"):
        decoded(files, tmp_path / "cache")
    files.paths[3].write_bytes(files.paths[3].read_bytes()[:80])
    with pytest.raises(UserError, match="3.png' cannot be read as an image"):
        decoded(files, tmp_path / "other")
    assert not list((tmp_path / "other").iterdir())


def test_crop_and_pad_keep_proportions(tmp_path):
    picture = np.zeros((20, 60, 3), np.uint8)
    picture[:, 20:40] = 255  # the middle third is a white square
    Image.fromarray(picture).save(tmp_path / "wide.png")
    assert load_image(tmp_path / "wide.png", 20, "crop").min() == 1
    padded = load_image(tmp_path / "wide.png", 60, "pad")
    assert padded[:, 20:40, 20:40].min() == 1 and padded.sum() == 3 * 20 * 20
    with pytest.raises(UserError, match="resize is 'squash'; allowed are stretch, crop, pad"):
        load_image(tmp_path / "wide.png", 20, "squash")


def disc(height, width, centre, radius, level=90):
    y, x = np.mgrid[:height, :width]
    inside = (x - centre[0]) ** 2 + (y - centre[1]) ** 2 <= radius**2
    noise = np.random.default_rng(0).integers(0, 11, (height, width, 3))  # of the camera, or JPEG
    return np.where(inside[..., None], np.array([level, level // 3, 5]) + noise, noise).astype(np.uint8), inside


@pytest.mark.parametrize(
    ("shape", "centre", "radius"), [((90, 140), (60, 45), 40), ((80, 140), (75, 40), 55), ((300, 200), (99, 160), 98)]
)
def test_mask_and_square_of_a_disc_off_centre_or_cut_off(shape, centre, radius, level=30):
    pixels, inside = disc(*shape, centre, radius, level)
    holed = pixels.copy()
    holed[centre[1] - 3 : centre[1] + 3, centre[0] - 9 : centre[0] + 9] = 0
    holed[1:4, -4:-1] = 255  # a letter in the corner
    assert np.array_equal(fov_mask(holed), inside)
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
    square = np.asarray(fov_square(Image.fromarray(pixels)))
    side = max(height, width)
    assert square.shape == (side, side, 3)
    top, left = (side - height) // 2, (side - width) // 2
    box = pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    assert np.array_equal(square[top : top + height, left : left + width], box)
    assert square.sum() == box.sum()  # black around it
    assert np.array_equal(np.asarray(fov_square(Image.fromarray(square))), square)


def test_a_dark_band_loses_no_part_of_the_field():
    pixels, inside = disc(100, 160, (80, 50), 45)
    pixels[:, 70:84] //= 20
    square = np.asarray(fov_square(Image.fromarray(pixels)))
    assert square.shape == (91, 91, 3)
    assert fov_mask(pixels).sum() < inside.sum() / 2  # the mask is the larger part


def test_pictures_without_a_surround_are_only_padded():
    full = np.random.default_rng(0).integers(40, 255, (20, 30, 3), np.uint8)
    for pixels, seen in ((full, True), (np.zeros_like(full), False)):
        square = np.asarray(fov_square(Image.fromarray(pixels)))
        assert square.shape == (30, 30, 3) and (fov_mask(pixels) == seen).all()
        assert np.array_equal(square[5:25], pixels) and not square[:5].any() and not square[25:].any()


# image files by the names of tables

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


@pytest.mark.parametrize("image", ["ISIC_7_downsampled", "isic_7", "ISIC_7.JPEG"])
@pytest.mark.parametrize("file", ["ISIC_7.jpg", "ISIC_7_downsampled.png", "Isic_7.Tif"])
def test_ids_of_isic_are_found_under_any_suffix_and_case(image, file, tmp_path):
    save(tmp_path, file, "ISIC_77.jpg")
    rows, paths, missing = isic.load_split(isic_table(tmp_path, image), tmp_path)
    assert (paths, missing, len(rows)) == ([tmp_path / file], 0, 1)


@pytest.mark.parametrize("path", ["IMAGES/1_LEFT.JPG", "images/1_left.jpeg"])
@pytest.mark.parametrize("file", ["images/1_left.JPG", "Images/1_Left.JPEG"])
def test_paths_of_fundus_tables_are_found_in_any_case(path, file, tmp_path):
    save(tmp_path, file, f"{file[:7]}1_right.jpg")
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
    assert find_images(tmp_path, ["a.jpg", "A"]) == [tmp_path / "a.jpg", tmp_path / "A.png"]
    assert find_images(tmp_path, ["b.jpg", "b.png"]) == [tmp_path / "b.jpg", None]
    assert find_images(tmp_path, ["c", "sub/a"]) == [None, None]
    (tmp_path / "c.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "sub.jpg").mkdir()
    assert find_images(tmp_path, ["c", "sub"]) == [None, None]


def test_missing_images_are_named_and_counted(tmp_path, caplog):
    names = [f"I{number:02d}" for number in range(20)]
    save(tmp_path, *(f"{name}.jpg" for name in names[8:]))
    for load, table in ((isic.load_split, isic_table), (fundus.load_split, fundus_table)):
        table = table(tmp_path, *(f"{name}.jpg" for name in names))
        rows, paths, missing = load(table, tmp_path)
        assert [row.number for row in rows] == list(range(8, 20)) and missing == 8
        assert paths == [tmp_path / f"{name}.jpg" for name in names[8:]]
        message = caplog.records[-1].getMessage()
        assert all(name in message for name in (*names[:5], table.name, "8 of 20")) and "I06" not in message
        assert [row.number for row in load(table, tmp_path, limit=2)[0]] == [8, 9]
        with pytest.raises(UserError, match="none of the 20 images .* the first would be .*cache/I00"):
            (tmp_path / "cache").mkdir(exist_ok=True)
            load(table, tmp_path / "cache")
        with pytest.raises(UserError, match="nowhere' does not exist"):
            load(table, tmp_path / "nowhere")
