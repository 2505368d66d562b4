"""Baseline against accelerated, on one pipeline: interleaved times, counted FLOPs, paired fidelity."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image

from diffusion_accel.changes import Changes
from diffusion_accel.errors import ConfigurationError
from diffusion_accel.report import Report

from .fidelity import Fidelity, fidelity
from .timing import interleaved, ratios

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class Comparison:
    """What a setting gained and lost.

    Attributes:
        time_ratio: median over rounds of baseline seconds / accelerated seconds (above 1: faster).
        flop_ratio: baseline FLOPs / accelerated FLOPs of the whole call, decoding included.
        fidelity: of each image to the baseline's.
        baseline, accelerated: the images.
        report: the accelerated call's report, without the slow-down of counting.
    """

    time_ratio: float
    flop_ratio: float
    fidelity: Fidelity
    baseline: list[Image.Image]
    accelerated: list[Image.Image]
    report: Report

    @property
    def psnr(self) -> list[float]:
        """Of each image, in dB; infinite for equal ones."""
        return list(self.fidelity.psnr)

    @property
    def ssim(self) -> list[float]:
        """Of each image, −1 … 1; NaN for images that are too small for SSIM."""
        return list(self.fidelity.ssim) or [float("nan")] * len(self.fidelity)

    def to_dict(self) -> dict[str, Any]:
        """The numbers as JSON values (infinite PSNR as None)."""
        numbers = {"time_ratio": round(self.time_ratio, 3), "flop_ratio": round(self.flop_ratio, 3)}
        return numbers | self.fidelity.to_dict()


def compare(
    pipe: DiffusionPipeline,
    call: Callable[[Any], list[Image.Image]],
    rounds: int = 1,
    flop_ratio: float | None = None,
    plain: DiffusionPipeline | None = None,
) -> Comparison:
    """Run `call(pipe)` with the enabled features of `pipe` off and on, and compare.

    A feature that changes what is drawn (transparency) stays on in both. The first run of each warms up and counts
    FLOPs (slow; skipped if `flop_ratio` is known already, as for another prompt with the same settings); then `rounds`
    timed pairs follow, in turn.

    Args:
        plain: another pipeline to be the baseline (the same model before it was quantized); both are accelerated ones.

    Raises:
        ConfigurationError: no feature of the pipeline is enabled, and there is no other baseline.
    """
    handle = pipe.acceleration
    features = handle.features
    enabled = [name for name in features if handle.enabled(name) and not features[name].changes_output]
    if not enabled and plain is None:
        raise ConfigurationError("there is nothing to compare: no feature that accelerates is enabled")
    images: dict[bool, list[Image.Image]] = {}
    flops: dict[bool, float] = {}
    sides = {False: pipe if plain is None else plain, True: pipe}

    @contextmanager
    def side(on: bool) -> Iterator[None]:
        if enabled:
            handle.enable(*enabled) if on else handle.disable(*enabled)
        yield

    with Changes() as changes:
        if enabled:
            changes.add(lambda: handle.enable(*enabled))
        for one in sides.values():
            changes.set(one.acceleration, "count_flops", False)
        for on, current in sides.items():
            with side(on):
                current.acceleration.count_flops = flop_ratio is None
                images[on] = call(current)
                flops[on] = current.acceleration.report().flops or 0.0
                current.acceleration.count_flops = False
        calls = {on: lambda current=current: call(current) for on, current in sides.items()}
        seconds = interleaved(calls, rounds, warmup=0, around=side)
        report = handle.report()
    return Comparison(
        time_ratio=statistics.median(ratios(seconds[False], seconds[True])),
        flop_ratio=flops[False] / flops[True] if flop_ratio is None else flop_ratio,
        fidelity=fidelity(images[False], images[True]),
        baseline=images[False],
        accelerated=images[True],
        report=report,
    )
