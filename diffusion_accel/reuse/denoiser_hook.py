"""The hooks on the denoiser and on the ControlNet as wholes: they decide what a call does, and serve what is kept."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from diffusers.hooks import ModelHook
from torch import nn

from diffusion_accel.denoisers import (
    RESIDUAL_ARGUMENTS,
    latents_argument,
    latents_of,
    prediction,
    time_argument,
    with_prediction,
)
from diffusion_accel.hooks import as_given, bind_forward, model_of
from diffusion_accel.inside import calling
from diffusion_accel.snapshot import Snapshot

from . import branch_calls
from .call_arguments import Arguments
from .history import History
from .plan import FULL, Step
from .rows import can_stack, conditional_rows, stacked
from .state import DenoiserCall, FeatureCache, ReuseState, weighed

Named = dict[str, Any]  # the arguments of a denoiser by name


class DenoiserHook(ModelHook):
    """On the denoiser: decides what this call does; serves held predictions and those decoded ahead."""

    def __init__(self, state: ReuseState) -> None:
        super().__init__()
        self.state = state

    def new_forward(self, module: nn.Module, *args: object, **kwargs: object) -> Any:
        """What stands in the place of the denoiser's own forward."""
        output = self._served(module, args, bind_forward(module, args, kwargs))
        if self.state.family.calls:
            branch_calls.note(self.state, id(self), output)
        return output

    def _served(self, module: nn.Module, args: tuple[Any, ...], named: Named) -> Any:
        state, clock = self.state, self.state.clock
        features, step = self._find(named)
        state.note(step.mode)
        if state.family.calls and clock.call == 1 and step.guidance != "both":
            output = branch_calls.unconditional(state, id(self), features, step, named)
            if output is not None:
                return output
        if step.mode == "hold":
            return self._hold(features, step, state.time(clock.index), named)
        conditions = _conditions(named)
        if step.mode == "decoder" and clock.index in features.ready:
            output = self._decoded_ahead(features, conditions)
            if output is not None:
                return output
        return self._computed(module, args, named, conditions, features, step)

    def _find(self, named: Named) -> tuple[FeatureCache, Step]:
        """What is kept for this call, and what it does: everything if what is kept does not fit it."""
        state, clock, sample = self.state, self.state.clock, latents_of(named)
        slot, shape = (id(self), clock.call), (tuple(sample.shape), sample.dtype, sample.device)
        step = state.step_at(clock.index)
        if state.rows[0] != clock.segment:
            state.rows = (clock.segment, sample.shape[0])
        features = state.cache.get(slot)
        if features is None or features.segment != clock.segment or features.shape != shape:
            features = state.cache[slot] = FeatureCache(clock.segment, shape)
            return features, Step(guidance="none" if step.guidance == "none" else "both")
        if not features.guided and step.guidance != "none":
            step = FULL  # the unconditional branch was never computed: there is nothing to reuse
        return features, step

    def _hold(self, features: FeatureCache, step: Step, time: float, named: Named) -> Any:
        """The prediction of a step that computes nothing."""
        state = self.state
        space = step.space if step.fit is None else ""  # a fit acts on what the scheduler is given: `fitted_steps`
        value = features.histories["prediction", space].at(time, step.order, step.weights)
        if space:
            value = state.said.back(space, value, latents_of(named), time)
        if step.guidance == "none" and state.guidance_thinned(named):
            value = state.branches.joined(state.branches.conditional(value))
        state.counters["reused_steps"] += state.clock.first
        state.counters["hold_steps"] += state.clock.first
        return with_prediction(features.output, value)

    def _decoded_ahead(self, features: FeatureCache, conditions: Named) -> Any:
        """The prediction that was decoded ahead for this step; None if something was changed during the call."""
        state = self.state
        output = features.ready.pop(state.clock.index)
        if features.still_ready(conditions):
            state.counters["reused_steps"] += state.clock.first
            return output
        features.ready.clear()  # decode with what is there now
        state.thrown_away += 1
        state.batching &= state.thrown_away < 3  # it changes at every step
        return None

    # ------------------------------------------------------------------ computing
    def _computed(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        named: Named,
        conditions: Named,
        features: FeatureCache,
        step: Step,
    ) -> Any:
        state, index, given = self.state, self.state.clock.index, latents_of(named)
        half = step.guidance != "both" and state.guidance_thinned(named)
        if half:
            state.counters["unguided_steps"] += state.clock.first
            named = conditional_rows(named, given.shape[0], state.branches, state.unet)
        if step.mode == "full" and not half and not features.guided:
            features.histories.clear()  # there was no guidance before: nothing to forecast its branch from
        steps = state.group(index, step, features) if can_stack(named) else 1
        if step.mode == "full":
            features.ready, features.guided = {}, not half or step.guidance == "reuse"
        elif step.mode == "decoder":
            named.update({k: None for k in RESIDUAL_ARGUMENTS if k in named})
        times = [state.time(index + j) for j in range(steps)]
        orders = [state.step_at(index + j).order for j in range(steps)]
        call = DenoiserCall(state, features, step, times, orders, latents_of(named).shape[0], half)
        output = self._run(module, args, named, call)
        chunks = self._predictions(call, output, given)
        if steps == 1:
            return output if not half else with_prediction(output, chunks[0])
        features.conditions, features.model = Arguments(conditions), Snapshot(model_of(module))
        features.ready = {index + j: with_prediction(output, chunk) for j, chunk in enumerate(chunks)}
        return features.ready.pop(index)

    def _run(self, module: nn.Module, args: tuple[Any, ...], named: Named, call: DenoiserCall) -> Any:
        """Call the denoiser; the hooks on its parts look at `call` meanwhile."""
        state = self.state
        state.current = call
        if call.steps > 1:
            named = stacked(named, call.steps, state.clock.upcoming(call.steps))
        try:
            positional, keywords = as_given(module, args, named)
            with calling(model_of(module), call) if state.kinds.inside else nullcontext():
                output = self.fn_ref.original_forward(*positional, **keywords)
            call.keep_left()
        finally:
            state.current = None
        state.count(call.step, call.steps)
        return output

    def _predictions(self, call: DenoiserCall, output: Any, given: torch.Tensor) -> list[torch.Tensor]:
        """The predictions of a call, one a step, with both branches of guidance; what a full step left is kept."""
        state, features = self.state, call.features
        chunks = list(prediction(output).chunk(call.steps)) if call.steps > 1 else [prediction(output)]
        if call.half or (state.plan_kinds.reuses_guidance and not state.family.calls):
            chunks = [self._with_guidance(call, chunk, time) for chunk, time in zip(chunks, call.times, strict=True)]
        if call.full:
            state.keep_prediction(features, chunks[0], given, call.times[0])
            if call.step.guidance != "none":
                state.keep_conditional(chunks[0])
            features.output = output
            state.note_peak()
        return chunks

    def _with_guidance(self, call: DenoiserCall, value: torch.Tensor, time: float) -> torch.Tensor:
        """Both branches of a prediction: keeps their difference where both were computed, or adds it again."""
        order = self.state.plan_kinds.highest_order
        history = call.features.histories.setdefault("guidance", History(order + 1))
        if not call.half:
            if value.shape[0] % 2 == 0:
                history.push(time, self.state.branches.difference(value))
            return value
        if call.step.guidance == "none" or not len(history):
            return self.state.branches.joined(value)
        difference = history.at(time, call.step.order)
        return self.state.branches.joined(value, weighed(difference, call.step))


