"""What the hooks of one pipeline call share: which step does what, what is kept, which call of the denoiser runs.

Nothing here is a hook: `denoiser_hook`, `unet_hooks` and `block_hooks` stand on it, `executor` puts them in force.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from diffusion_accel.denoisers import (
    Branches,
    family_of,
    find_denoisers,
    guided,
    latents_of,
    no_branches,
    not_a_unet,
    rows_are_independent,
)
from diffusion_accel.errors import ConfigurationError
from diffusion_accel.hooks import HookSet, map_tensors, tensor_bytes, tensors_in
from diffusion_accel.inside import CallInside
from diffusion_accel.prediction import Conversion
from diffusion_accel.snapshot import Snapshot
from diffusion_accel.steps import StepClock

from .call_arguments import Arguments
from .history import GivenStep, History
from .plan import FULL, Kinds, Plan, Step

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass
class FeatureCache:
    """What the last full steps left for the steps after them.

    Attributes:
        segment, shape: for which pass over the timesteps and which input shape the features are valid.
        histories: by what they are of: ("prediction", space), "guidance" (unconditional minus conditional prediction),
            and what the hooks on parts of the denoiser keep: ("decoder", up block) and ("shallow", depth, …).
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
        """What the kept values hold."""
        return tensor_bytes([value for history in self.histories.values() for value in history.values])


class DenoiserCall(CallInside):
    """One call of the denoiser. The hooks on its parts read what is `given`, leave what they want to be kept and
    whatever shapes the steps after it need, and look at nothing else that changes from call to call.

    Attributes:
        step: what it does.
        times, orders: of the steps whose predictions it makes: its own, and those that a decoder decodes ahead.
        rows: rows of one step's batch.
        half: whether it has the conditional half of the rows only.
        given: at a step that reuses features, those at the times of the call, for its rows: by key one for each step,
            or a single one if they are all the same.
        left: "kept" features by key, "outlines" as in `FeatureCache`.
        widths: channels of a U-Net's skip connections, by number.
        added: by a transformer's inner blocks, by (depth, list).
        entered: which of these sums a shallow step has added.
    """

    def __init__(
        self,
        state: ReuseState,
        features: FeatureCache,
        step: Step,
        times: list[float],
        orders: list[int],
        rows: int,
        half: bool,
    ) -> None:
        self.state, self.features, self.step = state, features, step
        self.times, self.orders, self.rows, self.half = times, orders, rows, half
        kinds = state.kinds
        hooks = f"{sorted(kinds.depths)} {kinds.orders('decoder') >= 0}"
        forecast = self.full and any(orders) and self.steps > 1
        signature = None if forecast else f"{step.mode}:{step.depth}*{self.steps} of {hooks}"
        read = {"decoder": ("decoder",), "shallow": ("shallow", step.depth)}.get(step.mode)
        given = {key: self._forecast(history) for key, history in features.histories.items() if _is_of(key, read)}
        super().__init__(state.hooks.name, signature, given)

    @property
    def full(self) -> bool:
        """Whether it computes everything."""
        return self.step.mode == "full"

    @property
    def steps(self) -> int:
        """For how many steps it makes predictions."""
        return len(self.times)

    def start(self, given: Any) -> None:
        """The denoiser's forward begins."""
        super().start(given)
        self.left = {"kept": {}, "outlines": {}}
        self.widths: dict[int, int] = {}
        self.added: dict[Any, Any] = {}
        self.entered: set[Any] = set()

    def finish(self) -> Any:
        """What it left, with the sums of what blocks added."""
        for key, sums in self.added.items():
            self.left["kept"]["shallow", *key] = sums.total()
        self.added = {}
        return self.left

    def keep(self, key: Hashable, value: Any) -> None:
        """Keep a value of a full step."""
        self.left["kept"][key] = value

    def recall(self, key: Hashable) -> Any:
        """The kept value at the times of this call, for its rows, one step after the other."""
        if not self.full:
            values = self.given[key]
        elif any(self.orders):
            values = self._forecast(self._history(key))
        else:
            values = [self.left["kept"][key]]
        if self.steps == 1:
            return values[0]
        parts = [iter(tensors_in(value)) for value in (values if len(values) > 1 else values * self.steps)]
        return map_tensors(lambda _: torch.cat([next(part) for part in parts]), values[0])

    def keep_left(self) -> None:
        """Put what was left where the steps after this one find it."""
        left = self.finish()
        for key in left["kept"]:
            self.features.histories[key] = self._history(key)
        self.features.outlines.update(left["outlines"])

    def _forecast(self, history: History) -> list[Any]:
        """What was kept, at the times of this call and for its rows; only one where all are the same."""
        values = [history.at(time, order) for time, order in zip(self.times, self.orders, strict=True)]
        if all(value is values[0] for value in values):
            values = values[:1]
        return [map_tensors(self.state.branches.conditional, value) for value in values] if self.half else values

    def _history(self, key: Any) -> History:
        """What is kept under a key and what this call left there, with rows for both branches."""
        kinds, value = self.state.kinds, self.left["kept"][key]
        size = kinds.orders("decoder") if key[0] == "decoder" else kinds.orders("shallow", key[1])
        history = self.features.histories.get(key, History(size + 1))
        if self.half:
            known = len(history) and self.step.guidance != "none"
            before = history.at(self.times[0], self.step.order) if known else None
            value = self._both(value, before)
        return history.and_then(self.times[0], value)

    def _both(self, value: Any, before: Any) -> Any:
        """Both branches of a value of which the conditional one is known; their difference is that of `before`."""
        branches = self.state.branches
        if before is None:
            return map_tensors(branches.joined, value)
        differences = iter([branches.difference(t) for t in tensors_in(before)])
        return map_tensors(lambda tensor: branches.joined(tensor, next(differences)), value)


