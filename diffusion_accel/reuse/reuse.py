"""The feature: the reuse engine, which runs any plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from diffusion_accel.feature import Feature, option
from diffusion_accel.io import printable

from . import reading
from .auto import Auto
from .diffusers_cache import FIRST_BLOCK_CACHES, DiffusersCache
from .guidance import GuidanceRule, read_guidance
from .plan import Plan, PlanSource
from .plan_family import PlanFamily, called, chosen, load_shipped
from .plan_file import TunedPlan
from .plan_names import names_file
from .preset import Preset
from .schedule import MORE_TIMESTEPS

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True, kw_only=True)
class Reuse(Feature):
    """Compute the denoiser in full at some steps only; reuse or forecast what it would say at the others.

    A plan gives every step what it computes: all; a U-Net's decoder (Faster Diffusion); the outer levels (DeepCache);
    or nothing, the prediction itself is held. What is reused may be forecast in time by the polynomial through the
    last full steps, in the scheduler's own time variable; a held prediction also by weights that the tuner fitted, or
    by a combination of predictions and latents, which may correct a computed one as well. A step may also leave out the
    unconditional branch.

    Sources: Li et al., "Faster Diffusion" (NeurIPS 2024); Ma et al., "DeepCache" (CVPR 2024); Liu et al., "From
    Reusing to Forecasting" (TaylorSeer, ICCV 2025) for forecasts; Kynkäänniemi et al., "Applying Guidance in a Limited
    Interval" (NeurIPS 2024).

    Attributes:
        plan: a preset by name, a tuned plan's file, or the steps themselves behind "steps:"; see `Preset.parse`,
            `TunedPlan`, `PlanFamily` and `Plan.parse`, whose objects may be given as well. On transformers that have
            diffusers' own caches also one of those (`DiffusersCache`): first-block:threshold,
            taylorseer:interval,order, mag:threshold,skips, pab:range, faster-cache:range,unconditional range. It is
            read once, here: `source` is what it means, the field keeps the text. "auto": see `Auto`.
        speedup: of a family of tuned plans: the best one that is at least so fast, 1 to 1000; of one tuned plan: refuse
            it if it was not measured to be; of auto: steps for each step that is computed.
        min_psnr: of a family: the fastest plan whose median is at least that, 5 to 80 dB; see `PlanFamily.choose`.
            Without both it is the fastest whose worst decile is at least 40 dB.
        guidance: "both" branches at every step; "reuse:n": the unconditional one at every n-th step, its difference
            reused between them; "interval:low-high": guidance only where the noise level, the share of the training
            timesteps at which there is less noise, is within it (see `diffusion_accel.noise_level`). Or a
            `GuidanceRule`.
        stretch: use a plan for another number of steps too, its full steps at the same places of the trajectory.
        batch_decoder, max_group_mb: of decoder steps, as in `EncoderReuse`.

    Counters: `full_steps`, `reused_steps`, of which `hold_steps` and `shallow_steps`; `unguided_steps`;
    `corrected_steps` if full steps have a fit; and those of `EncoderReuse`. `peak_cache_bytes` is what the kept values
    hold at most.
    """

    name: ClassVar[str] = "reuse"
    summary: ClassVar[str] = "compute some steps only and forecast the others, by a plan"
    paper: ClassVar[str] = "Faster Diffusion, DeepCache, TaylorSeer; plans tuned by this project"
    order: ClassVar[int] = 50
    conflicts: ClassVar[dict[str, str]] = {"encoder_reuse": "both have a plan for the parts of the same steps"}
    shorthand: ClassVar[str] = "plan"
    runtime: ClassVar[str] = "diffusion_accel.reuse.attachment"

    plan: str | Plan | Preset | Auto | TunedPlan | PlanFamily | DiffusersCache = option(
        "hold:2",
        "auto, full, hold:n, deepcache:n[,branch], shallow:n,depth, uniform:m, faster-diffusion, FILE",
        read=reading.read_plan_option,
        names_file=names_file,
    )
    speedup: float | None = option(None, "the best plan of a tuned family that is at least so fast", (1, 1000))
    min_psnr: float | None = option(None, "the fastest plan of a tuned family with this median PSNR, dB", (5, 80))
    guidance: str | GuidanceRule = option("both", "both, reuse:n, or interval:low-high", read=read_guidance)
    stretch: bool = option(False, "use a tuned plan for another number of steps as well")
    batch_decoder: bool = option(True, "decode all steps up to the next full step as one batch")
    max_group_mb: int = option(1024, "limit in MiB for the features of one decoder batch", (1, 2**20))

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.object_of("plan")
        source = chosen(given, self.speedup, self.min_psnr)
        object.__setattr__(self, "_source", source)
        if isinstance(given, (TunedPlan, PlanFamily)) and not given.origin:  # without a file the choice is the setting
            for name, value in (("plan", source.text), ("speedup", None), ("min_psnr", None)):
                object.__setattr__(self, name, value)

    @classmethod
    def neutral(cls) -> Self:
        """Every step in full."""
        return cls(plan="full")

    @classmethod
    def accepts_bare(cls, text: str) -> bool:
        """Whether `text` behind a bare --reuse is a plan."""
        return reading.accepts_bare(text)

    @property
    def source(self) -> PlanSource:
        """What `plan` means, of a family the plan that was chosen; a file was read when the feature was made."""
        source: PlanSource = self.__dict__["_source"]
        return source

    def portable(self, _pipeline: DiffusionPipeline) -> dict[str, Any]:
        """A tuned plan with all that is known of it; the whole family where the plan is chosen by its name and a wish,
        so that another can be chosen later."""
        given, source = self.object_of("plan"), self.source
        if isinstance(given, PlanFamily) and given.origin:
            return {"plan": given.to_dict()}
        return {"plan": source.to_dict()} if isinstance(source, TunedPlan) else {}

    @property
    def choice(self) -> TunedPlan | None:
        """The plan that was chosen from a family; None if the plan is no family."""
        source = self.source
        return source if isinstance(source, TunedPlan) and source is not self.object_of("plan") else None

    def described(self, instead: dict[str, Any]) -> str:
        """The name, the fields that differ from their defaults, and which plan of a family was chosen."""
        choice = "" if self.choice is None else called(self.choice)
        return super().described(instead) + (f", its plan {choice}" if choice else "")

    @property
    def rule(self) -> GuidanceRule:
        """What `guidance` means."""
        return self.object_of("guidance")

    def works_inside(self, _pipeline: DiffusionPipeline) -> bool:
        """Whether a step runs some parts of the denoiser only; what holds predictions acts on its calls."""
        return self.source.works_inside

    def goes_into_graphs(self, _pipeline: DiffusionPipeline) -> bool:
        """All steps of a plan do; diffusers' own caches do not."""
        return not isinstance(self.source, DiffusersCache)

    def learns(self) -> bool:
        """Whether the first call teaches the plan of the next ones."""
        return isinstance(self.source, Auto)

    def clash(self, other: Feature) -> str | None:
        """That processes which draw one image would each learn a plan of their own, or go by their part of it."""
        if other.name != "patch_parallel":
            return None
        if self.learns():
            return "every process would learn a plan of its own; draw without it and give the plan of the report"
        if isinstance(self.source, DiffusersCache) and self.source.name in FIRST_BLOCK_CACHES:
            return f"{self.source.name} looks at what the first block of a whole image does; use another plan"
        return None

    def parts_branches(self) -> bool:
        """Whether it tells the branches of guidance apart: computes one of them only at some steps, or needs
        both at once."""
        return self.rule.kind != "both" or self.source.kinds().parts_branches

    def unfit_for(self, steps: int, scheduler: str) -> str | None:
        """That the plan is for another number of steps, where a scheduler has one timestep for each."""
        source, made_for = self.source, self.source.made_for
        if not scheduler and isinstance(source, TunedPlan):  # the model's own: presumably the one of the plan
            scheduler = str(source.conditions.get("scheduler"))
        more = not scheduler or scheduler.lower().startswith(MORE_TIMESTEPS)
        if made_for is None or self.stretch or made_for == steps or more:
            return None
        shipped = load_shipped().values() if isinstance(source, TunedPlan) else ()
        fitting = [f"{family} with {family.conditions['scheduler']}" for family in shipped if family.made_for == steps]
        there = f"; plans for {steps} steps are {', '.join(fitting)}" if fitting else ""
        return (
            f"the plan {printable(str(self.plan)[:60])} is for {made_for} steps, this call has {steps}; "
            f"use {made_for} steps, or stretch=true{there}"
        )
