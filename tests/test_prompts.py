"""Prompt functions: names, metadata, files, and the official list of 32."""

import json
import random
from importlib import resources

import numpy as np
import pytest
import torch

from ddpo_pytorch.data import fundus
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
from ddpo_pytorch.utils.errors import UserError


def test_asset_is_the_official_list_in_order():
    lines = (resources.files("ddpo_pytorch") / "assets" / "isic_prompts.txt").read_text().splitlines()
    assert tuple(lines) == CAPTIONS


def test_isic_captions_are_drawn_uniformly_or_by_index_and_labelled():
    rng = np.random.default_rng(0)
    drawn = [isic_all(rng) for _ in range(3200)]
    counts = [sum(prompt == caption for prompt, _ in drawn) for caption in CAPTIONS]
    # 32 cells of mean 100: chi-square with 31 degrees of freedom exceeds 61.1 with probability 0.001
    assert sum((count - 100) ** 2 / 100 for count in counts) < 61.1
    assert all(metadata == {"label": list(labels_of(prompt))} for prompt, metadata in drawn)
    assert [isic_all_idx(i)[0] for i in range(32)] == list(CAPTIONS)
    assert isic_all_idx(1) == (CAPTIONS[1], {"label": [0, 0, 0, 1, 1, 0]})
    for idx in (-1, 32, "a"):
        with pytest.raises(UserError, match=rf"prompt_fn_kwargs.idx is {idx!r}; .*\[0, 31\]"):
            isic_all_idx(idx)


def test_files_as_editors_and_spreadsheets_write_them(tmp_path, monkeypatch, caplog):
    file = tmp_path / "mine.txt"
    file.write_bytes(f"\ufeffa cat\r\n\r\n  a dog\t \r\na caf\u00e9\ra cat\n{CAPTIONS[5]}\n".encode())
    lines = ["a cat", "a dog", "a caf\u00e9", "a cat", CAPTIONS[5]]
    assert read_prompts(file) == read_prompts(file) == lines
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "line 5 repeats line 1" in warning and "'a cat'" in warning
    monkeypatch.chdir(tmp_path)
    assert read_prompts("mine.txt", low=1) == lines[1:] and read_prompts("isic_prompts.txt", 0, 2) == list(CAPTIONS[:2])
    assert from_file("mine.txt", 0, 1) == ("a cat", {})
    assert from_file("mine.txt", 4, rng=random.Random(3)) == (CAPTIONS[5], {"label": list(labels_of(CAPTIONS[5]))})
    assert all_prompts("from_file", path=file, high=4) == [("a cat", {}), ("a dog", {}), ("a caf\u00e9", {})]


def test_from_file_errors_say_what_to_do(tmp_path):
    for name, content in (("empty.txt", b"\n\n"), ("picture.png", b"\x89PNG\xff"), ("wide.txt", "a".encode("utf-16"))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name}'.* (0 prompts|not UTF-8)"):
            from_file(tmp_path / name)
    with pytest.raises(UserError, match="'absent.txt' does not exist; give a path"):
        from_file("absent.txt")
    for bounds in ({"low": -1}, {"low": 1.5}, {"low": 2, "high": 1}, {"low": 32}):
        with pytest.raises(UserError, match="prompt_fn_kwargs.low|prompt_fn_kwargs.high"):
            read_prompts("isic_prompts.txt", **bounds)


def test_captions_are_drawn_as_often_as_images_have_them_and_given_ones_get_the_prefix_of_training(tmp_path):
    (path := tmp_path / "t.csv").write_text("path,Text\n" + "".join(f"{n}.png,{'AB'[n > 8]}\n" for n in range(10)))
    draw = get_prompt_fn("fundus_table", path=path)
    drawn = [draw_prompt(draw, seed)[0] for seed in range(400)]
    assert 15 < drawn.count("Fundus: B") < 70 and set(drawn) == {"Fundus: A", "Fundus: B"}
    assert [prompt for prompt, _ in all_prompts("fundus_table", path=path)] == ["Fundus: A", "Fundus: B"]
    assert given_prompts(("drusen", "OCT: scar"), "fundus") == ["Fundus: drusen", "OCT: scar"]


def test_composed_prompts_cross_what_captions_say(tmp_path):
    """Findings that stand alone, in the severities and the spelling that captions give them, in both eyes."""
    shown = ("mild nonproliferative retinopathy", "Severe non-proliferative retinopathy", "drusen", "drusen, lens dust")
    texts = [f"The {'left' if n % 2 else 'right'} eye fundus image shows {one}." for n, one in enumerate(shown)]
    texts += ["The LEFT eye fundus image shows mild non proliferative retinopathy.", "A glaucoma."]
    (path := tmp_path / "t.csv").write_text("path,Text\n" + "".join(f'{n}.png,"{t}"\n' for n, t in enumerate(texts)))
    (model := tmp_path / "sd" / "latents" / "train").mkdir(parents=True)
    with pytest.raises(UserError, match="has no .*index.json"):
        all_prompts("composed", path=tmp_path / "sd")
    (model / "index.json").write_text(json.dumps({"captions": fundus.caption_list(fundus.read_split(path))}))
    for place in (path, tmp_path / "sd"):
        found = [prompt for prompt, _ in all_prompts("composed", path=place)]
        words = ("mild non proliferative retinopathy", shown[1], "drusen")
        assert sorted(found) == sorted(
            f"Fundus: The {eye} eye fundus image shows {one}." for one in words for eye in ("left", "right")
        )
    # drusen, of one severity, are as frequent as retinopathy, of two: 200 of 400, with a standard deviation of 10
    drawn = [draw_prompt(get_prompt_fn("composed", path=path), seed)[0] for seed in range(400)]
    assert 150 < sum("drusen" in prompt for prompt in drawn) < 250 and set(drawn) == set(found)
    assert all_prompts("composed", path=path, templates=("A {finding}.",)) == [("Fundus: A glaucoma.", {})]
    for templates, named in ((("{eye}",), "lacks {finding}"), (("No {finding}",), "No .*prompt_fn_kwargs.templates")):
        with pytest.raises(UserError, match=named):
            all_prompts("composed", path=path, templates=templates)


