"""Archives: unpacked all or nothing, inside the folder or not at all."""

import os
import stat
import struct
import zipfile
from pathlib import Path

import pytest
from refusals import refused
from script_tools import files_of, limited

from ddpo_pytorch.utils import published
from ddpo_pytorch.utils.files import DiskFull
from ddpo_pytorch.utils.published import unpack

GOOD = {"script-samples/run/images/a_b/0.jpg": b"\xff\xd8 picture", "script-samples/run/image_log.json": b"[]"}


def entry(name: str, kind: int = stat.S_IFREG, mode: int = 0o644) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo("placeholder")
    info.filename = name  # the constructor would sanitise it
    info.external_attr = (kind | mode) << 16
    return info


def write(path: Path, *more: tuple[zipfile.ZipInfo, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in GOOD.items():
            file.writestr(name, content)
        for info, content in more:
            info.compress_type = compression
            file.writestr(info, content)
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with a neighbour, into which an archive next to it is unpacked."""
    for name in ("outside", "in"):
        (tmp_path / name).mkdir()
    return tmp_path / "in"


def refuse(folder: Path, *more: tuple[zipfile.ZipInfo, bytes], match: str, **options: object) -> None:
    """Assert that an archive of these entries, too, is refused by name, with nothing written."""
    path = write(folder.with_name("images.zip"), *more, **options)
    before = sorted(folder.parent.rglob("*"))
    assert str(path) in refused(match, unpack, path, folder) and sorted(folder.parent.rglob("*")) == before


def test_an_archive_is_unpacked_without_its_permissions(folder, tmp_path):
    path = write(tmp_path / "images.zip", (entry("empty/", stat.S_IFDIR), b""), (entry("top.sh", mode=0o4777), b"x"))
    assert unpack(path, folder) == [folder / "empty", folder / "script-samples", folder / "top.sh"]
    assert files_of(folder) == GOOD | {"top.sh": b"x"} and (folder / "empty").is_dir()
    assert (folder / "top.sh").stat().st_mode & 0o7111 == 0
    refused("empty exists already", unpack, path, folder)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_entries_that_do_not_belong_into_an_archive_of_pictures(folder, tmp_path):
    """Refuse the entry regardless of those after it, such as a file behind a link."""
    names = {"leads out of the folder": ("/outside/x", "script-samples/../../outside/x")}
    names |= {"50 levels": ("x/" * 60 + "x",)}
    names |= {"backslash, colon or control character": ("C:/outside/x", "a\nb", "good.png\0../../outside/x")}
    names |= {"clashes with": ("script-samples/run/image_log.json", "script-samples/run/image_log.json/x")}
    names |= {"beyond 255 bytes": ("x" * 256,), "reserved": (".images.zip.unpacked/y", ".lock")}
    entries = [(entry(name), message) for message, given in names.items() for name in given]
    entries += [(entry("link", stat.S_IFLNK, 0o777), "is a link")]
    for info, message in *entries, (entry("device", stat.S_IFCHR), "is neither a file nor a folder"):
        content = str(tmp_path / "outside").encode()
        refuse(folder, (entry("!first/x"), b"1"), (info, content), (entry("link/x"), b""), match=message)
    # names that some file systems take for the same
    for one, other in ("x/1", "X/2"), ("stra\u00dfe", "STRASSE"), ("e\u0301", "\u00e9"):
        clash = f"{other}.*clashes with '{one.split('/')[0]}'"
        refuse(folder, (entry(one), b"1"), (entry(other), b"1"), match=clash)


def test_limits_of_size_and_number(folder, tmp_path, monkeypatch):
    zeros, said = (entry("zeros"), bytes(3 * 2**20)), r"states 3\.0 MiB of content in 3 entries.* 20 times"
    refuse(folder, zeros, compression=zipfile.ZIP_DEFLATED, match=said)
    # the same, stating 10 bytes in its directory: no more are read, and the checksum differs
    path = tmp_path / "images.zip"
    content = bytearray(path.read_bytes())
    struct.pack_into("<I", content, content.rindex(b"PK\x01\x02") + 24, 10)
    path.write_bytes(content)
    refused("cannot be read as a zip", unpack, path, folder)
    monkeypatch.setattr(published, "MOST_ENTRIES", 3)
    refuse(folder, (entry("a"), b""), (entry("b"), b""), match="in 4 entries.* 3 entries")
    monkeypatch.setattr(published, "SPARE", 2**60)
    refuse(folder, match=r"needs 0\.0 GiB in .* where .* are free")


def test_torn_encrypted_and_absent_archives_and_a_full_disk_leave_nothing(folder, tmp_path):
    path = write(tmp_path / "images.zip", (entry("last.png"), b"content that is damaged"))
    encrypted = bytearray(intact := path.read_bytes())
    encrypted[intact.rindex(b"PK\x01\x02") + 8] |= 1
    changed = intact.replace(b"content that", b"contents hat")
    faults = [(changed, "Bad CRC-32 for file 'last.png'"), (intact[:-30], "cannot be read as a zip")]
    for content, message in *faults, (encrypted, "'last.png' is encrypted"), (None, "images.zip does not exist"):
        path.unlink() if content is None else path.write_bytes(content)
        refused(message, unpack, path, folder)
    write(path, (entry("z"), bytes(20_000)))
    with limited(9000), pytest.raises(DiskFull):
        unpack(path, folder)
    assert not list(folder.iterdir()) and len(unpack(path, folder)) == 2


@pytest.mark.parametrize("moment", ["unpacking", "script-samples"])
def test_the_call_after_a_kill_completes_the_archive(folder, tmp_path, moment):
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
    assert unpack(path, folder)[-1] == folder / "z"
    assert files_of(folder) == GOOD | {"!first/x": b"1", "z": b"2"}
