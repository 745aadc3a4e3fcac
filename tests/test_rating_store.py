"""Parts of the rating page: items, files after crashes, a rater's progress, the guard."""

import calendar
import csv
import dataclasses
import errno
import io
import itertools
import json
import os
import socket
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rating_tools import PROMPTS, write_gallery
from refusals import refused
from script_tools import call_main, load_flag_script, read_table

from ddpo_pytorch.data import ratings
from ddpo_pytorch.data.ratings import read_ratings
from ddpo_pytorch.metrics import readers
from ddpo_pytorch.rating.session import Progress, Questions, order_for, pair_items, sample_items
from ddpo_pytorch.rating.store import COLUMNS, JOURNAL_COLUMNS, Answer, Store, rater_name


@pytest.fixture
def items(tmp_path):
    write_gallery(tmp_path / "made", 4)
    return sample_items(tmp_path / "made", tmp_path / "ratings.csv")


def rated_by(store: Store, rater: str) -> list[tuple[str, str, str]]:
    rows = [row for row in read_table(store.path) if row["rater_id"] == rater]
    return [(row["image_path"], row["prompt"], row["other"]) for row in rows]


def ratings_in(store: Store) -> list[tuple[str, str, str]]:
    return [(row["image_path"], row["rating"], row["rater_id"]) for row in read_table(store.path)]


def restarted(store: Store) -> Store:
    """Return the next start of a store that ended as after kill -9."""
    store._lock.release()
    return Store(store.path)


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "ratings.csv")


@pytest.fixture
def rated(store, items) -> Store:
    """Four images rated by Ann."""
    for number, item in enumerate(items):
        store.click("rate", item, "Ann", rating=1 + number % 3, expert_level=2)
    assert len(read_table(store.path)) == 4
    return store


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("path_to_img", path, "leads out of") for path in ("images/../../x.png", "/etc/hostname", "images/linked/x.png")]
    + [("path_to_img", "images/absent.png", "absent.png"), ("path_to_img", "image_log.json", "not an image")]
    + [("path_to_img", 3, "path_to_img"), ("prompt", None, "prompt"), ("prompt", "two\nlines", "line breaks")]
    + [("patient", 3, "patient")],
)
def test_an_entry_that_leads_elsewhere_is_refused_at_the_start(tmp_path, items, field, value, message):
    folder = tmp_path / "made"
    (tmp_path / "x.png").write_bytes((folder / "images/source/0.png").read_bytes())
    (folder / "images/linked").symlink_to(tmp_path)
    entries = json.loads((folder / "image_log.json").read_text())
    entries[2][field] = value
    (folder / "image_log.json").write_text(json.dumps(entries))
    refused(rf"(entry 3|\[2\]).*{message}", sample_items, folder, tmp_path / "ratings.csv")
    refused("absent", sample_items, tmp_path / "absent", tmp_path / "ratings.csv")


def test_the_table_is_read_by_training_after_every_click(store, items):
    odd = 'Dr. "Q" O\'Neil'
    expected = [(1, 3, 2, odd), (1, 1, 1, "Ann"), (0, 2, 1, "Ann")]
    for number, rating, level, rater in expected:
        if number == 0:
            store.click("skip", items[0], "Ann")
        store.click("rate", items[number], rater, rating=rating, expert_level=level)
    rows = read_ratings(store.path)
    assert [(int(row.path.stem), row.rating, row.expert_level, row.rater_id) for row in rows] == expected
    assert [row.prompt for row in rows] == [PROMPTS[1], PROMPTS[1], PROMPTS[0]]
    store.click("undo", items[1], "Ann")
    assert [row.rater_id for row in read_ratings(store.path)] == [odd, "Ann"] and len(store) == 2
    clicks = [("rate", odd, "3"), ("rate", "Ann", "1"), ("skip", "Ann", ""), ("rate", "Ann", "2"), ("undo", "Ann", "1")]
    assert [(row["action"], row["rater_id"], row["rating"]) for row in read_table(store.journal)] == clicks
    assert rated_by(restarted(store), odd) == [items[1].key]


