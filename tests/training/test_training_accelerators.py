"""Immiscible noise, task clusters, multi-task losses, Min-SNR and the process: exact rules and independent oracles."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment, minimize

from diffusion_accel.training import multitask
from diffusion_accel.training.clusters import (
    cluster,
    draw_clustered,
    gradient_distance,
    snr_distance,
    timestep_distance,
)
from diffusion_accel.training.denoising import PREDICTIONS, SCHEDULES, Process, alphas_cumprod, draw_timesteps
from diffusion_accel.training.files import UsageError
from diffusion_accel.training.noise import NoiseChoice, assigned_noise, hashed_noise, nearest_noise, sample_noise
from diffusion_accel.training.sampling import scheduler_for


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


SEEDS = torch.tensor([5, 2**61, 0, 17, 5])


# ------------------------------------------------------------------------------------------- process
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_noisy_samples_and_targets_agree_with_diffusers(prediction: str) -> None:
    process = Process(prediction)
    x, noise, timesteps = rand(8, 4, 3, 3), rand(8, 4, 3, 3, seed=1), torch.arange(8) * 142
    noisy, target = process.noisy(x, noise, timesteps)
    few = timesteps < 900  # beyond, dividing by the little signal there is magnifies rounding
    assert torch.allclose(process.clean(noisy, target, timesteps)[few], x[few], atol=1e-4)
    assert torch.allclose(process.noise_in(noisy, x, timesteps), noise, atol=1e-3)
    scheduler = scheduler_for(process)
    if prediction == "flow":
        expected = scheduler.scale_noise(x, process.model_timesteps(timesteps).float(), noise)
        torch.testing.assert_close(noise - x, target)
    else:
        expected = scheduler.add_noise(x, noise, timesteps)
        velocity = scheduler.get_velocity(x, noise, timesteps)
        torch.testing.assert_close(target, velocity if prediction == "v_prediction" else noise, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(noisy, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_are_those_of_diffusers(schedule: str) -> None:
    expected = scheduler_for(Process("epsilon", schedule)).alphas_cumprod
    torch.testing.assert_close(alphas_cumprod(schedule), expected, rtol=2e-4, atol=1e-7)


def test_min_snr_weights() -> None:
    """Against the definition: the error of the image, weighted by min(SNR, gamma)."""
    x, noise, wrong = rand(1, 4), rand(1, 4, seed=1), rand(1, 4, seed=2)
    for prediction, t in itertools.product(PREDICTIONS, (0, 10, 250, 900, 999)):
        process = Process(prediction)
        signal, sigma = (float(level[t]) for level in process.levels())
        noisy, target = process.noisy(x, noise, torch.tensor([t]))
        if prediction == "epsilon":
            image = (noisy - sigma * wrong) / max(signal, 1e-9)
        elif prediction == "v_prediction":
            image = signal * noisy - sigma * wrong
        else:
            image = noisy - sigma * wrong
        snr = (signal / sigma) ** 2
        expected = min(snr, 5) * float(((image - x) ** 2).mean())
        got = float(process.min_snr(5.0)[t]) * float(((wrong - target) ** 2).mean())
        assert got == pytest.approx(expected, rel=2e-2, abs=1e-9)
    assert torch.allclose(Process("epsilon").min_snr(1e12), torch.ones(1000))
    with pytest.raises(UsageError, match="above 0"):
        Process().min_snr(0)


def test_unknown_names_are_refused() -> None:
    for make in (lambda: Process("x0"), lambda: Process("epsilon", "quadratic"), lambda: NoiseChoice.parse("knn:0")):
        with pytest.raises(UsageError):
            make()


# ------------------------------------------------------------------------------------------- immiscible noise
def test_one_candidate_is_ordinary_noise() -> None:
    plain = NoiseChoice.parse("none").noise_for(rand(5, 2, 3, 3), SEEDS)
    assert torch.equal(NoiseChoice.parse("knn:1").noise_for(rand(5, 2, 3, 3), SEEDS), plain)
    assert torch.equal(sample_noise(SEEDS, (2, 3, 3), 7)[0], plain), "more candidates only add draws"
    assert torch.equal(plain[0], plain[4]) and not torch.equal(plain[0], plain[1])


def test_hashed_noise_depends_on_the_seed_alone_and_is_gaussian() -> None:
    seeds = torch.arange(64) * 7919 + 2**61
    noise = hashed_noise(seeds, (3, 5, 7), 4)
    assert noise.shape == (4, 64, 3, 5, 7) and noise.dtype == torch.float32
    assert torch.equal(hashed_noise(seeds[9:12], (3, 5, 7), 4), noise[:, 9:12])
    assert torch.equal(hashed_noise(seeds, (3, 5, 7), 2), noise[:2])
    for values in (hashed_noise(seeds, (50, 50)).flatten(), hashed_noise(torch.arange(5000), (31,)).flatten()):
        assert scipy.stats.kstest(values.double().numpy(), "norm").pvalue > 1e-3
    rows = hashed_noise(torch.arange(200), (1000,))[0]
    correlation = torch.corrcoef(rows) - torch.eye(200)
    assert correlation.abs().max() < 0.2  # of 1000 numbers: six deviations


def test_nearest_noise_is_the_argmin_of_each_sample_alone() -> None:
    x = rand(5, 2, 3, 3)
    candidates = sample_noise(SEEDS, (2, 3, 3), 6)
    chosen = nearest_noise(x, candidates)
    for i in range(5):
        brute = min((candidates[k, i] for k in range(6)), key=lambda e: float((e - x[i]).norm()))
        assert torch.equal(chosen[i], brute)
        alone = NoiseChoice("knn", 6).noise_for(x[i : i + 1], SEEDS[i : i + 1])
        assert torch.equal(alone[0], chosen[i]), "the rest of the batch must not matter"


def test_distance_falls_with_the_number_of_candidates() -> None:
    x, seeds = rand(64, 8), torch.arange(64)
    distance = [float((NoiseChoice("knn", k).noise_for(x, seeds) - x).norm(dim=1).mean()) for k in (1, 2, 4, 16, 64)]
    assert distance == sorted(distance, reverse=True) and distance[0] > distance[-1]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(0, 10**6))
def test_assignment_is_the_best_permutation(n: int, seed: int) -> None:
    x, noise = rand(n, 3, seed=seed), rand(n, 3, seed=seed + 1)
    chosen = assigned_noise(x, noise)
    cost = torch.cdist(x, noise)
    best = min(sum(float(cost[i, p[i]]) for i in range(n)) for p in itertools.permutations(range(n)))
    got = float((chosen - x).norm(dim=1).sum())
    assert got == pytest.approx(best, rel=1e-5) and got <= float((noise - x).norm(dim=1).sum()) + 1e-6
    order = [next(j for j in range(n) if torch.equal(chosen[i], noise[j])) for i in range(n)]
    assert sorted(order) == list(range(n)), "the noise of the batch must stay the same set"


def test_assignment_agrees_with_scipy_on_a_batch() -> None:
    x, noise = rand(32, 4, 6, 6), rand(32, 4, 6, 6, seed=3)
    cost = np.linalg.norm((x.flatten(1)[:, None] - noise.flatten(1)[None]).numpy(), axis=-1)
    _, columns = linear_sum_assignment(cost)
    assert torch.equal(assigned_noise(x, noise), noise[torch.from_numpy(columns)])


def test_image_scaling_is_read_and_written() -> None:
    assert NoiseChoice.parse("knn:4") == NoiseChoice("knn", 4, 1.0) and NoiseChoice.parse(None).scale == 1
    for text, choice in (
        ("knn:4,scale=2", NoiseChoice("knn", 4, 2.0)),
        ("assign,scale=1.5", NoiseChoice("assign", 1, 1.5)),
        ("scale=8", NoiseChoice("none", 1, 8.0)),
    ):
        assert NoiseChoice.parse(text) == choice and NoiseChoice.parse(str(choice)) == choice
    for text in ("knn:4,scale=0.5", "scale=nan", "scale=inf", "knn:4,", "knn:4,2", "scale=2,knn:4", "scale=", "none:"):
        with pytest.raises(UsageError):
            NoiseChoice.parse(text)


def test_scaling_mixes_images_less() -> None:
    """How often a noisy sample is nearer to another image than to its own, by brute force: less with every step."""
    x, noise, process = rand(40, 3), rand(40, 3, seed=1), Process()
    mixed = []
    for scale in (1.0, 2.0, 4.0, 8.0):
        noisy, _ = process.noisy(scale * x, noise, torch.full((40,), 500))
        level = float(process.levels()[0][500])
        nearest = [min(range(40), key=lambda j: float((row - level * scale * x[j]).norm())) for row in noisy]
        mixed.append(sum(j != i for i, j in enumerate(nearest)))
    assert mixed == sorted(mixed, reverse=True) and mixed[0] > 2 * mixed[-1]


# ------------------------------------------------------------------------------------------- task clusters
def brute_force(distance: np.ndarray, k: int) -> float:
    count = len(distance)
    costs = []
    for cuts in itertools.combinations(range(1, count), k - 1):
        bounds = [0, *cuts, count]
        pairs = list(itertools.pairwise(bounds))
        costs.append(sum(distance[(a + b - 1) // 2, a:b].sum() for a, b in pairs))
    return min(costs)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 12), st.data())
def test_clusters_are_the_best_partition(count: int, data: Any) -> None:
    k = data.draw(st.integers(1, count))
    distance = np.random.default_rng(data.draw(st.integers(0, 10**6))).standard_normal((count, count))
    intervals = cluster(distance, k)
    assert [t for a, b in intervals for t in range(a, b)] == list(range(count)) and len(intervals) == k
    cost = sum(distance[(a + b - 1) // 2, a:b].sum() for a, b in intervals)
    assert cost == pytest.approx(brute_force(distance, k))


def test_even_costs_give_even_intervals() -> None:
    """|t - c| makes lengths n - 1, n + 1 as good as n, n for even n: as good as an even split, off by one at most."""
    for count, k in ((1000, 5), (60, 3), (1000, 7)):
        distance = timestep_distance(count)
        intervals = cluster(distance, k)
        even = [(round(i * count / k), round((i + 1) * count / k)) for i in range(k)]
        costs = [sum(distance[(a + b - 1) // 2, a:b].sum() for a, b in part) for part in (intervals, even)]
        assert costs[0] <= costs[1] and all(abs((b - a) - count / k) < 2 for a, b in intervals)


def test_snr_and_gradient_clusters_cover_every_timestep() -> None:
    distances = [snr_distance(Process(p)) for p in PREDICTIONS]
    affinity = np.exp(-timestep_distance(20) / 5)
    for distance in [*distances, gradient_distance(affinity)]:
        intervals = cluster(distance, 5)
        assert intervals[0][0] == 0 and intervals[-1][1] == 1000
        assert all(left[1] == right[0] and left[0] < left[1] for left, right in itertools.pairwise(intervals))
    with pytest.raises(UsageError, match="1..1000"):
        cluster(timestep_distance(), 0)


def test_every_timestep_can_be_drawn() -> None:
    intervals = [(0, 3), (3, 4), (4, 9)]
    timesteps, clusters = draw_clustered(np.random.default_rng(0), 3000, intervals)
    assert set(timesteps.tolist()) == set(range(9))
    assert torch.bincount(clusters).tolist() == [1000] * 3
    for t, c in zip(timesteps.tolist(), clusters.tolist(), strict=True):
        assert intervals[c][0] <= t < intervals[c][1]
    drawn = draw_timesteps(np.random.default_rng(0), 4000, uniform=1.0)
    assert drawn.min() <= 1 and drawn.max() >= 998


# ------------------------------------------------------------------------------------------- task losses
def test_uncertainty_weighting_rests_at_the_log_of_the_loss() -> None:
    losses = torch.tensor([0.5, 2.0, 7.0])
    weighting = multitask.weighting("uw", 3)
    assert isinstance(weighting, multitask.UncertaintyWeighting)
    with torch.no_grad():
        weighting.s.copy_((losses / 3).log())
    weighting.total(losses).backward()
    assert weighting.s.grad is not None and weighting.s.grad.abs().max() < 1e-6
    with torch.no_grad():
        weighting.s.fill_(1.0)
    expected = 0.5 * sum(np.exp(-1.0) * float(loss) / 3 + 1.0 for loss in losses)
    assert weighting.total(losses).item() == pytest.approx(expected, rel=1e-6)


def reference_pcgrad(gradients: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Yu et al. 2020, algorithm 1, on the vectors themselves."""
    result = []
    for i in range(len(gradients)):
        g = gradients[i].clone()
        for j in rng.permutation(len(gradients)):
            dot = g @ gradients[j]
            if j != i and dot < 0:
                g = g - dot / (gradients[j] @ gradients[j]) * gradients[j]
        result.append(g)
    return torch.stack(result).mean(0)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(0, 10**6))
