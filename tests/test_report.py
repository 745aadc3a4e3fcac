"""The report: verdicts, sentences, tables and cards from made-up measurements with known answers; in a browser."""

import base64
import copy
import html
import io
import json
import re
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from refusals import refused
from report_example import MODELS, SHOWN, minimal, quantity, write_run

from ddpo_pytorch.data.isic import CAPTIONS, LABELS
from ddpo_pytorch.report import findings
from ddpo_pytorch.report.curves import curves, read_runs, series
from ddpo_pytorch.report.page import write_report
from ddpo_pytorch.report.pictures import SIDE, Album, natural, paired_files, rarest_first


@pytest.fixture
def result(example) -> dict:
    return copy.deepcopy(example[0])


@pytest.fixture(scope="module")
def pages(example, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ddpo_pytorch.report.page.OPEN_GRIDS", 1)  # the others are folded away
        full = write_report(folder / "full", *example)
    return {"full": full, "minimal": write_report(folder / "minimal", minimal(example[0]), {}, {})}


@pytest.fixture
def read(tmp_path):
    """Function (result, samples, runs): write the report and return its `Reader`."""
    return lambda result, samples={}, runs={}: Reader(write_report(tmp_path, result, samples, runs).read_text())


class Reader:
    """Text, tags and tables (caption -> head -> (text, small text) cells) of a page, which is also well-formed XML."""

    def __init__(self, page: str):
        page = re.sub("&(?:nbsp|middot);", lambda match: html.unescape(match[0]), page)
        root = ElementTree.fromstring(re.sub(r"(<(?:meta|img)\b[^>]*)>", r"\1/>", page))
        self.tags = [(element.tag, element.attrib) for element in root.iter()]
        self.text = " ".join(" ".join(root.find("body").itertext()).split())
        self.tables = defaultdict(dict)
        for table in root.iter("table"):
            rows = self.tables["".join(text for caption in table.iter("caption") for text in caption.itertext())]
            for head, *cells in table.iter("tr"):
                rows["".join(head.itertext())] = [self.read_cell(cell) for cell in cells]

    @staticmethod
    def read_cell(cell: ElementTree.Element) -> tuple[str, str]:
        small = "".join(text for part in cell.iter("small") for text in part.itertext())
        return "".join(cell.itertext()).removesuffix(small), small


@pytest.fixture
def compared(example):
    """Function of a difference in APR and other fields of a comparison: a measurement of two models."""

    def build(value, low, high, p=None, **more) -> dict:
        result = minimal(example[0])
        result["models"]["SD+RL"] = copy.deepcopy(result["models"]["SD"])
        one = {"from": "SD", "to": "SD+RL", "from_APR": 0.4, "to_APR": 0.4 + (value or 0), "p": p, "p_by_prompt": None}
        one |= {"APR": {"value": value, "low": low, "high": high, "n": 512, "how": "bootstrap"}, "prompts": 10}
        one |= {"paired": True, "reason": "", "pairs": 512, "gained": 150, "lost": 48}
        return result | {"comparisons": [one | more]}

    return build


@pytest.mark.parametrize(
    ("difference", "by_prompt", "word", "parts"),
    [
        ((0.2, 0.15, 0.25, 0.0001), None, "better", ["60.0", "40.0", "20.0", "[+15.0, +25.0]", "0.001", "150", "48"]),
        ((-0.2, -0.25, -0.15, 0.004), None, "worse", ["20.0", "[−25.0, −15.0]", "= 0.004"]),
        ((0.02, -0.01, 0.05, 0.2), None, "unclear", ["[−1.0, +5.0]", "= 0.200"]),
        ((0.02, 0.001, 0.04, 0.06), None, "unclear", ["= 0.060"]),
        ((0.2, 0.1, 0.3, 0.01), 0.05, "unclear", ["p over prompts = 0.050"]),
        ((0.2, None, None), None, "unknown", ["60.0"]),
        ((None, None, None), None, "", ["APR of"]),
    ],
)
def test_the_lead_states_the_verdict(difference, by_prompt, word, parts, compared, read):
    result = compared(*difference, p_by_prompt=by_prompt)
    assert findings.verdict(result["comparisons"][0]) == word
    lead = read(result).text.split("The result in numbers")[0]
    assert all(part in lead for part in parts), lead
    assert ("a gain of" in lead, "a loss of" in lead) == (word == "better", word == "worse")
    assert ("can be claimed" in lead) == (word == "unclear")


@pytest.mark.parametrize("prompts, p, shared, few", [(2, None, 2, True), (3, None, None, True), (6, 0.03, None, False)])
def test_a_claim_about_few_prompts_is_about_these(prompts, p, shared, few, compared, read):
    """Over fewer prompts than the models have, the rates are those of the images that were compared."""
    result = compared(0.2, 0.15, 0.25, 0.001, prompts=prompts, p_by_prompt=p)
    for name in MODELS:
        result["models"][name]["images_by_prompt"] = {"a": 9, "b": 9, "c": 1}
    (one,) = findings.comparisons(result)
    assert (one["shared"], one["few"], one["from_APR"], one["to_APR"]) == (shared, few, 0.4, pytest.approx(0.6))
    text = read(result).text
    assert ("over the 2 prompts" in text, "without power" in text) == (shared == 2, few)


@pytest.mark.parametrize(
    ("change", "low", "hacked"),
    [(-0.01, 0.1, True), (0.01, 0.1, True), (0.2, 0.1, False), (0.01, -0.1, False), (0.01, None, False)],
)
def test_a_reward_that_rises_alone_is_remarked(change, low, hacked, compared, read):
    rise = {"reward": {"value": 0.2, "low": low, "high": 0.3, "n": 512, "how": "bootstrap"}}
    result = compared(change, change - 0.05, change + 0.05, **rise)
    result["models"]["SD"]["reward"], result["models"]["SD+RL"]["reward"] = 0.7, 0.9
    assert ("rose from 0.700 to 0.900" in read(result).text) == hacked


@pytest.mark.parametrize(("after", "fell"), [(4.0, True), (5.5, True), (6.4, False), (5.9999, False)])
def test_diversity_that_fell_is_remarked(after, fell, compared, read):
    """And that it can be chance where the intervals overlap."""
    result = compared(0.2, 0.1, 0.3)
    for name, value in (("SD", 6.0), ("SD+RL", after)):
        result["models"][name]["diversity"] = {"judge": {"vendi": quantity(value, 0.5, 9)}}
    values = "6.00 [5.50, 6.50]", f"{after:.2f} [{after - 0.5:.2f}, {after + 0.5:.2f}]"
    expected = [("SD", "SD+RL", "Vendi score (judge)", *values, after == 4)]
    assert findings.lost_diversity(result) == (expected if fell else [])
    assert ("which can be chance" in read(result).text) == (after == 5.5)


def test_flaws_and_copies_of_images_and_further_results_are_stated(result, read):
    """Flaws above and on the card; a table for each result of a kind."""
    result["results"]["other.json"] = {"title": "Membership", "base": {"AUC": quantity(0.7, 0.1, 9)}}
    assert "near_copies_of_training_images" not in result["sets"]["train"]
    result["sets"]["real"]["near_copies_of_training_images"] += 5
    none = dict.fromkeys(findings.FLAWS, 0)
    first, second = (result["models"][name]["folders"][0] | none for name in MODELS)
    result["models"]["SD"]["folders"] = [first | {"copies_of_real_images": 1, "near_copies_of_real_images": 3}]
    result["models"]["SD+RL"]["folders"] = [second, second | {"black_images": 2}]
    reader = read(result)
    text, card = reader.text, reader.text.split("Data card")[1]
    assert text.count("1 copies of real images, 3 near copies") == text.count("of SD+RL: 2 black images") == 2
    assert card.count("near copies of training images") == 1 and f"of {len(SHOWN) - 1} of the 32 captions" in card
    tables = [reader.tables[title]["base: AUC"] for title in ("Membership", "Membership (other.json)")]
    assert [rows[0][0] for rows in tables] == ["0.5", "0.7"]


def test_tables_hold_the_result(pages, example):
    result, reader = example[0], Reader(pages["full"].read_text())
    tables = reader.tables
    models, rows = result["models"], tables["The result in numbers"]
    apr = models["SD+RL"]["alignment"]["H4"]["APR"]
    assert rows["APR ↑ (%)"][1] == (f"{100 * apr['value']:.2f}", f"[{100 * apr['low']:.2f}, {100 * apr['high']:.2f}]")
    for title, path in (("Ceiling of APR (%)", ("ceiling",)), ("APR ↑ (%), H6", ("alignment", "H6", "APR"))):
        values = [findings.dig(models[name], *path, "value") for name in MODELS]
        assert [text for text, _ in rows[title]][:2] == [f"{100 * value:.2f}" for value in values]
    assert rows["Reward ↑"][2] == ("n/a", "") and rows["Images"][0] == ("20", "")
    assert "LPIPS ↓" not in rows and "Not available: FID, KID, precision" in reader.text
    assert len(tables["Table 2. Prompts with one artifact"]["APR ↑ (%) SD"]) == 8
    prompts, counts = tables["All prompts"], result["sets"]["real"]["images_by_prompt"]
    assert len(prompts) == 1 + 10 and [text for text, _ in prompts[SHOWN[5]]][::2] == ["2", "2", str(counts[SHOWN[5]])]
    found = models["SD"]["alignment"]["H6"]["attributes"]["gel_bubble"]
    assert tables["Attributes, judged by H6"]["gel bubble"][2] == (f"{found['requested']}, {found['seen']}", "")
    assert tables["Membership"] == {"": [("Value", ""), ("n", "")], "base: AUC": [("0.5", "[0.46, 0.54]"), ("90", "")]}
    near = models["SD"]["memorisation"]["judge"]["threshold"]
    assert tables["Diversity and nearness"]["Threshold of closer, judge"][0] == (f"{near:.4g}", "")
    assert any("replicates over … prompts and their images" in way for way in findings.methods(result)["alignment"])


def numbers_of(tree, name=""):
    if isinstance(tree, dict) and "how" not in tree:
        for key, value in tree.items():
            yield from numbers_of(value, key if name not in ("APR_by_prompt", "LPIPS_by_prompt", "curve") else name)
    elif isinstance(tree, dict | float):
        yield name, tree


def test_every_number_has_an_interval_or_a_reason(example):
    """Others are headlines of blocks, exact, of single images, or named with the reason in docs/evaluation.md."""
    found = [pair for side in findings.sides(example[0]).values() for pair in numbers_of(side)]
    bare = {name for name, value in found if isinstance(value, float)}
    headlines = {"APR", "LPIPS", "FD_judge", "reward", "FID", "KID", *LABELS}
    named = {"APR_by_prompt", "LPIPS_by_prompt", "ceiling_share", "distance", "curve", "threshold"}
    assert bare <= headlines | named
    estimates = [(name, value) for name, value in found if isinstance(value, dict)]
    assert {"precision", "recall", "density", "coverage", "accuracy", "rewards"} <= {name for name, _ in estimates}
    for name, one in estimates:
        assert one["low"] is not None or one["n"] < 20 or name == "density", (name, one)


def test_only_distances_of_inception_are_called_fid(result, read):
    for values in result["models"].values():
        values["fidelity"]["inception"] = values["fidelity"]["judge"]
    reader = read(result)
    inception, judge = reader.tables["Features of inception"], reader.tables["Features of the judge"]
    assert "FID ↓" in inception and "Frechet distance ↓" in judge and "FID ↓" not in judge
    assert len(inception["Images"]) == 4 and inception["Precision ↑"][1] == ("n/a", "")  # of matched images only
    assert reader.text.count("they share errors") == 2  # below the table and on the card


def test_the_page_loads_nothing_and_its_pictures_stand_in_rows(pages, example):
    reader = Reader(page := pages["full"].read_text())
    assert page.startswith("<!DOCTYPE html>")
    for tag, attributes in reader.tags:
        assert tag not in ("script", "link", "iframe", "source")
        assert attributes.get("src", "data:").startswith("data:")
        assert tag != "a" or attributes["href"].startswith("#")
        assert tag != "img" or attributes["alt"]
        assert tag != "th" or attributes["scope"] in ("row", "col")
    assert not re.search(r"url\(|@import|=.?https?://", page)
    ids = [attributes["id"] for _, attributes in reader.tags if "id" in attributes]
    assert len(ids) == len(set(ids)) == 8
    assert {attributes["href"][1:] for tag, attributes in reader.tags if tag == "a"} == set(ids)
    assert "Not for diagnosis" in reader.text and reader.text.count("To be filled in: ") == 5
    assert all(judge["sha256"] in reader.text for judge in example[0]["judges"].values())
    # pictures stand in rows of one noise, the rarest caption first
    alts = [attributes["alt"] for tag, attributes in reader.tags if tag == "img"]
    rarest = rarest_first(SHOWN, example[0]["sets"]["real"]["images_by_prompt"])
    assert list(dict.fromkeys(alt.split(": ")[1] for alt in alts if alt.startswith("SD, ")))[:10] == rarest
    rows = [f"real, 0: {rarest[1]}"] + [f"{name}, {i}: {rarest[1]}" for name in MODELS for i in range(2)]
    first = alts.index(rows[0])
    assert rarest[0] == SHOWN[0] and alts[first : first + len(rows)] == rows


def test_foreign_text_is_escaped(example, result, tmp_path, read):
    evil = "<script>alert(1)</script>"
    image, runs = example[1]["SD"][0][0], example[2]
    model, run = f'{evil}" onload="x', tmp_path / "<script>"
    run.mkdir()
    (run / "metrics.jsonl").write_bytes((runs["demo"] / "metrics.jsonl").read_bytes())
    result["warnings"] = [evil]
    result["missing"][evil] = result["settings"][evil] = result["versions"][evil] = evil
    result["models"] = {f"{name}{model}": values for name, values in result["models"].items()}
    result["comparisons"][0] |= {"from": f"SD{model}", "to": f"SD+RL{model}", "paired": False, "reason": evil}
    for values in result["models"].values():
        values["memorisation"]["judge"]["closest"][0]["caption"] = model
        values["images_by_prompt"][evil] = 1
        values["alignment"][model] = values["alignment"]["H6"]
        values["fidelity"][model] = values["fidelity"]["judge"]
    reader = read(result, {name: [(image, f"{evil} & caption")] for name in result["models"]}, {evil: run})
    assert "script" not in {tag for tag, _ in reader.tags}
    assert not any("onload" in attributes for _, attributes in reader.tags)
    assert reader.text.count(evil) > 20


def test_absent_blocks_leave_no_empty_headings(result, read):
    reader = read(minimal(result))
    headings = "Fidelity|Training curves|Samples by prompt|Diversity and nearness|Data card|# Real"
    assert not re.findall(headings, reader.text)
    assert "None" not in reader.text and "nan" not in reader.text.split()
    assert [tag for tag, _ in reader.tags].count("h2") == [tag for tag, _ in reader.tags].count("a") == 3
    assert "in 20 images of SD." in reader.text and "reward of SD (image_log.json states no" in reader.text


def test_why_models_are_not_paired_stands_with_the_samples(result, read, tmp_path):
    """The reason holds paths, which the lead is spared."""
    reason, broken = "/data/sd/images/x/7.png has no counterpart in /data/rl", tmp_path / "broken.png"
    broken.write_bytes(b"not an image")
    result["comparisons"][0] |= {"paired": False, "reason": reason, "pairs": 0, "p": None, "p_by_prompt": None}
    text = read(result, {name: [(broken, CAPTIONS[0])] for name in MODELS}).text
    lead, _, rest = text.partition("The result in numbers")
    assert "SD+RL and SD are not paired" in lead and reason not in lead
    assert f"{broken} cannot be read as an image" in rest and "no image" in rest
    assert f"not from the same noise: {reason}" in rest and "come from the same noise" not in rest


def test_a_run_that_cannot_be_read_leaves_the_old_page(result, tmp_path):
    (tmp_path / "report.html").write_text("old")
    refused("metrics.jsonl", write_report, tmp_path, result, {}, {"run": tmp_path})
    assert (tmp_path / "report.html").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_columns_pair_files_of_one_stem():
    def files(folder, *stems):
        return [(Path(folder) / f"{stem}.png", "a") for stem in stems] + [(Path(folder) / "x.png", "b")]

    stems, rows = paired_files({"SD": files("sd", *"0123"), "RL": files("rl", *"314")}, "a", 2)
    assert stems == ["1", "3"]
    assert rows == {"SD": [Path("sd/1.png"), Path("sd/3.png")], "RL": [Path("rl/1.png"), Path("rl/3.png")]}
    # by number and not letter by letter, whatever the order on the disk; all of the first seed before the second
    order = ("0", "1", "10", "100", "2")
    many = {"SD": files("s1", *order) + files("s2", *order), "RL": files("r1", *order[::-1]) + files("r2", *order)}
    stems, rows = paired_files(many, "a", 7)
    assert stems == ["0", "1", "2", "10", "100", "0", "1"]
    assert rows["RL"] == [Path(f"r1/{n}.png") for n in (0, 1, 2, 10, 100)] + [Path("r2/0.png"), Path("r2/1.png")]
    assert sorted(["b2", "10b", "a9", "9", "a", "a09"], key=natural) == ["9", "10b", "a", "a09", "a9", "b2"]
    stems, rows = paired_files({"SD": files("sd", "0"), "RL": files("rl", "9")}, "a", 6)
    assert stems == [] and rows == {"SD": [Path("sd/0.png")], "RL": [Path("rl/9.png")]}


def test_thumbnails_keep_small_images_and_shrink_large_ones(tmp_path):
    album, smooth = Album(), Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8))
    for size, shown in (((48, 64), (48, 64)), ((512, 256), (SIDE, SIDE // 2))):
        smooth.resize(size).save(tmp_path / "image.png")
        picture = album.picture(tmp_path / "image.png", "alt")
        assert (picture.width, picture.height) == shown
        decoded = Image.open(io.BytesIO(base64.b64decode(picture.source.split(",")[1])))
        truth = np.asarray(smooth.resize(size).resize(shown), np.float32)
        assert np.abs(np.asarray(decoded, np.float32) - truth).mean() < 3


def test_logs_are_read_by_epoch_and_held_out_evaluations_begin_with_the_base_model(tmp_path):
    run = write_run(tmp_path / "a" / "run", 9, 0)
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"epoch": 9, "reward_mean": float("nan"), "grad_norm": 0.5}) + '\n{"epoch": 10, "rew')
    entries = read_runs({"first": run, "second": write_run(tmp_path / "b" / "run", 3, 1)})["first"]
    assert series(entries, "held_out_apr", 100)[:, :2].tolist() == [[3, pytest.approx(18)], [7, pytest.approx(22)]]
    assert len(series(entries, "reward_mean")) == 9 and len(series(entries, "grad_norm")) == 10
    assert series(entries, "reward_mean")[0, 2] == pytest.approx(0.14) and np.isnan(series(entries, "grad_norm")[0, 2])
    evaluations = [{"epoch": 0, "apr": 0.1, "reward": 0.4}, {"epoch": 2, "apr": 0.3, "reward": 0.7}]
    (run / "held_out.jsonl").write_text("\n".join(map(json.dumps, evaluations)))
    assert series(read_runs({"run": run})["run"], "held_out_apr")[:, :2].tolist() == [[0, 0.1], [2, 0.3]]
    (run / "metrics.jsonl").write_text("[1]\n{}\n")
    refused("metrics.jsonl' line 1", read_runs, {"run": run})