def test_a_crash_at_any_byte_loses_no_confirmed_click(store, items):
    """After each prefix of what one click writes, journal first, the next start has all clicks before it."""
    path, journal, keys, states = store.path, store.journal, [item.key for item in items], []
    for action, item, rating in (("rate", 0, 3), ("rate", 1, 1), ("undo", 1, None)):
        store.click(action, items[item], "Ann", **({"rating": rating, "expert_level": 2} if rating else {}))
        states.append({file: file.read_bytes() for file in (journal, path)})
    for before, after, rated in zip(states, states[1:], ((keys[:1], keys[:2]), (keys[:2], keys[:1])), strict=False):
        for cut in range(len(before[journal]), len(after[journal]) + 1):
            journal.write_bytes(after[journal][:cut])
            path.write_bytes(before[path])
            journaled = cut == len(after[journal])
            store = restarted(store)
            assert rated_by(store, "Ann") == rated[journaled]
            assert path.read_bytes() == (after if journaled else before)[path]
    for cut in range(len(after[path]) + 1):
        path.write_bytes(after[path][:cut])
        store = restarted(store)
        assert rated_by(store, "Ann") == keys[:1] and path.read_bytes() == after[path]


def as_a_spreadsheet_saves_it(content: bytes) -> bytes:
    table = pd.read_csv(io.BytesIO(content), dtype=str, keep_default_na=False)
    return table.to_csv(index=False, quoting=csv.QUOTE_ALL, lineterminator="\r\n").encode("utf-8-sig")


def change_file(path: Path, change) -> bytes | None:
    """Replace a file's content by `change(content)`, or remove it for None; what is there now."""
    content = change(path.read_bytes())
    path.unlink() if content is None else path.write_bytes(content)
    return content


CHANGES = {  # of the table by another program, and whether a copy of its content is saved
    "spreadsheet": (as_a_spreadsheet_saves_it, True),
    "utf-16": (lambda content: content.decode().encode("utf-16"), True),
    "torn": (lambda content: content[:-5], False),
    "deleted": (lambda content: None, False),
    "another rating": (lambda content: content.replace(b"0.png,1,", b"0.png,3,"), True),
    "half a row more": (lambda content: content + b"made/images/source/0.png,2,Fun", True),
    "a row more": (lambda content: content + content.splitlines()[1].replace(b"Ann", b"Bob") + b"\n", True),
}


@pytest.mark.parametrize("running", [False, True])
@pytest.mark.parametrize(("change", "kept"), CHANGES.values(), ids=CHANGES)
def test_the_table_is_what_the_journal_says_whatever_others_do_to_it(rated, items, change, kept, running, tmp_path):
    before, content = ratings_in(rated), change_file(rated.path, change)
    store = rated if running else restarted(rated)
    store.click("undo", items[3], "Ann")
    assert ratings_in(store) == before[:3] and rated_by(store, "Ann") == [item.key for item in items[:3]]
    store.click("rate", items[3], "Ann", rating=3, expert_level=1)
    store.click("rate", items[0], "Bob", rating=2, expert_level=1)
    wanted = [*before[:3], (items[3].image_path, "3", "Ann"), (items[0].image_path, "2", "Bob")]
    assert ratings_in(store) == wanted and len(read_ratings(store.path)) == len(store) == 5
    assert store.path.read_bytes().startswith(",".join(COLUMNS).encode() + b"\n")
    assert len(restarted(store)) == 5 and ratings_in(store) == wanted
    copies = {path.name: path.read_bytes() for path in tmp_path.glob("ratings*edited*")}
    assert copies == ({"ratings.edited-1.csv": content} if kept else {})


@pytest.mark.parametrize("running", [False, True])
@pytest.mark.parametrize("change", [as_a_spreadsheet_saves_it, lambda content: content[:-1], lambda content: None])
def test_the_journal_survives_what_others_do_to_it(rated, items, change, running):
    """A last line without its end is whole: the table shows it. Without a journal the table is the truth."""
    before = ratings_in(rated)
    change_file(rated.journal, change)
    store = rated if running else restarted(rated)
    store.click("skip", items[0], "Bob")
    store.click("rate", items[0], "Bob", rating=2, expert_level=1)
    wanted = [*before, (items[0].image_path, "2", "Bob")]
    assert ratings_in(store) == wanted
    store.path.unlink()
    assert len(restarted(store)) == 5 and ratings_in(store) == wanted
    assert [row["action"] for row in read_table(store.journal)] == ["rate"] * 4 + ["skip", "rate"]


