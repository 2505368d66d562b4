"""Rules of guidance over the steps of a plan: at which of them both branches are computed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal

from diffusion_accel.errors import ConfigurationError
from diffusion_accel.io import shown

from .plan import Plan, Step

_SHARE = r"(0?\.\d+|0|1(?:\.0)?)"


@dataclass(frozen=True)
class GuidanceRule:
    """At which steps both branches of guidance are computed.

    Attributes:
        kind: "both": at all; "reuse": the unconditional branch at every `every`-th step only, its difference is reused
            between them; "interval": guidance only while the noise level is within `low` … `high`.
        every: at least 1.
        low, high: shares of the training timesteps, 0 … 1; see `diffusion_accel.noise_level`.
    """

    kind: str = "both"
    every: int = 1
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in ("both", "reuse", "interval") or self.every < 1 or not 0 <= self.low <= self.high <= 1:
            raise ConfigurationError(
                "a rule of guidance is both, reuse with every >= 1, or interval with 0 <= low <= high <= 1; "
                f"got {shown(vars(self))}"
            )

    def __str__(self) -> str:
        if self.kind == "reuse":
            return f"reuse:{self.every}"
        return f"interval:{_share(self.low)}-{_share(self.high)}" if self.kind == "interval" else self.kind

    @classmethod
    def parse(cls, text: str) -> GuidanceRule:
        """The inverse of `str`: both, reuse:n or interval:low-high.

        Raises:
            ConfigurationError: it is none of these.
        """
        kind, _, value = text.partition(":")
        if text == "both":
            return cls()
        if kind == "reuse" and re.fullmatch(r"[1-9][0-9]{0,3}", value):
            return cls("reuse", every=int(value))
        match = re.fullmatch(f"{_SHARE}-{_SHARE}", value) if kind == "interval" else None
        if match is None or float(match[1]) > float(match[2]):
            raise ConfigurationError(
                f"guidance must be both, reuse:n with n >= 1, or interval:low-high within 0-1, got {shown(text)}"
            )
        return cls("interval", low=float(match[1]), high=float(match[2]))

    @property
    def needs_levels(self) -> bool:
        """Whether it asks for the noise level of a step."""
        return self.kind == "interval"

    def applied(self, plan: Plan, levels: Sequence[float] = ()) -> Plan:
        """A plan with this rule over its steps; `levels`: the noise level of each, if `needs_levels`."""
        if self.kind == "both":
            return plan
        if self.kind == "reuse":
            steps = [s if i % self.every == 0 else replace(s, guidance="reuse") for i, s in enumerate(plan.steps)]
        else:
            inside = [self.low <= levels[i] <= self.high for i in range(len(plan))]
            steps = [s if within else _unguided(s) for s, within in zip(plan.steps, inside, strict=True)]
        return Plan(tuple(steps))


def _unguided(step: Step) -> Step:
    """The step without guidance, which a fit is about."""
    own = step if step.fit is None and step.guidance_weight == 1 else step.unfitted()
    return replace(own, guidance="none")


def read_guidance(given: str | GuidanceRule) -> tuple[str, GuidanceRule]:
    """What the field `guidance` keeps, and the rule that it means."""
    return (str(given), given) if isinstance(given, GuidanceRule) else (given, GuidanceRule.parse(given))


def _share(value: float) -> str:
    return format(Decimal(repr(float(value))), "f").removesuffix(".0")
