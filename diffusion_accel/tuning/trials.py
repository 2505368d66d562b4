"""Plans that are tried on the calibration prompts, and how near to the baseline each comes."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import torch

from diffusion_accel.measure.fidelity import psnr
from diffusion_accel.measure.sampler import Sampler
from diffusion_accel.reuse.conditions import conditions
from diffusion_accel.reuse.plan import Plan

from .measure import Reference, reusing
from .state import add_score, read_search, write_search
from .target import CEILING


class Trials:
    """Runs plans, each once, and remembers the PSNR of every image.

    Attributes:
        sampler: the pipeline with the calibration prompts, and the number of steps that the plan is for.
        reference: the baseline, which may have more steps or another scheduler.
        state: file that keeps every evaluated plan, so that a search that was stopped goes on; None: none.
        known: the PSNR of every image, by the text of a plan.
        evaluated: how many plans were run.
    """

    def __init__(self, sampler: Sampler, reference: Reference, state: Path | None = None) -> None:
        self.sampler, self.reference, self.state = sampler, reference, state
        self.known: dict[str, list[float]] = {}
        self.evaluated = 0

    def scores(self, plan: Plan, at_least: float | None = None) -> list[float]:
        """PSNR of every calibration image, at most `CEILING`; of fewer if a mean `at_least` so high is hopeless."""
        name = str(plan)
        if name in self.known:
            return self.known[name]
        values: list[float] = []
        with reusing(self.sampler.pipe, plan):
            for start, end in self.sampler.chunks():
                drawn = self.sampler.call(start, end)
                values += psnr(self.reference.images[start:end], drawn).clamp(max=CEILING).tolist()
                if at_least is not None and statistics.fmean(values) < at_least - 3.0:
                    break
        self._keep(name, values)
        return values

    def draw(self, plan: Plan) -> torch.Tensor:
        """The calibration images with a plan."""
        with reusing(self.sampler.pipe, plan):
            images = self.sampler.images()
        self._keep(str(plan), psnr(self.reference.images, images).clamp(max=CEILING).tolist())
        return images

    def mean(self, plan: Plan, at_least: float | None = None) -> float:
        """The mean PSNR of a plan; −1 if it was given up after some images."""
        values = self.scores(plan, at_least)
        return statistics.fmean(values) if len(values) == len(self.sampler.prompts) else -1.0

    def median(self, plan: Plan, at_least: float | None = None) -> float:
        """The median PSNR of a plan; −1 if it was given up after some images."""
        values = self.scores(plan, at_least)
        return statistics.median(values) if len(values) == len(self.sampler.prompts) else -1.0

    def conditions(self, steps: int) -> dict[str, Any]:
        """What plans of so many steps that are tried here depend on."""
        call = {**self.sampler.arguments, "seed": self.sampler.seed}
        return conditions(self.sampler.pipe, steps) | {"call": call}

    def resume(self, steps: int) -> None:
        """Take over what an earlier search with the same conditions evaluated, and begin or go on with the file."""
        if self.state is None:
            return
        head = {"conditions": self.conditions(steps), "prompts": list(self.sampler.prompts)}
        if self.state.exists():
            before, known = read_search(self.state)
            if before == json.loads(json.dumps(head)):
                self.known = known
        write_search(self.state, head, self.known)

    def _keep(self, name: str, values: list[float]) -> None:
        self.known[name] = values
        self.evaluated += 1
        if self.state is not None:
            add_score(self.state, name, values)
