#!/usr/bin/env python3
"""Images a second of the serving engine against one pipeline behind a lock and against static batches.

    OMP_NUM_THREADS=1 python scripts/measure_serving.py
    python scripts/measure_serving.py --workload mixed --plan tuned:dpm:balanced --json runs/serving.json
    python scripts/measure_serving.py --scheduler ddim --steps 50 --engine-plan tuned:ddim-balanced --clients 16
    python scripts/measure_serving.py --workload mixed --load 0.5 0.8 0.95
    python scripts/measure_serving.py http --warm-up --json runs/serving-http.json
    python scripts/measure_serving.py faults --json runs/serving-faults.json

So many clients as are in flight each ask for one image after the other. The three ways draw the same requests, in turn,
round by round; a row's ratio is the median over the rounds of the images a second of a way over those of the lock in
the same round. Latencies are from asking to having, over all rounds.

- lock: a pipeline that draws one request at a time
- static: requests that wait and are alike (steps, guidance, size) are one call of the pipeline
- engine: `diffusion_accel.serving.engine.Engine`

With --load requests arrive by chance instead (open loop, exponential gaps, the same for all ways), at such shares of
what the lock draws when it has no pause; latencies are from arriving to having.

The images of all ways are compared with those of the lock. Run it on an idle machine: threads compete for its cores.

`http` measures the same through HTTP: each way is a server process, with the very application that `diffusion-accel
serve` has, and clients in this process ask one after the other over 127.0.0.1 for PNG files. First --clients are in
flight, each with one request after the other; then --arrivals requests arrive by chance at shares (--load) of the most
images a second that the first way has answered, the same for all. Behind the name of a way, `+compiled` serves a
compiled model, `+bf16` one that computes in bfloat16, and `+plan` lets its requests ask for a tuned plan (--plan;
without it `"quality": "medium"`). It takes no more than --minutes and what is being measured then. Of so few requests
p99 is the slowest one.

`faults` measures what a server does that is used badly, or for long (--parts):

- memory: what is resident over so many requests (--requests) of every kind: images, JSON, streams, jobs, edits, refused
  ones, clients that go away
- settings: the same over requests (--settings) with changing sizes, schedulers, steps, plans and LoRAs
- queue: how long a request takes to be refused while the queue is full and the engine computes
- body: how much of a body of 1 GiB is taken before it is refused
- slow: what others notice of 20 clients that send nothing and 20 that read nothing, and when those are given up
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import head, line, numbers, quiet, write
from rivals import Rival, workload
from serving_faults import PARTS, faults
from serving_http import through_http

from diffusion_accel import Reuse, accelerate
from diffusion_accel.generation.request import Request
from diffusion_accel.pipelines.schedulers import set_scheduler
from diffusion_accel.serving.engine import Engine

NUMPY = {"output_type": "np"}
Way = Callable[[Request], Any]  # draws a request: its images as an array


def three_ways(pipe: Any, most: int, engine: Engine) -> dict[str, Way]:
    """How requests are drawn, by name."""
    drawing = {"lock": Rival(pipe), "static": Rival(pipe, most), "engine": engine}
    return {
        name: lambda request, one=one: one.submit(request, arguments=NUMPY).result().images
        for name, one in drawing.items()
    }


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
        ways = three_ways(pipes[0], 16, engine)
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
        ways = three_ways(pipes[0], clients, engine)
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
    parser.add_argument("mode", nargs="?", choices=["python", "http", "faults"], default="python")
    parser.add_argument("--model", default="sticker")
    parser.add_argument("--scheduler", default="")
    parser.add_argument("--plan", default="", help="of Reuse, for all ways; with http: of those with +plan")
    parser.add_argument("--engine-plan", default="", help="of Reuse, for the engine alone")
    parser.add_argument("--load", type=float, nargs="*", help="shares of what can be drawn, up to 1")
    parser.add_argument("--workload", choices=["alike", "mixed", "sizes"], default="alike")
    parser.add_argument("--clients", type=int, nargs="*")
    parser.add_argument(
        "--count", type=int, help="requests of a round, at least two a client; with http one and a half"
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--most-rows", type=int, default=32)
    parser.add_argument("--warm-up", action="store_true", help="measure first how many rows are worth it")
    parser.add_argument("--json", type=Path)
    through = parser.add_argument_group("http and faults")
    through.add_argument(
        "--ways", nargs="*", default=["lock", "static", "engine", "engine+compiled", "engine+compiled+plan"]
    )
    through.add_argument("--arrivals", type=int, default=16, help="requests of each load")
    through.add_argument("--minutes", type=float, default=20, help="after which nothing more is begun")
    through.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS)
    through.add_argument("--requests", type=int, default=2000)
    through.add_argument("--settings", type=int, default=300)
    through.add_argument("--side", type=int, default=32, help="pixels of the images of faults")
    options = parser.parse_args()
    settings = {name: value for name, value in vars(options).items() if name != "json"}
    http = options.mode == "http"
    options.count = options.count or (8 if http else 16)
    options.clients = options.clients or ([1, 4, 8, 16, 32] if http else [1, 4, 8, 16])
    if options.mode == "faults":
        return write(options.json, settings, faults(options))
    if http:
        options.load = [0.5, 0.8, 0.95] if options.load is None else options.load
        return write(options.json, settings, through_http(options))
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
