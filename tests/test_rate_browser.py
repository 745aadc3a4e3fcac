"""The rating page in a real headless Chromium: keyboard, mouse, undo, progress, the end, phones, contrast."""

import csv
import json
import time

import numpy as np
import pytest
from PIL import Image
from test_report_browser import browser, luminance  # noqa: F401 (browser is a fixture)

pytest.importorskip("selenium", reason="selenium absent")
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.actions.wheel_input import ScrollOrigin  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

pytestmark = pytest.mark.slow
pytest_plugins = ["rating_tools"]
TOTAL = 9


class Window:
    """The page in a browser, with a rater of its own."""

    def __init__(self, driver, page):
        self.driver, self.page = driver, page

    def open(self, width: int = 1280, height: int = 800, scheme: str = "light") -> None:
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": [feature]})
        self.driver.get(self.page.url)

    def enter(self, rater: str, level: int = 2) -> None:
        """Fill in the form as a person does, after clearing what the last test left in this tab."""
        self.run("Storage.prototype.setItem = () => {}; sessionStorage.clear()")
        self.driver.refresh()
        assert self.run("return document.activeElement.id") == "name"
        self.keys(rater)
        self.click(f"#form [value='{level}']")
        self.click("#form .main")
        self.wait("state && state.current && seen")

    def run(self, script: str, *arguments):
        return self.driver.execute_script(script, *arguments)

    def wait(self, condition: str) -> None:
        end = time.monotonic() + 10
        while not self.run(f"return Boolean({condition}) && !busy"):
            assert time.monotonic() < end, f"{condition}: {self.run('return document.body.innerText')}"
            time.sleep(0.01)

    def keys(self, text: str) -> None:
        ActionChains(self.driver).send_keys(text).perform()

    def click(self, selector: str) -> None:
        self.driver.find_element("css selector", selector).click()

    def shown(self) -> dict:
        """Id, text on the page, count, and the colour in the middle of the image that is on the screen."""
        return self.run(
            "const i = document.getElementById('image'), c = document.createElement('canvas').getContext('2d');"
            "c.drawImage(i, 0, 0); return {id: state.current.id, red: c.getImageData(9, 9, 1, 1).data[0],"
            "prompt: document.getElementById('prompt').innerText, rated: state.rated,"
            "count: document.getElementById('progress-text').innerText, bar: document.getElementById('progress').value}"
        )

    def answer(self, act, *arguments) -> None:
        """Do something that asks the next question, and wait for it."""
        before = self.run("return state.current.id")
        act(*arguments)
        self.wait(f"!state.current || (seen && state.current.id !== '{before}')")

    def table(self, rater: str) -> list[tuple[str, str, str]]:
        with open(self.page.table, newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["rater_id"] == rater]
        return [(row["rating"], row["prompt"], row["expert_level"]) for row in rows]


@pytest.fixture
def window(browser, rating_page):  # noqa: F811
    page = Window(browser, rating_page)
    page.open()
    browser.get_log("browser")
    return page


def test_keyboard_and_mouse_give_the_same_ratings(window):
    """Every rating by key and by button is on disk with the text and the image that were on the screen."""
    window.enter("hands", level=3)
    wanted = []
    for rating in ("1", "2", "3"):
        for act, argument in ((window.keys, rating), (window.click, f"#ratings [data-do='{rating}']")):
            shown = window.shown()
            assert shown["count"] == f"{len(wanted)} of {TOTAL} rated" and shown["bar"] == len(wanted)
            wanted.append((rating, shown["prompt"], "3"))
            window.answer(act, argument)
            assert window.table("hands") == wanted
    now = window.shown()
    for act, argument in (
        (window.keys, "u"),
        (window.keys, Keys.BACKSPACE),
        (window.click, "#others [data-do=undo]"),
    ):
        window.answer(act, argument)
        wanted.pop()
        assert window.table("hands") == wanted
    assert now["id"] != window.shown()["id"] and window.shown()["count"] == f"3 of {TOTAL} rated"
    assert window.driver.get_log("browser") == []


