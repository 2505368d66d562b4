"""A real server process for tests: `diffusion-accel serve` with the embedded model, at a port of its own."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import forks
import interrupted

TOKEN = "a-token-of-tests"
TIMEOUT = 60  # seconds after which a test has failed
SMALL = {"prompt": "panda, 3d style", "num_inference_steps": 3, "size": "48x48", "seed": 7}  # a body


@dataclass
class Server:
    """A server that runs."""

    folder: Path
    process: BaseProcess
    port: int
    connections: list[socket.socket] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, str], Any]:
        """Status, headers (in small letters) and what the answer holds: JSON values, or bytes."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT)
        named = {"Authorization": f"Bearer {TOKEN}"} | {key.replace("_", "-"): value for key, value in headers.items()}
        if body is not None and not isinstance(body, bytes):
            body, named = json.dumps(body).encode(), {"Content-Type": "application/json"} | named
        try:
            connection.request(method, path, body, named)
            answer = connection.getresponse()
            found, content = {key.lower(): value for key, value in answer.getheaders()}, answer.read()
        finally:
            connection.close()
        return answer.status, found, json.loads(content) if "json" in found.get("content-type", "") else content

    def metric(self, name: str, **labels: str) -> float:
        """A value of /metrics; 0 where there is none."""
        from prometheus_client.parser import text_string_to_metric_families

        _, _, text = self.ask("GET", "/metrics")
        for family in text_string_to_metric_families(text.decode()):
            for sample in family.samples:
                if sample.name == f"diffusion_accel_{name}" and labels.items() <= sample.labels.items():
                    return sample.value
        return 0.0

    def until(self, name: str, value: float, **labels: str) -> None:
        """Wait until a metric is at least so much."""
        end = time.monotonic() + TIMEOUT
        while self.metric(name, **labels) < value:
            assert time.monotonic() < end, f"{name} stays below {value}"
            time.sleep(0.02)

    def until_idle(self) -> None:
        """Wait until no request runs or waits."""
        end = time.monotonic() + TIMEOUT
        while any(self.metric("requests", state=state) for state in ("queued", "running")):
            assert time.monotonic() < end, "requests of another test do not end"
            time.sleep(0.02)

    def raw(self, text: bytes) -> socket.socket:
        """A connection over which these bytes were sent; it is closed with the server, if not before."""
        connection = socket.create_connection(("127.0.0.1", self.port), TIMEOUT)
        self.connections.append(connection)
        connection.sendall(text)
        return connection

    def log(self) -> list[dict[str, Any]]:
        """The lines of its log."""
        return [json.loads(line) for line in (self.folder / "err").read_text().splitlines()]

    def signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)


def post(path: str, body: Any, **headers: str) -> bytes:
    """A request as it is sent, with the token."""
    content = json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", f"Authorization: Bearer {TOKEN}"]
    lines += ["Content-Type: application/json", f"Content-Length: {len(content)}"]
    lines += [f"{key}: {value}" for key, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + content


@contextmanager
def running(folder: Path, *options: str) -> Iterator[Server]:
    """A server for as long as it is needed; its output goes to the files out and err of a folder."""
    given = ["serve", "--port", "0", "--device", "cpu", "--log-format", "json", "--token", TOKEN, *options]
    connections: list[socket.socket] = []
    process = forks.start(interrupted.command, folder, folder, given, "any_moment")
    try:
        end = time.monotonic() + TIMEOUT
        while not (port := _port(folder)):
            assert process.is_alive() and time.monotonic() < end, (folder / "err").read_text()
            time.sleep(0.02)
        yield Server(folder, process, port, connections)
    finally:
        for connection in connections:
            connection.close()
        if process.is_alive() and process.pid is not None:
            os.kill(process.pid, signal.SIGKILL)
        process.join(TIMEOUT)


def _port(folder: Path) -> int:
    out = folder / "out"
    text = out.read_text() if out.exists() else ""
    return int(text.rpartition(":")[2]) if text.endswith("\n") else 0
