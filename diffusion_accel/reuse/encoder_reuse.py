"""The feature: encoder-feature reuse for U-Nets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from diffusion_accel.feature import Attachment, Feature, option

from .attachment import RunAttachment
from .schedule import MORE_TIMESTEPS, check_schedule, key_steps

if TYPE_CHECKING:
    from diffusion_accel.steps import StepClock


@dataclass(frozen=True, kw_only=True)
class EncoderReuse(Feature):
    """Run the U-Net's encoder at key steps only and reuse its features in between.

    At a key step the U-Net runs in full; the skip connections and the output of the mid block are kept (with what
    ControlNets and adapters added to them). At the other steps only the decoder runs, on the kept features, with that
    step's own time embedding and text. Such a prediction does not depend on that step's latents, so the decoder may
    run once, as one batch, for all steps up to the next key step. ControlNets run at key steps only.

    Source: Li et al., "Faster Diffusion: Rethinking the Role of UNet Encoder in Diffusion Models" (NeurIPS 2024),
    section 3.2 (encoder propagation, parallel denoising) and 3.3 (key steps, prior noise injection).

    Attributes:
        schedule: the key steps; see `diffusion_accel.reuse.schedule.key_steps`. Every 4th step is recommended: it is
            the authors' advice for models other than the base ones, and measured nearer to the baseline than the
            published list (docs/encoder-reuse.md).
        batch_decoder: decode all steps of a group in one batch (faster where a device is under-filled) instead of one
            by one. Both give the same prediction up to rounding.
        max_group_mb: upper limit in MiB for the features of one decoder batch (≥ 1); larger groups are split.
        prior_noise: α of prior noise injection, 0 (off) … 0.1; the paper uses 0.003. x ← x + α · x_T.
        prior_noise_below: τ: inject where the noise level (`diffusion_accel.noise_level`: timestep /
            num_train_timesteps for most schedulers) is below it, 0 … 1; the paper uses 0.5.

    Counters: `encoder_runs`, `decoder_runs` (calls), `decoder_steps` (steps decoded), `full_steps`, `reused_steps`,
    `controlnet_runs`, `controlnet_skipped`, `peak_cache_bytes`, `noise_injections`.
    """

    name: ClassVar[str] = "encoder_reuse"
    summary: ClassVar[str] = "run the U-Net encoder at key steps only and reuse its features in between"
    paper: ClassVar[str] = "Faster Diffusion (Li et al., NeurIPS 2024)"
    order: ClassVar[int] = 50
    conflicts: ClassVar[frozenset[str]] = frozenset({"reuse"})

    schedule: tuple[int, ...] | str = option(
        "uniform:4", "key steps: uniform:m, paper, if-stage-1, -2, -3, all, 0+1+5", (0, 9_999)
    )
    batch_decoder: bool = option(True, "decode all steps up to the next key step as one batch")
    max_group_mb: int = option(1024, "limit in MiB for the features of one decoder batch", (1, 2**20))
    prior_noise: float = option(0.0, "strength of prior noise injection (0: off; the paper: 0.003)", (0, 0.1))
    prior_noise_below: float = option(0.5, "inject below this noise level, a share of the training timesteps", (0, 1))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_schedule(self.schedule)

    @classmethod
    def neutral(cls) -> Self:
        return cls(schedule="all")

    def supports(self, pipeline: Any) -> str | None:
        from diffusion_accel.denoisers import find_denoiser, not_a_unet, not_followed, reads_every_step

        from .prior_noise import not_injectable

        denoiser = find_denoiser(pipeline)
        if denoiser is None:
            return "the pipeline has no unet"
        if getattr(pipeline, "scheduler", None) is None:
            return "the pipeline has no scheduler to take the steps from"
        reason = not_a_unet(denoiser) or reads_every_step(pipeline) or not_followed(pipeline)
        return reason or (not_injectable(pipeline.scheduler) if self.prior_noise else None)

    def unfit_for(self, steps: int, scheduler: str) -> str | None:
        last = self.schedule[-1] if isinstance(self.schedule, tuple) else 0
        if last < steps or not scheduler or scheduler.lower().startswith(MORE_TIMESTEPS):
            return None
        return f"key step {last} lies beyond {steps} steps; shorten the list or use a preset, which fits any number"

    def attach(self, pipeline: Any) -> Attachment:
        return EncoderReuseAttachment(self, pipeline)


class EncoderReuseAttachment(RunAttachment):
    """Encoder reuse on one pipeline; everything it holds lives for one call."""

    def before_call(self, clock: StepClock) -> None:
        from diffusion_accel.denoisers import called_denoisers

        from .executor import ReuseRun
        from .plan import FULL, Plan, Step
        from .prior_noise import PriorNoise

        feature: EncoderReuse = self.feature  # type: ignore[assignment]
        self.begin()
        decoder = Step("decoder")

        def plan(total: int) -> Plan:
            keys = key_steps(feature.schedule, total)
            return Plan(tuple(FULL if i in keys else decoder for i in range(total)))

        run = ReuseRun(
            feature.name,
            self.pipeline,
            clock,
            self._counters,
            Plan((FULL, decoder)),
            plan,
            feature.batch_decoder,
            feature.max_group_mb,
        )
        self.install(run)
        if feature.prior_noise > 0:
            noise = PriorNoise(feature, clock, self._counters)
            self.changes.add(noise.uninstall)
            noise.install(called_denoisers(self.pipeline))
