"""The feature: the reuse engine, which runs any plan."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from diffusion_accel.errors import ConfigurationError
from diffusion_accel.feature import Attachment, Feature, option
from diffusion_accel.io import printable

from .attachment import RunAttachment
from .cache_settings import CACHES, CacheSettings
from .plan import FULL, Plan, Preset, looks_like_a_preset, with_guidance
from .plan_file import TunedPlan, is_tuned
from .schedule import MORE_TIMESTEPS

if TYPE_CHECKING:
    from diffusion_accel.steps import StepClock

Source = Preset | Plan | TunedPlan | CacheSettings


def read_source(text: str) -> Source:
    """What a plan's text names: steps, a file, a cache of diffusers, or a preset."""
    if text.startswith("steps:"):
        return Plan.parse(text[6:])
    return TunedPlan.load(text) if is_tuned(text) else CacheSettings.parse(text) or Preset.parse(text)


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
            `diffusion_accel.reuse.plan.Preset.parse` and `diffusion_accel.reuse.plan_file.TunedPlan`. On transformers
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
    max_group_mb: int = option(1024, "limit in MiB for the features of one decoder batch", (1, 2**20))

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "_source", read_source(self.plan))
        with_guidance(Plan.parse("full"), self.guidance, [0.0])

    @classmethod
    def neutral(cls) -> Self:
        return cls(plan="full")

    @classmethod
    def accepts_bare(cls, text: str) -> bool:
        """Whether `text` behind a bare --reuse is a plan; also one that is mistyped (name:value) or lacks its level
        (tuned), which no prompt looks like."""
        known = is_tuned(text) or text == "tuned" or looks_like_a_preset(text) or text.partition(":")[0] in CACHES
        return known or re.fullmatch(r"[\w-]+:\S+", text) is not None

    def supports(self, pipeline: Any) -> str | None:
        from diffusion_accel.denoisers import find_denoisers, no_branches, not_followed, reads_every_step
        from diffusion_accel.noise_level import unknown_noise_levels

        from .needs import unmet_need

        denoisers = find_denoisers(pipeline)
        if not denoisers:
            return "the pipeline has no unet or transformer"
        if getattr(pipeline, "scheduler", None) is None:
            return "the pipeline has no scheduler to take the steps from"
        if self.leaves_branches_out() and (reason := no_branches(pipeline)):
            return reason
        if self.guidance.startswith("interval") and (reason := unknown_noise_levels(pipeline.scheduler)):
            return f"{reason}, so guidance=interval is not possible"
        if reason := reads_every_step(pipeline) or not_followed(pipeline):
            return reason
        source = self.source
        if isinstance(source, CacheSettings):
            if self.guidance != "both":
                return "diffusers' own caches do not combine with a guidance rule"
            reasons = [source.supports(pipeline, denoiser) for denoiser in denoisers]
        else:
            kinds = self.kinds(pipeline)
            reasons = [unmet_need(denoiser, pipeline.scheduler, kinds) for denoiser in denoisers]
        if isinstance(source, TunedPlan):
            reasons.insert(0, source.for_another_denoiser(denoisers))
        return next(filter(None, reasons), None)

    def works_inside(self, pipeline: Any) -> bool:
        if isinstance(self.source, CacheSettings):
            return True
        return any(step.mode in ("decoder", "shallow") for step in self.kinds(pipeline).steps)

    def unfit_for(self, steps: int, scheduler: str) -> str | None:
        plan, source = self.plan_of_its_own(), self.source
        if not scheduler and isinstance(source, TunedPlan):  # the model's own: presumably the one of the plan
            scheduler = str(source.conditions.get("scheduler"))
        more = not scheduler or scheduler.lower().startswith(MORE_TIMESTEPS)
        if plan is None or self.stretch or len(plan) == steps or more:
            return None
        return (
            f"the plan {printable(self.plan[:60])} is for {len(plan)} steps, this call has {steps}; "
            f"use {len(plan)} steps, or stretch=true"
        )

    # ------------------------------------------------------------------ the plan
    @property
    def source(self) -> Source:
        """What `plan` names; a file was read when the feature was made."""
        return self.__dict__["_source"]

    def plan_of_its_own(self) -> Plan | None:
        """The steps of a plan for one number of steps."""
        source = self.source
        return source.plan if isinstance(source, TunedPlan) else source if isinstance(source, Plan) else None

    def kinds(self, pipeline: Any) -> Plan:
        """A plan that has the kinds of steps of the plans for any number of steps."""
        from diffusion_accel.denoisers import layers_per_block

        if isinstance(self.source, Preset):
            return self.source.kinds(layers_per_block(pipeline))
        return self.plan_of_its_own() or Plan((FULL,))

    def leaves_branches_out(self) -> bool:
        """Whether it computes one branch of guidance only at some steps."""
        plan = self.plan_of_its_own()
        return self.guidance != "both" or (plan is not None and any(s.guidance != "both" for s in plan.steps))

    def attach(self, pipeline: Any) -> Attachment:
        return ReuseAttachment(self, pipeline)


class ReuseAttachment(RunAttachment):
    """The reuse engine on one pipeline; everything it holds lives for one call."""

    feature: Reuse

    def before_call(self, clock: StepClock) -> None:
        from .diffusers_caches import CacheRun
        from .executor import ReuseRun

        feature, source = self.feature, self.feature.source
        self.begin()
        if isinstance(source, TunedPlan):
            source.check(self.pipeline)
        if isinstance(source, CacheSettings):
            self.install(CacheRun(source, self.pipeline, self._counters, clock.arguments))
            return
        run = ReuseRun(
            feature.name,
            self.pipeline,
            clock,
            self._counters,
            feature.kinds(self.pipeline),
            lambda total: self._guided(self._plan(clock, total), clock),
            feature.batch_decoder,
            feature.max_group_mb,
        )
        self.install(run)

    def _plan(self, clock: StepClock, total: int) -> Plan:
        """The plan for a segment of `total` steps."""
        from diffusion_accel.denoisers import layers_per_block

        feature, source = self.feature, self.feature.source
        if isinstance(source, Preset):
            return source.plan(total, layers_per_block(self.pipeline))
        plan = feature.plan_of_its_own()
        assert plan is not None
        if len(plan) != total and len(plan) == clock.scheduled:  # img2img and others run a part of the timesteps
            return plan.part(clock.offset, clock.offset + total)
        if len(plan) != total and not feature.stretch:
            of = f" of {clock.scheduled} (its strength, or where it starts and ends)" if total < clock.scheduled else ""
            raise ConfigurationError(
                f"the plan is for {len(plan)} steps, this call has {total}{of}; use {len(plan)} steps, or stretch=true"
            )
        return plan.stretched(total)

    def _guided(self, plan: Plan, clock: StepClock) -> Plan:
        levels = clock.levels if self.feature.guidance.startswith("interval") else []
        return with_guidance(plan, self.feature.guidance, levels)
