"""The report: verdicts, sentences, tables and cards from made-up measurements with known answers."""

import copy
import html.parser
import re
from collections import defaultdict

import pytest
from report_example import MODELS, full_example, fundus_result, minimal_result, quantity

from ddpo_pytorch.data.isic import CAPTIONS, SINGLE_ARTIFACT_CAPTIONS
from ddpo_pytorch.report import findings
from ddpo_pytorch.report.page import Cell, Row, cell, common_beginning, counted, interval, methods, number, write_report
from ddpo_pytorch.report.pictures import rarest_first
from ddpo_pytorch.report.provenance import flatten
from ddpo_pytorch.utils.errors import UserError

VOID = {"meta", "img", "br", "link", "hr", "input", "source"}


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """(result, samples, runs) with two images a caption."""
    return full_example(tmp_path_factory.mktemp("example"), number=2)


@pytest.fixture
def result(example) -> dict:
    return copy.deepcopy(example[0])


@pytest.fixture(scope="module")
def page(example, tmp_path_factory) -> str:
    return write_report(tmp_path_factory.mktemp("page"), *example).read_text()


@pytest.fixture
def read(tmp_path):
    """Function (result, samples, runs): write the report and return its `Reader`."""
    return lambda result, samples={}, runs=(): Reader(write_report(tmp_path, result, samples, runs).read_text())


class Reader(html.parser.HTMLParser):
    """Text, tags and tables of a page; fails on tags that are not closed in order.

    `tables`: by caption the rows by head, each a list of (text, small text) cells.
    """

    def __init__(self, text: str):
        super().__init__()
        self.open, self.pieces, self.tags, self.parts = [], [], [], defaultdict(str)
        self.tables = defaultdict(dict)
        self.feed(text)
        self.close()
        assert not self.open, self.open
        self.text = " ".join(" ".join(self.pieces).split()).replace("\u00a0", " ")

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("caption", "tr"):
            self.parts[tag], self.cells = "", []
        elif tag in ("th", "td"):
            self.cells.append(["", ""])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "tr":
            head, *cells = self.cells
            self.tables[self.parts["caption"]][head[0]] = [tuple(one) for one in cells]

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.pieces.append(data)
        if "caption" in self.open:
            self.parts["caption"] += data
        elif {"th", "td"} & set(self.open):
            self.cells[-1]["small" in self.open] += data


def test_numbers_as_text():
    assert [number(one, ".1f") for one in (-1.5, None)] == ["−1.5", "n/a"]
    assert interval({"low": -0.01, "high": 0.5}, ".1f", 100) == "[−1.0, 50.0]"
    assert interval({"low": None, "high": 1.0}) == ""
    assert cell({"value": 0.5, "low": 0.4, "high": 0.6, "how": "x"}, ".0f", 100) == Cell("50", "[40, 60]", "x")
    assert cell(0.25) == Cell("0.25") and cell({"value": None}) == cell(None) == Cell("n/a")
    assert [counted(n, "image") for n in (0, 1, 1281)] == ["0 images", "1 image", "1,281 images"]
    assert common_beginning(["a b c", "a b d"]) == "a b " and common_beginning(["a b", "a b c"]) == "a "
    assert common_beginning(["only one"]) == ""
    assert flatten({"a": {"b": 1, "c": None}, "d": list(range(9)), "e": ""}) == [
        ("a.b", "1"), ("a.c", "(none)"), ("d", "9 entries, the first: 0"), ("e", "(empty)")
    ]  # fmt: skip
    ways = [Cell("", "[]", f"exact binomial, {n} trials") for n in (24, 16)] + [Cell("", "[]", "boot 9"), Cell("n/a")]
    assert methods([Row("", "", ways)]) == "exact binomial, … trials; boot 9"


def compared(value, low, high, p=None, **more) -> dict:
    """Return a measurement of two models whose APR differs by these numbers."""
    result = minimal_result()
    base = result["models"]["SD"]
    result["models"]["SD+RL"] = copy.deepcopy(base)
    difference = {"value": value, "low": low, "high": high, "n": 512, "how": "bootstrap"}
    one = {"from": "SD", "to": "SD+RL", "APR": difference, "from_APR": 0.4, "to_APR": 0.4 + (value or 0), "p": p}
    one |= {"p_by_prompt": None, "paired": True, "reason": "", "pairs": 512, "gained": 150, "lost": 48, "prompts": 32}
    return result | {"comparisons": [one | more]}


