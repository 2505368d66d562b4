"""What the others have, continued as one's own values went on."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_accel.parallel.forecast import MOST, Forecaster

RATIOS = st.lists(st.floats(0, MOST), min_size=3, max_size=3)


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=30, deadline=None)
@given(RATIOS, st.booleans())
def test_changes_that_go_on_alike_are_forecast_exactly(ratios: list[float], tokens: bool) -> None:
    """Where every channel's change is a multiple of its last one, here as there: what the others have now."""
    shape, view = ((2, 5, 3), (1, 1, 3)) if tokens else ((2, 3, 4, 5), (1, 3, 1, 1))
    ratio = torch.tensor(ratios).view(view)
    series = []
    for seed in (0, 1):  # one's own, then another's
        start, change = rand(*shape, seed=seed), rand(*shape, seed=10 + seed)
        series.append([start, start + change, start + change + ratio * change])
        series[-1].append(series[-1][-1] + ratio * ratio * change)
    own, other = series
    forecaster = Forecaster()
    forecaster.note("layer", {1: other[0]}, {1: own[0], 2: own[0]})
    forecaster.note("layer", {1: other[1]}, {1: own[1], 2: own[1]})
    buffer = other[1].clone()
    found = forecaster.forecast("layer", {1: buffer}, {1: own[2], 2: own[2]})
    torch.testing.assert_close(found[1], other[2], rtol=1e-3, atol=1e-3)
    buffer.copy_(other[2])  # the next message comes into the same memory
    found = forecaster.forecast("layer", {1: buffer}, {1: own[3], 2: own[3]})
    torch.testing.assert_close(found[1], other[3], rtol=1e-3, atol=1e-3)


def test_what_cannot_be_judged_is_taken_as_it_is() -> None:
    own, other = [i * rand(1, 3, 2, 4) for i in range(3)], [rand(1, 3, 2, 4, seed=9 + i) for i in range(3)]
    forecaster = Forecaster()
    assert torch.equal(forecaster.forecast("new", {1: other[0]}, {1: own[0]})[1], other[0])
    forecaster.forecast("new", {1: other[1]}, {1: own[1]})  # no own change before
    assert not torch.equal(forecaster.forecast("new", {1: other[2]}, {1: own[2]})[1], other[2])
    for sends in ({}, {1: own[2][:, :, :1]}):  # nothing to judge by, or of another shape
        forecaster = Forecaster()
        forecaster.note("layer", {1: other[0]}, {1: own[0]})
        forecaster.note("layer", {1: other[1]}, {1: own[1]})
        assert torch.equal(forecaster.forecast("layer", {1: other[2]}, sends)[1], other[2])


def test_values_that_stay_are_forecast_to_stay() -> None:
    own, other = rand(1, 4, 6), rand(1, 4, 6, seed=1)
    forecaster = Forecaster()
    for _ in range(2):
        forecaster.note("layer", {1: other}, {1: own})
    for _ in range(3):
        assert torch.equal(forecaster.forecast("layer", {1: other}, {1: own})[1], other)
