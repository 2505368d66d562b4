"""Prior noise injection: a little of the initial noise is added back while the image is being finished."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import UnsupportedPipelineError
from ..steps import StepClock


class PriorNoise:
    """x ← x + α · x_T at the steps whose timestep is below τ (Faster Diffusion, section 3.3).

    Sequential decoding injects before the U-Net sees the latents, that is after the step before; batched decoding
    injects between the prediction and `scheduler.step`. Both timings are the released code's.
    """

    def __init__(self, feature: Any, clock: StepClock, counters: dict[str, float]) -> None:
        self.feature = feature
        self.clock = clock
        self.counters = counters
        self._initial: torch.Tensor | None = None
        self._segment = -1

    def install(self) -> None:
        """Register with the clock. Raises `UnsupportedPipelineError` for schedulers with another latent scale."""
        scheduler = self.clock.scheduler
        sigma = float(getattr(scheduler, "init_noise_sigma", 1.0))
        if abs(sigma - 1.0) > 1e-6:
            raise UnsupportedPipelineError(
                f"prior_noise needs latents of unit variance, but {type(scheduler).__name__} works with latents scaled "
                "by sigma; use DDIM, DDPM, DPM-Solver, UniPC or DEIS, or set prior_noise=0"
            )
        self.counters["noise_injections"] = 0
        self._train_timesteps = float(getattr(scheduler.config, "num_train_timesteps", 1000))
        if self.feature.batch_decoder:
            self.clock.on_step(before=self._before)
        else:
            self.clock.on_step(before=self._remember, after=self._after)

    def _below(self, index: int) -> bool:
        timesteps = self.clock.timesteps
        return index < len(timesteps) and timesteps[index] / self._train_timesteps < self.feature.prior_noise_below

    def _remember(self, step_inputs: dict[str, Any]) -> None:
        if self.clock.segment != self._segment:
            self._segment = self.clock.segment
            self._initial = step_inputs["sample"].clone()

    def _inject(self, sample: torch.Tensor) -> torch.Tensor:
        assert self._initial is not None
        self.counters["noise_injections"] += 1
        return sample + self.feature.prior_noise * self._initial

    def _before(self, step_inputs: dict[str, Any]) -> None:
        self._remember(step_inputs)
        if self._below(self.clock.index):
            step_inputs["sample"] = self._inject(step_inputs["sample"])

    def _after(self, sample: torch.Tensor) -> torch.Tensor:
        return self._inject(sample) if self._below(self.clock.index + 1) else sample
