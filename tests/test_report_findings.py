"""The report's sentences: what is claimed, over what, with which cautions, from numbers whose right words are known."""

import copy
import re

import pytest
from report_example import full_example, minimal_result, quantity

from ddpo_pytorch.data.isic import CAPTIONS
from ddpo_pytorch.report.card import model_card
from ddpo_pytorch.report.findings import findings, remarks, verdict
from ddpo_pytorch.report.headline import all_missing, headline, reason_missing
from ddpo_pytorch.report.page import page_content, write_report
from ddpo_pytorch.report.quality_sentences import copy_sentences, diversity_sentences, memorisation_sentences
from ddpo_pytorch.report.quality_tables import fidelity_tables


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return full_example(tmp_path_factory.mktemp("example"), number=1)


@pytest.fixture
def result(made) -> dict:
    return copy.deepcopy(made[0])


def said(result, samples=None) -> str:
    """The words of the cards."""
    entries = model_card(result, [], 1)
    return " ".join(sentence for entry in entries for sentence in entry.sentences).replace("\u00a0", " ")


def compared(value, low, high, p=None, paired=True, **more) -> dict:
    result = {"models": {"SD": {"APR": 0.4}, "SD+RL": {"APR": 0.4 + value}}}
    difference = {"value": value, "low": low, "high": high, "n": 512, "how": "bootstrap"}
    one = {"from": "SD", "to": "SD+RL", "paired": paired, "pairs": 512, "APR": difference, "p": p}
    return result | {"comparisons": [one | more]}


@pytest.mark.parametrize(
    ("result", "word", "parts"),
    [
        (
            compared(0.2, 0.15, 0.25, 0.0001),
            "better",
            ["60.0", "40.0", "a gain of 20.0", "[+15.0, +25.0]", "p < 0.001"],
        ),
        (compared(-0.2, -0.25, -0.15, 0.004), "worse", ["got worse, by 20.0", "[−25.0, −15.0]", "p = 0.004"]),
        (compared(0.02, -0.01, 0.05, 0.2), "unclear", ["+2.0", "contains 0", "none can be claimed", "p = 0.200"]),
        (compared(-0.02, -0.05, 0.01), "unclear", ["−2.0", "contains 0", "none can be claimed"]),
        (compared(0.02, 0.001, 0.04, 0.06), "unclear", ["interval and test disagree", "none can be claimed"]),
        (compared(0.2, None, None), "unknown", ["without an interval"]),
        (compared(0.2, 0.1, 0.3, paired=False, reason="other seeds"), "better", ["not paired", "note under the table"]),
        (compared(0.2, 0.1, 0.3, gained=150, lost=48), "better", ["512 pairs", "150 gained and 48 lost"]),
    ],
)
def test_the_finding_says_what_the_numbers_say(result, word, parts):
    assert verdict(result["comparisons"][0]) == word
    claim, basis = findings(result)
    assert len(claim) < 220 and "pairs" not in claim  # a lead, which fits a phone
    sentence = f"{claim} {basis}".replace("\u00a0", " ")
    assert all(part in sentence for part in parts), sentence
    assert "other seeds" not in sentence
    assert ("gain of" in sentence) == (word == "better") and ("got worse" in sentence) == (word == "worse")


def test_findings_without_a_comparison():
    assert "25.0" in findings(minimal_result())[0] and "no comparison" in findings(minimal_result())[1]
    assert findings({"format": 2})[0].startswith("APR was not measured")
    nothing = compared(float("nan"), None, None)
    assert "no comparison" in findings(nothing)[-1]


def test_reward_that_rises_alone_is_remarked():
    result = compared(-0.01, -0.03, 0.01)
    result["models"]["SD"]["reward"], result["models"]["SD+RL"]["reward"] = 0.7, 0.9
    assert any("rose from 0.700 to 0.900" in line for line in remarks(result))
    assert any("while APR did not" in line for line in remarks(result))
    result["comparisons"][0]["APR"] = quantity(0.01, 0.02, 512)
    assert any("while no gain in APR can be claimed" in line for line in remarks(result))
    result["comparisons"][0]["APR"] = quantity(0.2, 0.1, 512)
    assert not remarks(result)


def test_diversity_says_when_it_fell():
    def spread(value):
        return {"diversity": {"judge": {"vendi": quantity(value, 0.5, 9)}}}

    fell = diversity_sentences({"models": {"SD": spread(6.0), "RL": spread(4.0)}})
    assert fell == ["From SD to RL, the Vendi score (judge) fell, from 6.00 [5.50, 6.50] to 4.00 [3.50, 4.50]; the "
                    "intervals do not overlap."]  # fmt: skip
    rose = diversity_sentences({"models": {"SD": spread(6.0), "RL": spread(6.4)}})
    assert "rose" in rose[0] and rose[0].endswith("the intervals overlap.")
    same = diversity_sentences({"models": {"SD": spread(6.0), "RL": spread(6.0001)}})
    assert "is the same, from 6.00" in same[0]


