"""Which steps to compute: dynamic programming over how well predictions can be forecast from each other.

A held prediction is a linear combination of computed ones. How much the images change with the prediction at a step
is known: the tuner measures it (`tuning.measure.measure_influence`). So, as long as the latents stay near the
baseline's, the squared error that a run of held steps leaves is a quadratic form in the Gram matrix of the baseline's
own predictions, and the best combination a least-squares problem in it: plans can be made and compared without running
any.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .history import weights
from .plan import FULL, Plan, Step, bounded

SPAN = 32  # longest run of held steps that is considered
BEAM = 4000
RIDGE = 1e-4  # keeps fitted weights from telling nearly equal predictions apart


@dataclass(frozen=True, order=True)
class Rule:
    """How held steps are forecast from the last `count` full steps: by the polynomial through them, or by weights that
    are fitted to the calibration images (least squares)."""

    count: int = 1
    fitted: bool = False

    def hold(self, space: str, weights: tuple[float, ...]) -> Step:
        """A held step by this rule; its weights are `weights` if they are to be fitted."""
        return Step("hold", order=self.count - 1, space=space, weights=weights if self.fitted else ())


@dataclass(frozen=True)
class Forecasts:
    """What the baseline's predictions say about every plan.

    Attributes:
        times: timesteps, (N,).
        gram: mean over images and values of the products of the predictions at two steps, (N, N).
        influence: how much the image changes with the prediction at a step, (N,), in the units of the images.
        space: of the predictions, see `Step`.
    """

    times: list[float]
    gram: np.ndarray
    influence: np.ndarray
    space: str = ""
    _known: dict[Any, np.ndarray] = field(default_factory=dict, repr=False, compare=False)

    def weights(self, nodes: tuple[int, ...], held: list[int], rule: Rule) -> np.ndarray:
        """What each of `nodes` counts in the forecast of each held step, (held, nodes)."""
        if not rule.fitted:
            known = [self.times[n] for n in nodes]
            return np.array([weights(known, self.times[i]) for i in held]).reshape(len(held), len(nodes))
        own = self.gram[np.ix_(nodes, nodes)]
        ridge = np.eye(len(nodes)) * (RIDGE * np.trace(own) / len(nodes) + 1e-12)
        return np.linalg.solve(own + ridge, self.gram[np.ix_(nodes, held)]).T

    def errors(self, nodes: tuple[int, ...], rule: Rule, careful: bool = True) -> np.ndarray:
        """Squared error of the image from holding the steps behind nodes[0] up to each possible end: entry k is for k
        held steps, forecast from the first `rule.count` of `nodes`, newest first.

        Large weights of both signs multiply the errors that the computed predictions have themselves by then; so, if
        `careful`, the error of a step counts as many times as the sizes of its weights add up to, at least once. That
        is right for the errors of fast plans, and too much for those of slow ones.
        """
        used = nodes[: rule.count]
        if (used, rule, careful) not in self._known:
            held = list(range(used[0] + 1, min(len(self.times), used[0] + SPAN + 1)))
            shares = self.weights(used, held, rule)
            rows = [*used, *held]
            caution = np.maximum(1.0, np.abs(shares).sum(1)) if careful else 1.0
            mixed = np.concatenate([shares, -np.eye(len(held))], 1) * (self.influence[held] * caution)[:, None]
            mixed = mixed.cumsum(0)
            squares = ((mixed @ self.gram[np.ix_(rows, rows)]) * mixed).sum(1)
            self._known[used, rule, careful] = np.concatenate([[0.0], squares.clip(min=0.0)])
        return self._known[used, rule, careful]


def best_plans(
    forecasts: Sequence[Forecasts], most: int, rules: Sequence[Rule], careful: bool = True
) -> dict[int, Plan]:
    """For every number of full steps up to `most` the held plan of smallest predicted error.

    Each run of held steps takes the best of the rules and of the spaces of `forecasts`. `careful`: see
    `Forecasts.errors`.
    """
    n, deepest = len(forecasts[0].times), max(rule.count for rule in rules)
    if len(set(forecasts[0].times)) < n:
        return {}  # a solver that repeats timesteps

    @functools.cache
    def cheapest(nodes: tuple[int, ...]) -> tuple[list[float], list[Choice]]:
        choices = [Choice(f, rule) for f in forecasts for rule in rules if rule.count <= len(nodes)]
        table = np.stack([choice.forecasts.errors(nodes, choice.rule, careful) for choice in choices])
        return table.min(0).tolist(), [choices[i] for i in table.argmin(0)]

    # state: (the last two full steps, those before them as far as rules look) -> cost and the way there
    costs: dict[tuple[int, ...], tuple[float, tuple[tuple[int, Choice], ...]]] = {(0,): (0.0, ())}
    found: dict[int, Plan] = {}
    for count in range(1, most + 1):
        following: dict[tuple[int, ...], tuple[float, tuple[tuple[int, Choice], ...]]] = {}
        best: tuple[float, Any] = (math.inf, None)
        for nodes, (cost, path) in costs.items():
            errors, choices = cheapest(nodes)
            last = n - nodes[0] - 1
            if last < len(errors) and cost + errors[last] < best[0]:
                best = (cost + errors[last], (*path, (nodes[0], choices[last])))
            for held in range(min(last, len(errors))):
                state = (nodes[0] + 1 + held, *nodes[: max(1, deepest - 1)])
                total = cost + errors[held]
                if total < following.get(state, (math.inf, ()))[0]:
                    following[state] = (total, (*path, (nodes[0], choices[held])))
        if best[1] is not None:
            found[count] = held_plan(n, best[1])
        # keep the promising states only: the search is exact up to this beam
        costs = dict(sorted(following.items(), key=lambda item: item[1][0])[:BEAM])
    return found


@dataclass(frozen=True, eq=False)
class Choice:
    """How a run of held steps is forecast: what is forecast, and by which rule."""

    forecasts: Forecasts
    rule: Rule


def held_plan(total: int, runs: Sequence[tuple[int, Choice]]) -> Plan:
    """A plan from (full step, how the held steps behind it are forecast)."""
    choices, choice = dict(runs), runs[0][1]
    steps: list[Step] = []
    for i in range(total):
        choice = choices.get(i, choice)
        rule = choice.rule
        steps.append(FULL if i in choices else rule.hold(choice.forecasts.space, (0.0,) * rule.count))
    return refitted(Plan(tuple(steps)), [choice.forecasts for _, choice in runs])


def refitted(plan: Plan, forecasts: Sequence[Forecasts]) -> Plan:
    """The plan with the weights of its held steps fitted again, to the full steps before them."""
    spaces = {f.space: f for f in forecasts}
    steps: list[Step] = []
    nodes: tuple[int, ...] = ()
    for i, step in enumerate(plan.steps):
        if step.mode == "full":
            nodes = (i, *nodes)
        if step.mode == "hold" and step.weights and step.space in spaces:
            rule = Rule(min(len(step.weights), len(nodes)), True)
            shares = spaces[step.space].weights(nodes[: rule.count], [i], rule)[0]
            step = rule.hold(step.space, tuple(round(bounded(float(w)), 4) for w in shares))
        steps.append(step)
    return Plan(tuple(steps))


def predicted_error(plan: Plan, forecasts: Sequence[Forecasts], careful: bool = True) -> float:
    """The predicted squared error of the images of a plan, as in `Forecasts.errors`."""
    total = 0.0
    for own in forecasts:
        nodes: list[int] = []
        mixed = np.zeros(len(own.times))
        for i, step in enumerate((*plan.steps, FULL)):
            if step.mode == "full":
                total += max(0.0, float(mixed @ own.gram @ mixed))
                nodes, mixed = [i, *nodes], np.zeros(len(own.times))
            elif step.mode == "hold" and step.space == own.space:
                count = min(len(step.weights) or step.order + 1, len(nodes))
                shares = np.array(step.weights or own.weights(tuple(nodes[:count]), [i], Rule(count))[0])
                size = own.influence[i] * (max(1.0, float(np.abs(shares).sum())) if careful else 1.0)
                mixed[nodes[:count]] += size * shares
                mixed[i] -= size
    return total
