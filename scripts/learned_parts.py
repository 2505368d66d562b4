"""What each part of the tuner is worth, one added after the other, at the computed steps of three plans.

The plans are those that shipped before steps were fitted with latents: their computed steps are kept until the last two
lines, in which they are searched. DDIM, 50 steps. The numbers are of images that nothing was fitted to.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from measuring import STICKER, head, line, numbers, short

from diffusion_accel import Reuse, accelerate
from diffusion_accel.bench.benchmark import UNSEEN
from diffusion_accel.evaluation.prompts import embedded_prompts
from diffusion_accel.measure.sampler import Sampler
from diffusion_accel.pipelines.schedulers import set_scheduler
from diffusion_accel.prediction import Conversion, converted
from diffusion_accel.reuse.plan import Plan, Step
from diffusion_accel.tuning.by_rollouts import FEW
from diffusion_accel.tuning.error_feedback import Rollout
from diffusion_accel.tuning.fits import combination, fitted
from diffusion_accel.tuning.jumps import Jumps, Trajectory, evaluated
from diffusion_accel.tuning.measure import reusing
from diffusion_accel.tuning.recording import record
from diffusion_accel.tuning.replay import Recording, Replay
from diffusion_accel.tuning.timesteps import ROUNDS, NodeSearch, residuals

STEPS = 50
# computed steps, by their number, of the plans that shipped before: fast, balanced, quality
BEFORE: dict[int, tuple[int, ...]] = {
    6: (0, 23, 32, 38, 44, 47),
    8: (0, 19, 25, 33, 38, 42, 45, 47),
    14: (0, 13, 18, 22, 26, 30, 34, 37, 40, 43, 44, 46, 47, 48),
}
NAMES = {6: "ddim-fast.json", 8: "ddim-balanced.json", 14: "ddim-quality.json"}
BEFORE_IT = "the plan that shipped before, polished by Gauss-Newton steps"


@dataclass(frozen=True)
class Parts:
    """What a fit may use.

    Attributes:
        weights: whether anything is fitted; otherwise the last clean sample stands.
        on_policy: to what its own errors have left, not to the baseline's own states.
        latents: as well as predictions.
        channels: each with its own numbers, where a run of held steps ends.
        corrected: whether computed steps are fitted, too.
        guidance: what it adds, by itself.
    """

    weights: bool = True
    on_policy: bool = False
    latents: bool = False
    channels: bool = False
    corrected: bool = False
    guidance: bool = False


ADDED = {
    "the last clean sample": Parts(weights=False),
    "predictions, one number each, fitted to the baseline's states": Parts(),
    "… fitted on the way, to the errors made so far": Parts(on_policy=True),
    "… + latents": Parts(on_policy=True, latents=True),
    "… + numbers by channel": Parts(on_policy=True, latents=True, channels=True),
    "… + corrected computed steps": Parts(on_policy=True, latents=True, channels=True, corrected=True),
    "… + what guidance adds": Parts(on_policy=True, latents=True, channels=True, corrected=True, guidance=True),
    "(without it, and fitted to the baseline's states)": Parts(latents=True, channels=True, corrected=True),
}


class PartRollout(Rollout):
    """A rollout whose fits use some parts only."""

    def __init__(self, replay: Replay, recording: Recording, trajectory: Trajectory, parts: Parts) -> None:
        super().__init__(replay, recording, trajectory, range(recording.images))
        self.parts = parts

    def _step(self, i: int, node: int | None, lands: bool) -> Step:
        own, parts, time = self.trajectory, self.parts, self.scheduler.timesteps[i]
        a, s, x, full = own.alphas[i], own.sigmas[i], self.sample, node is not None
        if full:
            if parts.on_policy:
                seen = evaluated(self.replay, own, i, x, self.images, parts.guidance)
            else:
                seen = converted("sample", own.kind, self.recording.predictions[i].float(), x, a, s), x, None
            self.seen = self.seen.then(*seen)
        clean = list(self.seen.clean)
        latents = ([] if full else [x]) + list(self.seen.latents) if parts.latents else []
        wanted = self._wanted(i, time, x) if parts.weights and (not full or parts.corrected) else None
        fit = None
        if wanted is not None:
            features = [*clean, *latents, *self.seen.additions]
            centre = [1.0] + [0.0] * (len(features) - 1)
            goal = converted("sample", own.kind, wanted, x, a, s)
            alike = not (parts.channels and lands)
            fit = combination(fitted(features, goal, centre, alike=alike), len(clean), len(latents))
        value = clean[0] if fit is None else fit.apply(clean, latents, self.seen.additions)
        self.sample = self._made(self.scheduler, i, time, self.conversion.back("sample", value, x, float(time)))
        if not parts.on_policy and i + 1 < len(self.recording):
            self.sample = self.recording.samples[i + 1].float()
        return Step("full" if full else "hold", space="sample" if fit is not None or not full else "", fit=fit)


def searched(recording: Recording, replay: Replay, size: int, rollouts: int) -> Iterator[tuple[str, Sequence[int]]]:
    """The steps that the dynamic programme finds, and those after a local search with so many rollouts."""
    trajectory = Trajectory.of(recording, Conversion(recording.scheduler))
    jumps = Jumps(replay, trajectory, range(min(recording.images, max(FEW, recording.images // 2))), apart=True)
    left = residuals(trajectory, range(recording.images), torch.ones(len(jumps.weights)))
    search = NodeSearch(lambda nodes: jumps.run(nodes).decibels.tolist(), left)
    search.rounds([size], ROUNDS, lambda: True)
    yield "… + computed steps by the dynamic programme", search.best(size)
    until = len(search.known) + rollouts
    search.refine(size, lambda: len(search.known) < until)
    yield "… + and a local search on rollouts", search.best(size)


def run(pipe: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every line of the table."""
    set_scheduler(pipe, "ddim")
    unseen = tuple(embedded_prompts(options.count, UNSEEN))
    sampler = Sampler(pipe, unseen, STEPS, options.seed, options.batch, STICKER)
    taught = replace(sampler, prompts=tuple(embedded_prompts(options.calibration)), seed=20_000)
    plain, (recording, _) = sampler.images(), record(taught)
    replay, trajectory = Replay(recording), Trajectory.of(recording, Conversion(recording.scheduler))
    rows: list[dict[str, Any]] = []

    def measure(size: int, what: str, nodes: Sequence[int], parts: Parts) -> dict[str, Any]:
        plan: Plan = PartRollout(replay, recording, trajectory, parts).plan(nodes)
        with reusing(pipe, plan):
            row = {"evaluations": size, "part": what, "nodes": [*nodes]} | numbers(plain, sampler.images())
        rows.append(row)
        line(size, what, short(row, True))
        return row

    head("computed steps", "part", "median / worst decile / worst, dB")
    for size in options.sizes or BEFORE:
        if options.before is not None:
            accelerate(pipe, Reuse(plan=str(options.before / NAMES[size])))
            rows.append({"evaluations": size, "part": BEFORE_IT} | numbers(plain, sampler.images()))
            pipe.acceleration.remove()
            line(size, BEFORE_IT, short(rows[-1], True))
        for what, parts in ADDED.items():
            measure(size, what, BEFORE[size], parts)
        for what, nodes in searched(recording, replay, size, options.rollouts):
            measure(size, what, nodes, ADDED["… + what guidance adds"])
    return rows
