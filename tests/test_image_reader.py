"""Images: the one reader, which refuses what is ambiguous, squares, fields of view, a cache, and files of tables."""

import copy
import os
import shutil
import struct
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from refusals import refused
from script_tools import save_pictures
from torch.utils.data import DataLoader

from ddpo_pytorch.data import fundus, images, isic, splits
from ddpo_pytorch.data.datasets import find_rows
from ddpo_pytorch.data.images import decoded, find_damage, find_images, fov_mask, fov_square, is_intact, load_pixels
from ddpo_pytorch.data.sample_folder import write_log
from ddpo_pytorch.metrics.image_sets import any_files, inspect_files
from ddpo_pytorch.rating.session import sample_items
from ddpo_pytorch.utils.files import sha256

GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)
COLOUR = np.stack([GREY, GREY.T, 255 - GREY], axis=-1)
DEEP = np.random.default_rng(0).integers(0, 65536, (16, 16)).astype(np.uint16)
SCALED = np.floor(DEEP.astype(np.float64) / 257 + 0.5).astype(np.uint8)
OPAQUE, CLEAR = np.full((16, 16), 255, np.uint8), np.full((16, 16), 254, np.uint8)
CLEAR[1:] = 255


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def write_png(path, values: np.ndarray, colour: int, *chunks: bytes) -> None:
    """Write a PNG of 16 bits by its specification, from (H, W) or (H, W, C) values."""
    header = struct.pack(">IIBBBBB", values.shape[1], len(values), 16, colour, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row.astype(">u2").tobytes() for row in values))
    parts = [chunk(b"IHDR", header), *chunks, chunk(b"IDAT", data), chunk(b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def grey(levels):
    return np.stack([levels] * 3, axis=-1)


READ = {
    "rgb.png": (lambda p: Image.fromarray(COLOUR).save(p), COLOUR),
    "rgb.webp": (lambda p: Image.fromarray(COLOUR).save(p, lossless=True), COLOUR),
    "grey.png": (lambda p: Image.fromarray(GREY).save(p), grey(GREY)),
    "grey16.png": (lambda p: write_png(p, DEEP, 0), grey(SCALED)),
    "grey16.tif": (lambda p: Image.fromarray(DEEP).save(p), grey(SCALED)),
    "doubled16.png": (lambda p: write_png(p, GREY.astype(np.uint16) * 257, 0), grey(GREY)),
    "rgb16.png": (lambda p: write_png(p, COLOUR.astype(np.uint16) * 257, 2), COLOUR),
    "opaque.png": (lambda p: Image.fromarray(np.dstack([COLOUR, OPAQUE])).save(p), COLOUR),
    "palette.png": (lambda p: Image.fromarray(GREY).convert("P").save(p), grey(GREY)),
    "unused_key.png": (lambda p: Image.fromarray(GREY // 2).save(p, transparency=200), grey(GREY // 2)),
}


@pytest.mark.parametrize("name", READ)
def test_unambiguous_images_are_scaled(name, tmp_path):
    """Whatever the file is called, as in ISIC's folder."""
    write, expected = READ[name]
    write(tmp_path / name)
    for path in (tmp_path / name, shutil.copy(tmp_path / name, tmp_path / f"{name}.jpg")):
        assert np.array_equal(np.asarray(images.read_rgb(path)), expected)
        fundus.check_images([path])


def write_dicom(path, levels: np.ndarray, bits: int, kind: str = "MONOCHROME2", **tags) -> None:
    from pydicom import Dataset, uid

    image = Dataset()
    image.set_pixel_data(levels, kind, bits)
    for name, value in ({"SOPClassUID": uid.SecondaryCaptureImageStorage} | tags).items():
        setattr(image, name, value)
    image.save_as(path, enforce_file_format=True)


TWELVE, HOUNSFIELD = DEEP // 16, (DEEP // 16).astype(np.int16) - 1024
WINDOW = {"WindowCenter": 40, "WindowWidth": 400}  # C.11.2.1.2.1: black up to -160, white from 239.5 on
RESCALED = WINDOW | {"RescaleSlope": 1, "RescaleIntercept": -1024}
WINDOWED = grey(np.rint((((HOUNSFIELD - 39.5) / 399 + 0.5) * 255).clip(0, 255)))
DICOM = {
    "grey12": ((TWELVE, 12), {}, grey(np.rint(TWELVE * (255 / 4095)))),
    "inverted": ((TWELVE, 12, "MONOCHROME1"), {}, grey(np.rint((4095 - TWELVE) * (255 / 4095)))),
    "window": ((HOUNSFIELD, 16), WINDOW, WINDOWED),
    "rescaled": ((TWELVE, 12), RESCALED, WINDOWED),
    "colour": ((COLOUR, 8, "RGB"), {}, COLOUR),
}


@pytest.mark.parametrize("orientation", [*range(1, 9), 0, 9])
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
def test_a_photograph_is_turned_as_its_camera_was_held(orientation, suffix, tmp_path):
    """As the EXIF standard says: by turns and mirrors of the rows and columns in the file. 0 and 9 mean nothing."""
    upright = np.zeros((24, 16, 3), np.uint8)
    upright[:8, :8], upright[16:, 8:] = 200, 100
    stored = {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.transpose(1, 0, 2)}
    stored |= {6: np.rot90(upright), 7: np.rot90(upright)[:, ::-1], 8: np.rot90(upright, -1)}
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(np.ascontiguousarray(stored.get(orientation, upright))).save(path, exif=exif, quality=100)
    with images.open_image(path) as image:
        assert images.upright_size(image) == (16, 24)
    found = load_pixels(path).permute(1, 2, 0).numpy().astype(int)
    assert np.abs(found - upright).max() < 30  # JPEG


@pytest.mark.parametrize("name", DICOM)
def test_dicom_files_are_read_as_they_are_shown(name, tmp_path):
    pytest.importorskip("pydicom", reason="pydicom absent")
    arguments, tags, expected = DICOM[name]
    write_dicom(tmp_path / f"{name}.dcm", *arguments, **tags)
    (path,) = find_images(tmp_path, [name])
    assert np.array_equal(np.asarray(images.read_rgb(path)), expected)
    assert is_intact(path) and find_damage([path]) == [None]
    path.write_bytes(path.read_bytes()[:-9])
    assert not is_intact(path)


def test_dicom_files_of_unknown_meaning_or_without_pydicom_are_refused(tmp_path, monkeypatch):
    pytest.importorskip("pydicom", reason="pydicom absent")
    write_dicom(dark := tmp_path / "dark.dcm", TWELVE // 16, 12)
    write_dicom(film := tmp_path / "film.dcm", np.stack([TWELVE] * 2), 12)
    for path, said in ((dark, "no window"), (film, "holds 2 images"), (dark, "pydicom")):
        if said == "pydicom":
            monkeypatch.setitem(sys.modules, "pydicom", None)
        refused(f"{path.name}.*{said}", load_pixels, path)


REFUSED = {
    "float.tif": lambda p: Image.fromarray((GREY / 255).astype(np.float32)).save(p),
    "int32.tif": lambda p: Image.fromarray(GREY.astype(np.int32)).save(p),
    "inverted16.tif": lambda p: Image.fromarray(DEEP).save(p, tiffinfo={262: 0}),
    "twelve_in_16.png": lambda p: write_png(p, DEEP // 16, 0),
    "twelve_in_16_rgb.png": lambda p: write_png(p, np.dstack([DEEP // 16] * 3), 2),
    "clear.png": lambda p: Image.fromarray(np.dstack([COLOUR, CLEAR])).save(p),
    "clear_palette.png": lambda p: Image.fromarray(GREY).convert("P").save(p, transparency=3),
    "key.png": lambda p: Image.fromarray(GREY).save(p, transparency=3),
    "key16.png": lambda p: write_png(p, DEEP, 0, chunk(b"tRNS", DEEP[2, 3].astype(">u2").tobytes())),
    "lab.tif": lambda p: Image.fromarray(COLOUR, mode="LAB").save(p),
    "pages.tif": lambda p: Image.fromarray(COLOUR).save(p, save_all=True, append_images=[Image.fromarray(COLOUR)]),
    "picture.eps": lambda p: Image.fromarray(COLOUR).save(p),  # its decoder never runs
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_ambiguous_images_are_refused_by_name_everywhere(name, tmp_path):
    REFUSED[name](tmp_path / name)
    path = (tmp_path / name).rename(tmp_path / f"{name}.jpg")
    unknown = "cannot be read as an image; remove it or fetch it again"
    said = unknown if name == "picture.eps" else "(has|holds|declares) .*; convert it to 8-bit RGB"
    assert find_damage([path]) == [refused(f"{path.name}' {said}", load_pixels, path, 8)]
    refused(f"{path.name}.*2 of 2 images", fundus.check_images, [path, path])
    refused("all 1 images are broken", splits.drop_broken, [None], [path])


def test_only_regular_files_are_opened(tmp_path):
    """No pipe, endless device or folder, be it listed, as by metric.py and augment.py, or named by a table or log."""
    folder, paths = tmp_path, [tmp_path / f"{name}.png" for name in ("pipe", "device", "folder")]
    os.mkfifo(paths[0])
    paths[1].symlink_to("/dev/zero")
    paths[2].mkdir()
    for path, fault in zip(paths, find_damage(paths), strict=True):
        assert repr(str(path)) in fault and not is_intact(path)
    paths.pop().rmdir()
    for path in paths:
        refused(path.name, inspect_files, [(folder, [(path, "")])], 0, 1)
        write_log(folder, [{"prompt": "a", "path_to_img": path.name}])
        refused("leads out|there is no file", sample_items, folder, folder / "ratings.csv")
        (folder / "t.csv").write_text(f"path,Text\n{path.name},a\n")
        for read in (sha256, lambda path: find_rows("fundus", folder / "t.csv", folder, 0, skip_broken=False)):
            refused(path.name, read, path)
    refused("pipe.png|device.png", inspect_files, [any_files(folder)], 0, 1)


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_a_file_that_is_cut_or_changed_anywhere_is_damaged(suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    images.save_image(path, torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0)))
    content = path.read_bytes()
    assert is_intact(path)
    for size in range(len(content)):
        path.write_bytes(content[:size])
        assert not is_intact(path), size
    if suffix == ".png":
        for place in range(len(content)):
            path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            assert not is_intact(path), place
    path.unlink()
    assert not is_intact(path)


@pytest.fixture
def files(tmp_path) -> images.ImageFiles:
    rng, paths = np.random.default_rng(0), []
    for number, shape in enumerate([(40, 60, 3), (33, 33, 3), (50, 20, 3), (24, 24, 3), (64, 48, 3)]):
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(paths[-1])
    return images.ImageFiles(paths, torch.arange(5), 24)


def test_the_cache_holds_the_decoded_images_and_damage_is_reported(files, tmp_path):
    files.resize = "pad"
    cached = decoded(files, tmp_path / "cache")
    assert isinstance(cached, images.DecodedImages) and torch.equal(cached.targets, files.targets)
    (path,) = (tmp_path / "cache").iterdir()  # without temporary files
    written = path.stat().st_mtime_ns
    assert decoded(files, tmp_path / "cache").path == path and path.stat().st_mtime_ns == written
    cached[0]  # mapped in this process; workers map it again
    for source in (files, cached):
        loader = DataLoader(source, 2, shuffle=False, **images.loader_options(2))
        pictures, targets = (torch.cat(batches) for batches in zip(*loader, strict=True))
        assert torch.equal(targets, torch.arange(5))
        assert torch.equal(pictures, torch.stack([files[number][0] for number in range(5)]))
    path.write_bytes(path.read_bytes()[:100])
    refused("is shorter than its 5 images", decoded, files, tmp_path / "cache")
    files.paths[3].write_bytes(files.paths[3].read_bytes()[:80])
    refused("3.png' cannot be read as an image; remove it or fetch it again", decoded, files, tmp_path / "other")
    assert not list((tmp_path / "other").iterdir())


def test_another_size_resize_file_or_reader_gets_another_cache(files, tmp_path, monkeypatch):
    paths = {decoded(files, tmp_path / "cache").path}
    for changes in ({"size": 16}, {"resize": "crop"}, {"paths": files.paths[:4]}):
        other = copy.copy(files)
        vars(other).update(changes)
        paths.add(decoded(other, tmp_path / "cache").path)
    os.utime(files.paths[0], ns=(1, 1))
    paths.add(decoded(files, tmp_path / "cache").path)
    monkeypatch.setattr("ddpo_pytorch.data.images.READER_VERSION", 1)
    paths.add(decoded(files, tmp_path / "cache").path)
    assert len(paths) == 6
    # files of other content have other numbers
    moved = shutil.copytree(files.paths[0].parent, tmp_path / "moved")
    numbers = images.content_numbers(files.paths)
    assert len(set(numbers)) == 5 and images.content_numbers(sorted(moved.glob("*.png"))) == numbers
    files.paths[0].write_bytes(files.paths[0].read_bytes()[::-1])
    changed = images.content_numbers(files.paths)
    assert changed[0] != numbers[0] and changed[1:] == numbers[1:]
    refused("absent.png", images.content_numbers, [tmp_path / "absent.png"])


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


def test_crop_and_pad_keep_proportions(tmp_path):
    picture = np.zeros((20, 60, 3), np.uint8)
    picture[:, 20:40] = 255  # the middle third is a white square
    Image.fromarray(picture).save(wide := tmp_path / "wide.png")
    assert images.load_image(wide, 20, "crop").min() == 1
    padded = images.load_image(wide, 60, "pad")
    assert padded[:, 20:40, 20:40].min() == 1 and padded.sum() == 3 * 20 * 20
    refused("resize is 'squash'; allowed are stretch, crop, pad", images.load_image, wide, 20, "squash")


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


def test_a_dark_band_loses_no_part_of_the_field_and_pictures_without_a_surround_are_only_padded():
    pixels, inside = disc(100, 160, (80, 50), 45)
    pixels[:, 70:84] //= 20
    square = np.asarray(fov_square(Image.fromarray(pixels)))
    assert square.shape == (91, 91, 3)
    assert fov_mask(pixels).sum() < inside.sum() / 2  # the mask is the larger part
    full = np.random.default_rng(0).integers(40, 255, (20, 30, 3), np.uint8)
    for pixels, seen in ((full, True), (np.zeros_like(full), False)):
        square = np.asarray(fov_square(Image.fromarray(pixels)))
        assert square.shape == (30, 30, 3) and (fov_mask(pixels) == seen).all()
        assert np.array_equal(square[5:25], pixels) and not square[:5].any() and not square[25:].any()


# image files by the names of tables


def write_table(data, folder, *names):
    header, cells = {isic: ("image,MEL,NV,hair,gel_bubble,ruler,ink", "1,0,0,0,0,0"), fundus: ("path,Text", "A")}[data]
    (folder / "t.csv").write_text("\n".join([header, *(f"{name},{cells}" for name in names)]))
    return folder / "t.csv"


FOUND = [(isic, "ISIC_7.jpg", "ISIC_7_downsampled"), (isic, "ISIC_7_downsampled.png", "isic_7")]
FOUND += [(isic, "Isic_7.Tif", "ISIC_7.JPEG"), (fundus, "Images/1_Left.JPEG", "IMAGES/1_LEFT.JPG")]
FOUND += [(isic, "Images/7.jpg", ".\\Images\\7"), (fundus, "Images/7.jpg", ".\\Images\\7.jpg")]


@pytest.mark.parametrize(("data", "file", "named"), FOUND)
def test_images_are_found_under_any_suffix_and_case(data, file, named, tmp_path):
    save_pictures(tmp_path, file, "ISIC_77.jpg", "Images/1_right.JPEG")
    rows, paths, missing = data.load_split(write_table(data, tmp_path, named), tmp_path)
    assert (paths, missing, len(rows)) == ([tmp_path / file], 0, 1)


@pytest.mark.parametrize("twin", ["F.png", "F.JPG", "F_downsampled.jpg", "f.jpeg"])
def test_two_files_of_one_id_are_an_error_by_name(twin, tmp_path):
    save_pictures(tmp_path, "F.jpg", twin)
    table = write_table(isic, tmp_path, "F")
    for load in (isic.load_split, lambda path, folder: splits.check_images({"t": isic.read_split(path)}, folder)):
        refused(["F.jpg", twin], load, table, tmp_path)


def test_names_that_differ_by_case_or_suffix_alone_keep_their_own_files(tmp_path):
    save_pictures(tmp_path, "a.jpg", "A.png", "b.jpg")
    assert find_images(tmp_path, ["a.jpg", "A"]) == [tmp_path / "a.jpg", tmp_path / "A.png"]
    assert find_images(tmp_path, ["b.jpg", "b.png"]) == [tmp_path / "b.jpg", None]
    assert find_images(tmp_path, ["c", "sub/a"]) == [None, None]
    (tmp_path / "c.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "sub.jpg").mkdir()
    assert find_images(tmp_path, ["c", "sub"]) == [None, None]
    save_pictures(tmp_path, "Images/7.jpg")
    for link in ("8.jpg", "images"):  # to themselves
        (tmp_path / link).symlink_to(link)
    assert find_images(tmp_path, ["IMAGES/7.jpg", "8.jpg"]) == [tmp_path / "Images/7.jpg", None]


def test_missing_images_are_named_and_counted(tmp_path, caplog):
    names = [f"I{number:02d}" for number in range(20)]
    save_pictures(tmp_path, *(f"{name}.jpg" for name in names[8:]))
    (tmp_path / "cache").mkdir()
    for data in (isic, fundus):
        table = write_table(data, tmp_path, *(f"{name}.jpg" for name in names))
        rows, paths, missing = data.load_split(table, tmp_path)
        assert [row.number for row in rows] == list(range(8, 20)) and missing == 8
        assert paths == [tmp_path / f"{name}.jpg" for name in names[8:]]
        message = caplog.records[-1].getMessage()
        assert all(name in message for name in (*names[:5], table.name, "8 of 20")) and "I06" not in message
        assert [row.number for row in data.load_split(table, tmp_path, limit=2)[0]] == [8, 9]
        refused("none of the 20 images .* the first would be .*cache/I00", data.load_split, table, tmp_path / "cache")
        refused("nowhere' does not exist", data.load_split, table, tmp_path / "nowhere")
