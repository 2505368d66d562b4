"""Measures the link between two processes of this machine: bandwidth and latency of gloo's messages."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import torch

from diffusion_accel import interrupts
from diffusion_accel.measure.timing import seconds_of
from diffusion_accel.parallel.communicator import Communicator
from diffusion_accel.parallel.group import join
from diffusion_accel.parallel.launch import start

from .simulate import Link

_CHILD = (  # hears of an interrupt before it imports torch
    "import sys; from diffusion_accel.parallel import launch; launch.follow(); "
    "from diffusion_accel.parallel.planner.measure_link import exchange; exchange(sys.argv[1])"
)
_SMALL, _LARGE, _TIMES = 4, 2**23, 15  # bytes, bytes, rounds


def measure_link() -> Link:
    """Start two processes that send to each other at the same time, and wait for them (a few seconds)."""
    with interrupts.temporary_folder() as folder:
        file = folder / "link.json"
        start(2, ["-c", _CHILD, str(file)])
        small, large = json.loads(file.read_text())
    # the processors of one machine move its messages themselves, so that nothing is hidden behind computation
    return Link((_LARGE - _SMALL) / max(large - small, 1e-9), small, overlaps=False)


def _exchange(size: int, communicator: Communicator, peer: int) -> float:
    tensor = torch.zeros(size, dtype=torch.uint8)

    def swap() -> None:
        communicator.swap(("link", ""), {peer: tensor}, {peer: (size,)}, tensor)

    return statistics.median(seconds_of(swap, "cpu") for _ in range(_TIMES))


def exchange(file: str) -> None:
    """One of the two processes; the first writes `file`."""
    world = join(torch.device("cpu"), 60.0)
    communicator = Communicator(world.group, 1)
    found = [_exchange(size, communicator, 1 - world.rank) for size in (_SMALL, _LARGE)]
    if world.rank == 0:
        Path(file).write_text(json.dumps(found))
