"""What a server does that is used badly, or for long: its memory over many requests, a full queue, bodies that are too
large, clients that are slow: see measure_serving.py."""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import select
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import psutil
from measuring import head, line
from PIL import Image
from serving_http import DRAW, PATIENCE, Client, Server, running

PARTS = ("memory", "settings", "queue", "body", "slow")
_CLIENTS = 4
_LORAS = 8  # more than an engine keeps
_GIB = 2**30
_SLOW = 20  # clients of each kind
_READ = 150  # answers that a slow reader asks for: more bytes than the system takes for it
_REFUSED = 200
_PATIENT = 100.0  # seconds in which slow clients should be given up


def faults(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The parts that are asked for, each with a table."""
    rows = []
    for part in options.parts:
        print(f"\n{part}\n", flush=True)
        found = globals()[f"_{part}"](options)
        rows += [{"part": part, **row} for row in found]
    return rows


# ---------------------------------------------------------------------- memory
def _memory(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Resident memory over requests of every kind with the same settings."""
    kinds = {
        "image": _image,
        "json": _json,
        "stream": _stream,
        "job": _job,
        "edit": _edit,
        "no": _refused,
        "gone": _gone,
    }
    return _over(options, options.requests, kinds)


def _settings(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The same over requests with changing sizes, schedulers, plans and LoRAs."""
    return _over(options, options.settings, {"image": _image}, list(_changing(options)))


def _changing(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Settings of a request, of which no two need be equal."""
    random = np.random.default_rng(0)
    names = ("ddim", "dpm++", "euler", "euler-a", "heun", "unipc", "lms", "deis")
    for number in range(options.settings):
        loras = {f"lora{i}": float(random.uniform(0.1, 1)) for i in random.permutation(_LORAS)[: number % 3]}
        side = options.side
        yield {
            "size": f"{side + 8 * int(random.integers(4))}x{side + 8 * int(random.integers(4))}",
            "scheduler": names[int(random.integers(len(names)))],
            "num_inference_steps": int(random.integers(2, 7)),
            "guidance_scale": (1.0, 3.0)[number % 2],
            **({"reuse": ("hold:2", "deepcache:2", f"hold:{2 + number % 5}")[number % 3]} if number % 4 else {}),
            **({"lora": loras} if loras else {}),
        }


def _over(
    options: argparse.Namespace, count: int, kinds: dict[str, Any], changes: list[dict[str, Any]] | None = None
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    with running("engine", options, loras=_LORAS if changes else 0, running=_CLIENTS) as server:
        numbers, lock = itertools.count(), threading.Lock()
        began = time.monotonic()
        head("requests", "MiB resident", "seconds")

        def row(done: int) -> None:
            rows.append({"requests": done, "mib": server.memory, "seconds": time.monotonic() - began})
            line(done, f"{rows[-1]['mib']:.1f}", f"{rows[-1]['seconds']:.0f}")

        def one() -> None:
            client = Client(server)
            while (number := next(numbers)) < count and time.monotonic() < began + 60 * options.minutes:
                body = {"prompt": "red apple", "seed": number, "num_inference_steps": 1}
                body |= {"size": f"{options.side}x{options.side}"} if changes is None else {}
                body |= changes[number] if changes else {}
                list(kinds.values())[number % len(kinds)](client, server, body)
                if number % max(1, count // 10) == 0:
                    with lock:
                        row(number)
            client.close()

        with ThreadPoolExecutor(_CLIENTS) as pool:
            for ended in [pool.submit(one) for _ in range(_CLIENTS)]:
                ended.result()
        row(next(numbers) - _CLIENTS - 1)
    late = [row for row in rows if row["requests"] >= count // 4]
    slope = (
        float(np.polyfit([row["requests"] for row in late], [row["mib"] for row in late], 1)[0]) if late[1:] else 0.0
    )
    print(f"\nfrom request {count // 4} on: {1000 * slope:+.2f} MiB per 1,000 requests", flush=True)
    return [*rows, {"mib_per_1000": 1000 * slope}]


def _expect(status: int, answer: tuple[int, bytes]) -> bytes:
    if answer[0] != status:
        raise SystemExit(f"the server answered {answer[0]}: {answer[1][:300]!r}")
    return answer[1]


def _image(client: Client, _server: Server, body: dict[str, Any]) -> None:
    _expect(200, client.ask(body, Accept="image/png"))


def _json(client: Client, _server: Server, body: dict[str, Any]) -> None:
    _expect(200, client.ask(body))


def _stream(client: Client, _server: Server, body: dict[str, Any]) -> None:
    content = _expect(200, client.ask(body | {"stream": True, "num_inference_steps": 2, "partial_images": 1}))
    if b"image_generation.completed" not in content:
        raise SystemExit(f"a stream ended without its image: {content[:300]!r}")


def _job(client: Client, _server: Server, body: dict[str, Any]) -> None:
    path = json.loads(_expect(202, client.ask(body, "/jobs")))["poll_url"]
    while json.loads(client.send("GET", path, None, {})[1])["status"] in ("queued", "generating"):
        time.sleep(0.01)


def _edit(client: Client, _server: Server, body: dict[str, Any]) -> None:
    file = io.BytesIO()
    Image.new("RGB", tuple(map(int, body["size"].split("x"))), "red").save(file, "PNG")
    parts = [b'--x\r\nContent-Disposition: form-data; name="image"; filename="x.png"\r\n\r\n' + file.getvalue()]
    values = {key: value for key, value in body.items() if key != "size"} | {"strength": 1.0}
    parts += [f'--x\r\nContent-Disposition: form-data; name="{k}"\r\n\r\n{v}'.encode() for k, v in values.items()]
    headers = {"Content-Type": "multipart/form-data; boundary=x", "Accept": "image/png"}
    content = b"\r\n".join([*parts, b"--x--\r\n"])
    _expect(200, client.send("POST", "/v1/images/edits", content, headers))


def _refused(client: Client, _server: Server, body: dict[str, Any]) -> None:
    _expect(422, client.ask(body | {"number": body["seed"]}))


def _gone(_client: Client, server: Server, body: dict[str, Any]) -> None:
    with _opened(server) as connection:
        connection.sendall(_posted(body | {"num_inference_steps": 20}))
        time.sleep(0.05)


@contextlib.contextmanager
def _opened(server: Server, receives: int = 0) -> Iterator[socket.socket]:
    with socket.socket() as connection:
        if receives:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receives)
        connection.settimeout(PATIENCE)
        connection.connect(("127.0.0.1", server.port))
        yield connection


def _posted(body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    return _head(f"Content-Length: {len(content)}") + content


def _head(*lines: str) -> bytes:
    first = (f"POST {DRAW} HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json")
    return "\r\n".join([*first, *lines, "", ""]).encode()


# ---------------------------------------------------------------------- a full queue
def _queue(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The time to refuse a request while the engine computes and its queue is full."""
    side = f"{options.side}x{options.side}"
    with running("engine", options, running=2, queue=2) as server, contextlib.ExitStack() as stack:
        for seed in range(4):
            connection = stack.enter_context(_opened(server))
            connection.sendall(
                _posted({"prompt": "x", "seed": seed, "num_inference_steps": 150, "size": side, "n": 10})
            )
        client, times = Client(server), []
        end = time.monotonic() + 60
        while client.ask({"prompt": "x"})[0] != 429 and time.monotonic() < end:
            time.sleep(0.05)
        answered = 0
        for _ in range(_REFUSED):
            began = time.perf_counter()
            status, _ = client.ask({"prompt": "x", "num_inference_steps": 1, "size": side})
            if status != 429:
                break  # the queue has a place again
            times.append(1000 * (time.perf_counter() - began))
            answered += 1
        client.close()
    found = {"refused": answered, "p50_ms": float(np.median(times)), "max_ms": max(times)} if times else {"refused": 0}
    head("answers 429", "p50 ms", "max ms")
    line(found["refused"], f"{found.get('p50_ms', 0):.1f}", f"{found.get('max_ms', 0):.1f}")
    return [found]


# ---------------------------------------------------------------------- a body that is too large
def _body(options: argparse.Namespace) -> list[dict[str, Any]]:
    """How much of a body of 1 GiB the server takes before it refuses it, and when."""
    rows = []
    head("a body of 1 GiB", "status", "MiB sent before the answer", "ms to the answer", "MiB more resident")
    with running("engine", options) as server:
        before = server.memory
        for what in ("says its length", "in chunks"):
            chunked = what == "in chunks"
            part = b" " * 2**16
            with _opened(server) as connection:
                began, sent, status = time.perf_counter(), 0, 0
                connection.sendall(_head("Transfer-Encoding: chunked" if chunked else f"Content-Length: {_GIB}"))
                while sent < _GIB and not select.select([connection], [], [], 0)[0]:
                    try:
                        connection.sendall(b"10000\r\n" + part + b"\r\n" if chunked else part)
                    except OSError:
                        break
                    sent += len(part)
                seconds = time.perf_counter() - began
                with contextlib.suppress(OSError, IndexError, ValueError):
                    status = int(connection.recv(2**16).split()[1])
            found = {"what": what, "status": status, "mib": sent / 2**20, "ms": 1000 * seconds}
            rows.append(found | {"more_mib": server.memory - before})
            line(what, status or "closed", f"{found['mib']:.1f}", f"{found['ms']:.1f}", f"{rows[-1]['more_mib']:.1f}")
    return rows


# ---------------------------------------------------------------------- slow clients
def _slow(options: argparse.Namespace) -> list[dict[str, Any]]:
    """What others notice of clients that send, or take, too slowly; when those are given up."""
    body = {"prompt": "red apple", "seed": 1, "num_inference_steps": 1, "size": f"{options.side}x{options.side}"}
    rows = []
    with running("engine", options) as server, contextlib.ExitStack() as stack:

        def others() -> list[float]:
            client, times = Client(server), []
            for _ in range(20):
                began = time.perf_counter()
                _image(client, server, body)
                times.append(1000 * (time.perf_counter() - began))
            client.close()
            return times

        others()
        alone, before = others(), server.memory
        slow = {
            name: [stack.enter_context(_opened(server, 4096)) for _ in range(_SLOW)] for name in ("senders", "readers")
        }
        began = time.monotonic()
        for one in slow["senders"]:
            one.sendall(_head("Content-Length: 100") + b"{")
        for one in slow["readers"]:
            one.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" * _READ)
        beside, memory = others(), server.memory - before
        given_up = _ends(server, slow, began)
        after = others()
    head("others' requests", "p50 ms", "max ms")
    for what, times in (("before", alone), ("beside", beside), ("after", after)):
        rows.append({"what": what, "p50_ms": float(np.median(times)), "max_ms": max(times)})
        line(what, f"{rows[-1]['p50_ms']:.1f}", f"{rows[-1]['max_ms']:.1f}")
    print()
    head("slow clients", "given up", "after s, first to last")
    for what, ends in given_up.items():
        rows.append({"what": what, "clients": _SLOW, "given_up": len(ends), "after_s": ends})
        line(f"{_SLOW} {what}", len(ends), f"{min(ends):.0f} to {max(ends):.0f}" if ends else "")
    print(f"\nthey took {memory:.1f} MiB", flush=True)
    return [*rows, {"more_mib": memory}]


def _ends(server: Server, slow: dict[str, list[socket.socket]], began: float) -> dict[str, list[float]]:
    """Seconds after which the server had given up each of these connections; those that it keeps are left out.

    The server's side is asked: a client that reads nothing does not see that it was given up.
    """
    ports = {name: {one.getsockname()[1] for one in connections} for name, connections in slow.items()}
    ends: dict[str, list[float]] = {name: [] for name in slow}
    while any(ports.values()) and time.monotonic() < began + _PATIENT:
        there = {one.raddr.port for one in psutil.Process(server.pid).net_connections("tcp") if one.raddr}
        for name, left in ports.items():
            ends[name] += [time.monotonic() - began] * len(left - there)
            left &= there
        time.sleep(0.2)
    return ends
