"""download.py: the published form passes the check, other files are named; real HTTP, real gdown."""

import contextlib
import functools
import hashlib
import http.server
import json
import os
import resource
import struct
import sys
import threading
import urllib.parse
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import requests
import torch
from conftest import ROOT, run_script
from script_tools import load_module
from test_classifier import published_file
from tiny_unet import legacy, random_weights

from ddpo_pytorch.utils.errors import UserError

UNET, LORA = "pretrained_unet.safetensors", "rl4med-checkpoint50"
H6, H4 = "artifact_classifier_train_H6.pth", "artifact_classifier_train_H4.pth"
OTHER_LORA, OTHER_H4 = "rl4med-checkpoint_50", "artifact_classifier_test_H4.pth"
# a port on which nobody answers
NO_NETWORK = {name: "http://127.0.0.1:9" for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy")}


@pytest.fixture(scope="module")
def script():
    return load_module(ROOT / "scripts" / "download.py")


@pytest.fixture(scope="module")
def unet(script):
    return script.sd15_unet()


def unet_file(path: Path, unet, dtype: str = "F32", **changes: list[int] | None) -> None:
    """Write all tensors of a UNet as safetensors: a true header, and zeros that take no disk.

    `changes` are shapes by key with "__" for ".", None to leave the key out.
    """
    shapes = {key: list(value.shape) for key, value in unet.state_dict().items()}
    shapes |= {key.replace("__", "."): shape for key, shape in changes.items()}
    header, end = {}, 0
    for key, shape in shapes.items():
        if shape is not None:
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
    with caplog.at_level("INFO"), pytest.raises(UserError) as error:
        script.check(folder)
    return caplog.messages, str(error.value)


@pytest.mark.slow
def test_a_complete_folder_passes_without_being_read(complete):
    result = run_script("download.py", "--check", complete, **NO_NETWORK)
    assert result.returncode == 0, result.stderr
    lines = [line.split(" ", 1)[1] for line in result.stderr.splitlines() if line.endswith(": OK")]
    size = {path.name: f"{path.stat().st_size / 2**20:.1f} MiB" for path in complete.iterdir()}
    lora = sum(file.stat().st_size for file in (complete / LORA).iterdir()) / 2**20
    assert lines == [
        f"{H6}, {size[H6]}: classifier with 6 heads: OK",
        f"{H4}, {size[H4]}: classifier with 4 heads: OK",
        f"{LORA}, {lora:.1f} MiB: LoRA of rank 4, 256 tensors: OK",
        f"{UNET}, 3278.9 MiB: UNet of SD 1.5, 686 tensors, F32: OK",
        f"images.zip, {size['images.zip']}: zip of 1 files: OK",
    ]
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    assert peak < 3, f"{peak:.1f} GiB of memory: the UNet file of 3.2 GiB was loaded"


def test_other_spellings_and_half_precision_pass(script, caplog, complete, tmp_path, unet):
    unet_file(tmp_path / UNET, unet, "F16")
    (tmp_path / OTHER_LORA).symlink_to(complete / LORA)
    (tmp_path / OTHER_H4).symlink_to(complete / H4)
    lines, error = report(script, caplog, tmp_path)
    assert lines[1].startswith(f"{OTHER_H4} (README: {H4}), ") and lines[1].endswith("with 4 heads: OK")
    assert lines[2].startswith(f"{OTHER_LORA} (README: {LORA}), ") and lines[2].endswith("256 tensors: OK")
    assert lines[3].endswith("UNet of SD 1.5, 686 tensors, F16: OK")
    assert f"missing or wrong: {H6};" in error


def test_missing_files_are_named(script, caplog, tmp_path):
    (tmp_path / f"{UNET}x1y2z3w4.part").write_bytes(b"")
    lines, error = report(script, caplog, tmp_path)
    assert lines[1] == f"{H4} or {OTHER_H4}: missing (judge)"
    assert lines[3] == f"{UNET}: missing (UNet of stage (i), partly downloaded)"
    assert lines[4] == "images.zip: missing (generated samples, optional)"
    assert f"missing or wrong: {H6}, {H4}, {LORA}, {UNET};" in error
    assert str(tmp_path / "absent") in report(script, caplog, tmp_path / "absent")[1]


def torn_unet(path: Path, unet) -> None:
    unet_file(path, unet)
    os.truncate(path, path.stat().st_size // 2)


def changed(**shapes: list[int] | None):
    return lambda path, unet: unet_file(path, unet, **shapes)


FAULTS = {
    "UNet torn": (UNET, torn_unet, "not a readable safetensors file"),
    "UNet empty": (UNET, lambda path, _: path.touch(), "is empty"),
    "UNet of other shapes": (UNET, changed(conv_in__weight=[9, 4, 3, 3]), "conv_in.weight is (9, 4, 3, 3), in SD 1.5"),
    "UNet lacks a tensor": (UNET, changed(conv_out__bias=None), "conv_out.bias is absent, in SD 1.5's UNet (4,)"),
    "UNet has another tensor": (UNET, changed(ema=[1]), "ema is (1,), in SD 1.5's UNet absent"),
    "LoRA absent": (LORA, lambda path, _: path.mkdir(), LORA),
    "LoRA of another rank": (LORA, lambda path, unet: lora_folder(path, unet, 8), "(8, 320)"),
    "LoRA of fewer layers": (LORA, lambda path, unet: lora_folder(path, unet, 4, 2), "down_blocks.0"),
    "heads": (H6, lambda path, _: published_file(path, 4), "has 4 heads, 6 belong under this name"),
    "page instead of weights": (H4, lambda path, _: path.write_text("<html>quota</html>"), "web page"),
    "zip torn": ("images.zip", lambda path, _: path.write_bytes(b"PK"), "cannot be read as a zip"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_files_are_named(script, caplog, tmp_path, unet, fault):
    name, write, message = FAULTS[fault]
    write(tmp_path / name, unet)
    lines, error = report(script, caplog, tmp_path)
    (line,) = [line for line in lines if ": WRONG: " in line]
    assert line.startswith(f"{name}, ") and message in line and name in error and "\n" not in line


def test_without_network_the_manual_route_is_printed(script, tmp_path, monkeypatch, caplog):
    for name, value in NO_NETWORK.items():
        monkeypatch.setenv(name, value)
    script.FLAGS = SimpleNamespace(root=f"{tmp_path}/out", check=None, unpack=None)
    with pytest.raises(UserError, match="could not be fetched: split table isic2019_train.csv, .*published files"):
        script.main([])
    route = (f"put them into {tmp_path}/out/published", f"scripts/download.py --check {tmp_path}/out/published")
    for words in (script.DRIVE_URL, UNET, H6, f"{H4} or {OTHER_H4}", f"{LORA} or {OTHER_LORA}", *route):
        assert words in caplog.text
    assert not (tmp_path / "out").exists()


@pytest.fixture
def serve(monkeypatch):
    """Function (request handler): address of a local HTTP server."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with contextlib.ExitStack() as servers:

        def start(handler) -> str:
            server = servers.enter_context(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
            servers.callback(server.shutdown)
            return f"http://127.0.0.1:{server.server_port}"

        yield start


class Files(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def test_official_split_tables_are_fetched(script, tmp_path, serve, shared):
    url = serve(functools.partial(Files, directory=str(shared / "data" / "splits")))
    for name, digest in script.SPLITS.items():
        target = script.fetch_split(name, tmp_path / "splits", url)
        assert hashlib.sha256(target.read_bytes()).hexdigest() == digest
    assert sorted(path.name for path in (tmp_path / "splits").iterdir()) == sorted(script.SPLITS)


def test_split_tables_are_checked_and_never_overwritten(script, tmp_path, serve, monkeypatch):
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "isic2019_val.csv").write_bytes(b"image,MEL\n")
    url, folder = serve(functools.partial(Files, directory=str(tmp_path / "web"))), tmp_path / "splits"
    target, digest = folder / "isic2019_val.csv", hashlib.sha256(b"image,MEL\n").hexdigest()
    with pytest.raises(UserError, match=f"{url}/isic2019_val.csv is not the official table .*{digest}"):
        script.fetch_split(target.name, folder, url)
    with pytest.raises(UserError, match="isic2019_test.csv cannot be read .*404"):
        script.fetch_split("isic2019_test.csv", folder, url)
    assert not folder.exists()

    monkeypatch.setitem(script.SPLITS, target.name, digest)
    assert script.fetch_split(target.name, folder, url) == target and list(folder.iterdir()) == [target]
    assert script.fetch_split(target.name, folder, NO_NETWORK["https_proxy"]) == target
    target.write_bytes(b"mine")
    with pytest.raises(UserError, match=f"{target} is not the official .*{hashlib.sha256(b'mine').hexdigest()}"):
        script.fetch_split(target.name, folder, url)
    assert target.read_bytes() == b"mine"


class Drive(Files):
    """Google Drive as gdown 6 meets it: folder pages (id -> title, links) and files (id -> name, content)."""

    pages, files, asked = {}, {}, []

    def do_GET(self):  # noqa: N802 (the base class names it)
        key = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)["id"][0]
        if "embeddedfolderview" in self.path:
            title, links = self.pages[key]
            anchors = "".join(f'<a href="https://drive.google.com/{url}">{name}</a>' for url, name in links)
            return self.answer(f"<title>{title}</title>{anchors}".encode(), {"Content-Type": "text/html"})
        self.asked.append(key)
        name, content = self.files[key]
        if content.startswith(b"<p"):  # the page for a file over its quota
            return self.answer(content, {"Content-Type": "text/html"})
        start, end = int(self.headers.get("Range", "bytes=0-")[6:-1]), len(content)
        headers = {"Content-Type": "application/octet-stream", "Content-Disposition": f'attachment; filename="{name}"'}
        headers |= {"Content-Range": f"bytes {start}-{end - 1}/{end}"} if start else {}
        self.answer(content[start:], headers, 206 if start else 200)

    def answer(self, body: bytes, headers: dict[str, str], status: int = 200):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


def test_gdown_lists_resumes_keeps_and_survives_a_refusal(script, caplog, tmp_path, serve, monkeypatch):
    url, send = serve(Drive), requests.Session.request

    def redirected(session, method, address, **options):
        return send(session, method, address.replace("https://drive.google.com", url), **options)

    monkeypatch.setattr(requests.Session, "request", redirected)
    monkeypatch.setattr(sys.modules["gdown.download"], "DEFAULT_COOKIES_FILE", str(tmp_path / "cookies.txt"))
    names = ["images.zip", OTHER_H4, H6, UNET, "notes.txt", "pytorch_lora_weights.bin"]
    ids = {name: f"{index}" * 30 for index, name in enumerate(names)}
    links = [(f"file/d/{ids[name]}/view", name) for name in names]
    top = [*links[:-1], (f"drive/folders/{'f' * 30}", OTHER_LORA)]
    Drive.pages = {script.DRIVE_ID: ("RL4Med", top), "f" * 30: (OTHER_LORA, links[-1:])}
    Drive.files = {key: (name, f"content of {name}".encode()) for name, key in ids.items()}
    Drive.files[ids[UNET]] = (UNET, b'<p class="uc-error-subcaption">Too many users have viewed it.</p>')
    folder, lora = tmp_path / "published", f"{OTHER_LORA}/{names[-1]}"
    folder.mkdir()
    (folder / OTHER_H4).write_bytes(b"complete before")
    (folder / f"{H6}x1y2z3w4.part").write_bytes(b"CONTENT of art")
    with caplog.at_level("INFO"), pytest.raises(UserError, match=rf"1 of 6 files did not arrive \({UNET}\)"):
        script.fetch_published(folder)

    written = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    expected = {name: f"content of {Path(name).name}".encode() for name in ("images.zip", H6, "notes.txt", lora)}
    expected[H6] = b"CONTENT" + expected[H6].removeprefix(b"content")  # after the part that was there
    assert written == expected | {OTHER_H4: b"complete before"}
    assert Drive.asked[-2:] == [ids["images.zip"], ids["notes.txt"]]  # optional files come last
    assert ids[OTHER_H4] not in Drive.asked
    assert f"listed: {lora} (LoRA of stage (ii))" in caplog.messages
    assert any(line.startswith(f"{UNET} did not arrive: ") and "Too many users" in line for line in caplog.messages)

    for Drive.pages, message in (({script.DRIVE_ID: ("RL4Med", [])}, "lists nothing"), ({}, "does not list")):
        with pytest.raises(UserError, match=message):
            script.fetch_published(folder)


def test_a_listing_that_leads_elsewhere_is_not_fetched(script, tmp_path, monkeypatch):
    """gdown sanitises names, which is not relied upon."""
    item = SimpleNamespace(id="1", path="../outside/x", local_path=f"{tmp_path}/in/../outside/x")
    monkeypatch.setattr(script.gdown, "download_folder", lambda **_: [item])
    monkeypatch.setattr(script.gdown, "download", None)
    with pytest.raises(UserError, match=r"1 of 1 files did not arrive \(\.\./outside/x\)"):
        script.fetch_published(tmp_path / "in")