def test_names_and_arguments_that_do_not_fit_are_refused():
    for name in ("isic_all", "isic_all_idx"):
        assert all_prompts(name) == [isic_all_idx(i) for i in range(32)]
    assert set(PROMPTS) == set(PROMPT_LISTS) == {"isic_all", "isic_all_idx", "from_file", "fundus_table", "composed"}
    for look_up in (get_prompt_fn, all_prompts):
        with pytest.raises(UserError, match="'nothing' .*composed, from_file, fundus_table, isic_all, isic_all_idx"):
            look_up("nothing")
        with pytest.raises(UserError, match="prompt_fn_kwargs .* do not fit"):
            look_up("isic_all", path="x")


@pytest.mark.parametrize(
    ("character", "name"),
    [("\u200d", "U+200D (ZERO WIDTH JOINER)"), ("\0", "U+0000 (NUL)"), ("\x85", "U+0085"), ("\u202e", "U+202E")],
)
def test_invisible_characters_are_named_with_their_place(tmp_path, character, name):
    file, text = tmp_path / "prompts.txt", f"a{character}cat"
    file.write_text(f"a dog\n\n{text}\n", newline="")
    for call, where in (
        (lambda: read_prompts(file), f"prompt file {str(file)!r} line 3"),
        (lambda: given_prompts(("a dog", text)), "eval.prompts, prompt 2"),
        (lambda: as_prompt((text, {}), "mine"), "prompt function 'mine'"),
    ):
        with pytest.raises(UserError) as caught:
            call()
        assert all(word in str(caught.value) for word in (where, name, "position 2"))


@pytest.mark.parametrize("value", [1, None, ("a", "b")])
def test_given_prompts_are_texts(value):
    with pytest.raises(UserError, match=f"eval.prompts, prompt 2 is .*{type(value).__name__}"):
        given_prompts(("a dog", value))


def test_text_of_any_language_is_a_prompt():
    for text in ("cup/disc ratio 0.6", "na\u00efve caf\u00e9 \u2013 50 %", "\u76ae\u819a", "\U0001f9b4 bone"):
        check_prompt(text)
    for text in ("", "  ", "a\udc80mole"):
        with pytest.raises(UserError):
            check_prompt(text)


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
    assert torch.equal(states[2], torch.get_rng_state()) and draw_prompt(isic_all, 5) == isic_all(random.Random(5))


def test_arguments_may_have_any_name(monkeypatch):
    monkeypatch.setitem(PROMPTS, "mine", lambda name="cat": f"a {name}")
    monkeypatch.setitem(PROMPT_LISTS, "mine", lambda name="cat": [f"a {name}"])
    assert draw_prompt(get_prompt_fn("mine", name="dog"), 0) == ("a dog", {})
    assert all_prompts("mine", name="dog") == [("a dog", {})]


@pytest.mark.parametrize("result", [None, (), ("a cat",), ("a cat", None), (1, {}), ["a", "b"], {"a": 1}], ids=repr)
def test_functions_return_a_string_or_a_pair(result):
    assert draw_prompt(lambda: "ab", 0) == ("ab", {})  # two characters are no pair
    assert draw_prompt(lambda rng: ["a cat", {"n": 1}], 0) == ("a cat", {"n": 1})
    with pytest.raises(UserError, match="'<lambda>'.*return prompt"):
        draw_prompt(lambda: result, 0)


def test_a_list_of_ones_own(monkeypatch):
    monkeypatch.setitem(PROMPTS, "mine", lambda: "a cat")
    with pytest.raises(UserError) as caught:
        all_prompts("mine")
    assert all(text in str(caught.value) for text in ("'mine'", "PROMPT_LISTS", "eval.prompts", "held_out.every=0"))
    monkeypatch.setitem(PROMPT_LISTS, "mine", lambda: ["a cat", ("a dog", {"n": 1}), "a cat", CAPTIONS[0]])
    assert all_prompts("mine") == [("a cat", {}), ("a dog", {"n": 1}), isic_all_idx(0)]
    monkeypatch.setitem(PROMPT_LISTS, "mine", list)
    with pytest.raises(UserError, match="'mine'.*empty"):
        all_prompts("mine")
