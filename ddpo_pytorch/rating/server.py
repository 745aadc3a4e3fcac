"""The rating page's server: what is answered, and how it starts and ends.

Nothing that leaves it tells where an image comes from: ids are keyed hashes with a secret of this start, images are
decoded and encoded again as PNG without metadata, and headers name neither files nor dates.
"""

import base64
import hashlib
import html
import io
import logging
import signal
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Annotated

import uvicorn
from fastapi import Body, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from PIL import Image
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ddpo_pytorch.data.images import load_pixels
from ddpo_pytorch.rating.guard import Guard, limited
from ddpo_pytorch.rating.items import Item
from ddpo_pytorch.rating.questions import Questions
from ddpo_pytorch.rating.store import rater_name
from ddpo_pytorch.utils.errors import UserError

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


@dataclass(frozen=True)
class Display:
    """What the page asks and shows.

    `rater` and `expert_level` are asked for on the page unless given. `size` > 0 shows each image as a square of that
    side, made by `resize` (`data.images.RESIZES`).
    """

    rater: str = ""
    expert_level: int = 0
    size: int = 0
    resize: str = "pad"


def page() -> tuple[str, str]:
    """The page with its style and script inside, and the Content-Security-Policy that allows no others."""
    folder = files("ddpo_pytorch.rating")
    parts = {name: (folder / f"page.{name}").read_text(encoding="utf-8") for name in ("html", "css", "js")}
    hashes = {
        name: f"'sha256-{base64.b64encode(hashlib.sha256(parts[name].encode()).digest()).decode()}'"
        for name in ("css", "js")
    }
    policy = (
        f"default-src 'none'; script-src {hashes['js']}; style-src {hashes['css']}; img-src blob: data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return parts["html"].replace("/*css*/", parts["css"]).replace("/*js*/", parts["js"]), policy


class Guarded:
    """Middleware that refuses what `guard` refuses, counts bodies as they arrive, and adds headers to every answer.

    It is plain ASGI: what is refused is never read.
    """

    def __init__(self, app: ASGIApp, guard: Guard, headers: Mapping[str, str]):
        self._app, self._guard, self._headers = app, guard, headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self._headers)
            await send(message)

        refused = self._guard.refusal(Request(scope))
        closed = {"Connection": "close"}  # else the server would go through a body of any length to its end
        app = JSONResponse({"detail": refused[1]}, refused[0], closed) if refused else self._app
        await app(scope, limited(receive), answer)


def make_app(questions: Questions, guard: Guard, display: Display) -> FastAPI:
    """The page, its images and its requests; all refused that `guard` refuses."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    text, policy = page()
    level = str(display.expert_level or "")
    text = text.replace("/*rater*/", html.escape(display.rater)).replace("/*level*/", level)
    app.add_middleware(Guarded, guard=guard, headers=HEADERS | {"Content-Security-Policy": policy})

    @app.exception_handler(OSError)
    async def not_written(request: Request, error: OSError):
        logger.error("a click could not be saved: %s", error)
        reason = error.strerror or "the disk is full"  # of DiskFull, whose text names paths
        return JSONResponse({"detail": f"Your last click could not be saved ({reason})."}, 507)

    @app.exception_handler(RequestValidationError)
    async def not_understood(request: Request, error: RequestValidationError):
        return JSONResponse({"detail": "The request is not one of this page's; load the page anew."}, 422)

    @app.get("/")
    def show(request: Request) -> Response:
        response = HTMLResponse(text)
        if guard.given(request):
            response.set_cookie(guard.cookie, guard.token, httponly=True, samesite="strict")
        return response

    @app.get("/image/{name}")
    def image(name: str) -> Response:
        try:
            return Response(encoded(_known(questions, name), display), media_type="image/png")
        except UserError as error:
            logger.error("%s", error)
            raise HTTPException(500, "This image cannot be read. Skip it, and tell who runs the page.") from error

    _add_requests(app, questions, display)
    return app


def encoded(item: Item, display: Display) -> bytes:
    """An image as PNG without metadata, whatever file it comes from. Raises UserError for a damaged one."""
    pixels = load_pixels(item.path, display.size or None, display.resize)
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, format="PNG", compress_level=1)
    return file.getvalue()


def _known(questions: Questions, name: str) -> Item:
    item = questions.item(name)
    if item is None:
        raise HTTPException(404, "There is no such image; the page has been started anew.")
    return item


def _add_requests(app: FastAPI, questions: Questions, display: Display) -> None:
    def checked(name: str) -> str:
        try:
            name = rater_name(name)
        except UserError as error:
            raise HTTPException(422, str(error)) from error
        if display.rater and name != display.rater:
            raise HTTPException(422, f"This page is for {display.rater}.")
        return name

    @app.post("/api/state")
    def state(rater: OnlyName) -> dict:
        return questions.state(checked(rater))

    @app.post("/api/rate")
    def rate(rater: Name, id: Name, rating: OneToThree, expert_level: OneToThree) -> dict:
        _known(questions, id)
        return questions.answer(checked(rater), id, rating, display.expert_level or expert_level)

    @app.post("/api/skip")
    def skip(rater: Name, id: Name) -> dict:
        _known(questions, id)
        return questions.answer(checked(rater), id)

    @app.post("/api/undo")
    def undo(rater: Name, undoable: Annotated[int | None, Body(strict=True)] = None) -> dict:
        return questions.undo(checked(rater), undoable)

    @app.post("/api/again")
    def again(rater: OnlyName) -> dict:
        return questions.ask_put_off(checked(rater))


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises UserError where host or port cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen()
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"--host {host} --port {port} cannot be used ({reason}); give another port, or 0 for a free one, and an "
            "address of this machine"
        ) from error
    return sock


def serve(app: FastAPI, sock: socket.socket) -> None:
    """Answer until Ctrl-C or SIGTERM."""
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
    except KeyboardInterrupt:  # which uvicorn raises once it has ended
        pass
