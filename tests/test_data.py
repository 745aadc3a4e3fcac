"""Labels, captions, split tables, image files: exact, and clear about what is wrong with a file."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from ddpo_pytorch.data import images, isic, sample_folder
from ddpo_pytorch.utils.errors import UserError

HEADER = "image,MEL,NV,hair,gel_bubble,ruler,ink\n"


def test_captions_in_official_order():
    assert len(set(isic.CAPTIONS)) == 32
    assert isic.CAPTIONS[0] == "a dermoscopic image with melanoma (MEL) with no visible artifacts"
    assert isic.CAPTIONS[1] == "a dermoscopic image with melanoma (MEL) showing ink"
    assert isic.CAPTIONS[3] == "a dermoscopic image with melanoma (MEL) showing ruler, ink"
    assert isic.CAPTIONS[16].endswith("melanocytic nevus (NV) with no visible artifacts")
    assert isic.CAPTIONS[31].endswith("(NV) showing hair, gel bubble, ruler, ink")
    for caption in isic.CAPTIONS:
        assert isic.caption_of(isic.labels_of(caption)) == caption
        assert sample_folder.caption_of_folder(sample_folder.folder_name(caption)) == caption


def test_labels_are_looked_up_not_searched_for():
    with pytest.raises(UserError, match="not one of the 32"):
        isic.labels_of("a dermoscopic image with melanoma (MEL) showing pink hair")
    with pytest.raises(UserError, match="exactly one of MEL and NV"):
        isic.caption_of((0, 0, 0, 0, 1, 1))


def test_official_splits_give_table_1_and_the_real_samples_of_table_2(shared):
    expected = {
        "train": (2750, 9254, 4514, 1300, 201, 1608),
        "val": (454, 1665, 802, 228, 34, 308),
        "test": (537, 1956, 989, 257, 37, 341),
    }
    for name, counts in expected.items():
        rows = isic.read_split(shared / "data" / "splits" / f"isic2019_{name}.csv")
        totals = dict(zip(isic.LABELS, np.sum([row.labels for row in rows], axis=0), strict=True))
        assert tuple(totals[key] for key in ("MEL", "NV", "hair", "gel_bubble", "ink", "ruler")) == counts
    rows = isic.read_split(shared / "data" / "splits" / "isic2019_train.csv")
    single = {key: sum(row.caption == c for row in rows) for key, c in isic.SINGLE_ARTIFACT_CAPTIONS.items()}
    assert list(single.values()) == [543, 260, 440, 4, 3051, 489, 520, 21]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("image,MEL\na,1\n", "lacks the columns hair, gel_bubble, ruler, ink, NV"),
        (HEADER + "a,1,0,0,0,0,2\n", "ink is '2'"),
        (HEADER + "a,1,0,0,0,,0\n", "ruler is ''"),
        (HEADER + "a,1,1,0,0,0,0\n", "exactly one of them"),
        (HEADER + "a,1,0,0,0,0,0\na,0,1,0,0,0,0\n", "appears twice"),
    ],
)
def test_faulty_split_tables(tmp_path, text, expected):
    path = tmp_path / "split.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=expected):
        isic.read_split(path)


def test_load_split_counts_missing_images_and_takes_downsampled_ones(tmp_path):
    table = tmp_path / "split.csv"
    table.write_text(HEADER + "a,1,0,0,0,0,0\nb,0,1,1,0,0,0\nc,0,1,0,0,0,1\n")
    for name in ("a.jpg", "c_downsampled.jpg"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    rows, paths, missing = isic.load_split(table, tmp_path)
    assert [row.image for row in rows] == ["a", "c"] and missing == 1
    assert [path.name for path in paths] == ["a.jpg", "c_downsampled.jpg"]
    assert len(isic.load_split(table, tmp_path, limit=1)[0]) == 1
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="none of the 3 images"):
        isic.load_split(table, tmp_path / "empty")
    with pytest.raises(UserError, match="does not exist"):
        isic.load_split(table, tmp_path / "nowhere")


def test_every_8_bit_level_survives_and_white_stays_white():
    levels = torch.arange(256) / 255
    assert torch.equal(images.to_uint8(levels), torch.arange(256, dtype=torch.uint8))
    assert images.to_uint8(torch.tensor([-0.1, 1.1])).tolist() == [0, 255]


def test_images_on_disk_are_lossless(tmp_path):
    image = torch.randint(0, 256, (3, 5, 7)).float() / 255
    images.save_image(tmp_path / "deep" / "a.png", image)
    assert torch.equal(images.load_image(tmp_path / "deep" / "a.png"), image)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.png"]
    assert images.load_image(tmp_path / "deep" / "a.png", size=4).shape == (3, 4, 4)


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


def test_sample_folders(tmp_path):
    with pytest.raises(UserError, match="not a sample folder"):
        sample_folder.list_samples(tmp_path)
    first, second = isic.CAPTIONS[:2]
    for caption in (first, second):
        images.save_image(tmp_path / "images" / sample_folder.folder_name(caption) / "00000.png", torch.zeros(3, 4, 4))
    assert {caption for _, caption in sample_folder.list_samples(tmp_path)} == {first, second}
    assert [caption for _, caption in sample_folder.list_samples(tmp_path, [second])] == [second]
    with pytest.raises(UserError, match="holds no images"):
        sample_folder.list_samples(tmp_path, [isic.CAPTIONS[5]])
    (tmp_path / "images" / "pink").mkdir()
    with pytest.raises(UserError, match="'pink'"):
        sample_folder.list_samples(tmp_path)
    sample_folder.write_log(tmp_path, [{"prompt": first}])
    assert sample_folder.read_log(tmp_path) == [{"prompt": first}]


def test_grid_places_images_row_by_row():
    batch = torch.stack([torch.full((3, 4, 4), value) for value in (0.0, 0.5, 1.0)])
    grid = np.asarray(images.image_grid(batch, columns=2, padding=1))
    assert grid.shape == (11, 11, 3)
    assert grid[1, 1, 0] == 0 and grid[1, 6, 0] == 128 and grid[6, 1, 0] == 255
