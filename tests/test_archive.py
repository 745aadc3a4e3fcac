"""Archives: unpacked whole, or refused with nothing written, inside the folder or outside."""

import os
import random
import resource
import shutil
import stat
import struct
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, run_script
from script_tools import files_of, load_module

from ddpo_pytorch.utils import published as archive
from ddpo_pytorch.utils.errors import UserError
from ddpo_pytorch.utils.files import DiskFull
from ddpo_pytorch.utils.published import unpack

GOOD = {"script-samples/run/images/a_b/0.jpg": b"\xff\xd8 picture", "script-samples/run/image_log.json": b"[]"}


def entry(name: str, kind: int = stat.S_IFREG, mode: int = 0o644) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo("placeholder")
    info.filename = name  # as it is: the constructor would mend it
    info.external_attr = (kind | mode) << 16
    return info


def write(path: Path, *bad: tuple[zipfile.ZipInfo, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in GOOD.items():
            file.writestr(name, content)
        for info, content in bad:
            info.compress_type = compression
            file.writestr(info, content)
    return path


def everything(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with neighbours, into which an archive beside it is unpacked."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


def test_a_whole_archive_is_unpacked_without_its_permissions(folder, tmp_path):
    path = write(tmp_path / "images.zip", (entry("empty/", stat.S_IFDIR), b""), (entry("top.sh", mode=0o4777), b"x"))
    assert unpack(path, folder) == [folder / "empty", folder / "script-samples", folder / "top.sh"]
    assert {name: (folder / name).read_bytes() for name in GOOD} == GOOD and (folder / "empty").is_dir()
    assert (folder / "top.sh").stat().st_mode & 0o7111 == 0
    assert {path.name for path in folder.iterdir()} == {"empty", "script-samples", "top.sh"}
    with pytest.raises(UserError, match="empty is there already; move it away"):
        unpack(path, folder)
    assert (folder / "top.sh").read_bytes() == b"x"


ESCAPES = {
    "absolute": (entry("/outside/x"), "leads out of the folder"),
    "absolute here": (None, "leads out of the folder"),
    "parent": (entry("../outside/x"), "leads out of the folder"),
    "parent inside": (entry("script-samples/../../outside/x"), "leads out of the folder"),
    "parent at the end": (entry("script-samples/.."), "leads out of the folder"),
    "itself": (entry("./x"), "leads out of the folder"),
    "nameless": (entry(""), "leads out of the folder"),
    "drive": (entry("C:/outside/x"), "backslash, colon or control character"),
    "drive, relative": (entry("C:x"), "backslash, colon or control character"),
    "backslashes": (entry("..\\outside\\x"), "backslash, colon or control character"),
    "control character": (entry("a\nb"), "backslash, colon or control character"),
    "null": (entry("good.png\0../../outside/x"), "backslash, colon or control character"),
    "link": (entry("link", stat.S_IFLNK, 0o777), "is a link"),
    "device": (entry("device", stat.S_IFCHR), "is neither a file nor a folder"),
    "pipe": (entry("pipe", stat.S_IFIFO), "is neither a file nor a folder"),
    "twice": (entry("script-samples/run/image_log.json"), "is there twice"),
    "file and folder": (entry("script-samples/run"), "is there twice"),
    "under a file": (entry("script-samples/run/image_log.json/x"), "lies in a folder that is a file"),
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("case", ESCAPES)
def test_nothing_is_written_of_an_archive_that_leads_elsewhere(folder, tmp_path, case):
    info, message = ESCAPES[case]
    info = info or entry(f"{tmp_path}/outside/x")
    path = write(tmp_path / "images.zip", (info, str(tmp_path / "outside").encode()))
    before = everything(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        unpack(path, folder)
    assert everything(tmp_path) == before and "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_a_link_is_not_followed_by_what_comes_after_it(folder, tmp_path):
    link = (entry("door", stat.S_IFLNK, 0o777), str(tmp_path / "outside").encode())
    with pytest.raises(UserError, match="'door' is a link"):
        unpack(write(tmp_path / "images.zip", link, (entry("door/x"), b"through")), folder)
    assert everything(tmp_path) == ["images.zip", "in", "outside"]


def test_bombs_are_refused_by_what_they_state_and_by_what_they_hold(folder, tmp_path, monkeypatch):
    zeros = (entry("zeros"), bytes(3 * 2**20))
    path = write(tmp_path / "images.zip", zeros, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match=r"states 3\.0 MiB of content, more than 20 times as much"):
        unpack(path, folder)
    # the same, stating 10 bytes in its directory: what is beyond them is not read, and the checksum tells
    content = bytearray(path.read_bytes())
    position = content.rindex(b"PK\x01\x02")
    struct.pack_into("<I", content, position + 24, 10)
    path.write_bytes(content)
    with pytest.raises(UserError, match="does not open as a zip, or not to its end"):
        unpack(path, folder)
    monkeypatch.setattr(archive, "SPARE", 2**60)
    with pytest.raises(UserError, match=r"needs 0\.0 GiB in .* where .* are free"):
        unpack(write(path), folder)
    assert everything(folder) == []


def test_torn_and_encrypted_archives_leave_nothing(folder, tmp_path):
    path = write(tmp_path / "images.zip", (entry("last.png"), b"content that is damaged"))
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"content that", b"contents hat"))
    with pytest.raises(UserError, match="Bad CRC-32 for file 'last.png'"):
        unpack(path, folder)
    path.write_bytes(whole[:-30])
    with pytest.raises(UserError, match="does not open as a zip"):
        unpack(path, folder)
    content, position = bytearray(whole), whole.rindex(b"PK\x01\x02")
    content[position + 8] |= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="'last.png' is encrypted"):
        unpack(path, folder)
    with pytest.raises(UserError, match="does not open as a zip"):
        unpack(tmp_path / "absent.zip", folder)
    assert everything(folder) == []


@pytest.mark.parametrize(
    "pair", [("a", "A"), ("x/1", "X/2"), ("stra\u00dfe", "STRASSE"), ("e\u0301", "\u00e9"), ("x", "X/1")], ids=ascii
)
def test_names_that_some_file_systems_take_for_the_same(folder, tmp_path, pair):
    path = write(tmp_path / "images.zip", *((entry(name), b"1") for name in pair))
    with pytest.raises(UserError) as caught:
        unpack(path, folder)
    assert all(repr(name.split("/")[0])[1:-1] in str(caught.value) for name in pair) and everything(folder) == []


UNSUITABLE = {
    "one long name": "x" * 256,
    "many bytes": "\u00e9" * 128,
    "a long path": "/".join(["x" * 100] * 11),
    "deep": "x/" * 60 + "x",
    "very deep": "x/" * 30_000 + "x",
    "temporary folder": ".images.zip.12@host.tmp/y",
    "temporary file": "a/.0.png.12.tmp",
    "unpacked": ".images.zip.unpacked/y",
    "lock": ".lock",
}


@pytest.mark.parametrize("case", UNSUITABLE)
def test_names_that_cannot_be_or_are_taken_leave_nothing(folder, tmp_path, case):
    """`!first` would come before the one that fails."""
    path = write(tmp_path / "images.zip", (entry("!first/x"), b"1"), (entry(UNSUITABLE[case]), b"2"))
    before = everything(tmp_path)
    with pytest.raises(UserError) as caught:
        unpack(path, folder)
    assert UNSUITABLE[case][:100] in str(caught.value) and "\n" not in str(caught.value)
    assert everything(tmp_path) == before


def test_too_many_entries_leave_nothing(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "MOST_ENTRIES", 9)
    path = write(tmp_path / "images.zip", *((entry(str(number)), b"") for number in range(7)))
    assert len(unpack(path, folder)) == 8
    write(path, *((entry(f"new{number}"), b"") for number in range(8)))
    with pytest.raises(UserError, match="10 entries, more than 9"):
        unpack(path, tmp_path)


def test_a_failure_while_names_are_given_undoes_them(folder, tmp_path, monkeypatch):
    path, replace = write(tmp_path / "images.zip", (entry("!first/x"), b"1"), (entry("z"), b"2")), os.replace

    def failing(old, new):
        if Path(new).name == "z":
            raise PermissionError(13, "denied")
        replace(old, new)

    with monkeypatch.context() as patch, pytest.raises(PermissionError):
        patch.setattr(os, "replace", failing)
        unpack(path, folder)
    assert [file.name for file in folder.iterdir() if not file.name.startswith(".")] == []
    assert [file.name for file in unpack(path, folder)] == ["!first", "script-samples", "z"]
    assert sorted(file.name for file in folder.iterdir()) == ["!first", "script-samples", "z"]


@pytest.mark.parametrize("moment", ["unpacking", "!first", "script-samples", "z"])
def test_the_call_after_a_kill_ends_as_if_there_had_been_none(folder, tmp_path, monkeypatch, moment):
    path, replace = write(tmp_path / "images.zip", (entry("!first/x"), b"1"), (entry("z"), b"2")), os.replace

    def killed(old, new):
        if Path(new).name == moment or moment == "unpacking":
            os._exit(9)
        replace(old, new)

    if not (child := os.fork()):
        os.replace = killed
        unpack(path, folder)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert [file.name for file in unpack(path, folder)][-1] == "z"
    assert {name: content for name, content in files_of(folder).items()} == GOOD | {"!first/x": b"1", "z": b"2"}


def test_a_full_disk_leaves_nothing_of_an_archive(folder, tmp_path):
    path, limits = (
        write(tmp_path / "images.zip", (entry("z"), bytes(20_000))),
        resource.getrlimit(resource.RLIMIT_FSIZE),
    )
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, limits[1]))
    try:
        with pytest.raises(DiskFull):
            unpack(path, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert everything(folder) == [] and len(unpack(path, folder)) == 2


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_archives_with_any_damaged_byte_are_unpacked_or_refused_in_one_line(folder, tmp_path, compression):
    content, path = write(tmp_path / "images.zip", compression=compression).read_bytes(), tmp_path / "images.zip"
    rng = random.Random(0)
    for place in rng.sample(range(len(content)), 150):
        damaged = bytearray(content)
        damaged[place] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            for made in unpack(path, folder):
                shutil.rmtree(made) if made.is_dir() else made.unlink()
        except UserError as error:
            assert "\n" not in str(error)
        assert everything(folder) == []


@pytest.mark.slow
def test_the_script_unpacks_the_published_images(folder, tmp_path):
    write(folder / "images.zip")
    result = run_script("download.py", "--unpack", folder)
    assert result.returncode == 0 and f"unpacked: {folder}/script-samples" in result.stderr, result.stderr
    assert (folder / "script-samples/run/image_log.json").read_bytes() == b"[]"
    write(folder / "images.zip", (entry("../x"), b""))
    result = run_script("download.py", "--unpack", folder)
    assert result.returncode == 2 and result.stderr.startswith(
        f"error: {folder}/images.zip: the entry '../x' leads out"
    )
    assert not (tmp_path / "x").exists()


def test_a_listing_that_leads_elsewhere_is_not_fetched(folder, monkeypatch, caplog):
    """gdown mends names by itself; this does not depend on it."""
    script = load_module(ROOT / "scripts" / "download.py")
    item = SimpleNamespace(id="1", path="../outside/x", local_path=f"{folder}/../outside/x")
    monkeypatch.setattr(script.gdown, "download_folder", lambda **_: [item])
    monkeypatch.setattr(script.gdown, "download", None)
    with pytest.raises(UserError, match=r"1 of 1 files did not arrive \(\.\./outside/x\)"):
        script.fetch_published(folder)
    assert "../outside/x would lie outside" in caplog.text