class ControlNetHook(ModelHook):
    """On the ControlNet: runs it at full steps and hands out its last residuals at the others."""

    def __init__(self, state: ReuseState) -> None:
        super().__init__()
        self.state = state
        self._kept: dict[int, tuple[Any, Any]] = {}

    def new_forward(self, module: nn.Module, *args: object, **kwargs: object) -> Any:
        """What stands in the place of the ControlNet's own forward."""
        state, clock = self.state, self.state.clock
        sample = latents_of(bind_forward(module, args, kwargs))
        here = (clock.segment, tuple(sample.shape), sample.dtype, sample.device)
        kept = self._kept.get(clock.call)
        if not state.follow().is_full(clock.index) and kept is not None and kept[0] == here:
            state.counters["controlnet_skipped"] += 1
            return kept[1]
        self._kept.pop(clock.call, None)
        output = self.fn_ref.original_forward(*args, **kwargs)
        state.counters["controlnet_runs"] += 1
        self._kept[clock.call] = (here, output)
        return output


def _conditions(named: Named) -> Named:
    """What a prediction decoded ahead depends on: the arguments other than latents, timestep and residuals."""
    moving = {latents_argument(named), time_argument(named), *RESIDUAL_ARGUMENTS}
    return {k: v for k, v in named.items() if k not in moving}