@pytest.mark.parametrize(("low", "more"), [(0.011, True), (0.009, False)])
def test_memorisation_is_measured_by_what_real_images_do(low, more):
    found = {"share_closer": {"value": 0.02, "low": low, "high": 0.04}, "threshold": 0.25, "copies": 0}
    (line,) = memorisation_sentences({"models": {"SD": {"memorisation": {"judge": found}}}})
    assert "2.0" in line and "0.25" in line and ("that is more" in line) == more and "No image is pixel" in line


def test_the_claim_states_the_rates_of_what_was_compared():
    """With unlike mixes of prompts, APR over all images does not differ by the difference that is tested."""
    result = compared(0.2, 0.15, 0.25, from_APR=0.3, to_APR=0.5, prompts=2, p_by_prompt=None)
    result["models"]["SD"] |= {"APR": 0.41, "images_by_prompt": {"a": 9, "b": 9, "c": 1}}
    result["models"]["SD+RL"] |= {"APR": 0.47, "images_by_prompt": {"a": 4, "b": 4, "c": 0}}
    claim = findings(result)[0].replace("\u00a0", " ")
    assert claim.startswith(
        "SD+RL shows what its prompt states in 50.0 % of its images, SD in 30.0 %, over the 2 prompts that both have: "
        "a gain of 20.0 percentage points"
    )
    result["models"]["SD"]["images_by_prompt"]["c"] = 0
    assert "that both have" not in findings(result)[0]
    result["models"]["SD"]["images_by_prompt"]["c"], result["comparisons"][0]["prompts"] = 1, 1
    assert ", over the one prompt that both have: a gain" in findings(result)[0]


@pytest.mark.parametrize(
    ("change", "prompts", "by_prompt", "words"),
    [
        (0.2, 4, None, "The claim is about these 4 prompts only"),
        (0.2, 1, None, "The claim is about this one prompt only"),
        (0.01, 4, None, "Compared were these 4 prompts only"),
        (0.2, 6, 0.03, ""),
        (0.2, 6, None, ""),
        (0.2, 32, None, ""),
        (0.2, None, None, ""),
    ],
)
def test_few_prompts_speak_for_themselves_only(change, prompts, by_prompt, words):
    more = {} if prompts is None else {"prompts": prompts, "p_by_prompt": by_prompt}
    result = compared(change, change - 0.05, change + 0.05, 0.001, **more)
    assert verdict(result["comparisons"][0]) == ("better" if change > 0.1 else "unclear")
    basis = findings(result)[1]
    assert words in basis and ("prompts has any power" in basis) == bool(words)


def test_the_ceiling_is_that_of_the_models_mix_of_captions(result):
    lines = [line.replace("\u00a0", " ") for line in remarks(result)]
    expected = (
        "On real images, mixed by caption as those of SD and SD+RL (as far as there are real ones: for 90.6 % of the "
        "images), the judge agrees with the caption in 88.7 % ["
    )
    (line,) = [line for line in lines if line.startswith(expected)]
    assert line.endswith("judge error, or wrong labels.") and line in said(result)
    table = headline(result)
    row = next(cells for head, cells in table.rows if head.text == "Ceiling of APR")
    assert [cell.text for cell in row] == ["88.70", "88.70", "", "\u2013"]
    assert row[0].mark == row[1].mark and "90.6" in table.notes["abc".index(row[0].mark)]
    assert table.header[0][3].small == f"as they are, n = {result['real']['images']:,}"

    result["models"]["SD"]["ceiling"]["value"], result["models"]["SD"]["ceiling_share"] = 0.7, 1.0
    texts = [line for line in remarks(result) if "judge error" in line]
    assert len(texts) == 2 and "as those of SD, " in texts[0] and "SD+RL (as far as" in texts[1]


def test_without_a_ceiling_real_images_stand_as_they_are(result):
    for values in result["models"].values():
        del values["ceiling"], values["ceiling_share"]
    (line,) = [line for line in remarks(result) if "judge error, or wrong labels" in line]
    assert "real images as they are, in a mix of captions that may not be the models'" in line and "91.5" in line
    assert "Ceiling of APR" not in [head.text for head, _ in headline(result).rows]
    result["real"]["images"] = 1
    assert any(line.startswith("On 1 real image as they are") for line in remarks(result))


def test_folders_of_a_model_are_counted_with_the_images_of_one(result):
    values = result["models"]["SD+RL"]
    values["folders"] = [values["folders"][0] | {"images": n, "path": f"x{n}"} for n in (512, 520, 512)]
    values["images"] = 1544
    (table,) = fidelity_tables(result)
    cells = dict((head.text, cells) for head, cells in table.rows)["Images"]
    assert [(cell.text, cell.small) for cell in cells[:2]] == [("480, 480", ""), ("512, 1,281", "")]
    assert [cell.small for cell in cells[2:]] == ["3 folders of 480 images", "3 folders of 512 images or more"]
    assert headline(result).header[0][1].small == "n = 1,544 in 3 folders"
    words = said(result)
    assert "SD (480 images), SD+RL (3 folders of 480 images)" in words
    assert "on 3 folders of 480 images, with equally many real and generated images of every caption" in words
    assert "mixed like" not in words
    for values in result["models"].values():  # more images in all, and yet few behind each distance
        values["images"] = 9000
    assert "strongly biased: SD (480 images)" in said(result)
    for block in ("matched", "unmatched"):
        for values in result["models"].values():
            values["fidelity"]["inception"][block]["n"] = 2048
    assert "strongly biased" not in said(result)


