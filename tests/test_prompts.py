"""Prompt functions: names, metadata, files, and the official list of 32."""

import random
from importlib import resources

import numpy as np
import pytest
import torch
from ml_collections import ConfigDict

from ddpo_pytorch.data.isic import CAPTIONS, labels_of
from ddpo_pytorch.errors import UserError
from ddpo_pytorch.objective import make_objective
from ddpo_pytorch.prompts import (
    PROMPTS,
    all_prompts,
    check_prompt,
    from_file,
    get_prompt_fn,
    isic_all,
    isic_all_idx,
    read_prompts,
)


def test_asset_is_the_official_list_in_order():
    lines = (resources.files("ddpo_pytorch") / "assets" / "isic_prompts.txt").read_text().splitlines()
    assert tuple(lines) == CAPTIONS
    assert lines[0] == "a dermoscopic image with melanoma (MEL) with no visible artifacts"
    assert lines[3] == "a dermoscopic image with melanoma (MEL) showing ruler, ink"
    assert lines[31] == "a dermoscopic image with melanocytic nevus (NV) showing hair, gel bubble, ruler, ink"


@pytest.mark.parametrize("make_rng", [random.Random, np.random.default_rng])
def test_isic_all_is_seeded_uniform_and_labelled(make_rng):
    rng = make_rng(0)
    drawn = [isic_all(rng) for _ in range(3200)]
    again = make_rng(0)
    assert drawn[:50] == [isic_all(again) for _ in range(50)]
    counts = [sum(prompt == caption for prompt, _ in drawn) for caption in CAPTIONS]
    # 32 cells of mean 100: chi-square with 31 degrees of freedom exceeds 61.1 with probability 0.001
    assert sum((count - 100) ** 2 / 100 for count in counts) < 61.1
    assert all(metadata == {"label": list(labels_of(prompt))} for prompt, metadata in drawn)


def test_isic_all_idx_walks_the_list_and_refuses_the_rest():
    assert [isic_all_idx(i)[0] for i in range(32)] == list(CAPTIONS)
    assert isic_all_idx(1) == (CAPTIONS[1], {"label": [0, 0, 0, 1, 1, 0]})
    for idx in (-1, 32):
        with pytest.raises(UserError, match=f"{idx} is out of range.*0 to 31"):
            isic_all_idx(idx)


def test_from_file_takes_paths_assets_and_ranges(tmp_path, monkeypatch):
    file = tmp_path / "mine.txt"
    file.write_text(f"a cat\n\n  a dog \n{CAPTIONS[5]}\n")
    assert read_prompts(file) == ["a cat", "a dog", CAPTIONS[5]]
    monkeypatch.chdir(tmp_path)
    assert read_prompts("mine.txt", low=1) == ["a dog", CAPTIONS[5]]
    assert read_prompts("isic_prompts.txt", 0, 2) == list(CAPTIONS[:2])
    assert from_file("mine.txt", 0, 1) == ("a cat", {})
    assert from_file("mine.txt", 2, rng=random.Random(3)) == (CAPTIONS[5], {"label": list(labels_of(CAPTIONS[5]))})


def test_from_file_errors_say_what_to_do(tmp_path):
    with pytest.raises(UserError, match="'absent.txt' does not exist; give a path"):
        from_file("absent.txt")
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(UserError, match="has no prompts"):
        from_file(tmp_path / "empty.txt")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe")
    with pytest.raises(UserError, match="not UTF-8 text"):
        from_file(tmp_path / "picture.png")


def test_lookup_by_name():
    assert get_prompt_fn("isic_all").func is isic_all
    with pytest.raises(
        UserError, match="'imagenet_animals' is unknown.*from_file, fundus_table, isic_all, isic_all_idx"
    ):
        get_prompt_fn("imagenet_animals")


def test_all_prompts_lists_every_set_once(tmp_path):
    (tmp_path / "twice.txt").write_text("a cat\na dog\na cat\n")
    assert all_prompts("from_file", path=tmp_path / "twice.txt") == [("a cat", {}), ("a dog", {})]
    for name in ("isic_all", "isic_all_idx"):
        assert all_prompts(name) == [isic_all_idx(i) for i in range(32)]
    with pytest.raises(UserError, match="prompt_fn_kwargs .* do not fit"):
        all_prompts("isic_all", path="x")
    with pytest.raises(UserError, match="is unknown"):
        all_prompts("nothing")
    assert set(PROMPTS) == {"isic_all", "isic_all_idx", "from_file", "fundus_table"}


@pytest.mark.parametrize("line", ["a\tmole", "a\x07mole", "a\udc80mole"])
def test_training_refuses_prompts_that_eval_would_refuse_after_it(line, tmp_path):
    """Everything else, slashes and long texts too, can be trained and drawn."""
    path = tmp_path / "prompts.txt"
    path.write_text("cup/disc ratio 0.6\n" + "long " * 100 + "\n")
    given = [ConfigDict({"path": str(path)}), "jpeg_compressibility", ConfigDict(), ConfigDict({"every": 0})]
    objective = make_objective("from_file", *given, ConfigDict(), 0, torch.device("cpu"))
    assert [prompt for prompt, _ in objective.prompts] == ["cup/disc ratio 0.6", ("long " * 100).strip()]
    if line.isascii():
        path.write_text(f"{line}\n")
        with pytest.raises(UserError) as error:
            make_objective("from_file", *given, ConfigDict(), 0, torch.device("cpu"))
        assert repr(line) in str(error.value)
    with pytest.raises(UserError):
        check_prompt(line)
