"""Which steps to evaluate: residuals, the dynamic programme, what rollouts teach, and the search."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusion_accel.tuning.jumps import Trajectory
from diffusion_accel.tuning.timesteps import (
    KNOTS,
    NodeSearch,
    Profile,
    best_nodes,
    evenly,
    neighbours,
    residuals,
)


def trajectory(size: int = 5, images: int = 2, channels: int = 3, alike: bool = False) -> Trajectory:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(size + 1, images, channels, 4, 4, generator=generator)
    clean = torch.randn(size, images, channels, 4, 4, generator=generator)

    whole = latents[:-1], clean, latents[-1]
    return Trajectory([0.0] * size, [1.0] * (size + 1), [1.0] * (size + 1), *whole, "sample", alike)


def costs(size: int, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).uniform(0.1, 1.0, (size, size, size + 1))
    h, i, j = np.indices(values.shape)
    impossible = (i >= j) | ((h >= i) & ~((h == 0) & (i == 0)))
    return np.where(impossible, np.inf, values)


def total(cost: np.ndarray, nodes: tuple[int, ...]) -> float:
    ends = [*nodes[1:], cost.shape[1]]
    return float(sum(cost[h, i, j] for h, i, j in zip([0, *nodes[:-1]], nodes, ends, strict=True)))


@pytest.mark.parametrize("alike", [False, True])
def test_a_residual_is_what_least_squares_leave(alike: bool) -> None:
    own, weights = trajectory(alike=alike), torch.tensor([1.0, 2.0, 3.0])
    left = residuals(own, [0, 1], weights)
    for h, i, j in ((0, 0, 1), (0, 0, 5), (0, 1, 2), (1, 3, 4), (0, 2, 5), (3, 4, 5)):
        clean, latents = own.clean(), own.latents
        columns = [clean[i], clean[h], latents[i], latents[h]] if i else [clean[0], latents[0]]
        errors = []
        for c in [slice(None)] if alike else [slice(k, k + 1) for k in range(3)]:
            table = torch.stack([part[:, c].flatten() for part in columns], 1).double()
            goal = own.goal(j, [0, 1])[:, c].flatten().double()
            solution = torch.linalg.lstsq(table, goal[:, None], driver="gelsd").solution[:, 0]
            errors.append(float((table @ solution - goal).pow(2).mean()))
        share = [1.0] if alike else (weights / weights.sum()).tolist()
        assert left[h, i, j] == pytest.approx(np.dot(share, errors), rel=1e-4)
    h, i, j = np.indices(left.shape)
    assert np.isinf(left[(i >= j) | ((h >= i) & ~((h == 0) & (i == 0)))]).all()
    assert np.isfinite(left[(i < j) & ((h < i) | ((h == 0) & (i == 0)))]).all()
    one = residuals(own, [1], weights)
    assert one.shape == left.shape and not np.allclose(one[np.isfinite(one)], left[np.isfinite(left)])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_dynamic_programme_finds_the_best_of_all_subsets(seed: int) -> None:
    size, cost = 7, costs(7, seed)
    found = best_nodes(cost, size)
    assert sorted(found) == list(range(1, size + 1))
    for count, nodes in found.items():
        every = [(0, *rest) for rest in itertools.combinations(range(1, size), count - 1)]
        assert nodes in every
        assert total(cost, nodes) == pytest.approx(min(total(cost, other) for other in every))
    assert best_nodes(cost, 3).keys() == {1, 2, 3}
    assert best_nodes(costs(1), 1) == {1: (0,)}


def test_a_profile_learns_what_it_is_taught() -> None:
    size = 20
    true, own = Profile(costs(size)), Profile(costs(size))
    true.logarithms = np.array([-1.0, -0.8, -0.5, -0.3, -0.2, -0.1])
    rng = np.random.default_rng(3)
    nodes = [(0, *sorted(rng.choice(np.arange(1, size), 5, replace=False).tolist())) for _ in range(60)]
    runs = [(n, true.predicted(n)) for n in nodes]

    def off() -> float:
        return float(np.sqrt(np.mean([(np.log(own.predicted(n)) - np.log(e)) ** 2 for n, e in runs])))

    before = off()
    own.learn(runs)
    assert before > 0.5 and off() < 0.15
    assert np.abs(own.logarithms - true.logarithms).max() < 1.5
    assert len(own.weights()) == size + 1 and own.weights()[-1] == 1
    assert np.interp(KNOTS[0] * size, np.arange(size + 1), own.weights()) > 0
    assert own.predicted(nodes[0]) == pytest.approx(total(own.cost(), nodes[0]))


def synthetic(best: tuple[int, ...], known: list[tuple[int, ...]]) -> Any:
    """Rollouts that are the nearer the nearer their nodes are to some, and note what was run."""

    def run(nodes: tuple[int, ...]) -> list[float]:
        assert nodes not in known, "nothing is run twice"
        known.append(nodes)
        off = sum(abs(a - b) for a, b in zip(nodes, best, strict=True)) if len(nodes) == len(best) else 30
        return [60.0 - off, 58.0 - off]

    return run


def test_the_search_finds_the_optimum() -> None:
    best, known = (0, 3, 4, 9, 14), []  # type: ignore[var-annotated]
    search = NodeSearch(synthetic(best, known), costs(16))
    search.rounds([5], 3, lambda: True)
    assert known[0] == evenly(16, 5) and all(len(nodes) == 5 for nodes in known)
    told: list[int] = []
    search.refine(5, lambda: True, lambda: told.append(1))
    assert search.best(5) == best and set(known) == set(search.known) and told
    assert all(other in known for other in neighbours(best, 16)), "nothing that is near is better"


def test_a_search_stops_when_it_is_time() -> None:
    known: list[tuple[int, ...]] = []
    search = NodeSearch(synthetic((0, 1, 2), known), costs(9))
    search.rounds([2, 3], 3, lambda: False)
    search.refine(3, lambda: False)
    assert set(known) == {evenly(9, 2), evenly(9, 3)}, "a start for each size, so that there is a best of each"
    turns = iter([True] * 3 + [False] * 99)
    search.refine(3, lambda: next(turns))
    assert len(known) <= 2 + 3


@given(size=st.integers(1, 60), data=st.data())
def test_what_is_even_or_near_is_possible(size: int, data: Any) -> None:
    count = data.draw(st.sampled_from(sorted({1, min(2, size), size, data.draw(st.integers(1, size))})))
    nodes = evenly(size, count)
    assert len(nodes) == count and nodes[0] == 0 and nodes[-1] < size and sorted(set(nodes)) == list(nodes)
    near = neighbours(nodes, size)
    assert nodes not in near and len(set(near)) == len(near)
    for other in near:
        assert len(other) == count and other[0] == 0 and other[-1] < size and sorted(set(other)) == list(other)
        assert sum(a != b for a, b in zip(nodes, other, strict=True)) in (1, 2)
    assert not near or count < size


def test_the_luck_of_one_image_does_not_decide() -> None:
    usual, lucky, better = (0, 2, 4), (0, 2, 5), (0, 3, 4)
    table = {usual: [40.0] * 7 + [20.0], lucky: [39.6] * 7 + [39.0], better: [40.4] * 7 + [20.0]}
    search = NodeSearch(table.__getitem__, np.ones((8, 8, 9)))
    assert search.leads(usual) and not search.leads(lucky), "2 dB of one image less than 0.4 of seven"
    assert search.leads(better) and search.best(3) == better
    assert search.decibels(3) == pytest.approx(np.mean(table[better]))


def test_where_images_disagree_what_is_predicted_decides() -> None:
    left = np.ones((8, 8, 9))
    left[2, 5] = 0.01
    one, other = (0, 2, 4), (0, 2, 5)  # of which this one has the smaller residuals
    for table, decided in (
        ({one: [40.0, 30.0] * 4, other: [32.0, 38.0] * 4}, True),
        ({one: [40.0] * 8, other: [39.9] * 8}, False),
    ):
        for first in (one, other):
            search = NodeSearch(table.__getitem__, left)
            search.leads(first), search.leads(other if first == one else one)
            assert (search.best(3) == other) is decided
