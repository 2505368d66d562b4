"""What a benchmark found: rows, how they were measured, and the ways to write them down."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from .runner import Job


@dataclass
class Row:
    """What one entry gained and lost.

    Fidelity is [median, worst decile], and `psnr_each` that of every image; `failed` says why there is none.
    `family` is the tuned family that a plan is of.
    """

    name: str
    kind: str
    time_ratio: float | None = None
    flop_ratio: float | None = None
    peak_mib: float | None = None
    psnr: list[float] | None = None
    psnr_each: list[float] | None = None
    ssim: list[float] | None = None
    ms_ssim: list[float] | None = None
    psnr_converged: float | None = None
    failed: str | None = None
    family: str | None = None
    images: torch.Tensor | None = field(default=None, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The numbers that there are, as JSON values."""
        return {k: v for k, v in vars(self).items() if k != "images" and v is not None}


@dataclass
class Benchmark:
    """A benchmark: its rows, and how they were measured.

    Attributes:
        job: what every entry did.
        rounds: timed rounds.
        machine: "cpu", "device", "threads", "torch" and "python".
        rows: the baseline, the entries in the order given, and the anchors.
    """

    job: Job
    rounds: int
    machine: dict[str, Any]
    rows: list[Row]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, without the images."""
        job = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self.job).items()}
        return {"job": job, "rounds": self.rounds, "machine": self.machine, "rows": [r.to_dict() for r in self.rows]}
