"""Tables, logs and captions that name files outside a folder: refused by name, nothing read or written there."""

import json

import pytest
from PIL import Image

from ddpo_pytorch.data import fundus, isic
from ddpo_pytorch.data.sample_folder import PARTS, read_entries, read_log
from ddpo_pytorch.generator.latents import LatentShards
from ddpo_pytorch.training.checkpoints import MANIFEST, find_damage
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.files import path_fault, path_inside

OUTSIDE = ["../private/secret", "/private/secret", "a/../../secret", "..\\secret", "C:\\secret", "C:x", "\\\\host\\x"]
ISIC = "image,MEL,NV,hair,gel_bubble,ruler,ink\n"


@pytest.mark.parametrize("name", [*OUTSIDE, "", "./", "a/..", "a\0b", "a\nb"])
def test_names_that_lead_out_of_a_folder_are_refused(name, tmp_path):
    assert path_fault(name)
    with pytest.raises(UserError, match="table.csv line 3") as error:
        path_inside(tmp_path, name, "table.csv line 3")
    assert repr(name) in str(error.value) and "\n" not in str(error.value)


def test_names_inside_a_folder_are_taken(tmp_path):
    for name in ("sub/a.jpg", "./a.jpg", "..a/b..jpg", "a b", "~/a", "ä.png", ".hidden"):
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
