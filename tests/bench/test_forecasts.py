"""Other methods' forecasts as pure functions, against independent formulas and brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusion_accel.bench import forecasts

STEPS = st.lists(st.integers(1, 6), min_size=1, max_size=7).map(lambda gaps: [sum(gaps[:i]) for i in range(len(gaps))])
AHEAD = st.integers(1, 6)


def values_at(steps: list[int], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 3, 4, dtype=torch.float64, generator=generator) for _ in steps]


def ladder(steps: list[int], values: list[torch.Tensor], order: int) -> list[torch.Tensor]:
    """TaylorSeer's bookkeeping, one computed step after the other: each derivative from the one kept before."""
    kept: list[torch.Tensor] = []
    for number, (step, value) in enumerate(zip(steps, values, strict=True)):
        new = [value]
        for degree in range(min(order, len(kept))):
            new.append((new[degree] - kept[degree]) / (step - steps[number - 1]))
        kept = new
    return kept


@given(STEPS, AHEAD, st.integers(1, 3))
def test_taylor_is_the_series_of_kept_differences(steps: list[int], ahead: int, order: int) -> None:
    values = values_at(steps)
    expected = sum(d * ahead**i / math.factorial(i) for i, d in enumerate(ladder(steps, values, order)))
    found = forecasts.combined(forecasts.taylor(steps, steps[-1] + ahead, order), values)
    torch.testing.assert_close(found, expected)


@given(st.integers(1, 5), AHEAD, st.integers(0, 3))
def test_the_highest_difference_of_a_polynomial_is_its_derivative(every: int, ahead: int, order: int) -> None:
    steps = [every * i for i in range(order + 2)]
    rows = forecasts.differences(steps, order)
    powers = [float(step**order) for step in steps]
    assert sum(w * p for w, p in zip(rows[-1], powers, strict=True)) == pytest.approx(math.factorial(order))
    if order <= 1:  # a straight line is gone on with exactly
        found = forecasts.taylor(steps, steps[-1] + ahead, order)
        assert sum(w * p for w, p in zip(found, powers, strict=True)) == pytest.approx((steps[-1] + ahead) ** order)


@given(STEPS, AHEAD, st.integers(1, 3), st.floats(0.1, 1.0))
def test_hermite_has_the_physicists_polynomials(steps: list[int], ahead: int, order: int, sigma: float) -> None:
    values = values_at(steps)
    expected = values[-1].clone()
    for i, difference in list(enumerate(ladder(steps, values, order)))[1:]:
        polynomial = np.polynomial.hermite.hermval(sigma * ahead, [0.0] * i + [1.0])
        expected += difference * sigma**i * float(polynomial) / math.factorial(i)
    found = forecasts.combined(forecasts.hermite(steps, steps[-1] + ahead, order, sigma), values)
    torch.testing.assert_close(found, expected)


def test_hermite_lies_between_holding_and_a_straight_line() -> None:
    steps = [0, 3, 5]
    assert forecasts.hermite(steps, 8, 2, 1e-9) == pytest.approx(forecasts.hold(steps, 8))
    assert forecasts.hermite(steps, 8, 1, math.sqrt(0.5)) == pytest.approx(forecasts.taylor(steps, 8, 1))


@given(STEPS, AHEAD, st.floats(0.01, 1.0), st.floats(0.0, 1.0))
def test_spectrum_is_a_ridge_fit_mixed_with_a_line(steps: list[int], ahead: int, ridge: float, mix: float) -> None:
    total, at = 50, steps[-1] + ahead
    values = np.random.default_rng(0).normal(size=len(steps))
    # ridge regression as least squares with rows that ask for small coefficients
    design = np.polynomial.chebyshev.chebvander(2 * np.array(steps) / total - 1, 4)
    rows = np.concatenate([design, math.sqrt(ridge) * np.eye(5)])
    found, *_ = np.linalg.lstsq(rows, np.concatenate([values, np.zeros(5)]), rcond=None)
    fitted = np.polynomial.chebyshev.chebval(2 * at / total - 1, found)
    line = values[-1]
    if len(steps) > 1:
        line += ahead * (values[-1] - values[-2]) / (steps[-1] - steps[-2])
    weights = forecasts.spectrum(steps, at, total, ridge=ridge, mix=mix)
    assert float(np.dot(weights, values)) == pytest.approx(mix * fitted + (1 - mix) * line, rel=1e-6, abs=1e-6)


