"""Images as squares, and the cache of decoded ones."""

import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from ddpo_pytorch.data.image_cache import DecodedImages, decoded, loader_options
from ddpo_pytorch.data.images import ImageFiles, load_image
from ddpo_pytorch.utils.errors import UserError


@pytest.fixture
def files(tmp_path) -> ImageFiles:
    rng, paths = np.random.default_rng(0), []
    for number, shape in enumerate([(40, 60, 3), (33, 33, 3), (50, 20, 3), (24, 24, 3), (64, 48, 3)]):
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(paths[-1])
    return ImageFiles(paths, torch.arange(5), 24)


@pytest.mark.parametrize("resize", ["stretch", "crop", "pad"])
def test_the_cache_holds_the_decoded_images(files, resize, tmp_path):
    files.resize = resize
    cached = decoded(files, tmp_path / "cache")
    assert isinstance(cached, DecodedImages) and len(cached) == 5 and torch.equal(cached.targets, files.targets)
    for index in (4, 0, 2):
        assert torch.equal(cached[index][0], files[index][0]) and cached[index][1] == index
    (path,) = (tmp_path / "cache").iterdir()  # without temporary files
    written = path.stat().st_mtime_ns
    again = decoded(files, tmp_path / "cache")
    assert again.path == path and path.stat().st_mtime_ns == written


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_gets_the_same_batches_from_the_cache(files, num_workers, tmp_path):
    cached = decoded(files, tmp_path / "cache")
    cached[0]  # mapped in this process; workers map it again
    for source in (files, cached):
        batches = list(DataLoader(source, 2, shuffle=False, **loader_options(num_workers)))
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
    monkeypatch.setattr("ddpo_pytorch.data.image_cache.READER_VERSION", 1)
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


def test_abandoned_files_are_removed_and_those_of_a_living_process_kept(files, tmp_path):
    path = decoded(files, tmp_path / "cache").path
    path.unlink()
    abandoned, at_work = (path.with_name(f".{path.name}.{pid}.tmp") for pid in (9999999, os.getpid()))
    for leftover in (abandoned, at_work):
        leftover.write_text("half")
    decoded(files, tmp_path / "cache")
    assert not abandoned.exists() and at_work.exists()


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
    stretched = load_image(tmp_path / "wide.png", 30)
    assert stretched[:, :, 12:18].min() == 1 and stretched[:, :, :7].max() == 0
    with pytest.raises(UserError, match="resize is 'squash'; allowed are stretch, crop, pad"):
        load_image(tmp_path / "wide.png", 20, "squash")
