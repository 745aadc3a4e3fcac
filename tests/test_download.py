"""download.py: the published form passes the check, other files are named; real HTTP, real gdown; archives."""

import hashlib
import json
import os
import resource
import stat
import struct
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import create_autospec

import pytest
import torch
from judge_tools import published_file
from refusals import refused
from script_tools import files_of, limited, load_module, succeed
from tiny_unet import legacy, random_weights

from ddpo_pytorch.utils import published
from ddpo_pytorch.utils.files import DiskFull
from ddpo_pytorch.utils.published import unpack

UNET, LORA = "pretrained_unet.safetensors", "rl4med-checkpoint50"
H6, H4 = "artifact_classifier_train_H6.pth", "artifact_classifier_train_H4.pth"
OTHER_LORA, OTHER_H4 = "rl4med-checkpoint_50", "artifact_classifier_test_H4.pth"
# a port on which nobody answers
NO_NETWORK = {name: "http://127.0.0.1:9" for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy")}


@pytest.fixture(scope="module")
def script():
    return load_module("scripts/download.py")


@pytest.fixture(scope="module")
def unet(script):
    return script.sd15_unet()


def unet_file(path: Path, unet, dtype: str = "F32", damage: bool = False) -> None:
    """Write a UNet as safetensors of zeros that take no disk; `damage` reshapes one tensor and leaves out another."""
    header, end = {}, 0
    for key, value in unet.state_dict().items():
        shape = [9, 4, 3, 3] if damage and key == "conv_in.weight" else list(value.shape)
        if not damage or key != "conv_out.bias":
            start, end = end, end + torch.Size(shape).numel() * {"F32": 4, "F16": 2}[dtype]
            header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + end)


def lora_folder(path: Path, unet, rank: int = 4, without: int = 0) -> None:
    """Write an accelerate state folder of which the LoRA file lacks its first `without` tensors."""
    path.mkdir()
    tensors = legacy(random_weights(unet, rank))
    torch.save(dict(list(tensors.items())[without:]), path / "pytorch_lora_weights.bin")
    (path / "optimizer.bin").write_bytes(b"not checked")


@pytest.fixture(scope="module")
def complete(tmp_path_factory, unet) -> Path:
    """A folder of exactly the published form, by README's spelling."""
    folder = tmp_path_factory.mktemp("published")
    unet_file(folder / UNET, unet)
    lora_folder(folder / LORA, unet)
    for name, heads in ((H6, 6), (H4, 4)):
        published_file(folder / name, heads)
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        archive.mkdir("script-samples")
        archive.writestr("script-samples/0.jpg", b"")
    return folder


def report(script, caplog, folder: Path) -> tuple[list[str], str]:
    """Return the lines of a check, and its error."""
    caplog.clear()
    with caplog.at_level("INFO"):
        error = refused([str(folder)], script.check, folder)
    return caplog.messages, error


@pytest.mark.slow
def test_a_complete_folder_passes_without_being_read(complete):
    said = succeed("download.py", "--check", complete, **NO_NETWORK).stderr
    lines = [line.split(", ", 1) for line in said.splitlines() if line.endswith(": OK")]
    expected = {H6: "classifier with 6 heads: OK", H4: "classifier with 4 heads: OK"}
    expected |= {LORA: "LoRA of rank 4, 256 tensors: OK", UNET: "UNet of SD 1.5, 686 tensors, F32: OK"}
    expected |= {"images.zip": "zip of 1 files: OK"}
    assert [(line[0].split()[-1], line[1].split(": ", 1)[1]) for line in lines] == list(expected.items())
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    assert peak < 3, f"{peak:.1f} GiB of memory: the UNet file of 3.2 GiB was loaded"


def test_missing_files_and_other_spellings_are_named(script, caplog, complete, tmp_path, unet):
    (tmp_path / OTHER_H4).symlink_to(complete / H4)
    unet_file(tmp_path / UNET, unet, "F16")
    lines, error = report(script, caplog, tmp_path)
    assert lines[1].startswith(f"{OTHER_H4} (README: {H4}), ") and lines[1].endswith("with 4 heads: OK")
    assert lines[2] == f"{LORA} or {OTHER_LORA}: missing (LoRA of stage (ii))"
    assert lines[3].endswith("UNet of SD 1.5, 686 tensors, F16: OK")
    assert lines[4] == "images.zip: missing (generated samples, optional)"
    assert f"missing or wrong: {H6}, {LORA};" in error
    assert str(tmp_path / "absent") in report(script, caplog, tmp_path / "absent")[1]