@pytest.mark.parametrize("end", [b"2026-01-01T00:00:00Z,rate,made/im", b"\0" * 300, b"\xff\xfe", b'a,"'])
def test_an_end_of_the_journal_that_is_cut_off_is_dropped(rated, end, caplog):
    before, content = ratings_in(rated), rated.journal.read_bytes()
    rated.journal.write_bytes(content + end)
    restarted(rated)
    assert (ratings_in(rated), rated.journal.read_bytes()) == (before, content) and "line 6" in caplog.text


def test_a_table_without_a_journal_is_taken_as_it_is(tmp_path, items):
    """As people save it: other case, spaces, absolute paths, no last line end, unknown raters twice; no known times."""
    path, asked = tmp_path / "ratings.csv", [item.key for item in items]
    prompts = [item.prompt.replace('"', '""') for item in items]
    rows = [f'{tmp_path / key[0]}, 3.0, Fundus, 2, "{prompt}", Ann' for key, prompt in zip(asked, prompts, strict=True)]
    rows += [f"{items[1].image_path},1,Fundus,1,Scar,", f"./{items[1].image_path},2,Fundus,1,Scar,"]
    path.write_text("\n".join([", ".join(ratings.COLUMNS).upper(), *rows]))
    store = Store(path)
    assert rated_by(store, "Ann") == asked and len(store) == len(read_table(store.journal)) == 6
    assert [row.rating for row in read_ratings(path)] == [3, 3, 3, 3, 1, 2]
    assert read_table(path)[0]["image_path"] == items[0].image_path and store.seconds("Ann", asked) == []
    store.close()
    assert Store(path).seconds("Ann", asked) == []


def test_both_answers_the_patient_and_the_seconds_of_each_image_are_kept(store, items, monkeypatch):
    """Long breaks do not count, and clocks that go back in Berlin ten seconds after Bob begins do not matter."""
    now, asked, gmtime = 0, [item.key for item in items], time.gmtime
    monkeypatch.setattr(time, "gmtime", lambda: gmtime(now))
    answers = ((0, 3, 1), (4, 2, 3), (10, 1, None), (1000, 3, 3))
    for item, (second, quality, alignment) in zip(items, answers, strict=True):
        now, given = second, {"rating": quality, "expert_level": 3, "alignment": alignment}
        store.click("rate", dataclasses.replace(item, patient="P7"), "Ann", **given)
    rows = [(row.rating, *row.apart.values(), row.patient) for row in read_ratings(store.path)]
    assert rows == [(1, 3, 1, "P7"), (2, 2, 3, "P7"), (1, "P7"), (3, 3, 3, "P7")]
    assert store.seconds("Ann", asked) == [4, 6] and store.seconds("Bob", asked) == []
    assert store.seconds("Ann", asked[:2]) == [4]
    for hour, number in itertools.product(range(3), range(2)):
        now = calendar.timegm((2026, 10, 25, hour, 59, 50)) + 20 * number
        store.click("rate", items[number], "Bob", rating=2, expert_level=3)
    try:
        with monkeypatch.context() as patch:
            patch.setenv("TZ", "Europe/Berlin")
            time.tzset()
            assert store.seconds("Bob", asked) == [20, 20, 20]
    finally:
        time.tzset()


def finish(questions: Questions, rater: str, answer) -> dict:
    """Answer every question with the rating `answer(state)`; the last state."""
    state = questions.act("state", rater)
    while state["current"]:
        state = questions.act("rate", rater, state["current"]["id"], rating=answer(state), expert_level=2)
    return state


