"""Parts of the rating page: items, files after crashes, a rater's progress, the guard."""

import asyncio
import csv
import errno
import io
import json
import os
import re
import socket
from pathlib import Path

import pytest
from rating_tools import PROMPTS, write_gallery

from ddpo_pytorch.data.ratings import COLUMNS, read_ratings
from ddpo_pytorch.rating import store as storing
from ddpo_pytorch.rating.items import distinct, sample_items, table_items
from ddpo_pytorch.rating.session import Progress, order_for
from ddpo_pytorch.rating.store import JOURNAL_COLUMNS, Store, rater_name
from ddpo_pytorch.utils.errors import UserError


@pytest.fixture
def items(tmp_path):
    write_gallery(tmp_path / "made", 4)
    return sample_items(tmp_path / "made", tmp_path / "ratings.csv")


def rows_of(path: Path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


class Restart:
    """A store that ends as after kill -9, and its next start; what is on disk."""

    def __init__(self, path: Path):
        self.path, self.store = path, Store(path)

    def __call__(self) -> Store:
        self.store._lock.release()
        self.store = Store(self.path)
        return self.store

    def rows(self) -> list[tuple[str, str, str]]:
        return [(row["image_path"], row["rating"], row["rater_id"]) for row in rows_of(self.path)]

    def copies(self) -> list[str]:
        return sorted(path.name for path in self.path.parent.glob("ratings*edited*"))


@pytest.fixture
def empty(tmp_path) -> Restart:
    return Restart(tmp_path / "ratings.csv")


@pytest.fixture
def rated(empty, items) -> Restart:
    """Four images rated by Ann."""
    for number, item in enumerate(items):
        empty.store.rate(item, 1 + number % 3, 2, "Ann")
    assert len(empty.rows()) == 4
    return empty


# what is rated


def test_items_of_a_sample_folder_and_of_a_table(tmp_path, items):
    entries = json.loads((tmp_path / "made/image_log.json").read_text())
    assert [(item.image_path, item.prompt) for item in items] == [
        (f"made/{entry['path_to_img']}", entry["prompt"]) for entry in entries
    ]
    assert {item.modality for item in items} == {"Fundus"} and {item.size for item in items} == {(48, 48)}
    table = tmp_path / "captions.csv"
    table.write_text("path,Text\nimages/source/0.png,Drusen.\nimages/source/9.png,Absent.\n")
    found, missing = table_items(table, tmp_path / "made", tmp_path / "elsewhere" / "ratings.csv")
    assert missing == 1 and [(item.path.name, item.prompt) for item in found] == [("0.png", "Fundus: Drusen.")]
    assert found[0].image_path == "../made/images/source/0.png"
    assert len(distinct([*items, *items, *found])) == 5


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("path_to_img", "../outside.png", "leads out of"),
        ("path_to_img", "images/../../outside.png", "leads out of"),
        ("path_to_img", "/etc/hostname", "leads out of"),
        ("path_to_img", "images/link.png", "leads out of"),
        ("path_to_img", "images/linked/outside.png", "leads out of"),
        ("path_to_img", "images/absent.png", "absent.png"),
        ("path_to_img", "image_log.json", "not an image"),
        ("path_to_img", 3, "path_to_img"),
        ("prompt", None, "prompt"),
        ("prompt", "two\nlines", "line breaks"),
    ],
)
def test_an_entry_that_leads_elsewhere_is_refused_at_the_start(tmp_path, items, field, value, message):
    folder = tmp_path / "made"
    (tmp_path / "other").mkdir()
    for outside in (tmp_path / "outside.png", tmp_path / "other" / "outside.png"):
        outside.write_bytes((folder / "images/source/0.png").read_bytes())
    (folder / "images/link.png").symlink_to(tmp_path / "outside.png")
    (folder / "images/linked").symlink_to(tmp_path / "other")
    entries = json.loads((folder / "image_log.json").read_text())
    entries[2][field] = value
    (folder / "image_log.json").write_text(json.dumps(entries))
    with pytest.raises(UserError, match=rf"(entry 3|\[2\]).*{message}"):
        sample_items(folder, tmp_path / "ratings.csv")


def test_folders_without_images_are_refused(tmp_path):
    for folder in (tmp_path / "absent", tmp_path):
        with pytest.raises(UserError, match=re.escape(repr(str(folder)))):
            sample_items(folder, tmp_path / "ratings.csv")


