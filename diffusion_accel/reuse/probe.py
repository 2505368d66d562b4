"""A call repeated with other plans, to see how near its last latents come to those of the call itself."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from diffusion_accel.changes import Changes
from diffusion_accel.denoisers import called_denoisers, find_controlnet
from diffusion_accel.steps import StepClock

from .auto import MOST_NEAR, Candidate
from .executor import ReuseRun
from .plan import Plan
from .preset import Preset

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Family = Callable[[int], Plan | None]  # the plan that computes every so many-th step, or as many
CALLBACKS = ("callback", "callback_on_step_end")
SAME = 60.0  # dB below the variance; what is nearer is the same but for rounding
FIRST = 3  # steps for a full one, at which families are compared
OTHERS = (2, 4, 6)  # at which the best one is tried as well
PRESETS = (("", 1), ("", 2), ("sample", 1), ("epsilon", 0))  # spaces and orders of hold, each the best one somewhere


class Probe:
    """Repeats a call of a pipeline, from the same noise; made before that call.

    No other feature acts in what is repeated, callbacks are not called, and nothing is decoded where a pipeline can
    leave its latents as they are.
    """

    def __init__(self, pipe: DiffusionPipeline, arguments: dict[str, Any]) -> None:
        self.pipe = pipe
        self._watched = any(arguments.get(name) is not None for name in CALLBACKS)
        arguments = {k: v for k, v in arguments.items() if k != "kwargs"} | (arguments.get("kwargs") or {})
        self.arguments = {k: None if k in CALLBACKS else v for k, v in arguments.items() if k != "self"}
        if "output_type" in arguments:
            self.arguments["output_type"] = "latent"
        self._global = torch.random.get_rng_state()
        self._states = [(g.device, g.get_state()) for g in _generators(arguments)]

    def latents(self, plan: Plan | None, **changes: Any) -> torch.Tensor | None:
        """The last latents of the call by a plan; None: every step in full, with `changes` of the arguments."""
        clock, found = StepClock(self.pipe, self.arguments), list[torch.Tensor]()

        def keep(sample: torch.Tensor) -> torch.Tensor:
            found[:] = [sample]
            return sample

        clock.on_step(after=keep)
        with torch.random.fork_rng(), Changes() as changed:
            torch.random.set_rng_state(self._global)
            changed.set(self.pipe, "progress_bar", functools.partial(tqdm, disable=True))
            if plan is not None:
                run = ReuseRun("reuse", self.pipe, clock, {}, plan.kinds(), lambda _total: plan)
                changed.add(run.uninstall)
                run.install()
            changed.add(clock.changes.undo)
            changed.add(clock.stop)
            controlnet = find_controlnet(self.pipe)
            clock.start(called_denoisers(self.pipe), () if controlnet is None else (controlnet,))
            type(self.pipe)._accelerated_base.__call__(self.pipe, **self.arguments | self._same_noise() | changes)
        return found[0] if found else None

    def _same_noise(self) -> dict[str, Any]:
        given = self.arguments.get("generator")
        made = [torch.Generator(device).set_state(state) for device, state in self._states]
        return {"generator": made if isinstance(given, list) else made[0]} if made else {}

    def altered(self, reference: torch.Tensor) -> bool:
        """Whether callbacks, which are not called when it is repeated, changed the last latents of the call."""
        return self._watched and nearness(reference, self.latents(None)) < SAME

    # ------------------------------------------------------------------ a search
    def candidates(self, reference: torch.Tensor, total: int, searched: Family) -> tuple[Candidate, ...]:
        """The plans of the best family, the slowest first; none if fewer steps come as near.

        Args:
            reference: the last latents of the call itself.
            total: its steps.
            searched: a family that was found for it.
        """
        families = [searched, *(_preset(total, space, order) for space, order in PRESETS)]
        first = [(self._tried(family(FIRST), reference), family) for family in families]
        tried = [(one, family) for one, family in first if one is not None]
        best, family = max(tried, key=lambda pair: pair[0].nearness)
        if self._fewer(total, reference) >= best.nearness:
            return ()
        found = [best]
        found += filter(None, (self._tried(family(n), reference) for n in OTHERS if n <= total // 2))
        return tuple(sorted(found, key=lambda one: one.speedup))

    def _tried(self, plan: Plan | None, reference: torch.Tensor) -> Candidate | None:
        if plan is None:
            return None
        return Candidate(nearness(reference, self.latents(plan)), plan)

    def _fewer(self, total: int, reference: torch.Tensor) -> float:
        """How near as many plain steps come as a plan at `FIRST` computes."""
        if "num_inference_steps" not in self.arguments:
            return -math.inf
        asked = self.arguments["num_inference_steps"] or total
        return nearness(reference, self.latents(None, num_inference_steps=max(1, -(-int(asked) // FIRST))))


def _preset(total: int, space: str, order: int) -> Family:
    return lambda interval: Preset("hold", interval, order=order, space=space).for_steps(total)


def nearness(reference: torch.Tensor, latents: torch.Tensor | None) -> float:
    """How far below the variance of the reference the squared error is, of the worst image, in dB."""
    if latents is None or latents.shape != reference.shape or not bool(latents.isfinite().all()):
        return -MOST_NEAR
    a, b = (x.detach().double().flatten(1) for x in (reference, latents))
    ratio = (a - b).square().mean(1) / a.var(1).clamp(min=1e-12)
    return min(MOST_NEAR, -10 * math.log10(max(float(ratio.max()), 1e-15)))


def _generators(arguments: dict[str, Any]) -> Iterator[torch.Generator]:
    given = arguments.get("generator")
    for one in given if isinstance(given, list) else [given]:
        if isinstance(one, torch.Generator):
            yield one