def test_pcgrad_equals_the_algorithm(k: int, seed: int) -> None:
    gradients = rand(k, 7, seed=seed)
    got = multitask.weighting("pcgrad", k).combine(gradients, np.random.default_rng(seed), 0)
    torch.testing.assert_close(got, reference_pcgrad(gradients, np.random.default_rng(seed)), rtol=1e-4, atol=1e-5)


def test_pcgrad_on_opposing_and_orthogonal_gradients() -> None:
    method, rng = multitask.weighting("pcgrad", 2), np.random.default_rng(0)
    opposing = torch.tensor([[1.0, 0.0], [-0.8, 0.6]])
    assert (opposing @ method.combine(opposing, rng, 0) >= -1e-6).all()
    orthogonal = torch.eye(2) * 3
    assert torch.equal(method.combine(orthogonal, rng, 0), orthogonal.mean(0))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(0, 10**6))
def test_bargaining_solution(k: int, seed: int) -> None:
    gradients = rand(k, 9, seed=seed).double().numpy()
    products = gradients @ gradients.T
    alpha = multitask.bargain(products)
    assert (alpha > 0).all()
    np.testing.assert_allclose(products @ alpha * alpha, np.ones(k), atol=1e-6)

    def value(log: np.ndarray) -> float:
        return 0.5 * np.exp(log) @ products @ np.exp(log) - log.sum()

    oracle = minimize(value, np.zeros(k), method="BFGS", options={"gtol": 1e-9})
    assert value(np.log(alpha)) <= oracle.fun + 1e-6


