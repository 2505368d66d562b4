"""Servers of several kinds behind one HTTP layer, and clients of them: see measure_serving.py. As a program it is one
of these servers: it prints its address, and ends with its standard input."""

from __future__ import annotations

import argparse
import contextlib
import functools
import http.client
import io
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from measuring import MOST, head, line, quiet
from rivals import Rival, workload
from safetensors.torch import save_file

from diffusion_accel import Compiled, accelerate
from diffusion_accel.generation.request import Request
from diffusion_accel.images import open_image
from diffusion_accel.measure.fidelity import psnr
from diffusion_accel.pipelines.schedulers import set_scheduler
from diffusion_accel.serving.engine import Engine

DRAW = "/v1/images/generations"
PATIENCE = 300.0  # seconds after which a client gives up
# Behind the name of a way: requests ask for a tuned plan; the model is compiled, in float32 or bfloat16.
PLAN, COMPILED, BFLOAT16 = "+plan", "+compiled", "+bf16"
COMPARED = 4  # images of each way


# ---------------------------------------------------------------------- the servers
@dataclass
class Server:
    """One that runs.

    Attributes:
        port: at 127.0.0.1.
        pid: of its process.
    """

    port: int
    pid: int

    @property
    def memory(self) -> float:
        """MiB that are resident."""
        return psutil.Process(self.pid).memory_info().rss / 2**20


@contextlib.contextmanager
def running(way: str, options: argparse.Namespace, **more: Any) -> Iterator[Server]:
    """A server process, as long as it is needed.

    Args:
        way: "lock", "static" or "engine", with what may stand behind.
        options: of the program.
        more: options of this one.
    """
    given = {"model": options.model, "scheduler": options.scheduler, "most_rows": options.most_rows} | more
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in given.items() if value not in ("", None)]
    precision = "bfloat16" if BFLOAT16 in way else "float32" if COMPILED in way else ""
    flags += [f"--compiled={precision}"] if precision else []
    command = [sys.executable, __file__, way.partition("+")[0], *flags]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    try:
        address = process.stdout.readline()
        if not address:
            raise SystemExit(f"the server {way} did not start")
        yield Server(int(address.rpartition(":")[2]), process.pid)
    finally:
        process.stdin.close()
        process.stdout.close()
        process.wait(60)


def serve() -> None:
    """Be a server."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("way", choices=["lock", "static", "engine"])
    parser.add_argument("--model", default="sticker")
    parser.add_argument("--scheduler", default="")
    parser.add_argument("--compiled", default="", help="the denoiser and the VAE, by OpenVINO in this precision")
    parser.add_argument("--most-rows", type=int, default=32)
    parser.add_argument("--running", type=int, default=32)
    parser.add_argument("--queue", type=int, default=10_000)
    parser.add_argument("--loras", type=int, default=0, help="of random numbers, that requests may name")
    parser.add_argument("--warm-up", type=int, default=0, help="steps of the request that the engine is warmed up with")
    options = parser.parse_args()
    threading.Thread(target=_end_with_input, daemon=True).start()

    from diffusion_accel.serving.http.run import bound, serve
    from diffusion_accel.serving.http.settings import ServerSettings

    pipe = accelerate(quiet(options.model), *([Compiled(precision=options.compiled)] if options.compiled else []))
    if options.scheduler:
        set_scheduler(pipe, options.scheduler)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.loras):
            _write_lora(Path(folder, f"lora{number}.safetensors"), pipe.unet, number)
        one: Any
        if options.way == "engine":
            loras = folder if options.loras else None
            limits = {"running": options.running, "queue": options.queue, "most_rows": options.most_rows}
            one = Engine(pipe, loras=loras, **limits)
            if options.warm_up:
                one.warm_up(workload("alike", 1, options.warm_up))
        else:
            most = max(1, options.most_rows // 2) if options.way == "static" else 1  # guidance makes two rows
            one = Rival(pipe, most, options.queue)
        model = ServerSettings(model=options.model, embedded=options.model == "sticker", page=False)
        serve(one, model, bound("127.0.0.1", 0), drain_seconds=1, ready=lambda address: print(address, flush=True))


def _end_with_input() -> None:
    sys.stdin.read()
    os._exit(0)


def _write_lora(file: Path, unet: torch.nn.Module, seed: int) -> None:
    name, layer = next((name, layer) for name, layer in unet.named_modules() if name.endswith("attn1.to_q"))
    rows, columns = layer.weight.shape
    values = torch.Generator().manual_seed(seed)
    halves = {"A": torch.randn(4, columns, generator=values), "B": torch.randn(rows, 4, generator=values)}
    save_file({f"unet.{name}.lora_{half}.weight": value for half, value in halves.items()}, file)


# ---------------------------------------------------------------------- the clients
class Client:
    """One connection, which is opened again when it was closed."""

    def __init__(self, server: Server) -> None:
        self._made = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)

    def ask(self, body: dict[str, Any], path: str = DRAW, **headers: str) -> tuple[int, bytes]:
        """Status and content of the answer to a request."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.send("POST", path, json.dumps(body).encode(), {"Content-Type": "application/json"} | named)

    def send(self, method: str, path: str, body: bytes | None, headers: dict[str, str]) -> tuple[int, bytes]:
        """The same of any request."""
        try:
            self._made.request(method, path, body, headers)
            answer = self._made.getresponse()
            return answer.status, answer.read()
        except (OSError, http.client.HTTPException):
            self._made.close()
            raise

    def close(self) -> None:
        """Go away."""
        self._made.close()


def body_of(request: Request, plan: dict[str, Any]) -> dict[str, Any]:
    """A request as a client sends it."""
    return {
        "prompt": request.prompt,
        "seed": request.seed,
        "num_inference_steps": request.steps,
        "guidance_scale": request.guidance_scale,
        "size": f"{request.width}x{request.height}",
        **plan,
    }


