"""Presets: plans by name, for any number of steps."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from diffusion_accel.errors import ConfigurationError
from diffusion_accel.io import shown

from .plan import FULL, MAX_DEPTH, MAX_ORDER, MAX_STEPS, Kinds, Plan, PlanSource, Step
from .plan_names import shipped, shipped_texts
from .schedule import around_center, key_steps

PRESETS = (
    "full",
    "faster-diffusion",
    "uniform:m",
    "deepcache:n[,branch]",
    "deepcache-pow:n,center,power[,branch]",
    "shallow:n,depth",
    "hold:n[,epsilon|sample]",
)
_PRESET = re.compile(r"([a-z-]+)(?::([0-9]{1,9})(?:,([0-9]{1,9}))?(?:,(epsilon|sample))?)?(?:@([0-3]))?")
_POWER = re.compile(r"deepcache-pow:([0-9]{1,9}),([0-9]{1,9}),([0-9](?:\.[0-9]{1,9})?)(?:,([0-9]{1,9}))?(?:@([0-3]))?")
# name -> how many numbers it takes: (at least, at most), default order (None: by the number of steps)
_ARGUMENTS: dict[str, tuple[int, int, int | None]] = {
    "full": (0, 0, 0),
    "faster-diffusion": (0, 0, 0),
    "uniform": (1, 1, 0),
    "deepcache": (1, 2, 0),
    "shallow": (2, 2, None),
    "hold": (1, 1, None),
}
_NAMES = (*_ARGUMENTS, "deepcache-pow")
# a forecast is better than plain reuse where full steps divide the trajectory into so many parts, of U-Nets and of
# transformers (measured)
FINE, FINE_ELSEWHERE = 12, 6


def looks_like_a_preset(text: str) -> bool:
    """Whether `text` begins like a preset or a list of steps, right or wrong."""
    return re.split(r"[:@,]", text, maxsplit=1)[0] in (*_NAMES, "steps")


@dataclass(frozen=True)
class Preset(PlanSource):
    """A plan by name, for any number of steps; see `parse`.

    Attributes:
        name: one of `PRESETS`.
        interval: every so many steps one is full.
        argument: the branch of deepcache, the depth of shallow.
        order: of the forecasts; None: by the number of steps.
        space: of hold.
        center, power: of deepcache-pow.
        layers: in a block of the U-Net, which DeepCache's branches count by; 2 is usual.
        fine: into how many parts full steps have to divide the trajectory for order 1.
    """

    name: str
    interval: int = 1
    argument: int = 0
    order: int | None = 0
    space: str = ""
    center: int = 0
    power: float = 0.0
    layers: int = field(default=2, compare=False)
    fine: int = field(default=FINE, compare=False)

    def __post_init__(self) -> None:
        if self.name not in _NAMES or self.interval < 1 or (self.name == "shallow" and self.argument < 1):
            raise ConfigurationError(
                f"a preset is {' or '.join(PRESETS)}, with positive numbers; got {shown(self.name)}, interval "
                f"{self.interval}, {self.argument}"
            )

    def __str__(self) -> str:
        text, usual = self.name, _ARGUMENTS.get(self.name, (0, 0, 0))[2]
        if self.name == "deepcache-pow":
            text += f":{self.interval},{self.center},{str(self.power).removesuffix('.0')}"
        elif self.name not in ("full", "faster-diffusion"):
            text += f":{self.interval}"
        text += f",{self.argument}" if self.argument else ""
        text += f",{self.space}" if self.space else ""
        return text + ("" if self.order == usual else f"@{self.order}")

    @classmethod
    def parse(cls, text: str) -> Preset:
        """One of `PRESETS`, with @ORDER (0 … 3) behind it if wanted.

        - `full`: every step, which is exact.
        - `faster-diffusion`: Faster Diffusion's published key steps, the decoder at the others.
        - `uniform:m`: the encoder at every m-th step, the decoder at the others.
        - `deepcache:n[,branch]`: DeepCache with interval n and its branch index (0).
        - `deepcache-pow:n,center,power[,branch]`: the same number of full steps, placed by DeepCache's non-uniform
          schedule: most of them around step `center`, fewer with a higher `power` (above 1; 1.4 in its examples).
        - `shallow:n,depth`: the same by depth.
        - `hold:n`: every n-th step, the prediction is reused at the others, or the noise or the clean sample that it
          means.

        If `shallow` and `hold` are given no order, it is 1 where n is at most a 12th of the steps (of a model that is
        no U-Net, a 6th), and 0 elsewhere.

        Raises:
            ConfigurationError: it is none of these.
        """
        if (match := _POWER.fullmatch(text)) is not None and 1 < float(match[3]) <= 5 and int(match[1]) >= 2:
            interval, center, branch = (int(n or 0) for n in match.group(1, 2, 4))
            _check_numbers(text, (interval, center), branch)
            return cls("deepcache-pow", interval, branch, int(match[5] or 0), "", center, float(match[3]))
        match = _PRESET.fullmatch(text)
        if match is not None and match[1] in _ARGUMENTS:
            name, numbers = match[1], [int(n) for n in match.groups()[1:3] if n is not None]
            least, most, order = _ARGUMENTS[name]
            depth_is_right = name != "shallow" or (len(numbers) == 2 and numbers[1] >= 1)
            depth_is_right &= match[4] is None or name == "hold"
            _check_numbers(text, numbers[:1], *numbers[1:])
            if least <= len(numbers) <= most and (not numbers or numbers[0] >= 1) and depth_is_right:
                interval, argument = (*numbers, 1, 0)[:2] if not numbers else (*numbers, 0)[:2]
                return cls(name, interval, argument, order if match[5] is None else int(match[5]), match[4] or "")
        meant = f"did you mean tuned:{text}? " if text in shipped() else ""
        raise ConfigurationError(
            f"unknown reuse plan {shown(text)}; {meant}allowed: auto, {', '.join(PRESETS)}, each with @ORDER "
            f"(0 to {MAX_ORDER}) if wanted; {shipped_texts()}; or the JSON file of a tuned plan or family"
        )

    def for_model(self, layers: int | None) -> Preset:
        """The same for a U-Net with so many layers in a block, or for a model that is no U-Net."""
        return replace(self, fine=FINE_ELSEWHERE) if layers is None else replace(self, layers=layers)

    def for_steps(self, total: int) -> Plan:
        """The plan for `total` steps."""
        if self.name == "full":
            return Plan((FULL,) * total)
        order = int(self.interval * self.fine <= total) if self.order is None else self.order
        if self.name == "faster-diffusion":
            full, other = key_steps("paper", total), Step("decoder", order=order)
        else:
            full, other = frozenset(range(0, total, self.interval)), self._other(order)
            if self.name == "deepcache-pow":
                full = around_center(total, self.interval, self.center, self.power)
        return Plan(tuple(FULL if i in full else other for i in range(total)))

    def kinds(self) -> Kinds:
        """Every kind of step, of the highest order, that plans of any length have."""
        if self.name == "deepcache-pow":  # which cannot be placed in any number of steps
            return Kinds((FULL, self._other(self.order or 0)))
        return self.for_steps(self.fine * self.interval + 6).kinds()

    def _other(self, order: int) -> Step:
        if self.name == "uniform":
            return Step("decoder", order=order)
        if self.name == "hold":
            return Step("hold", order=order, space=self.space)
        depth = self.argument if self.name == "shallow" else branch_depth(self.argument, self.layers)
        return Step("shallow", depth, order)


def _check_numbers(text: str, steps: Sequence[int], depth: int = 0) -> None:
    if max(steps, default=0) > MAX_STEPS or depth > MAX_DEPTH:
        raise ConfigurationError(
            f"the numbers of a plan are at most {MAX_STEPS} (steps) and {MAX_DEPTH} (depth, branch), got {shown(text)}"
        )


def branch_depth(branch: int, layers: int) -> int:
    """How many skip connections DeepCache 0.1.1 computes for a branch index.

    It divides the index by 3 for the block and the place in it, whatever the block has; a block of a U-Net has
    `layers` + 1 skip connections.
    """
    block, place = divmod(branch, 3)
    return block * (layers + 1) + min(place, layers) + 1
