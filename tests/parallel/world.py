"""Runs functions on real gloo processes: one group of processes serves many cases, in teams of several sizes.

python world.py RANK FOLDER SIZE CASES [SIZE CASES ...]     one process; CASES are comma-separated names in cases.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

HERE = Path(__file__).parent


def start(folder: Path, ranks: int, plan: dict[int, list[str]], timeout: float = 60) -> list[subprocess.Popen[bytes]]:
    """Start `ranks` processes; a team of the first n of them runs the cases of `plan[n]`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PATCH_TIMEOUT": str(timeout)}
    words = [word for size, names in plan.items() for word in (str(size), ",".join(names))]
    return [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder), *words],
            env=environment,
            stdout=(folder / f"{rank}.log").open("wb"),
            stderr=subprocess.STDOUT,
        )
        for rank in range(ranks)
    ]


def run(folder: Path, ranks: int, plan: dict[int, list[str]]) -> None:
    """Run all cases, and wait for the end."""
    processes = start(folder, ranks, plan)
    try:
        for process in processes:
            process.wait(timeout=600)
    finally:
        for process in processes:
            process.kill()


def read(folder: Path, plan: dict[int, list[str]]) -> dict[tuple[int, str], list[str]]:
    """What each case ended with on each rank of its team: an empty text, or a traceback."""
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


def main() -> None:
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    import cases
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    limit = timedelta(seconds=float(os.environ["PATCH_TIMEOUT"]))
    for size, names in zip(map(int, sys.argv[3::2]), sys.argv[4::2], strict=True):
        if rank >= size:
            continue
        store = dist.FileStore(str(folder / f"store-{size}"), size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)
        for name in names.split(","):
            error, began = "", time.perf_counter()
            try:
                getattr(cases, name)(rank, size)
            except BaseException:
                error = traceback.format_exc()
            with (folder / f"{rank}.jsonl").open("a") as file:
                line = {"size": size, "case": name, "error": error, "seconds": time.perf_counter() - began}
                file.write(json.dumps(line) + "\n")
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
