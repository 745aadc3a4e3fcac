"""Prompt functions: names, metadata, files, and the official list of 32."""

import random
from importlib import resources

import numpy as np
import pytest
import torch
from ml_collections import ConfigDict

from ddpo_pytorch.data.isic import CAPTIONS, labels_of
from ddpo_pytorch.prompts import (
    PROMPT_LISTS,
    PROMPTS,
    all_prompts,
    as_prompt,
    check_prompt,
    draw_prompt,
    from_file,
    get_prompt_fn,
    given_prompts,
    isic_all,
    isic_all_idx,
    read_prompts,
)
from ddpo_pytorch.training.setup import make_task
from ddpo_pytorch.utils.errors import UserError


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
    config = ConfigDict({"prompt_fn": "from_file", "prompt_fn_kwargs": {"path": str(path)}, "reward_fn_kwargs": {}})
    config.update({"reward_fn": "jpeg_compressibility", "held_out": {"every": 0}, "seed": 0})
    task = make_task(config, torch.device("cpu"))
    assert [prompt for prompt, _ in task.prompts] == ["cup/disc ratio 0.6", ("long " * 100).strip()]
    if line.isascii():
        path.write_text(f"{line}\n")
        with pytest.raises(UserError) as error:
            make_task(config, torch.device("cpu"))
        assert repr(line) in str(error.value)
    with pytest.raises(UserError):
        check_prompt(line)


def test_files_as_editors_and_spreadsheets_write_them(tmp_path, caplog):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa cat\r\n\r\n  a dog\t \r\na caf\u00e9\ra cat".encode())
    assert read_prompts(file) == ["a cat", "a dog", "a caf\u00e9", "a cat"]
    read_prompts(file)
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "line 5 repeats line 1" in warning and "'a cat'" in warning


@pytest.mark.parametrize(
    ("character", "name"),
    [
        ("\u200d", "U+200D (ZERO WIDTH JOINER)"),
        ("\ufeff", "U+FEFF (ZERO WIDTH NO-BREAK SPACE)"),
        ("\0", "U+0000 (NUL)"),
        ("\t", "U+0009 (tab)"),
        ("\x0b", "U+000B"),
        ("\x85", "U+0085"),
        ("\u2028", "U+2028 (LINE SEPARATOR)"),
        ("\u00a0", "U+00A0 (NO-BREAK SPACE)"),
        ("\u00ad", "U+00AD (SOFT HYPHEN)"),
        ("\u202e", "U+202E"),
        ("\u3164", "U+3164 (HANGUL FILLER)"),
        ("\ufe0f", "U+FE0F"),
    ],
)
def test_invisible_characters_are_named_with_their_place(tmp_path, character, name):
    file = tmp_path / "prompts.txt"
    file.write_text(f"a dog\n\na{character}cat\n", newline="")
    for call, where in (
        (lambda: read_prompts(file), f"prompt file {str(file)!r} line 3"),
        (lambda: given_prompts(("a dog", f"a{character}cat")), "eval.prompts, prompt 2"),
        (lambda: as_prompt((f"a{character}cat", {}), "mine"), "prompt function 'mine'"),
    ):
        with pytest.raises(UserError) as caught:
            call()
        assert where in str(caught.value) and name in str(caught.value) and "position 2" in str(caught.value)


def test_text_of_any_language_is_a_prompt():
    for text in (
        "cup/disc ratio 0.6",
        "na\u00efve caf\u00e9 \u2013 50 %",
        "\u76ae\u819a\u955c",
        "\u0645\u0644\u0627\u0646\u0648\u0645\u0627",
        "\U0001f9b4 bone",
    ):
        check_prompt(text)
    for text in ("", "  "):
        with pytest.raises(UserError, match="blank"):
            check_prompt(text)


