"""Tables, logs and captions that name files outside a folder: refused by name, nothing read or written there."""

import json

import pytest
from PIL import Image

from ddpo_pytorch.data import fundus, isic, ratings
from ddpo_pytorch.data.sample_folder import PARTS, list_samples, read_entries, read_log
from ddpo_pytorch.generator.latents import LatentShards
from ddpo_pytorch.training.checkpoints import MANIFEST, find_damage
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.files import path_fault, path_inside

pytest_plugins = ["script_tools"]
OUTSIDE = ["../private/secret", "/private/secret", "a/../../secret", "..\\secret", "C:\\secret", "C:x", "\\\\host\\x"]
ISIC = "image,MEL,NV,hair,gel_bubble,ruler,ink\n"


@pytest.mark.parametrize("name", [*OUTSIDE, "", ".", "./", "..", "a/..", "a\0b", "a\nb"])
def test_names_that_lead_out_of_a_folder_are_refused(name, tmp_path):
    assert path_fault(name)
    with pytest.raises(UserError, match="table.csv line 3") as error:
        path_inside(tmp_path, name, "table.csv line 3")
    assert repr(name) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["a.jpg", "sub/a.jpg", "./a.jpg", "..a/b..jpg", "a b", "~/a", "ä.png", ".hidden"])
def test_names_inside_a_folder_are_taken(name, tmp_path):
    assert path_fault(name) is None and path_inside(tmp_path, name, "") == tmp_path / name


@pytest.fixture
def secret(tmp_path):
    """A private image next to the image folder."""
    for folder in ("images", "private"):
        (tmp_path / folder).mkdir()
    for name in ("private/secret.jpg", "secret.jpg", "images/fine.jpg"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("name", [*OUTSIDE, "{folder}/private/secret"])
def test_image_tables_name_the_line_of_a_path_that_leads_out(name, secret):
    name = name.format(folder=secret)
    (secret / "isic.csv").write_text(f"{ISIC}fine,1,0,0,0,0,0\n{name},1,0,0,0,0,0\n")
    with pytest.raises(UserError, match=r"isic.csv' line 3"):
        isic.load_split(secret / "isic.csv", secret / "images")
    (secret / "fundus.csv").write_text(f"path,Text\nfine.jpg,A\n{name}.jpg,B\n")
    with pytest.raises(UserError, match=r"fundus.csv' line 3"):
        fundus.load_split(secret / "fundus.csv", secret / "images")


def test_a_rating_of_an_image_elsewhere_is_refused(secret):
    (secret / "images" / "ratings.csv").write_text("image_path,rating,prompt\nfine.jpg,1,A\n../secret.jpg,2,A\n")
    with pytest.raises(UserError, match="line 3: path '../secret.jpg'"):
        ratings.read_ratings(secret / "images" / "ratings.csv")


@pytest.mark.parametrize("name", OUTSIDE)
def test_logs_that_name_images_elsewhere_are_refused(name, secret):
    folder = secret / "images"
    entry = {"prompt": "A", "path_to_img": f"{name}.jpg"}
    (folder / PARTS.replace("*", "0")).write_text(json.dumps(entry) + "\n")
    assert read_entries(folder) == {}
    (folder / "image_log.json").write_text(json.dumps([{"prompt": "A", "path_to_img": "fine.jpg"}, entry]))
    for read in (read_log, read_entries):
        with pytest.raises(UserError, match="image_log.json' entry 2"):
            read(folder)


def test_records_that_name_files_elsewhere_are_refused(tmp_path):
    (tmp_path / "index.json").write_text(
        json.dumps({"captions": ["A"], "images": 1, "shards": [{"file": "../x.safetensors", "sha256": ""}]})
    )
    with pytest.raises(UserError, match="'../x.safetensors'"):
        LatentShards(tmp_path)
    (tmp_path / MANIFEST).write_text(json.dumps({"files": {"../x": {"bytes": 1, "sha256": ""}}}))
    assert f"{MANIFEST} is damaged" in find_damage(tmp_path)


def test_extraction_writes_any_caption_inside_its_folder(config_file, run_main, tmp_path):
    captions = ["x/../../../../escape/x", "cup/disc ratio 0.6", "a_b", "a b", "long " * 80, "A B"]
    images = tmp_path / "images"
    images.mkdir()
    for number in range(len(captions)):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(images / f"{number}.png")
    lines = [f'{number}.png,"{caption}"' for number, caption in enumerate(captions)]
    (tmp_path / "t.csv").write_text("\n".join(["path,Text", *lines]))
    given = {"dataset__csv": str(tmp_path / "t.csv"), "dataset__data_path": str(images), "dataset__kind": "fundus"}
    given |= {"dataset__image_size": 8, "pretrained__model": "", "logdir": str(tmp_path / "deep" / "out")}
    run_main("extract_dataset_latents.py", config_file, **given)
    assert {path.name for path in tmp_path.iterdir()} == {"images", "t.csv", "deep"}
    assert {path.name for path in (tmp_path / "deep").iterdir()} == {"out"}
    samples = list_samples(tmp_path / "deep" / "out")
    assert sorted((caption, path.stem) for path, caption in samples) == sorted(
        (fundus.caption_of(caption), str(number)) for number, caption in enumerate(captions)
    )
    assert all(path.parent.parent == tmp_path / "deep" / "out" / "images" for path, _ in samples)
