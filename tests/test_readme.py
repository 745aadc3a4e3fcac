"""The README tells the truth: its commands exist, its configurations build, its example runs, its files are there."""

import re
import shlex

import pytest
import torch
from conftest import ROOT
from test_configs import load

from ddpo_pytorch import rewards

PAGES = [ROOT / "README.md", ROOT / "docs" / "fundus.md", ROOT / "docs" / "scaling.md"]
TEXT = "\n".join(page.read_text() for page in PAGES)
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, flags=re.S)
COMMANDS = [
    shlex.split(line.split("  #")[0])
    for language, block in BLOCKS
    if language == "sh"
    for line in block.splitlines()
    if line and not line.startswith("#")
]


@pytest.mark.parametrize("command", [c for c in COMMANDS if any("scripts/" in word for word in c)], ids=" ".join)
def test_script_commands_build(command):
    script = next(word for word in command if word.startswith("scripts/"))
    source = (ROOT / script).read_text()
    options = command[command.index(script) + 1 :]
    for name, value in zip(options, [*options, ""][1:], strict=True):
        if name == "--config":
            file, experiment = re.fullmatch(r"config/(\w+)\.py:(\w+)", value).groups()
            config = load(file).get_config(experiment)
        elif name.startswith("--config."):
            part = config
            for field in name.removeprefix("--config.").split("=")[0].split("."):
                assert field in part, name
                part = part[field]
        elif name.startswith("--"):
            assert f'"{name[2:]}"' in source, name


def test_make_targets_exist():
    targets = [command[1] for command in COMMANDS if command[0] == "make"]
    assert targets == ["demo", "test", "demo-fundus"]
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"\n{target}:" in makefile for target in [*targets, "mini-weights"])


def test_linked_files_exist():
    for page in PAGES:
        for path in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
            assert (page.parent / path).exists(), path
    for path in re.findall(r"`(ddpo_pytorch/[\w/.]+)`", TEXT):
        assert (ROOT / path).exists(), path


def test_the_reward_example_runs(monkeypatch):
    (code,) = [block for language, block in BLOCKS if language == "python"]
    namespace = {}
    exec(code, namespace)
    monkeypatch.setitem(rewards.REWARDS, "redness", namespace["redness"])
    reward = rewards.build_reward("jpeg_compressibility:1.0,redness:0.2")
    values, info = reward(torch.rand(2, 3, 16, 16), ["a", "b"], [{}, {}])
    assert values.shape == (2,) and info["redness"].shape == (2,)