def _is_of(key: Any, kind: tuple[Any, ...] | None) -> bool:
    """Whether a key of what is kept begins like this."""
    return kind is not None and isinstance(key, tuple) and key[: len(kind)] == kind


def weighed(difference: torch.Tensor, step: Step) -> torch.Tensor:
    """The difference of the branches of guidance as a step reuses it."""
    return difference if step.guidance_weight == 1 else difference * step.guidance_weight


class ReuseState:
    """A plan during one call of a pipeline.

    Attributes:
        kinds: a step of every kind that the plans of `plan_for(number of steps)` may have: the hooks and the sizes of
            the histories follow from it before the number of steps is known.
        batching: whether the decoder may serve several steps in one batch.
        unet: whether the denoisers are U-Nets.
        cache: by the denoiser's hook and the number of its call within a step.
        branch: by the same: when and what the last call returned, where each branch of guidance is a call.
        given: what the scheduler was given at the last full steps, the newest first, if a step has a fit.
        conditional: the conditional prediction of a full step, and of which one, if a fit needs it.
        current: the call of the denoiser that runs, None in between.
        rows: of the first call of the denoiser in a segment: in which one, and how many.
        thrown_away: times that predictions decoded ahead were of no use.
        conversion, said: of what the scheduler is given, and of what the denoiser says.
        plan: of the current segment, with its kinds of steps in `plan_kinds`.
        hooks: all that are put on.
    """

    def __init__(
        self,
        name: str,
        pipeline: DiffusionPipeline,
        clock: StepClock,
        counters: dict[str, float],
        kinds: Kinds,
        plan_for: Callable[[int], Plan],
        batch_decoder: bool,
        max_group_mb: int,
    ) -> None:
        self.pipeline, self.clock, self.counters = pipeline, clock, counters
        self.kinds, self.plan_for, self.max_group_mb = kinds, plan_for, max_group_mb
        denoisers = find_denoisers(pipeline)
        self.unet = all(not_a_unet(denoiser) is None for denoiser in denoisers)
        self.batching = batch_decoder and self.unet and all(map(rows_are_independent, denoisers))
        self.cache: dict[Any, FeatureCache] = {}
        self.branch: dict[Any, tuple[Any, Any]] = {}
        self.given: list[GivenStep] = []
        self.conditional: tuple[Any, torch.Tensor | None] = (None, None)
        self._done: tuple[Any, set[str]] = (None, set())
        self.current: DenoiserCall | None = None
        self.thrown_away = 0
        self.rows = (-1, 0)
        self.plan = Plan((FULL,))
        self.plan_kinds = self.plan.kinds()
        self._segment = -1
        self.family = family_of(pipeline)
        self.branches = self.family.branches or Branches()
        self.conversion = Conversion(clock.scheduler)
        self.said = Conversion(clock.scheduler, self.family.negated)
        self.hooks = HookSet(f"diffusion_accel.{name}")

    def clear(self) -> None:
        """Free every kept tensor."""
        self.cache.clear()
        self.branch.clear()
        self.given.clear()
        self.conditional = (None, None)
        self.current = None

    # ------------------------------------------------------------------ the plan
    def follow(self) -> Plan:
        """The plan of the current segment."""
        if self._segment != self.clock.segment:
            self._segment = self.clock.segment
            self.plan = self.plan_for(self.clock.total)
            self.plan_kinds = self.plan.kinds()
            for step in self.plan.steps:
                if step.mode in ("shallow", "hold"):
                    self.counters.setdefault(f"{step.mode}_steps", 0)
                if step.guidance != "both":
                    self.counters.setdefault("unguided_steps", 0)
                if step.mode == "full" and step.fit is not None:
                    self.counters.setdefault("corrected_steps", 0)
        return self.plan

    def step_at(self, index: int) -> Step:
        """What step `index` does; steps behind the plan's end are full."""
        plan = self.follow()
        return plan.steps[index] if index < len(plan) else FULL

    def time(self, index: int) -> float:
        """The scheduler's timestep at step `index`."""
        return self.clock.timesteps[index] if index < len(self.clock.timesteps) else float(index)

    def group(self, index: int, step: Step, features: FeatureCache) -> int:
        """How many steps the decoder serves in one batch from step `index` on."""
        if not self.batching or not self.clock.exact or step.mode not in ("full", "decoder"):
            return 1
        steps, end = self.plan.steps, index + 1
        while end < min(self.clock.total, len(steps)) and steps[end].mode == "decoder":
            if steps[end].guidance != step.guidance:
                break
            end += 1
        size = tensor_bytes([h.values[0] for key, h in features.histories.items() if _is_of(key, ("decoder",))])
        if not size:  # a first key step: decode it alone, then its features' size is known
            return 1
        return max(1, min(end - index, int(self.max_group_mb * 2**20 // size)))

    def guidance_thinned(self, named: dict[str, Any]) -> bool:
        """Whether the rows of this call are both branches of guidance, of which one may be left out.

        Further calls at a step (SD 3's skipped layers) have the conditional rows only.

        Raises:
            ConfigurationError: there is guidance, but its branches are not the two halves of a batch.
        """
        if self.family.calls or (self.clock.call and not self.family.views):
            return False
        rows = latents_of(named).shape[0]
        if self.family.branches is not None and (not self.guided or 2 * rows == self.rows[1]):
            return False  # also where the last steps have none (Z-Image's truncation)
        reason = no_branches(self.pipeline)
        if reason is None and rows % 2:
            reason = f"it calls its denoiser with {rows} rows; use guidance=both"
        if reason:
            raise ConfigurationError(
                f"guidance cannot be left out at some steps of {type(self.pipeline).__name__}: {reason}"
            )
        return True

    # ------------------------------------------------------------------ predictions
    def keep_prediction(self, features: FeatureCache, value: torch.Tensor, given: torch.Tensor, time: float) -> None:
        """Keep what a full step predicted from the latents `given`, in every space in which a held step wants it."""
        for space, order in self.kinds.spaces.items():
            meant = self.said.to(space, value, given, time) if space else value
            features.histories.setdefault(("prediction", space), History(order + 1)).push(time, meant)

    def keep_conditional(self, predicted: torch.Tensor) -> None:
        """Keep the conditional prediction in the batch of a full step, if a fit needs what guidance adds to it."""
        clock, known = self.clock, self.family.branches is not None and not self.clock.call
        if self.plan_kinds.needs_additions and known and self.guided and predicted.shape[0] % 2 == 0:
            self.conditional = ((clock.segment, clock.index), self.branches.conditional(predicted))

    def conditional_here(self) -> torch.Tensor | None:
        """The conditional prediction of this step as the scheduler is given it; None if it is not known."""
        there, conditional = self.conditional
        if conditional is None or there != (self.clock.segment, self.clock.index):
            return None
        return -conditional if self.family.negated else conditional

    @property
    def guided(self) -> bool:
        """Whether there is guidance; where each branch is a call, whether there was one for each at this step."""
        if self.family.calls:
            here = (self.clock.segment, self.clock.index)
            return any(call == 1 and there == here for (_, call), (there, _) in self.branch.items())
        return guided(self.pipeline, self.clock.arguments)

    def note_peak(self) -> None:
        """Count the bytes that are kept now, if they are more than before; what is kept twice counts once."""
        known = {id(t) for cache in self.cache.values() for h in cache.histories.values() for t in tensors_in(h.values)}
        beside = [t for given in self.given for t in given.tensors() if id(t) not in known]
        held = sum(cache.bytes() for cache in self.cache.values()) + tensor_bytes(beside)
        self.counters["peak_cache_bytes"] = max(self.counters["peak_cache_bytes"], held)

    # ------------------------------------------------------------------ what was done
    def note(self, mode: str) -> None:
        """Note what a call of the denoiser really does at this step."""
        here = (self.clock.segment, self.clock.index)
        if self._done[0] != here:
            self._done = (here, set())
        self._done[1].add(mode)

    def happened(self) -> set[str]:
        """The modes of the calls of the denoiser at this step, since it was asked last."""
        here, modes = self._done
        self._done = (None, set())
        return modes if here == (self.clock.segment, self.clock.index) else set()

    def count(self, step: Step, steps: int) -> None:
        """Count a call of the denoiser for a step, which made the predictions of so many."""
        counters, first = self.counters, self.clock.first
        if step.mode in ("full", "decoder"):
            counters["encoder_runs"] += step.mode == "full"
            counters["decoder_runs"] += 1
            counters["decoder_steps"] += steps if first else 0
        else:
            counters[f"{step.mode}_steps"] += first
        counters["full_steps" if step.mode == "full" else "reused_steps"] += first