@pytest.mark.parametrize(
    ("result", "word", "parts"),
    [
        (compared(0.2, 0.15, 0.25, 0.0001), "better", ["60.0", "40.0", "a gain of 20.0", "[+15.0, +25.0]", "< 0.001"]),
        (compared(0.2, 0.1, 0.3), "better", ["512 pairs", "150 gained", "48 lost"]),
        (compared(-0.2, -0.25, -0.15, 0.004), "worse", ["got worse, by 20.0", "[−25.0, −15.0]", "= 0.004"]),
        (compared(0.02, -0.01, 0.05, 0.2), "unclear", ["of +2.0", "contains 0", "none can be claimed", "= 0.200"]),
        (compared(0.02, 0.001, 0.04, 0.06), "unclear", ["interval and test disagree", "none can be claimed"]),
        (compared(0.2, 0.1, 0.3, 0.01, p_by_prompt=0.05), "unclear", ["p over prompts = 0.050"]),
        (compared(0.2, None, None), "unknown", ["without an interval"]),
        (compared(None, None, None), "", ["finds in 25.0 %"]),
    ],
)
def test_the_lead_states_the_verdict(result, word, parts, read):
    assert findings.verdict(result["comparisons"][0]) == word
    lead = read(result).text.split("The result in numbers")[0]
    assert all(part in lead for part in parts), lead
    assert ("a gain of" in lead) == (word == "better") and ("got worse" in lead) == (word == "worse")


@pytest.mark.parametrize(
    ("prompts", "by_prompt", "shared", "few"),
    [(2, None, 2, True), (1, None, 1, True), (3, None, None, True), (6, 0.03, None, False), (6, None, None, False)],
)
def test_a_claim_about_few_prompts_is_about_these(prompts, by_prompt, shared, few, read):
    """Over fewer prompts than the models have, the rates are those of the images that were compared."""
    result = compared(0.2, 0.15, 0.25, 0.001, prompts=prompts, p_by_prompt=by_prompt)
    result["models"]["SD"]["images_by_prompt"] = {"a": 9, "b": 9, "c": 1}
    (one,) = findings.comparisons(result)
    assert (one["shared"], one["few"], one["before"], one["after"]) == (shared, few, 0.4, pytest.approx(0.6))
    text = read(result).text
    assert (f"over the {shared} prompts" in text) == (shared == 2) and ("the one prompt" in text) == (shared == 1)
    assert ("no test over prompts" in text) == few


@pytest.mark.parametrize(("change", "hacked"), [(-0.01, True), (0.01, True), (0.2, False)])
def test_a_reward_that_rises_alone_is_remarked(change, hacked, read):
    result = compared(change, change - 0.05, change + 0.05)
    result["models"]["SD"]["reward"], result["models"]["SD+RL"]["reward"] = 0.7, 0.9
    assert findings.comparisons(result)[0]["reward"] == ((0.7, 0.9) if hacked else None)
    text = read(result).text
    assert ("rose from 0.700 to 0.900" in text) == hacked and ("no gain in APR" in text) == (change == 0.01)


@pytest.mark.parametrize(
    ("after", "change", "overlap"), [(4.0, "fell", False), (6.4, "rose", True), (6.0001, "same", True)]
)
def test_changes_of_diversity(after, change, overlap):
    result = compared(0.2, 0.1, 0.3)
    for name, value in (("SD", 6.0), ("SD+RL", after)):
        result["models"][name]["diversity"] = {"judge": {"vendi": quantity(value, 0.5, 9)}}
    (one,) = findings.changes_of_diversity(result)
    assert (one["measure"], one["extractor"], one["change"], one["overlap"]) == ("vendi", "judge", change, overlap)


