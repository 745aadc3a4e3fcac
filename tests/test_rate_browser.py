"""The rating page in a real headless Chromium: keyboard, mouse, undo, progress, the end, phones, contrast."""

import json

import pytest
from PIL import Image
from rating_tools import RatePage, write_gallery
from script_tools import read_table, save_pictures

pytest.importorskip("selenium", reason="selenium absent")
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.wait import WebDriverWait  # noqa: E402

pytestmark = pytest.mark.slow
TOTAL = 9


class Window:
    """The page in a browser, with a rater of its own."""

    def __init__(self, driver, page):
        self.driver, self.page = driver, page
        self.run = driver.execute_script

    def open(self, rater: str, level: int = 2, width: int = 1280, height: int = 800) -> None:
        """Open the page and fill in the form as a person does, after clearing what the last test left in this tab."""
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        self.driver.get(self.page.url)
        self.run("Storage.prototype.setItem = () => {}; sessionStorage.clear()")
        self.driver.refresh()
        assert self.run("return document.activeElement.id") == "name"
        self.keys(rater)
        self.click(f"#form [value='{level}']")
        self.click("#form .main")
        self.wait("state && state.current && seen")

    def wait(self, condition: str) -> None:
        met = f"return Boolean({condition}) && !busy"
        WebDriverWait(self.driver, 10, 0.01).until(lambda driver: driver.execute_script(met), condition)

    def keys(self, text: str) -> None:
        ActionChains(self.driver).send_keys(text).perform()

    def click(self, selector: str) -> None:
        self.driver.find_element("css selector", selector).click()

    def text(self, name: str) -> str:
        return self.run("return document.getElementById(arguments[0]).innerText", name)

    def shown(self) -> dict:
        """Id, text on the page, and the colour in the middle of the image that is on the screen."""
        return self.run(
            "const i = document.getElementById('image'), c = document.createElement('canvas').getContext('2d');"
            "c.drawImage(i, 0, 0); return {id: state.current.id, red: c.getImageData(9, 9, 1, 1).data[0],"
            "prompt: document.getElementById('prompt').textContent}"
        )

    def answer(self, act, *arguments) -> None:
        """Do something that shows the next image, and wait for it; a rating answers both questions alike."""
        before = self.run("return state.current.id")
        act(*arguments)
        self.wait("true")  # a request in progress still has the answers that it sends
        if self.run(f"return answers.length > 0 && state.current.id === '{before}'"):
            act(*arguments)
        self.wait(f"!state.current || (seen && state.current.id !== '{before}')")

    def table(self, rater: str) -> list[dict]:
        return [row for row in read_table(self.page.table) if row["rater_id"] == rater]


@pytest.fixture
def window(browser, rating_page):
    browser.get_log("browser")
    return Window(browser, rating_page)


def test_keyboard_and_mouse_give_the_same_ratings(window):
    """Every rating by key and by button is on disk with the text and the image that were on the screen."""
    window.open("hands", level=3)
    wanted = []
    for rating in ("1", "2", "3"):
        for act, argument in ((window.keys, rating), (window.click, f"#ratings [data-do='{rating}']")):
            shown = window.shown()
            assert window.text("progress-text") == f"{len(wanted)} of {TOTAL} rated"
            wanted.append((rating, shown["prompt"], "3", shown["red"]))
            window.answer(act, argument)
    rows = window.table("hands")
    reds = [Image.open(window.page.table.parent / row["image_path"]).getpixel((9, 9))[0] for row in rows]
    table = [(row["rating"], row["prompt"], row["expert_level"]) for row in rows]
    assert [(*row, red) for row, red in zip(table, reds, strict=True)] == wanted
    for act, argument in ((window.keys, "u"), (window.keys, Keys.BACKSPACE), (window.click, "#others [data-do=undo]")):
        window.answer(act, argument)
    assert window.table("hands") == rows[:3] and window.text("progress-text") == f"3 of {TOTAL} rated"
    assert window.driver.get_log("browser") == []


