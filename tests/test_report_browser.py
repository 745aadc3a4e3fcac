"""The report in headless Chromium: requests, width on a phone, contrast, print."""

import base64
import json
import re
import shutil

import pytest
from report_example import SHOWN, minimal

from ddpo_pytorch.report.page import write_report

pytestmark = pytest.mark.slow
pytest_plugins = ["script_tools", "sample_sets", "report_example"]

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
)  # fmt: skip


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium absent")
    chromium, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("browser absent: chromium and chromedriver are not both on the path")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    window = webdriver.Chrome(options, Service(driver))
    yield window
    window.quit()


@pytest.fixture(scope="module")
def pages(example, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ddpo_pytorch.report.page.OPEN_GRIDS", 1)  # the others are folded away
        full = write_report(folder / "full", *example)
    return {"full": full, "minimal": write_report(folder / "minimal", minimal(example[0]), {}, [])}


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


def open_details(browser) -> None:
    browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")


@pytest.mark.parametrize(("name", "width"), [("full", 390), ("full", 1280), ("minimal", 390)])
def test_nothing_is_loaded_and_the_page_does_not_scroll_sideways(browser, pages, name, width):
    asked = [request["url"] for request in visit(browser, pages[name], width)]
    assert [url for url in asked if not url.startswith("data:")] == [pages[name].as_uri()]
    assert browser.get_log("browser") == []
    open_details(browser)
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


def test_print_opens_what_is_folded(browser, pages):
    visit(browser, pages["full"], scheme="dark", media="print")
    visible = "return [...document.querySelectorAll('details')].map(d => d.lastElementChild.checkVisibility())"
    assert set(browser.execute_script(visible)) == {True}
    assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    pdf = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {"preferCSSPageSize": True})["data"])
    # the pictures of all prompts are on the pages, not only those of the first
    assert pdf.count(b"/Subtype /Image") + pdf.count(b"/Subtype/Image") >= 2 * 2 * len(SHOWN)
