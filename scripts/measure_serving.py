#!/usr/bin/env python3
"""Images a second of the serving engine against one pipeline behind a lock and against static batches.

    OMP_NUM_THREADS=1 python scripts/measure_serving.py
    python scripts/measure_serving.py --workload mixed --plan tuned:dpm:balanced --json runs/serving.json
    python scripts/measure_serving.py --scheduler ddim --steps 50 --engine-plan tuned:ddim-balanced --clients 16
    python scripts/measure_serving.py --workload mixed --load 0.5 0.8 0.95

So many clients as are in flight each ask for one image after the other. The three ways draw the same requests, in turn,
round by round; a row's ratio is the median over the rounds of the images a second of a way over those of the lock in
the same round. Latencies are from asking to having, over all rounds.

- lock: a pipeline that draws one request at a time
- static: requests that wait and are alike (steps, guidance, size) are one call of the pipeline
- engine: `diffusion_accel.serving.engine.Engine`

With --load requests arrive by chance instead (open loop, exponential gaps, the same for all ways), at such shares of
what the lock draws when it has no pause; latencies are from arriving to having.

The images of all ways are compared with those of the lock. Run it on an idle machine: threads compete for its cores.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import STICKER, head, line, numbers, quiet, write

from diffusion_accel import Reuse, accelerate
from diffusion_accel.generation.drawing import prepare
from diffusion_accel.generation.request import Request
from diffusion_accel.pipelines.schedulers import set_scheduler
from diffusion_accel.serving.engine import Engine

PROMPTS = ("red apple, 3d style", "panda, twemoji style", "rocket, flat style", "pizza, noto style")
NUMPY = {"output_type": "np"}
Way = Callable[[Request], Any]  # draws a request: its images as an array


def workload(kind: str, count: int, steps: int) -> list[Request]:
    """The requests: all alike but for prompt and seed, or with steps, guidance and sizes of their own."""
    made = []
    for i in range(count):
        given: dict[str, Any] = {"prompt": PROMPTS[i % 4], "seed": i, "steps": steps, **STICKER}
        if kind == "mixed":
            given["steps"] = (steps // 2, steps, 2 * steps)[i % 3]
            given["guidance_scale"] = (2.0, 3.0, 5.0)[i // 3 % 3]
        if kind == "sizes":
            given["width"] = given["height"] = (96, 64)[i % 2]
        made.append(Request(**given))
    return made


class Lock:
    """One request at a time."""

    def __init__(self, pipe: Any) -> None:
        self.pipe, self.lock = pipe, threading.Lock()

    def __call__(self, request: Request) -> Any:
        """Draw a request."""
        with self.lock:
            return prepare(self.pipe, request).images(**NUMPY)


class Static:
    """Requests that are alike and wait together are one call."""

    def __init__(self, pipe: Any, most: int) -> None:
        self.pipe, self.most = pipe, most
        self.waiting: list[tuple[Request, Future[Any]]] = []
        self.changed, self.busy = threading.Condition(), False

    def __call__(self, request: Request) -> Any:
        """Draw a request, by itself or with others that wait."""
        future: Future[Any] = Future()
        with self.changed:
            self.waiting.append((request, future))
        while not future.done():
            with self.changed:
                self.changed.wait_for(lambda: future.done() or not self.busy)
                if future.done():
                    break
                self.busy = True
                batch = [one for one in self.waiting if alike(one[0]) == alike(self.waiting[0][0])][: self.most]
                for one in batch:
                    self.waiting.remove(one)
            try:
                self.draw(batch)
            except BaseException as error:
                for _, other in batch:
                    other.set_exception(error)
            finally:
                with self.changed:
                    self.busy = False
                    self.changed.notify_all()
        return future.result()

    def draw(self, batch: Sequence[tuple[Request, Future[Any]]]) -> None:
        """Draw requests as one batch."""
        first = batch[0][0]
        images = self.pipe(
            [request.prompt for request, _ in batch],
            num_inference_steps=first.steps,
            guidance_scale=first.guidance_scale,
            height=first.height,
            width=first.width,
            generator=[torch.Generator().manual_seed(request.seed) for request, _ in batch],
            **NUMPY,
        ).images
        for (_, future), image in zip(batch, images, strict=True):
            future.set_result(image[None])


def alike(request: Request) -> Any:
    """What the requests of one call have in common."""
    return (request.steps, request.guidance_scale, request.width, request.height)


def drawn(way: Way, requests: Sequence[Request], clients: int) -> tuple[float, list[float], list[Any]]:
    """Seconds of all requests by so many clients, the latency of each, and its images."""

    def one(request: Request) -> tuple[float, Any]:
        began = time.perf_counter()
        images = way(request)
        return time.perf_counter() - began, images

    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        found = list(pool.map(one, requests))
    return time.perf_counter() - began, [seconds for seconds, _ in found], [images for _, images in found]


def arriving(way: Way, requests: Sequence[Request], gaps: Sequence[float]) -> list[float]:
    """The latency of each request, the first of which arrives after the first gap, in seconds."""
    times = np.cumsum(gaps)
    began = time.perf_counter()

    def one(request: Request, arrival: float) -> float:
        time.sleep(max(0.0, began + arrival - time.perf_counter()))
        way(request)
        return time.perf_counter() - began - arrival

    with ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(one, requests, times))


def open_loop(options: argparse.Namespace) -> list[dict[str, Any]]:
    """All ways at every load: a row of latencies for each."""
    requests = workload(options.workload, options.count, options.steps)
    pipes = two_pipes(options)
    with Engine(pipes[1], running=32, queue=len(requests), most_rows=options.most_rows) as engine:
        engine.warm_up([requests[0]])
        ways: dict[str, Way] = {"lock": Lock(pipes[0]), "static": Static(pipes[0], 16)}
        ways["engine"] = lambda request: engine.submit(request, arguments=NUMPY).result().images
        for way in ways.values():
            drawn(way, requests[:4], 4)
        capacity = len(requests) / drawn(ways["lock"], requests, 1)[0]
        rows = []
        for load in options.load:
            found: dict[str, list[float]] = {name: [] for name in ways}
            for turn in range(options.rounds):
                random = np.random.default_rng(turn)
                gaps = random.exponential(1 / (load * capacity), len(requests))
                order = random.permutation(len(requests))
                for name, way in ways.items():
                    found[name] += arriving(way, [requests[i] for i in order], gaps.tolist())
            for name, latencies in found.items():
                quantiles = [float(np.quantile(latencies, share)) for share in (0.5, 0.95, 0.99)]
                rows.append({"load": load, "way": name, "a_second": load * capacity, "latency": quantiles})
                line(load, name, f"{load * capacity:.2f}", *(f"{seconds:.2f}" for seconds in quantiles))
    return rows


def two_pipes(options: argparse.Namespace) -> list[Any]:
    """A pipeline for the lock and static batches, and one for the engine."""
    pipes = []
    for plan in (options.plan, options.engine_plan or options.plan):
        pipes.append(accelerate(quiet(options.model), *([Reuse(plan=plan)] if plan else [])))
        if options.scheduler:
            set_scheduler(pipes[-1], options.scheduler)
    return pipes


def measured(options: argparse.Namespace, clients: int) -> dict[str, dict[str, Any]]:
    """All ways with so many clients: a row of numbers for each."""
    requests = workload(options.workload, max(options.count, 2 * clients), options.steps)
    pipes = two_pipes(options)
    with Engine(pipes[1], running=clients, queue=len(requests), most_rows=options.most_rows) as engine:
        if options.warm_up:
            engine.warm_up([requests[0]])
        ways: dict[str, Way] = {"lock": Lock(pipes[0]), "static": Static(pipes[0], clients)}
        ways["engine"] = lambda request: engine.submit(request, arguments=NUMPY).result().images
        for way in ways.values():
            drawn(way, requests[:clients], clients)  # what first calls make
        rounds: list[dict[str, Any]] = []
        for _ in range(options.rounds):
            rounds.append({name: drawn(way, requests, clients) for name, way in ways.items()})
        rows = {
            part: sum(r * n for r, n in b.items()) / sum(b.values()) for part, b in engine.stats()["batches"].items()
        }
    made = {}
    wanted = as_tensor(rounds[0]["lock"][2])
    for name in ways:
        latencies = [seconds for one in rounds for seconds in one[name][1]]
        made[name] = {
            "images_a_second": len(requests) / statistics.median(one[name][0] for one in rounds),
            "ratio": statistics.median(one["lock"][0] / one[name][0] for one in rounds),
            "latency_median": statistics.median(latencies),
            "latency_p95": float(np.quantile(latencies, 0.95)),
            "psnr": min(numbers(a, b)["worst"] for a, b in zip(wanted, as_tensor(rounds[0][name][2]), strict=True)),
            "rows": rows.get("unet") if name == "engine" else None,
        }
    return made


def as_tensor(images: Sequence[Any]) -> list[torch.Tensor]:
    """Images as (1, 3, H, W)."""
    return [torch.from_numpy(image).permute(0, 3, 1, 2) for image in images]


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sticker")
    parser.add_argument("--scheduler", default="")
    parser.add_argument("--plan", default="", help="of Reuse, for all ways")
    parser.add_argument("--engine-plan", default="", help="of Reuse, for the engine alone")
    parser.add_argument("--load", type=float, nargs="*", default=[], help="shares of what the lock can draw, up to 1")
    parser.add_argument("--workload", choices=["alike", "mixed", "sizes"], default="alike")
    parser.add_argument("--clients", type=int, nargs="*", default=[1, 4, 8, 16])
    parser.add_argument("--count", type=int, default=16, help="requests of a round, at least two a client")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--most-rows", type=int, default=32)
    parser.add_argument("--warm-up", action="store_true", help="measure first how many rows are worth it")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    settings = {name: value for name, value in vars(options).items() if name != "json"}
    if options.load:
        head("load", "way", "requests a second", "latency s, median", "p95", "p99")
        write(options.json, settings, open_loop(options))
        return
    rows = []
    head(
        "in flight",
        "way",
        "images a second",
        "times the lock",
        "latency s, median / p95",
        "worst PSNR dB",
        "rows a batch",
    )
    for clients in options.clients:
        for name, row in measured(options, clients).items():
            rows.append({"clients": clients, "way": name, **row})
            latency = f"{row['latency_median']:.2f} / {row['latency_p95']:.2f}"
            mean = "" if row["rows"] is None else f"{row['rows']:.1f}"
            cells = (f"{row['images_a_second']:.2f}", f"{row['ratio']:.2f}", latency, f"{row['psnr']:.1f}", mean)
            line(clients, name, *cells)
    write(options.json, settings, rows)


if __name__ == "__main__":
    main()
