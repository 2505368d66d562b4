"""Baseline against accelerated, on one pipeline: interleaved times, counted FLOPs, paired fidelity."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffusion_accel.changes import Changes
from diffusion_accel.errors import ConfigurationError

from .fidelity import psnr, ssim


@dataclass(frozen=True)
class Comparison:
    """What a setting gained and lost.

    Attributes:
        time_ratio: median over rounds of baseline seconds / accelerated seconds (above 1: faster).
        flop_ratio: baseline FLOPs / accelerated FLOPs of the whole call, decoding included.
        psnr, ssim: of each image against the baseline's, dB (infinite if equal) and −1 … 1.
        baseline, accelerated: the images.
        report: the accelerated call's report, without the slow-down of counting.
    """

    time_ratio: float
    flop_ratio: float
    psnr: list[float]
    ssim: list[float]
    baseline: list[Image.Image]
    accelerated: list[Image.Image]
    report: Any

    def to_dict(self) -> dict[str, Any]:
        """The numbers as JSON values (infinite PSNR as None)."""
        return {
            "time_ratio": round(self.time_ratio, 3),
            "flop_ratio": round(self.flop_ratio, 3),
            "psnr": [None if p == float("inf") else round(p, 2) for p in self.psnr],
            "ssim": [round(s, 4) for s in self.ssim],
        }


def compare(
    pipe: Any,
    call: Callable[[Any], list[Image.Image]],
    rounds: int = 1,
    flop_ratio: float | None = None,
    plain: Any = None,
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
    seconds: dict[bool, list[float]] = {False: [], True: []}
    report = None

    def side(on: bool) -> Any:
        if enabled:
            handle.enable(*enabled) if on else handle.disable(*enabled)
        return pipe if on or plain is None else plain

    with Changes() as changes:
        changes.add(lambda: side(True))
        for one in (pipe, plain):
            if one is not None:
                changes.set(one.acceleration, "count_flops", False)
        for on in (False, True):
            current = side(on)
            current.acceleration.count_flops = flop_ratio is None
            images[on] = call(current)
            flops[on] = current.acceleration.report().flops or 0.0
            current.acceleration.count_flops = False
        for _ in range(rounds):
            for on in (False, True):
                current = side(on)
                began = time.perf_counter()
                call(current)
                seconds[on].append(time.perf_counter() - began)
        report = handle.report()
    pairs = zip(seconds[False], seconds[True], strict=True)
    a, b = as_tensor(images[False]), as_tensor(images[True])
    return Comparison(
        time_ratio=statistics.median(base / fast for base, fast in pairs),
        flop_ratio=flops[False] / flops[True] if flop_ratio is None else flop_ratio,
        psnr=psnr(a, b).tolist(),
        ssim=ssim(a, b).tolist(),
        baseline=images[False],
        accelerated=images[True],
        report=report,
    )


def as_tensor(images: list[Image.Image]) -> torch.Tensor:
    """PIL images of one size as (N, 3, H, W) in [0, 1]; RGBA ones as (N, 4, H, W), colours premultiplied by alpha."""
    mode = "RGBA" if images[0].mode == "RGBA" else "RGB"
    arrays = np.stack([np.asarray(image.convert(mode), dtype=np.float32) / 255 for image in images])
    if mode == "RGBA":
        arrays[..., :3] *= arrays[..., 3:]
    return torch.from_numpy(arrays).permute(0, 3, 1, 2)
