"""Plans without tuning: the first call of a model, scheduler and number of steps teaches the plan of the others."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from diffusion_accel.errors import ConfigurationError
from diffusion_accel.io import shown

from .plan import FULL, Kinds, Plan, PlanSource
from .step import SPACES, Step

NEAR = 30.0  # dB; the fastest plan that is so near is the usual choice, see docs/reuse.md for what that is in an image
MOST_NEAR = 150.0  # dB; what equal latents count as
LEAST = 1.2  # times fewer full steps than steps: what is slower is not worth an approximation
MOST = 100.0
_TEXT = re.compile(r"auto(?::([0-9]{1,3}(?:\.[0-9]{1,4})?))?")


class Candidate(NamedTuple):
    """A plan that was tried by repeating a call.

    Attributes:
        nearness: how far the error of the last latents was below their variance where it was tried, in dB.
        plan: its steps.
    """

    nearness: float
    plan: Plan

    @property
    def full(self) -> int:
        """How many steps are full."""
        return sum(step.mode == "full" for step in self.plan.steps)

    @property
    def speedup(self) -> float:
        """Steps for each full step."""
        return len(self.plan) / self.full


@dataclass(frozen=True)
class Auto(PlanSource):
    """The plan that the first call teaches; see `auto_run`. By itself it is the plan of that call: every step in full.

    Attributes:
        speedup: steps for each full step, at least but for rounding, 1 to 100; None: the fastest plan that was near.
    """

    speedup: float | None = None

    runtime = "diffusion_accel.reuse.auto_run"

    def __post_init__(self) -> None:
        if self.speedup is not None and not 1 <= self.speedup <= MOST:
            raise ConfigurationError(f"auto takes a speed-up of 1 to {MOST:g}, got {shown(self.speedup)}")

    def __str__(self) -> str:
        return "auto" if self.speedup is None else f"auto:{self.speedup:g}"

    @classmethod
    def parse(cls, text: str) -> Auto:
        """The inverse of `str`: "auto", or "auto:SPEEDUP" such as auto:2.5. Raises `ConfigurationError`."""
        match = _TEXT.fullmatch(text)
        if match is None:
            raise ConfigurationError(f"auto is auto or auto:SPEEDUP, such as auto:2.5; got {shown(text)}")
        return cls(None if match[1] is None else float(match[1]))

    def at(self, speedup: float | None, min_psnr: float | None) -> Auto:
        """The same for a speed-up. Raises `ConfigurationError` for a PSNR, which it cannot promise."""
        if min_psnr is not None:
            raise ConfigurationError(
                "auto measures no image, so it takes no min_psnr; give it a speedup, or tune a plan for the PSNR"
            )
        if speedup is not None and self.speedup not in (None, speedup):
            raise ConfigurationError(f"the plan {self} has another speed-up than speedup={speedup:g}; give one of them")
        return self if speedup is None else replace(self, speedup=speedup)

    def for_steps(self, total: int) -> Plan:
        """Every step in full."""
        return Plan((FULL,) * total)

    def kinds(self) -> Kinds:
        """Full steps, and what may come: held ones in every space, by two values."""
        return Kinds((FULL, *(Step("hold", space=space, weights=(1.0, 0.0)) for space in SPACES)))

    def choose(self, candidates: Sequence[Candidate]) -> Candidate | None:
        """Which of the plans a call follows; None: none is both near and fast enough, so it computes every step."""
        if self.speedup is None:
            near = [one for one in candidates if one.nearness >= NEAR and one.speedup >= LEAST]
            return max(near, key=lambda one: one.speedup, default=None)
        fast = [one for one in candidates if one.full <= math.ceil(len(one.plan) / self.speedup)]
        if not fast:
            return max(candidates, key=lambda one: one.speedup, default=None)
        return max(fast, key=lambda one: one.nearness)


def is_auto(text: str) -> bool:
    """Whether a plan's text begins like `Auto`, right or wrong."""
    return re.split(r"[:@,]", text, maxsplit=1)[0] == "auto"