def test_hidden_repeats_come_late_are_no_ratings_and_can_be_undone(tmp_path):
    """They are in the journal alone; the same answer twice is agreement."""
    write_gallery(tmp_path / "made", 10)
    items, order = sample_items(tmp_path / "made", tmp_path / "ratings.csv"), order_for(10, 5, "Ann", 0.3)
    assert [number for number in order if number < 10] == order_for(10, 5, "Ann") and len(order) == 13
    assert all(order.index(number) - order.index(number - 10) > 5 for number in order if number >= 10)
    store, kinds = Store(tmp_path / "ratings.csv"), iter([n >= 10 for n in order])
    questions = Questions(items, store, 5, 0.3, summarise=lambda rater: [rater])
    state = finish(questions, "Ann", lambda state: 1 if next(kinds) and state["undo"] > 11 else 2)
    assert (state["total"], state["rated"], state["summary"]) == (13, 13, ["Ann"]) and len(store) == 10
    assert len(read_ratings(store.path)) == 10 and len(read_table(store.journal)) == 13
    answers = store.answers([item.key for item in items])
    found = readers.summarise(answers, "rate", lambda reader: [], {})["Ann"]["same answer to repeated images"]
    assert found.n == 3 and found.value == pytest.approx((2 if order[-1] >= 10 else 3) / 3)
    questions.close()
    again = Questions(items, Store(tmp_path / "ratings.csv"), 5, 0.3)
    for _ in range(13):
        state = again.act("undo", "Ann")
    assert state["undo"] == 0 and read_table(store.path) == [] and again._store._rows == {}
    again.close()


def test_a_preference_is_for_the_image_that_the_rater_saw(tmp_path):
    """Sides change by rater and pair, and at a repeat; ties count half; judges do not train on preferences."""
    write_gallery(tmp_path / "a", 20)
    write_gallery(tmp_path / "b", 20, shade=100)
    store = Store(tmp_path / "ratings.csv", "pair")
    sources = [sample_items(tmp_path / name, store.path) for name in "ab"]
    pairs = pair_items(*sources)
    questions, sides, wanted = Questions(pairs, store, 0, 0.2), [], []

    def answer(state: dict) -> int:
        first, second = (questions.files[name].relative_to(tmp_path) for name in state["current"]["images"])
        sides.append(first.parts[0])
        wanted.append((str(first), str(second)))
        return 2 if len(sides) == 1 else 3

    finish(questions, "Ann", answer)
    assert len(sides) == 24 and 5 < sides.count("a") < 19 and len({frozenset(pair) for pair in wanted}) == 20
    answers = store.answers([pair.key for pair in pairs])
    rows = readers.preferences(answers)
    assert len(rows) == 19 and {row[1:3] for row in rows} < set(wanted[1:]) and {row[3] for row in rows} == {"Ann"}
    won = sum(row[1].startswith("b") for row in rows)
    found = readers.summarise(answers, "pair", lambda reader: [], {}, ("a", "b"))["Ann"]
    one = found["b preferred to a"]
    assert one.value == pytest.approx((won + 0.5) / 20) and one.low < one.value < one.high
    assert found["same answer to repeated images"].value == 0  # always the first, whatever it shows
    refused("line 2: .*--mode=pair", read_ratings, store.path)
    questions.close()
    # the same table with the folders in the other order: the same answers, of which the last can be undone
    store = Store(tmp_path / "ratings.csv", "pair")
    pairs = pair_items(*sources[::-1])
    answers, questions = store.answers([pair.key for pair in pairs]), Questions(pairs, store, 0)
    found = readers.summarise(answers, "pair", lambda reader: [], {}, ("b", "a"))["Ann"]
    assert found["a preferred to b"].value == pytest.approx(1 - one.value) and readers.preferences(answers) == rows
    assert questions.act("state", "Ann")["current"] is None
    assert questions.act("undo", "Ann")["undo"] == len(read_table(store.path)) == 19
    questions.close()


@pytest.mark.parametrize(("mode", "other"), [("rate", "real"), ("real", "rate"), ("pair", "real")])
def test_a_table_is_of_one_mode(tmp_path, items, mode, other):
    item = dataclasses.replace(items[0], rival=items[1] if mode == "pair" else None)
    store = Store(tmp_path / "ratings.csv", mode)
    store.click("rate", item, "Ann", rating=3, expert_level=2)
    store.close()
    refused(f"line 2: .*--mode={mode}.* {other};.*--out", Store, store.path, other)
    if mode != "rate":
        refused(f"line 2: .*--mode={mode}", read_ratings, store.path)