def test_skip_done_page_and_what_was_skipped(window):
    window.open("skipper in a window")
    first = window.shown()["id"]
    window.answer(window.keys, "s")
    for _ in range(TOTAL - 1):
        window.answer(window.keys, "3")
    assert window.shown()["id"] == first
    window.answer(window.click, "#others [data-do=skip]")
    assert f"rated {TOTAL - 1} of {TOTAL} images and skipped 1" in window.text("summary")
    window.click("#again")
    window.wait("state.current && seen")
    assert window.shown()["id"] == first
    window.answer(window.keys, "1")
    assert f"all {TOTAL} images" in window.text("summary") and len(window.table("skipper in a window")) == TOTAL
    window.click("#done [data-do=undo]")
    window.wait("state.current && seen")
    assert window.shown()["id"] == first and len(window.table("skipper in a window")) == TOTAL - 1
    window.click("#leave")
    window.wait("!state && document.activeElement.id === 'name'")


def test_keys_that_mean_something_else_rate_nothing(window):
    """A held key rates once; shortcuts of the browser, and typing a name, rate nothing; nor does a key too early."""
    window.open("careful")
    first = window.shown()["id"]
    event = "new KeyboardEvent('keydown', Object.assign({key: '3', bubbles: true}, arguments[0]))"
    press = f"document.body.dispatchEvent({event})"
    for more in ({"repeat": True}, {"ctrlKey": True}, {"metaKey": True}, {"altKey": True}, {"key": "4"}):
        window.run(press, more)
    window.run(f"seen = false; {press}; seen = true", {})
    assert not window.run("return busy") and window.shown()["id"] == first
    window.run(f"{press}; {press}; {press}", {})  # faster than any answer
    window.wait(f"seen && state.current.id !== '{first}'")
    assert len(window.table("careful")) == 1


def test_two_questions_ungradable_red_free_and_a_click_that_no_key_repeats(window):
    """The text is hidden until the quality is rated; undo leads back to that; Enter after a click rates nothing."""
    window.open("thorough")
    hidden = "return document.getElementById('text').hidden"
    assert window.run(hidden) and "photograph" in window.text("question")
    window.click("#ratings [data-do='3']")
    assert not window.run(hidden) and "text" in window.text("question")
    window.keys("u")
    assert window.run(hidden)
    window.click("#ratings [data-do='2']")
    ActionChains(window.driver).send_keys(Keys.ENTER, Keys.SPACE).perform()
    assert window.run("return answers") == [2]
    window.answer(window.keys, "1")
    window.answer(window.keys, "0")
    rows = [(row["rating"], row["quality"], row["alignment"]) for row in window.table("thorough")]
    assert sorted(rows) == [("1", "1", "1"), ("1", "2", "1")]
    window.keys("g")
    window.run("document.getElementById('contrast').value = 150; look(green)")
    shown = window.run("return getComputedStyle(document.getElementById('image')).filter")
    assert "#green" in shown and "contrast(1.5)" in shown
    window.answer(window.keys, "3")
    assert "#green" not in window.run("return getComputedStyle(document.getElementById('image')).filter")


def test_zoom_by_key_click_and_wheel_around_the_pointer(window):
    window.open("zoomer")
    box = (
        "const [i, s] = ['image', 'stage'].map(n => document.getElementById(n).getBoundingClientRect());"
        "return [i.width / s.width, (i.left - s.left) / s.width, (i.top - s.top) / s.height]"
    )
    stage = window.driver.find_element("id", "stage")
    actions, side = ActionChains(window.driver), stage.rect["width"]
    actions.move_to_element_with_offset(stage, -side / 4, side / 4).perform()  # at (1/4, 3/4), which stays where it is
    assert window.run(box) == [1, 0, 0]
    window.keys("z")
    assert window.run(box) == pytest.approx([2.5, -1.5 / 4, -1.5 * 3 / 4], abs=0.02)
    stage.click()
    assert window.run(box) == [1, 0, 0]
    stage.click()
    assert window.run("return zoom") == 2.5
    window.answer(window.keys, "2")
    assert window.run(box) == [1, 0, 0]  # each image starts whole
    window.run("arguments[0].dispatchEvent(new WheelEvent('wheel', {deltaY: -300, cancelable: true}))", stage)
    assert window.run("return zoom") > 1.4


