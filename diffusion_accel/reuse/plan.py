"""Plans: what each denoising step of a call computes, reuses or forecasts; and whatever makes one."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from diffusion_accel.arguments import with_old_keywords
from diffusion_accel.errors import ConfigurationError
from diffusion_accel.io import shown

from .step import FULL, MAX_DEPTH, MAX_ORDER, MAX_STEPS, Kinds, Step, bounded

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["FULL", "MAX_DEPTH", "MAX_ORDER", "MAX_STEPS", "Kinds", "Plan", "PlanSource", "Step", "bounded"]


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

    def for_model(self, _layers: int | None) -> PlanSource:
        """The same for a U-Net with so many layers in a block, or for a model that is no U-Net (None), where the plans
        depend on it."""
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

        What was fitted is for the steps it was fitted to: see `Step.unfitted`.
        """
        if total == len(self):
            return self
        ratio = len(self) / total
        # the first new step whose span covers a full step of the old plan takes it over
        owners: dict[int, Step] = {}
        for i, step in enumerate(self.steps):
            if step.mode == "full":
                owners.setdefault(min(total - 1, int(i / ratio + 0.5)), step.unfitted())
        rest = [step.unfitted() for step in self.steps if step.mode != "full"]
        steps = []
        for j in range(total):
            old = self.steps[min(len(self) - 1, int(j * ratio))]
            near = (
                old.unfitted()
                if old.mode != "full" or not rest
                else rest[min(len(rest) - 1, int(j * len(rest) / total))]
            )
            steps.append(owners.get(j, near))
        return Plan(tuple(steps))
