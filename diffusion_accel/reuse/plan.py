"""Plans: what each denoising step of a call computes, reuses or forecasts; and whatever makes one."""

from __future__ import annotations

import importlib
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

from diffusion_accel.arguments import with_old_keywords
from diffusion_accel.errors import ConfigurationError
from diffusion_accel.io import shown

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

MODES = ("full", "decoder", "shallow", "hold")
GUIDANCE = ("both", "reuse", "none")
SPACES = ("", "epsilon", "sample")
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
            first (at most 4, of four decimals; the order follows from them). Fitted by the tuner.
        guidance: "both": with and without the prompt; "reuse": only with it, and the difference between the two is
            the forecast one; "none": only with it, and no guidance (limited-interval guidance, Kynkäänniemi 2024).
    """

    mode: str = "full"
    depth: int = 0
    order: int = 0
    guidance: str = "both"
    space: str = ""
    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.weights:
            object.__setattr__(self, "weights", tuple(round(weight, 4) for weight in self.weights))
            object.__setattr__(self, "order", len(self.weights) - 1)
        known = self.mode in MODES and self.guidance in GUIDANCE and self.space in SPACES
        if not known or not 0 <= self.order <= MAX_ORDER or (self.mode == "shallow") != (0 < self.depth <= MAX_DEPTH):
            raise ConfigurationError(
                f"a step has a mode ({', '.join(MODES)}), an order of 0 to {MAX_ORDER}, guidance "
                f"({', '.join(GUIDANCE)}) and, if it is shallow, a depth of 1 to {MAX_DEPTH}; got {shown(vars(self))}"
            )
        if self.mode != "hold" and (self.space or self.weights):
            raise ConfigurationError(f"only hold has a space or weights, got {shown(vars(self))}")
        if not all(abs(weight) <= MAX_WEIGHT for weight in self.weights):
            raise ConfigurationError(f"a weight of hold must be at most {MAX_WEIGHT:g}, got {shown(self.weights)}")

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


class Kinds(frozenset[Step]):
    """A step of every kind that the plans of one source have: what must be hooked and kept for them follows from it."""

    @property
    def depths(self) -> frozenset[int]:
        """The depths of the shallow steps."""
        return frozenset(step.depth for step in self if step.mode == "shallow")

    def orders(self, mode: str, depth: int = 0) -> int:
        """The highest order of the steps of this mode (and depth); −1 if there is none."""
        return max((s.order for s in self if s.mode == mode and s.depth == depth), default=-1)

    @property
    def spaces(self) -> dict[str, int]:
        """The spaces of the held steps, with the highest order in each."""
        held = [step for step in self if step.mode == "hold"]
        return {s: max(step.order for step in held if step.space == s) for s in {step.space for step in held}}

    @property
    def highest_order(self) -> int:
        """The highest order of a forecast; 0 if nothing is forecast."""
        return max(step.order for step in self)

    @property
    def reuses_guidance(self) -> bool:
        """Whether a step adds the difference of the branches of guidance that earlier steps left."""
        return any(step.guidance == "reuse" for step in self)

    @property
    def leaves_branches_out(self) -> bool:
        """Whether a step computes one branch of guidance only."""
        return any(step.guidance != "both" for step in self)

    @property
    def inside(self) -> bool:
        """Whether a step needs hooks inside of the denoiser: it runs some of its parts only."""
        return any(step.mode in ("decoder", "shallow") for step in self)


class PlanSource(ABC):
    """Whatever gives a call its plan: steps written out, a preset, a tuned plan, key steps, a cache of diffusers.

    `str` of each is read back by the `parse` of its class and, where it is a value of `Reuse.plan`, by `read_plan`.
    """

    #: the module with a function `supports(source, pipeline)`, imported when it is first needed: it needs torch
    runtime: ClassVar[str] = "diffusion_accel.reuse.needs"

    @abstractmethod
    def for_steps(self, total: int) -> Plan:
        """The plan for a call of `total` steps (1 or more)."""

    @abstractmethod
    def kinds(self) -> Kinds:
        """The kinds of steps that its plans have, whatever the number of steps."""

    @classmethod
    @abstractmethod
    def parse(cls, text: str) -> PlanSource:
        """The inverse of `str`. Raises `ConfigurationError`."""

    def for_unet(self, _layers: int) -> PlanSource:
        """The same for a U-Net with so many layers in a block, where the plans depend on it (DeepCache's branches)."""
        return self

    @property
    def made_for(self) -> int | None:
        """The only number of steps that it is written for; None: it fits any."""
        return None

    @property
    def text(self) -> str:
        """What `Reuse.plan` holds, a text that `read_plan` reads."""
        return str(self)

    @property
    def works_inside(self) -> bool:
        """Whether it needs hooks inside of the denoiser."""
        return self.kinds().inside

    def supports(self, pipe: DiffusionPipeline) -> str | None:
        """Why a pipeline cannot follow its plans (one sentence); None if it can. Changes nothing."""
        return self._runtime().supports(self, pipe)

    def to_dict(self) -> dict[str, Any]:
        """It as plain JSON values."""
        return {"plan": self.text}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_dict`. Raises `ConfigurationError`."""
        text = values.get("plan")
        if not isinstance(text, str) or len(values) > 1:
            raise ConfigurationError(f'a plan as JSON is {{"plan": TEXT}}, got {shown(values)}')
        made = cls.parse(text)
        if not isinstance(made, cls):
            raise ConfigurationError(f"{shown(text)} is a {type(made).__name__}, not a {cls.__name__}")
        return made

    def _runtime(self) -> Any:
        return importlib.import_module(self.runtime)


@dataclass(frozen=True)
class Plan(PlanSource):
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

    def __getattr__(self, name: str) -> Any:
        """What `kinds` answers, by its old place."""
        if name in ("depths", "orders", "spaces", "highest_order"):
            return getattr(self.kinds(), name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __str__(self) -> str:
        return " ".join(map(str, self.steps))

    @classmethod
    @with_old_keywords(tokens="text")
    def parse(cls, text: str | Sequence[str]) -> Plan:
        """From the tokens of `Step`, as a list or separated by spaces, with "steps:" before them or without."""
        tokens = text.removeprefix("steps:").split() if isinstance(text, str) else text
        if len(tokens) > MAX_STEPS:
            raise ConfigurationError(f"a plan has at most {MAX_STEPS} steps, got {len(tokens)}")
        return cls(tuple(map(Step.parse, tokens)))

    def kinds(self) -> Kinds:
        """Its own steps."""
        return Kinds(self.steps)

    def for_steps(self, total: int) -> Plan:
        """This plan, stretched to so many steps; see `stretched`."""
        return self.stretched(total)

    @property
    def made_for(self) -> int:
        """How many steps it has."""
        return len(self.steps)

    @property
    def text(self) -> str:
        """ "steps:" and the steps, so that a plan of one step is none of the presets."""
        return f"steps:{self}"

    @property
    def reuses_guidance(self) -> bool:
        """Whether a step adds the difference of the branches of guidance that earlier steps left."""
        return self.kinds().reuses_guidance

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
