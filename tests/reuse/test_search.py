"""The search of plans: forecasts and the dynamic programme against brute force, neighbours."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from diffusion_accel.reuse.plan import Plan, Step
from diffusion_accel.reuse.search import Choice, Forecasts, Rule, best_plans, held_plan, predicted_error, refitted
from diffusion_accel.tuning.measure import Costs
from diffusion_accel.tuning.neighbours import neighbour


def random_forecasts(n: int, seed: int, space: str = "") -> tuple[Forecasts, np.ndarray]:
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((n, 12)).cumsum(0) + 3
    times = [float(900 - 100 * i) for i in range(n)]
    return Forecasts(times, values @ values.T, rng.uniform(0.1, 1.0, n), space), values


def rules_up_to(count: int, fitted: bool) -> list[Rule]:
    return [Rule(n + 1, fitted) for n in range(count)]


def brute_shares(values: np.ndarray, times: list[float], used: list[int], i: int, fitted: bool) -> np.ndarray:
    """Weights from the definition: least squares on the values, or the polynomial through unit vectors."""
    if fitted:
        ridge = np.sqrt(1e-4 * np.mean((values[used] ** 2).sum(1)))
        left = np.concatenate([values[used].T, ridge * np.eye(len(used))])
        return np.linalg.lstsq(left, np.concatenate([values[i], np.zeros(len(used))]), rcond=None)[0]
    known = [times[u] for u in used]
    return np.array([np.polyval(np.polyfit(known, row, len(used) - 1), times[i]) for row in np.eye(len(used))])


def brute_force(cases: list[tuple[Forecasts, np.ndarray]], count: int, rules: list[Rule]) -> float:
    """The smallest error over all sets of `count` full steps, and all rules and spaces behind each."""
    n, best = len(cases[0][0].times), np.inf
    for rest in itertools.combinations(range(1, n), count - 1):
        nodes, total = (0, *rest), 0.0
        for k, node in enumerate(nodes):
            end = nodes[k + 1] if k + 1 < count else n
            errors = []
            for (forecasts, values), rule in itertools.product(cases, rules):
                used = list(reversed(nodes[: k + 1]))[: rule.count]
                if len(used) < rule.count:
                    continue
                error = np.zeros(values.shape[1])
                for i in range(node + 1, end):
                    shares = brute_shares(values, forecasts.times, used, i, rule.fitted)
                    off = shares @ values[used] - values[i]
                    error += forecasts.influence[i] * max(1.0, np.abs(shares).sum()) * off
                errors.append(error @ error)
            total += min(errors)
        best = min(best, total)
    return float(best)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("highest", [1, 2, 3])
@pytest.mark.parametrize("fitted", [False, True])
def test_the_dynamic_programme_equals_brute_force(seed: int, highest: int, fitted: bool) -> None:
    cases = [random_forecasts(7, seed), random_forecasts(7, seed + 10, "sample")]
    forecasts, rules = [f for f, _ in cases], rules_up_to(highest, fitted)
    plans = best_plans(forecasts, 7, rules)
    for count in range(1, 7):
        assert sum(step.mode == "full" for step in plans[count].steps) == count
        want = brute_force(cases, count, rules)
        # weights in a plan are rounded to four places
        assert predicted_error(plans[count], forecasts) == pytest.approx(want, rel=5e-3, abs=1e-9)
    assert str(plans[7]) == " ".join(["full"] * 7)


def test_held_plans_and_their_neighbours() -> None:
    forecasts, values = random_forecasts(8, 0)
    plan = held_plan(8, [(0, Choice(forecasts, Rule(1))), (3, Choice(forecasts, Rule(2, True)))])
    assert str(plan).startswith("full hold hold full hold=") and len(plan.steps[5].weights) == 2
    assert np.allclose(plan.steps[5].weights, brute_shares(values, forecasts.times, [3, 0], 5, True), atol=1e-4)
    rng = random.Random(0)
    seen = {refitted(neighbour(plan, rng, guided=True), [forecasts]) for _ in range(300)}
    assert len(seen) > 50
    assert all(len(p) == 8 and p.steps[0].mode == "full" and Plan.parse(str(p)) == p for p in seen)
    for p in seen:
        for i, step in enumerate(p.steps):
            assert len(step.weights) <= sum(s.mode == "full" for s in p.steps[:i])
    costs = Costs(1.0, {"full": 2.0, "hold": 0.0, "full/reuse": 1.0})
    assert costs.time(plan) == 5.0
    assert costs.time(Plan((Step(), Step("full", order=1, guidance="reuse"), Step("hold", order=3)))) == 4.0
