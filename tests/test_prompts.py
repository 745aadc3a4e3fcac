"""Prompt functions: names, metadata, files, and the official list of 32."""

import json
import random
from importlib import resources

import numpy as np
import pytest
import torch
from refusals import refused

from ddpo_pytorch import prompts
from ddpo_pytorch.data import fundus
from ddpo_pytorch.data.isic import CAPTIONS, labels_of
from ddpo_pytorch.prompts import PROMPT_LISTS, PROMPTS, all_prompts, draw_prompt, from_file, get_prompt_fn, isic_all


def test_isic_captions_are_the_official_list_drawn_uniformly_or_by_index_and_labelled():
    lines = (resources.files("ddpo_pytorch") / "assets" / "isic_prompts.txt").read_text().splitlines()
    assert tuple(lines) == CAPTIONS
    rng = np.random.default_rng(0)
    drawn = [isic_all(rng) for _ in range(3200)]
    counts = [sum(prompt == caption for prompt, _ in drawn) for caption in CAPTIONS]
    # 32 cells of mean 100: chi-square with 31 degrees of freedom exceeds 61.1 with probability 0.001
    assert sum((count - 100) ** 2 / 100 for count in counts) < 61.1
    assert all(metadata == {"label": list(labels_of(prompt))} for prompt, metadata in drawn)
    assert [prompts.isic_all_idx(i)[0] for i in range(32)] == list(CAPTIONS)
    ink = "a dermoscopic image with melanoma (MEL) showing ink"
    assert prompts.isic_all_idx(1) == (ink, {"label": [0, 0, 0, 1, 1, 0]})
    for idx in (-1, 32, "a"):
        refused(rf"prompt_fn_kwargs.idx is {idx!r}; .*\[0, 31\]", prompts.isic_all_idx, idx)


def test_files_as_editors_and_spreadsheets_write_them_or_other_ones(tmp_path, monkeypatch, caplog):
    file = tmp_path / "mine.txt"
    file.write_bytes(f"\ufeffa cat\r\n\r\n  a dog\t \r\na caf\u00e9\ra cat\n{CAPTIONS[5]}\n".encode())
    lines = ["a cat", "a dog", "a caf\u00e9", "a cat", CAPTIONS[5]]
    assert prompts.read_prompts(file) == prompts.read_prompts(file) == lines
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "line 5 repeats line 1" in warning and "'a cat'" in warning
    monkeypatch.chdir(tmp_path)
    assert prompts.read_prompts("mine.txt", low=1) == lines[1:]
    assert prompts.read_prompts("isic_prompts.txt", 0, 2) == list(CAPTIONS[:2])
    assert from_file("mine.txt", 0, 1) == ("a cat", {})
    assert from_file("mine.txt", 4, rng=random.Random(3)) == (CAPTIONS[5], {"label": list(labels_of(CAPTIONS[5]))})
    assert all_prompts("from_file", path=file, high=4) == [("a cat", {}), ("a dog", {}), ("a caf\u00e9", {})]
    for name, content in (("empty.txt", b"\n\n"), ("picture.png", b"\x89PNG\xff"), ("wide.txt", "a".encode("utf-16"))):
        (tmp_path / name).write_bytes(content)
        refused(f"{name}'.* (0 prompts|not UTF-8)", from_file, tmp_path / name)
    refused("'absent.txt' does not exist; give a path", from_file, "absent.txt")
    for bounds in ({"low": -1}, {"low": 1.5}, {"low": 2, "high": 1}, {"low": 32}):
        refused("prompt_fn_kwargs.low|prompt_fn_kwargs.high", prompts.read_prompts, "isic_prompts.txt", **bounds)


def test_captions_are_drawn_as_often_as_images_have_them_and_given_ones_get_the_prefix_of_training(tmp_path):
    (path := tmp_path / "t.csv").write_text("path,Text\n" + "".join(f"{n}.png,{'AB'[n > 8]}\n" for n in range(10)))
    draw = get_prompt_fn("fundus_table", path=path)
    drawn = [draw_prompt(draw, seed)[0] for seed in range(400)]
    assert 15 < drawn.count("Fundus: B") < 70 and set(drawn) == {"Fundus: A", "Fundus: B"}
    assert [prompt for prompt, _ in all_prompts("fundus_table", path=path)] == ["Fundus: A", "Fundus: B"]
    assert prompts.given_prompts(("drusen", "OCT: scar"), "fundus") == ["Fundus: drusen", "OCT: scar"]


def test_composed_prompts_cross_what_captions_say(tmp_path):
    """Findings that stand alone, in the severities and the spelling that captions give them, in both eyes."""
    shown = ("mild nonproliferative retinopathy", "Severe non-proliferative retinopathy", "drusen", "drusen, lens dust")
    texts = [f"The {'left' if n % 2 else 'right'} eye fundus image shows {one}." for n, one in enumerate(shown)]
    texts += ["The LEFT eye fundus image shows mild non proliferative retinopathy.", "A glaucoma."]
    (path := tmp_path / "t.csv").write_text("path,Text\n" + "".join(f'{n}.png,"{t}"\n' for n, t in enumerate(texts)))
    (model := tmp_path / "sd" / "latents" / "train").mkdir(parents=True)
    refused("has no .*index.json", all_prompts, "composed", path=tmp_path / "sd")
    (model / "index.json").write_text(json.dumps({"captions": fundus.caption_list(fundus.read_split(path))}))
    for place in (path, tmp_path / "sd"):
        found = [prompt for prompt, _ in all_prompts("composed", path=place)]
        words = ("mild non proliferative retinopathy", shown[1], "drusen")
        texts = [f"Fundus: The {eye} eye fundus image shows {one}." for one in words for eye in ("left", "right")]
        assert sorted(found) == sorted(texts)
    # drusen, of one severity, are as frequent as retinopathy, of two: 200 of 400, with a standard deviation of 10
    drawn = [draw_prompt(get_prompt_fn("composed", path=path), seed)[0] for seed in range(400)]
    assert 150 < sum("drusen" in prompt for prompt in drawn) < 250 and set(drawn) == set(found)
    assert all_prompts("composed", path=path, templates=("A {finding}.",)) == [("Fundus: A glaucoma.", {})]
    for templates, named in ((("{eye}",), "lacks {finding}"), (("No {finding}",), "No .*prompt_fn_kwargs.templates")):
        refused(named, all_prompts, "composed", path=path, templates=templates)


