"""The end of a server loses nothing that was accepted."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

from http_server import SMALL, TIMEOUT, post, running

DRAW = "/v1/images/generations"


def test_a_signal_under_load(tmp_path: Path) -> None:
    with running(tmp_path, "--max-running", "2") as server:
        asked = SMALL | {"num_inference_steps": 10}
        accepted = [server.raw(post(DRAW, asked | {"seed": k}, Connection="close")) for k in range(4)]
        _, _, job = server.ask("POST", "/jobs", SMALL)
        server.until("requests", 3, state="queued")
        server.signal(signal.SIGTERM)
        end = time.monotonic() + TIMEOUT
        while server.ask("GET", "/ready", Authorization="")[0] != 503:
            assert time.monotonic() < end
        status, headers, body = server.ask("POST", DRAW, SMALL)
        assert (status, body["error"]["code"]) == (503, "unavailable") and "retry-after" in headers
        for one in accepted:
            with one.makefile("rb") as answer:
                content = answer.read()
            assert (
                content.startswith(b"HTTP/1.1 200 OK")
                and len(json.loads(content.partition(b"\r\n\r\n")[2])["data"]) == 1
            )
        while (job := server.ask("GET", job["poll_url"])[2])["status"] != "completed":
            assert time.monotonic() < end
        server.process.join(TIMEOUT)
        assert server.process.exitcode == 0
        assert [line["event"] for line in server.log() if line["event"] != "request"] == [
            "listening",
            "draining",
            "stopped",
        ]


def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    with running(tmp_path) as server:
        server.raw(post(DRAW, SMALL | {"num_inference_steps": 100, "size": "512x512"}))
        server.until("requests", 1, state="running")
        server.signal(signal.SIGINT)
        while server.ask("GET", "/ready")[0] != 503:
            pass
        server.signal(signal.SIGTERM)
        server.process.join(TIMEOUT)
        assert server.process.exitcode == 128 + signal.SIGTERM
        assert "error: interrupted; requests that were accepted are lost" in (tmp_path / "err").read_text()


def test_what_takes_too_long_is_given_up(tmp_path: Path) -> None:
    with running(tmp_path, "--drain", "1") as server:
        with server.raw(post(DRAW, SMALL | {"num_inference_steps": 150, "size": "512x512"})) as connection:
            server.until("requests", 1, state="running")
            server.signal(signal.SIGTERM)
            assert b"409 Conflict" in connection.recv(4096)
        server.process.join(TIMEOUT)
        assert server.process.exitcode == 0
