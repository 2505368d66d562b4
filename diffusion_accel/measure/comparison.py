"""Baseline against accelerated, on one pipeline: interleaved times, counted FLOPs, paired fidelity."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from diffusion_accel.arguments import public
from diffusion_accel.changes import Changes
from diffusion_accel.conditioning import call_arguments, check_prompts_do
from diffusion_accel.errors import ConfigurationError
from diffusion_accel.progress import Progress, silent
from diffusion_accel.report import Report

from .fidelity import Fidelity, fidelity
from .request import MAX_SEED, options_of, texts_of, whole
from .timing import interleaved, ratios

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Draw = Callable[[Any], list[Image.Image]]


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


@public
def compare(
    pipe: DiffusionPipeline,
    prompts: str | Sequence[str],
    *,
    steps: int | None = None,
    seed: int = 0,
    guidance_scale: float | None = None,
    height: int | None = None,
    width: int | None = None,
    batch: int = 8,
    rounds: int = 5,
    baseline: DiffusionPipeline | None = None,
    progress: Progress = silent,
) -> Comparison:
    """Draw the same images with the enabled features of a pipeline off and on: how much faster, and how near.

        accelerate(pipe, Reuse(plan="deepcache:3"))
        found = compare(pipe, ["red apple, 3d style", "panda, flat style"], steps=20)
        print(found.time_ratio, found.fidelity.psnr_median)

    All images are drawn 2 + 2·`rounds` times. A feature that changes what is drawn (transparency) stays on in both.

    Args:
        pipe: an accelerated pipeline; its switches are afterwards as they were.
        prompts: one an image; names or numbers of classes for a pipeline of classes. 16 or more for numbers to rely on.
        steps: denoising steps; None: the pipeline's own default, as for the next three.
        seed: image k starts from the noise of seed + k.
        guidance_scale: 0 to 1000; 1 switches classifier-free guidance off.
        height, width: pixels.
        batch: images in a call.
        rounds: timed pairs, off and on in turn; a median of fewer than 5 says little.
        baseline: another accelerated pipeline to compare with (the same model before it was quantized); None: `pipe`
            with its features off.
        progress: told what is being done.

    Returns:
        Ratios of time and of counted FLOPs, the fidelity of each image, both sets of images, and the report of the
        last accelerated call.

    Raises:
        ConfigurationError: no feature of the pipeline is enabled and there is no `baseline`; prompts or numbers that
            are not allowed; an argument that the pipeline does not take.
    """
    texts, size = texts_of(pipe, prompts), whole("batch", batch)
    whole("seed", seed, 0, MAX_SEED)
    options = options_of(pipe, steps=steps, guidance_scale=guidance_scale, height=height, width=width)
    check_prompts_do(pipe)

    def draw(current: DiffusionPipeline) -> list[Image.Image]:
        images: list[Image.Image] = []
        for start in range(0, len(texts), size):
            part = texts[start : start + size]
            generators = [torch.Generator("cpu").manual_seed(seed + start + i) for i in range(len(part))]
            images += current(**call_arguments(current, part), **options, generator=generators).images
        return images

    return compare_calls(pipe, draw, whole("rounds", rounds), plain=baseline, progress=progress)


def compare_calls(
    pipe: DiffusionPipeline,
    call: Draw,
    rounds: int = 1,
    flop_ratio: float | None = None,
    plain: DiffusionPipeline | None = None,
    progress: Progress = silent,
) -> Comparison:
    """What `compare` does, for any way to draw with a pipeline.

    The first run of each side warms up and counts FLOPs (slow); then `rounds` timed pairs follow, in turn.

    Args:
        pipe: an accelerated pipeline.
        call: draws with the pipeline that it is given, the same images each time.
        rounds: timed pairs.
        flop_ratio: if it is known already, as for another prompt with the same settings; then nothing is counted.
        plain: another accelerated pipeline to be the baseline (the same model before it was quantized).
        progress: told what is being done.

    Raises:
        ConfigurationError: no feature of the pipeline is enabled, and there is no other baseline.
    """
    handle = getattr(pipe, "acceleration", None)
    features = {} if handle is None else handle.features
    enabled = [name for name, f in features.items() if pipe.acceleration.enabled(name) and not f.changes_output]
    if handle is None or not (enabled or plain):
        raise ConfigurationError("there is nothing to compare: no feature that accelerates is enabled")
    images: dict[bool, list[Image.Image]] = {}  # of calls whose operations are not counted: what users get
    flops: dict[bool, float] = {}
    sides = {False: pipe if plain is None else plain, True: pipe}
    done = 0

    @contextmanager
    def side(on: bool) -> Iterator[None]:
        nonlocal done
        progress("accelerated" if on else "baseline", done / (2 + 2 * rounds))
        if enabled:
            handle.enable(*enabled) if on else handle.disable(*enabled)
        yield
        done += 1

    def draw(on: bool) -> None:
        images[on] = call(sides[on])

    with Changes() as changes:
        if enabled:
            changes.add(lambda: handle.enable(*enabled))
        for one in sides.values():
            changes.set(one.acceleration, "count_flops", False)
        if any(features[name].learns() for name in enabled):
            with side(True):
                call(pipe)
        for on, current in sides.items():
            with side(on):
                current.acceleration.count_flops = flop_ratio is None
                call(current)
                flops[on] = current.acceleration.report().flops or 0.0
                current.acceleration.count_flops = False
        calls = {on: functools.partial(draw, on) for on in sides}
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
