"""The entry `forecast`: other methods' forecasts in the place of steps. Importing this imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar, Self

from diffusion_accel.arguments import nearest
from diffusion_accel.errors import ConfigurationError
from diffusion_accel.feature import Feature, option
from diffusion_accel.io import shown
from diffusion_accel.reuse.schedule import MORE_TIMESTEPS

MOST = 10_000  # steps between two that are computed; also a threshold's highest value
_RULE = re.compile(r"([a-z-]+)(?:@([0-9]))?(?:,([0-9]{1,5}(?:\.[0-9]{1,9})?))?(?:,([a-z]+))?")


@dataclass(frozen=True)
class Method:
    """What a method takes.

    Attributes:
        usual: its number if none is given: every so many steps one is computed (0: its own schedule), or a threshold.
        order: its usual order; None: it has none.
        adaptive: it decides while a call runs, from what it sees, which steps are computed.
        threshold: its number is a threshold; otherwise, if it has one at all, a number of steps.
        spaces: it may forecast the noise or the clean sample instead of the prediction.
    """

    usual: float = 5
    order: int | None = None
    adaptive: bool = False
    threshold: bool = False
    spaces: bool = True


#: by name; see `forecasts` and `adaptive` for what each does
METHODS: dict[str, Method] = {
    "hold": Method(),
    "taylor": Method(order=1),
    "hermite": Method(order=2),
    "foca": Method(),
    "spectrum": Method(usual=0),
    "dmd": Method(),
    "sada": Method(usual=0, adaptive=True, spaces=False),
    "sada-lagrange": Method(usual=0, adaptive=True, spaces=False),
    "easycache": Method(usual=0.05, adaptive=True, threshold=True, spaces=False),
}
SADA = ("sada", "sada-lagrange")


@dataclass(frozen=True)
class Rule:
    """A method with its numbers.

    Attributes:
        method: one of `METHODS`.
        number: see `Method.usual`.
        order: of taylor and hermite.
        space: what is forecast: "" the prediction, "epsilon" the noise, "sample" the clean sample.
    """

    method: str
    number: float
    order: int = 0
    space: str = ""

    @property
    def kind(self) -> Method:
        """What its method takes."""
        return METHODS[self.method]

    @classmethod
    def parse(cls, text: str) -> Rule:
        """NAME[@ORDER][,NUMBER][,SPACE], such as "hermite,5", "taylor@2,3,sample", "spectrum", "easycache,0.05".

        Raises:
            ConfigurationError: an unknown method, or something that it does not take.
        """
        match = _RULE.fullmatch(text)
        name = match[1] if match else re.split(r"[@,]", text, maxsplit=1)[0]
        if name not in METHODS:
            near = nearest(name[:100], METHODS)
            hint = f"; did you mean {near!r}?" if near else ""
            raise ConfigurationError(f"unknown forecast {shown(text)}; the methods are: {', '.join(METHODS)}{hint}")
        kind = METHODS[name]
        order, number, space = match.groups()[1:] if match else (None, None, "?")
        right = space in (None, "epsilon", "sample") and (space is None or kind.spaces)
        right &= order is None or (kind.order is not None and 1 <= int(order) <= 3)
        if number is not None:
            in_range = 0 < float(number) <= MOST if kind.threshold else number.isdigit() and 1 <= int(number) <= MOST
            right &= in_range and name not in SADA
        if not right:
            raise ConfigurationError(f"forecast takes {name}{_takes(kind, name)}; got {shown(text)}")
        degree = int(order) if order is not None else kind.order or 0
        return cls(name, kind.usual if number is None else float(number), degree, space or "")


def _takes(kind: Method, name: str) -> str:
    """What may stand behind the name of a method."""
    text = "" if kind.order is None else "[@ORDER] (1 to 3)"
    if kind.threshold:
        return text + "[,THRESHOLD] (above 0)"
    if name not in SADA:
        text += f"[,EVERY] (1 to {MOST} steps)"
    return text + ("[,epsilon|sample]" if kind.spaces else " and nothing else")


@dataclass(frozen=True, kw_only=True)
class Forecast(Feature):
    """Compute some steps, and put another method's forecast in the place of the others, to compare with it.

    Forecasts are of what the scheduler is given: the prediction after guidance. A step that is not computed does not
    call the denoiser.

    Attributes:
        rule: the method, its order, every how many steps one is computed (or a threshold), and what is forecast; see
            `Rule.parse`. `parsed` is what it means.

    Counters: `full_steps`, `reused_steps`.
    """

    name: ClassVar[str] = "forecast"
    summary: ClassVar[str] = "other methods' forecasts in the place of steps"
    paper: ClassVar[str] = "TaylorSeer, HiCache, FoCa, Spectrum, DMD, SADA, EasyCache"
    order: ClassVar[int] = 50
    conflicts: ClassVar[frozenset[str]] = frozenset({"encoder_reuse", "reuse"})
    shorthand: ClassVar[str] = "rule"
    runtime: ClassVar[str] = "diffusion_accel.bench.forecast_run"

    rule: str = option(
        "hermite,5",
        "NAME[@ORDER][,EVERY][,epsilon|sample]",
        read=lambda text: (text, Rule.parse(text)),
    )

    @classmethod
    def neutral(cls) -> Self:
        """Every step is computed."""
        return cls(rule="hold,1")

    @property
    def parsed(self) -> Rule:
        """What `rule` means."""
        found: Rule = self.object_of("rule")
        return found

    def unfit_for(self, _steps: int, scheduler: str) -> str | None:
        """That SADA needs the distance between two timesteps, which schedulers do not have that repeat them."""
        if self.parsed.method in SADA and scheduler.lower().startswith(MORE_TIMESTEPS):
            method = self.parsed.method
            return f"{method} follows the latents in time, and {scheduler} repeats timesteps; use another scheduler"
        return None