def test_ceilings_are_those_of_the_models_mixes_of_captions(result, read):
    (one,) = findings.ceilings(result)
    assert (one["names"], one["share"], one["agreement"]["value"]) == (["SD", "SD+RL"], 29 / 32, 0.887)
    text = read(result).text
    assert "those of SD and SD+RL (for the 90.6 % of" in text and "in 88.7 % [85.7, 91.7]" in text
    result["models"]["SD"]["ceiling"]["value"], result["models"]["SD"]["ceiling_share"] = 0.7, 1.0
    assert [(one["names"], one["share"]) for one in findings.ceilings(result)] == [(["SD"], None), (["SD+RL"], 29 / 32)]
    for values in result["models"].values():
        values["ceiling"] = quantity(0, 0, 0) | {"value": None}
    assert findings.ceilings(result) == [] and "ceiling of APR is unknown" in read(result).text


@pytest.mark.parametrize(("low", "more"), [(0.011, True), (0.009, False)])
def test_memorisation_is_measured_by_real_images(low, more, result, read):
    del result["models"]["SD+RL"]["memorisation"]
    share = {"value": 0.02, "low": low, "high": 0.04, "how": "bootstrap"}
    result["models"]["SD"]["memorisation"] = {
        "judge": {"share_closer": share, "threshold": 0.25, "copies": 0, "closest": []}
    }
    text = read(result).text
    assert "SD (judge): 2.0 %" in text and "than 0.25," in text and ("that is more" in text) == more
    assert "No image is pixel for pixel" in text


def test_copies_stand_above_in_their_section_and_on_the_card(result, read):
    first = result["models"]["SD"]["folders"][0]
    first |= {"copies_of_training_images": 1, "near_copies_of_training_images": 3, "copies_of_real_images": 0}
    folder = result["models"]["SD+RL"]["folders"][0]
    result["models"]["SD+RL"]["folders"] = [folder, folder | {"copies_of_real_images": 2}]
    assert list(findings.copies(result["models"]["SD"]).values()) == [1, 3]
    assert findings.copies(result["models"]["SD+RL"]) == {"copies_of_real_images": 2}
    text = read(result).text
    for sentence in (
        "Of 512 images of SD, 1 is pixel for pixel a training image; 3 are near copies of training images, exact ones",
        "Of 512 images of SD+RL, 2 are pixel for pixel real images.",
    ):
        assert text.count(sentence) == 3
    assert "SD (judge)" not in re.findall(r"[^.]*No image is pixel", text)


def test_tables_hold_the_result(page, example):
    result, tables = example[0], Reader(page).tables
    rows = tables["The result in numbers"]
    apr = result["models"]["SD+RL"]["alignment"]["H4"]["APR"]
    assert rows["APR"][1] == (f"{100 * apr['value']:.2f}", f"[{100 * apr['low']:.2f}, {100 * apr['high']:.2f}]")
    assert rows["APR"][2][0] == "+29.35" and rows["APR"][3][0] == "91.50"  # difference, then real images
    assert rows["FID"] == [("91.07", "[87.97, 94.17]"), ("84.31", "[81.21, 87.41]"), ("", ""), ("–", "")]
    assert [text for text, _ in rows["Ceiling of APR"]] == ["88.70", "88.70", "", "–"]
    assert "LPIPS" not in rows and "Not available: LPIPS (no AlexNet weights" in Reader(page).text
    rows = tables["Table 2. Prompts with one artifact"]
    captions = [SINGLE_ARTIFACT_CAPTIONS[d, a] for d in ("MEL", "NV") for a in ("hair", "gel_bubble", "ink", "ruler")]
    counts = result["sets"]["real"]["images_by_prompt"]
    assert [text for text, _ in rows["# Real Sample"]] == [str(counts[caption]) for caption in captions]
    aprs = result["models"]["SD"]["APR_by_prompt"]
    assert [text for text, _ in rows["APR ↑ (%) SD"]] == [f"{100 * aprs[caption]:.2f}" for caption in captions]
    assert list(tables["Table 3. All prompts"])[1:] == list(MODELS)
    prompts = tables["All 32 prompts"]
    assert len(prompts) == 2 + 32 and prompts[CAPTIONS[5].removeprefix("a dermoscopic image with ")][0][0] == "16"
    assert tables["Attributes, judged by H6"]["gel bubble"][2] == ("256, 239", "")
    assert [text for text, _ in tables["Further judges"]["H6"]] == ["12.47", "35.95", "–"]
    assert tables["Diversity"]["Vendi score"][0] == ("6.31", "[6.11, 6.51]")
    assert tables["Nearness to training images"]["Threshold"][0] == ("0.2071", "")


