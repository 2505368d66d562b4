"""Plans: what each denoising step of a call computes, reuses or forecasts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from diffusion_accel.errors import ConfigurationError
from diffusion_accel.io import shown

from .schedule import around_center, key_steps

MODES = ("full", "decoder", "shallow", "hold")
GUIDANCE = ("both", "reuse", "none")
MAX_ORDER = 3
MAX_STEPS = 10_000  # of a plan, and between two full steps of a preset
MAX_DEPTH = 1_000
MAX_WEIGHT = 10_000.0
_NUMBER = r"-?[0-9]+(?:\.[0-9]+)?"
_TOKEN = re.compile(
    r"(full|decoder|hold(?::(epsilon|sample))?|shallow:([1-9][0-9]*))"
    rf"(?:@([0-3])|=({_NUMBER}(?:,{_NUMBER}){{0,3}}))?(?:/(reuse|none))?"
)


def bounded(weight: float) -> float:
    """A weight as a plan may have it."""
    return max(-MAX_WEIGHT, min(MAX_WEIGHT, weight))


@dataclass(frozen=True)
class Step:
    """One step of a plan.

    Attributes:
        mode: "full": the whole denoiser; "decoder": a U-Net's decoder on reused encoder features (Faster Diffusion);
            "shallow": only the `depth` outermost levels, on a reused deep feature (DeepCache); "hold": nothing is
            computed, the prediction is reused.
        depth: of "shallow": how many skip connections of a U-Net are computed, from the outside (DeepCache's branch
            + 1), or how many blocks of a transformer, half of them at its beginning and half at its end.
        space: of "hold": what is forecast: "" the prediction as it is, "epsilon" the noise that it means, "sample" the
            clean sample. The last two become a prediction with the latents of their own step.
        order: what is reused is taken as it was (0), or forecast in time by a polynomial of this degree through the
            last full steps (at most 3).
        weights: of "hold", instead of an order: what the last computed predictions count in the forecast, the newest
            first (at most 4). Fitted by the tuner.
        guidance: "both": with and without the prompt; "reuse": only with it, and the difference between the two is
            the forecast one; "none": only with it, and no guidance (limited-interval guidance, Kynkäänniemi 2024).
    """

    mode: str = "full"
    depth: int = 0
    order: int = 0
    guidance: str = "both"
    space: str = ""
    weights: tuple[float, ...] = ()

    def __str__(self) -> str:
        text = self.mode
        text += f":{self.depth}" if self.mode == "shallow" else ""
        text += f":{self.space}" if self.space else ""
        if self.weights:
            text += "=" + ",".join(f"{weight:.4f}" for weight in self.weights)
        elif self.order:
            text += f"@{self.order}"
        return text + (f"/{self.guidance}" if self.guidance != "both" else "")

    @classmethod
    def parse(cls, token: str) -> Step:
        """The inverse of `str`, such as "full", "hold@2", "shallow:1@1/reuse"."""
        match = _TOKEN.fullmatch(token)
        if match is None:
            raise ConfigurationError(
                "a step of a plan is full, decoder, shallow:DEPTH, hold, hold:epsilon or hold:sample, then @ORDER and "
                f"/reuse or /none if wanted, such as hold@2 (the order is at most {MAX_ORDER}), hold also =WEIGHTS, "
                f"such as hold=1.5,-0.5; got {shown(token)}"
            )
        mode, space, depth, order, numbers, guidance = match.groups()
        mode, given = mode.partition(":")[0], tuple(float(n) for n in (numbers or "").split(",") if n)
        if given and mode != "hold":
            raise ConfigurationError(f"only hold takes weights, got {shown(token)}")
        if any(abs(weight) > MAX_WEIGHT for weight in given):
            raise ConfigurationError(f"a weight of hold must be at most {MAX_WEIGHT:g}, got {shown(token)}")
        if len(depth or "") > 4 or int(depth or 0) > MAX_DEPTH:
            raise ConfigurationError(f"the depth of a shallow step must be at most {MAX_DEPTH}, got {shown(token)}")
        degree = len(given) - 1 if given else int(order or 0)
        return cls(mode, int(depth or 0), degree, guidance or "both", space or "", given)


FULL = Step()


@dataclass(frozen=True)
class Plan:
    """The steps of one call. The first is always computed in full, with both branches of the guidance."""

    steps: tuple[Step, ...]

    def __post_init__(self) -> None:
        if not self.steps:
            raise ConfigurationError("a plan needs at least one step")
        first = self.steps[0]
        if first.mode != "full" or first.guidance == "reuse":
            raise ConfigurationError(f"the first step of a plan must be full: there is nothing to reuse; got {first}")

    def __len__(self) -> int:
        return len(self.steps)

    def __str__(self) -> str:
        return " ".join(map(str, self.steps))

    @classmethod
    def parse(cls, tokens: list[str] | str) -> Plan:
        """From the tokens of `Step`, as a list or separated by spaces."""
        tokens = tokens.split() if isinstance(tokens, str) else tokens
        if len(tokens) > MAX_STEPS:
            raise ConfigurationError(f"a plan has at most {MAX_STEPS} steps, got {len(tokens)}")
        return cls(tuple(map(Step.parse, tokens)))

    @property
    def depths(self) -> frozenset[int]:
        """The depths of its shallow steps."""
        return frozenset(step.depth for step in self.steps if step.mode == "shallow")

    def orders(self, mode: str, depth: int = 0) -> int:
        """The highest order of its steps of this mode (and depth); −1 if it has none."""
        return max((s.order for s in self.steps if s.mode == mode and s.depth == depth), default=-1)

    @property
    def spaces(self) -> dict[str, int]:
        """The spaces of its held steps, with the highest order in each."""
        held = [step for step in self.steps if step.mode == "hold"]
        return {s: max(step.order for step in held if step.space == s) for s in {step.space for step in held}}

    @property
    def highest_order(self) -> int:
        return max(step.order for step in self.steps)

    @property
    def reuses_guidance(self) -> bool:
        return any(step.guidance == "reuse" for step in self.steps)

    def is_full(self, index: int) -> bool:
        """Whether step `index` is computed in full; steps behind the plan's end are."""
        return index >= len(self.steps) or self.steps[index].mode == "full"

    def part(self, first: int, end: int) -> Plan:
        """Its steps `first` to `end` − 1, of which the first is computed whatever the plan says."""
        begin, *rest = self.steps[first:end]
        return Plan((Step(guidance="none") if begin.guidance == "none" else FULL, *rest))

    def stretched(self, total: int) -> Plan:
        """This plan for another number of steps: the full steps keep their places along the trajectory.

        Weights are for the steps they were fitted to: a polynomial through as many full steps takes their place.
        """
        if total == len(self):
            return self
        ratio = len(self) / total
        # the first new step whose span covers a full step of the old plan takes it over
        owners: dict[int, Step] = {}
        for i, step in enumerate(self.steps):
            if step.mode == "full":
                owners.setdefault(min(total - 1, int(i / ratio + 0.5)), step)
        rest = [replace(step, weights=()) for step in self.steps if step.mode != "full"]
        steps = []
        for j in range(total):
            old = self.steps[min(len(self) - 1, int(j * ratio))]
            near = (
                replace(old, weights=())
                if old.mode != "full" or not rest
                else rest[min(len(rest) - 1, int(j * len(rest) / total))]
            )
            steps.append(owners.get(j, near))
        return Plan(tuple(steps))


