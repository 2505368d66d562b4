"""What encoder reuse is on a pipeline: the plan of its key steps on the engine of `Reuse`, and prior noise."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffusion_accel.denoisers import called_denoisers, find_denoiser, not_a_unet, not_followed, reads_every_step
from diffusion_accel.steps import StepClock

from .attachment import ReuseAttachment
from .encoder_reuse import EncoderReuse
from .prior_noise import PriorNoise, not_injectable

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def supports(feature: EncoderReuse, pipe: DiffusionPipeline) -> str | None:
    """Why encoder reuse cannot work on a pipeline; None if it can."""
    denoiser = find_denoiser(pipe)
    if denoiser is None:
        return "the pipeline has no unet"
    if getattr(pipe, "scheduler", None) is None:
        return "the pipeline has no scheduler to take the steps from"
    reason = not_a_unet(denoiser) or reads_every_step(pipe) or not_followed(pipe)
    return reason or (not_injectable(pipe.scheduler) if feature.prior_noise else None)


def attach(feature: EncoderReuse, pipe: DiffusionPipeline) -> EncoderReuseAttachment:
    """The engine on a pipeline."""
    return EncoderReuseAttachment(feature, pipe)


class EncoderReuseAttachment(ReuseAttachment[EncoderReuse]):
    """Encoder reuse on one pipeline."""

    def before_call(self, clock: StepClock) -> None:
        """Put the plan of the key steps in force, and prior noise if there is to be some."""
        super().before_call(clock)
        if self.feature.prior_noise > 0:
            noise = PriorNoise(self.feature, clock, self._counters)
            self.changes.add(noise.uninstall)
            noise.install(called_denoisers(self.pipeline))
