"""What stands before the routes: the token, other sites, the size of bodies, ids, logs."""

from __future__ import annotations

import asyncio
import base64
import contextlib
from typing import Any
from unittest import mock

import pytest
from http_server import SMALL, TOKEN, Server, post
from starlette.requests import Request
from starlette.responses import Response

from diffusion_accel.serving.http import guard, run
from diffusion_accel.serving.http.settings import ServerSettings

DRAW = "/v1/images/generations"


@pytest.mark.parametrize("given", ["", "Bearer", "Bearer wrong", f"Basic {TOKEN}", f"Token {TOKEN}"])
@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/nowhere"])
def test_without_the_token(server: Server, given: str, path: str) -> None:
    status, headers, body = server.ask("GET", path, Authorization=given)
    assert status == 401 and headers["www-authenticate"] == "Bearer" and body["error"]["code"] == "invalid_token"


def test_with_the_token(server: Server) -> None:
    """Also as the password of clients that know no other way; probes and the page of the API need none."""
    basic = base64.b64encode(f"anybody:{TOKEN}".encode()).decode()
    for given in (f"Bearer {TOKEN}", f"bearer  {TOKEN}", f"Basic {basic}"):
        assert server.ask("GET", "/v1/models", Authorization=given)[0] == 200
    for path in ("/health", "/ready", "/openapi.json", "/docs"):
        assert server.ask("GET", path, Authorization="")[0] == 200


@pytest.mark.parametrize(
    "headers", [{"Host": "evil.example"}, {"Host": "localhost.evil.example:80"}, {"Origin": "http://evil.example"}]
)
def test_other_sites(server: Server, headers: dict[str, str]) -> None:
    """A page that a browser shows may not use a server at home, whatever its name resolves to."""
    assert server.ask("GET", "/v1/models", **headers)[0] == 403
    assert server.ask("GET", "/v1/models", Host=f"localhost:{server.port}")[0] == 200


def test_a_large_body_is_refused_unread(server: Server) -> None:
    head = post(DRAW, {}).partition(b"Content-Length")[0]
    with server.raw(head + b"Content-Length: 1000000000\r\n\r\n") as connection:
        with connection.makefile("rb") as answer:
            found = answer.read()
        assert b" 413 " in found and b"connection: close" in found and b"1 MiB" in found


def test_a_large_body_without_a_length_is_refused_while_it_is_read(server: Server) -> None:
    head = post(DRAW, {}).partition(b"Content-Length")[0] + b"Transfer-Encoding: chunked\r\n\r\n"
    part = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    with server.raw(head) as connection:
        sent = 0
        with contextlib.suppress(OSError):
            while sent < 16_000:  # a gigabyte
                connection.sendall(part)
                sent += 1
        assert sent < 1000
    assert server.ask("GET", "/health")[0] == 200
    assert [line["status"] for line in server.log() if line.get("path") == DRAW][-1] == 413


def test_request_ids_and_logs(server: Server) -> None:
    status, headers, _ = server.ask("POST", DRAW, SMALL | {"prompt": "secret words"}, X_Request_ID="one-of-mine")
    assert status == 200 and headers["x-request-id"] == "one-of-mine"
    line = next(line for line in server.log() if line.get("request_id") == "one-of-mine")
    assert (line["path"], line["status"], line["images"], line["steps"]) == (DRAW, 200, 1, 3)
    _, headers, _ = server.ask("GET", "/nowhere/%0a", X_Request_ID="not one\tof mine")
    assert len(headers["x-request-id"]) == 32
    text = (server.folder / "err").read_text() + (server.folder / "out").read_text()
    assert "secret words" not in text and TOKEN not in text and "nowhere" not in text


def test_what_there_is_not(server: Server) -> None:
    assert server.ask("GET", "/v1/../../etc/passwd")[0] == 404
    status, headers, body = server.ask("GET", DRAW)
    assert status == 405 and headers["allow"] == "POST" and body["error"]["code"] == "method_not_allowed"
    assert server.ask("DELETE", "/sdapi/v1/options")[1]["allow"] == "GET, POST"


@pytest.mark.parametrize("slow", ["its body", "reading"])
def test_a_slow_client_is_given_up(monkeypatch: pytest.MonkeyPatch, slow: str) -> None:
    """Without waiting as long as a server does."""
    monkeypatch.setattr(guard, "SLOWEST", 0.01)
    monkeypatch.setattr(guard, "READS_SLOWEST", 0.01)
    sent, answered = [], []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await Request(scope, receive).body()
        await Response("drawn")(scope, receive, send)

    async def receive() -> Any:
        await asyncio.sleep(60 if slow == "its body" else 0)
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        await asyncio.sleep(60 if slow == "reading" else 0)
        sent.append(message)

    guarded = guard.Guard(app, ServerSettings(model="x"), lambda *values: answered.append(values[1]))
    scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
    asyncio.run(guarded(scope, receive, send))
    assert answered == [408 if slow == "its body" else 499]
    assert [message["status"] for message in sent if "status" in message] == ([408] if slow == "its body" else [])


def test_a_client_that_takes_nothing_of_a_whole_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long that takes one that takes a little of it is not, nor one for which nothing is left."""
    now = 0.0
    monkeypatch.setattr(run, "time", mock.Mock(monotonic=lambda: now))
    left = {"nothing": [100, 100, 100, 100], "a little": [100, 90, 80, 70], "all": [0, 0, 0, 0]}
    connections = {name: mock.Mock() for name in left}
    unread = run.Unread()
    for turn in range(4):
        for name, sizes in left.items():
            connections[name].transport.get_write_buffer_size.return_value = sizes[turn]
        unread.end(connections.values())
        now += guard.READS_SLOWEST / 2
    assert [one.transport.abort.called for one in connections.values()] == [True, False, False]
