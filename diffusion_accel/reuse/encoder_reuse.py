"""The feature: encoder-feature reuse for U-Nets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from diffusion_accel.feature import Feature, option

from .guidance import GuidanceRule
from .schedule import MORE_TIMESTEPS, KeySteps, read_schedule

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


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
        schedule: the key steps, or a `KeySteps`; see `diffusion_accel.reuse.schedule.key_steps`. Every 4th step is
            recommended: it is the authors' advice for models other than the base ones, and measured nearer to the
            baseline than the published list (docs/encoder-reuse.md).
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
    conflicts: ClassVar[dict[str, str]] = {"reuse": "both have a plan for the parts of the same steps"}
    runtime: ClassVar[str] = "diffusion_accel.reuse.encoder_attachment"

    schedule: tuple[int, ...] | str | KeySteps = option(
        "uniform:4", "key steps: uniform:m, paper, if-stage-1, -2, -3, all, 0+1+5", (0, 9_999), read_schedule
    )
    batch_decoder: bool = option(True, "decode all steps up to the next key step as one batch")
    max_group_mb: int = option(1024, "limit in MiB for the features of one decoder batch", (1, 2**20))
    prior_noise: float = option(0.0, "strength of prior noise injection (0: off; the paper: 0.003)", (0, 0.1))
    prior_noise_below: float = option(0.5, "inject below this noise level, a share of the training timesteps", (0, 1))

    @classmethod
    def neutral(cls) -> Self:
        """Every step is a key step."""
        return cls(schedule="all")

    def goes_into_graphs(self, _pipeline: DiffusionPipeline) -> bool:
        """Key steps and decoder steps do."""
        return True

    @property
    def source(self) -> KeySteps:
        """What `schedule` means: the plans that this feature runs on the engine of `Reuse`."""
        return self.object_of("schedule")

    @property
    def rule(self) -> GuidanceRule:
        """Both branches of guidance at every step."""
        return GuidanceRule()

    @property
    def stretch(self) -> bool:
        """Key steps are for any number of steps."""
        return False

    def unfit_for(self, steps: int, scheduler: str) -> str | None:
        """That a listed key step lies beyond the call, where a scheduler has one timestep for each step."""
        keys = self.source.schedule
        last = keys[-1] if isinstance(keys, tuple) else 0
        if last < steps or not scheduler or scheduler.lower().startswith(MORE_TIMESTEPS):
            return None
        return f"key step {last} lies beyond {steps} steps; shorten the list or use a preset, which fits any number"