def test_a_table_of_an_earlier_version_states_no_mode(rated, items, caplog):
    rated.close()
    for path in (rated.path, rated.journal):
        path.write_text("".join(f"{line.rpartition(',')[0]}\n" for line in path.read_text().splitlines()))
    store = Store(rated.path, "real")
    assert len(store.answers([item.key for item in items])) == 4 and not caplog.messages
    assert not list(rated.path.parent.glob("ratings*edited*"))
    store.close()


def test_readers_accuracy_and_agreement():
    def answer(path, reader, rating, repeat=False):
        return Answer((path, "x", ""), repeat, reader, dict.fromkeys(COLUMNS, "") | {"rating": str(rating)})

    synthetic = {("a", "x", ""): True, ("b", "x", ""): False}
    answers = [answer("a", "Ann", 1), answer("b", "Ann", 3), answer("a", "Bob", 3), answer("b", "Bob", 3)]
    found = readers.summarise(answers, "real", lambda reader: [3, 5], synthetic)
    # two of two and one of two right, by Clopper and Pearson
    assert (found["Ann"]["accuracy"].low, found["Bob"]["accuracy"].high) == pytest.approx((0.1581, 0.9874), abs=1e-4)
    both = found["all readers"]
    assert both["accuracy"].value == 0.75 and both["Fleiss' kappa"].value == pytest.approx(-1 / 3)  # P = 1/2, E = 10/16
    assert found["Ann"]["seconds an image"].value == 4
    assert "Bob, accuracy: 0.50 [0.01, 0.99], n = 2" in readers.lines(found)
    alike = [answer(f"{i}", reader, 1 + 2 * (i % 2)) for i in range(30) for reader in ("Ann", "Bob")]
    seen = readers.summarise(alike, "real", lambda reader: [], {(f"{i}", "x", ""): i % 2 == 0 for i in range(30)})
    kappa = seen["all readers"]["Fleiss' kappa"]
    assert kappa.value == pytest.approx(1) and kappa.low is kappa.high is None and kappa.n == 30  # not a width of 0
    rng, many = np.random.default_rng(0), []
    for image in range(60):
        many += [answer(str(image), reader, rng.choice([image % 3 + 1, 2])) for reader in ("Ann", "Bob", "Cyd")]
    alpha = readers.summarise(many, "rate", lambda reader: [], {})["all readers"]["Krippendorff's alpha, rating"]
    units = [[float(many[3 * n + k].cells["rating"]) for k in range(3)] for n in range(60)]
    assert alpha.value == ratings.ordinal_alpha(units) and 0 < alpha.low < alpha.value < alpha.high < 1
    one = readers.summarise(many[:2], "rate", lambda reader: [], {})["all readers"]["Krippendorff's alpha, rating"]
    assert one.n == 0 or one.low is None


@pytest.mark.parametrize("failing", ["ratings.csv", "ratings.journal.csv"])
def test_a_full_disk_leaves_both_files_as_they_were(rated, items, monkeypatch, failing):
    before, journal = rated.path.read_bytes(), rated.journal.read_bytes()
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if failing in os.readlink(f"/proc/self/fd/{descriptor}"):  # or in its temporary file
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match="No space"):
            rated.click("rate", items[1], "Bob", rating=1, expert_level=2)
    assert (rated.path.read_bytes(), rated.journal.read_bytes()) == (before, journal)
    rated.click("rate", items[1], "Bob", rating=2, expert_level=2)
    assert len(read_ratings(rated.path)) == len(rated) == 5


