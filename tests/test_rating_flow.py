"""The commands of docs/fundus.md one after another: what scripts/rate.py writes is what scripts/train_rlhf.py reads."""

import itertools
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
from ddpo_pytorch.utils.errors import UserError

pytest.importorskip("fastapi", reason="fastapi absent")
pytestmark = pytest.mark.slow
SMALL = {"text_encoder": "bert", "text_tokens": 16, "image_size": 32, "patch_size": 8, "width": 32, "heads": 2}
SMALL |= {"selector_layers": 1, "policy_layers": 1, "num_epochs": 1, "batch_size": 16}


def command(script: str) -> list[str]:
    """The page's first command of a script, as words after the script's name."""
    found = re.search(
        rf"^(?:python|accelerate launch) scripts/{script} (.*)$", (ROOT / "docs/fundus.md").read_text(), re.M
    )
    return shlex.split(found[1])


def value(words: list[str], name: str) -> Path:
    return Path(words[words.index(f"--{name}") + 1])


def train(folder: Path, *options: str) -> subprocess.CompletedProcess:
    """Run the documented command on a small model."""
    sizes = [f"--config.rlhf.{name}={setting}" for name, setting in SMALL.items()]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "scripts/train_rlhf.py", *command("train_rlhf.py"), *sizes, "--config.mixed_precision=no"]
    return subprocess.run([*words, *options], cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def rate_all(page: RatePage) -> int:
    """Rate every question, 1, 2, 3 in turn; the number of them."""
    state = page.post("state", "Ann")
    for rating in itertools.cycle((1, 2, 3)):
        if not state["current"]:
            return state["rated"]
        state = page.rate("Ann", state, rating)


def test_the_documented_commands_end_in_trained_judges(tmp_path):
    """In a folder of its own, with samples of another prompt table, and after all has been moved elsewhere."""
    for name in ("scripts", "config"):
        (tmp_path / name).symlink_to(ROOT / name)
    rate = command("rate.py")
    table, data = tmp_path / value(rate, "csv"), tmp_path / value(rate, "data_path")
    samples = tmp_path / value(rate, "images")
    write_gallery(samples, 9)
    rows = write_gallery(data, 6, suffix="jpg", shade=100)
    table.parent.mkdir(parents=True, exist_ok=True)
    captions = (row["prompt"].replace('"', '""') for row in rows)
    lines = [f'{row["path_to_img"]},"{caption}"' for row, caption in zip(rows, captions, strict=True)]
    table.write_text("\n".join(["path,Text", *lines, ""]))
    write_bert(tmp_path / "bert")

    page = RatePage(*rate, cwd=tmp_path)
    assert rate_all(page) == 15 and page.end() == 0
    ratings = tmp_path / value(rate, "out")
    assert not any(line.startswith(("/", '"/')) for line in ratings.read_text().splitlines())
    result = train(tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    judges = next(tmp_path.glob("**/selector.safetensors")).parent
    assert f"{value(rate, 'out')}: 15 ratings of 15 images" in result.stderr

    (tmp_path / "rl4med-out").rename(tmp_path / "moved")
    base = f"--config.base_log_path=moved/{judges.parent.relative_to(tmp_path / 'rl4med-out')}"
    result = train(tmp_path, base, "--config.rlhf.output=again")
    assert result.returncode == 0, result.stderr[-2000:]
    page = RatePage(*(word.replace("rl4med-out", "moved") for word in rate), cwd=tmp_path)
    assert page.post("state", "Ann")["current"] is None  # every image is known again
    page.end()

    ratings = tmp_path / "moved" / value(rate, "out").relative_to("rl4med-out")
    first = ratings.read_text().splitlines()[1].split(",")[0]
    Image.new("RGB", (48, 48)).save(tmp_path / "secret.png")
    ratings.write_text(ratings.read_text().replace(first, os.path.relpath(tmp_path / "secret.png", ratings.parent)))
    result = train(tmp_path, base, "--config.rlhf.output=none")
    assert result.returncode == 2 and "line 2: " in result.stderr and "rlhf.data_path" in result.stderr
    assert result.stderr.count("\n") == 1 and not (tmp_path / "none").exists()


def test_folders_that_lie_apart_are_found_as_the_refusal_says(tmp_path):
    """Samples of both systems and real photographs in three places, the table in a fourth; `data_path` names them."""
    skin, fundus = tmp_path / "a/skin", tmp_path / "a/b/fundus"
    entries = write_gallery(skin, 3)
    for entry, caption in zip(entries, CAPTIONS, strict=False):
        entry["prompt"] = caption
    (skin / "image_log.json").write_text(json.dumps(entries))
    write_gallery(fundus, 3, shade=90)
    out = tmp_path / "ratings/deep/ratings.csv"
    page = RatePage("--images", skin, "--images", f"{fundus},{skin}", "--out", out)
    assert rate_all(page) == 6
    page.end()
    with pytest.raises(UserError) as error:
        read_ratings(out)
    assert "line 2: " in str(error.value) and "rlhf.data_path" in str(error.value)
    rows = read_ratings(out, tmp_path / "a")
    assert sorted(row.path for row in rows) == sorted([*skin.rglob("*.png"), *fundus.rglob("*.png")])
    assert {row.prompt for row in rows} == {*PROMPTS, *(f"Fundus: {caption}" for caption in CAPTIONS[:3])}
