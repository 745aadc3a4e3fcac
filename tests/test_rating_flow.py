"""The commands of docs/fundus.md one after another: scripts/train_rlhf.py reads what scripts/rate.py writes."""

import re
import shlex
from pathlib import Path

import pytest
from launching import ROOT, Script
from rated_world import write_bert
from rating_tools import RatePage, write_gallery

from ddpo_pytorch.data.ratings import read_ratings

pytest.importorskip("fastapi", reason="fastapi absent")
SMALL = {"text_encoder": "bert", "text_tokens": 16, "image_size": 32, "patch_size": 8, "width": 32, "heads": 2}
SMALL |= {"selector_layers": 1, "policy_layers": 1, "num_epochs": 1, "batch_size": 16}


def command(script: str) -> list[str]:
    """Return the page's first command of a script, as words after the script's name."""
    pattern = rf"^(?:python|accelerate launch) scripts/{script} (.*)$"
    return shlex.split(re.search(pattern, (ROOT / "docs/fundus.md").read_text(), re.M)[1])


@pytest.mark.slow
def test_the_documented_commands_end_in_trained_judges(tmp_path, monkeypatch):
    """In a folder of the user's own, with samples and photographs; then everything is moved."""
    monkeypatch.chdir(tmp_path)
    for name in ("scripts", "config"):
        (tmp_path / name).symlink_to(ROOT / name)
    rate = command("rate.py")
    table, data, samples, out = [
        Path(rate[rate.index(f"--{name}") + 1]) for name in ("csv", "data_path", "images", "out")
    ]
    write_gallery(samples, 9)
    rows = write_gallery(data, 6, suffix="jpg", shade=100)
    table.parent.mkdir(parents=True, exist_ok=True)
    lines = [f'{row["path_to_img"]},"{row["prompt"].replace(chr(34), 2 * chr(34))}"' for row in rows]
    table.write_text("\n".join(["path,Text", *lines, ""]))
    write_bert(tmp_path / "bert")

    page = RatePage(*rate, cwd=tmp_path)
    state = page.post("state", "Ann")
    while state["current"]:
        state = page.rate("Ann", state, 1 + state["rated"] % 3)
    assert state["rated"] == 15 and page.end() == 0

    sizes = [f"--config.rlhf.{name}={setting}" for name, setting in SMALL.items()]
    words = [*command("train_rlhf.py"), *sizes, "--config.mixed_precision=no"]
    result = Script("scripts/train_rlhf.py", *words, cwd=tmp_path).result()
    assert result.returncode == 0, result.stderr[-2000:]
    assert "15 ratings of 15 images" in result.stderr and list(tmp_path.glob("**/selector.safetensors"))

    Path("rl4med-out").rename("moved")
    assert len(read_ratings(Path("moved", *out.parts[1:]), within="moved")) == 15
