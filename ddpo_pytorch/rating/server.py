"""Server of the rating page; its responses do not reveal where an image comes from.

Ids are keyed hashes, images are re-encoded without metadata, and headers contain neither file names nor dates.
"""

import base64
import hashlib
import hmac
import io
import ipaddress
import logging
import re
import signal
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from importlib.resources import files
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from jinja2 import Template
from pydantic import Field, StrictInt, create_model

from ddpo_pytorch.data.images import load_pixels, to_pil
from ddpo_pytorch.data.ratings import CRITERIA
from ddpo_pytorch.rating.session import Questions
from ddpo_pytorch.rating.store import rater_name
from ddpo_pytorch.utils.errors import UserError

MAX_BODY = 4096  # bytes per request
HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
Action = Literal["state", "rate", "skip", "undo", "again"]
Name = Annotated[str, Field(max_length=512, strict=True)]
OneToThree = Annotated[int, Field(ge=1, le=3, strict=True)] | None
ANSWERS: dict[str, Any] = dict.fromkeys(("rating", "expert_level", "alignment", *CRITERIA), (OneToThree, None))
Click = create_model("Click", rater=(Name, ...), id=(Name, ""), undoable=(StrictInt | None, None), **ANSWERS)

logger = logging.getLogger(__name__)


def is_loopback(host: str) -> bool:
    """Return whether an address is this machine's loopback, which other machines cannot reach."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_own(header: str, bound: str) -> bool:
    """Return whether a Host header names the server bound to `bound`; other names are an attack (DNS rebinding)."""
    try:
        name = urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return False
    if is_loopback(name) or is_loopback(bound):
        return is_loopback(name)
    try:
        return bool(ipaddress.ip_address(name))
    except ValueError:
        return name in {text.lower() for text in (bound, socket.gethostname(), socket.getfqdn())}


def refusal(request: Request, host: str, allowed: bool) -> tuple[int, str] | None:
    """Return status and reason if a request is refused, else None. The server reads at most the stated length."""
    headers, reads = request.headers, request.method in ("GET", "HEAD")
    length = headers.get("content-length", "0" if reads else "")
    stated = re.fullmatch("[0-9]{1,9}", length) and "transfer-encoding" not in headers
    if not is_own(headers.get("host", ""), host):
        return 400, "this page is not served under that host name"
    if not allowed:
        return 401, "open the address with the token that scripts/rate.py printed"
    if not stated or int(length) > MAX_BODY:
        return 413, f"requests must state a length of at most {MAX_BODY} bytes"
    if not reads and headers.get("origin", "").partition("://")[2] != headers.get("host"):
        return 403, "requests must come from the page itself"
    if not reads and headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        return 415, "requests must be JSON"
    return None


def make_app(
    questions: Questions, host: str, token: str, only: str, level: int, mode: str, criteria: bool, **square: Any
) -> FastAPI:
    """Return the app: the page with inline style and script, its images, and the endpoint for clicks.

    Requests are rejected unread unless they are short, from the page itself and with the token. In mode "real" the page
    asks whether an image is a photograph, in "pair" which of two is better, else for quality, its `criteria`, and
    agreement with the text. It asks for the rater and the expert level unless `only` and `level` are given. `square`:
    arguments size and resize of `load_pixels`.
    """
    folder = files("ddpo_pytorch.rating")
    parts = {name: (folder / f"page.{name}").read_text(encoding="utf-8") for name in ("html", "css", "js")}
    hashes = {name: base64.b64encode(hashlib.sha256(parts[name].encode()).digest()).decode() for name in ("css", "js")}
    policy = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; connect-src 'self'; "
    policy += f"img-src blob: data:; script-src 'sha256-{hashes['js']}'; style-src 'sha256-{hashes['css']}'"
    shown = {"rater": only, "level": level or "", "mode": mode, "criteria": "yes" if criteria else ""}
    shown["examples"] = " ".join(f"{rating}:{name}" for rating, name in questions.examples)
    text = Template(parts["html"], autoescape=True).render(shown | parts)

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    def is_token(given: str) -> bool:
        return bool(token) and hmac.compare_digest(given.encode(errors="replace"), token.encode())

    @app.middleware("http")
    async def guard(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
        cookie = f"rate_{request.scope['server'][1]}"  # of this port, since browsers share cookies between ports
        entered = request.url.path == "/" and is_token(request.query_params.get("token", ""))
        allowed = entered or not token or is_token(request.cookies.get(cookie, ""))
        if refused := refusal(request, host, allowed):
            closed = {"Connection": "close"}  # else the server would read a body of any length
            response: Response = JSONResponse({"detail": refused[1]}, refused[0], closed)
        else:
            response = await answer(request)
            if entered:
                response.set_cookie(cookie, token, httponly=True, samesite="strict")
        response.headers.update(HEADERS | {"Content-Security-Policy": policy})
        return response

    @app.exception_handler(OSError)
    async def not_written(request: Request, error: OSError):
        logger.error("a click could not be saved: %s", error)
        reason = error.strerror or "the disk is full"  # DiskFull's message contains paths
        return JSONResponse({"detail": f"Your last click could not be saved ({reason})."}, 507)

    @app.exception_handler(RequestValidationError)
    async def not_understood(request: Request, error: RequestValidationError):
        return JSONResponse({"detail": "The server does not understand this request; reload the page."}, 422)

    unknown = HTTPException(404, "There is no such image; the server has been restarted.")

    @app.get("/")
    def show() -> Response:
        return HTMLResponse(text)

    @app.get("/image/{name}")
    def image(name: str) -> Response:
        if (path := questions.files.get(name)) is None:
            raise unknown
        file = io.BytesIO()
        try:
            pixels = load_pixels(path, **square)
        except UserError as error:
            logger.error("%s", error)
            raise HTTPException(500, "This image cannot be read. Skip it, and tell whoever runs the page.") from error
        to_pil(pixels).save(file, format="PNG", compress_level=1)  # without metadata, whatever the file's format
        return Response(file.getvalue(), media_type="image/png")

    @app.post("/api/{action}")
    def act(action: Action, click: Click) -> dict:
        given = vars(click) | {"expert_level": level or vars(click)["expert_level"]}
        name = given.pop("id")
        try:
            rater = rater_name(given.pop("rater"))
        except UserError as error:
            raise HTTPException(422, str(error)) from error
        if only and rater != only:
            raise HTTPException(422, f"This page is for {only}.")
        if action == "rate" and not (given["rating"] and given["expert_level"]):
            raise HTTPException(422, "A rating and an expert level are missing; reload the page.")
        if action in ("rate", "skip") and name not in questions.number_of:
            raise unknown
        return questions.act(action, rater, name, **given)

    return app


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; port 0 picks a free one. Raises UserError for an unusable host or port."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        advice = "give an address of this machine and another port, or 0 for a free one"
        raise UserError(f"--host {host} --port {port} cannot be used ({reason}); {advice}") from error


def serve(app: FastAPI, sock: socket.socket) -> None:
    """Serve until Ctrl-C or SIGTERM."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    quiet = dict(log_config=None, log_level="warning", access_log=False, server_header=False, date_header=False)
    narrow = dict(lifespan="off", ws="none", proxy_headers=False, timeout_graceful_shutdown=2)
    with suppress(KeyboardInterrupt):  # raised by uvicorn after it has shut down
        uvicorn.Server(uvicorn.Config(app, **quiet, **narrow)).run(sockets=[sock])