def test_copies_are_told_wherever_the_result_is(result, tmp_path):
    assert copy_sentences(result) == []
    first = result["models"]["SD"]["folders"][0]
    first |= {"copies_of_training_images": 1, "near_copies_of_training_images": 3, "copies_of_real_images": 0}
    result["models"]["SD+RL"]["folders"] *= 2
    for folder, number in zip(result["models"]["SD+RL"]["folders"], (0, 2), strict=True):
        result["models"]["SD+RL"]["folders"][number // 2] = folder | {"copies_of_real_images": number}
    expected = [
        "Of 512 images of SD, 1 is pixel for pixel a training image; 3 are near copies of training images, exact ones "
        "included.",
        "Of 512 images of SD+RL, 2 are pixel for pixel real images.",
    ]
    assert copy_sentences(result) == expected and all(line in remarks(result) for line in expected)
    content = page_content(result, {}, [], "x")
    assert content["memorisation_sentences"][:2] == expected and expected[1] in said(result)
    assert not any("SD (judge)" in line and "No image" in line for line in content["memorisation_sentences"])
    for values in result["models"].values():
        del values["memorisation"], values["diversity"]
    del result["real"]["diversity"]  # nothing else is left for that section
    page = write_report(tmp_path, result, {}, []).read_text()
    assert page.count(expected[1]) == 3  # above, among the nearness, on the card
    result["models"]["SD"] = {"images": 1, "memorisation": {"judge": {"copies": 1}}}
    assert copy_sentences(result)[0] == "Of 1 image of SD, 1 is pixel for pixel a training image."


def test_why_pairs_are_missing_stands_below(result, tmp_path):
    reason = "/data/sd/images/x/7.png has no counterpart in /data/rl"
    result["comparisons"][0] |= {"paired": False, "reason": reason, "pairs": 0, "p": None, "p_by_prompt": None}
    assert not any("/data" in line for line in [*findings(result), *remarks(result)])
    table = headline(result)
    change = dict((head.text, cells) for head, cells in table.rows)["APR"][2]
    assert table.notes["abc".index(change.mark)] == f"SD+RL and SD are not paired: {reason}"
    page = write_report(tmp_path, result, {}, []).read_text()
    assert reason in page and reason not in page.split("</header>")[0].split("</head>")[1]


def test_a_models_own_reasons_are_given(result):
    for name in ("SD", "SD+RL"):
        result["models"][name] |= {"FID": None, "KID": None, "reward": None}
    result["models"]["SD"]["missing"] = {"fidelity": "no caption is shared", "reward": "the log states none"}
    assert (
        reason_missing(result, "FID", "SD") == reason_missing(result, "KID", "SD") == "fidelity: no caption is shared"
    )
    assert "does not say why" in reason_missing(result, "FID", "SD+RL")
    assert all_missing(result)["reward of SD"] == "the log states none" and "LPIPS" in all_missing(result)
    assert "Not measured: reward of SD (the log states none)" in said(result)


def test_the_judges_distances_come_with_a_caution(result):
    for values in result["models"].values():
        values["fidelity"]["judge"] = copy.deepcopy(values["fidelity"]["inception"])
    inception, judge = fidelity_tables(result)
    assert judge.title == "Features of the judge" and "shares that classifier's errors" in judge.text
    assert "errors" not in inception.text
    names = [[head.text for head, _ in table.rows[1:3]] for table in (inception, judge)]
    assert names == [["FID", "KID"], ["Frechet distance", "Kernel distance"]]
    assert said(result).count("shares that classifier's errors") == 1


def test_one_of_a_thing_is_no_plural(result):
    result["models"]["SD"] |= {"images": 1, "black_images": 1}
    result["comparisons"][0] |= {"pairs": 1}
    result["sets"]["real"]["images_by_prompt"] = dict.fromkeys(CAPTIONS, 1)
    content = page_content(result, {"SD": [("absent.png", CAPTIONS[0])]}, [], "x")
    texts = [*content["findings"], *content["remarks"], *content["diversity_sentences"], said(result)]
    texts += [line for _, line in content["blocks"]]
    assert "1 image of SD is black and is counted as it is." in texts and "; 1 real image" in texts[-1]
    assert not re.search(r"(?<![\d,.])1 (?:more )?(?:\w+ )?(?:images|pairs|prompts|folders)\b", " ".join(texts))