# the files


def test_the_table_is_read_by_training_after_every_click(empty, items):
    store, odd = empty.store, 'Dr. "Q" O\'Neil'
    store.rate(items[1], 3, 2, odd)
    store.rate(items[1], 1, 1, "Ann")
    store.skip(items[0], "Ann")
    store.rate(items[0], 2, 1, "Ann")
    rows = read_ratings(empty.path)
    assert [(row.path.name, row.rating, row.expert_level, row.prompt, row.rater_id) for row in rows] == [
        ("1.png", 3, 2, PROMPTS[1], odd),
        ("1.png", 1, 1, PROMPTS[1], "Ann"),
        ("0.png", 2, 1, PROMPTS[0], "Ann"),
    ]
    store.undo(items[1], "Ann")
    assert [row.rater_id for row in read_ratings(empty.path)] == [odd, "Ann"] and len(store) == 2
    actions = [(row["action"], row["rater_id"], row["rating"]) for row in rows_of(store.journal)]
    clicks = [("rate", odd, "3"), ("rate", "Ann", "1"), ("skip", "Ann", ""), ("rate", "Ann", "2"), ("undo", "Ann", "1")]
    assert actions == clicks and tuple(rows_of(store.journal)[0]) == JOURNAL_COLUMNS
    assert empty().rated(odd) == [items[1].key]


def test_a_crash_at_any_byte_loses_no_confirmed_click(empty, items):
    """After each prefix of what one click writes, journal first, the next start has all clicks before it."""
    path, journal = empty.path, empty.store.journal
    empty.store.rate(items[0], 3, 2, "Ann")
    before = {file: file.read_bytes() for file in (journal, path)}
    empty.store.rate(items[1], 1, 2, "Ann")
    after = {file: file.read_bytes() for file in (journal, path)}
    for cut in range(len(before[journal]), len(after[journal]) + 1):
        journal.write_bytes(after[journal][:cut])
        path.write_bytes(before[path])
        journaled = cut == len(after[journal])
        assert empty().rated("Ann") == [items[0].key] + [items[1].key] * journaled
        assert path.read_bytes() == (after if journaled else before)[path]
    for cut in range(len(before[path]), len(after[path]) + 1):
        journal.write_bytes(after[journal])
        path.write_bytes(after[path][:cut])
        assert empty().rated("Ann") == [items[0].key, items[1].key] and path.read_bytes() == after[path]
    for cut in range(len(",".join(COLUMNS))):  # in the very first line
        path.write_bytes(before[path][:cut])
        empty()
        assert path.read_bytes().startswith(before[path].splitlines(keepends=True)[0])


def test_an_undo_that_a_crash_cut_short_is_done_at_the_next_start(rated, items):
    full = rated.path.read_bytes()
    rated.store.undo(items[3], "Ann")
    rated.path.write_bytes(full)
    assert rated().rated("Ann") == [item.key for item in items[:3]] and len(read_ratings(rated.path)) == 3


def as_a_spreadsheet_saves_it(content: bytes) -> bytes:
    text = io.StringIO(newline="")
    rows = csv.reader(io.StringIO(content.decode()))
    csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\r\n").writerows(rows)
    return b"\xef\xbb\xbf" + text.getvalue().encode()


CHANGES = {  # of the table by another program, and whether a copy of its content is saved
    "spreadsheet": (as_a_spreadsheet_saves_it, False),
    "semicolons": (lambda content: content.replace(b",", b";"), True),
    "utf-16": (lambda content: content.decode().encode("utf-16"), True),
    "no newline at the end": (lambda content: content[:-1], False),
    "torn": (lambda content: content[:-5], False),
    "emptied": (lambda content: b"", False),
    "deleted": (lambda content: None, False),
    "another rating": (lambda content: content.replace(b"0.png,1,", b"0.png,3,"), True),
    "half a row more": (lambda content: content + b"made/images/source/0.png,2,Fun", True),
    "a row more without newline": (lambda content: content + content.splitlines()[1].replace(b"Ann", b"Bo"), True),
    "a row more": (lambda content: content + content.splitlines()[1].replace(b"Ann", b"Bob") + b"\n", True),
    "sorted": (lambda content: b"".join([*content.splitlines(True)[:1], *content.splitlines(True)[:0:-1]]), True),
    "binary": (lambda content: b"\x89PNG\0\xff", True),
}


