"""The one route of the page: which addresses it answers, and with what. Everything else there is not."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import re
from collections.abc import Mapping, Sequence
from types import NoneType
from typing import TYPE_CHECKING, Any

from fastapi.responses import HTMLResponse
from starlette.datastructures import MutableHeaders
from starlette.routing import BaseRoute, Match, NoMatchFound

from diffusion_accel.errors import ConfigurationError
from diffusion_accel.io import decode_text, parse_json, shown
from diffusion_accel.serving.http.problems import Problem

from .files import Files

if TYPE_CHECKING:
    from diffusion_accel.serving.http.guard import Message, Receive, Send
    from diffusion_accel.serving.http.service import Service

_PAGE = r"\w{1,64}"  # what a page calls itself
# what logs and metrics call them -> methods, addresses. Gradio has more, which read files, fetch addresses or upload
_PARTS = {
    "/": ("GET HEAD", r"/"),
    "/assets": ("GET HEAD", r"/(assets|static)/[\w./-]+|/favicon\.ico|/theme\.css"),
    "/config": ("GET", r"/config/?|/gradio_api/(app_id|info|startup-events)/?"),
    "/gradio_api/queue/join": ("POST", r"/gradio_api/queue/join"),
    "/gradio_api/queue/data": ("GET", r"/gradio_api/queue/data"),
    "/gradio_api/heartbeat": ("GET", rf"/gradio_api/heartbeat/{_PAGE}"),
    "/gradio_api/cancel": ("POST", r"/gradio_api/(cancel|reset)/?"),
    "/gradio_api/file": ("GET HEAD", r"/gradio_api/file=(?P<file>/[\w./-]+)"),
}
_CALLS = "/gradio_api/queue/join"
#: kinds of values that functions of the page are given -> in words, types
KINDS: dict[str, tuple[str, tuple[type, ...]]] = {
    "number": ("a number", (int, float)),
    "maybe a number": ("a number or null", (int, float, NoneType)),
    "switch": ("true or false", (bool,)),
    "text": ("a text or null", (str, NoneType)),
    "state": ("null", (NoneType,)),
}
_STREAMS = ("/gradio_api/queue/data", "/gradio_api/heartbeat")  # which a browser keeps open
_HEADERS = {
    # nothing comes from another site, and no other site shows the page
    "Content-Security-Policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' "
    "'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; frame-ancestors 'none'; form-action 'self'",
    "Referrer-Policy": "no-referrer",
}
_WITHOUT = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>diffusion-accel</title>
<body style="font: 1.1em/1.5 system-ui, sans-serif; max-width: 36em; margin: 3em auto; padding: 0 1em">
<h1>diffusion-accel</h1>
<p>This server draws images over HTTP. <a href="docs">Its API</a> lists what may be asked.</p>
<p>A page for drawing in the browser belongs here. It needs Gradio:</p>
<pre>pip install 'diffusion-accel[ui]'</pre>
<p>Then start the server again.</p>
</body></html>"""


def installed() -> bool:
    """Whether Gradio is there; without importing it."""
    return importlib.util.find_spec("gradio") is not None


