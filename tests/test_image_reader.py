"""The reader of image files: unambiguous levels are scaled, everything else is refused by the file's name."""

import ast
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image, TiffImagePlugin

from ddpo_pytorch.data import fundus, splits
from ddpo_pytorch.data.datasets import find_rows
from ddpo_pytorch.data.images import find_damage, is_intact, load_pixels, read_rgb, save_image
from ddpo_pytorch.data.sample_folder import write_log
from ddpo_pytorch.metrics.image_sets import any_files, inspect_files
from ddpo_pytorch.rating.items import sample_items
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


def write_png(path, values: np.ndarray, bits: int, colour: int, *chunks: bytes) -> None:
    """Write a PNG by its specification: (H, W) or (H, W, C) values of up to 16 bits, packed below 8."""
    rows = values.reshape(len(values), -1)
    if bits == 16:
        lines = [row.astype(">u2").tobytes() for row in rows]
    else:
        levels = [row.reshape(-1, 8 // bits) for row in rows]
        lines = [sum(row[:, i] << (8 - bits * (i + 1)) for i in range(8 // bits)).astype(np.uint8) for row in levels]
        lines = [line.tobytes() for line in lines]
    header = struct.pack(">IIBBBBB", values.shape[1], len(values), bits, colour, 0, 0, 0)
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
    "rgb.tif": (lambda p: Image.fromarray(COLOUR).save(p), COLOUR),
    "rgb.bmp": (lambda p: Image.fromarray(COLOUR).save(p), COLOUR),
    "rgb.webp": (lambda p: Image.fromarray(COLOUR).save(p, lossless=True), COLOUR),
    "grey.png": (lambda p: Image.fromarray(GREY).save(p), grey(GREY)),
    "grey.tif": (lambda p: Image.fromarray(GREY).save(p), grey(GREY)),
    "grey4.png": (lambda p: write_png(p, GREY // 16, 4, 0), grey(GREY // 16 * 17)),
    "bits.png": (lambda p: write_png(p, GREY // 128, 1, 0), grey(GREY // 128 * 255)),
    "bits.tif": (lambda p: Image.fromarray(GREY > 99).save(p), grey((GREY > 99) * np.uint8(255))),
    "grey16.png": (lambda p: write_png(p, DEEP, 16, 0), grey(SCALED)),
    "grey16.tif": (lambda p: Image.fromarray(DEEP).save(p), grey(SCALED)),
    "packed16.tif": (lambda p: Image.fromarray(DEEP).save(p, compression="tiff_lzw"), grey(SCALED)),
    "black16.png": (lambda p: write_png(p, DEEP * 0, 16, 0), grey(GREY * 0)),
    "doubled16.png": (lambda p: write_png(p, GREY.astype(np.uint16) * 257, 16, 0), grey(GREY)),
    "rgb16.png": (lambda p: write_png(p, COLOUR.astype(np.uint16) * 257, 16, 2), COLOUR),
    "opaque.png": (lambda p: Image.fromarray(np.dstack([COLOUR, OPAQUE])).save(p), COLOUR),
    "opaque.webp": (lambda p: Image.fromarray(np.dstack([COLOUR, OPAQUE])).save(p, lossless=True), COLOUR),
    "opaque.tif": (lambda p: Image.fromarray(np.dstack([COLOUR, OPAQUE])).save(p), COLOUR),
    "opaque_grey.png": (lambda p: Image.fromarray(np.dstack([GREY, OPAQUE])).save(p), grey(GREY)),
    "palette.png": (lambda p: Image.fromarray(GREY).convert("P").save(p), grey(GREY)),
    "unused_key.png": (lambda p: Image.fromarray(GREY // 2).save(p, transparency=200), grey(GREY // 2)),
}


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("suffix", ["", ".jpg"])
def test_unambiguous_images_are_scaled(name, suffix, tmp_path):
    """Whatever the file is called, as in ISIC's folder."""
    write, expected = READ[name]
    write(tmp_path / name)
    path = (tmp_path / name).rename(tmp_path / f"{name}{suffix}")
    assert np.array_equal(np.asarray(read_rgb(path)), expected)
    assert find_damage([path]) == [None]
    fundus.check_images([path])


REFUSED = {
    "float.tif": lambda p: Image.fromarray((GREY / 255).astype(np.float32)).save(p),
    "float255.tif": lambda p: Image.fromarray(GREY.astype(np.float32)).save(p),
    "int32.tif": lambda p: Image.fromarray(GREY.astype(np.int32)).save(p),
    "int32_wide.tif": lambda p: Image.fromarray(GREY.astype(np.int32) * 1000).save(p),
    "signed8.tif": lambda p: write_tiff(p, GREY, _339=2),
    "signed16.tif": lambda p: write_tiff(p, DEEP, _339=2),
    "inverted16.tif": lambda p: write_tiff(p, DEEP, _262=0),
    "twelve_in_16.png": lambda p: write_png(p, DEEP // 16, 16, 0),
    "eight_in_16.tif": lambda p: Image.fromarray(GREY.astype(np.uint16)).save(p),
    "twelve_in_16_rgb.png": lambda p: write_png(p, np.dstack([DEEP // 16] * 3), 16, 2),
    "clear.png": lambda p: Image.fromarray(np.dstack([COLOUR, CLEAR])).save(p),
    "clear.webp": lambda p: Image.fromarray(np.dstack([COLOUR, CLEAR])).save(p, lossless=True),
    "clear.tif": lambda p: Image.fromarray(np.dstack([COLOUR, CLEAR])).save(p),
    "clear_grey.png": lambda p: Image.fromarray(np.dstack([GREY, CLEAR])).save(p),
    "clear_palette.png": lambda p: Image.fromarray(GREY).convert("P").save(p, transparency=3),
    "key.png": lambda p: Image.fromarray(GREY).save(p, transparency=3),
    "colour_key.png": lambda p: Image.fromarray(COLOUR).save(p, transparency=tuple(COLOUR[3, 4].tolist())),
    "key4.png": lambda p: write_png(p, GREY // 16, 4, 0, chunk(b"tRNS", b"\0\3")),
    "key16.png": lambda p: write_png(p, DEEP, 16, 0, chunk(b"tRNS", DEEP[2, 3].astype(">u2").tobytes())),
    "cmyk.jpg": lambda p: Image.fromarray(COLOUR).convert("CMYK").save(p),
    "cmyk.tif": lambda p: Image.fromarray(COLOUR).convert("CMYK").save(p),
    "lab.tif": lambda p: Image.fromarray(COLOUR, mode="LAB").save(p),
    "pages.tif": lambda p: Image.fromarray(COLOUR).save(p, save_all=True, append_images=[Image.fromarray(COLOUR)]),
    "film.png": lambda p: Image.fromarray(COLOUR).save(p, save_all=True, append_images=[Image.fromarray(255 - COLOUR)]),
    "film.webp": lambda p: Image.fromarray(COLOUR).save(p, save_all=True, append_images=[Image.new("RGB", (16, 16))]),
    # decoders that never run
    "picture.gif": lambda p: Image.fromarray(COLOUR).save(p),
    "picture.ppm": lambda p: Image.fromarray(COLOUR).save(p),
    "picture.ico": lambda p: Image.fromarray(COLOUR).save(p),
    "picture.eps": lambda p: Image.fromarray(COLOUR).save(p),
    "picture.jp2": lambda p: Image.fromarray(COLOUR).save(p),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("suffix", ["", ".jpg"])
def test_ambiguous_images_are_refused_by_name_everywhere(name, suffix, tmp_path):
    REFUSED[name](tmp_path / name)
    path = (tmp_path / name).rename(tmp_path / f"{name}{suffix}")
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
        with pytest.raises(UserError, match=path.name):
            find_rows("fundus", folder / "t.csv", folder, 0, skip_broken=False)
        with pytest.raises(UserError, match=path.name):
            sha256(path)
    with pytest.raises(UserError, match="pipe.png|device.png"):
        inspect_files([any_files(folder)], 0, 1)


def test_images_are_opened_in_one_place():
    """Any other place would have to name the decoders and refuse pipes again."""
    places = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for folder in ("ddpo_pytorch", "scripts", "benchmarks", "config")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "open" and getattr(node.value, "id", "") == "Image"
    ]
    assert len(places) == 1 and places[0].startswith("ddpo_pytorch/data/images.py:")


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
