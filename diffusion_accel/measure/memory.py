"""The highest memory use of a piece of work, where the system tells it."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


def reset_peak(device: str) -> None:
    """Begin a new measurement of the highest memory use."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_mib(device: str) -> float | None:
    """The highest memory use in MiB since `reset_peak`: the device's, or the process's resident memory.

    Where the system does not begin anew (macOS) it is that since the process began; None where nobody knows (Windows).
    """
    if device.startswith("cuda"):
        return float(torch.cuda.max_memory_allocated(device) / 2**20)
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024
    highest = process_peak()
    return None if highest is None else highest / 2**20


def process_peak() -> int | None:
    """The most memory this process has held, in bytes; None where nobody knows (Windows)."""
    if resource is None:
        return None
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest if sys.platform == "darwin" else highest * 1024  # bytes there, KiB elsewhere