def test_only_distances_of_inception_are_called_fid(page, result):
    tables = Reader(page).tables
    inception, judge = tables["Features of inception"], tables["Features of the judge"]
    assert "FID" in inception and "Frechet distance" in judge and "FID" not in judge
    assert [text for text, _ in inception["Images"]] == ["480, 480", "512, 1,281"] * 2
    assert inception["Precision"][1] == ("–", "")  # measured on matched images only
    assert Reader(page).text.count("shares that classifier's errors") == 2  # below the table and on the card


def test_folders_of_a_model_are_counted_with_the_images_of_one(result, read):
    values = result["models"]["SD+RL"]
    values["folders"] = [values["folders"][0] | {"images": n, "path": f"x{n}"} for n in (512, 520, 512)]
    values["images"] = 1544
    reader = read(result)
    smalls = [small for _, small in reader.tables["Features of inception"]["Images"]]
    assert smalls == ["", "", "3 folders of 480 images", "3 folders of 512 images or more"]
    assert reader.tables["The result in numbers"]["\u00a0"][1] == ("SD+RL", "n = 1,544 in 3 folders")
    assert "biased: SD (480 images), SD+RL (3 folders of 480 images)" in reader.text
    for values in result["models"].values():  # more images in all, and yet few behind each distance
        values["images"] = 9000
        assert findings.fewest_images(values) == 480
        values["fidelity"] = {}
        assert findings.fewest_images(values) == 512


def test_page_loads_nothing(page):
    reader = Reader(page)
    assert page.startswith("<!DOCTYPE html>")
    for tag, attributes in reader.tags:
        assert tag not in ("script", "link", "iframe", "source")
        assert attributes.get("src", "data:").startswith("data:")
        assert tag != "a" or attributes["href"].startswith("#")
        assert tag != "img" or attributes["alt"]
        assert tag != "th" or attributes["scope"] in ("row", "col", "colgroup")
    assert not re.search(r"url\(|@import|https?://", page)
    ids = [attributes["id"] for _, attributes in reader.tags if "id" in attributes]
    assert len(ids) == len(set(ids)) == 7
    assert {attributes["href"][1:] for tag, attributes in reader.tags if tag == "a"} == set(ids)
    assert all(digest in reader.text for digest in (f"{4:064x}", f"{9:064x}")) and "2.9.0" in reader.text
    for stated in ("Not for diagnosis", "began from the mini weights of the phantom world", "the phantom world, drawn"):
        assert stated in reader.text


def test_pictures_stand_in_rows_of_one_noise_rarest_first(page, example):
    alts = [attributes["alt"] for tag, attributes in Reader(page).tags if tag == "img"]
    counts = example[0]["sets"]["real"]["images_by_prompt"]
    rarest = rarest_first(CAPTIONS, counts)
    assert list(dict.fromkeys(alt.split(": ")[1] for alt in alts if alt.startswith("SD, ")))[:32] == rarest
    caption = rarest[5]
    rows = [f"real, PHANTOM_0000{i}: {caption}" for i in range(min(2, counts[caption]))]
    rows += [f"{name}, 0000{i}: {caption}" for name in MODELS for i in range(2)]
    first = alts.index(rows[0])
    assert alts[first : first + len(rows)] == rows