def test_the_image_on_the_screen_is_the_one_that_is_rated(window):
    window.enter("looker")
    seen = []
    for _ in range(4):
        seen.append(window.shown()["red"])
        window.answer(window.keys, "2")
    with open(window.page.table, newline="") as file:
        paths = [row["image_path"] for row in csv.DictReader(file) if row["rater_id"] == "looker"]
    stored = [np.array(Image.open(window.page.table.parent / path))[9, 9, 0] for path in paths]
    assert seen == [int(value) for value in stored] and len(set(seen)) == 4


def test_skip_done_page_and_what_was_skipped(window):
    window.enter("skipper in a window")
    first = window.shown()["id"]
    window.answer(window.keys, "s")
    for _ in range(TOTAL - 1):
        window.answer(window.keys, "3")
    assert window.shown()["id"] == first
    window.answer(window.click, "#others [data-do=skip]")
    text = window.run("return document.querySelector('main').innerText")
    assert "Nearly done" in text and f"rated {TOTAL - 1} of {TOTAL} images and skipped 1" in text
    window.click("#again")
    window.wait("state.current && seen")
    assert window.shown()["id"] == first
    window.answer(window.keys, "1")
    assert f"all {TOTAL} images" in window.run("return document.querySelector('main').innerText")
    assert window.run("return document.activeElement.id") == "thanks"
    assert len(window.table("skipper in a window")) == TOTAL
    window.click("#done [data-do=undo]")
    window.wait("state.current && seen")
    assert window.shown()["id"] == first and len(window.table("skipper in a window")) == TOTAL - 1
    assert window.run("return document.getElementById('done').hidden")


def test_a_reload_continues_and_another_rater_starts_fresh(window):
    window.enter("reloader")
    window.answer(window.keys, "2")
    before = window.shown()
    window.driver.refresh()
    window.wait("state && seen")
    assert window.shown() == before
    window.click("#leave")
    window.enter("somebody else")
    assert window.shown()["count"] == f"0 of {TOTAL} rated"


def test_keys_that_mean_something_else_rate_nothing(window):
    """A held key rates once; shortcuts of the browser, and typing a name, rate nothing; nor does a key too early."""
    window.enter("careful")
    first = window.shown()["id"]
    press = (
        "document.dispatchEvent(new KeyboardEvent('keydown', Object.assign({key: '3', bubbles: true}, arguments[0])))"
    )
    press = f"document.body.{press.removeprefix('document.')}"
    for more in ({"repeat": True}, {"ctrlKey": True}, {"metaKey": True}, {"altKey": True}, {"key": "4"}):
        window.run(press, more)
    window.run(f"seen = false; {press}; seen = true", {})
    assert not window.run("return busy") and window.shown()["id"] == first
    window.run(f"{press}; {press}; {press}", {})  # faster than any answer
    window.wait(f"seen && state.current.id !== '{first}'")
    assert len(window.table("careful")) == 1


