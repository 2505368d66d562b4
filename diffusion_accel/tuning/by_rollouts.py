"""The search by rollouts: plans whose steps are all fitted, found without calling the pipeline.

What the denoiser says with guidance is repeated without text encoder and decoder (`replay`), a dynamic programme and
real rollouts find which steps to compute (`timesteps`, `jumps`), and every step is fitted on the way
(`error_feedback`).
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from diffusion_accel.combination import Combination
from diffusion_accel.errors import ConfigurationError
from diffusion_accel.measure.fidelity import psnr, spread
from diffusion_accel.measure.timing import seconds_of
from diffusion_accel.prediction import Conversion
from diffusion_accel.progress import Progress, silent
from diffusion_accel.reuse.conditions import conditions
from diffusion_accel.reuse.plan import FULL, Plan, Step
from diffusion_accel.reuse.plan_family import PlanFamily
from diffusion_accel.reuse.plan_file import TunedPlan

from .branches import WORTH, BranchSearch, cost
from .budget import Budget
from .error_feedback import Rollout
from .jumps import Jumps, Trajectory
from .measure import Reference, reusing, why_unguided
from .presets import presets
from .replay import Recording, Replay
from .result import measured_together
from .state import Scores
from .target import CEILING, Target
from .timesteps import ROUNDS, Nodes, NodeSearch, residuals
from .together import ALONE, Tasks, Together

FEW = 8  # images of which rollouts of a family are compared, or half of the calibration images if that is more
RIVALS = 3  # presets that a single plan is compared with in the pipeline
TIMED = 3  # rounds of timing, of which the first warms up
GROWTHS = (1.25, 1.4, 1.6, 2.0)  # from one number of evaluations of a family to the next: the first that is affordable
SEARCHED = 0.15  # share of the work of a family that is left for rollouts beyond the first one of each size
BRANCHED = 0.1  # share of the search that is for leaving branches of guidance out
NO_BRANCHES = "these calls have no two branches of guidance"
FASTEST, SLOWEST = 0.08, 0.56  # shares of the steps that the plans of a family compute


@dataclass
class Work:
    """What a search has done, in images drawn by the baseline.

    Attributes:
        steps: of the baseline.
        spent: by what for.
    """

    steps: int
    spent: dict[str, float] = field(default_factory=dict)

    def add(self, what: str, images: float) -> None:
        """So many images more."""
        self.spent[what] = self.spent.get(what, 0.0) + images

    def total(self, together: Together) -> dict[str, float]:
        """What all processes have spent."""
        parts = together.everyone(self.spent)
        names = dict.fromkeys(name for part in parts for name in part)
        return {name: round(sum(part.get(name, 0.0) for part in parts), 2) for name in names}


def untraceable(recording: Recording) -> str | None:
    """Why plans for a pipeline cannot be searched by rollouts; None if they can."""
    if recording.reason:
        return recording.reason
    conversion = Conversion(recording.scheduler)
    if not conversion.possible:
        return f"with {type(recording.scheduler).__name__} a prediction cannot be turned into a clean sample"
    return None


class RolloutTuner:
    """A search for one pipeline, scheduler and number of steps.

    Attributes:
        reference: the baseline.
        recording: its run for the calibration images.
        fixed, each: what a call takes without any computed step, and what each adds, as shares of the baseline's time.
        search: which steps to compute.
        work: what this process has done.
        images: how much may be done, in images of the baseline, and `most`: after how much no rollout is begun.
        together: the processes that search; the first of them has the methods called that ask for something, the
            others `tasks.follow`.
    """

    def __init__(
        self,
        reference: Reference,
        recording: Recording,
        budget: Budget,
        progress: Progress = silent,
        state: Path | None = None,
        together: Together = ALONE,
        images: float | None = None,
    ) -> None:
        self.images = self.most = math.inf if images is None else images
        self.reference, self.recording, self.budget, self.progress = reference, recording, budget, progress
        self.together = together
        self.prompts = together.in_order(reference.sampler.prompts)
        self.held = sum(together.everyone(len(reference.heldout.prompts)))
        self.tasks = Tasks(
            together,
            {
                "rollout": self._rolled,
                "plan": self._fitted,
                "psnr": self._drawn,
                "measure": self._measured,
                "work": self._worked,
            },
        )
        self.total = len(recording)
        self.work = Work(self.total)
        self.work.add("baseline", recording.images * (1 + 1 / self.total))  # and what was asked again to check
        self.replay = Replay(recording)
        self.trajectory = Trajectory.of(recording, Conversion(recording.scheduler))
        self.apart = recording.branches is not None
        self.unbranched = why_unguided(reference.sampler) if self.apart else NO_BRANCHES
        self.fixed, self.each, self.half = self._costs()
        few = len(self.prompts) if images is None else max(FEW, len(self.prompts) // 2)
        self._compared = min(len(self.prompts), few)
        self.few = together.among(self._compared)
        self.jumps = Jumps(self.replay, self.trajectory, self.few, together=together, apart=self.apart)
        self._scores = Scores(state, self._about)
        weights = torch.ones(len(self.jumps.weights))
        self.search = NodeSearch(self._run, residuals(self.trajectory, range(recording.images), weights, together))
        self.branches = BranchSearch(self.search, self._run, self.half)

    # ------------------------------------------------------------------ what is asked for
    def one(self, speedup: float) -> tuple[Plan, Nodes]:
        """The nearest plan that is so fast.

        Raises:
            ConfigurationError: none is.
        """
        size = self.largest(speedup)
        self._save_for([size], 1 + RIVALS)
        (nodes,) = self._searched([size])
        return self._judged(self.plan(nodes), nodes)

    def _searched(self, sizes: Sequence[int]) -> list[Nodes]:
        """The best nodes of the cost of so many computed steps; then some leave a branch of guidance out."""
        if self.unbranched:
            return self.search.every(sizes, self._share, self._tell)
        self.search.every(sizes, lambda part: self._share((1 - BRANCHED) * part), self._tell)
        return [self._branched(size, 1 / (len(sizes) - done)) for done, size in enumerate(sizes)]

    def _branched(self, size: int, part: float) -> Nodes:
        if self.unbranched:
            return self.search.best(size)
        return self.branches.best(size, self._share(part), lambda: self._tell(size))

    def fastest(self, min_psnr: float) -> tuple[Plan, Nodes]:
        """The fastest plan whose median reaches a PSNR on the calibration images.

        Raises:
            ConfigurationError: none does.
        """
        sizes = range(2, self.total)
        self.search.rounds(family_sizes(self.total), ROUNDS, self._share(1.0))
        low, high, found = 0, len(sizes), None
        while low < high:
            middle = (low + high) // 2
            size = sizes[middle]
            self.search.rounds([size], 1, lambda: True)
            self.search.refine(size, self._share(0.25), lambda size=size: self._tell(size))  # type: ignore[misc]
            nodes = self._branched(size, BRANCHED)
            plan = self.plan(nodes)
            if self._spread(plan)[0] >= min_psnr:
                found, high = (plan, nodes), middle
            else:
                low = middle + 1
        if found is None:
            raise ConfigurationError(f"no plan reaches {min_psnr:g} dB on these prompts")
        return self._judged(*found, min_psnr)

    def _judged(self, plan: Plan, nodes: Nodes, least: float = 0.0) -> tuple[Plan, Nodes]:
        """The plan, or a preset that computes no more steps, has this median and is nearer to the calibration images,
        in the mean of median and worst decile."""
        best, nearest = (plan, nodes), statistics.mean(self._spread(plan))
        for preset in presets(self.recording, int(cost(nodes, self.half)))[:RIVALS]:
            self.progress("presets beside it", self.budget.used(), max(0.0, self.budget.left()))
            median, worst = self._spread(preset)
            if median >= least and (own := statistics.mean((median, worst))) > nearest:
                best, nearest = (preset, tuple(i for i, step in enumerate(preset.steps) if step.mode == "full")), own
        return best

    def every(self, sizes: Sequence[int] = ()) -> list[tuple[Plan, Nodes]]:
        """Plans for every speed, from the fastest to the nearest one."""
        sizes = sorted(set(sizes)) or self._affordable()
        self._save_for(sizes)
        return [(self.plan(nodes), nodes) for nodes in self._searched(sizes)]

    def _affordable(self) -> list[int]:
        """The sizes of a family that leave some work for searching."""
        for growth in GROWTHS:
            sizes = family_sizes(self.total, growth)
            first = sum(sizes) / self.total * self._compared
            if self._done + first + self._later(sizes) <= (1 - SEARCHED) * self.images:
                break
        return sizes

    @property
    def _done(self) -> float:
        """The work of all processes."""
        return float(self.tasks.do("work", None))

    def _later(self, sizes: Sequence[int]) -> float:
        """What is done for plans of these sizes after the search."""
        drawn, held = sum(sizes) / self.total, self.held
        return len(self.prompts) * drawn + (held + TIMED) * (1 + drawn)

    def _save_for(self, sizes: Sequence[int], drawn: int = 0) -> None:
        """Leave enough work for what comes after the search, also for so many plans that all images are drawn with."""
        calls = self._compared + drawn * len(self.prompts)
        self.most = self.images - self._later(sizes) - max(sizes) / self.total * calls

    def largest(self, speedup: float) -> int:
        """How many steps may be computed at a speed-up. Raises `ConfigurationError` if not even one may."""
        size = int((1 / speedup - self.fixed) / self.each + 1e-6) if self.each else self.total
        if size < 1:
            raise ConfigurationError(
                f"no plan is {speedup:g} times as fast: what a plan cannot save limits it to "
                f"{1 / (self.fixed + self.each):.1f} here (decoding, the scheduler's own steps)"
            )
        return min(size, self.total)

    def plan(self, nodes: Nodes) -> Plan:
        """The plan with these full steps, fitted on all calibration images."""
        if len(nodes) == self.total:
            return Plan((FULL,) * self.total)
        plan: Plan = self.tasks.do("plan", list(nodes))
        return plan

    # ------------------------------------------------------------------ what comes out
    def tuned(self, found: Sequence[tuple[Plan, Nodes]], target: Target) -> list[TunedPlan]:
        """Plans as files have them, with their measurements on the held-out images."""
        self.progress("held-out prompts", 1.0)
        plans = [plan for plan, _ in found]
        numbers, work = self.tasks.do("measure", [_tokens(plan) for plan in plans])
        call = {**self.reference.sampler.arguments, "seed": self.reference.sampler.seed}
        valid = conditions(self.reference.sampler.pipe, self.total) | {"call": call}
        return [
            TunedPlan(plan, valid, values, self._notes(nodes, target, work))
            for plan, nodes, values in zip(plans, [nodes for _, nodes in found], numbers, strict=True)
        ]

    def family(self, found: Sequence[tuple[Plan, Nodes]]) -> PlanFamily:
        """Several of them in one file, without those that are neither faster nor nearer than another."""
        plans = self.tuned(found, Target())
        rollouts = len(self.search.known) + len(self.branches.known)
        return PlanFamily.of(unsurpassed(plans), search={"work": plans[0].search["work"], "rollouts": rollouts})

    def _notes(self, nodes: Nodes, target: Target, work: dict[str, float]) -> dict[str, Any]:
        return {
            "target": {k: v for k, v in vars(target).items() if v is not None},
            "method": "rollouts",
            "predicted_time_ratio": round(1 / (self.fixed + self.each * cost(nodes, self.half)), 3),
            "baseline": {"steps": self.total, "scheduler": type(self.reference.scheduler).__name__},
            "calibration_pictures": len(self.prompts),
            "plans_evaluated": len(self.search.known) + len(self.branches.known),
            "guidance_reuse": f"not searched: {self.unbranched}" if self.unbranched else "searched",
            "work": work,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        }

    # ------------------------------------------------------------------ rollouts
    def _run(self, nodes: Nodes) -> list[float]:
        return self._scores.of(f"rollout {','.join(map(str, nodes))}", lambda: self.tasks.do("rollout", list(nodes)))

    def _about(self) -> dict[str, Any]:
        sampler = self.reference.sampler
        call = {**sampler.arguments, "seed": sampler.seed}
        return {
            "conditions": conditions(sampler.pipe, self.total) | {"call": call},
            "prompts": self.prompts,
            "method": "rollouts",
        }

    def _share(self, part: float) -> Callable[[], bool]:
        """Whether there is something left of a part of the time and of the work that are left now."""
        until, done = self.budget.share(part), self._done
        most = math.inf if self.most == math.inf else done + part * (self.most - done)
        return lambda: time.monotonic() < until and self._done < most

    def _spread(self, plan: Plan) -> tuple[float, float]:
        """Median and worst decile of the calibration images under a plan, in dB."""
        return spread(self.tasks.do("psnr", _tokens(plan)), CEILING)

    # ------------------------------------------------------------------ what every process does for its images
    def _rolled(self, nodes: Sequence[int]) -> list[float]:
        """The scores of all images of which rollouts are compared."""
        before = self.replay.evaluations
        if self.recording.draws_noise:  # a jump cannot follow noise; the scheduler's own steps can
            rollout = self._rollout(self.few)
            rollout.plan(nodes)
            values = self.jumps.decibels(rollout.sample)
        else:
            values = self.jumps.run(nodes).decibels
        self.work.add("rollouts", (self.replay.evaluations - before) / self.total)
        return self.together.in_order(values.tolist())

    def _fitted(self, nodes: Sequence[int]) -> Plan:
        before = self.replay.evaluations
        plan = self._rollout(range(self.recording.images)).plan(nodes)
        self.work.add("fits", (self.replay.evaluations - before) / self.total)
        return plan

    def _rollout(self, images: Sequence[int]) -> Rollout:
        """These images, under a plan."""
        return Rollout(self.replay, self.recording, self.trajectory, images, self.together, self.apart)

    def _worked(self, _: None) -> float:
        return sum(self.together.everyone(sum(self.work.spent.values())))

    def _drawn(self, tokens: list[str]) -> list[float]:
        """The PSNR of all calibration images under a plan."""
        plan = Plan.parse(tokens)
        with reusing(self.reference.sampler.pipe, plan):
            images = self.reference.sampler.images()
        self.work.add("plans in the pipeline", len(images) * _share(plan))
        return self.together.in_order(psnr(self.reference.images, images).tolist())

    def _measured(self, several: list[list[str]]) -> tuple[list[dict[str, Any]], dict[str, float]]:
        """The numbers of plans on the held-out images, and what everything took."""
        plans = [Plan.parse(tokens) for tokens in several]
        numbers = measured_together(plans, self.reference, TIMED - 1, self.together)
        timed = TIMED if self.together.first else 0  # once to count
        self.work.add("held-out images", (len(self.reference.heldout.prompts) + timed) * (1 + sum(map(_share, plans))))
        return numbers, self.work.total(self.together)

    def _costs(self) -> tuple[float, float, float]:
        """What a call takes without its computed steps, what each adds, and what of that one with one branch does."""
        held, thinned = self.together.agreed(self._least() if self.together.first else None)
        each = (1 - held) / (self.total - 1)
        half = (thinned - held) / (1 - held) if held < 1 else 1.0
        if not self.unbranched and half > WORTH:
            self.unbranched = "one branch of guidance costs about as much as both"
        return held - each, each, min(1.0, max(0.3, half))

    def _least(self) -> tuple[float, float]:
        """What a call takes if nothing but the first step is computed, and if all others are with one branch only, in
        turn with the baseline."""
        self.progress("costs", 0.0)
        one, rest = self.reference.sampler.part(0, 1), self.total - 1
        one_held = Step("hold", space="sample", fit=Combination(((1.0,),), ((0.0, 0.0),)))
        plans = [Plan((FULL, *(one_held,) * rest))]
        plans += [] if self.unbranched else [Plan((FULL, *(Step(guidance="reuse"),) * rest))]
        shares: list[list[float]] = []
        for turn in range(TIMED):
            whole, parts = seconds_of(one.images), []
            for plan in plans:
                with reusing(one.pipe, plan):
                    parts.append(seconds_of(one.images) / whole)
            shares += [parts] if turn else []
        self.work.add("costs", TIMED * (1 + sum(map(_share, plans))))
        held, *others = (min(1.0, statistics.median(part)) for part in zip(*shares, strict=True))
        return held, others[0] if others else 1.0

    def _tell(self, size: int) -> None:
        speedup = 1 / (self.fixed + self.each * size)
        rollouts = len(self.search.known) + len(self.branches.known)
        text = f"{rollouts} rollouts, {size} computed steps, {speedup:.2f}x"
        self.progress(text, self.budget.used(), max(0.0, self.budget.left()))


def unsurpassed(plans: Sequence[TunedPlan]) -> list[TunedPlan]:
    """Those than which no other one is at least as fast and as near, in median and worst decile."""
    numbers = [tuple(value or 0.0 for value in (p.speedup, p.psnr_median, p.psnr_worst_decile)) for p in plans]

    def surpassed(own: tuple[float, ...]) -> bool:
        return any(other != own and all(a >= b for a, b in zip(other, own, strict=True)) for other in numbers)

    return [plan for plan, own in zip(plans, numbers, strict=True) if not surpassed(own)]


def _tokens(plan: Plan) -> list[str]:
    return [str(step) for step in plan.steps]


def _share(plan: Plan) -> float:
    """Of its steps, those that compute everything; with one branch of guidance half of one."""
    full = [step for step in plan.steps if step.mode == "full"]
    return sum(1.0 if step.guidance == "both" else 0.5 for step in full) / len(plan)


def family_sizes(total: int, growth: float = GROWTHS[0]) -> list[int]:
    """How many steps the plans of a family compute, of so many; each so many times as many as the one before."""
    sizes, size = [], max(2, round(FASTEST * total))
    while size <= max(2, SLOWEST * total):
        sizes.append(size)
        size = max(size + 1, round(size * growth))
    return sizes