def test_wrong_files_are_named(script, caplog, tmp_path, unet):
    unet_file(tmp_path / UNET, unet, damage=True)
    lora_folder(tmp_path / LORA, unet, 4, 2)
    published_file(tmp_path / H6, 4)
    (tmp_path / H4).write_text("<html>quota</html>")
    (tmp_path / "images.zip").write_bytes(b"PK")
    shapes = "holds conv_in.weight of shape (9, 4, 3, 3), the model expects (320, 4, 3, 3); give the UNet of SD 1.5"
    faults = {H6: "has 4 heads, expected 6", H4: "web page", LORA: "down_blocks.0", UNET: shapes}
    faults |= {"images.zip": "cannot be read as a zip"}
    for torn in (False, True):
        if torn:
            (tmp_path / UNET).write_bytes(b"\xff" * 99)
            faults[UNET] = "not a readable safetensors file"
        lines, error = report(script, caplog, tmp_path)
        for (name, message), line in zip(faults.items(), lines[-5:], strict=True):
            assert line.startswith(f"{name}, ") and ": WRONG: " in line and message in line and name in error
            assert "\n" not in line


def test_without_network_the_manual_route_is_printed(script, tmp_path, monkeypatch, caplog):
    script.FLAGS = SimpleNamespace(root=str(tmp_path), check=str(tmp_path), unpack=str(tmp_path))
    refused("--check and --unpack are given", script.main, [])
    for name, value in NO_NETWORK.items():
        monkeypatch.setenv(name, value)
    script.FLAGS = SimpleNamespace(root=f"{tmp_path}/out", check=None, unpack=None)
    refused("could not be fetched: split table isic2019_train.csv, .*published files", script.main, [])
    route = (f"put them into {tmp_path}/out/published", f"scripts/download.py --check {tmp_path}/out/published")
    for words in (script.DRIVE_URL, UNET, H6, f"{H4} or {OTHER_H4}", f"{LORA} or {OTHER_LORA}", *route):
        assert words in caplog.text
    assert not (tmp_path / "out").exists()


def test_split_tables_are_checked_and_never_overwritten(script, tmp_path, monkeypatch):
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "isic2019_val.csv").write_bytes(b"image,MEL\n")
    url, folder = (tmp_path / "web").as_uri(), tmp_path / "splits"
    target, digest = folder / "isic2019_val.csv", hashlib.sha256(b"image,MEL\n").hexdigest()
    for name, message in ((target.name, f"is not the official table .*{digest}"), ("isic2019_test.csv", "be read")):
        refused(f"{url}/{name} .*{message}", script.fetch_split, name, folder, url)
    assert not folder.exists()
    monkeypatch.setitem(script.SPLITS, target.name, digest)
    for address in (url, "http://127.0.0.1:9"):
        assert script.fetch_split(target.name, folder, address) == target and list(folder.iterdir()) == [target]
    target.write_bytes(b"mine")
    refused(f"{target} is not the official", script.fetch_split, target.name, folder, url)
    assert target.read_bytes() == b"mine"


def test_missing_files_are_fetched_inside_the_folder_required_ones_first(script, caplog, tmp_path, monkeypatch):
    names = ["images.zip", OTHER_H4, H6, UNET, "notes.txt", f"{OTHER_LORA}/pytorch_lora_weights.bin", "../outside/x"]
    listing = [SimpleNamespace(id=name, path=name, local_path=f"{tmp_path}/in/{name}") for name in names]
    folder = create_autospec(script.gdown.download_folder, return_value=listing)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / OTHER_H4).write_bytes(b"complete before")

    def download(id, output, **options):
        if id == UNET:
            raise OSError("Too many users\nhave viewed it")
        Path(output).write_text(id)

    file = create_autospec(script.gdown.download, side_effect=download)
    monkeypatch.setattr(script, "gdown", SimpleNamespace(download=file, download_folder=folder))
    with caplog.at_level("INFO"):
        refused(["2 of 7 files ", f"({UNET}, ../outside/x)"], script.fetch_published, tmp_path / "in")
    assert [call.kwargs["id"] for call in file.call_args_list] == [H6, UNET, names[5], "images.zip", "notes.txt"]
    assert all(call.kwargs["resume"] for call in file.call_args_list)
    assert (tmp_path / "in" / OTHER_H4).read_bytes() == b"complete before" and not (tmp_path / "outside").exists()
    assert any(line.startswith(f"{UNET} was not downloaded: ") and "Too many users" in line for line in caplog.messages)
    for folder.return_value, folder.side_effect, message in (([], None, "lists nothing"), ([], OSError, "not list")):
        refused(message, script.fetch_published, tmp_path / "in")


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
    refused("cannot be read as a zip.*move it away", unpack, path, folder)
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
