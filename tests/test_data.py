"""ISIC's labels and captions, image files, and sample folders."""

import hashlib
import struct
import zlib
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from PIL import Image

from ddpo_pytorch.data import images, isic, sample_folder
from ddpo_pytorch.utils.errors import UserError


def test_captions_in_official_order():
    assert len(set(isic.CAPTIONS)) == 32
    assert isic.CAPTIONS[0] == "a dermoscopic image with melanoma (MEL) with no visible artifacts"
    assert isic.CAPTIONS[1] == "a dermoscopic image with melanoma (MEL) showing ink"
    assert isic.CAPTIONS[3] == "a dermoscopic image with melanoma (MEL) showing ruler, ink"
    assert isic.CAPTIONS[16].endswith("melanocytic nevus (NV) with no visible artifacts")
    assert isic.CAPTIONS[31].endswith("(NV) showing hair, gel bubble, ruler, ink")
    assert [isic.caption_of(isic.labels_of(caption)) for caption in isic.CAPTIONS] == list(isic.CAPTIONS)
    # labels are looked up, not searched for
    with pytest.raises(UserError, match="not one of the 32"):
        isic.labels_of("a dermoscopic image with melanoma (MEL) showing pink hair")
    with pytest.raises(UserError, match="exactly one of MEL and NV"):
        isic.caption_of((0, 0, 0, 0, 1, 1))


def test_broken_images_are_named(tmp_path):
    whole = tmp_path / "whole.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(whole)
    torn = tmp_path / "torn.jpg"
    torn.write_bytes(whole.read_bytes()[:900])
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "empty.jpg").write_bytes(b"")
    header = b"IHDR" + struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    signature = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13)
    (tmp_path / "huge.jpg").write_bytes(signature + header + struct.pack(">I", zlib.crc32(header)))
    for name in ("torn.jpg", "text.jpg", "empty.jpg", "huge.jpg", "absent.jpg"):
        with pytest.raises(UserError, match=f"{name}' cannot be read as an image"):
            images.load_image(tmp_path / name)
    files = images.ImageFiles([whole, torn], torch.arange(2), 32)
    assert files[0][0].shape == (3, 32, 32)
    with pytest.raises(UserError, match="torn.jpg"):
        files[1]


def test_grid_places_images_row_by_row_and_every_8_bit_level_survives():
    batch = torch.stack([torch.full((3, 4, 4), value) for value in (0.0, 0.5, 1.0)])
    grid = np.asarray(images.image_grid(batch, columns=2, padding=1))
    assert grid.shape == (11, 11, 3)
    assert grid[1, 1, 0] == 0 and grid[1, 6, 0] == 128 and grid[6, 1, 0] == 255
    assert torch.equal(images.to_uint8(torch.arange(256) / 255), torch.arange(256, dtype=torch.uint8))
    assert images.to_uint8(torch.tensor([-0.1, 1.1])).tolist() == [0, 255]


ODD = [
    *("cup/disc ratio 0.6", "x/../../../../escape/x", "/etc/passwd", "C:\\images\\x", ".hidden", ".", "..", ""),
    *("a b", "a_b", "a%5Fb", "a%5fb", "a\tb", "a\nb", "a\0b", "a b ", " a b", "a  b", "A b", "\udc80"),
    *("50% drusen", "50%20drusen", "50%2", "%", "%%2F", "ä/ß", "😀‍/"),
    *("x" * 255, "x" * 256, "ä" * 128, "ä" * 127 + "/", "/" * 86, "y" * 400 + "1", "y" * 400 + "2"),
]


def test_captions_name_folders_ordinary_ones_as_in_the_official_code_and_no_two_the_same():
    ordinary = ["Fundus: The left eye shows drusen, 50% of the macula (grade 2).", "a.b", "ä b", "%", "x" * 255]
    for caption in (*isic.CAPTIONS, *ordinary):
        assert sample_folder.folder_name(caption) == caption.replace(" ", "_")
    names = [sample_folder.folder_name(caption) for caption in ODD]
    assert len(set(names)) == len(ODD)
    for caption, name in zip(ODD, names, strict=True):
        assert 0 < len(name.encode()) <= 255 and name.isprintable()
        assert name[0] != "." and not set("/\\ ") & set(name)
        if "%FF" not in name:
            assert unquote(name.replace("_", " "), errors="surrogatepass") == caption
        else:
            assert len(caption.encode()) > 85 or not caption
            assert name.endswith(hashlib.sha256(caption.encode()).hexdigest()[:16])
