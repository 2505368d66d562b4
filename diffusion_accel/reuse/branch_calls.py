"""Guidance whose branches are two calls of the denoiser at a step: the conditional one, then the unconditional one."""

from __future__ import annotations

from typing import Any

from diffusion_accel.denoisers import latents_of, prediction, with_prediction

from .history import History
from .plan import Step
from .state import FeatureCache, ReuseState, weighed


def note(state: ReuseState, hook: int, output: Any) -> None:
    """Keep what a call for one branch returned; where both were computed, keep their difference, or the
    conditional one, if the plan needs it.

    Args:
        state: of the running pipeline call.
        hook: the id of the denoiser's hook.
        output: what the denoiser returned.
    """
    clock = state.clock
    here = (clock.segment, clock.index)
    state.branch[hook, clock.call] = (here, output)
    step = state.step_at(clock.index)
    features = state.cache[hook, clock.call]
    kinds = state.plan_kinds
    if clock.call != 1 or not kinds.parts_branches or step.guidance == "none" or step.mode == "hold":
        return
    there, conditional = state.branch[hook, 0]
    if there != here:
        return
    if kinds.reuses_guidance and step.guidance == "both":
        history = features.histories.setdefault("guidance", History(kinds.highest_order + 1))
        history.push(state.time(clock.index), prediction(output) - prediction(conditional))
    if kinds.needs_additions and step.mode == "full":
        state.conditional = (here, prediction(conditional))


def unconditional(state: ReuseState, hook: int, features: FeatureCache, step: Step, named: dict[str, Any]) -> Any:
    """The unconditional branch of a step that leaves it out; None if it must be computed all the same."""
    clock = state.clock
    there, conditional = state.branch.get((hook, 0), (None, None))
    history, time = features.histories.get("guidance"), state.time(clock.index)
    if there != (clock.segment, clock.index):
        return None
    if step.guidance == "none":
        state.counters["unguided_steps"] += 1
        features.guided = False
        return conditional
    if step.mode == "hold" or history is None:
        return None
    state.counters["unguided_steps"] += 1
    value = prediction(conditional) + weighed(history.at(time, step.order), step)
    if step.mode == "full":
        state.keep_prediction(features, value, latents_of(named), time)
    return with_prediction(conditional, value)