def test_nash_keeps_its_solution_for_25_steps() -> None:
    method, rng = multitask.weighting("nash", 2), np.random.default_rng(0)
    first = torch.tensor([[1.0, 0.0], [0.0, 4.0]])
    torch.testing.assert_close(method.combine(first, rng, 0) / 1.25, torch.tensor([1.0, 1.0]), rtol=1e-4, atol=1e-4)
    before = method.alpha.clone()  # type: ignore[union-attr,operator]
    method.combine(torch.eye(2) * 9, rng, 1)
    assert torch.equal(before, method.alpha)  # type: ignore[arg-type]
    method.combine(torch.eye(2) * 9, rng, 25)
    assert not torch.equal(before, method.alpha)  # type: ignore[arg-type]


def test_one_cluster_is_plain_training() -> None:
    gradient, rng = rand(1, 5), np.random.default_rng(0)
    for kind in ("none", "pcgrad"):
        torch.testing.assert_close(multitask.weighting(kind, 1).combine(gradient, rng, 0), gradient[0])
    direction = multitask.weighting("nash", 1).combine(gradient, rng, 0)
    torch.testing.assert_close(direction, gradient[0], rtol=1e-5, atol=1e-6)
    with pytest.raises(UsageError, match="unknown task loss"):
        multitask.weighting("gradnorm", 2)
