"""Steps that compute one branch of guidance: as many more of them as cost the same, found by their rollouts."""

from __future__ import annotations

import numpy as np
import pytest

from diffusion_accel.tuning.branches import BranchSearch, cost
from diffusion_accel.tuning.timesteps import Nodes, NodeSearch

STEPS, IMAGES = 20, 6


def left() -> np.ndarray:
    """A jump's error grows with the square of its length."""
    h, i, j = np.meshgrid(range(STEPS), range(STEPS), range(STEPS + 1), indexing="ij")
    return np.where((i < j) & ((h < i) | (i == 0)), 1e-4 * (j - i) ** 2.0, np.inf)


def searched(lost: float, half: float = 0.5, calls: int = 1000) -> tuple[Nodes, BranchSearch]:
    """What is found where each step is worth so much and each mark costs `lost` dB, more at early steps."""

    def run(nodes: Nodes) -> list[float]:
        marks = sum(lost * (1 + 2 * (max(n, ~n) < STEPS / 2)) for n in nodes if n < 0)
        return [30.0 + 2 * len(nodes) - marks + 0.1 * k for k in range(IMAGES)]

    search = NodeSearch(run, left())
    search.rounds([6], 1, lambda: True)
    left_over = iter(range(calls))
    branches = BranchSearch(search, run, half)
    return branches.best(6, lambda: next(left_over, None) is not None), branches


@pytest.mark.parametrize("half", [0.5, 0.6])
def test_more_steps_of_the_same_cost(half: float) -> None:
    nodes, branches = searched(0.1, half)
    assert len(nodes) > 6 and nodes[0] == 0 and cost(nodes, half) <= 6 + 1e-9
    steps = [max(n, ~n) for n in nodes]
    assert steps == sorted(set(steps)) and steps[-1] < STEPS
    assert all(cost(tried, half) <= 6 + 1e-9 for tried in branches.known)


def test_marks_move_to_where_they_cost_least() -> None:
    nodes, _ = searched(0.5)
    assert all(n >= 0 for n in nodes if max(n, ~n) < STEPS / 2), nodes
    assert any(n < 0 for n in nodes)


def test_both_branches_stay_where_one_is_not_enough() -> None:
    nodes, branches = searched(5.0)
    assert nodes == branches.search.best(6) and branches.known, "others were tried"


def test_nothing_is_run_when_it_is_time() -> None:
    nodes, branches = searched(0.1, calls=0)
    assert nodes == branches.search.best(6) and not branches.known


def test_luck_is_no_reason() -> None:
    """One image of six that is much nearer."""

    def run(nodes: Nodes) -> list[float]:
        lucky = 9.0 if min(nodes) < 0 else 0.0
        return [30.0 + lucky * (k == 0) - 0.1 * (min(nodes) < 0) for k in range(IMAGES)]

    search = NodeSearch(run, left())
    search.rounds([6], 1, lambda: True)
    assert BranchSearch(search, run, 0.5).best(6, lambda: True) == search.best(6)
