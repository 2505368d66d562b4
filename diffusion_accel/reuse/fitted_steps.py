"""Steps with a fit: what the scheduler is given instead of a held prediction, or of one that was computed.

A fit is about predictions as the scheduler is given them, after guidance, so it acts there. What the denoiser's hook
really did at a step, which need not be what the plan says, it leaves in the state.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from diffusion_accel.combination import Combination, channel_dim
from diffusion_accel.denoisers import like_latents
from diffusion_accel.errors import ConfigurationError
from diffusion_accel.prediction import Conversion

from .history import GivenStep
from .state import ReuseState

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

NEWEST = Combination(((1.0,),), ((),))
_GIVEN = ("model_output", "timestep", "sample")  # to the step of a scheduler


def unfit_scheduler(scheduler: SchedulerMixin) -> str | None:
    """Why nothing can be put in the place of the predictions that a scheduler is given; None if it can."""
    step: Any = getattr(scheduler, "step", None)
    names = () if step is None else inspect.signature(step).parameters
    lacking = [name for name in _GIVEN if name not in names]
    if not lacking:
        return None
    return f"the step of {type(scheduler).__name__} takes no {' and no '.join(lacking)}; use hold without a fit"


@dataclass(frozen=True)
class FittedSteps:
    """Called before each `scheduler.step` with its arguments by name, of which it replaces the prediction.

    The state keeps what the last full steps gave to the scheduler: their own predictions, never corrected ones, and
    the latents as the denoiser was given them. A fit that looks further back than they reach is not followed: a held
    step is then the newest prediction in the same space, a full one what it is.
    """

    state: ReuseState

    def __call__(self, named: dict[str, Any]) -> None:
        """Correct, replace or only note the prediction of this step."""
        state = self.state
        modes, size = state.happened(), state.plan_kinds.looks_back
        if not modes or not state.plan_kinds.fitted:  # no call of the denoiser before this step of the scheduler
            return
        step, full = state.step_at(state.clock.index), modes == {"full"}
        fit = step.fit if (step.mode == "full") == full else None
        if full and step.guidance == "none":  # predictions of another kind
            state.given.clear()
        elif full or fit is not None:
            now = self._given(named, full and size > 0)
            self._begin(now)
            if fit is not None:
                self._follow(named, step.space, fit, now, full)
            if full:
                state.given.insert(0, now)
                del state.given[size:]
                state.note_peak()

    def _follow(self, named: dict[str, Any], space: str, fit: Combination, now: GivenStep, full: bool) -> None:
        """Put what a fit makes in the place of the prediction."""
        state = self.state
        past = [now, *state.given] if full else state.given
        latents = [now.latents, *(given.latents for given in state.given)]
        known = all(given.addition is not None for given in past[: fit.count_additions])
        reach = max(fit.count, fit.count_additions)
        if known and reach <= len(past) and fit.count_latents <= len(latents):
            named["model_output"] = self._combined(space, fit, past, latents, now.time)
            if full:
                state.counters["corrected_steps"] += 1
        elif past and not full:
            named["model_output"] = self._combined(space, NEWEST, past, latents, now.time)

    def _given(self, named: dict[str, Any], kept: bool) -> GivenStep:
        """What the scheduler is given; latents that are kept are a copy, for pipelines write into theirs."""
        state, sample, value = self.state, named["sample"], named["model_output"]
        scale = getattr(state.clock.scheduler, "scale_model_input", None)
        latents = sample if scale is None else scale(sample, named["timestep"])
        latents = latents.clone() if kept and latents is sample else latents
        place = (state.clock.segment, value.shape, value.dtype, value.device, latents.shape)
        return GivenStep(place, state.time(state.clock.index), value, latents, self._addition(value, latents))

    def _addition(self, value: torch.Tensor, latents: torch.Tensor) -> torch.Tensor | None:
        """What guidance adds to the conditional prediction: nothing without guidance; None if it is not known."""
        state = self.state
        if not state.plan_kinds.needs_additions:
            return None
        if not state.guided:
            return torch.zeros_like(value)
        conditional = _like(state.conditional_here(), value, channel_dim(latents))
        return None if conditional is None else value - conditional

    def _begin(self, now: GivenStep) -> None:
        """Forget steps that do not go with this one: of another pass over the timesteps or of another shape."""
        given, latents = self.state.given, now.latents
        if given and given[0].place == now.place:
            return
        given.clear()
        dim, value = channel_dim(latents), now.value
        channels = latents.shape[dim]
        others = [
            (a, b) for i, (a, b) in enumerate(zip(value.shape, latents.shape, strict=False)) if i != dim and a != b
        ]
        if value.dim() != latents.dim() or others or value.shape[dim] < channels:
            raise ConfigurationError(
                f"a fit is for predictions of the latents' shape, here {tuple(latents.shape)}; the scheduler is given "
                f"{tuple(value.shape)}: use a plan without fits"
            )
        for fit in (step.fit for step in self.state.follow().steps):
            if fit is not None and not fit.fits(channels):
                raise ConfigurationError(
                    f"the plan's fits are for {fit.channels} channels, the latents here have {channels}; "
                    "use a plan that was tuned for this model"
                )

    def _combined(
        self, space: str, fit: Combination, past: list[GivenStep], latents: list[torch.Tensor], time: float
    ) -> torch.Tensor:
        """The combination as a prediction at `time`, with the latents of now; in float32 or better."""
        newest, conversion = past[0].value, self.state.conversion
        dim, channels = channel_dim(latents[0]), latents[0].shape[channel_dim(latents[0])]
        own, rest = newest.narrow(dim, 0, channels), newest.narrow(dim, channels, newest.shape[dim] - channels)
        if fit == NEWEST and not space:
            return newest
        wide = newest.dtype if newest.dtype == torch.float64 else torch.float32
        meant = [_meant(conversion, space, given, channels, wide) for given in past[: fit.count]]
        now = [x.to(wide) for x in latents[: max(1, fit.count_latents)]]
        adding = past[: fit.count_additions]
        mixed = fit.apply(meant, now, [self._added(space, given, channels, wide) for given in adding])
        mixed = conversion.back(space, mixed, now[0], time) if space else mixed
        return torch.cat([mixed.to(own.dtype), rest], dim) if rest.numel() else mixed.to(own.dtype)

    def _added(self, space: str, given: GivenStep, channels: int, wide: torch.dtype) -> torch.Tensor:
        """What guidance added at a step in a space, for the channels of the latents."""
        assert given.addition is not None
        own = given.addition.narrow(channel_dim(given.latents), 0, channels).to(wide)
        return own * self.state.conversion.slope(space, given.time) if space else own


def _like(conditional: torch.Tensor | None, value: torch.Tensor, dim: int) -> torch.Tensor | None:
    """A conditional prediction for what the scheduler is given; None if it is not about that."""
    conditional = None if conditional is None else like_latents(conditional, value)
    if conditional is None or conditional.dim() != value.dim() or conditional.shape[dim] < value.shape[dim]:
        return None
    own = conditional.narrow(dim, 0, value.shape[dim])  # a learned variance behind it is not given to every scheduler
    if 2 * own.shape[0] == value.shape[0]:  # which steps with both branches (DiT)
        own = own.repeat(2, *[1] * (own.dim() - 1))
    return own if own.shape == value.shape else None


def _meant(conversion: Conversion, space: str, given: GivenStep, channels: int, wide: torch.dtype) -> torch.Tensor:
    """What a step's prediction means in a space, for the channels of the latents."""
    x = given.latents.to(wide)
    value = given.value.narrow(channel_dim(x), 0, channels).to(wide)
    return conversion.to(space, value, x, given.time) if space else value