# ---------------------------------------------------------------------- presets
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
FINE = 12  # a forecast is better than plain reuse where full steps divide the trajectory into so many parts (measured)


def looks_like_a_preset(text: str) -> bool:
    """Whether `text` begins like a preset or a list of steps, right or wrong."""
    return re.split(r"[:@,]", text, maxsplit=1)[0] in (*_ARGUMENTS, "deepcache-pow", "steps")


@dataclass(frozen=True)
class Preset:
    """A plan by name, for any number of steps; see `parse`."""

    name: str
    interval: int = 1
    argument: int = 0
    order: int | None = 0
    space: str = ""
    center: int = 0
    power: float = 0.0

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

        If `shallow` and `hold` are given no order, it is 1 where n is at most a 12th of the steps, and 0 elsewhere.

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
        raise ConfigurationError(
            f"unknown reuse plan {shown(text)}; allowed: {', '.join(PRESETS)}, each with @ORDER (0 to {MAX_ORDER}) if "
            "wanted; tuned:quality, tuned:balanced, tuned:fast; or a tuned plan's JSON file"
        )

    def plan(self, total: int, layers: int = 2) -> Plan:
        """The plan for `total` steps; `layers`: layers per block of the U-Net, for DeepCache's branch."""
        if self.name == "full":
            return Plan((FULL,) * total)
        order = int(self.interval * FINE <= total) if self.order is None else self.order
        if self.name == "faster-diffusion":
            full, other = key_steps("paper", total), Step("decoder", order=order)
        else:
            full, other = frozenset(range(0, total, self.interval)), self._other(order, layers)
            if self.name == "deepcache-pow":
                full = around_center(total, self.interval, self.center, self.power)
        return Plan(tuple(FULL if i in full else other for i in range(total)))

    def kinds(self, layers: int = 2) -> Plan:
        """A plan that has every kind of step, of the highest order, that plans of any length have."""
        if self.name == "deepcache-pow":  # which cannot be placed in any number of steps
            return Plan((FULL, self._other(self.order or 0, layers)))
        return self.plan(FINE * self.interval + 6, layers)

    def _other(self, order: int, layers: int) -> Step:
        if self.name == "uniform":
            return Step("decoder", order=order)
        if self.name == "hold":
            return Step("hold", order=order, space=self.space)
        depth = self.argument if self.name == "shallow" else branch_depth(self.argument, layers)
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


def with_guidance(plan: Plan, text: str, levels: list[float]) -> Plan:
    """The plan with a guidance rule over its steps.

    - `both`: unchanged.
    - `reuse:n`: the unconditional branch is computed at every n-th step only.
    - `interval:low-high`: guidance only while the noise level (of `levels`, one for each step) is within low … high.

    Raises:
        ConfigurationError: it is none of these.
    """
    if text == "both":
        return plan
    kind, _, value = text.partition(":")
    if kind == "reuse" and re.fullmatch(r"[1-9][0-9]{0,3}", value):
        n = int(value)
        changed = [s if i % n == 0 else replace(s, guidance="reuse") for i, s in enumerate(plan.steps)]
        return Plan(tuple(changed))
    match = re.fullmatch(r"(0?\.\d+|0|1(?:\.0)?)-(0?\.\d+|0|1(?:\.0)?)", value) if kind == "interval" else None
    if match is None or float(match[1]) > float(match[2]):
        raise ConfigurationError(
            f"guidance must be both, reuse:n with n >= 1, or interval:low-high within 0-1, got {shown(text)}"
        )
    low, high = float(match[1]), float(match[2])
    changed = [s if low <= levels[i] <= high else replace(s, guidance="none") for i, s in enumerate(plan.steps)]
    return Plan(tuple(changed))