@pytest.mark.parametrize(
    ("content", "line", "kind"),
    [
        (b"a cat\na \xff dog\n", 2, "not UTF-8"),
        ("a cat\na dog".encode("utf-16"), 1, "UTF-16"),
    ],
)
def test_other_encodings_are_named_with_the_line(tmp_path, content, line, kind):
    (tmp_path / "prompts.txt").write_bytes(content)
    with pytest.raises(UserError, match=f"prompts.txt' line {line}: .*{kind}"):
        read_prompts(tmp_path / "prompts.txt")


@pytest.mark.parametrize("bounds", [{"low": -1}, {"high": -3}, {"low": 1.5}, {"low": 2, "high": 1}, {"low": 32}])
def test_bounds_that_select_nothing_or_count_backwards(bounds):
    with pytest.raises(UserError, match="prompt_fn_kwargs.low|prompt_fn_kwargs.high"):
        read_prompts("isic_prompts.txt", **bounds)


def ddpo_pytorch_prompt(nouns=("cat", "dog", "horse"), low=1, high=9):
    """As the functions of ddpo-pytorch: no `rng`, and random numbers from wherever it likes."""
    return f"{random.randint(low, high)} {np.random.choice(nouns)}s, {torch.rand(1).item():.6f}", {"count": low}


def test_functions_of_ddpo_pytorch_are_a_function_of_the_seed(monkeypatch):
    monkeypatch.setitem(PROMPTS, "mine", ddpo_pytorch_prompt)
    function = get_prompt_fn("mine", nouns=("bird", "fish"), low=3)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    drawn = [draw_prompt(function, seed) for seed in range(2**33, 2**33 + 20)]
    assert drawn == [draw_prompt(function, seed) for seed in range(2**33, 2**33 + 20)]
    assert len({text for text, _ in drawn}) == 20 and drawn[0][1] == {"count": 3}
    assert {text.split()[1] for text, _ in drawn} == {"birds,", "fishs,"}
    assert states[0] == random.getstate() and states[1] == np.random.get_state()[1].tolist()
    assert torch.equal(states[2], torch.get_rng_state())
    assert draw_prompt(isic_all, 5) == isic_all(random.Random(5))
    with pytest.raises(UserError, match="'mine'.*nouns, low, high.*colour"):
        get_prompt_fn("mine", colour="red")


def test_functions_may_return_a_string(monkeypatch):
    assert draw_prompt(lambda: "ab", 0) == ("ab", {})  # two characters are no pair
    assert draw_prompt(lambda rng: ["a cat", {"n": 1}], 0) == ("a cat", {"n": 1})
    assert draw_prompt(get_prompt_fn("isic_all"), 1)[1]["label"]


@pytest.mark.parametrize(
    "result", [None, 3, (), ("a cat",), ("a cat", None), ("a cat", {}, 1), (1, {}), ["a", "b"], {"a": 1}], ids=repr
)
def test_other_results_are_refused_by_name(result):
    def mine():
        return result

    with pytest.raises(UserError, match="'mine'.*return prompt"):
        draw_prompt(mine, 0)


def test_a_function_without_a_list_is_known(monkeypatch):
    monkeypatch.setitem(PROMPTS, "mine", lambda: "a cat")
    with pytest.raises(UserError) as caught:
        all_prompts("mine")
    assert all(text in str(caught.value) for text in ("'mine'", "PROMPT_LISTS", "eval.prompts", "held_out.every=0"))
    monkeypatch.setitem(PROMPT_LISTS, "mine", lambda: ["a cat", ("a dog", {"n": 1}), "a cat", CAPTIONS[0]])
    assert all_prompts("mine") == [("a cat", {}), ("a dog", {"n": 1}), isic_all_idx(0)]
    monkeypatch.setitem(PROMPT_LISTS, "mine", list)
    with pytest.raises(UserError, match="'mine'.*empty"):
        all_prompts("mine")


def test_a_function_that_is_defined_but_not_entered_is_told_apart():
    with pytest.raises(UserError, match="'read_prompts' is unknown.*add the function"):
        get_prompt_fn("read_prompts")