@pytest.mark.parametrize("running", [False, True])
@pytest.mark.parametrize("name", CHANGES)
def test_the_table_is_what_the_journal_says_whatever_others_do_to_it(rated, items, name, running):
    change, kept = CHANGES[name]
    before = rated.rows()
    content = change(rated.path.read_bytes())
    rated.path.unlink() if content is None else rated.path.write_bytes(content)
    store = rated.store if running else rated()
    store.undo(items[3], "Ann")
    assert rated.rows() == before[:3] and store.rated("Ann") == [item.key for item in items[:3]]
    store.rate(items[3], 3, 1, "Ann")
    store.rate(items[0], 2, 1, "Bob")
    wanted = [*before[:3], (items[3].image_path, "3", "Ann"), (items[0].image_path, "2", "Bob")]
    assert rated.rows() == wanted and len(read_ratings(rated.path)) == len(store) == 5
    assert rated.path.read_bytes().startswith(",".join(COLUMNS).encode() + b"\n")
    assert len(rated()) == 5 and rated.rows() == wanted
    assert rated.copies() == ["ratings.edited-1.csv"] * kept
    if kept:
        assert (rated.path.parent / "ratings.edited-1.csv").read_bytes() == content


@pytest.mark.parametrize("running", [False, True])
@pytest.mark.parametrize("change", [as_a_spreadsheet_saves_it, lambda content: content[:-1], lambda content: None])
def test_the_journal_survives_what_others_do_to_it(rated, items, change, running):
    """A last line without its end is whole: the table shows it. Without a journal the table is the truth."""
    before = rated.rows()
    content = change(rated.store.journal.read_bytes())
    rated.store.journal.unlink() if content is None else rated.store.journal.write_bytes(content)
    store = rated.store if running else rated()
    store.skip(items[0], "Bob")
    store.rate(items[0], 2, 1, "Bob")
    assert rated.rows() == [*before, (items[0].image_path, "2", "Bob")]
    rated.path.unlink()
    assert len(rated()) == 5 and rated.rows() == [*before, (items[0].image_path, "2", "Bob")]
    assert [row["action"] for row in rows_of(rated.store.journal)] == ["rate"] * 4 + ["skip", "rate"]


def test_files_without_their_last_newline(rated, items):
    for undone in (False, True):
        before = rated.rows()
        for path in (rated.path, rated.store.journal):
            path.write_bytes(path.read_bytes().rstrip(b"\n"))
        rated()
        assert rated.rows() == before and rated.copies() == []
        if not undone:
            rated.store.undo(items[3], "Ann")


@pytest.mark.parametrize("end", [b"2026-01-01T00:00:00Z,rate,made/im", b"\0" * 300, b"\xff\xfe", b'a,"'])
def test_an_end_of_the_journal_that_is_cut_off_is_dropped(rated, items, end, caplog):
    before, content = rated.rows(), rated.store.journal.read_bytes()
    rated.store.journal.write_bytes(content + end)
    rated()
    assert rated.rows() == before and rated.store.journal.read_bytes() == content
    assert "line 6" in caplog.text


def test_a_closed_store_takes_no_click(rated, items):
    rated.path.unlink()
    rated.store.close()
    before = rated.path.read_bytes(), rated.store.journal.read_bytes()
    with pytest.raises(OSError, match=f"Errno {errno.ESHUTDOWN}"):
        rated.store.undo(items[3], "Ann")
    assert (rated.path.read_bytes(), rated.store.journal.read_bytes()) == before and len(rated()) == 4


@pytest.mark.parametrize("line", ["now,love,a,3,Fundus,2,x,Ann", "now,rate,a,9,Fundus,2,x,Ann", "a,b", "\x00"])
def test_a_faulty_journal_is_refused_and_left_alone(rated, line):
    content, before = rated.store.journal.read_bytes() + f"{line}\n".encode(), rated.path.read_bytes()
    rated.store.journal.write_bytes(content)
    with pytest.raises(UserError) as error:
        rated()
    assert "ratings.journal.csv" in str(error.value)
    assert (rated.store.journal.read_bytes(), rated.path.read_bytes()) == (content, before)


def test_a_moved_table_is_made_again_from_its_journal(rated, caplog):
    old = rated.path.rename(rated.path.with_name("old.csv"))
    assert len(rated()) == 4 and rated.path.read_bytes() == old.read_bytes()
    assert str(rated.path) in caplog.text