def test_foreign_text_is_escaped(example, result, tmp_path, read):
    evil = "<script>alert(1)</script>"
    image, runs = example[1]["SD"][0][0], example[2]
    model, run = f'{evil}" onload="x', tmp_path / "<script>"
    run.mkdir()
    (run / "metrics.jsonl").write_bytes((runs[0] / "metrics.jsonl").read_bytes())
    result["warnings"] = [evil]
    result["missing"][evil] = result["settings"][evil] = result["versions"][evil] = evil
    result["models"] = {f"{name}{model}": values for name, values in result["models"].items()}
    result["comparisons"][0] |= {"from": f"SD{model}", "to": f"SD+RL{model}", "paired": False, "reason": evil}
    for values in result["models"].values():
        values["memorisation"]["judge"]["closest"][0]["caption"] = model
        values["images_by_prompt"][evil] = 1
        values["alignment"][model] = values["alignment"]["H6"]
        values["fidelity"][model] = values["fidelity"]["inception"]
    reader = read(result, {name: [(image, f"{evil} & caption")] for name in result["models"]}, [run])
    assert "script" not in {tag for tag, _ in reader.tags}
    assert not any("onload" in attributes for _, attributes in reader.tags)
    assert reader.text.count(evil) > 30


def test_absent_blocks_leave_no_empty_headings(read):
    reader = read(minimal_result())
    for heading in ("Fidelity", "Training", "Samples by prompt", "Diversity and nearness", "Data card", "# Real"):
        assert heading not in reader.text
    assert "None" not in reader.text and "nan" not in reader.text.split()
    assert [tag for tag, _ in reader.tags].count("h2") == [tag for tag, _ in reader.tags].count("a") == 3
    assert "The judge finds in 25.0 %" in reader.text and "reward of SD (image_log.json states no" in reader.text
    assert "To be filled in: training data of the generator" in reader.text and "began from" not in reader.text


def test_a_page_of_fundus_images(read):
    reader = read(fundus_result())
    rows = reader.tables["Fundus images: judges, distances, structure"]
    assert [text for text, _ in rows["Alignment ↑ (%)"]] == ["40.00", "55.00", "70.00"] and "SSIM ↑" not in rows
    rows = reader.tables["Table 1. Image statistics: legacy"]
    assert rows["sharpness"][:4] == [("0.4000", "[0.3000, 0.5000]"), ("0.1000", ""), ("−0.3000", "[−0.4000, −0.2000]"),
                                     ("−1.50", "W1 1.60")]  # fmt: skip
    assert len(rows["sharpness"]) == 4 + 4 + 2 and "left out: 2 images of real images" in reader.text
    assert "SD+RL has a mean alignment of 55.0 %, SD of 40.0 %: a gain of 15.0" in reader.text
    for absent in ("ISIC", "dermoscop", "lesion", "APR", "artifact", "None"):
        assert absent not in reader.text, absent


def test_a_file_that_cannot_be_read_is_named(result, tmp_path, read):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not an image")
    reader = read(result, {name: [(broken, CAPTIONS[0])] for name in MODELS})
    assert f"{broken} cannot be read as an image" in reader.text and "no image" in reader.text


def test_why_models_are_not_paired_stands_with_the_samples(example, result, read):
    """The reason holds paths, which the lead is spared."""
    reason = "/data/sd/images/x/7.png has no counterpart in /data/rl"
    result["comparisons"][0] |= {"paired": False, "reason": reason, "pairs": 0, "p": None, "p_by_prompt": None}
    lead, _, rest = read(result, {"SD": example[1]["SD"][:1]}).text.partition("The result in numbers")
    assert "SD+RL and SD are not paired" in lead and reason not in lead
    assert f"not from the same noise: {reason}" in rest and "come from the same noise" not in rest


def test_a_run_that_cannot_be_read_leaves_the_old_page(tmp_path):
    (tmp_path / "report.html").write_text("old")
    with pytest.raises(UserError, match="metrics.jsonl"):
        write_report(tmp_path, minimal_result(), {}, [tmp_path])
    assert (tmp_path / "report.html").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_one_of_a_thing_is_no_plural(result, read):
    result["models"]["SD"] |= {"images": 1, "black_images": 1}
    result["comparisons"][0] |= {"pairs": 1}
    result["sets"]["real"]["images_by_prompt"] = dict.fromkeys(CAPTIONS, 1)
    text = read(result, {"SD": [("absent.png", CAPTIONS[0])]}).text
    assert "1 image of SD is black and counted" in text and "; 1 real image" in text and "1 pair " in text
    assert not re.search(r"(?<![\d,.])1 (?:more )?(?:real )?(?:images|pairs|prompts|folders)\b", text)
