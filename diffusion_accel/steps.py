"""StepClock: the one answer to "which denoising step is this?"."""

from __future__ import annotations

import copy
import functools
import threading
import types
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from diffusers.hooks import ModelHook

from .changes import Changes
from .denoisers.families import UNITS, Unit, family_of
from .denoisers.timestep import time_argument, told
from .diffusers_compat import announced_steps
from .errors import CallStateError
from .hooks import HookSet, bind_bound, bind_forward, model_of, version_of
from .noise_level import noise_levels

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

# (scheduler inputs by name) -> None: may replace values
BeforeStep = Callable[[dict[str, Any]], None]
# previous sample -> previous sample
AfterStep = Callable[[torch.Tensor], torch.Tensor]


class StepClock:
    """Follows one pipeline call: which step it is at, how many there are, and what the scheduler does.

    A step is a position in `scheduler.timesteps`, not a timestep value: solvers that repeat a timestep (Heun, PNDM)
    have one step for each entry. Several calls of one module at the same step (guidance in separate calls) share
    `index` and differ in `call`; so do the views of a pipeline that steps through each of them. img2img starts late:
    `index` 0 is the first step that is really run. A jump (a second pass over the timesteps, a new `set_timesteps`)
    starts a new `segment`, counted from index 0 again.

    Attributes:
        index: the current step, 0 … total − 1; −1 before the first.
        total: the number of steps of this segment.
        timesteps: the values of the segment's steps, in the scheduler's own unit (0 … num_train_timesteps or sigma).
        segment: how many passes over timesteps were begun before this one.
        call: how many times the module now being called was called at this step before.
        first: whether no denoiser was called at this step before: steps are counted at these calls.
        steps: how many times the scheduler has stepped in this call.
        calls: how many times a denoiser was called.
        changes: what the clock has changed on objects.
        exact: whether the denoiser's `timestep` argument is the scheduler's own value for this step.
        arguments: what the pipeline was called with, by name, with its defaults.
    """

    def __init__(self, pipeline: DiffusionPipeline, arguments: dict[str, Any] | None = None) -> None:
        self.pipeline = pipeline
        self.scheduler = pipeline.scheduler
        self.arguments = arguments or {}
        self.family = family_of(pipeline)
        self.index = -1
        self.total = 0
        self.timesteps: list[float] = []
        self.segment = -1
        self.call = 0
        self.first = True
        self.exact = False
        self.steps = 0
        self.calls = 0
        self._all: list[float] = []
        self._told: dict[Unit, list[float]] = {}  # what the denoiser is told at each of them, by unit
        self._version = 0
        self._tensor: torch.Tensor | None = None
        self._start = 0
        self._position = -1
        self._stepped = self._counted = False
        self._begun = (-1, -1)  # the step at which a denoiser was called last
        self._calls: dict[int, int] = {}
        self._before: list[BeforeStep] = []
        self._after: list[AfterStep] = []
        self.changes = Changes()
        self._thread = threading.get_ident()

    # ------------------------------------------------------------------ life of one call
    def start(self, modules: list[torch.nn.Module], beside: Sequence[torch.nn.Module] = ()) -> None:
        """Watch the scheduler, the denoisers `modules`, and what runs `beside` them at each step."""
        hooks = HookSet.within(self.changes, "diffusion_accel.steps")
        for module in (*beside, *modules):
            hooks.add(module, _ClockHook(self, module not in beside))
        self.changes.set(self.scheduler, "step", WatchedStep(self.scheduler, self.scheduler.step, self._step))

    def stop(self) -> None:
        """Leave scheduler and modules as they were. Safe to call twice."""
        self.changes.undo()

    def on_step(self, before: BeforeStep | None = None, after: AfterStep | None = None) -> None:
        """Register functions that see (and may change) what goes into and comes out of `scheduler.step`."""
        if before is not None:
            self._before.append(before)
        if after is not None:
            self._after.append(after)

    @property
    def scheduled(self) -> int:
        """How many timesteps the scheduler has, also those that this segment leaves out."""
        return len(self._all)

    @property
    def offset(self) -> int:
        """The place of this segment's first step among them."""
        return self._start

    def upcoming(self, count: int) -> torch.Tensor:
        """The scheduler's timesteps of this step and the `count` − 1 after it, shape (count,)."""
        assert self._tensor is not None
        return self._tensor[self._position : self._position + count]

    @property
    def levels(self) -> list[float]:
        """The noise levels of the segment's steps, 0 … 1 (see `noise_level`).

        Raises:
            ValueError: they are not known for this scheduler.
        """
        return noise_levels(self.scheduler)[self._start : self._start + self.total]

    # ------------------------------------------------------------------ following
    def observe(self, module: torch.nn.Module, timestep: torch.Tensor | float | None) -> None:
        """Note a call of `module` with `timestep` and update the attributes."""
        if threading.get_ident() != self._thread:
            raise CallStateError(
                f"{type(model_of(module)).__name__} is being used by a running pipeline call in another thread; "
                "give each thread its own copy of the model, or wait for the call to end"
            )
        current = self.scheduler.timesteps
        fresh = self._is_new(current)
        if fresh:
            self._tensor, self._version, self._all = current, version_of(current), [float(t) for t in current.tolist()]
            units: list[Unit] = [self.family.time] if self.family.time else list(UNITS)
            self._told = {unit: told(self.pipeline, self.scheduler, unit) for unit in units}
        position = self._locate(timestep, fresh)
        moved = position != self._position
        again = not moved and self._stepped and not self.family.views
        if fresh or again or (moved and position != self._position + 1):
            self._begin_segment(position)
        elif moved:
            self.index += 1
            self._calls.clear()
        self._counted = self._counted and not (fresh or moved)
        self._position = position
        self._stepped = False
        model = id(model_of(module))
        self.call = self._calls.get(model, 0)
        self._calls[model] = self.call + 1

    def count(self) -> None:
        """Note that the module just observed is a denoiser."""
        here = (self.segment, self.index)
        self.first, self._begun = here != self._begun, here
        self.calls += 1

    def _begin_segment(self, position: int) -> None:
        self.segment += 1
        self.index = 0
        self._start = position
        self._calls.clear()
        remaining = len(self._all) - position
        announced = announced_steps(self.pipeline)
        self.total = min(remaining, announced) if isinstance(announced, int) and announced > 0 else remaining
        self.timesteps = self._all[position : position + self.total]

    def _is_new(self, timesteps: torch.Tensor) -> bool:
        """Whether the scheduler has other timesteps than before; each view of an image has its own copy of them."""
        known = self._tensor
        if known is None or (timesteps is known and version_of(timesteps) != self._version):
            return True
        return timesteps is not known and not (self.family.views and torch.equal(timesteps, known))

    def _locate(self, timestep: torch.Tensor | float | None, fresh: bool) -> int:
        """The position of `timestep` in the scheduler's timesteps, without a device synchronisation where possible."""
        tensor = self._tensor
        assert tensor is not None
        if isinstance(timestep, torch.Tensor):
            # Pipelines iterate over the scheduler's tensor: the argument is a view, and its offset is the position.
            own, known = timestep.untyped_storage(), tensor.untyped_storage()
            same = own.data_ptr() == known.data_ptr() or (self.family.views and own.nbytes() == known.nbytes())
            if same and timestep.dtype == tensor.dtype and tensor.stride() == (1,):
                self.exact = True
                return int(timestep.storage_offset() - tensor.storage_offset())
            if timestep.device.type != "cpu" and not fresh:  # reading its value would wait for the device
                self.exact = False
                return min(self._position + int(self._stepped), len(self._all) - 1)
        expected = 0 if fresh else self._position + int(self._stepped)
        begin = getattr(self.scheduler, "begin_index", None)
        if fresh and isinstance(begin, int):
            expected = begin
        self.exact = False
        nearest = min(expected, len(self._all) - 1)
        if timestep is None:
            return nearest
        value, rounding = _value(timestep)
        found: dict[Unit, tuple[int, float, int]] = {}  # how far from where it is expected, how badly it fits, where
        for unit, values in self._told.items():
            errors = [(i, abs(t - value)) for i, t in enumerate(values)]
            there = [(abs(i - nearest), e, i) for i, e in errors if e <= rounding * max(1.0, abs(values[i]))]
            if there:
                found[unit] = min(there, key=lambda fit: (fit[0] > 0, fit[1], fit[0]))
        if not found:
            return nearest
        unit = min(found, key=found.__getitem__)  # where the unit is not known: the one that fits best
        self._told = {unit: self._told[unit]}
        position = found[unit][2]
        self.exact = unit == "t" and self._all[position] == value
        return position

    def _step(self, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.steps += not (self.family.views and self._counted)  # the views of an image make one step
        self._stepped = self._counted = True
        if not self._before and not self._after:
            return step(*args, **kwargs)
        named = bind_bound(step, args, kwargs)
        for before in self._before:
            before(named)
        output = step(**named)
        if self._after:
            sample = output[0] if isinstance(output, tuple) else output.prev_sample
            for after in self._after:
                sample = after(sample)
            if isinstance(output, tuple):
                return (sample, *output[1:])
            output.prev_sample = sample
        return output


class WatchedStep:
    """What stands in the place of a scheduler's `step` for a while. A copy of the scheduler steps by itself.

    Args:
        scheduler: the scheduler.
        step: what stood there before.
        around: called with that, the arguments and the keywords; returns what the step is to return.
    """

    def __init__(self, scheduler: Any, step: Callable[..., Any], around: Callable[..., Any]) -> None:
        functools.update_wrapper(self, step)
        self.scheduler, self.step, self.around = scheduler, step, around

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A step of the scheduler."""
        return self.around(self.step, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo.get(id(self.scheduler))
        if copied is None:  # only its attributes are copied, to be put back later
            return self
        if isinstance(self.step, WatchedStep):
            return copy.deepcopy(self.step, memo)
        own = getattr(self.step, "__func__", None)
        return copy.deepcopy(self.step, memo) if own is None else types.MethodType(own, copied)


class _ClockHook(ModelHook):
    def __init__(self, clock: StepClock, denoises: bool) -> None:
        super().__init__()
        self.clock, self.denoises = clock, denoises

    def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        named = bind_forward(module, args, kwargs)
        name = time_argument(named)
        self.clock.observe(module, named[name] if name else None)
        if self.denoises:
            self.clock.count()
        return args, kwargs


def _value(timestep: torch.Tensor | float) -> tuple[float, float]:
    """A timestep as a number, and how much of it may be rounding. With one for each token or frame, the noisiest's."""
    if not isinstance(timestep, torch.Tensor):
        return float(timestep), 1e-9
    rounding = 2 * torch.finfo(timestep.dtype).eps if timestep.dtype.is_floating_point else 1e-9
    return float(timestep.max()), rounding