def test_a_table_without_a_journal_is_taken_as_it_is(tmp_path, items):
    """As people save it: other case, spaces, absolute paths, a last line without its end; unknown raters repeat."""
    path, first, second = tmp_path / "ratings.csv", items[0], items[1]
    header, prompt = ", ".join(COLUMNS).upper(), first.prompt.replace('"', '""')
    rows = [f'{tmp_path / first.image_path}, 3.0, Fundus, 2, "{prompt}", Ann']
    rows += [f"{second.image_path},1,Fundus,1,Scar,", f"./{second.image_path},2,Fundus,1,Scar,"]
    path.write_text("\n".join([header, *rows]))
    store = Store(path)
    assert store.rated("Ann") == [first.key] and len(store) == 3
    assert [row.rating for row in read_ratings(path)] == [3, 1, 2] and len(rows_of(store.journal)) == 3
    assert rows_of(path)[0]["image_path"] == first.image_path


def test_formulas_are_quoted_on_disk_and_known_again(tmp_path):
    entries = write_gallery(tmp_path / "=made", 1)
    (tmp_path / "=made/image_log.json").write_text(json.dumps([entries[0] | {"prompt": "=cmd|' /C calc'!A0"}]))
    (item,) = sample_items(tmp_path / "=made", tmp_path / "ratings.csv")
    store, raters = Store(tmp_path / "ratings.csv"), ["@Ann", "-1", "'=Bob"]
    for rater in raters:
        store.rate(item, 3, 2, rater)
    for file in (store.path, store.journal):
        cells = [cell for row in csv.reader(open(file, newline="")) for cell in row]
        assert not any(cell.startswith(("=", "@", "+")) for cell in cells)
    store._lock.release()
    again = Store(store.path)
    assert [again.rated(rater) for rater in raters] == [[item.key]] * 3
    assert [row.rater_id for row in read_ratings(store.path)] == raters
    assert read_ratings(store.path)[0].prompt == "Fundus: =cmd|' /C calc'!A0"


@pytest.mark.parametrize("name", ["ratings", "ratings.png", "ratings.CSV", "made/images/source/0.png", "made"])
def test_only_csv_files_are_written(tmp_path, items, name):
    content = (tmp_path / "made/images/source/0.png").read_bytes()
    with pytest.raises(UserError) as error:
        Store(tmp_path / name)
    assert name in str(error.value) and (tmp_path / "made/images/source/0.png").read_bytes() == content
    assert os.listdir(tmp_path) == ["made"]


@pytest.mark.parametrize("failing", ["ratings.csv", "ratings.journal.csv"])
def test_a_full_disk_leaves_both_files_as_they_were(rated, items, monkeypatch, failing):
    before, journal = rated.path.read_bytes(), rated.store.journal.read_bytes()
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if failing in os.readlink(f"/proc/self/fd/{descriptor}"):  # or in its temporary file
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(storing.os, "fsync", fsync)
        with pytest.raises(OSError, match="No space"):
            rated.store.rate(items[1], 1, 2, "Bob")
    assert (rated.path.read_bytes(), rated.store.journal.read_bytes()) == (before, journal)
    rated.store.rate(items[1], 2, 2, "Bob")
    assert len(read_ratings(rated.path)) == len(rated.store) == 5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"path,Text\n1.png,x\n", "another --out"),
        (b"\x89PNG\r\n\x1a\n\xff", "another --out"),
        (",".join((*COLUMNS, "quality")).encode() + b"\n", "another --out"),
        (",".join(COLUMNS).encode() + b"\na.png,3\n", "line 2: .*2 cells"),
        (",".join(COLUMNS).encode() + b"\na.png,4,Fundus,3,x,Ann\n", "line 2: rating '4'"),
        (",".join(COLUMNS).encode() + b"\na.png,1,Fundus,3,x,Ann\na.png,2,Fundus,3,x,Ann\n", "line 3.*'Ann'.*line 2"),
    ],
)
def test_another_file_is_refused_and_left_alone(tmp_path, content, message):
    path = tmp_path / "ratings.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        Store(path)
    assert path.read_bytes() == content and os.listdir(tmp_path) == ["ratings.csv"]  # and no journal


@pytest.mark.parametrize("name", ["", "   ", "a,b", "a\nb", "a\tb", "a\u2028b", "\u202eevil", "\ud800", "x" * 65])
def test_unusable_names_are_refused(name):
    with pytest.raises(UserError, match="1 to 64"):
        rater_name(name)


