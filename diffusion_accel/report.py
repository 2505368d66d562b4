"""What one call did: steps, seconds, FLOPs and each feature's counters, in a form for people and for JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .io import plain


@dataclass(frozen=True)
class Report:
    """The record of one call of an accelerated pipeline.

    Attributes:
        steps: denoising steps that ran; a solver of second order has two for most of its timesteps. None if no feature
            was enabled and the pipeline itself does not say how many there were (DiT, DDPM).
        seconds: wall-clock time of the whole call, text encoding and decoding included.
        flops: floating-point operations (2 for a multiply-add) of the whole call; None unless they were counted.
        calls: how many times a denoiser was called, which is more than once a step where the branches of guidance are
            calls of their own; None if no feature was enabled.
        features: configuration of each feature that was enabled, by name.
        counters: what each feature did, by name (see the feature's documentation for the units).
        choices: what a feature chose by itself, by name: the plan of a tuned family, with what was measured of it.
        words: what the counters say, for people, by name; what is not there is said with the counters' names.
        details: of some features the same by layer; long, and therefore neither printed nor a part of `to_dict`.
    """

    steps: int | None
    seconds: float
    flops: float | None = None
    calls: int | None = None
    features: dict[str, dict[str, Any]] = field(default_factory=dict)
    counters: dict[str, dict[str, float]] = field(default_factory=dict)
    words: dict[str, str] = field(default_factory=dict)
    details: dict[str, dict[str, float]] = field(default_factory=dict)
    choices: dict[str, dict[str, Any]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "steps": self.steps,
            "seconds": round(self.seconds, 4),
            "flops": self.flops,
            "calls": self.calls,
            "features": self.features,
            "counters": self.counters,
            "choices": self.choices,
        }

    def __str__(self) -> str:
        several = f" ({self.calls} calls of the denoiser)" if self.calls not in (None, self.steps) else ""
        steps = "done" if self.steps is None else f"{self.steps} steps"
        head = f"{steps}{several} in {self.seconds:.2f} s"
        if self.flops is not None:
            head += f", {self.flops / 1e9:.1f} GFLOP"
        lines = [head]
        for name, counters in self.counters.items():
            lines.append(f"  {name}: {self.words.get(name) or by_name(counters)}")
        for name, choice in self.choices.items():
            limit, outcome = 300, choice.get("outcome")
            if outcome:  # says in words what the rest is; a plan that is written out is as long as it has steps
                lines.append(f"  {name}: {plain(outcome, limit)}")
                limit = 80
            known = {k: v for k, v in choice.items() if v is not None and k != "outcome"}
            values = ", ".join(f"{k.replace('_', ' ')} {_measured(k, v, limit)}" for k, v in known.items())
            lines.append(f"  {name} chose {values}")
        if not self.features:
            lines.append("  no feature enabled")
        return "\n".join(lines)


def by_name(counters: Mapping[str, float]) -> str:
    """Counters for people as their names say them; of bytes as sizes."""
    return ", ".join(
        f"{' '.join(word for word in key.split('_') if word != 'bytes')} {size(value)}"
        if "bytes" in key.split("_")
        else f"{key.replace('_', ' ')} {value:g}"
        for key, value in counters.items()
    )


def size(count: float) -> str:
    """So many bytes, for people."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def several(count: float, one: str, more: str | None = None) -> str:
    """A number with the name of what is counted: "1 step", "8 steps"."""
    return f"{count:g} {one if count == 1 else more or f'{one}s'}"


def _measured(key: str, value: Any, limit: int) -> str:
    """A value of a choice with its unit: decibels, times as fast."""
    if isinstance(value, (int, float)) and key.startswith("psnr"):
        return f"{value:.1f} dB"
    if isinstance(value, (int, float)) and key == "speedup":
        return f"{value:.2f}x"
    return plain(value, limit)
