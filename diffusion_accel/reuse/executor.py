"""The executor of reuse plans: hooks that run, skip, batch or forecast the parts of a denoiser for one pipeline call.

This module holds what every kind of denoiser shares: which step does what, the kept values, held predictions and the
reused guidance. `unet_hooks` and `block_hooks` skip the parts of U-Nets and of transformers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.hooks import ModelHook
from torch import nn

from diffusion_accel.denoisers import (
    RESIDUAL_ARGUMENTS,
    Branches,
    called_denoisers,
    family_of,
    find_controlnet,
    find_denoisers,
    guided,
    no_branches,
    not_a_unet,
    prediction,
    rows_are_independent,
    time_argument,
    with_prediction,
)
from diffusion_accel.errors import ConfigurationError
from diffusion_accel.hooks import HookSet, as_given, bind_forward, map_tensors, model_of, tensor_bytes, tensors_in
from diffusion_accel.prediction import Conversion
from diffusion_accel.steps import StepClock

from .history import History
from .plan import FULL, Plan, Step
from .snapshot import Arguments, Snapshot

logger = logging.getLogger(__name__)


@dataclass
class Features:
    """What the last full steps left for the steps after them.

    Attributes:
        segment, shape: for which pass over the timesteps and which input shape the features are valid.
        histories: by what they are of: ("prediction", space), "guidance" (unconditional minus conditional prediction),
            and the keys that the hooks on parts of the denoiser use.
        outlines: shapes of the outputs of parts that may be skipped, with the number of rows they were made with.
        output: what the denoiser returned last, to return the same kind.
        ready: predictions decoded ahead, by step index.
        conditions, model: what `ready` was decoded with: the arguments other than latents and timestep, the denoiser.
        guided: whether the values kept have both branches of the guidance.
    """

    segment: int
    shape: tuple[Any, ...]
    histories: dict[Any, History] = field(default_factory=dict)
    outlines: dict[Any, tuple[int, Any]] = field(default_factory=dict)
    output: Any = None
    ready: dict[int, Any] = field(default_factory=dict)
    conditions: Arguments | None = None
    model: Snapshot | None = None
    guided: bool = True

    def still_ready(self, conditions: dict[str, Any]) -> bool:
        """Whether what was decoded ahead is what would be decoded now."""
        return bool(self.conditions and self.model and self.conditions.same(conditions) and self.model.holds())

    def bytes(self) -> int:
        return tensor_bytes([value for history in self.histories.values() for value in history.values])


@dataclass
class Pass:
    """One call of the denoiser.

    Attributes:
        step: what it does.
        times, orders: of the steps whose predictions it makes: its own, and those that a decoder decodes ahead.
        rows: rows of one step's batch.
        half: whether it has the conditional half of the rows only.
        branches: of the guidance, in the batch.
    """

    features: Features
    step: Step
    times: list[float]
    orders: list[int]
    rows: int
    half: bool
    branches: Branches = field(default_factory=Branches)
    widths: dict[int, int] = field(default_factory=dict)  # channels of a U-Net's skip connections
    added: dict[Any, Any] = field(default_factory=dict)  # by a transformer's inner blocks, by (depth, list)
    entered: set[Any] = field(default_factory=set)  # which of these sums a shallow step has added

    @property
    def full(self) -> bool:
        return self.step.mode == "full"

    @property
    def steps(self) -> int:
        return len(self.times)

    def keep(self, key: Any, size: int, value: Any) -> None:
        """Keep a value of a full step, with rows for both branches, for forecasts from `size` values."""
        history = self.features.histories.setdefault(key, History(size))
        if self.half:
            before = history.at(self.times[0], self.step.order) if len(history) else None
            value = self._both(value, None if self.step.guidance == "none" else before)
        history.push(self.times[0], value)

    def recall(self, key: Any) -> Any:
        """The kept value at the times of this pass, for its rows, one step after the other."""
        history = self.features.histories[key]
        values = [history.at(time, order) for time, order in zip(self.times, self.orders, strict=True)]
        if self.half:
            values = [map_tensors(self.branches.conditional, value) for value in values]
        if len(values) == 1:
            return values[0]
        parts = [iter(tensors_in(value)) for value in values]
        return map_tensors(lambda _: torch.cat([next(part) for part in parts]), values[0])

    def _both(self, value: Any, before: Any) -> Any:
        """Both branches of a value of which the conditional one is known; their difference is that of `before`."""
        if before is None:
            return map_tensors(self.branches.joined, value)
        differences = iter([self.branches.difference(t) for t in tensors_in(before)])
        return map_tensors(lambda tensor: self.branches.joined(tensor, next(differences)), value)


class ReuseRun:
    """A plan during one call of a pipeline.

    `kinds` has a step of every kind that the plans of `plan_for(number of steps)` may have: the hooks and the sizes of
    the histories follow from it before the number of steps is known.
    """

    def __init__(
        self,
        name: str,
        pipeline: Any,
        clock: StepClock,
        counters: dict[str, float],
        kinds: Plan,
        plan_for: Callable[[int], Plan],
        batch_decoder: bool = True,
        max_group_mb: int = 1024,
    ) -> None:
        self.name = name
        self.pipeline = pipeline
        self.clock = clock
        self.counters = counters
        self.kinds = kinds
        self.plan_for = plan_for
        self.max_group_mb = max_group_mb
        denoisers = find_denoisers(pipeline)
        self.controlnet = find_controlnet(pipeline)
        self.unet = all(not_a_unet(denoiser) is None for denoiser in denoisers)
        self.batching = batch_decoder and self.unet and all(map(rows_are_independent, denoisers))
        self.branch: dict[Any, tuple[Any, Any]] = {}  # by the same: when and what the last call returned
        self.thrown_away = 0  # times that predictions decoded ahead were of no use
        self.current: Pass | None = None
        self.cache: dict[Any, Features] = {}  # by the denoiser and the number of its call within a step
        self.plan = Plan((FULL,))
        self._segment = -1
        self.family = family_of(pipeline)
        self.branches = self.family.branches or Branches()
        self.conversion = Conversion(clock.scheduler)
        self.hooks = HookSet(f"diffusion_accel.{name}")
        names = ("encoder_runs", "decoder_runs", "decoder_steps", "full_steps", "reused_steps", "peak_cache_bytes")
        counters.update(dict.fromkeys(names, 0))
        if self.controlnet is not None:
            counters.update(controlnet_runs=0, controlnet_skipped=0)

    def install(self) -> None:
        """Put the hooks on the denoisers, on their parts that the plan skips or keeps, and on the ControlNet."""
        if self.unet:
            from .unet_hooks import install_parts
        else:
            from .block_hooks import install_parts
        for denoiser in called_denoisers(self.pipeline):
            install_parts(self, model_of(denoiser))
            self.hooks.add(denoiser, DenoiserHook(self))
        if self.controlnet is not None:
            self.hooks.add(self.controlnet, ControlNetHook(self))

    def uninstall(self) -> None:
        """Remove the hooks and free every kept tensor."""
        self.hooks.remove()
        planned = any(step.mode != "full" for step in self.plan.steps)
        if (
            planned
            and self.counters["decoder_runs"] > 2
            and not self.counters["reused_steps"]
            and self.clock.steps != 1
        ):
            cause = "calls its denoiser in a way that cannot be followed (each call counts as a first one)"
            if len(called_denoisers(self.pipeline)) > 1:
                cause = "has two denoisers, and the first step of each is computed: use more steps"
            logger.warning(
                "%s: every step was computed, none was reused: %s %s", self.name, type(self.pipeline).__name__, cause
            )
        self.cache.clear()
        self.branch.clear()
        self.current = None

    # ------------------------------------------------------------------ the plan
    def follow(self) -> Plan:
        """The plan of the current segment."""
        if self._segment != self.clock.segment:
            self._segment = self.clock.segment
            self.plan = self.plan_for(self.clock.total)
            for step in self.plan.steps:
                if step.mode in ("shallow", "hold"):
                    self.counters.setdefault(f"{step.mode}_steps", 0)
                if step.guidance != "both":
                    self.counters.setdefault("unguided_steps", 0)
        return self.plan

    def step_at(self, index: int) -> Step:
        plan = self.follow()
        return plan.steps[index] if index < len(plan) else FULL

    def time(self, index: int) -> float:
        return self.clock.timesteps[index] if index < len(self.clock.timesteps) else float(index)

    def group(self, index: int, step: Step, features: Features) -> int:
        """How many steps the decoder serves in one batch from step `index` on."""
        if not self.batching or not self.clock.exact or step.mode not in ("full", "decoder"):
            return 1
        steps, end = self.plan.steps, index + 1
        while end < min(self.clock.total, len(steps)) and steps[end].mode == "decoder":
            if steps[end].guidance != step.guidance:
                break
            end += 1
        size = tensor_bytes([h.values[0] for key, h in features.histories.items() if isinstance(key, int) and len(h)])
        if not size:  # a first key step: decode it alone, then its features' size is known
            return 1
        return max(1, min(end - index, int(self.max_group_mb * 2**20 // size)))

    def halved(self, named: dict[str, Any]) -> bool:
        """Whether the rows of this call are both branches of guidance, of which one may be left out.

        Further calls at a step (SD 3's skipped layers) have the conditional rows only.

        Raises:
            ConfigurationError: there is guidance, but its branches are not the two halves of a batch.
        """
        if self.family.calls or (self.clock.call and not self.family.views):
            return False
        if self.family.branches is not None and not guided(self.pipeline, self.clock.arguments):
            return False
        reason = no_branches(self.pipeline)
        if reason is None and _sample(named).shape[0] % 2:
            reason = f"it calls its denoiser with {_sample(named).shape[0]} rows; use guidance=both"
        if reason:
            raise ConfigurationError(
                f"guidance cannot be left out at some steps of {type(self.pipeline).__name__}: {reason}"
            )
        return True


class DenoiserHook(ModelHook):
    """On the denoiser: decides what this call does; serves held predictions and those decoded ahead."""

    def __init__(self, run: ReuseRun) -> None:
        super().__init__()
        self.run = run

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output = self._served(module, args, bind_forward(module, args, kwargs))
        if self.run.family.calls:
            self._note_branch(output)
        return output

    def _served(self, module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        run, clock = self.run, self.run.clock
        slot, index = (id(self), clock.call), clock.index
        sample = _sample(named)
        shape = (tuple(sample.shape), sample.dtype, sample.device)
        step = run.step_at(index)
        features = run.cache.get(slot)
        if features is None or features.segment != clock.segment or features.shape != shape:
            features = run.cache[slot] = Features(clock.segment, shape)
            step = Step(guidance="none" if step.guidance == "none" else "both")
        elif not features.guided and step.guidance != "none":
            step = FULL  # the unconditional branch was never computed: there is nothing to reuse
        if run.family.calls and clock.call == 1 and step.guidance != "both":
            output = self._unconditional(features, step, named)
            if output is not None:
                return output
        if step.mode == "hold":
            return self._hold(features, step, run.time(index), named)
        given = _sample(named)
        moving = {"sample", "hidden_states", time_argument(named), *RESIDUAL_ARGUMENTS}
        conditions = {k: v for k, v in named.items() if k not in moving}
        if step.mode == "decoder" and index in features.ready:
            output = features.ready.pop(index)
            if features.still_ready(conditions):
                run.counters["reused_steps"] += clock.first
                return output
            features.ready.clear()  # something was changed during the call: decode with what is there now
            run.thrown_away += 1
            run.batching &= run.thrown_away < 3  # it changes at every step
        half = step.guidance != "both" and run.halved(named)
        if half:
            run.counters["unguided_steps"] += clock.first
            named = _conditional_rows(named, sample.shape[0], run.branches, run.unet)
        if step.mode == "full" and not half and not features.guided:
            features.histories.clear()  # there was no guidance before: nothing to forecast its branch from
        steps = run.group(index, step, features) if _can_stack(named) else 1
        if step.mode == "full":
            features.ready, features.guided = {}, not half or step.guidance == "reuse"
        elif step.mode == "decoder":
            named.update({k: None for k in RESIDUAL_ARGUMENTS if k in named})
        times = [run.time(index + j) for j in range(steps)]
        orders = [run.step_at(index + j).order for j in range(steps)]
        run.current = current = Pass(features, step, times, orders, _sample(named).shape[0], half, run.branches)
        if steps > 1:
            named = _stacked(named, steps, clock.upcoming(steps))
        try:
            positional, keywords = as_given(module, args, named)
            output = self.fn_ref.original_forward(*positional, **keywords)
        finally:
            run.current = None
        for (depth, group), sums in current.added.items():
            current.keep(("added", depth, group), run.kinds.orders("shallow", depth) + 1, sums.total())
        self._count(features, step, steps)
        chunks = list(prediction(output).chunk(steps)) if steps > 1 else [prediction(output)]
        if half or (run.plan.reuses_guidance and not run.family.calls):
            chunks = [self._with_guidance(current, chunk, time) for chunk, time in zip(chunks, times, strict=True)]
        if step.mode == "full":
            self._keep_prediction(features, chunks[0], given, times[0])
            features.output = output
            held = sum(f.bytes() for f in run.cache.values())
            run.counters["peak_cache_bytes"] = max(run.counters["peak_cache_bytes"], held)
        if steps == 1:
            return output if not half else with_prediction(output, chunks[0])
        features.conditions, features.model = Arguments(conditions), Snapshot(model_of(module))
        features.ready = {index + j: with_prediction(output, chunk) for j, chunk in enumerate(chunks)}
        return features.ready.pop(index)

    def _hold(self, features: Features, step: Step, time: float, named: dict[str, Any]) -> Any:
        value = features.histories["prediction", step.space].at(time, step.order, step.weights)
        if step.space:
            value = self.run.conversion.back(step.space, value, _sample(named), time)
        if step.guidance == "none" and self.run.halved(named):
            value = self.run.branches.joined(self.run.branches.conditional(value))
        self.run.counters["reused_steps"] += self.run.clock.first
        self.run.counters["hold_steps"] += self.run.clock.first
        return with_prediction(features.output, value)

    def _note_branch(self, output: Any) -> None:
        """Keep what a call for one branch returned; where both were computed, keep their difference as well."""
        run, clock = self.run, self.run.clock
        here = (clock.segment, clock.index)
        run.branch[id(self), clock.call] = (here, output)
        step = run.step_at(clock.index)
        features = run.cache[id(self), clock.call]
        if clock.call != 1 or not run.plan.reuses_guidance or step.guidance != "both" or step.mode == "hold":
            return
        there, conditional = run.branch[id(self), 0]
        if there == here:
            history = features.histories.setdefault("guidance", History(run.plan.highest_order + 1))
            history.push(run.time(clock.index), prediction(output) - prediction(conditional))

    def _unconditional(self, features: Features, step: Step, named: dict[str, Any]) -> Any:
        """The unconditional branch of a step that leaves it out; None if it must be computed all the same."""
        run, clock = self.run, self.run.clock
        there, conditional = run.branch.get((id(self), 0), (None, None))
        history, time = features.histories.get("guidance"), run.time(clock.index)
        if there != (clock.segment, clock.index):
            return None
        if step.guidance == "none":
            run.counters["unguided_steps"] += 1
            features.guided = False
            return conditional
        if step.mode == "hold" or history is None:
            return None
        run.counters["unguided_steps"] += 1
        value = prediction(conditional) + history.at(time, step.order)
        if step.mode == "full":
            self._keep_prediction(features, value, _sample(named), time)
        return with_prediction(conditional, value)

    def _keep_prediction(self, features: Features, value: torch.Tensor, given: torch.Tensor, time: float) -> None:
        """Keep what a full step predicted, in every space in which a held step wants it."""
        run = self.run
        for space, order in run.kinds.spaces.items():
            meant = run.conversion.to(space, value, given, time) if space else value
            features.histories.setdefault(("prediction", space), History(order + 1)).push(time, meant)

    def _with_guidance(self, current: Pass, value: torch.Tensor, time: float) -> torch.Tensor:
        """Both branches of a prediction: keeps their difference where both were computed, or adds it again."""
        order = self.run.plan.highest_order
        history = current.features.histories.setdefault("guidance", History(order + 1))
        if not current.half:
            if value.shape[0] % 2 == 0:
                history.push(time, current.branches.difference(value))
            return value
        if current.step.guidance == "none" or not len(history):
            return current.branches.joined(value)
        return current.branches.joined(value, history.at(time, current.step.order))

    def _count(self, features: Features, step: Step, steps: int) -> None:
        counters, first = self.run.counters, self.run.clock.first
        if step.mode in ("full", "decoder"):
            counters["encoder_runs"] += step.mode == "full"
            counters["decoder_runs"] += 1
            counters["decoder_steps"] += steps if first else 0
        else:
            counters[f"{step.mode}_steps"] += first
        counters["full_steps" if step.mode == "full" else "reused_steps"] += first


class ControlNetHook(ModelHook):
    """On the ControlNet: runs it at full steps and hands out its last residuals at the others."""

    def __init__(self, run: ReuseRun) -> None:
        super().__init__()
        self.run = run
        self._kept: dict[int, tuple[Any, Any]] = {}

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        run, clock = self.run, self.run.clock
        sample = _sample(bind_forward(module, args, kwargs))
        state = (clock.segment, tuple(sample.shape), sample.dtype, sample.device)
        kept = self._kept.get(clock.call)
        if not run.follow().is_full(clock.index) and kept is not None and kept[0] == state:
            run.counters["controlnet_skipped"] += 1
            return kept[1]
        self._kept.pop(clock.call, None)
        output = self.fn_ref.original_forward(*args, **kwargs)
        run.counters["controlnet_runs"] += 1
        self._kept[clock.call] = (state, output)
        return output


# ---------------------------------------------------------------------- rows
def _sample(named: dict[str, Any]) -> torch.Tensor:
    return named["sample"] if "sample" in named else named["hidden_states"]


def _can_stack(named: dict[str, Any]) -> bool:
    """Whether the rows of several steps can share a batch (per-call attention inputs may refer to row numbers)."""
    attention = named.get("cross_attention_kwargs") or {}
    return set(attention) <= {"scale", "ip_adapter_masks"} and _sample(named).shape[0] > 0


def _stacked(named: dict[str, Any], steps: int, timesteps: torch.Tensor) -> dict[str, Any]:
    """The U-Net's arguments for `steps` steps at once: rows of the first step, then of the second, …"""
    batch = named["sample"].shape[0]

    def repeat(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.dim() or tensor.shape[0] % batch:
            return tensor
        return tensor.repeat(steps, *([1] * (tensor.dim() - 1)))

    kept = {"timestep", "cross_attention_kwargs", *RESIDUAL_ARGUMENTS}
    stacked = {k: v if k in kept else map_tensors(repeat, v) for k, v in named.items()}
    stacked["timestep"] = timesteps.to(named["sample"].device).repeat_interleave(batch)
    return stacked


# Arguments without a row for each sample, whatever their first dimension is.
_NOT_ROWS = frozenset({"image_rotary_emb", "rotary_embedding", "img_ids", "txt_ids", "position_ids"})


def _conditional_rows(named: dict[str, Any], rows: int, branches: Branches, frames: bool) -> dict[str, Any]:
    """The denoiser's arguments for the conditional half of its rows; with `frames` also where a row has several."""

    def half(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.dim() or (tensor.shape[0] % rows if frames else tensor.shape[0] != rows):
            return tensor
        return branches.conditional(tensor)

    def cut(name: str, value: Any) -> Any:
        if name in _NOT_ROWS:
            return value
        if name == "cross_attention_kwargs":  # only GLIGEN's have rows
            return {k: map_tensors(half, v) if k == "gligen" else v for k, v in value.items()} if value else value
        return map_tensors(half, value)

    return {name: cut(name, value) for name, value in named.items()}