class PageRoute(BaseRoute):
    """A route of Starlette's with all addresses of the page.

    Args:
        service: of the server.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._app: Any = None
        self._making = asyncio.Lock()
        self._files: Files | None = None
        self._living: asyncio.Task[None] | None = None

    def matches(self, scope: Any) -> tuple[Match, Any]:
        """Whether an address belongs to the page."""
        if scope["type"] == "http" and ".." not in scope["path"]:
            for name, (methods, pattern) in _PARTS.items():
                found = re.fullmatch(pattern, scope["path"], re.ASCII)
                if found and scope["method"] in methods.split() and self._ours(found.groupdict().get("file")):
                    return Match.FULL, {"route": _Named(name)}
        return Match.NONE, {}

    def url_path_for(self, name: str, /, **path_params: Any) -> Any:
        """Nothing here has a name."""
        raise NoMatchFound(name, path_params)

    async def handle(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer."""
        name = scope["route"].path
        if not installed():
            status = 200 if name == "/" else 404
            return await HTMLResponse(_WITHOUT, status, _HEADERS)(scope, receive, send)
        app = await self._made()
        inner = {**scope, "state": {}}  # Gradio writes into it
        if name == _CALLS:
            receive = await _checked(receive, app.state.calls)
        answer = _with_headers(send, _kept(name))
        if name not in _STREAMS:
            return await app(inner, receive, answer)
        task, end = (
            asyncio.ensure_future(app(inner, receive, answer)),
            asyncio.ensure_future(self._service.ended.wait()),
        )
        try:
            await asyncio.wait({task, end}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                task.result()
        finally:
            end.cancel()
            if not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await task

    def _ours(self, file: str | None) -> bool:
        """Whether a file is an image that the page has made; None: no file is asked for."""
        if file is None:
            return True
        return self._files is not None and file.startswith(f"{self._files.folder}/")

    async def _made(self) -> Any:
        """Gradio's application, made when somebody opens the page for the first time."""
        async with self._making:
            if self._app is None:
                make = await asyncio.to_thread(_import_view)
                self._files = Files()
                self._app = make(self._service, self._files)
                self._living = asyncio.create_task(self._live())
        return self._app

    async def _live(self) -> None:
        """Run what Gradio runs beside its routes, until the server has ended."""
        assert self._files is not None
        try:
            async with self._app.router.lifespan_context(self._app):
                await self._service.ended.wait()
        finally:
            self._files.close()


class _Named:
    """What logs and metrics call a part of the page."""

    def __init__(self, path: str) -> None:
        self.path = path


async def _checked(receive: Receive, calls: Mapping[int, Sequence[str]]) -> Receive:
    """A call of one of the page's functions, with values as a browser sends them.

    Of anything but texts and numbers Gradio takes parts for files and addresses to fetch; of values that it does not
    expect it writes a traceback, prompts included, among the lines of the log.

    Args:
        receive: gives the body.
        calls: kinds of values (see `KINDS`) by the number of a function.

    Raises:
        Problem: it is none.
    """
    body, more = bytearray(), True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    try:
        values = parse_json(decode_text(bytes(body), "the body"), "the body")
    except ConfigurationError as error:
        raise Problem(400, "the body is not valid JSON") from error
    values = values if isinstance(values, dict) else {}
    data, number, page = (values.get(name) for name in ("data", "fn_index", "session_hash"))
    if not isinstance(data, list) or any(isinstance(value, dict | list) for value in data):
        raise Problem(422, "data must be a list of texts and numbers", "data")
    if type(number) is not int or number not in calls:
        raise Problem(422, f"fn_index must be the number of a function of the page, got {shown(number)}", "fn_index")
    if not isinstance(page, str) or not re.fullmatch(_PAGE, page, re.ASCII):
        raise Problem(422, "session_hash must have 1 to 64 letters and digits", "session_hash")
    if len(data) != len(calls[number]):
        raise Problem(422, f"data must have {len(calls[number])} values, got {len(data)}", "data")
    for place, (value, kind) in enumerate(zip(data, calls[number], strict=True)):
        words, types = KINDS[kind]
        if type(value) not in types:
            raise Problem(422, f"data.{place} must be {words}, got a value of another kind", "data")
    event = values.get("event_data")
    index = event.get("index") if isinstance(event, dict) else None
    chosen = {"index": index if type(index) is int else None, "value": None}  # nothing else of it is read
    clean = {"data": data, "fn_index": number, "session_hash": page, "event_data": chosen}
    if type(values.get("trigger_id")) is int:
        clean["trigger_id"] = values["trigger_id"]
    whole = [{"type": "http.request", "body": json.dumps(clean).encode(), "more_body": False}]

    async def again() -> Message:
        return whole.pop() if whole else await receive()

    return again


def _import_view() -> Any:
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # it is read by the import
    from .view import application  # heavy, and an extra: gradio

    return application


def _kept(name: str) -> str:
    """How long browsers may keep an answer."""
    return "private, max-age=3600" if name in ("/assets", "/gradio_api/file") else "no-store"


def _with_headers(send: Send, kept: str) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(raw=message.setdefault("headers", []))
            for name, value in _HEADERS.items():
                headers[name] = value
            headers["cache-control"] = kept
        await send(message)

    return sending