def test_only_this_server_is_asked_and_the_next_image_is_there_before(window):
    window.enter("network")
    window.wait("images.size === 2")
    following = window.run("return state.next.id")
    window.answer(window.keys, "1")
    messages = [json.loads(entry["message"])["message"] for entry in window.driver.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    page = window.page
    asked = asked[len(asked) - 1 - asked[::-1].index(f"{page.url}api/state") :]  # not those of the page before
    assert {url.split("/")[2] for url in asked if url.startswith("http")} == {f"{page.host}:{page.port}"}
    assert asked.count(f"{page.url}image/{following}") == 1  # loaded ahead, and not again
    assert not any(word in url for url in asked for word in ("real", "made", "secret", "source", "png", "jpg"))


def test_zoom_by_key_click_wheel_and_drag(window):
    window.enter("zoomer")
    size = (
        "const s = document.getElementById('stage'); return [s.scrollWidth / s.clientWidth, s.scrollLeft, s.scrollTop]"
    )
    assert window.run(size) == [1, 0, 0]
    stage = window.driver.find_element("id", "stage")
    window.keys("z")
    scale, left, top = window.run(size)
    assert scale == pytest.approx(2.5, abs=0.01) and left == pytest.approx(top) and left > 0
    ActionChains(window.driver).drag_and_drop_by_offset(stage, 50, 30).perform()
    assert window.run(size)[1:] == pytest.approx([left - 50, top - 30], abs=1)
    assert window.run("return zoom") == 2.5  # a drag is no click
    stage.click()
    assert window.run(size) == [1, 0, 0]
    stage.click()
    assert window.run("return zoom") == 2.5
    window.answer(window.keys, "2")
    assert window.run(size) == [1, 0, 0]  # each image starts whole
    ActionChains(window.driver).scroll_from_origin(ScrollOrigin.from_element(stage, 30, 30), 0, -300).perform()
    window.wait("zoom > 1.4")
    assert window.run("return scrollY") == 0


@pytest.mark.parametrize("width,height", [(1280, 800), (320, 568), (667, 375)])
def test_everything_is_in_reach_without_scrolling_sideways(window, width, height):
    window.open(width, height)
    window.enter(f"phone {width}")
    for section in ("start", "done", "ask"):
        window.run("only(arguments[0])", section)
        assert window.run("return document.documentElement.scrollWidth") <= width
    boxes = window.run(
        "return [...document.querySelectorAll('#ask button')].map(b => b.getBoundingClientRect().toJSON())"
    )
    assert len(boxes) == 6
    assert all(box["height"] >= 44 and box["left"] >= 0 and box["right"] <= width for box in boxes)
    assert all(box["bottom"] <= height for box in boxes)
    cut = "return [...document.querySelectorAll('#ask button')].filter(b => b.scrollWidth > b.clientWidth).length"
    assert window.run(cut) == 0
    stage = window.run("return document.getElementById('stage').getBoundingClientRect().toJSON()")
    assert stage["width"] == pytest.approx(stage["height"], abs=1) and stage["width"] > min(width, height) * 0.35


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_legible_and_controls_have_names(window, scheme):
    """WCAG's contrast of at least 4.5 for text and 3 for the borders of buttons; each control has a name."""
    window.open(scheme=scheme)
    window.enter(f"reader {scheme}")

    def contrast(one: str, other: str) -> float:
        light, dark = sorted((luminance(one), luminance(other)), reverse=True)
        return (light + 0.05) / (dark + 0.05)

    window.run("for (const id of ['start', 'ask', 'done']) document.getElementById(id).hidden = false; tell('Fault.')")
    ground = window.run("return getComputedStyle(document.body).backgroundColor")
    assert (luminance(ground) < 0.2) == (scheme == "dark")
    styles = window.run(
        "return [...document.querySelectorAll('main *')].filter(e => !e.matches('[aria-disabled=true], "
        "[aria-disabled=true] *')).map(e => { const s = getComputedStyle(e);"
        "return [s.color, s.backgroundColor, e.tagName === 'BUTTON' ? s.borderTopColor : '']; })"
    )
    for colour, behind, border in {tuple(style) for style in styles}:
        behind = ground if behind.endswith(", 0)") else behind
        if behind != "rgb(0, 0, 0)":  # the image's own ground, on which no text stands
            assert contrast(colour, behind) >= 4.5, (colour, behind)
        if border:
            assert contrast(border, ground) >= 3, border
    names = window.run(
        "return [...document.querySelectorAll('button, input, progress, [role=group], img')].map(e =>"
        "(e.labels && e.labels.length ? e.labels[0].innerText : '') || e.getAttribute('aria-label') || e.alt ||"
        "document.getElementById(e.getAttribute('aria-labelledby'))?.innerText || e.innerText)"
    )
    assert len(names) >= 15 and all(name.strip() for name in names)
    assert window.run("return document.getElementById('alert').getAttribute('role')") == "alert"


def test_a_click_that_is_not_saved_is_reported_and_the_image_stays(window):
    window.enter("unlucky")
    shown = window.shown()
    window.run("window.real = window.fetch; window.fetch = () => Promise.reject(new TypeError('offline'))")
    window.keys("3")
    window.wait("document.getElementById('alert').innerText.includes('does not answer')")
    assert window.shown() == shown and window.table("unlucky") == []
    window.run("window.fetch = window.real")
    window.answer(window.keys, "3")
    assert window.run("return document.getElementById('alert').innerText") == "" and len(window.table("unlucky")) == 1
