"""Pictures to rate and real runs of scripts/rate.py; a pytest plugin for its fixtures."""

import json
import os
import re
import signal
import time
from http.client import HTTPConnection
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from launching import ROOT, Script
from PIL import Image
from PIL.PngImagePlugin import PngInfo

PROMPTS = ("Fundus: The left eye shows drusen, and a cataract.", 'Fundus: "Normal" retina.', "Fundus: Myopia.")


def write_gallery(folder: Path, count: int, size: int = 48, suffix: str = "png", shade: int = 0) -> list[dict]:
    """A sample folder of one-coloured pictures: the red of the n-th is 8 n + shade. PNGs tell a secret, JPEGs too."""
    entries = []
    for number in range(count):
        path = f"images/{'secret' if shade else 'source'}/{number}.{suffix}"
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.full((size, size, 3), (8 * number + shade, 60, 90), np.uint8)
        info = PngInfo()
        info.add_text("origin", "hidden-generator")
        more = {"pnginfo": info} if suffix == "png" else {"comment": b"hidden-generator", "quality": 95}
        Image.fromarray(pixels).save(folder / path, **more)
        entries.append({"prompt": PROMPTS[number % len(PROMPTS)], "path_to_img": path})
    (folder / "image_log.json").write_text(json.dumps(entries))
    return entries


class RatePage:
    """A running scripts/rate.py and a client for it."""

    def __init__(self, *options, cwd: Path = ROOT):
        self.script, self.cookie, self.lines, found = Script("scripts/rate.py", *options, cwd=cwd), None, [], None
        while not found:
            assert self.script.poll(), f"rate.py did not start: {self.script.result().stderr}"
            found = re.search(r"open (http://(\S+?):(\d+)/(?:\?token=(\S+))?)\n", self.script.said())
            time.sleep(0.01)
        self.url, self.host, self.port, self.token = found[1], found[2], int(found[3]), found[4]
        if self.token:  # as a browser does when the address is opened
            self.cookie = self.ask(f"/?token={self.token}").headers["set-cookie"].partition(";")[0]

    def end(self, how: int = signal.SIGINT) -> int:
        """The exit status after a signal."""
        os.kill(self.script.pid, how)
        result = self.script.result(20)
        self.lines = result.stderr.splitlines()
        return result.returncode

    def ask(self, path: str, body=None, method: str = "", **headers) -> SimpleNamespace:
        """One request as the page sends it; `headers` come on top, None takes one away."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=20)
        data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        usual = {"Host": f"127.0.0.1:{self.port}", "Cookie": self.cookie}
        if data is not None:
            usual |= {"Content-Type": "application/json", "Origin": f"http://127.0.0.1:{self.port}"}
            usual |= {"Content-Length": str(len(data))}
        usual |= {name.replace("_", "-"): value for name, value in headers.items()}
        connection.putrequest(method or ("GET" if data is None else "POST"), path, skip_host=True)
        for name, value in usual.items():
            if value is not None:
                connection.putheader(name, value)
        # in one packet: a server that refuses at the headers hangs up, and a body still to come would reset the line
        pieces: list[bytes] = []
        connection.connect()
        connection.send = pieces.append
        connection.endheaders(data)
        connection.sock.sendall(b"".join(pieces))
        answer = connection.getresponse()
        content, kind = answer.read(), answer.headers.get_content_type()
        connection.close()
        parsed = json.loads(content) if kind == "application/json" else None
        return SimpleNamespace(status=answer.status, headers=answer.headers, content=content, json=parsed)

    def post(self, name: str, rater: str, **fields) -> dict:
        """A request of the page that must succeed: the new state."""
        answer = self.ask(f"/api/{name}", {"rater": rater} | fields)
        assert answer.status == 200, answer.content
        return answer.json

    def rate(self, rater: str, state: dict, rating: int, level: int = 2) -> dict:
        return self.post("rate", rater, id=state["current"]["id"], rating=rating, expert_level=level)


@pytest.fixture(scope="session")
def rating_page(tmp_path_factory):
    """One page for many tests, each with raters of its own: 5 PNGs and 4 JPEGs from two folders beside the table."""
    pytest.importorskip("fastapi", reason="fastapi absent")
    folder = tmp_path_factory.mktemp("rating")
    write_gallery(folder / "real", 4, suffix="jpg")
    write_gallery(folder / "made", 5, shade=128)
    page = RatePage("--images", f"{folder / 'real'},{folder / 'made'}", "--out", folder / "ratings.csv")
    page.table = folder / "ratings.csv"
    yield page
    page.end()
