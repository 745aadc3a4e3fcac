"""extract_dataset_latents.py: images, log and latents; one and two processes; interruptions; bad input."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from refusals import refused
from safetensors.torch import load_file, save_file
from script_tools import files_of, options, succeed

from ddpo_pytorch.data.images import load_image, save_image
from ddpo_pytorch.data.isic import CAPTIONS, caption_of
from ddpo_pytorch.data.sample_folder import folder_name, list_samples, read_log, title_of
from ddpo_pytorch.generator.from_scratch import build_vae
from ddpo_pytorch.generator.latents import LatentShards, encode_data_set, fingerprint, write_index
from ddpo_pytorch.generator.pipeline import load_pipeline
from ddpo_pytorch.rating.session import sample_items


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    """Seven rows of the official columns; rows 2 and 5 have no image."""
    folder, generator = tmp_path_factory.mktemp("isic"), torch.Generator().manual_seed(0)
    table = "image,MEL,NV,dark_corner,hair,gel_bubble,ruler,ink\n"
    for row in range(7):
        table += f"ISIC_{row},{float(row < 3)},{float(row >= 3)},1,{row % 2},0,{row // 4},0\n"
        if row not in (2, 5):
            save_image(folder / "image.png", torch.rand(3, 40, 50, generator=generator))
            (folder / "image.png").rename(folder / f"ISIC_{row}{'_downsampled' if row == 3 else ''}.jpg")
    (folder / "split.csv").write_text(table)
    return folder


@pytest.fixture
def extract(table, config_file, run_main, tmp_path):
    """Function of fields: run the script in this process, on the table, into tmp_path / "x"."""
    usual = {"dataset__csv": str(table / "split.csv"), "dataset__data_path": str(table), "dataset__image_size": 64}
    usual["logdir"] = str(tmp_path / "x")
    return lambda **fields: run_main("extract_dataset_latents.py", config_file, **usual | fields)


@pytest.mark.slow
def test_several_shards_are_the_same_from_two_processes(table, extract, config_file, tmp_path):
    """514 rows of the same few pictures: three shards, of which the other process writes the second."""
    (tmp_path / "images").mkdir()
    many, *rows = (table / "split.csv").read_text().splitlines(True)
    for number in range(514):
        name, rest = rows[(0, 1, 4)[number % 3]].split(",", 1)
        many += f"copy_{number},{rest}"
        (tmp_path / "images" / f"copy_{number}.jpg").symlink_to(table / f"{name}.jpg")
    (tmp_path / "many.csv").write_text(many)
    fields = {"dataset__csv": str(tmp_path / "many.csv"), "dataset__data_path": str(tmp_path / "images")}
    fields |= {"dataset__image_size": 16, "dataset__resize": "crop"}
    extract(logdir=str(tmp_path / "one"), **fields)
    succeed("extract_dataset_latents.py", *options(config_file, logdir=tmp_path / "two", **fields), processes=2)
    one = files_of(tmp_path / "one")
    assert one == files_of(tmp_path / "two") and sum("shard_" in path for path in one) == 3


def test_images_log_and_latents_of_a_table(table, extract, tiny_pipeline_dir, tmp_path, caplog):
    with caplog.at_level("INFO"):
        extract(dataset__num_workers=1)
    assert "5 images" in caplog.text and "images/s" in caplog.text and "2 rows of" in caplog.text
    log = read_log(tmp_path / "x")
    assert [entry["sampleID"] for entry in log] == [0, 1, 3, 4, 6]
    assert log[2]["prompt"] == caption_of((1, 0, 0, 0, 0, 1)) and log[2]["image"] == "ISIC_3"
    assert log[2]["dark_corner"] == "1" and log[2]["path_to_img"] == f"images/{folder_name(log[2]['prompt'])}/3.png"
    source = load_image(table / "ISIC_1.jpg", 64)
    assert torch.equal(load_image(tmp_path / "x" / log[1]["path_to_img"]), source)

    latents = LatentShards(tmp_path / "x" / "latents")
    assert len(latents) == 5 and latents.captions == list(CAPTIONS) and latents.index["resize"] == "stretch"
    vae = load_pipeline(tiny_pipeline_dir).vae
    assert latents.index["vae_sha256"] == fingerprint(vae) and latents.index["image_size"] == 64
    with torch.no_grad():
        posterior = vae.encode(source[None] * 2 - 1).latent_dist
    mean, logvar, caption = latents[1]
    assert CAPTIONS[caption] == log[1]["prompt"] and latents.shape == mean.shape
    for stored, value in ((mean, posterior.mean), (logvar, posterior.logvar)):
        assert stored.dtype == torch.float16
        torch.testing.assert_close(stored.float(), value[0], rtol=2e-3, atol=1e-3)


def test_interrupted_and_damaged_extractions_are_completed(extract, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("ddpo_pytorch.generator.latents.SHARD_IMAGES", 2)
    extract()
    complete = files_of(tmp_path / "x")
    shards = sorted((tmp_path / "x" / "latents").glob("shard_*"))
    assert len(shards) == 3

    # killed before the second shard; a picture of the user's stays
    own = next((tmp_path / "x").glob("images/*/*.png")).with_name("own.png")
    own.write_bytes(b"own")
    complete[str(own.relative_to(tmp_path / "x"))] = b"own"
    for path in (shards[1], shards[2], tmp_path / "x" / "latents" / "index.json", tmp_path / "x" / "image_log.json"):
        path.unlink()
    refused("no complete latents", LatentShards, tmp_path / "x" / "latents")
    first = shards[0].stat().st_mtime_ns
    extract()
    assert files_of(tmp_path / "x") == complete and shards[0].stat().st_mtime_ns == first
    # a shard that is cut
    shards[0].write_bytes(shards[0].read_bytes()[:-7])
    refused(shards[0].name, LatentShards, tmp_path / "x" / "latents")
    extract()
    assert files_of(tmp_path / "x") == complete and f"{shards[0]} " in caplog.text


def test_images_that_appear_and_disappear(table, extract, tmp_path, monkeypatch):
    monkeypatch.setattr("ddpo_pytorch.generator.latents.SHARD_IMAGES", 2)
    shutil.copytree(table, tmp_path / "table")
    victim, fields = tmp_path / "table" / "ISIC_4.jpg", {"dataset__data_path": str(tmp_path / "table")}
    picture = victim.read_bytes()
    victim.write_bytes(picture[:50])
    refused("ISIC_4.jpg' cannot be read as an image", extract, **fields)
    for content, expected in ((picture[:50], [0, 1, 3, 6]), (picture, [0, 1, 3, 4, 6]), (None, [0, 1, 3, 6])):
        victim.unlink() if content is None else victim.write_bytes(content)
        extract(**fields, dataset__skip_broken=True)
        numbers = [entry["sampleID"] for entry in read_log(tmp_path / "x")]
        pictures = sorted(int(path.stem) for path in (tmp_path / "x" / "images").glob("*/*.png"))
        shards = len(list((tmp_path / "x" / "latents").glob("shard_*")))
        assert pictures == numbers == expected and shards == -(-len(numbers) // 2)
        assert len(LatentShards(tmp_path / "x" / "latents")) == len(numbers)


@pytest.mark.parametrize("model", [{}, {"pretrained__model": ""}])
def test_images_that_are_replaced_are_extracted_again(table, extract, tmp_path, model):
    """By one of the same name and size in bytes. Folders of earlier versions do not name their sources."""
    shutil.copytree(table, tmp_path / "table")
    source, fields = tmp_path / "table" / "ISIC_1.jpg", {"dataset__data_path": str(tmp_path / "table")} | model
    folder, shard, means = tmp_path / "x", tmp_path / "x" / "latents" / "shard_00000.safetensors", []
    for colour in ("red", "blue"):
        Image.new("RGB", (40, 50), colour).save(source, format="BMP")
        extract(**fields)
        (path,) = folder.glob("images/*/1.png")
        assert torch.equal(load_image(path), load_image(source, 64))
        means += [] if model else [load_file(shard)["mean"]]
    if means:
        assert [row.equal(other) for row, other in zip(*means, strict=True)] == [True, False, True, True, True]
        save_file({name: value for name, value in load_file(shard).items() if name != "content"}, shard)
        (shard.parent / "index.json").unlink()
    for path in folder.glob("images/*/*.png"):
        save_image(path, load_image(path))
    before = files_of(folder)
    extract(**fields)
    assert before.items() <= files_of(folder).items()


def test_ratings_of_extracted_photographs_know_the_patient(table, extract, tmp_path):
    """As those of the photographs themselves: both eyes of a patient must be in the same split."""
    for eye in ("left", "right"):
        shutil.copy(table / "ISIC_0.jpg", tmp_path / f"P1_{eye}.jpg")
    (tmp_path / "t.csv").write_text("path,Text\nP1_left.jpg,drusen\nP1_right.jpg,a scar\n")
    extract(dataset__kind="fundus", dataset__csv=str(tmp_path / "t.csv"), dataset__data_path=str(tmp_path))
    assert [item.patient for item in sample_items(tmp_path / "x", tmp_path / "ratings.csv")] == ["P1", "P1"]


def test_images_of_a_drawn_world_are_called_phantoms(table, extract, tmp_path):
    for number, place in enumerate((None, table, table.parent)):  # worlds of skin have their images in images/
        if place:
            (place / "world.json").write_text("{}")
        extract(pretrained__model="", logdir=str(tmp_path / str(number)))
        samples = list_samples(tmp_path / str(number))
        assert title_of("real", samples) == ("phantoms" if place else "real") and title_of("SD", samples) == "SD"
        if place:
            (place / "world.json").unlink()


def test_extract_without_a_model_writes_images_once_and_repairs_them(extract, tmp_path):
    fields = {"dataset__image_size": 32, "pretrained__model": "", "dataset__limit": 3}
    extract(**fields)
    complete = files_of(tmp_path / "x")
    assert sum(path.endswith(".png") for path in complete) == 3 and not any("latents" in path for path in complete)
    path = sorted((tmp_path / "x").glob("images/*/*.png"))[1]
    for size in (len(path.read_bytes()) - 1, 0, None):
        path.write_bytes(path.read_bytes()[:size])
        stamps = {file: file.stat().st_mtime_ns for file in (tmp_path / "x").rglob("*")}
        extract(**fields)
        assert files_of(tmp_path / "x") == complete
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "x").rglob("*")} == stamps  # nothing was to be done
    refused("image_size=32, now it is 64", extract, **fields | {"dataset__image_size": 64})


def test_extract_bad_input(extract, tmp_path):
    bad = [("dataset__csv", "", "dataset.csv is ''"), ("dataset__data_path", "absent", "'absent' does not exist")]
    bad += [("dataset__image_size", size, f"dataset.image_size is {size}") for size in (0, 1, 5000)]
    bad += [("pretrained__model", "/absent", "/absent")]
    for name, value, message in bad:
        refused(message, extract, **{name: value})
        assert not (tmp_path / "x").exists()


def test_a_node_without_shards_finds_the_index_that_another_wrote(tmp_path, monkeypatch):
    """Its NFS client remembers, for half a minute, which names it looked up in vain."""
    vae, looked_up, stat = build_vae((8, 8), 16), set(), os.stat
    arguments = vae, [(torch.zeros(3, 16, 16, dtype=torch.uint8), 0)] * 2, range(2), [0, 0], tmp_path

    def remembering(path, *rest, **options):
        try:
            return stat(tmp_path / "absent" if str(path) in looked_up else path, *rest, **options)
        except FileNotFoundError:
            looked_up.add(str(path))
            raise

    for rank, written in ((1, 0), (0, 2)):
        with monkeypatch.context() as node:
            node.setattr(os, "stat", remembering if rank else stat)
            assert encode_data_set(*arguments, rank=rank, processes=2, progress=False) == written
    write_index(tmp_path, vae, ["a"], 2, {})
    monkeypatch.setattr(os, "stat", remembering)
    assert len(LatentShards(tmp_path)) == 2