def test_spectrum_without_a_ridge_follows_polynomials_of_its_degree() -> None:
    steps, at = [0, 2, 5, 9, 14, 20], 27
    weights = forecasts.spectrum(steps, at, 50, ridge=1e-12, mix=1.0)
    for degree in range(5):
        found = sum(w * (s / 50) ** degree for w, s in zip(weights, steps, strict=True))
        assert found == pytest.approx((at / 50) ** degree, abs=1e-4)


def test_spectrum_computes_as_many_steps_as_its_authors_say() -> None:
    assert len(forecasts.spectrum_schedule(50)) == 14
    assert len(forecasts.spectrum_schedule(50, growth=3.0)) == 10
    assert sorted(forecasts.spectrum_schedule(12)) == [0, 1, 2, 3, 4, 6, 8, 11]
    assert forecasts.spectrum_schedule(1) == {0}


def foca_by_hand(steps: list[int], values: list[torch.Tensor], at: int) -> torch.Tensor:
    """The recurrence on the values themselves."""
    past: list[torch.Tensor] = []
    trend = torch.zeros(())
    for step in range(at + 1):
        if step in steps:
            number = steps.index(step)
            if number:
                trend = (values[number] - values[number - 1]) / (step - steps[number - 1])
            past.append(values[number])
        elif len(past) > 1:
            predicted = 2 * past[-1] - past[-2]
            past.append(predicted + (trend - (past[-1] - past[-2])) / 2)
    return past[-1]


@given(STEPS, AHEAD)
def test_foca_is_its_recurrence(steps: list[int], ahead: int) -> None:
    values, at = values_at(steps), steps[-1] + ahead
    found = forecasts.combined(forecasts.foca(steps, at), values)
    torch.testing.assert_close(found, foca_by_hand(steps, values, at))


def test_foca_goes_on_with_a_straight_line() -> None:
    weights = forecasts.foca([0, 1, 4], 9)
    assert sum(w * s for w, s in zip(weights, [0, 1, 4], strict=True)) == pytest.approx(9)
    assert sum(weights) == pytest.approx(1)


@pytest.mark.parametrize(("every", "ahead"), [(1, 1), (3, 1), (3, 2), (5, 4)])
def test_dmd_recovers_a_linear_system(every: int, ahead: int) -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(40, 3, dtype=torch.float64, generator=generator)
    turn, shrink = math.cos(0.1), math.sin(0.1)
    step = torch.tensor([[turn, -shrink, 0.0], [shrink, turn, 0.0], [0.0, 0.0, 0.95]], dtype=torch.float64)

    def state(time: int, start: torch.Tensor) -> torch.Tensor:
        return vectors @ (torch.linalg.matrix_power(step, time) @ start)

    starts = torch.tensor([[1.0, 0.5, 2.0], [0.3, -1.0, 0.7]], dtype=torch.float64)  # rows of a batch

    def both(time: int) -> torch.Tensor:
        return torch.stack([state(time, start) for start in starts]).view(2, 4, 10)

    steps = [0, *(1 + every * i for i in range(5))]  # an uneven gap at the beginning
    found = forecasts.dmd(steps, [both(s) for s in steps], steps[-1] + ahead)
    torch.testing.assert_close(found, both(steps[-1] + ahead), rtol=1e-6, atol=1e-6)


def test_dmd_stands_back_where_it_cannot_be_fitted() -> None:
    steps = [0, 5, 10]
    values = values_at(steps)
    line = values[-1] + 0.4 * (values[-1] - values[-2])
    torch.testing.assert_close(forecasts.dmd(steps, values, 12), line)
    uneven = [0, 5, 10, 12]
    values = values_at(uneven)
    torch.testing.assert_close(forecasts.dmd(uneven, values, 13), values[-1] + 0.5 * (values[-1] - values[-2]))
    nothing = [torch.zeros(1, 2, 3)] * 5
    assert not forecasts.dmd([0, 1, 2, 3, 4], nothing, 5).any()
    assert torch.equal(forecasts.dmd([0], [torch.ones(1, 2)], 3), torch.ones(1, 2))


@given(STEPS, AHEAD)
def test_what_does_not_change_is_forecast_as_it_is(steps: list[int], ahead: int) -> None:
    at = steps[-1] + ahead
    for weights in (
        forecasts.hold(steps, at),
        forecasts.taylor(steps, at, 3),
        forecasts.hermite(steps, at),
        forecasts.foca(steps, at),
    ):
        assert len(weights) == len(steps) and sum(weights) == pytest.approx(1)


def test_half_precision_is_summed_in_more() -> None:
    values = [torch.tensor([60000.0], dtype=torch.float16)] * 2
    found = forecasts.combined([-1.0, 2.0], values)
    assert found.dtype == torch.float16 and float(found) == 60000.0
