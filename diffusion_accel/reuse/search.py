"""Which steps to compute: dynamic programming over how well predictions can be forecast from each other.

A held prediction is a linear combination of computed ones, and a solver is linear in the predictions it is given. So,
as long as the latents stay near the baseline's, the final error of a plan is a linear combination of the baseline's own
predictions, and its square a quadratic form in their Gram matrix: plans can be compared without running any.
"""

from __future__ import annotations

import functools
import inspect
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..prediction import Conversion
from .history import weights
from .plan import FULL, Plan, Step

DELTA = 0.01
SPAN = 16  # longest run of held steps that is considered


def sensitivities(scheduler: Any, steps: int, space: str = "") -> np.ndarray:
    """How much the final sample moves if the prediction at one step moves, everything else being equal: (steps,).

    Measured on the scheduler alone, with random numbers for predictions, or for what they mean in a `space`.
    """
    generator, conversion = torch.Generator(), Conversion(scheduler)

    def final(changed: int | None) -> torch.Tensor:
        solver = type(scheduler).from_config(scheduler.config)
        solver.set_timesteps(steps)
        draw = torch.Generator().manual_seed(1)
        sample = torch.randn(1, 1, 1, 16, generator=draw, dtype=torch.float64).float() * solver.init_noise_sigma
        takes_noise = "generator" in inspect.signature(solver.step).parameters
        for i, t in enumerate(solver.timesteps):
            value = torch.randn(1, 1, 1, 16, generator=draw) * 0.1 + (DELTA if i == changed else 0)
            given = solver.scale_model_input(sample, t)
            prediction = conversion.back(space, value, given, float(t)) if space else value
            more = {"generator": generator.manual_seed(2)} if takes_noise else {}
            sample = solver.step(prediction, t, sample, **more).prev_sample
        return sample

    base = final(None)
    solver = type(scheduler).from_config(scheduler.config)
    solver.set_timesteps(steps)
    return np.array([float((final(i) - base).mean()) / DELTA for i in range(len(solver.timesteps))])


@dataclass(frozen=True)
class Forecasts:
    """What the baseline's predictions say about every plan.

    Attributes:
        times: timesteps, (N,).
        gram: mean over the calibration pictures of the inner products of the predictions, (N, N).
        influence: see `sensitivities`, (N,).
        space: of the predictions, see `Step`.
    """

    times: list[float]
    gram: np.ndarray
    influence: np.ndarray
    space: str = ""

    def errors(self, nodes: tuple[int, ...], highest: int) -> list[tuple[float, int]]:
        """What holding the steps behind nodes[0] up to each possible end costs, and the best order for it.

        Entry k is for k held steps, forecast from `nodes`, newest first: (squared final error, order).
        """
        last = min(len(self.times), nodes[0] + SPAN + 1)
        held = list(range(nodes[0] + 1, last))
        best = [(0.0, 0)] + [(math.inf, 0)] * len(held)
        for order in range(min(highest, len(nodes) - 1) + 1):
            used = list(nodes[: order + 1])
            rows = used + held
            known = [self.times[n] for n in used]
            mixed = np.zeros((len(held), len(rows)))
            for place, i in enumerate(held):
                mixed[place, : len(used)] = self.influence[i] * np.array(weights(known, self.times[i]))
                mixed[place, len(used) + place] = -self.influence[i]
            mixed = mixed.cumsum(0)
            squares = ((mixed @ self.gram[np.ix_(rows, rows)]) * mixed).sum(1)
            best = [best[0]] + [min(old, (float(e), order)) for old, e in zip(best[1:], squares, strict=True)]
        return best

    def plans(self, most: int, highest: int = 2) -> dict[int, Plan]:
        """For every number of full steps up to `most` the held plan of smallest predicted error."""
        n = len(self.times)
        if len(set(self.times)) < n:
            return {}  # a solver that repeats timesteps
        # state: (the last two full steps, the one before them or None) -> cost and the way there
        costs: dict[tuple[int, ...], tuple[float, tuple[tuple[int, int], ...]]] = {(0,): (0.0, ())}
        found: dict[int, Plan] = {}
        errors = functools.cache(lambda nodes: self.errors(nodes, highest))
        for count in range(1, most + 1):
            following: dict[tuple[int, ...], tuple[float, tuple[tuple[int, int], ...]]] = {}
            best: tuple[float, Any] = (math.inf, None)
            for nodes, (cost, path) in costs.items():
                if n - nodes[0] <= SPAN + 1:
                    error, order = errors(nodes)[n - nodes[0] - 1]
                    best = min(best, (cost + error, (*path, (nodes[0], order))))
                for end in range(nodes[0] + 1, min(n, nodes[0] + SPAN + 2)):
                    error, order = errors(nodes)[end - nodes[0] - 1]
                    state = (end, *nodes[: max(1, highest)])
                    total = cost + error
                    if total < following.get(state, (math.inf, ()))[0]:
                        following[state] = (total, (*path, (nodes[0], order)))
            if best[1] is not None:
                found[count] = held_plan(n, best[1], self.space)
            # keep the promising states only: the search is exact up to this beam
            costs = dict(sorted(following.items(), key=lambda item: item[1][0])[:BEAM])
        return found


BEAM = 4000


def held_plan(total: int, runs: tuple[tuple[int, int], ...], space: str = "") -> Plan:
    """A plan from (full step, order of the held steps behind it)."""
    steps: list[Step] = []
    starts = [start for start, _ in runs]
    for i in range(total):
        if i in starts:
            steps.append(FULL)
        else:
            order = next(order for start, order in reversed(runs) if start < i)
            steps.append(Step("hold", order=order, space=space))
    return Plan(tuple(steps))