JOURNAL = ",".join(JOURNAL_COLUMNS[:8]) + "\n"  # as of pages that asked one question
TABLE = ",".join(ratings.COLUMNS) + "\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("ratings.csv", "path,Text\n1.png,x\n", "another --out"),
        ("ratings.csv", b"\x89PNG\r\n\x1a\n\xff", "another --out"),
        ("ratings.csv", TABLE.replace("\n", ",mood\n") + "a.png,3,Fundus,3,x,Ann,1\n", "line 2: the columns"),
        ("ratings.csv", TABLE + "a.png,3\n", "line 2: .*2 cells"),
        ("ratings.csv", TABLE + "a.png,4,Fundus,3,x,Ann\n", "line 2: .*rating '4'"),
        ("ratings.csv", TABLE + "a.png,1,Fundus,3,x,Ann\na.png,2,Fundus,3,x,Ann\n", "line 3.*'Ann'.*line 2"),
        ("ratings.journal.csv", JOURNAL + "now,love,a,3,Fundus,2,x,Ann\n", "line 2: love"),
        ("ratings.journal.csv", JOURNAL + "now,rate,a,9,Fundus,2,x,Ann\n", "line 2: .*rating '9'"),
        ("ratings.journal.csv", JOURNAL + "\x00\n", "line 2"),
        *(
            ("ratings.journal.csv", f"{JOURNAL}{text},rate,a,3,Fundus,2,x,Ann\n", f"line 2: time is '{text}'")
            for text in ("2026-10-25 01:59:00", "25/10/2026 01:59", "NaN")  # as spreadsheets rewrite it
        ),
        ("ratings.CSV", "", "ends in .csv"),
        ("image.png", b"\x89PNG\r\n", "ends in .csv"),
    ],
)
def test_another_file_or_a_faulty_one_is_refused_and_left_alone(tmp_path, name, content, message):
    content = content if isinstance(content, bytes) else content.encode()
    (tmp_path / name).write_bytes(content)
    refused(message, Store, tmp_path / name.replace(".journal", ""))
    assert (tmp_path / name).read_bytes() == content and os.listdir(tmp_path) == [name]  # and no journal


@pytest.mark.parametrize("name", ["   ", "a,b", "a\nb", "\u202eevil", "\ud800", "x" * 65])
def test_unusable_names_are_refused(name):
    refused("1 to 64", rater_name, name)
    assert rater_name(" Zoe\u0308 O'Neil ") == "Zoë O'Neil"


def test_a_skipped_question_comes_once_more_and_then_waits():
    progress = Progress([2, 0, 1], rated=[])
    progress.answer(2, "skip")
    assert progress.waiting == [0, 1, 2]
    progress.answer(0, "rate")
    progress.answer(1, "skip")
    assert progress.waiting == [2, 1] and progress.postponed == []
    progress.answer(2, "skip")
    progress.answer(1, "skip")
    assert progress.waiting == [] and progress.postponed == [2, 1]
    for expected in ([1], [2, 1], [1, 2], [0, 1, 2]):
        progress.undo()
        assert progress.waiting == expected
    assert progress.history == [(2, "skip")]


@pytest.mark.parametrize(
    ("bound", "header", "allowed"),
    [("127.0.0.1", name, True) for name in ("127.0.0.1:80", "[::1]:80", "LOCALHOST", "127.0.0.2")]
    + [("127.0.0.1", name, False) for name in ("", "evil.example", "localhost.evil.example", "192.0.2.7", "[::1")]
    + [("0.0.0.0", name, True) for name in ("192.0.2.7:80", "localhost:80", socket.gethostname())]
    + [("0.0.0.0", name, False) for name in ("evil.example", "192.0.2.7.evil.example:80")]
    + [("rater.example", "rater.example:80", True), ("rater.example", "other.example", False)],
)
def test_host_names(bound, header, allowed):
    server = pytest.importorskip("ddpo_pytorch.rating.server", reason="fastapi absent", exc_type=ImportError)
    assert server.is_own(header, bound) is allowed


def test_weak_tokens_ports_in_use_and_foreign_addresses_are_refused():
    server = pytest.importorskip("ddpo_pytorch.rating.server", reason="fastapi absent", exc_type=ImportError)
    for token in ("x" * 15, "has space in it 1234", "ümlaut-ümlaut-ü", "x" * 129):
        refused("16 to 128", call_main, load_flag_script("rate.py"), f"--token={token}", "--out=x.csv")
    with server.listen("127.0.0.1", 0) as taken:
        for host, port in (("127.0.0.1", taken.getsockname()[1]), ("192.0.2.1", 0)):
            refused(f"--host {host} --port {port} ", server.listen, host, port)
