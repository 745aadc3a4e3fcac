"""The report's sentences, order, pairs, tables and text, from made-up measurements whose right answers are known."""

import copy
import html.parser
import re

import pytest
from report_example import MODELS, full_example, minimal_result, quantity

from ddpo_pytorch.data.isic import CAPTIONS, SINGLE_ARTIFACT_CAPTIONS
from ddpo_pytorch.report.cells import bounds, counted, in_folders, letter, methods, percent, plain
from ddpo_pytorch.report.findings import findings
from ddpo_pytorch.report.headline import headline
from ddpo_pytorch.report.page import write_report
from ddpo_pytorch.report.pictures import rarest_first
from ddpo_pytorch.report.provenance import flatten
from ddpo_pytorch.report.quality_tables import fidelity_tables
from ddpo_pytorch.report.tables import common_beginning, prompt_table, table2, table3
from ddpo_pytorch.utils.errors import UserError

VOID = {"meta", "img", "br", "link", "hr", "input", "source"}


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """(result, samples, runs) with two images a caption."""
    return full_example(tmp_path_factory.mktemp("example"), number=2)


@pytest.fixture(scope="module")
def page(example, tmp_path_factory) -> str:
    return write_report(tmp_path_factory.mktemp("page"), *example).read_text()


class Reader(html.parser.HTMLParser):
    """Text, attributes by tag and ids of a page; fails on tags that are not closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.text, self.tags = [], [], []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)

    def said(self) -> str:
        return " ".join(" ".join(self.text).split())


def test_numbers_as_text():
    assert percent(0.47266) == "47.27" and percent(None) == percent(float("nan")) == "n/a"
    assert plain(-1.5, ".1f") == "−1.5" and plain(True) == "n/a"
    assert bounds({"low": -0.01, "high": 0.5}, ".1f", 100) == "[−1.0, 50.0]"
    assert bounds({"low": None, "high": 1.0}) == bounds(None) == ""
    assert [counted(n, "image") for n in (0, 1, 1281, None)] == ["0 images", "1 image", "1,281 images", "n/a images"]
    assert in_folders(480, [{"images": 512}]) == in_folders(480, None) == "480 images"
    assert in_folders(480, [{"images": 512}] * 3) == "3 folders of 480 images"
    assert in_folders(500, [{"images": 500}, {"images": 512}], least=True) == "2 folders of 500 images or more"
    assert [letter(i) for i in (0, 25, 26)] == ["a", "z", "aa"]
    assert common_beginning(["a b c", "a b d"]) == "a b " and common_beginning(["a b", "a b c"]) == "a "
    assert common_beginning(["only one"]) == ""
    assert flatten({"a": {"b": 1, "c": None}, "d": list(range(9)), "e": ""}) == [
        ("a.b", "1"), ("a.c", "(none)"), ("d", "9 entries, the first: 0"), ("e", "(empty)")
    ]  # fmt: skip


def test_ways_of_intervals_are_said_once():
    ways = [quantity(0.5, 0.1, n, f"exact binomial, {n} trials") for n in (24, 16, 8)] + [
        quantity(0.5, 0.1, 9, "boot 9")
    ]
    assert methods(ways) == "exact binomial, … trials; boot 9"
    assert methods([{"value": 1.0, "low": None, "high": None, "how": "no interval"}, None]) == ""


def test_tables_hold_the_result(example):
    result = example[0]
    rows = {head.text: cells for head, cells in headline(result).rows}
    apr = result["models"]["SD+RL"]["alignment"]["H4"]["APR"]
    assert rows["APR"][1].text == f"{100 * apr['value']:.2f}"
    assert rows["APR"][1].small == f"[{100 * apr['low']:.2f}, {100 * apr['high']:.2f}]"
    assert rows["FID"][0].text == "91.07" and rows["FID"][0].small == "[87.97, 94.17]"
    lpips = rows["LPIPS"][0]
    assert lpips.text == "n/a" and "alexnet=FILE" in headline(result).notes["abc".index(lpips.mark)]
    assert rows["APR"][3].text == "91.50"  # real images stand behind the models and their difference

    second = {head.text: cells for head, cells in table2(result).rows}
    single = list(SINGLE_ARTIFACT_CAPTIONS)
    order = [single.index((d, a)) for d in ("MEL", "NV") for a in ("hair", "gel_bubble", "ink", "ruler")]
    captions = [list(SINGLE_ARTIFACT_CAPTIONS.values())[i] for i in order]
    assert [c.text for c in second["# Real sample"]] == [
        str(result["sets"]["real"]["images_by_prompt"][c]) for c in captions
    ]
    expected = [f"{100 * result['models']['SD']['APR_by_prompt'][c]:.2f}" for c in captions]
    assert [c.text for c in second["SD"]] == expected
    assert second["Judge on real images"][0].text == "91.50"
    assert [head.text for head, _ in table3(result).rows] == list(MODELS)
    assert len(prompt_table(result).rows) == 32


def test_headline_falls_back_to_ratios_and_gives_reasons():
    rows = {head.text: cells for head, cells in headline(minimal_result()).rows}
    assert rows["APR"][0].text == "25.00" and rows["APR"][0].small == ""
    notes = headline(minimal_result()).notes
    assert rows["FID"][0].mark == rows["KID"][0].mark == "a" and "no weights" in notes[0]
    assert "no real images" in notes["abcdefg".index(rows["LPIPS"][0].mark)]
    assert table2(minimal_result()) is None and prompt_table(minimal_result()) is None


def test_page_is_whole_and_loads_nothing(page, example):
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
    assert {a["href"][1:] for tag, a in reader.tags if tag == "a"} == set(ids)
    said = reader.said()
    assert findings(example[0])[0].replace("\u00a0", " ") in said
    assert "fell, from 6.31" in said and "Nothing is picked" in said and "Not for diagnosis" in said
    assert all(digest in said for digest in (f"{4:064x}", f"{9:064x}")) and "2.9.0" in said


def test_pictures_stand_in_rows_of_one_noise_rarest_first(page, example):
    result, samples, _ = example
    alts = [a["alt"] for tag, a in Reader(page).tags if tag == "img"]
    counts = result["sets"]["real"]["images_by_prompt"]
    rarest = rarest_first(CAPTIONS, counts)
    shown = list(dict.fromkeys(alt.split(": ")[1] for alt in alts if alt.startswith("SD, ")))
    assert shown[:32] == rarest
    caption = rarest[5]
    rows = [f"real, PHANTOM_0000{i}: {caption}" for i in range(min(2, counts[caption]))]
    rows += [f"{name}, 0000{i}: {caption}" for name in MODELS for i in range(2)]
    first = alts.index(rows[0])
    assert alts[first : first + len(rows)] == rows


def test_foreign_text_is_escaped(example, tmp_path):
    result, samples, runs = copy.deepcopy(example)
    evil = "<script>alert(1)</script>"
    image = samples["SD"][0][0]
    samples = {name: [(image, f"{evil} & caption")] for name in MODELS}
    result["warnings"] = [evil]
    result["settings"][evil] = evil
    result["missing"][evil] = evil
    result["models"]["SD"]["memorisation"]["judge"]["closest"][0]["caption"] = f'{evil}" onload="x'
    text = write_report(tmp_path, result, samples, runs, title=evil).read_text()
    tags = {tag for tag, _ in Reader(text).tags}
    assert "script" not in tags and not any("onload" in attributes for _, attributes in Reader(text).tags)
    assert text.count("&lt;script&gt;") >= 6


@pytest.mark.parametrize("result", [minimal_result(), {"format": 2}, {"format": 2, "models": {"SD": {}}}])
def test_missing_blocks_leave_no_empty_headings(result, tmp_path):
    reader = Reader(write_report(tmp_path, result, {}, []).read_text())
    said = reader.said()
    for heading in ("Fidelity", "Training", "Samples by prompt", "Diversity and nearness", "Table 2", "Data card"):
        assert heading not in said
    assert "None" not in said and "nan" not in said.split()
    count = [tag for tag, _ in reader.tags].count
    assert count("h2") == count("a") > 0  # the contents name what is there


def test_a_file_that_cannot_be_read_is_named(example, tmp_path):
    result, samples, runs = example
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not an image")
    samples = samples | {"SD": [(broken, CAPTIONS[0])], "SD+RL": [(broken, CAPTIONS[0])]}
    said = Reader(write_report(tmp_path, result, samples, []).read_text()).said()
    assert f"{broken} cannot be read as an image" in said and "no image" in said


def test_the_card_claims_only_what_is_known(example, tmp_path):
    result, samples, runs = example
    known = Reader(write_report(tmp_path, result, samples, runs).read_text()).said()
    assert "began from the mini weights of the phantom world" in known and "the phantom world, drawn" in known
    unknown = Reader(write_report(tmp_path, minimal_result(), {}, []).read_text()).said()
    assert "To be filled in: training data of the generator, and its licence." in unknown
    assert "began from the mini weights" not in unknown and "Not for diagnosis" in unknown
    assert "ceiling of APR is unknown" in unknown


def test_unpaired_models_are_not_said_to_share_noise(example, tmp_path):
    result, samples, _ = copy.deepcopy(example)
    result["comparisons"][0] |= {"paired": False, "reason": "seeds 1 and 2"}
    said = Reader(write_report(tmp_path, result, samples, []).read_text()).said()
    assert "come from the same noise" not in said and "not from the same noise: seeds 1 and 2" in said


def test_another_format_is_refused_and_the_old_page_stays(tmp_path):
    (tmp_path / "report.html").write_text("old")
    with pytest.raises(UserError, match="format None, this report reads 2"):
        write_report(tmp_path, {"models": {}}, {}, [])
    with pytest.raises(UserError, match="holds no metrics.jsonl"):
        write_report(tmp_path, minimal_result(), {}, [tmp_path])
    assert (tmp_path / "report.html").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_only_inceptions_distance_is_called_fid(example):
    result = copy.deepcopy(example[0])
    for values in result["models"].values():
        values["fidelity"]["judge"] = copy.deepcopy(values["fidelity"]["inception"])
    first, second = fidelity_tables(result)
    assert [table.rows[1][0].text for table in (first, second)] == ["FID", "Frechet distance"]
    assert [cell.text for cell in first.rows[0][1]] == ["480, 480", "512, 1,281"] * 2
    assert first.rows[3][1][1].text == "–"  # precision is measured on matched images only
