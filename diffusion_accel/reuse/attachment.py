"""What the reuse features are on a pipeline: everything lives for one call, in a run that the call begins with."""

from __future__ import annotations

import functools
import itertools
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from diffusion_accel.denoisers import layers_per_block, no_branches
from diffusion_accel.errors import ConfigurationError
from diffusion_accel.feature import Attachment
from diffusion_accel.noise_level import unknown_noise_levels
from diffusion_accel.steps import StepClock

from . import needs
from .auto import Auto
from .auto_run import AutoCall
from .diffusers_cache import DiffusersCache
from .diffusers_cache_run import CacheRun
from .encoder_reuse import EncoderReuse
from .executor import ReuseRun
from .plan import Plan, PlanSource
from .plan_family import numbers_of
from .plan_file import TunedPlan
from .reuse import Reuse
from .words import in_words

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

AnyReuse = TypeVar("AnyReuse", bound=Reuse | EncoderReuse, covariant=True)

_numbers = itertools.count(1)


class Run(Protocol):
    """What is in force during one call."""

    def install(self) -> None:
        """Put it in force."""

    def uninstall(self) -> None:
        """Take everything back."""


def supports(feature: Reuse, pipe: DiffusionPipeline) -> str | None:
    """Why the plan or the rule of guidance of a feature cannot be followed by a pipeline; None if they can."""
    if reason := needs.no_loop(pipe):
        return reason
    if feature.rule.kind != "both" and (reason := no_branches(pipe)):
        return reason
    if feature.rule.needs_levels and (reason := unknown_noise_levels(pipe.scheduler)):
        return f"{reason}, so guidance=interval is not possible"
    if reason := needs.unfollowable(pipe):
        return reason
    if isinstance(feature.source, DiffusersCache) and feature.rule.kind != "both":
        return "diffusers' own caches do not combine with a guidance rule"
    if feature.rule.kind != "both" and (reason := needs.uneven_streams(pipe, feature.source.kinds())):
        return reason
    return feature.source.supports(pipe)


def attach(feature: Reuse, pipe: DiffusionPipeline) -> ReuseAttachment[Reuse]:
    """The engine on a pipeline."""
    return ReuseAttachment(feature, pipe)


class ReuseAttachment(Attachment[AnyReuse]):
    """The reuse engine, or one of diffusers' caches, on one pipeline."""

    def __init__(self, feature: AnyReuse, pipeline: DiffusionPipeline) -> None:
        super().__init__(feature, pipeline)
        self._run: Run | None = None
        self._counters: dict[str, float] = {}
        self._auto: AutoCall | None = None
        self._own = f"of attachment {next(_numbers)}"

    def before_call(self, clock: StepClock) -> None:
        """Put the plan in force. The user may have replaced the denoiser since accelerate(), so it is asked again."""
        feature, source = self.feature, self.feature.source
        if reason := feature.supports(self.pipeline):
            raise ConfigurationError(f"{feature.name} cannot be used on this pipeline any more: {reason}")
        self._counters, self._auto = {}, None
        if isinstance(source, TunedPlan):
            source.check(self.pipeline, clock.arguments)
        self._install(self._cache_run(source, clock) if isinstance(source, DiffusersCache) else self._plan_run(clock))

    def _install(self, run: Run) -> None:
        self._run = run
        self.changes.add(run.uninstall)
        run.install()

    def _cache_run(self, cache: DiffusersCache, clock: StepClock) -> Run:
        return CacheRun(cache, self.pipeline, self._counters, clock)

    def _plan_run(self, clock: StepClock) -> Run:
        feature, source = self.feature, self.feature.source.for_model(layers_per_block(self.pipeline))
        if isinstance(source, Auto):
            source = self._auto = AutoCall(source, self.pipeline, clock, self._own)
        return ReuseRun(
            feature.name,
            self.pipeline,
            clock,
            self._counters,
            source.kinds(),
            functools.partial(plan_of_call, feature, source, clock),
            feature.batch_decoder,
            feature.max_group_mb,
        )

    def after_call(self) -> None:
        """Undo what the call changed and forget the run."""
        super().after_call()
        self._run = None

    def process_output(self, output: Any) -> Any:
        """What is returned stays as it is; a call that succeeded may have taught something."""
        if self._auto is not None:
            self._auto.learn()
        return output

    def counters(self) -> dict[str, float]:
        """What the last call did."""
        return dict(self._counters)

    def words(self) -> str:
        """The counters for people."""
        return in_words(self._counters)

    def choices(self) -> dict[str, Any]:
        """The plan that was chosen from a family, or the one that was learned."""
        if self._auto is not None:
            return self._auto.choices()
        feature = self.feature
        choice = feature.choice if isinstance(feature, Reuse) else None
        return {} if choice is None else {"plan": choice.text, **numbers_of(choice)}


def plan_of_call(feature: Reuse | EncoderReuse, source: PlanSource, clock: StepClock, total: int) -> Plan:
    """The plan for a pass over `total` steps, with the feature's rule of guidance over it."""
    plan = _own_plan(source, clock, total, feature.stretch)
    return feature.rule.applied(plan, clock.levels if feature.rule.needs_levels else ())


def _own_plan(source: PlanSource, clock: StepClock, total: int, stretch: bool) -> Plan:
    made_for = source.made_for
    if made_for is None or made_for == total:
        return source.for_steps(total)
    if made_for == clock.scheduled:  # img2img and others run a part of the timesteps
        return source.for_steps(made_for).part(clock.offset, clock.offset + total)
    if not stretch:
        of = f" of {clock.scheduled} (its strength, or where it starts and ends)" if total < clock.scheduled else ""
        raise ConfigurationError(
            f"the plan is for {made_for} steps, this call has {total}{of}; use {made_for} steps, or stretch=true"
        )
    return source.for_steps(total)
