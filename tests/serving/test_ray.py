"""Replicas on Ray Serve: a real local cluster, of which one replica is killed under load. Run by `make test-slow`."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from model_folder import edit_json, write_folder

pytest.importorskip("ray", reason="needs the extra ray")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="finds the processes of replicas in /proc"),
]

TOKEN = "a-token-of-tests"
WAIT = 300  # seconds, for a busy machine


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Where two replicas of a tiny model answer; at the end they are drained by a signal."""
    folder = tmp_path_factory.mktemp("ray")
    write_folder(folder / "tiny")
    port = free_port()
    small = "--width 16 --height 16 --max-running 4 --max-steps 150 --max-body-mb 1 --device cpu --drain 60".split()
    words = ["serve", "--ray", "--min-replicas", "2", "--port", str(port), "--token", TOKEN, *small]
    command = [sys.executable, "-m", "diffusion_accel", *words, "--model", str(folder / "tiny")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            while f"listening at http://127.0.0.1:{port}" not in (folder / "log").read_text():
                with pytest.raises(subprocess.TimeoutExpired):
                    process.wait(0.2)
            yield port
            process.send_signal(signal.SIGTERM)
            assert process.wait(WAIT) == 0, (folder / "log").read_text()
        finally:
            process.kill()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def ask(port: int, method: str, path: str, body: Any = None, token: str = TOKEN) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT)
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    try:
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def draw(port: int, seed: int, **more: Any) -> tuple[int, Any]:
    body = {"prompt": "red", "seed": seed, "size": "16x16", "num_inference_steps": 100, **more}
    status, content = ask(port, "POST", "/v1/images/generations", body)
    return status, json.loads(content)["data"][0]["b64_json"] if status == 200 else content


def replicas() -> list[int]:
    """The processes of replicas."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes()
        except OSError:  # it has ended
            continue
        if words.startswith(b"ray::ServeReplica:diffusion-accel:replica"):
            found.append(int(folder.name))
    return found


def test_a_replica_that_cannot_start_says_why_in_one_line(tmp_path: Path) -> None:
    edit_json(write_folder(tmp_path / "tiny") / "unet" / "config.json", cross_attention_dim=77)
    words = ["serve", "--ray", "--port", str(free_port()), "--device", "cpu", "--model", str(tmp_path / "tiny")]
    done = subprocess.run(
        [sys.executable, "-m", "diffusion_accel", *words], capture_output=True, text=True, timeout=600
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and len(lines) == 1
    assert lines[0].startswith("error: Ray could not start the server: ModelLoadError: ") and "[32, 77]" in lines[0]


def test_no_request_is_lost_with_a_replica(port: int) -> None:
    """While eight clients draw, one of the replicas is killed; every image is the one of its seed."""
    expected = {seed: draw(port, seed) for seed in range(3)}
    assert {status for status, _ in expected.values()} == {200}
    assert len({image for _, image in expected.values()}) == 3
    before = replicas()
    assert len(before) == 2
    answers: queue.Queue[tuple[int, tuple[int, Any]]] = queue.Queue()

    def client(number: int) -> None:
        for k in range(4):
            answers.put(((number + k) % 3, draw(port, (number + k) % 3)))

    clients = [threading.Thread(target=client, args=(number,)) for number in range(8)]
    for thread in clients:
        thread.start()
    found = [answers.get(timeout=WAIT)]  # one has its image, the others wait
    os.kill(before[0], signal.SIGKILL)
    found += [answers.get(timeout=WAIT) for _ in range(31)]
    for thread in clients:
        thread.join()
    assert all(answer == expected[seed] for seed, answer in found)
    assert before[0] not in replicas()


class Lost:
    """The handle of replicas whose answers end at some point, each with its own."""

    def __init__(self, *answers: list[bytes | None]) -> None:
        self.answers = list(answers)

    def options(self, **_: Any) -> Lost:
        return self

    async def remote(self, _scope: Any, _body: bytes) -> AsyncIterator[dict[str, Any]]:
        from ray.exceptions import RayActorError

        yield {"type": "http.response.start", "status": 200, "headers": []}
        for part in self.answers.pop(0):
            if part is None:
                raise RayActorError
            yield {"type": "http.response.body", "body": part, "more_body": True}
        yield {"type": "http.response.body", "body": b"", "more_body": False}


@pytest.mark.filterwarnings("ignore")  # of Ray, when it is imported
@pytest.mark.parametrize(
    ("answers", "status", "body"),
    [
        ([[None], [b"image"]], 200, b"image"),
        ([[b": waiting", None], [b"event"]], 200, b": waitingevent"),
        ([[b"event", None]], 200, b'eventevent: error\ndata: {"error":'),
        ([[None], [None]], 503, b'{"error":{"message":"the replica that drew this was lost; ask again"'),
    ],
)
def test_asking_again(answers: list[list[bytes | None]], status: int, body: bytes) -> None:
    """Once, and not when the client has seen something that would come again."""
    from diffusion_accel.serving.http.settings import ServerSettings
    from diffusion_accel.serving.ray_app import Ingress

    handle, sent = Lost(*answers), []
    ingress = Ingress(handle, ServerSettings(model="tiny"))

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"{}", "more_body": False}

    async def ask() -> None:
        scope = {"type": "http", "method": "POST", "path": "/v1/images/generations", "headers": []}
        await (await ingress(None))(scope, receive, send)  # type: ignore[arg-type]

    asyncio.run(ask())
    assert [m["status"] for m in sent if m["type"] == "http.response.start"] == [status]
    assert b"".join(m["body"] for m in sent[1:]).startswith(body) and not sent[-1].get("more_body", False)
    assert not handle.answers


def test_streams(port: int) -> None:
    body = {"prompt": "red", "seed": 1, "size": "16x16", "num_inference_steps": 4, "stream": True, "partial_images": 2}
    status, content = ask(port, "POST", "/v1/images/generations", body)
    names = [line.removeprefix("event: ") for line in content.decode().splitlines() if line.startswith("event: ")]
    assert status == 200 and names == [*["image_generation.partial_image"] * 2, "image_generation.completed"]


def test_what_is_refused_before_a_replica_is_asked(port: int) -> None:
    for method, path in (("POST", "/jobs"), ("GET", "/jobs/job-1"), ("GET", "/metrics"), ("POST", "/v1/loras/load")):
        status, content = ask(port, method, path, {} if method == "POST" else None)
        error = json.loads(content)["error"]
        assert (status, error["code"]) == (501, "one_replica") and "replica" in error["message"]
    assert ask(port, "GET", "/v1/models", token="wrong-token")[0] == 401
    assert ask(port, "POST", "/v1/images/generations", {"prompt": "x" * 2**20})[0] == 413
    assert ask(port, "GET", "/v1/models")[0] == ask(port, "GET", "/health")[0] == 200
    assert ask(port, "GET", "/v1/loras")[0] == 200
