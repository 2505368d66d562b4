"""Learned solvers for tests: known ones written in, and one that is like none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from diffusion_accel.combination import Combination
from diffusion_accel.schedulers.learned import LearnedMultistepScheduler
from diffusion_accel.schedulers.neutral import ddim_coefficients, dpmpp_2m_coefficients


def neutral(base: Any, *counts: int, by: Callable[..., list[Combination]] = ddim_coefficients, **how: Any) -> Any:
    """A learned solver with the timesteps of another scheduler and the coefficients of a known solver."""
    solvers: dict[str, Any] = {}
    for count in counts:
        base.set_timesteps(count)
        times = [float(t) for t in base.timesteps]
        steps = by(*LearnedMultistepScheduler.like(base).alphas_and_sigmas(times), **how)
        solvers[str(count)] = {"timesteps": times, "steps": [str(step) for step in steps]}
    return LearnedMultistepScheduler.like(base, solvers)


def odd_steps(scheduler: Any, times: list[float], channels: int = 1) -> list[str]:
    """Combinations of three predictions and two latents, other ones for each channel, near DPM-Solver++(2M)."""
    generator = torch.Generator().manual_seed(len(times))
    steps = []
    for i, known in enumerate(dpmpp_2m_coefficients(*scheduler.alphas_and_sigmas(times))):
        rows: list[tuple[tuple[float, ...], tuple[float, ...]]] = []
        for _ in range(channels):
            extra = (0.02 * torch.randn(5, generator=generator)).tolist()
            y = [*known.predictions[0], 0.0, 0.0][: min(3, i + 1)]
            x = [*known.latents[0], 0.0][: min(2, i + 1)]
            rows.append(
                (
                    tuple(a + b for a, b in zip(y, extra, strict=False)),
                    tuple(a + b for a, b in zip(x, extra[3:], strict=False)),
                )
            )
        steps.append(str(Combination(tuple(y for y, _ in rows), tuple(x for _, x in rows))))
    return steps


def odd(base: Any, *counts: int, channels: int = 1, **entry: Any) -> Any:
    """A learned solver of several numbers of evaluations, at timesteps that are no whole numbers."""
    plain = LearnedMultistepScheduler.like(base)
    solvers = {}
    for count in counts:
        times = [950.25 - i * (919.75 / max(1, count - 1)) for i in range(count)]
        solvers[str(count)] = {"timesteps": times, "steps": odd_steps(plain, times, channels), **entry}
    return LearnedMultistepScheduler.like(base, solvers)
