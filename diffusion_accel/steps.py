"""StepClock: the one answer to "which denoising step is this?"."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.hooks import ModelHook

from .changes import Changes
from .errors import CallStateError
from .hooks import bind_forward, model_of

# (scheduler inputs by name) -> None: may replace values
BeforeStep = Callable[[dict[str, Any]], None]
# previous sample -> previous sample
AfterStep = Callable[[torch.Tensor], torch.Tensor]


class StepClock:
    """Follows one pipeline call: which step it is at, how many there are, and what the scheduler does.

    A step is a position in `scheduler.timesteps`, not a timestep value: solvers that repeat a timestep (Heun, PNDM)
    have one step for each entry. Several calls of one module at the same step (guidance in separate calls) share
    `index` and differ in `call`. img2img starts late: `index` 0 is the first step that is really run. A jump (a second
    pass over the timesteps, a new `set_timesteps`) starts a new `segment`, counted from index 0 again.

    Attributes:
        index: the current step, 0 … total − 1; −1 before the first.
        total: the number of steps of this segment.
        timesteps: the values of the segment's steps, in the scheduler's own unit (0 … num_train_timesteps or sigma).
        segment: how many passes over timesteps were begun before this one.
        call: how many times the module now being called was called at this step before.
        steps: how many times the scheduler has stepped in this call.
        calls: how many times a denoiser was called.
        changes: what the clock has changed on objects.
        exact: whether the denoiser's `timestep` argument is the scheduler's own value for this step.
    """

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        self.scheduler = pipeline.scheduler
        self.index = -1
        self.total = 0
        self.timesteps: list[float] = []
        self.segment = -1
        self.call = 0
        self.exact = False
        self.steps = 0
        self.calls = 0
        self._all: list[float] = []
        self._tensor: torch.Tensor | None = None
        self._start = 0
        self._position = -1
        self._stepped = False
        self._calls: dict[int, int] = {}
        self._before: list[BeforeStep] = []
        self._after: list[AfterStep] = []
        self.changes = Changes()
        self._thread = threading.get_ident()

    # ------------------------------------------------------------------ life of one call
    def start(self, modules: list[torch.nn.Module], beside: Sequence[torch.nn.Module] = ()) -> None:
        """Watch the scheduler, the denoisers `modules`, and what runs `beside` them at each step."""
        hooks = self.changes.hooks("diffusion_accel.steps")
        for module in (*beside, *modules):
            hooks.add(module, _ClockHook(self, module not in beside))
        step = self.scheduler.step

        @functools.wraps(step)
        def watched_step(*args: Any, **kwargs: Any) -> Any:
            return self._step(step, args, kwargs)

        self.changes.set(self.scheduler, "step", watched_step)

    def stop(self) -> None:
        """Leave scheduler and modules as they were. Safe to call twice."""
        self.changes.undo()

    def on_step(self, before: BeforeStep | None = None, after: AfterStep | None = None) -> None:
        """Register functions that see (and may change) what goes into and comes out of `scheduler.step`."""
        if before is not None:
            self._before.append(before)
        if after is not None:
            self._after.append(after)

    def upcoming(self, count: int) -> torch.Tensor:
        """The scheduler's timesteps of this step and the `count` − 1 after it, shape (count,)."""
        assert self._tensor is not None
        return self._tensor[self._position : self._position + count]

    # ------------------------------------------------------------------ following
    def observe(self, module: torch.nn.Module, timestep: Any) -> None:
        """Note a call of `module` with `timestep` and update the attributes."""
        if threading.get_ident() != self._thread:
            raise CallStateError(
                f"{type(model_of(module)).__name__} is being used by a running pipeline call in another thread; "
                "give each thread its own copy of the model, or wait for the call to end"
            )
        current = self.scheduler.timesteps
        fresh = current is not self._tensor
        if fresh:
            self._tensor, self._all = current, [float(t) for t in current.tolist()]
        position = self._locate(timestep, fresh)
        moved = position != self._position
        if fresh or (moved and position != self._position + 1) or (not moved and self._stepped):
            self._begin_segment(position)
        elif moved:
            self.index += 1
            self._calls.clear()
        self._position = position
        self._stepped = False
        model = id(model_of(module))
        self.call = self._calls.get(model, 0)
        self._calls[model] = self.call + 1

    def _begin_segment(self, position: int) -> None:
        self.segment += 1
        self.index = 0
        self._start = position
        self._calls.clear()
        remaining = len(self._all) - position
        announced = getattr(self.pipeline, "_num_timesteps", None)  # set by pipelines just before their loop
        self.total = min(remaining, announced) if isinstance(announced, int) and announced > 0 else remaining
        self.timesteps = self._all[position : position + self.total]

    def _locate(self, timestep: Any, fresh: bool) -> int:
        """The position of `timestep` in the scheduler's timesteps, without a device synchronisation where possible."""
        tensor = self._tensor
        assert tensor is not None
        if isinstance(timestep, torch.Tensor):
            # Pipelines iterate over the scheduler's tensor: the argument is a view, and its offset is the position.
            if (
                timestep.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
                and timestep.dtype == tensor.dtype
                and tensor.stride() == (1,)
            ):
                self.exact = True
                return timestep.storage_offset() - tensor.storage_offset()
            if timestep.device.type != "cpu" and not fresh:  # reading its value would wait for the device
                self.exact = False
                return min(self._position + int(self._stepped), len(self._all) - 1)
        value = float(timestep.flatten()[0]) if isinstance(timestep, torch.Tensor) else float(timestep)
        expected = 0 if fresh else self._position + int(self._stepped)
        begin = getattr(self.scheduler, "begin_index", None)
        if fresh and isinstance(begin, int):
            expected = begin
        candidates = [i for i, t in enumerate(self._all) if t == value]
        if not candidates:
            self.exact = False
            return min(expected, len(self._all) - 1)
        self.exact = True
        return min(candidates, key=lambda i: (abs(i - expected), i))

    def _step(self, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._stepped = True
        self.steps += 1
        if not self._before and not self._after:
            return step(*args, **kwargs)
        named = dict(inspect.signature(step).bind(*args, **kwargs).arguments)
        named.update(named.pop("kwargs", {}))
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


class _ClockHook(ModelHook):
    def __init__(self, clock: StepClock, denoises: bool) -> None:
        super().__init__()
        self.clock, self.denoises = clock, denoises

    def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self.clock.observe(module, bind_forward(module, args, kwargs)["timestep"])
        self.clock.calls += self.denoises
        return args, kwargs
