"""scripts/rate.py over real HTTP: blindness, refusals, files after a click, resuming, several raters."""

import contextlib
import io
import itertools
import json
import signal
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException

import pytest
from PIL import Image
from rating_tools import PROMPTS, RatePage, write_gallery
from refusals import refused
from script_tools import call_main, load_flag_script, load_module

from ddpo_pytorch.data.images import SYNTHETIC, save_picture
from ddpo_pytorch.data.ratings import COLUMNS, read_ratings
from ddpo_pytorch.rating.session import distinct, order_for, pair_items, sample_items, table_items
from ddpo_pytorch.rating.store import Store

pytestmark = pytest.mark.slow
listen = pytest.importorskip("ddpo_pytorch.rating.server", reason="fastapi absent", exc_type=ImportError).listen


def test_nothing_that_is_sent_reveals_the_source_and_ratings_are_what_training_reads(rating_page):
    """Whole answers are searched: headers, the page, states, images. PNG and JPEG files leave as the same kind."""
    answers, kinds, orders, wanted = [rating_page.ask("/")], set(), {}, []
    for rater in ("order a", "order b"):
        state, orders[rater] = rating_page.post("state", rater), []
        assert (state["total"], state["rated"]) == (9, 0)
        while state["current"]:
            assert set(state["current"]) == {"id", "prompt"} and state["current"]["prompt"] in PROMPTS
            answers.append(rating_page.ask(f"/image/{state['current']['id']}"))
            picture = Image.open(io.BytesIO(answers[-1].content))
            assert picture.info == {} and picture.format == "PNG"
            kinds.add((frozenset(answers[-1].headers.keys()), answers[-1].headers["content-type"]))
            orders[rater].append(picture.getpixel((0, 0))[0])
            wanted.append((rater, 1 + len(wanted) % 3, state["current"]["prompt"]))
            state = rating_page.rate(rater, state, wanted[-1][1], level=1)
            assert not set(json.dumps(state).lower().split('"')) & {"real", "made", "secret", "source"}
    assert len(kinds) == 1
    for answer in answers:
        sent = f"{answer.headers.items()}".encode() + answer.content
        for source in (b"hidden-generator", b"/real", b"/made", b"secret", b"jpg", b"last-modified", b"uvicorn"):
            assert source not in sent.lower()
    for reds in orders.values():  # the folders are mixed, in the rater's own order
        made = [value >= 120 for value in reds]  # JPEG is off by a level or two
        assert sum(made) == 5 and made not in (sorted(made), sorted(made, reverse=True))
    assert orders["order a"] != orders["order b"] and sorted(orders["order a"]) == sorted(orders["order b"])
    rows = [row for row in read_ratings(rating_page.table) if row.rater_id in orders]
    assert [(row.rater_id, row.rating, row.prompt) for row in rows] == wanted
    stored = [Image.open(row.path).getpixel((0, 0))[0] for row in rows]
    assert stored == pytest.approx(orders["order a"] + orders["order b"], abs=2)
    assert {row.expert_level for row in rows} == {1}
    assert {line.split(",")[2] for line in rating_page.table.read_text().splitlines()} == {"modality", "Fundus"}
    assert not any(row.image.startswith(("/", "..")) for row in rows)


def test_an_undo_is_of_the_click_that_the_page_shows(rating_page):
    """A second try after a lost answer, and a window that does not know of the other's click, undo nothing."""
    who, states = "undoer", [rating_page.post("state", "undoer")]
    for rating in (1, 2, 3):
        states.append(rating_page.rate(who, states[-1], rating))
    assert [state["undo"] for state in states] == [0, 1, 2, 3]
    assert rating_page.rate(who, states[1], 1) == states[3] | {"already": True}  # rated in another window
    assert rating_page.post("undo", who, undoable=3) == states[2]
    for stale in (3, 1, 0, -1):
        assert rating_page.post("undo", who, undoable=stale) == states[2] | {"already": True}
    assert rating_page.ask("/api/undo", {"rater": who, "undoable": "2"}).status == 422
    assert rating_page.post("undo", who, undoable=2) == states[1]
    assert [row.rating for row in read_ratings(rating_page.table) if row.rater_id == who] == [1]


def test_nothing_but_listed_images_is_served(rating_page):
    paths = ["/image/%2e%2e%2fratings.csv", "/image/" + "0" * 32, "/images/source/0.jpg", "//etc/passwd", "/docs"]
    for answer in map(rating_page.ask, [*paths, "/page.js"]):
        assert answer.status == 404 and b"root:" not in answer.content and COLUMNS[0].encode() not in answer.content
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'") and "unsafe" not in policy and "http" not in policy
        assert answer.headers["referrer-policy"] == "no-referrer" and answer.headers["cache-control"] == "no-store"