def test_plots_are_the_same_bytes_again():
    runs = {"$run_1": [{"epoch": epoch, "reward_mean": 0.1 * epoch} for epoch in range(3)], "other": [{"epoch": 0}]}
    (plot,) = curves(runs)
    assert curves(runs) == [plot] and "$run_1: 0 at epoch 0, 0.2 at epoch 2" in plot.alt
    svg = base64.b64decode(plot.source.split(",")[1]).decode()
    assert svg.count("<svg") == 1 and "<image" not in svg


def visit(browser, path, width: int = 1280, scheme: str = "light", media: str = "") -> list[dict]:
    """Open a page at this width and return what the browser asked for."""
    screen = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": [feature]})
    browser.get_log("performance")
    browser.get_log("browser")
    browser.get(path.as_uri())
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [m["params"]["request"] for m in messages if m["method"] == "Network.requestWillBeSent"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "width"), [("full", 390), ("full", 1280), ("minimal", 390)])
def test_nothing_is_loaded_and_the_page_does_not_scroll_sideways(browser, pages, name, width):
    asked = [request["url"] for request in visit(browser, pages[name], width)]
    assert [url for url in asked if not url.startswith("data:")] == [pages[name].as_uri()]
    assert browser.get_log("browser") == []
    browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.execute_script("return innerWidth") == width
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    # what is cut off must be reachable: only the boxes that scroll may hold more than they show
    wide = "return [...document.querySelectorAll('main *')].filter(e => e.scrollWidth > e.clientWidth + 1 && "
    wide += "e.clientWidth && getComputedStyle(e).display !== 'inline' && !e.closest('.scroll')).map(e => e.outerHTML)"
    assert browser.execute_script(wide) == []


def luminance(colour: str) -> float:
    channels = [int(value) / 255 for value in re.findall(r"\d+", colour)[:3]]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in channels]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_legible_in_both_schemes(browser, pages, scheme):
    """WCAG's contrast of at least 4.5 for every colour of text."""
    visit(browser, pages["full"], scheme=scheme)
    ground = luminance(browser.execute_script("return getComputedStyle(document.body).backgroundColor"))
    assert (ground < 0.2) == (scheme == "dark")
    colours = "return [...document.querySelectorAll('body *')].map(e => getComputedStyle(e).color)"
    for colour in set(browser.execute_script(colours)):
        light, dark = sorted((luminance(colour), ground), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, colour


@pytest.mark.slow
def test_print_opens_what_is_folded(browser, pages):
    visit(browser, pages["full"], scheme="dark", media="print")
    visible = "return [...document.querySelectorAll('details')].map(d => d.lastElementChild.checkVisibility())"
    assert set(browser.execute_script(visible)) == {True}
    assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    pdf = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {"preferCSSPageSize": True})["data"])
    # the pictures of all prompts are on the pages, not only those of the first
    assert pdf.count(b"/Subtype /Image") + pdf.count(b"/Subtype/Image") >= 2 * 2 * len(SHOWN)
