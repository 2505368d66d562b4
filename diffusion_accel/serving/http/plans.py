"""Which plan of steps a request asks for: by quality, speed-up, fidelity or name; never by a file's path."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from diffusion_accel.errors import ConfigurationError
from diffusion_accel.io import shown
from diffusion_accel.pipelines.schedulers import SCHEDULERS
from diffusion_accel.reuse.auto import is_auto
from diffusion_accel.reuse.plan_family import PlanFamily, load_tuned
from diffusion_accel.reuse.plan_file import TunedPlan
from diffusion_accel.reuse.plan_names import is_tuned, shipped, shipped_families
from diffusion_accel.reuse.reuse import Reuse

EVERY_STEP = "max"
REMEMBERED = 64  # what requests asked for last: reading a plan takes as long as drawing a tenth of an image
QUALITIES = {"low": "fast", "medium": "balanced", "high": "quality"}  # -> a plan of a family by name


class Plans:
    """The tuned plans that requests may use.

    Args:
        pipe: the pipeline that is served.
        own: the feature that the server was started with, if any.
        embedded: whether the plans that ship are for this model.

    Attributes:
        families: the tuned plans that there are.
        names: of the plans that ship, as requests have them.
        feature: `_feature`, which answers the same wish with the same feature.
    """

    def __init__(self, pipe: Any, own: Any = None, embedded: bool = False) -> None:
        self._scheduler = type(getattr(pipe, "scheduler", None)).__name__
        self.families: list[PlanFamily] = []
        if isinstance(own, Reuse) and isinstance(found := own.object_of("plan"), PlanFamily):
            self.families.append(found)
        for name in shipped_families() if embedded else ():
            if isinstance(found := load_tuned(f"tuned:{name}"), PlanFamily):
                self.families.append(found)
        self.names = [f"tuned:{name}" for name in shipped()] if embedded else []
        self.feature = functools.lru_cache(REMEMBERED)(self._feature)

    def _feature(
        self,
        quality: str | None,
        text: str | None,
        speedup: float | None,
        min_psnr: float | None,
        scheduler: str | None,
    ) -> Reuse | None:
        """The feature that a request asks for; None for every step.

        Args:
            quality: low, medium, high or max.
            text: a plan by name, or its steps.
            speedup, min_psnr: which of the tuned plans.
            scheduler: of the request; None: the pipeline's own.

        Raises:
            ConfigurationError: there is no such plan, or several things are asked for.
        """
        asked = [name for name, value in (("quality", quality), ("reuse", text)) if value is not None]
        chosen = [name for name, value in (("speedup", speedup), ("min_psnr", min_psnr)) if value is not None]
        if len(asked) > 1 or (quality and chosen):
            raise ConfigurationError(f"{' and '.join(asked + chosen)} each choose a plan; give one of them")
        if quality == EVERY_STEP:
            return None
        if text is not None:
            return Reuse(plan=self._named(text), speedup=speedup, min_psnr=min_psnr)
        family = self._family(scheduler, (asked + chosen)[0])
        member = family.choose(speedup, min_psnr) if quality is None else _of_quality(family, quality)
        return Reuse(plan=member, stretch=True)

    def _named(self, text: str) -> str:
        if (is_tuned(text) and text not in self.names) or is_auto(text):
            allowed = ", ".join(["hold:2", "deepcache:3", "steps:…", *self.names])
            raise ConfigurationError(
                f"reuse must be a plan that the server knows by name, got {shown(text)}: {allowed}"
            )
        return text

    def find(self, scheduler: str | None) -> PlanFamily | None:
        """The tuned plans for a scheduler, the first of those that there are; None without any.

        Args:
            scheduler: a short name or a diffusers class; None: the pipeline's own.
        """
        wanted = self._class_of(scheduler)
        return next((one for one in self.families if one.conditions.get("scheduler") == wanted), None)

    def _class_of(self, scheduler: str | None) -> str:
        short = (scheduler or self._scheduler).partition(",")[0]
        return SCHEDULERS.get(short, (short,))[0]

    def _family(self, scheduler: str | None, what: str) -> PlanFamily:
        if (family := self.find(scheduler)) is not None:
            return family
        there = ", ".join(dict.fromkeys(str(family.conditions.get("scheduler")) for family in self.families))
        raise ConfigurationError(
            f"{what} needs tuned plans, and the server has none for {self._class_of(scheduler)} "
            f"({there or 'none at all'}); leave {what} out, or start the server with the file of a family that was "
            "tuned for it as its reuse"
        )


def _of_quality(family: PlanFamily, quality: str) -> TunedPlan:
    """The plan of that name; in a family of other names the nearest, the middle or the fastest one."""
    members: Sequence[TunedPlan] = family.members
    by_name = {plan.name: plan for plan in members if plan.name}
    place = {"high": 0, "medium": len(members) // 2, "low": -1}[quality]
    return by_name.get(QUALITIES[quality]) or members[place]