def test_requests_of_others_and_faulty_clicks_change_nothing(rating_page):
    state = rating_page.post("state", "steady")
    tables = rating_page.table, rating_page.table.with_name("ratings.journal.csv")
    before = [table.read_bytes() for table in tables]
    for headers, status in (
        *(({"Origin": origin}, 403) for origin in ("http://evil.example", "http://[", None)),
        *(({"Host": host}, 400) for host in ("evil.example", "127.0.0.1.evil.example", None)),
        *(({"Transfer_Encoding": "chunked"} | length, 413) for length in ({}, {"Content_Length": None})),
        ({"Content_Length": "4097"}, 413),
        ({"Content_Type": "text/plain"}, 415),
    ):
        chunked = b'15\r\n{"rater": "intruder"}\r\n0\r\n\r\n'
        body = chunked if "Transfer_Encoding" in headers else {"rater": "intruder"}
        assert rating_page.ask("/api/state", body, **headers).status == status, headers
        if "Host" in headers:
            assert rating_page.ask("/", **headers).status == status, headers
    usual = {"rater": "steady", "id": state["current"]["id"], "rating": 2, "expert_level": 2}
    faults = {"rating": (0, 4, 2.5, "2", None, True), "expert_level": (0, None), "id": ("../x", "0" * 32, 5)}
    faults |= {"rater": ("  ", "a,b", "\ud800", 7)}
    for name, value in ((name, value) for name, values in faults.items() for value in values):
        assert rating_page.ask("/api/rate", usual | {name: value}).status in (404, 422), (name, value)
    assert [table.read_bytes() for table in tables] == before
    assert rating_page.ask("/api/rate", b"{" * 5000).status == 413
    assert rating_page.post("state", "steady") == state


