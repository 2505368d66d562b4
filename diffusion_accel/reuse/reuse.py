"""The feature: the reuse engine, which runs any plan."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from ..errors import ConfigurationError
from ..feature import Attachment, Feature, option
from .attachment import RunAttachment
from .cache_settings import CACHES, CacheSettings
from .plan import Plan, Preset, looks_like_a_preset, with_guidance
from .tuned import TunedPlan, is_tuned

if TYPE_CHECKING:
    from ..steps import StepClock


@dataclass(frozen=True, kw_only=True)
class Reuse(Feature):
    """Compute the denoiser in full at some steps only; reuse or forecast what it would say at the others.

    A plan gives every step what it computes: all; a U-Net's decoder (Faster Diffusion); the outer levels (DeepCache);
    or nothing, the prediction itself is held. What is reused may be forecast in time by the polynomial through the
    last full steps, in the scheduler's own time variable; a held prediction also by weights that the tuner fitted. A
    step may also leave out the unconditional branch.

    Sources: Li et al., "Faster Diffusion" (NeurIPS 2024); Ma et al., "DeepCache" (CVPR 2024); Liu et al., "From
    Reusing to Forecasting" (TaylorSeer, ICCV 2025) for forecasts; Kynkäänniemi et al., "Applying Guidance in a Limited
    Interval" (NeurIPS 2024).

    Attributes:
        plan: a preset by name, a tuned plan's file, or the steps themselves behind "steps:"; see
            `diffusion_accel.reuse.plan.Preset.parse` and `diffusion_accel.reuse.tuned.TunedPlan`. On transformers
            that have diffusers' own caches also one of those: first-block:threshold, taylorseer:interval,order,
            mag:threshold,skips, pab:range, faster-cache:range,unconditional range.
        guidance: "both" branches at every step; "reuse:n": the unconditional one at every n-th step, its difference
            reused between them; "interval:low-high": guidance only where the noise level, the share of the training
            timesteps at which there is less noise, is within it (see `diffusion_accel.noise_level`).
        stretch: use a plan for another number of steps too, its full steps at the same places of the trajectory.
        batch_decoder, max_group_mb: of decoder steps, as in `EncoderReuse`.

    Counters: `full_steps`, `reused_steps`, of which `hold_steps` and `shallow_steps`; `unguided_steps`; and those of
    `EncoderReuse`. `peak_cache_bytes` is what the kept values hold at most.
    """

    name: ClassVar[str] = "reuse"
    summary: ClassVar[str] = "compute some steps only and forecast the others, by a plan"
    paper: ClassVar[str] = "Faster Diffusion, DeepCache, TaylorSeer; plans tuned by this project"
    order: ClassVar[int] = 50
    conflicts: ClassVar[frozenset[str]] = frozenset({"encoder_reuse"})
    shorthand: ClassVar[str] = "plan"

    plan: str = option(
        "hold:2", "full, hold:n, deepcache:n[,branch], shallow:n,depth, uniform:m, faster-diffusion, FILE"
    )
    guidance: str = option("both", "both, reuse:n, or interval:low-high")
    stretch: bool = option(False, "use a tuned plan for another number of steps as well")
    batch_decoder: bool = option(True, "decode all steps up to the next full step as one batch")
    max_group_mb: int = option(1024, "limit in MiB for the features of one decoder batch")

    def __post_init__(self) -> None:
        if self.max_group_mb < 1:
            raise ConfigurationError(f"max_group_mb must be at least 1 (MiB), got {self.max_group_mb}")
        if self.plan.startswith("steps:"):
            Plan.parse(self.plan[6:])
        elif not is_tuned(self.plan) and CacheSettings.parse(self.plan) is None:
            Preset.parse(self.plan)
        with_guidance(Plan.parse("full"), self.guidance, [0.0])

    @classmethod
    def neutral(cls) -> Self:
        return cls(plan="full")

    @classmethod
    def takes(cls, text: str) -> bool:
        """Whether `text` behind a bare --reuse is a plan; also one that is mistyped (name:value) or lacks its level
        (tuned), which no prompt looks like."""
        known = is_tuned(text) or text == "tuned" or looks_like_a_preset(text) or text.partition(":")[0] in CACHES
        return known or re.fullmatch(r"[\w-]+:\S+", text) is not None

    def supports(self, pipeline: Any) -> str | None:
        from ..denoisers import find_denoiser, reads_every_step
        from ..families import no_branches, not_followed
        from ..noise_level import unknown_noise_levels

        denoiser = find_denoiser(pipeline)
        if denoiser is None:
            return "the pipeline has no unet or transformer"
        if getattr(pipeline, "scheduler", None) is None:
            return "the pipeline has no scheduler to take the steps from"
        if self.leaves_branches_out() and (reason := no_branches(pipeline)):
            return reason
        if self.guidance.startswith("interval") and (reason := unknown_noise_levels(pipeline.scheduler)):
            return f"{reason}, so guidance=interval is not possible"
        cache = CacheSettings.parse(self.plan)
        if cache is not None and self.guidance != "both":
            return "diffusers' own caches do not combine with a guidance rule"
        return (
            reads_every_step(pipeline)
            or not_followed(pipeline)
            or (cache.supports(pipeline, denoiser) if cache else None)
        )

    def leaves_branches_out(self) -> bool:
        """Whether it computes one branch of guidance only at some steps."""
        if self.guidance != "both":
            return True
        if is_tuned(self.plan):
            steps = TunedPlan.load(self.plan).plan.steps
        else:
            steps = Plan.parse(self.plan[6:]).steps if self.plan.startswith("steps:") else ()
        return any(step.guidance != "both" for step in steps)

    def works_inside(self, pipeline: Any) -> bool:
        if CacheSettings.parse(self.plan) is not None:
            return True
        if is_tuned(self.plan):
            plan = TunedPlan.load(self.plan).plan
        elif self.plan.startswith("steps:"):
            plan = Plan.parse(self.plan[6:])
        else:
            plan = Preset.parse(self.plan).kinds()
        return any(step.mode in ("decoder", "shallow") for step in plan.steps)

    def attach(self, pipeline: Any) -> Attachment:
        return ReuseAttachment(self, pipeline)


class ReuseAttachment(RunAttachment):
    """The reuse engine on one pipeline; everything it holds lives for one call."""

    def __init__(self, feature: Reuse, pipeline: Any) -> None:
        super().__init__(feature, pipeline)
        self._tuned = TunedPlan.load(feature.plan) if is_tuned(feature.plan) else None
        self._fingerprint: tuple[Any, str] | None = None

    def before_call(self, clock: StepClock) -> None:
        from .diffusers_caches import CacheRun
        from .executor import ReuseRun

        feature: Reuse = self.feature  # type: ignore[assignment]
        self.begin()
        if self._tuned is not None:
            self._tuned.check(self.pipeline, self._weights())
        if (cache := CacheSettings.parse(feature.plan)) is not None:
            self.install(CacheRun(cache, self.pipeline, self._counters, clock.arguments))
            return
        run = ReuseRun(
            feature.name,
            self.pipeline,
            clock,
            self._counters,
            self._kinds(),
            lambda total: self._guided(self._plan(total), clock),
            feature.batch_decoder,
            feature.max_group_mb,
        )
        self.install(run)

    def _weights(self) -> str:
        """The denoisers' fingerprint, computed again only for another denoiser or other names (such as a LoRA's)."""
        from ..denoisers import find_denoisers, fingerprint

        denoisers = find_denoisers(self.pipeline)
        state = [(id(denoiser), [name for name, _ in denoiser.named_parameters()]) for denoiser in denoisers]
        if self._fingerprint is None or self._fingerprint[0] != state:
            self._fingerprint = (state, fingerprint(*denoisers))
        return self._fingerprint[1]

    def _kinds(self) -> Plan:
        """A plan that has the kinds of steps of the plans for any number of steps."""
        if (preset := self._preset()) is not None:
            from ..denoisers import layers_per_block

            return preset.kinds(layers_per_block(self.pipeline))
        return self._steps()

    def _plan(self, total: int) -> Plan:
        """The plan for `total` steps."""
        feature: Reuse = self.feature  # type: ignore[assignment]
        if (preset := self._preset()) is not None:
            from ..denoisers import layers_per_block

            return preset.plan(total, layers_per_block(self.pipeline))
        plan = self._steps()
        if len(plan) != total and not feature.stretch:
            raise ConfigurationError(
                f"the plan is for {len(plan)} steps, this call has {total}; use {len(plan)} steps, or stretch=true"
            )
        return plan.stretched(total)

    def _preset(self) -> Preset | None:
        feature: Reuse = self.feature  # type: ignore[assignment]
        own = self._tuned is not None or feature.plan.startswith("steps:")
        return None if own else Preset.parse(feature.plan)

    def _steps(self) -> Plan:
        feature: Reuse = self.feature  # type: ignore[assignment]
        return Plan.parse(feature.plan[6:]) if self._tuned is None else self._tuned.plan

    def _guided(self, plan: Plan, clock: StepClock) -> Plan:
        feature: Reuse = self.feature  # type: ignore[assignment]
        levels = clock.levels if feature.guidance.startswith("interval") else []
        return with_guidance(plan, feature.guidance, levels)