def test_usable_names_have_one_spelling():
    assert rater_name(" Zoe\u0308 O'Neil ") == "Zoë O'Neil" and rater_name("x" * 64) == "x" * 64


# progress


def test_the_order_depends_on_seed_and_name_only():
    orders = {(seed, name): order_for(40, seed, name) for seed in (0, 1) for name in ("Ann", "Bob")}
    assert orders[0, "Ann"] == order_for(40, 0, "Ann")
    assert all(sorted(order) == list(range(40)) for order in orders.values())
    assert len({tuple(order) for order in orders.values()}) == 4


def test_a_skipped_question_comes_once_more_and_then_waits():
    progress = Progress([2, 0, 1], rated=[])
    progress.skip(2)
    assert progress.waiting == [0, 1, 2]
    progress.rate(0)
    progress.skip(1)
    assert progress.waiting == [2, 1] and progress.postponed == []
    progress.skip(2)
    progress.skip(1)
    assert progress.waiting == [] and progress.postponed == [2, 1] and progress.open == 2
    for expected in ([1], [2, 1], [1, 2]):
        progress.undo()
        assert progress.waiting == expected
    progress.undo()
    assert progress.waiting == [0, 1, 2] and progress.last == 2


def test_the_last_question_skipped_does_not_come_at_once_again():
    progress = Progress([0, 1], rated=[1])
    progress.skip(0)
    assert progress.waiting == [] and progress.postponed == [0]
    progress.undo()
    assert progress.waiting == [0] and progress.last == 1  # what an earlier session rated
    progress.undo()
    assert progress.waiting == [1, 0] and progress.last is None


# the guard


@pytest.mark.parametrize(("pieces", "arrived"), [((4096,), 1), ((4000, 96, 0), 3), ((4097,), 0), ((4000, 97, 9), 1)])
def test_a_body_is_counted_as_it_arrives(pieces, arrived):
    guard = pytest.importorskip("ddpo_pytorch.rating.server", reason="fastapi absent", exc_type=ImportError)
    waiting, got = [{"type": "http.request", "body": b" " * size} for size in pieces], []

    async def receive() -> dict:
        return waiting.pop(0)

    async def read() -> None:
        counting = guard.limited(receive)
        for _ in pieces:
            got.append(await counting())

    if arrived == len(pieces):
        asyncio.run(read())
    else:
        with pytest.raises(guard.HTTPException) as error:
            asyncio.run(read())
        assert error.value.status_code == 413
    assert len(got) == arrived


@pytest.mark.parametrize(
    ("bound", "header", "allowed"),
    [("127.0.0.1", name, True) for name in ("127.0.0.1:80", "localhost:9000", "[::1]:80", "LOCALHOST", "127.0.0.2")]
    + [("127.0.0.1", name, False) for name in ("", "evil.example", "localhost.evil.example", "192.0.2.7", "[::1", "@")]
    + [("0.0.0.0", name, True) for name in ("192.0.2.7:80", "localhost:80", socket.gethostname())]
    + [("0.0.0.0", name, False) for name in ("evil.example", "192.0.2.7.evil.example:80")]
    + [("rater.example", "rater.example:80", True), ("rater.example", "other.example", False)],
)
def test_host_names(bound, header, allowed):
    guard = pytest.importorskip("ddpo_pytorch.rating.server", reason="fastapi absent", exc_type=ImportError)
    assert guard.Guard(bound, 80, "")._is_own(header) is allowed


@pytest.mark.parametrize("token", ["short", "x" * 15, "has space in it 1234", "ümlaut-ümlaut-ü", "x" * 129, "a?b" * 9])
def test_weak_tokens_are_refused(token):
    guard = pytest.importorskip("ddpo_pytorch.rating.server", reason="fastapi absent", exc_type=ImportError)
    with pytest.raises(UserError, match="16 to 128"):
        guard.check_token(token)


def test_a_port_in_use_and_a_foreign_address_are_refused():
    server = pytest.importorskip("ddpo_pytorch.rating.server", reason="fastapi absent", exc_type=ImportError)
    with server.listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port} .*in use"):
            server.listen("127.0.0.1", port)
    with pytest.raises(UserError, match="--host 192.0.2.1"):
        server.listen("192.0.2.1", 0)
