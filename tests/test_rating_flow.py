"""The commands of docs/fundus.md one after another: scripts/train_rlhf.py reads what scripts/rate.py writes."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from PIL import Image
from rated_world import write_bert
from rating_tools import PROMPTS, RatePage, write_gallery

from ddpo_pytorch.data.isic import CAPTIONS
from ddpo_pytorch.data.ratings import read_ratings
from ddpo_pytorch.rating.items import distinct, sample_items, table_items
from ddpo_pytorch.rating.store import Store
from ddpo_pytorch.utils.errors import UserError

pytest.importorskip("fastapi", reason="fastapi absent")
SMALL = {"text_encoder": "bert", "text_tokens": 16, "image_size": 32, "patch_size": 8, "width": 32, "heads": 2}
SMALL |= {"selector_layers": 1, "policy_layers": 1, "num_epochs": 1, "batch_size": 16}


def command(script: str) -> list[str]:
    """Return the page's first command of a script, as words after the script's name."""
    pattern = rf"^(?:python|accelerate launch) scripts/{script} (.*)$"
    return shlex.split(re.search(pattern, (ROOT / "docs/fundus.md").read_text(), re.M)[1])


@pytest.mark.slow
def test_the_documented_commands_end_in_trained_judges(tmp_path, monkeypatch):
    """In a folder of its own, with samples of another prompt table; then everything is moved."""
    monkeypatch.chdir(tmp_path)
    for name in ("scripts", "config"):
        (tmp_path / name).symlink_to(ROOT / name)
    rate = command("rate.py")
    table, data, samples, out = (
        Path(rate[rate.index(f"--{name}") + 1]) for name in ("csv", "data_path", "images", "out")
    )
    write_gallery(samples, 9)
    rows = write_gallery(data, 6, suffix="jpg", shade=100)
    table.parent.mkdir(parents=True, exist_ok=True)
    captions = (row["prompt"].replace('"', '""') for row in rows)
    lines = [f'{row["path_to_img"]},"{caption}"' for row, caption in zip(rows, captions, strict=True)]
    table.write_text("\n".join(["path,Text", *lines, ""]))
    write_bert(tmp_path / "bert")

    page = RatePage(*rate, cwd=tmp_path)
    state = page.post("state", "Ann")
    while state["current"]:
        state = page.rate("Ann", state, 1 + state["rated"] % 3)
    assert state["rated"] == 15 and page.end() == 0
    assert not any(line.startswith(("/", '"/')) for line in out.read_text().splitlines())

    sizes = [f"--config.rlhf.{name}={setting}" for name, setting in SMALL.items()]
    words = [sys.executable, "scripts/train_rlhf.py", *command("train_rlhf.py"), *sizes, "--config.mixed_precision=no"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "15 ratings of 15 images" in result.stderr and list(tmp_path.glob("**/selector.safetensors"))

    Path("rl4med-out").rename("moved")
    table, data, samples, out = (Path("moved", *path.parts[1:]) for path in (table, data, samples, out))
    assert len(read_ratings(out, within="moved")) == 15
    items = distinct(sample_items(samples, out) + table_items(table, data, out)[0])
    store = Store(out)
    assert sorted(store.rated("Ann")) == [item.key for item in items]  # every image is recognised
    store.close()

    first = out.read_text().splitlines()[1].split(",")[0]
    Image.new("RGB", (48, 48)).save("secret.png")
    out.write_text(out.read_text().replace(first, os.path.relpath("secret.png", out.parent)))
    with pytest.raises(UserError, match="line 2: .*rlhf.data_path"):
        read_ratings(out, within="moved")


def test_images_in_separate_folders(tmp_path):
    """Samples of both systems in two places, the table in a third; `data_path` names the common folder."""
    skin, fundus, out = tmp_path / "a/skin", tmp_path / "a/b/fundus", tmp_path / "ratings/deep/ratings.csv"
    entries = write_gallery(skin, 3)
    for entry, caption in zip(entries, CAPTIONS, strict=False):
        entry["prompt"] = caption
    (skin / "image_log.json").write_text(json.dumps(entries))
    write_gallery(fundus, 3, shade=90)
    items = distinct(sample_items(skin, out) + sample_items(fundus, out) + sample_items(skin, out))
    store = Store(out)
    for item in items:
        store.rate(item, 2, 3, "Ann")
    store.close()
    with pytest.raises(UserError, match="line 2: .*rlhf.data_path"):
        read_ratings(out)
    rows = read_ratings(out, tmp_path / "a")
    assert sorted(row.path for row in rows) == sorted([*skin.rglob("*.png"), *fundus.rglob("*.png")])
    assert {row.prompt for row in rows} == {*PROMPTS, *(f"Fundus: {caption}" for caption in CAPTIONS[:3])}
