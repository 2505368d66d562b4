"""Prior noise injection: a little of the initial noise is added back while the image is being finished."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from diffusers.hooks import ModelHook
from torch import nn

from diffusion_accel.hooks import HookSet, as_given, bind_forward, model_of
from diffusion_accel.noise_level import unknown_noise_levels
from diffusion_accel.steps import StepClock

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

    from .encoder_reuse import EncoderReuse


def not_injectable(scheduler: SchedulerMixin) -> str | None:
    """Why the initial noise cannot be added to the latents of a scheduler; None if it can."""
    sigma = float(getattr(scheduler, "init_noise_sigma", 1.0))
    if abs(sigma - 1.0) > 1e-6:
        return (
            f"prior_noise needs latents of unit variance, but {type(scheduler).__name__} works with latents scaled "
            "by sigma; use DDIM, DDPM, DPM-Solver, UniPC or DEIS, or set prior_noise=0"
        )
    reason = unknown_noise_levels(scheduler)
    return None if reason is None else f"{reason}; set prior_noise=0"


class PriorNoise:
    """x ← x + α · x_T at the steps whose noise level is below τ (Faster Diffusion, section 3.3).

    Sequential decoding injects before the U-Net sees the latents; batched decoding injects between the prediction and
    `scheduler.step`. Both timings are the released code's. x_T is what the call starts from.
    """

    def __init__(self, feature: EncoderReuse, clock: StepClock, counters: dict[str, float]) -> None:
        self.feature = feature
        self.clock = clock
        self.counters = counters
        self._initial: dict[int, torch.Tensor] = {}  # by view; one is 0
        self._segment = -1
        self._levels: list[float] = []
        self._hooks = HookSet("diffusion_accel.prior_noise")

    def install(self, denoisers: list[nn.Module]) -> None:
        """Register with the clock and, for the first step of sequential decoding, on the denoisers."""
        self.counters["noise_injections"] = 0
        if self.feature.batch_decoder:
            self.clock.on_step(before=self._before)
        else:
            for denoiser in denoisers:
                self._hooks.add(denoiser, _FirstStep(self))
            self.clock.on_step(before=self._begin, after=self._after)

    def uninstall(self) -> None:
        """Remove what `install` put on the denoisers, and free x_T."""
        self._hooks.remove()
        self._initial.clear()

    def below(self, index: int) -> bool:
        """Whether noise is injected at step `index`."""
        if self.clock.segment != self._segment:
            self._segment, self._initial, self._levels = self.clock.segment, {}, self.clock.levels
        return index < len(self._levels) and self._levels[index] < self.feature.prior_noise_below

    def _inject(self, sample: torch.Tensor) -> torch.Tensor:
        self.counters["noise_injections"] += self._view() == 0
        return sample + self.feature.prior_noise * self._initial[self._view()]

    def _view(self) -> int:
        return self.clock.call if self.clock.family.views else 0

    def _remember(self, step_inputs: dict[str, Any]) -> bool:
        """Keep the latents of the first step; returns whether this is one."""
        if self._view() in self._initial:
            return False
        self._initial[self._view()] = step_inputs["sample"].clone()
        return True

    def _before(self, step_inputs: dict[str, Any]) -> None:
        below = self.below(self.clock.index)
        self._remember(step_inputs)
        if below:
            step_inputs["sample"] = self._inject(step_inputs["sample"])

    def _begin(self, step_inputs: dict[str, Any]) -> None:
        below = self.below(self.clock.index)
        if self._remember(step_inputs) and below:  # the denoiser has seen it so, too
            step_inputs["sample"] = self._inject(step_inputs["sample"])

    def _after(self, sample: torch.Tensor) -> torch.Tensor:
        return self._inject(sample) if self.below(self.clock.index + 1) else sample


class _FirstStep(ModelHook):
    """On the denoiser: at the first step the latents are x_T themselves, so what it is given grows by α."""

    def __init__(self, noise: PriorNoise) -> None:
        super().__init__()
        self.noise = noise

    def pre_forward(self, module: nn.Module, *args: object, **kwargs: object) -> tuple[tuple[Any, ...], dict[str, Any]]:
        noise = self.noise
        if noise.clock.index != 0 or not noise.below(0):
            return args, kwargs
        named = bind_forward(module, args, kwargs)
        given = named["sample"]
        channels = _latent_channels(model_of(module), noise.clock.scheduler, given.shape[1])
        share = torch.ones(given.shape[1], dtype=given.dtype, device=given.device)
        share[:channels] += noise.feature.prior_noise
        named["sample"] = given * share.view(1, -1, *[1] * (given.dim() - 2))
        return as_given(module, args, named)


def _latent_channels(module: Any, scheduler: SchedulerMixin, given: int) -> int:
    """How many channels of a U-Net's input are the latents; behind them may be masks and images."""
    made = module.config.out_channels
    if str(getattr(scheduler, "config", {}).get("variance_type", "")).startswith("learned"):
        made //= 2
    return min(given, made)
