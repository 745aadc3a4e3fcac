"""The rating page's server: which requests are answered, and how.

No answer reveals where an image comes from: ids are keyed hashes with a secret of this start, images are decoded and
encoded again as PNG without metadata, and headers name neither files nor dates.
"""

import base64
import hashlib
import hmac
import html
import io
import ipaddress
import logging
import re
import signal
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Annotated
from urllib.parse import urlsplit

import uvicorn
from fastapi import Body, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from PIL import Image
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ddpo_pytorch.data.images import load_pixels
from ddpo_pytorch.rating.items import Item
from ddpo_pytorch.rating.session import Questions
from ddpo_pytorch.rating.store import rater_name
from ddpo_pytorch.utils.errors import UserError

MAX_BODY = 4096  # bytes of a request
HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
Name = Annotated[str, Body(max_length=512)]
OnlyName = Annotated[str, Body(max_length=512, embed=True)]
OneToThree = Annotated[int, Body(ge=1, le=3, strict=True)]

logger = logging.getLogger(__name__)


def check_token(token: str) -> None:
    """Raise UserError for a token that needs escaping in an address or is easy to guess."""
    if not re.fullmatch(r"[A-Za-z0-9_-]{16,128}", token):
        raise UserError("--token needs 16 to 128 of the characters A-Z, a-z, 0-9, _ and -; omit it to generate one")


def is_loopback(host: str) -> bool:
    """Return whether an address is this machine's own, unreachable from outside."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Guard:
    """Decide which requests are answered at all: from the page itself, short, and with the token if there is one."""

    def __init__(self, host: str, port: int, token: str):
        self._host, self.token, self.cookie = host, token, f"rate_{port}"  # browsers share cookies between ports

    def refusal(self, request: Request) -> tuple[int, str] | None:
        """Return status and reason if a request is refused, else None."""
        headers = request.headers
        if not self._is_own(headers.get("host", "")):
            return 400, "this page is not served under that host name"
        if self.token and not (self.has_token(request) or _equal(request.cookies.get(self.cookie, ""), self.token)):
            return 401, "open the address with the token that scripts/rate.py printed"
        reads = request.method in ("GET", "HEAD")
        length = headers.get("content-length", "0" if reads else "")
        stated = re.fullmatch("[0-9]{1,9}", length) and "transfer-encoding" not in headers
        if not stated or int(length) > MAX_BODY:
            return 413, f"requests have a stated length of at most {MAX_BODY} bytes"
        if not reads and urlsplit(headers.get("origin", "")).netloc != headers.get("host"):
            return 403, "requests come from the page itself"
        if not reads and headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            return 415, "requests are JSON"
        return None

    def has_token(self, request: Request) -> bool:
        """Return whether the address holds the token, as it does when the page is first opened."""
        given = request.query_params.get("token", "")
        return bool(self.token) and request.url.path == "/" and _equal(given, self.token)

    def _is_own(self, header: str) -> bool:
        """Return whether a Host header names this server, on any port, since it may be tunnelled.

        A foreign name that resolves to this server is an attack (DNS rebinding).
        """
        try:
            name = urlsplit(f"//{header}").hostname or ""
        except ValueError:
            return False
        if is_loopback(name) or is_loopback(self._host):
            return is_loopback(name)
        try:
            ipaddress.ip_address(name)
            return True
        except ValueError:
            return name in {text.lower() for text in (self._host, socket.gethostname(), socket.getfqdn())}


def _equal(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode(errors="replace"), token.encode())


def limited(receive: Receive) -> Receive:
    """Return a `receive` that raises HTTPException after MAX_BODY bytes, whatever length the headers state."""
    size = 0

    async def counting() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > MAX_BODY:
            raise HTTPException(413, f"requests have at most {MAX_BODY} bytes")
        return message

    return counting


class Guarded:
    """ASGI middleware that refuses requests unread, limits bodies as they arrive, and adds headers to every answer."""

    def __init__(self, app: ASGIApp, guard: Guard, headers: Mapping[str, str]):
        self._app, self._guard, self._headers = app, guard, headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self._headers)
            await send(message)

        refused = self._guard.refusal(Request(scope))
        closed = {"Connection": "close"}  # else the server would read a body of any length to its end
        app = JSONResponse({"detail": refused[1]}, refused[0], closed) if refused else self._app
        await app(scope, limited(receive), answer)


@dataclass(frozen=True)
class Display:
    """Settings of the page.

    `rater` and `expert_level` are asked for on the page unless given. `size` > 0 shows each image as a square of that
    side, made by `resize` (`data.images.RESIZES`).
    """

    rater: str = ""
    expert_level: int = 0
    size: int = 0
    resize: str = "pad"


def page(display: Display) -> tuple[str, str]:
    """Return the page with inline style and script, and a Content-Security-Policy that allows no others."""
    folder = files("ddpo_pytorch.rating")
    parts = {name: (folder / f"page.{name}").read_text(encoding="utf-8") for name in ("html", "css", "js")}
    hashes = {name: base64.b64encode(hashlib.sha256(parts[name].encode()).digest()).decode() for name in ("css", "js")}
    policy = (
        f"default-src 'none'; script-src 'sha256-{hashes['js']}'; style-src 'sha256-{hashes['css']}'; img-src blob: "
        "data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    text = parts["html"].replace("/*css*/", parts["css"]).replace("/*js*/", parts["js"])
    level = str(display.expert_level or "")
    return text.replace("/*rater*/", html.escape(display.rater)).replace("/*level*/", level), policy


def encoded(item: Item, display: Display) -> bytes:
    """Return an image as PNG without metadata, whatever its file's format. Raises UserError for a damaged one."""
    pixels = load_pixels(item.path, display.size or None, display.resize)
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, format="PNG", compress_level=1)
    return file.getvalue()