@dataclass
class Found:
    """What clients saw.

    Attributes:
        seconds: from the first request to the last answer.
        latencies: seconds of each request, from asking (or arriving) to having.
        images: of the first requests, as PNG.
        failed: answers that were no image, and requests without an answer.
    """

    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    images: dict[int, bytes] = field(default_factory=dict)
    failed: int = 0

    def row(self) -> dict[str, Any]:
        """As numbers."""
        shares = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
        there = self.latencies or [math.nan]
        return {
            "requests": len(self.latencies),
            "failed": self.failed,
            "images_a_second": len(self.latencies) / self.seconds,
            **{name: float(np.quantile(there, share)) for name, share in shares.items()},
        }


def asked(server: Server, bodies: Sequence[dict[str, Any]], clients: int, arrivals: Sequence[float] | None) -> Found:
    """Send requests and wait for all answers.

    Args:
        server: which is asked.
        bodies: of the requests.
        clients: how many of them are in flight: each client asks for one after the other.
        arrivals: seconds after which each request arrives, whatever became of those before; then there are as many
            clients as requests.
    """
    found, lock, began = Found(), threading.Lock(), time.perf_counter()
    left: Iterator[int] = itertools.count()

    def one() -> None:
        client = Client(server)
        while True:
            with lock:
                number = next(left)
            if number >= len(bodies):
                return client.close()
            start = time.perf_counter()
            if arrivals is not None:
                start = began + arrivals[number]
                time.sleep(max(0.0, start - time.perf_counter()))
            try:
                status, content = client.ask(bodies[number], Accept="image/png")
            except (OSError, http.client.HTTPException):
                status, content = 0, b""
            with lock:
                if status != 200:
                    found.failed += 1
                    continue
                found.latencies.append(time.perf_counter() - start)
                if number < COMPARED:
                    found.images[number] = content

    threads = len(bodies) if arrivals is not None else clients
    with ThreadPoolExecutor(threads) as pool:
        for ended in [pool.submit(one) for _ in range(threads)]:
            ended.result()
    found.seconds = time.perf_counter() - began
    return found


def worst(wanted: dict[int, bytes], images: dict[int, bytes]) -> float:
    """The least PSNR of images, in dB."""

    def opened(content: bytes) -> torch.Tensor:
        return torch.from_numpy(np.asarray(open_image(io.BytesIO(content))) / 255.0).permute(2, 0, 1)

    pairs = [(opened(wanted[number]), opened(images[number])) for number in wanted if number in images]
    if not pairs:
        return math.nan
    return min(float(psnr(a[None].float(), b[None].float()).clamp(max=MOST)) for a, b in pairs)


# ---------------------------------------------------------------------- the measurement
def through_http(options: argparse.Namespace) -> list[dict[str, Any]]:
    """All ways in turn: so many clients, then requests that arrive by chance at shares of the most that the first way
    has answered, the same for all. Cells for which no time is left are left out, and said."""
    table, most = _Table(time.monotonic() + 60 * options.minutes), 0.0
    count = max(options.arrivals, options.count, 2 * max(options.clients))
    requests = workload(options.workload, count, options.steps)
    with contextlib.ExitStack() as stack:
        ways = []
        for way in options.ways:
            plan = {} if PLAN not in way else {"reuse": options.plan} if options.plan else {"quality": "medium"}
            bodies = [body_of(request, plan) for request in requests]
            server = stack.enter_context(running(way, options, warm_up=options.steps * options.warm_up))
            table.compare(way, asked(server, bodies[:COMPARED], COMPARED, None))  # what first calls make
            ways.append((way, server, bodies))
        for clients in options.clients:
            for way, server, bodies in ways:
                asked(server, bodies[:clients], clients, None)  # what the first request of a thread makes
                some = bodies[: max(options.count, math.ceil(1.5 * clients))]
                speed = table.cell(way, str(clients), functools.partial(asked, server, some, clients, None))
                most = max(most, speed) if way == options.ways[0] else most
        for load in options.load if most else []:
            gaps = np.random.default_rng(0).exponential(1 / (load * most), options.arrivals)
            for way, server, bodies in ways:
                make = functools.partial(asked, server, bodies[: len(gaps)], 0, np.cumsum(gaps).tolist())
                table.cell(way, f"{load:g}: {load * most:.2f} a second", make)
    return table.rows


class _Table:
    """The rows, which are printed when they are measured.

    Args:
        end: by the monotonic clock, after which nothing is measured.
    """

    def __init__(self, end: float) -> None:
        self.rows: list[dict[str, Any]] = []
        self._end, self._wanted, self._near = end, dict[int, bytes](), dict[str, float]()
        head(
            "way",
            "in flight, or load",
            "requests",
            "images a second",
            "p50 s",
            "p95 s",
            "p99 s",
            "failed",
            "worst PSNR dB",
        )

    def compare(self, way: str, found: Found) -> None:
        """Compare the images of a way with those of the first one."""
        self._wanted = self._wanted or found.images
        self._near[way] = worst(self._wanted, found.images)

    def cell(self, way: str, what: str, make: Callable[[], Found]) -> float:
        """Measure: images a second; 0 where no time was left."""
        if time.monotonic() > self._end:
            line(way, what, "no time left", *[""] * 6)
            return 0.0
        row = {"way": way, "cell": what, **make().row(), "psnr": self._near[way]}
        self.rows.append(row)
        numbers = [f"{row[name]:.2f}" for name in ("images_a_second", "p50", "p95", "p99")]
        line(way, what, row["requests"], *numbers, row["failed"], f"{self._near[way]:.1f}")
        return float(row["images_a_second"])


if __name__ == "__main__":
    serve()
