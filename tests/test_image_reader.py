"""The reader of image files: unambiguous levels are scaled, everything else is refused by the file's name."""

import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, TiffImagePlugin

from ddpo_pytorch.data import fundus, splits
from ddpo_pytorch.data.datasets import find_rows
from ddpo_pytorch.data.images import find_damage, is_intact, load_pixels, read_rgb, save_image
from ddpo_pytorch.data.sample_folder import write_log
from ddpo_pytorch.metrics.image_sets import any_files, inspect_files
from ddpo_pytorch.rating.session import sample_items
from ddpo_pytorch.utils.errors import UserError
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
    rows = values.reshape(len(values), -1)
    lines = [row.astype(">u2").tobytes() for row in rows]
    header = struct.pack(">IIBBBBB", values.shape[1], len(values), 16, colour, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + line for line in lines))
    parts = [chunk(b"IHDR", header), *chunks, chunk(b"IDAT", data), chunk(b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def write_tiff(path, image, **tags) -> None:
    info = TiffImagePlugin.ImageFileDirectory_v2()
    for number, value in tags.items():
        info[int(number[1:])] = value
    Image.fromarray(image).save(path, format="TIFF", tiffinfo=info)


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
    for path in (tmp_path / name, tmp_path / f"{name}.jpg"):
        if not path.exists():
            (tmp_path / name).rename(path)
        assert np.array_equal(np.asarray(read_rgb(path)), expected)
        fundus.check_images([path])


REFUSED = {
    "float.tif": lambda p: Image.fromarray((GREY / 255).astype(np.float32)).save(p),
    "int32.tif": lambda p: Image.fromarray(GREY.astype(np.int32)).save(p),
    "inverted16.tif": lambda p: write_tiff(p, DEEP, _262=0),
    "twelve_in_16.png": lambda p: write_png(p, DEEP // 16, 0),
    "twelve_in_16_rgb.png": lambda p: write_png(p, np.dstack([DEEP // 16] * 3), 2),
    "clear.png": lambda p: Image.fromarray(np.dstack([COLOUR, CLEAR])).save(p),
    "clear_palette.png": lambda p: Image.fromarray(GREY).convert("P").save(p, transparency=3),
    "key.png": lambda p: Image.fromarray(GREY).save(p, transparency=3),
    "key16.png": lambda p: write_png(p, DEEP, 0, chunk(b"tRNS", DEEP[2, 3].astype(">u2").tobytes())),
    "lab.tif": lambda p: Image.fromarray(COLOUR, mode="LAB").save(p),
    "pages.tif": lambda p: Image.fromarray(COLOUR).save(p, save_all=True, append_images=[Image.fromarray(COLOUR)]),
    # decoders that never run
    "picture.eps": lambda p: Image.fromarray(COLOUR).save(p),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_ambiguous_images_are_refused_by_name_everywhere(name, tmp_path):
    REFUSED[name](tmp_path / name)
    path = (tmp_path / name).rename(tmp_path / f"{name}.jpg")
    with pytest.raises(UserError, match=path.name) as error:
        load_pixels(path, 8)
    assert "\n" not in str(error.value) and find_damage([path]) == [str(error.value)]
    with pytest.raises(UserError, match=f"{path.name}.*2 of 2 images"):
        fundus.check_images([path, path])
    with pytest.raises(UserError, match="all 1 images are broken"):
        splits.drop_broken([None], [path])


@pytest.fixture
def endless(tmp_path):
    """A pipe, an endless device and a folder, named like images."""
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    (tmp_path / "folder.png").mkdir()
    return [tmp_path / f"{name}.png" for name in ("pipe", "device", "folder")]


def test_only_regular_files_are_opened(endless):
    """Whether images are listed by folder, as metric.py and augment.py do, or named by a table or log."""
    for path, fault in zip(endless, find_damage(endless), strict=True):
        assert repr(str(path)) in fault and not is_intact(path)
    folder = endless[0].parent
    endless[2].rmdir()
    for path in endless[:2]:
        with pytest.raises(UserError, match=path.name):
            inspect_files([(folder, [(path, "")])], 0, 1)
        write_log(folder, [{"prompt": "a", "path_to_img": path.name}])
        with pytest.raises(UserError, match="leads out|there is no file"):
            sample_items(folder, folder / "ratings.csv")
        (folder / "t.csv").write_text(f"path,Text\n{path.name},a\n")
        for read in (sha256, lambda path: find_rows("fundus", folder / "t.csv", folder, 0, skip_broken=False)):
            with pytest.raises(UserError, match=path.name):
                read(path)
    with pytest.raises(UserError, match="pipe.png|device.png"):
        inspect_files([any_files(folder)], 0, 1)


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_a_file_that_is_cut_or_changed_anywhere_is_damaged(suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    save_image(path, torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0)))
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
