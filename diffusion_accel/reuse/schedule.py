"""Key steps: at which positions of the trajectory the encoder runs.

Positions count from 0 over the steps that are really run; a preset is written for a reference number of steps and
carried over to any other number.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from diffusion_accel.errors import ConfigurationError
from diffusion_accel.io import shown

from .plan import FULL, Kinds, Plan, PlanSource, Step

# How the names of schedulers begin that have more timesteps than steps.
MORE_TIMESTEPS = ("heun", "kdpm2", "pndm")
# Faster Diffusion's non-uniform set for 50 steps (Li et al. 2023, section 3.3 and the released "50ls" setting).
PAPER = (0, 1, 2, 3, 5, 10, 15, 25, 35)
PAPER_STEPS = 50


def _if_stage_1(i: int) -> bool:
    return i < 10 or i > 85 or i % 5 == 0


def _if_stage_2(i: int) -> bool:
    return i < 20 or i > 40 or i % 2 == 0


def _if_stage_3(i: int) -> bool:
    return math.isqrt(9 + 8 * i) ** 2 == 9 + 8 * i


# name -> (reference number of steps, its key steps); DeepFloyd IF's three stages as released
_SETS: dict[str, tuple[int, tuple[int, ...]]] = {
    "if-stage-1": (100, tuple(i for i in range(100) if _if_stage_1(i))),
    "if-stage-2": (50, tuple(i for i in range(50) if _if_stage_2(i))),
    "if-stage-3": (75, tuple(i for i in range(75) if _if_stage_3(i))),
}
PRESETS = ("paper", "all", *_SETS)


def check_schedule(schedule: str | tuple[int, ...]) -> None:
    """Raise `ConfigurationError` if `schedule` is neither a preset, `uniform:m` nor a valid list of steps."""
    if isinstance(schedule, tuple):
        if not schedule or schedule[0] != 0 or list(schedule) != sorted(set(schedule)):
            raise ConfigurationError(
                "key steps must be increasing, without repeats, and begin with 0 (the first step), "
                f"got {shown(schedule)}"
            )
        return
    if schedule in PRESETS:
        return
    if re.fullmatch(r"uniform:[1-9][0-9]{0,3}", schedule):
        return
    raise ConfigurationError(
        f"unknown key-step schedule {shown(schedule)}; allowed: {', '.join(PRESETS)}, uniform:m with m >= 1, "
        "or a list of steps such as 0+1+2+5+10"
    )


def key_steps(schedule: str | tuple[int, ...], total: int) -> frozenset[int]:
    """The key steps of `schedule` for a run of `total` steps; step 0 is always one.

    - `paper`: the published list. Up to 50 steps its prefix is used, as the released code does at 20 steps; above 50
      it is scaled (see `scale`).
    - `uniform:m`: every m-th step.
    - `if-stage-1`, `if-stage-2`, `if-stage-3`: DeepFloyd IF's sets (written for 100, 50 and 75 steps), scaled.
    - `all`: every step, which makes the method exact.
    - a tuple of positions: as given.

    Raises:
        ConfigurationError: a listed position lies beyond the run.
    """
    if isinstance(schedule, tuple):
        if schedule[-1] >= total:
            raise ConfigurationError(
                f"key step {schedule[-1]} lies beyond this run of {total} steps (0 … {total - 1}); "
                "shorten the list or use a preset, which fits any number of steps"
            )
        return frozenset(schedule)
    if schedule == "all":
        return frozenset(range(total))
    if schedule == "paper":
        return frozenset(k for k in PAPER if k < total) if total <= PAPER_STEPS else scale(PAPER, PAPER_STEPS, total)
    if schedule in _SETS:
        reference, keys = _SETS[schedule]
        return scale(keys, reference, total)
    return frozenset(range(0, total, int(schedule.partition(":")[2])))


def around_center(total: int, interval: int, center: int, power: float) -> frozenset[int]:
    """DeepCache's non-uniform schedule (Ma et al., CVPR 2024, appendix; `sample_from_quad_center` of its code).

    As many steps as every `interval`-th would be, at center + x^power for evenly spaced x, where the roots of negative
    numbers are complex and the real part counts. The power becomes less by 0.02 until no two steps coincide.

    Raises:
        ConfigurationError: they coincide with every power above 1.
    """
    import numpy as np  # heavy: settings are read without it

    wanted = -(-total // interval)
    while power > 1 and center < total:
        spaced = np.linspace((-center) ** (1 / power), (total - center) ** (1 / power), wanted + 1)
        places = np.unique((spaced**power).real.astype(int))[1:-1]
        if len(places) + 1 == wanted:
            return frozenset({0, *(int(place) + center for place in places)})
        power -= 0.02
    raise ConfigurationError(
        f"deepcache-pow: {wanted} of {total} steps cannot be placed around step {center}; use a lower center or power"
    )


def scale(keys: tuple[int, ...], reference: int, total: int) -> frozenset[int]:
    """Carry key steps from `reference` steps over to `total`: position k goes to ⌊k · total / reference⌋.

    Neighbouring key steps stay a run without holes, so that a dense start stays dense.
    """
    chosen = set(keys)
    scaled: set[int] = set()
    for k in keys:
        at = k * total // reference
        until = (k + 1) * total // reference if k + 1 in chosen else at + 1
        scaled.update(range(at, max(until, at + 1)))
    return frozenset(i for i in scaled if i < total)


_DECODER = Step("decoder")


@dataclass(frozen=True)
class KeySteps(PlanSource):
    """Key steps as a source of plans: the whole U-Net at these, its decoder at the others (Faster Diffusion).

    Attributes:
        schedule: one of `PRESETS`, uniform:m, or positions; see `key_steps`.
    """

    schedule: str | tuple[int, ...]

    def __post_init__(self) -> None:
        check_schedule(self.schedule)

    def __str__(self) -> str:
        return self.schedule if isinstance(self.schedule, str) else "+".join(map(str, self.schedule))

    @classmethod
    def parse(cls, text: str) -> KeySteps:
        """The inverse of `str`; positions are written 0+1+5."""
        return cls(tuple(map(int, text.split("+"))) if re.fullmatch(r"[0-9]{1,5}(\+[0-9]{1,5})*", text) else text)

    def for_steps(self, total: int) -> Plan:
        """The plan for `total` steps. Raises `ConfigurationError` if a listed position lies beyond them."""
        keys = key_steps(self.schedule, total)
        return Plan(tuple(FULL if i in keys else _DECODER for i in range(total)))

    def kinds(self) -> Kinds:
        """Full steps, and those of the decoder alone."""
        return Kinds((FULL, _DECODER))


def read_schedule(given: str | tuple[int, ...] | KeySteps) -> tuple[str | tuple[int, ...], KeySteps]:
    """What the field `schedule` keeps, and the key steps that it means."""
    keys = given if isinstance(given, KeySteps) else KeySteps(given)
    return keys.schedule, keys
