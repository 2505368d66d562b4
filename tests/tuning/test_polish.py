"""Moving all jumps together: the gradient is right, what comes out is nearer, and elsewhere nothing is lost."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from diffusion_accel.tuning import polish
from diffusion_accel.tuning.jumps import Jumps, Trajectory
from diffusion_accel.tuning.polish import _Course, polished

NODES, SIZE, IMAGES = (0, 5, 9, 13), 16, 12


def denoiser(x: torch.Tensor, time: float) -> torch.Tensor:
    """A clean sample: bent, other for each channel, and mixed among neighbours."""
    bent = torch.tanh(x * torch.tensor([1.0, 2.0, 0.5]).view(1, 3, 1, 1))
    return 0.7 * bent + 0.2 * torch.sin(3 * x.roll(1, 3)) * math.cos(time)


def made(images: int = IMAGES) -> Jumps:
    """Images on the way of many small DDIM steps, of which every fourth is a node."""
    generator = torch.Generator().manual_seed(0)
    x, steps = torch.randn(IMAGES, 3, 4, 4, generator=generator), 4 * SIZE
    levels = [math.pi / 2 * (0.98 - 0.97 * n / steps) for n in range(steps + 1)]
    latents, said = [], []
    for n in range(steps):
        clean = denoiser(x, levels[n])
        if n % 4 == 0:
            latents.append(x), said.append(clean)
        noise = (x - math.cos(levels[n]) * clean) / math.sin(levels[n])
        last = n + 1 == steps
        x = clean if last else math.cos(levels[n + 1]) * clean + math.sin(levels[n + 1]) * noise
    times = levels[:-1:4]
    alphas, sigmas = [*map(math.cos, times), 1.0], [*map(math.sin, times), 0.0]
    trajectory = Trajectory(times, alphas, sigmas, torch.stack(latents), torch.stack(said), x, "sample")
    return Jumps(lambda x, time, which: denoiser(x, time), trajectory, range(images))


@pytest.fixture
def rolled() -> tuple[Jumps, Any]:
    """A rollout with four of sixteen evaluations, as a search makes it."""
    with torch.inference_mode():
        jumps = made()
        return jumps, jumps.run(NODES)


def test_the_gradient_is_that_of_differences(rolled: tuple[Jumps, Any]) -> None:
    jumps, found = rolled
    course, images = _Course(jumps, found), [0, 5, 6]
    with torch.inference_mode():
        at_start = course.errors(course.weights, images)
        torch.testing.assert_close(10 ** (-found.decibels[images] / 10), at_start.double(), rtol=1e-3, atol=1e-9)
    moves = [torch.zeros_like(w, requires_grad=True) for w in course.weights]
    with torch.enable_grad():
        gradient = torch.autograd.grad(course.errors(course.moved(moves), images).sum(), moves)
    for n in range(len(NODES)):
        place, step = (0, n % gradient[n].shape[1]), 0.02
        values = []
        for sign in (1, -1):
            other = [torch.zeros_like(w) for w in course.weights]
            other[n][place] = sign * step
            with torch.no_grad():
                values.append(float(course.errors(course.moved(other), images).double().sum()))
        assert float(gradient[n][place]) == pytest.approx((values[0] - values[1]) / (2 * step), rel=0.05, abs=1e-4)


def test_in_even_coordinates_a_move_changes_the_latents_alike(rolled: tuple[Jumps, Any]) -> None:
    jumps, found = rolled
    with torch.inference_mode(False):
        course = _Course(jumps, found)
        course.even(jumps.images)
    features: list[list[torch.Tensor]] = []
    with torch.no_grad():
        course.errors(course.weights, jumps.images, features)
    for n, (parts, factor) in enumerate(zip(features, course.factors, strict=True)):
        for channel, own in enumerate(factor):
            each = [part if len(factor) == 1 else part[:, channel] for part in parts]
            table = torch.stack([part.flatten() for part in each], 1).double() @ own
            spread = torch.linalg.eigvalsh(table.T @ table / len(table))
            assert spread.max() < 1.01, "no direction moves the latents by more"
            least = 0.95 if n == 0 else 0.0  # later latents are sums of earlier ones: these moves change nothing
            assert spread.min() > least - 0.01 and spread[-2] > 0.95


def test_what_comes_out_is_nearer(rolled: tuple[Jumps, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    jumps, found = rolled
    monkeypatch.setattr(polish, "MOST", 16)
    with torch.inference_mode():
        better = polished(jumps, found, lambda: 1.0)
        assert better.nodes == found.nodes and better.decibels.mean() > found.decibels.mean() + 0.05
        torch.testing.assert_close(jumps.follow(better.nodes, better.weights).decibels, better.decibels)
        assert torch.equal(polished(jumps, found, lambda: 1.0).result, better.result), "and the same again"
    assert all(len(a) == len(b) for a, b in zip(better.weights, found.weights, strict=True))


def test_without_time_or_a_gradient_the_fitted_jumps_stay(
    rolled: tuple[Jumps, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    jumps, found = rolled
    with torch.inference_mode():
        assert polished(jumps, found, lambda: 0.0) is found
        plain: Any = jumps.replay

        def refuses(x: torch.Tensor, time: float, which: Any) -> Any:
            if x.requires_grad:
                raise RuntimeError("derivative for this operator is not implemented\nat length")
            return plain(x, time, which)

        monkeypatch.setattr(jumps, "replay", refuses)
        assert polished(jumps, found, lambda: 1.0) is found
        monkeypatch.setattr(jumps, "replay", lambda *given: plain(*given).detach())
        monkeypatch.setattr(polish, "MOST", 8)
        wrong = polished(jumps, found, lambda: 1.0)  # a gradient that leaves the denoiser out
        assert wrong is found or wrong.decibels.mean() > found.decibels.mean() - 0.1
        few = Jumps(jumps.replay, jumps.trajectory, range(2))
        assert polished(few, few.run(NODES), lambda: 1.0).decibels.shape == (2,)
