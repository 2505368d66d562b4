"""Forecasts from what the last full steps left."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusion_accel.reuse.history import History, weights


@given(
    times=st.lists(st.integers(0, 999), min_size=1, max_size=4, unique=True),
    at=st.integers(0, 999),
    powers=st.lists(st.floats(-2, 2), min_size=4, max_size=4),
)
def test_forecasts_are_exact_for_polynomials(times: list[int], at: int, powers: list[float]) -> None:
    degree = len(times) - 1

    def value(t: float) -> torch.Tensor:
        return torch.tensor([sum(p * (t / 1000) ** i for i, p in enumerate(powers[: degree + 1]))], dtype=torch.float64)

    history = History(4)
    for t in times:
        history.push(float(t), (value(t), {"twice": 2 * value(t)}))
    one, two = history.at(float(at), degree)
    scale = sum(abs(w) for w in weights([float(t) for t in times], float(at))) * 8
    assert abs(one - value(at)) <= 1e-9 * scale and torch.allclose(two["twice"], 2 * one)
    assert history.at(float(at), 0) is history.values[0]
    history.push(float(times[-1]), (value(0), {"twice": value(0)}))
    assert len(history) == len(times), "a repeated timestep replaces its value"
