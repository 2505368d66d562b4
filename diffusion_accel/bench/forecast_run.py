"""What the entry `forecast` is on a pipeline: hooks that leave calls of the denoiser out, and what stands in for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from diffusers.hooks import ModelHook

from diffusion_accel.denoisers import called_denoisers, family_of, find_controlnet
from diffusion_accel.feature import Attachment
from diffusion_accel.hooks import HookSet
from diffusion_accel.prediction import Conversion, model_input
from diffusion_accel.reuse.needs import unfollowable
from diffusion_accel.steps import StepClock

from . import forecasts
from .adaptive import EasyCache, Sada
from .forecasting import SADA, Forecast, Rule

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

# numbers of the computed steps, their values, the step asked for -> the value there
Forecaster = Callable[[Sequence[int], Sequence[torch.Tensor], int], torch.Tensor]


class Decider(Protocol):
    """Which steps of one pass over the timesteps are computed, and what stands in for the others.

    `x` is always what the denoiser is given: latents scaled as the scheduler does.
    """

    def full(self, index: int) -> bool:
        """Whether a step is computed."""

    def computed(self, index: int, x: torch.Tensor, prediction: torch.Tensor) -> None:
        """Note what a computed step predicted."""

    def forecast(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """The prediction of a step that is left out."""

    def arrived(self, index: int, x_next: torch.Tensor) -> None:
        """Note the latents behind a step."""


@dataclass
class Scheduled:
    """A decider whose computed steps are known beforehand."""

    keys: frozenset[int]
    forecaster: Forecaster
    conversion: Conversion
    times: Sequence[float]
    space: str
    steps: list[int] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)

    def full(self, index: int) -> bool:
        """Whether a step is computed."""
        return index in self.keys

    def computed(self, index: int, x: torch.Tensor, prediction: torch.Tensor) -> None:
        """Note what a computed step predicted."""
        self.steps.append(index)
        meant = self.conversion.to(self.space, prediction, x, self.times[index]) if self.space else prediction
        self.values.append(meant)

    def forecast(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """The prediction of a step that is left out."""
        value = self.forecaster(self.steps, self.values, index)
        return self.conversion.back(self.space, value, x, self.times[index]) if self.space else value

    def arrived(self, _index: int, _x_next: torch.Tensor) -> None:
        """The steps are known already."""


def decider_of(rule: Rule, conversion: Conversion, times: Sequence[float]) -> Decider:
    """What a rule is for one pass over the timesteps."""
    total = len(times)
    if rule.method in SADA:
        return Sada(conversion, times, rule.method == "sada-lagrange")
    if rule.method == "easycache":
        return EasyCache(rule.number, total)
    every = int(rule.number)
    keys = frozenset(range(0, total, every)) if every else forecasts.spectrum_schedule(total)
    return Scheduled(keys, forecaster_of(rule, total), conversion, times, rule.space)


def forecaster_of(rule: Rule, total: int) -> Forecaster:
    """The pure function of a rule, for a call of `total` steps."""
    if rule.method == "dmd":
        return forecasts.dmd
    weights: dict[str, Callable[[Sequence[int], int], list[float]]] = {
        "hold": forecasts.hold,
        "taylor": partial(forecasts.taylor, order=rule.order),
        "hermite": partial(forecasts.hermite, order=rule.order),
        "foca": forecasts.foca,
        "spectrum": partial(forecasts.spectrum, total=total),
    }
    own = weights[rule.method]
    return lambda steps, values, at: forecasts.combined(own(steps, at), values)


def supports(feature: Forecast, pipe: DiffusionPipeline) -> str | None:
    """Why steps of a pipeline cannot be forecast; None if they can."""
    if reason := unfollowable(pipe):
        return reason
    if family_of(pipe).views:
        return "it steps through views of an image, of which each would need its own forecast"
    rule, name = feature.parsed, type(pipe.scheduler).__name__
    if (rule.space or rule.method in SADA) and not Conversion(pipe.scheduler).possible:
        return f"with {name} a prediction cannot be turned into noise or clean sample"
    return feature.unfit_for(0, name)


def works_inside(_feature: Forecast, _pipe: DiffusionPipeline) -> bool:
    """False: it acts on calls of the denoiser and on the scheduler."""
    return False


def attach(feature: Forecast, pipe: DiffusionPipeline) -> ForecastAttachment:
    """The entry on a pipeline."""
    return ForecastAttachment(feature, pipe)


class ForecastAttachment(Attachment[Forecast]):
    """Forecasts on one pipeline. Everything lives for one call."""

    def __init__(self, feature: Forecast, pipeline: DiffusionPipeline) -> None:
        super().__init__(feature, pipeline)
        self._run: _Run | None = None
        self._counters: dict[str, float] = {}

    def before_call(self, clock: StepClock) -> None:
        """Put the hooks on."""
        self._counters = {"full_steps": 0, "reused_steps": 0}
        run = self._run = _Run(self.feature.parsed, clock, self._counters)
        hooks = HookSet.within(self.changes, "diffusion_accel.forecast")
        controlnet = find_controlnet(self.pipeline)
        for module in (*called_denoisers(self.pipeline), *([] if controlnet is None else [controlnet])):
            hooks.add(module, _LeaveOut(run, module is not controlnet))
        clock.on_step(before=run.before_step, after=run.after_step)

    def after_call(self) -> None:
        """Undo what the call changed and forget what was kept."""
        super().after_call()
        self._run = None

    def counters(self) -> dict[str, float]:
        """What the last call did."""
        return dict(self._counters)


class _Run:
    """One call: what the hooks and the clock's functions share."""

    def __init__(self, rule: Rule, clock: StepClock, counters: dict[str, float]) -> None:
        self.rule, self.clock, self.counters = rule, clock, counters
        self.conversion = Conversion(clock.scheduler)
        self.decider: Decider | None = None
        self.segment = -1
        self.computed = False  # whether a denoiser was called at this step
        self.divided = False  # the scheduler's latents are divided by α: its first noise has another size than 1

    def leaves_out(self) -> bool:
        """Whether the present step is not computed."""
        if self.segment != self.clock.segment:
            self.segment = self.clock.segment
            self.decider = decider_of(self.rule, self.conversion, self.clock.timesteps)
            self.divided = float(getattr(self.clock.scheduler, "init_noise_sigma", 1.0)) > 1 + 1e-6
        assert self.decider is not None
        return not self.decider.full(self.clock.index)

    def before_step(self, named: dict[str, Any]) -> None:
        """Note what was computed, or put the forecast in its place."""
        index, decider = self.clock.index, self.decider
        if decider is None:  # no denoiser was called before this step of the scheduler
            return
        x = model_input(self.clock.scheduler, named["sample"], named["timestep"])
        if self.computed:
            decider.computed(index, x, named["model_output"])
        else:
            named["model_output"] = decider.forecast(index, x).to(named["model_output"].dtype)
        self.counters["full_steps" if self.computed else "reused_steps"] += 1
        self.computed = False

    def after_step(self, sample: torch.Tensor) -> torch.Tensor:
        """Let what decides while the call runs see the latents of the next step."""
        index, times = self.clock.index, self.clock.timesteps
        if index + 1 < len(times) and self.decider is not None:
            alpha = self.conversion.coefficients(times[index + 1])[0] if self.divided else 1.0
            self.decider.arrived(index, sample * alpha if self.divided else sample)
        return sample


class _LeaveOut(ModelHook):
    """On a denoiser or a ControlNet: returns what it said last at a step that is left out."""

    def __init__(self, run: _Run, denoises: bool) -> None:
        super().__init__()
        self.run, self.denoises = run, denoises
        self.kept: dict[int, tuple[int, Any]] = {}  # by call within a step: the segment, what was returned

    def new_forward(self, _module: torch.nn.Module, *args: object, **kwargs: object) -> Any:
        """What stands in the place of the module's own forward."""
        run, clock = self.run, self.run.clock
        segment, output = self.kept.get(clock.call, (-1, None))
        if run.leaves_out() and segment == clock.segment:
            return output
        output = self.fn_ref.original_forward(*args, **kwargs)
        self.kept[clock.call] = (clock.segment, output)
        run.computed |= self.denoises
        return output