@pytest.mark.parametrize("width,height", [(1280, 800), (320, 568), (667, 375)])
def test_everything_is_in_reach_without_scrolling_sideways(window, width, height):
    window.open(f"phone {width}", width=width, height=height)
    for section in ("start", "done", "ask"):
        window.run("only(arguments[0])", section)
        assert window.run("return document.documentElement.scrollWidth") <= width
    buttons = window.driver.find_elements("css selector", "#ask button")
    boxes = [window.run("return arguments[0].getBoundingClientRect().toJSON()", button) for button in buttons]
    assert len(boxes) == 8
    for box in boxes:
        assert box["height"] >= 44 and box["left"] >= 0 and box["right"] <= width and box["bottom"] <= height


def test_a_click_that_is_not_saved_is_reported_and_the_image_stays(window):
    window.open("unlucky")
    shown = window.shown()
    window.run("window.real = window.fetch; window.fetch = () => Promise.reject(new TypeError('offline'))")
    window.keys("3")
    window.keys("3")
    window.wait("document.getElementById('alert').innerText.includes('does not answer')")
    assert window.shown() == shown and window.table("unlucky") == []
    window.run("window.fetch = window.real")
    window.keys("3")  # the second question is still asked
    window.wait("!answers.length")
    assert window.text("alert") == "" and len(window.table("unlucky")) == 1


def test_pairs_by_key_arrow_and_button_and_what_they_say_at_the_end(browser, tmp_path):
    """Both images are on the screen; the answers become preferences and a summary."""
    write_gallery(old := tmp_path / "old", 4)
    write_gallery(new := tmp_path / "new", 4, shade=128)
    out = tmp_path / "pairs.csv"
    page = RatePage("--mode", "pair", "--images", old, "--images", new, "--out", out, "--repeats", 0.25)
    window = Window(browser, page)
    window.open("chooser", width=390, height=844)
    reds = "return ['image', 'second'].map(n => { const c = document.createElement('canvas').getContext('2d');"
    reds += "c.drawImage(document.getElementById(n), 0, 0); return c.getImageData(9, 9, 1, 1).data[0] })"
    wanted, seen = [], []
    for key, chosen in (("1", 0), (Keys.ARROW_RIGHT, 1), ("0", None), ("2", 1)):
        shown = window.run(reds)
        assert sorted(red >= 128 for red in shown) == [False, True] and window.text("prompt")
        if chosen is not None and sorted(shown) not in seen:
            wanted.append((shown[chosen], shown[1 - chosen]))
        seen.append(sorted(shown))
        window.answer(window.keys, key)
    window.answer(window.click, "#ratings [data-do='2']")
    assert "new preferred to old" in window.text("results") and "same answer to repeated" in window.text("results")
    assert page.end() == 0
    rows = [(row["chosen"], row["rejected"]) for row in read_table(tmp_path / "pairs.preferences.csv")]
    assert [tuple(Image.open(tmp_path / path).getpixel((9, 9))[0] for path in row) for row in rows] == wanted
    summary = json.loads((tmp_path / "pairs.summary.json").read_text())
    assert summary["title"] and summary["chooser"]["new preferred to old"]["n"] == 4


def test_criteria_and_reference_images(browser, tmp_path):
    write_gallery(tmp_path / "made", 2)
    save_pictures(examples := tmp_path / "examples", "3_clear.png")
    page = RatePage("--images", tmp_path / "made", "--out", tmp_path / "r.csv", "--criteria", "--examples", examples)
    page.table = tmp_path / "r.csv"
    window = Window(browser, page)
    window.open("careful")
    window.keys("e")
    window.wait("document.querySelector('#examples img')?.naturalWidth === 8")
    window.keys("3")  # rates nothing while the image is hidden
    window.keys("e")
    assert window.run("return answers.length") == 0
    for rating in "32113":
        window.keys(rating)
    window.answer(window.keys, "2")
    (row,) = window.table("careful")
    names = ("quality", "disc", "vessels", "contrast", "artifacts", "alignment", "rating")
    assert "".join(row[name] for name in names) == "3211322" and page.end() == 0
