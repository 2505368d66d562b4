"""A learned solver that begins at one of its later timesteps: what stands in for steps that would look further back."""

from __future__ import annotations

import pytest
import torch

from diffusion_accel import LearnedMultistepScheduler
from diffusion_accel.schedulers.solver import Solver, needs
from diffusion_accel.tuning.jumps import LATENTS, PREDICTIONS, Jumps

from .test_polish import denoiser, made

NODES, FITTED = (0, 3, 6, 9, 12, 14), 8  # of 12 images


@pytest.fixture(scope="module")
def learnt() -> tuple[Jumps, Solver]:
    with torch.inference_mode():
        jumps = made(FITTED)
        times = tuple(950.0 - 60 * n for n in range(len(NODES)))
        return jumps, Solver(times, tuple(jumps.run(NODES).combinations), jumps.from_the_middle(NODES))


def left(jumps: Jumps, solver: Solver, first: int) -> float:
    """The error of the images that nothing was fitted to, in dB, for a loop that begins at one of the timesteps."""
    own, images = jumps.trajectory, list(range(FITTED, jumps.trajectory.result.shape[0]))
    scheduler = LearnedMultistepScheduler(prediction_type="sample", solvers={str(len(NODES)): solver})
    scheduler.set_timesteps(len(NODES))
    scheduler.set_begin_index(first)
    x = own.latents[NODES[first]][images]
    for node, time in zip(NODES[first:], scheduler.timesteps[first:], strict=True):
        x = scheduler.step(denoiser(x, own.times[node]), time, x).prev_sample
    return float(10 * (x - own.result[images]).pow(2).mean().log10())


def test_every_step_has_a_stand_in_for_each_number_of_evaluations(learnt: tuple[Jumps, Solver]) -> None:
    _, solver = learnt
    assert [*solver.start] == [1, 2, 3, 4, 5]
    for n, several in solver.start.items():
        assert len(several) == min(n, PREDICTIONS - 1)
        for evaluations, one in enumerate(several, 1):
            assert (one.count, one.count_latents) == (evaluations, min(evaluations, LATENTS))
            assert needs(one) == evaluations <= n


@pytest.mark.parametrize("first", range(1, len(NODES)))
def test_it_comes_nearer_than_neutral_steps(learnt: tuple[Jumps, Solver], first: int) -> None:
    jumps, solver = learnt
    with torch.inference_mode():
        own = left(jumps, solver, first)
        plain = left(jumps, Solver(solver.timesteps, solver.steps), first)
        assert own < plain - (3 if first < 5 else 1)  # of one step there is not much to make better
        whole = left(jumps, solver, 0)
        assert whole == left(jumps, Solver(solver.timesteps, solver.steps), 0), "from the noise nothing changes"
        assert own < whole + 10, "less is left to do"
