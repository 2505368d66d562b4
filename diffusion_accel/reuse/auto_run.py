"""`Auto` on a pipeline: the first call is computed in full and repeated with plans, the next ones follow one."""

from __future__ import annotations

import hashlib
import json
import logging
from typing import TYPE_CHECKING, Any

from diffusion_accel.io import first_line

from . import auto_memory, needs
from .auto import Auto, Candidate
from .conditions import conditions
from .plan import FULL, Kinds, Plan, PlanSource
from .probe import Probe
from .recorded import Recording

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from diffusion_accel.steps import StepClock

logger = logging.getLogger(__name__)


def supports(_source: Auto, pipe: DiffusionPipeline) -> str | None:
    """Why no step of a pipeline can be left out; None if some can. Where nothing can be learned every step is full."""
    return needs.unfollowable(pipe)


class AutoCall(PlanSource):
    """`Auto` during one call of a pipeline: what is known about such calls, or a recording of this one."""

    def __init__(self, auto: Auto, pipe: DiffusionPipeline, clock: StepClock, own: str) -> None:
        self.auto, self.clock = auto, clock
        self.about, self.keep = about(pipe, clock, own)
        self.probe = Probe(pipe, clock.arguments)
        self.known = auto_memory.recall(self.about)
        self.recording: Recording | None = None
        self.followed: Plan | None = None
        self.outcome = ""

    @classmethod
    def parse(cls, text: str) -> AutoCall:
        """It belongs to a call, and no text means one."""
        raise NotImplementedError

    def kinds(self) -> Kinds:
        """The steps of every plan that this call may follow; its number of steps is not known yet."""
        chosen = filter(None, map(self.auto.choose, self.known.values()))
        return Kinds({FULL, *(step for candidate in chosen for step in candidate.plan.steps)})

    def for_steps(self, total: int) -> Plan:
        """The plan that was learned for the steps of this pass; every step in full, recorded, if none was."""
        candidates = self.known.get(self._steps())
        if candidates is None and self.clock.segment == 0:
            self.recording = Recording(self.clock)
            self.clock.on_step(before=self.recording, after=self.recording.after)
        plan = self.auto.for_steps(total)
        if candidates is not None:
            chosen = self.auto.choose(candidates)
            fitting = chosen is not None and len(chosen.plan) == total
            plan = chosen.plan if chosen is not None and fitting else plan
            self.outcome = _said(chosen if fitting else None, "learned before")
        self.followed = plan
        return plan

    def learn(self) -> None:
        """Remember what a recorded call, which has succeeded, teaches."""
        if (recording := self.recording) is None or self.outcome:
            return
        problem, candidates, keep = recording.problem, tuple[Candidate, ...](), self.keep
        accident = None if problem else recording.accident
        if not problem and not accident:
            try:
                if self.probe.altered(recording.last):
                    accident = "a callback changed what it drew"
                candidates = (
                    () if accident else self.probe.candidates(recording.last, len(recording.times), recording.search())
                )
            except Exception as error:  # the image is there already, and nobody asked for more of it
                problem, keep = f"the call cannot be repeated ({first_line(error, 120)})", False
                logger.warning("auto: %s", problem)
        if accident:
            self.outcome = f"computed in full, and nothing was learned: {accident}"
            return
        auto_memory.remember(self.about + self._key_of(recording.times), candidates, keep)
        chosen = self.auto.choose(candidates)
        said = f"nothing was learned: {problem}" if problem else _said(chosen, "for the next ones")
        self.outcome = f"first call, computed in full and repeated to try plans; {said}"

    def _steps(self) -> str:
        return self._key_of(self.clock.timesteps)

    def _key_of(self, times: list[float]) -> str:
        return f"{len(times)} steps {_hash([round(t, 4) for t in times])}"

    def choices(self) -> dict[str, Any]:
        """What happened, in words, and the plan that was followed, written out so that it can be followed again."""
        if self.followed is None:
            return {}
        full = all(step == FULL for step in self.followed.steps)
        return {"outcome": self.outcome, "plan": "full" if full else self.followed.text}


def about(pipe: DiffusionPipeline, clock: StepClock, own: str) -> tuple[str, bool]:
    """A text that calls have in common for which the same was learned, and whether it means the same tomorrow: not if
    the weights are elsewhere, where `own` stands for them."""
    known = conditions(pipe, 0)
    weights = known["weights"] or own
    config = {k: v for k, v in dict(getattr(pipe.scheduler, "config", {})).items() if not k.startswith("_")}
    scales = [clock.arguments.get(name) for name in ("guidance_scale", "true_cfg_scale")]
    branches = "guided" if any(isinstance(s, (int, float)) and s > 1 for s in scales) else "not guided"
    scheduler = f"{known['scheduler']} {_hash(config)}"
    return f"{type(pipe).__name__} {known['denoiser']} {weights} {scheduler} {branches} ", known["weights"] is not None


def _hash(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _said(chosen: Candidate | None, when: str) -> str:
    if chosen is None:
        return f"{when}: no plan is near enough, every step is computed"
    steps = f"{chosen.full} of {len(chosen.plan)} steps computed"
    return f"{when}: {steps}, error {chosen.nearness:.0f} dB below the latents"
