"""Refuse requests that do not come from the rating page, are too long, or lack the token."""

import hmac
import ipaddress
import re
import socket
from urllib.parse import urlsplit

from fastapi import HTTPException, Request
from starlette.types import Message, Receive

from ddpo_pytorch.utils.errors import UserError

LONGEST_BODY = 4096  # bytes of a request


def check_token(token: str) -> None:
    """Raises UserError for a token that does not survive an address or can be guessed."""
    if not re.fullmatch(r"[A-Za-z0-9_-]{16,128}", token):
        raise UserError(
            "--token needs 16 to 128 of the characters A-Z, a-z, 0-9, _ and -; leave it out to have one made"
        )


def is_loopback(host: str) -> bool:
    """Tell whether an address is this machine's own, unreachable from outside."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Guard:
    """Decide which requests are answered at all."""

    def __init__(self, host: str, port: int, token: str):
        self._host, self.token, self.cookie = host, token, f"rate_{port}"  # browsers do not tell ports apart

    def refusal(self, request: Request) -> tuple[int, str] | None:
        """Return status and reason where a request is refused, None where it is not."""
        if not self._is_own(request.headers.get("host", "")):
            return 400, "this page is not served under that host name"
        if self.token and not (self.given(request) or _equal(request.cookies.get(self.cookie, ""), self.token)):
            return 401, "open the address with the token that scripts/rate.py printed"
        length = request.headers.get("content-length", "0" if request.method in ("GET", "HEAD") else "")
        stated = re.fullmatch("[0-9]{1,9}", length) and "transfer-encoding" not in request.headers
        if not stated or int(length) > LONGEST_BODY:
            return 413, f"requests have a stated length of at most {LONGEST_BODY} bytes"
        if request.method in ("GET", "HEAD"):
            return None
        if urlsplit(request.headers.get("origin", "")).netloc != request.headers.get("host"):
            return 403, "requests come from the page itself"
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            return 415, "requests are JSON"
        return None

    def given(self, request: Request) -> bool:
        """Tell whether the right token stands in the address, as it does once."""
        given = request.query_params.get("token", "")
        return bool(self.token) and request.url.path == "/" and _equal(given, self.token)

    def _is_own(self, header: str) -> bool:
        """A foreign name that resolves to this server is an attack (DNS rebinding); the port may be a tunnel's."""
        try:
            name = urlsplit(f"//{header}").hostname or ""
        except ValueError:
            return False
        if is_loopback(name):
            return True
        if is_loopback(self._host):
            return False
        try:
            ipaddress.ip_address(name)
            return True
        except ValueError:
            return name in {text.lower() for text in (self._host, socket.gethostname(), socket.getfqdn())}


def limited(receive: Receive) -> Receive:
    """Return `receive` that counts a body as it arrives, whatever its headers state, and stops at LONGEST_BODY.

    Raises HTTPException there.
    """
    size = 0

    async def counting() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > LONGEST_BODY:
            raise HTTPException(413, f"requests have at most {LONGEST_BODY} bytes")
        return message

    return counting


def _equal(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode(errors="replace"), token.encode())