def test_names_and_arguments_that_do_not_fit_are_refused():
    for name in ("isic_all", "isic_all_idx"):
        assert all_prompts(name) == [prompts.isic_all_idx(i) for i in range(32)]
    assert set(PROMPTS) == set(PROMPT_LISTS) == {"isic_all", "isic_all_idx", "from_file", "fundus_table", "composed"}
    for look_up in (get_prompt_fn, all_prompts):
        refused("'nothing' .*composed, from_file, fundus_table, isic_all, isic_all_idx", look_up, "nothing")
        refused("prompt_fn_kwargs .* do not fit", look_up, "isic_all", path="x")


def test_invisible_characters_are_named_with_their_place(tmp_path):
    file = tmp_path / "prompts.txt"
    names = {"\u200d": "U+200D (ZERO WIDTH JOINER)", "\0": "U+0000 (NUL)", "\x85": "U+0085", "\u202e": "U+202E"}
    for character, name in names.items():
        text = f"a{character}cat"
        file.write_text(f"a dog\n\n{text}\n", newline="")
        for where, call, *given in (
            (f"prompt file {str(file)!r} line 3", prompts.read_prompts, file),
            ("eval.prompts, prompt 2", prompts.given_prompts, ("a dog", text)),
            ("prompt function 'mine'", prompts.as_prompt, (text, {}), "mine"),
        ):
            refused([where, name, "position 2"], call, *given)


def test_text_of_any_language_is_a_prompt_and_nothing_else():
    for value in (1, None, ("a", "b")):
        refused(f"eval.prompts, prompt 2 is .*{type(value).__name__}", prompts.given_prompts, ("a dog", value))
    for text in ("cup/disc ratio 0.6", "na\u00efve caf\u00e9 \u2013 50 %", "\u76ae\u819a", "\U0001f9b4 bone"):
        prompts.check_prompt(text)
    for text, said in (("", "is blank"), ("  ", "is blank"), ("a\udc80mole", r"U\+DC80 .*position 2")):
        refused(said, prompts.check_prompt, text)


def test_functions_of_ddpo_pytorch_are_a_function_of_the_seed(monkeypatch):
    def like_ddpo_pytorch(nouns=("cat", "dog", "horse"), low=1, high=9):  # no `rng`; random numbers from anywhere
        return f"{random.randint(low, high)} {np.random.choice(nouns)}s, {torch.rand(1).item():.6f}", {"count": low}

    monkeypatch.setitem(PROMPTS, "mine", like_ddpo_pytorch)
    function = get_prompt_fn("mine", nouns=("bird", "fish"), low=3)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    drawn = [draw_prompt(function, seed) for seed in range(2**33, 2**33 + 20)]
    assert drawn == [draw_prompt(function, seed) for seed in range(2**33, 2**33 + 20)]
    assert len({text for text, _ in drawn}) == 20 and drawn[0][1] == {"count": 3}
    assert {text.split()[1] for text, _ in drawn} == {"birds,", "fishs,"}
    assert states[0] == random.getstate() and states[1] == np.random.get_state()[1].tolist()
    assert torch.equal(states[2], torch.get_rng_state()) and draw_prompt(isic_all, 5) == isic_all(random.Random(5))


@pytest.mark.parametrize("result", [None, (), ("a cat",), ("a cat", None), (1, {}), ["a", "b"], {"a": 1}], ids=repr)
def test_functions_return_a_string_or_a_pair(result):
    assert draw_prompt(lambda: "ab", 0) == ("ab", {})  # two characters are no pair
    assert draw_prompt(lambda rng: ["a cat", {"n": 1}], 0) == ("a cat", {"n": 1})
    refused("'<lambda>'.*return prompt", draw_prompt, lambda: result, 0)


def test_a_list_of_ones_own(monkeypatch):
    monkeypatch.setitem(PROMPTS, "mine", lambda name="cat": f"a {name}")
    refused(["'mine'", "PROMPT_LISTS", "eval.prompts", "held_out.every=0"], all_prompts, "mine")
    monkeypatch.setitem(PROMPT_LISTS, "mine", lambda: ["a cat", ("a dog", {"n": 1}), "a cat", CAPTIONS[0]])
    assert all_prompts("mine") == [("a cat", {}), ("a dog", {"n": 1}), prompts.isic_all_idx(0)]
    monkeypatch.setitem(PROMPT_LISTS, "mine", lambda name: [f"a {name}"])  # arguments may have any name
    assert [draw_prompt(get_prompt_fn("mine", name="dog"), 0)] == all_prompts("mine", name="dog") == [("a dog", {})]
    monkeypatch.setitem(PROMPT_LISTS, "mine", list)
    refused("'mine'.*empty", all_prompts, "mine")
