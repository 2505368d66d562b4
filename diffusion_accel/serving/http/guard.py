"""What every request passes around a route: its id, the token, the size and pace of its body, its log line."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import re
import time
import uuid
from binascii import Error as NoBase64
from collections.abc import Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers, MutableHeaders

from .log import event, request_id
from .problems import Problem, answer_to

if TYPE_CHECKING:
    from .settings import ServerSettings

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

OPEN = ("/health", "/ready", "/docs", "/openapi.json")  # without a token
QUIET = ("/assets",)  # dozens for a page, which are in no log
SLOWEST = 30.0  # seconds between two parts of a body
READS_SLOWEST = 60.0  # seconds in which a client takes nothing of an answer
GONE = 499  # status in logs: the client went away
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Guard:
    """An application around another one.

    Args:
        app: answers the requests that may pass.
        settings: of the server.
        answered: called with the route, the status and the seconds of each answer.
    """

    def __init__(self, app: App, settings: ServerSettings, answered: Callable[[str, int, float], object]) -> None:
        self._app, self._settings, self._answered = app, settings, answered
        self._token = None if settings.token is None else _digest(settings.token)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers, began = Headers(scope=scope), time.perf_counter()
        given = headers.get("x-request-id", "")
        name = given if _ID.fullmatch(given) else uuid.uuid4().hex
        token = request_id.set(name)
        body, sent = _Body(receive, self._settings.limits.body_mb * 2**20), _Answer(send, name)
        try:
            self._check(scope, headers)
            body.check_length(headers)
            await self._app(scope, body.receive, sent.send)
        except Problem as problem:
            if not sent.status:
                await answer_to(problem)(scope, receive, sent.send)
        except Exception as error:  # the answer was sent already, by the application
            if not sent.broken:
                event("error", 40, error, path=_route(scope))
        finally:
            status = GONE if sent.broken or not sent.status else sent.status
            seconds = time.perf_counter() - began
            self._answered(_route(scope), status, seconds)
            client = (scope.get("client") or ("",))[0]
            fields = {"method": scope["method"], "path": _route(scope), "status": status, "seconds": round(seconds, 4)}
            level = 10 if _route(scope) in QUIET and status < 400 else 20
            event("request", level, **fields, client=client, **scope.get("state", {}).get("log", {}))
            request_id.reset(token)

    def _check(self, scope: Message, headers: Headers) -> None:
        hosts = self._settings.hosts
        if hosts is not None and _host(headers.get("host", "")) not in hosts:
            raise Problem(403, "this host name is not the server's; call it by its address", code="wrong_host")
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != headers.get("host"):
            raise Problem(403, "pages of other sites may not call this server", code="wrong_origin")
        if self._token is None or scope["path"] in OPEN:
            return
        if not hmac.compare_digest(_digest(_given_token(headers.get("authorization", ""))), self._token):
            # a browser asks for it by itself: as the password of basic authentication
            how = 'Basic realm="the token is the password", charset="UTF-8"' if scope["path"] == "/" else "Bearer"
            raise Problem(401, "send the server's token: Authorization: Bearer …", headers={"WWW-Authenticate": how})


class _Body:
    """A request's body, which is refused where it is too large or too slow."""

    def __init__(self, receive: Receive, limit: int) -> None:
        self._receive, self._limit, self._read, self._ended = receive, limit, 0, False

    def check_length(self, headers: Headers) -> None:
        """Refuse what says itself that it is too large."""
        length = headers.get("content-length", "")
        if length.isdigit() and int(length) > self._limit:
            raise self._too_large()

    async def receive(self) -> Message:
        if self._ended:  # what comes now is that the client goes away
            return await self._receive()
        try:
            message = await asyncio.wait_for(self._receive(), SLOWEST)
        except TimeoutError:
            raise Problem(408, f"the body came too slowly: nothing for {SLOWEST:.0f} s", headers=_CLOSE) from None
        self._read += len(message.get("body", b""))
        if self._read > self._limit:
            raise self._too_large()
        self._ended = not message.get("more_body", False)
        return message

    def _too_large(self) -> Problem:
        return Problem(413, f"the body has more than the {self._limit >> 20} MiB that are allowed", headers=_CLOSE)


_CLOSE = {"Connection": "close"}  # the rest of the body is not read


class _Answer:
    """What is sent back; a client that takes nothing for long is given up."""

    def __init__(self, send: Send, name: str) -> None:
        self._send, self._name = send, name
        self.status, self.broken = 0, False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(raw=message.setdefault("headers", []))
            headers["x-request-id"] = self._name
            headers["x-content-type-options"] = "nosniff"
            headers.setdefault("cache-control", "no-store")
        try:
            await asyncio.wait_for(self._send(message), READS_SLOWEST)
        except (OSError, TimeoutError):
            self.broken = True  # the client is gone, or reads nothing: the server closes the connection
            raise


def _route(scope: Message) -> str:
    """The path as the routes have it, so that nothing of a client's gets into logs and metrics."""
    return getattr(scope.get("route"), "path", None) or "other"


def _host(header: str) -> str:
    name = header.rpartition("]")[0] + "]" if header.startswith("[") else header.partition(":")[0]
    return name.lower()


def _digest(text: str) -> bytes:
    """Of one length, so that comparing takes the same time for all."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


def _given_token(header: str) -> str:
    """What a client sent: a bearer token, or the password of clients that know no other way."""
    kind, _, value = header.partition(" ")
    if kind.lower() == "bearer":
        return value.strip()
    if kind.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2]
        except (NoBase64, ValueError):
            return ""
    return ""