def make_app(questions: Questions, guard: Guard, display: Display) -> FastAPI:
    """Return the app: the page, its images and its requests, behind `guard`."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    text, policy = page(display)
    app.add_middleware(Guarded, guard=guard, headers=HEADERS | {"Content-Security-Policy": policy})

    @app.exception_handler(OSError)
    async def not_written(request: Request, error: OSError):
        logger.error("a click could not be saved: %s", error)
        reason = error.strerror or "the disk is full"  # the text of DiskFull names paths
        return JSONResponse({"detail": f"Your last click could not be saved ({reason})."}, 507)

    @app.exception_handler(RequestValidationError)
    async def not_understood(request: Request, error: RequestValidationError):
        return JSONResponse({"detail": "The server does not understand this request; reload the page."}, 422)

    def known_item(name: str) -> Item:
        if (item := questions.item(name)) is None:
            raise HTTPException(404, "There is no such image; the server has been restarted.")
        return item

    def known_rater(name: str) -> str:
        try:
            name = rater_name(name)
        except UserError as error:
            raise HTTPException(422, str(error)) from error
        if display.rater and name != display.rater:
            raise HTTPException(422, f"This page is for {display.rater}.")
        return name

    @app.get("/")
    def show(request: Request) -> Response:
        response = HTMLResponse(text)
        if guard.has_token(request):
            response.set_cookie(guard.cookie, guard.token, httponly=True, samesite="strict")
        return response

    @app.get("/image/{name}")
    def image(name: str) -> Response:
        try:
            return Response(encoded(known_item(name), display), media_type="image/png")
        except UserError as error:
            logger.error("%s", error)
            raise HTTPException(500, "This image cannot be read. Skip it, and tell who runs the page.") from error

    @app.post("/api/state")
    def state(rater: OnlyName) -> dict:
        return questions.state(known_rater(rater))

    @app.post("/api/rate")
    def rate(rater: Name, id: Name, rating: OneToThree, expert_level: OneToThree) -> dict:
        known_item(id)
        return questions.answer(known_rater(rater), id, rating, display.expert_level or expert_level)

    @app.post("/api/skip")
    def skip(rater: Name, id: Name) -> dict:
        known_item(id)
        return questions.answer(known_rater(rater), id)

    @app.post("/api/undo")
    def undo(rater: Name, undoable: Annotated[int | None, Body(strict=True)] = None) -> dict:
        return questions.undo(known_rater(rater), undoable)

    @app.post("/api/again")
    def again(rater: OnlyName) -> dict:
        return questions.ask_skipped(known_rater(rater))

    return app


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; port 0 takes a free one. Raises UserError for an unusable host or port."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen()
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"--host {host} --port {port} cannot be used ({reason}); give an address of this machine and another port, "
            "or 0 for a free one"
        ) from error
    return sock


def serve(app: FastAPI, sock: socket.socket) -> None:
    """Serve until Ctrl-C or SIGTERM."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    settings = uvicorn.Config(
        app,
        log_config=None,
        log_level="warning",
        access_log=False,
        lifespan="off",
        ws="none",
        proxy_headers=False,
        server_header=False,
        date_header=False,
        timeout_graceful_shutdown=2,
    )
    try:
        uvicorn.Server(settings).run(sockets=[sock])
    except KeyboardInterrupt:  # raised by uvicorn after it has ended
        pass
