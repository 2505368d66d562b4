"""Runs the functions of `cases.py` on real gloo processes: one group of them serves many cases, in worlds of all sizes.

The processes are forks of a server that has imported everything once.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Mapping
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import forks

Plan = Mapping[int, list[str]]


def start(folder: Path, ranks: int, plan: Plan, timeout: float = 60, **settings: str) -> list[BaseProcess]:
    """Start `ranks` processes; a world of the first n of them runs the cases of `plan[n]`.

    Args:
        settings: environment variables of the cases.
    """
    return [forks.start(work, rank, folder, plan, timeout, settings) for rank in range(ranks)]


def run(folder: Path, ranks: int, plan: Plan) -> None:
    """Run all cases, and wait for the end."""
    processes = start(folder, ranks, plan)
    try:
        for process in processes:
            process.join(timeout=600)
    finally:
        for process in processes:
            process.kill()


def read(folder: Path, plan: Plan) -> dict[tuple[int, str], list[str]]:
    """What each case ended with on each rank of its world: an empty text, or a traceback."""
    found: dict[tuple[int, str], list[str]] = {}
    for size, names in plan.items():
        for name in names:
            texts = []
            for rank in range(size):
                file = folder / f"{rank}.jsonl"
                lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
                ends = [line["error"] for line in lines if (line["size"], line["case"]) == (size, name)]
                texts.append(ends[0] if ends else (folder / f"{rank}.log").read_text()[-2000:] or "did not run")
            found[size, name] = texts
    return found


def work(rank: int, folder: Path, plan: Plan, timeout: float, settings: dict[str, str]) -> None:
    """One process: all cases of all worlds that it belongs to."""
    log = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    os.environ.update(settings)
    import cases
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    for size, names in plan.items():
        if rank >= size:
            continue
        store = dist.FileStore(str(folder / f"store-{size}"), size)
        limit = timedelta(seconds=timeout)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)
        for name in names:
            error, began = "", time.perf_counter()
            try:
                cases.find(name)(rank, size)
            except BaseException:
                error = traceback.format_exc()
            with (folder / f"{rank}.jsonl").open("a") as file:
                line = {"size": size, "case": name, "error": error, "seconds": time.perf_counter() - began}
                file.write(json.dumps(line) + "\n")
        dist.destroy_process_group()


def _hesitating(rank: int, store: Any, name: str, size: int, timeout: timedelta) -> None:
    """In the place of torch's own barrier at the end of making a group."""
    if store.add(name, 1) == size:
        store.set(f"{name}:last", "1")
    if rank:
        time.sleep(0.5)
    store.wait([f"{name}:last"], timeout)


def vanish(port: int) -> None:
    """What is left of another job: it ends once a process of rank 1 has come."""
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", port, None, True, timedelta(seconds=30), wait_for_workers=False)
    while not store.check(["diffusion-accel/1/size 1"]):
        time.sleep(0.01)
    os._exit(0)


def join(rank: int, file: Path, timeout: float, settings: dict[str, str]) -> None:
    """One process that joins its job as `settings` say, and writes how that ended.

    With HESITATE all but the first are slow to see that everybody has come.
    """
    log = os.open(file.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    os.environ.update({"RANK": str(rank), "MASTER_ADDR": "127.0.0.1", **settings})
    import torch

    from diffusion_accel.errors import AccelerationError
    from diffusion_accel.parallel.group import join

    if "HESITATE" in settings:
        os.environ["TORCH_DIST_INIT_BARRIER"] = "1"
        torch.distributed.distributed_c10d._store_based_barrier = _hesitating
    try:
        text = f"joined {join(torch.device('cpu'), timeout).size}"
    except AccelerationError as error:
        text = str(error)
    file.write_text(text)
    os._exit(0)  # a thread may still wait in C