def test_kill_resume_token_and_end(tmp_path):
    """Every flag in use. A click is on disk when it is confirmed; the same command resumes; others need a token."""
    made, table = tmp_path / "made", tmp_path / "ratings.csv"
    write_gallery(made, 4)
    (tmp_path / "captions.csv").write_text("path,Text\nimages/source/0.png,Drusen.\nimages/source/1.png,Myopia.\n")
    command = ["--images", made, "--csv", tmp_path / "captions.csv", "--data_path", made, "--out", table, "--seed", 5]
    command += ["--rater", "Ann", "--expert_level", 3, "--image_size", 32, "--resize", "crop"]
    items = distinct(sample_items(made, table) + table_items(tmp_path / "captions.csv", made, table))
    order = [items[number] for number in order_for(6, 5, "Ann")]
    with listen("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    page = RatePage(*command, "--token", "a-token-of-my-own", "--port", port)
    assert (page.host, page.port, page.token) == ("127.0.0.1", port, "a-token-of-my-own")
    assert page.ask("/", Cookie=None).status == 401
    state = page.post("state", "Ann")
    assert Image.open(io.BytesIO(page.ask(f"/image/{state['current']['id']}").content)).size == (32, 32)
    for rating in (3, 1):
        state = page.rate("Ann", state, rating, level=1)  # but the flag says 3
    assert page.ask("/api/state", {"rater": "Bob"}).status == 422
    assert page.end(signal.SIGKILL) == -signal.SIGKILL
    rows = [(row.rating, row.expert_level, row.image, row.prompt, row.rater_id) for row in read_ratings(table)]
    assert rows == [(3, 3, *order[0].key[:2], "Ann"), (1, 3, *order[1].key[:2], "Ann")]

    with open(table, "ab") as file:
        file.write(b"made/images/source/0.png,2,Fun")
    edited = table.read_bytes()
    page = RatePage(*command, "--host", "0.0.0.0")
    assert (tmp_path / "ratings.edited-1.csv").read_bytes() == edited and edited.startswith(table.read_bytes())
    assert len(page.token) >= 40
    for wrong in ("/", "/?token=", f"/?token={page.token[:-1]}x", f"/image/0?token={page.token}", "/nothing"):
        for cookie in (None, page.cookie + "x", page.cookie[:-1], "rate=" + page.token):
            assert page.ask(wrong, Cookie=cookie).status == 401
    assert page.ask("/api/state", {"rater": "Ann"}, Cookie=None).status == 401
    assert page.ask(f"/?token={page.token}", Host="evil.example").status == 400
    attributes = page.ask(f"/?token={page.token}").headers["set-cookie"].lower()
    assert "httponly" in attributes and "samesite=strict" in attributes
    state = page.post("state", "Ann")
    assert (state["rated"], state["total"]) == (2, 6)
    assert [state[name]["prompt"] for name in ("current", "next")] == [item.prompt for item in order[2:4]]
    assert page.post("undo", "Ann")["current"]["prompt"] == order[1].prompt
    refused("ratings.csv", Store, table)
    assert page.end(signal.SIGINT) == 0
    assert "1 ratings are in" in page.lines[-1] and "Traceback" not in "".join(page.lines)
    assert [row.rating for row in read_ratings(table)] == [3]


def test_no_confirmed_rating_is_lost_by_a_kill(tmp_path):
    """Four raters click as fast as they can when the page is killed; the table is complete, and so is a restart."""
    write_gallery(tmp_path / "made", 60)
    table, confirmed = tmp_path / "ratings.csv", []
    page = RatePage("--images", tmp_path / "made", "--out", table)

    def work(rater: str) -> None:
        state = page.post("state", rater)
        with contextlib.suppress(OSError, HTTPException):
            for rating in itertools.cycle((1, 2, 3, 3)):
                asked = state["current"]["id"]
                state = page.rate(rater, state, rating)
                if rating == 3 and len(confirmed) % 5 == 0:
                    state = page.post("undo", rater)
                    continue
                confirmed.append((rater, asked, rating))

    with ThreadPoolExecutor(4) as pool:
        for name in ("a", "b", "c", "d"):
            pool.submit(work, name)
        while len(confirmed) < 25:
            time.sleep(0.001)
        page.end(signal.SIGKILL)
    counts = Counter((rater, rating) for rater, _, rating in confirmed)
    killed, store = read_ratings(table), Store(table)
    restored = store.answers([item.key for item in sample_items(tmp_path / "made", table)])
    store.close()
    for rows in (killed, read_ratings(table)):
        found = Counter((row.rater_id, row.rating) for row in rows)
        assert all(found[key] >= count for key, count in counts.items())
        assert len(confirmed) <= len(rows) <= len(confirmed) + 4  # a click of each rater may have been on its way
    assert len(restored) == len(rows)
    assert not list(tmp_path.glob(".*tmp")) and not list(tmp_path.glob("*edited*"))


def test_telling_photographs_from_generated_images(tmp_path):
    """A reader who takes the first three of eight for photographs is right about five of them by the files' marks."""
    write_gallery(tmp_path / "photographs", 4)
    for entry in write_gallery(tmp_path / "drawn", 4, shade=128):
        path = tmp_path / "drawn" / entry["path_to_img"]
        save_picture(path, Image.open(path), SYNTHETIC)
    folders = f"{tmp_path / 'photographs'},{tmp_path / 'drawn'}"
    page = RatePage("--mode", "real", "--images", folders, "--out", tmp_path / "read.csv")
    state, right = page.post("state", "reader"), 0
    for number in range(8):
        shown = page.ask(f"/image/{state['current']['id']}")
        drawn, guessed = Image.open(io.BytesIO(shown.content)).getpixel((0, 0))[0] >= 128, number >= 3
        right += drawn == guessed
        state = page.rate("reader", state, 1 if guessed else 3)
    assert page.end() == 0
    accuracy = json.loads((tmp_path / "read.summary.json").read_text())["reader"]["accuracy"]
    assert (accuracy["value"], accuracy["n"]) == (right / 8, 8)


def test_the_summary_counts_this_study_alone_with_its_folders_in_either_order(tmp_path, monkeypatch):
    """A reader who always prefers RL to SD, in a table that also has answers to another study."""
    monkeypatch.setattr("ddpo_pytorch.rating.server.serve", lambda app, sock: sock.close())
    script, table, items = load_flag_script("rate.py"), tmp_path / "ratings.csv", []
    for shade, name in enumerate(("SD", "RL", "other")):
        write_gallery(tmp_path / name, 3, shade=50 * shade)
        items.append(sample_items(tmp_path / name, table))
    store = Store(table, "pair")
    for rival, rating in ((1, 1), (2, 3)):
        for pair in pair_items(items[0], items[rival]):
            store.click("rate", pair, "Ann", rating=rating, expert_level=3)
    store.close()
    for first, second, value in (("SD", "RL", 1), ("RL", "SD", 0)):
        call_main(script, "--mode=pair", f"--images={tmp_path / first},{tmp_path / second}", f"--out={table}")
        found = json.loads((tmp_path / "ratings.summary.json").read_text())["Ann"][f"{second} preferred to {first}"]
        assert (found["value"], found["n"]) == (value, 3)
    given = "--mode=rate", f"--images={tmp_path / 'SD'}", f"--out={table}"
    refused("line 2: .*--mode=pair.* rate.*--out", call_main, script, *given)


def test_what_cannot_be_asked_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_gallery(tmp_path / "one", 2)
    entries = [entry | {"prompt": "Fundus: x"} for entry in write_gallery(tmp_path / "other", 2)]
    (tmp_path / "other/image_log.json").write_text(json.dumps(entries))
    for options, message in (
        ([], "give --images FOLDER, or --csv TABLE"),
        (["--csv=table.csv"], "--csv and --data_path must be given together"),
        (["--images=one", "--mode=real"], "--mode=real needs photographs and images marked as generated"),
        (["--images=one", "--mode=pair"], "two sources, got 1"),
        (["--images=one,other", "--mode=pair"], "one and .*other share no prompt"),
        (["--images=one", "--examples=one"], "--examples=.*one"),
        (["--images=one", "--repeats=0.6"], "--repeats is 0.6"),
        (["--images=one", "--repeats=nan"], "--repeats is nan"),
    ):
        refused(message, call_main, load_flag_script("rate.py"), *options, "--out=ratings.csv")
        assert not (tmp_path / "ratings.csv").exists()


def test_without_fastapi_one_line_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "ddpo_pytorch.rating.server")
    monkeypatch.setitem(sys.modules, "fastapi", None)
    refused("fastapi is not installed", load_module("scripts/rate.py").main, [])
