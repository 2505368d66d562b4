"""The caches that diffusers itself has for its transformers, by name and numbers; importing this imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import ClassVar

from diffusion_accel.errors import ConfigurationError
from diffusion_accel.io import shown

from .plan import FULL, Kinds, Plan, PlanSource

# name -> (what its numbers mean, the usual ones, the highest ones)
CACHES: dict[str, tuple[str, tuple[float, ...], tuple[float, ...]]] = {
    "first-block": ("threshold", (0.05,), (10.0,)),
    "taylorseer": ("interval,order", (5, 1), (1000, 4)),
    "mag": ("threshold,skips", (0.06, 3), (10.0, 1000)),
    "pab": ("range", (2,), (1000,)),
    "faster-cache": ("range,unconditional range", (2, 5), (1000, 1000)),
}
#: those that go by what the first block gets and makes, of which a process of several has a part
FIRST_BLOCK_CACHES = ("first-block", "mag")
_NUMBER = r"([0-9]{0,4}(?:\.[0-9]{1,16})?)"
_TEXT = re.compile(rf"([a-z-]+)(?::{_NUMBER}(?:,{_NUMBER})?)?")


@dataclass(frozen=True)
class DiffusersCache(PlanSource):
    """One of diffusers' caches: FirstBlockCache, TaylorSeer, MagCache, Pyramid Attention Broadcast or FasterCache.

    Its plans are full steps only: what a step leaves out the cache decides by itself.

    Attributes:
        name: one of `CACHES`.
        numbers: what `CACHES` says of it; those that are not given are the usual ones.
    """

    name: str
    numbers: tuple[float, ...] = ()
    runtime: ClassVar[str] = "diffusion_accel.reuse.diffusers_cache_run"

    def __post_init__(self) -> None:
        if self.name not in CACHES:
            raise ConfigurationError(f"unknown cache {shown(self.name)}; diffusers has {', '.join(CACHES)}")
        usual, highest = CACHES[self.name][1:]
        whole = all(n == int(n) for n, default in zip(self.numbers, usual, strict=False) if isinstance(default, int))
        bounded = all(0 < n <= most for n, most in zip(self.numbers, highest, strict=False))
        if not bounded or not whole or len(self.numbers) > len(usual):
            raise _wrong(self.name, self.numbers)
        object.__setattr__(self, "numbers", (*self.numbers, *usual[len(self.numbers) :]))

    def __str__(self) -> str:
        return f"{self.name}:{','.join(map(_digits, self.numbers))}"

    def for_steps(self, total: int) -> Plan:
        """Full steps."""
        return Plan((FULL,) * total)

    def kinds(self) -> Kinds:
        """Full steps."""
        return Kinds((FULL,))

    @property
    def works_inside(self) -> bool:
        """It hooks the blocks of the transformer."""
        return True

    @classmethod
    def parse(cls, text: str) -> DiffusersCache:
        """`NAME[:NUMBER[,NUMBER]]`.

        Raises:
            ConfigurationError: it is none of diffusers' caches, or the numbers are wrong.
        """
        name, match = text.partition(":")[0], _TEXT.fullmatch(text)
        if match is None and name in CACHES:
            raise _wrong(name, text)
        return cls(name, tuple(float(n or 0) for n in match.groups()[1:] if n is not None) if match else ())


def is_cache(text: str) -> bool:
    """Whether a text begins with the name of one of diffusers' caches."""
    return text.partition(":")[0] in CACHES


def _wrong(name: str, given: object) -> ConfigurationError:
    meaning, usual, highest = CACHES[name]
    limits = " and ".join(f"{n:g}" for n in highest)
    return ConfigurationError(
        f"{name} takes {name}:{meaning}, such as {name}:{usual[0]:g}, above 0 and at most {limits}; got {shown(given)}"
    )


def _digits(number: float) -> str:
    return format(Decimal(repr(float(number))), "f").removesuffix(".0")
