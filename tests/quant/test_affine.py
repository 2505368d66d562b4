"""Grids and their ranges: exact laws, and brute force as the oracle of the range search."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brute

from diffusion_accel.quant.affine import (
    SEARCH_NORM,
    dequantize,
    fake_quantize,
    grid,
    half_scale,
    quantize,
    search_grid,
    value_range,
)

seeds = st.integers(0, 2**31)


some_bits = st.integers(2, 8)


def rows(seed: int, count: int = 4, width: int = 40) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator) * torch.rand(count, 1, generator=generator) * 3


@given(seeds, some_bits, st.booleans())
def test_at_most_two_to_the_bits_values_and_zero_among_them(seed: int, bits: int, symmetric: bool) -> None:
    x = rows(seed)
    scale, zero = grid(x.amin(1, keepdim=True), x.amax(1, keepdim=True), bits, symmetric)
    rounded = fake_quantize(x, scale, zero, bits)
    assert all(len(row.unique()) <= 2**bits for row in rounded)
    codes = quantize(x, scale, zero, bits)
    assert codes.min() >= 0 and codes.max() <= 2**bits - 1 and torch.equal(codes, codes.round())
    assert torch.equal(fake_quantize(torch.zeros(4, 1), scale, zero, bits), torch.zeros(4, 1))


@given(seeds, some_bits, st.integers(0, 40), st.floats(-20, 20))
def test_a_grid_with_a_margin_need_not_hold_zero(seed: int, bits: int, margin: int, shift: float) -> None:
    """The zero point stays within the margin, all of the range is met to a step, and no range gets wider than the one
    that holds zero."""
    x = rows(seed) + shift
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    scale, zero = grid(low, high, bits, margin=margin)
    whole, _ = grid(low, high, bits)
    assert (scale <= whole * (1 + 1e-6)).all() and (scale >= (high - low) / (2**bits - 1) * (1 - 1e-6)).all()
    assert zero.min() >= -margin and zero.max() <= 2**bits - 1 + margin and torch.equal(zero, zero.round())
    # half a step of rounding, and half a step where the zero point was rounded and cuts an end
    assert ((fake_quantize(x, scale, zero, bits) - x).abs() <= scale * 1.0001 + 1e-5).all()
    tight, _ = grid(torch.tensor([9.0]), torch.tensor([10.0]), 4, margin=200)
    assert float(tight) == pytest.approx(1 / 15)
    held, at = grid(torch.tensor([9.0]), torch.tensor([10.0]), 4, margin=8)
    assert float(held) == pytest.approx(10 / 23) and float(at) == -8


@given(seeds, some_bits, st.booleans())
def test_what_lies_on_the_grid_stays(seed: int, bits: int, symmetric: bool) -> None:
    x = rows(seed)
    scale, zero = grid(x.amin(1, keepdim=True), x.amax(1, keepdim=True), bits, symmetric)
    once = fake_quantize(x, scale, zero, bits)
    assert torch.equal(fake_quantize(once, scale, zero, bits), once)


@given(st.floats(2.0**-14, 65000, width=32))
def test_half_scales_are_the_nearest_and_stay(value: float) -> None:
    scale = torch.tensor([value])
    half = half_scale(scale)
    assert half.dtype == torch.float16 and abs(float(half) / value - 1) <= 2**-11
    assert torch.equal(half_scale(half.float()), half)


def test_half_scales_are_normal_positive_and_finite() -> None:
    half = half_scale(torch.tensor([0.0, 1e-30, 5e-8, 6e-5, 6.2e-5, 65504.0, 65519.0, 1e6, 3e38]))
    assert (half >= 2.0**-14).all() and torch.isfinite(half).all()
    assert half[:4].eq(2.0**-14).all() and half[4] > 2.0**-14 and half[5:].eq(65504).all()


@given(seeds)
def test_sixteen_bits_are_nearly_the_identity(seed: int) -> None:
    x = rows(seed)
    scale, zero = grid(x.amin(1, keepdim=True), x.amax(1, keepdim=True), 16)
    assert ((fake_quantize(x, scale, zero, 16) - x).abs() <= scale * 0.51 + 1e-6).all()


@given(seeds, some_bits)
def test_rounding_is_to_the_nearest_level(seed: int, bits: int) -> None:
    x = rows(seed, 1)
    scale, zero = grid(x.amin(1, keepdim=True), x.amax(1, keepdim=True), bits)
    levels = dequantize(torch.arange(2**bits).float(), scale, zero).flatten()
    nearest = (x.flatten()[:, None] - levels).abs().amin(1)
    assert torch.allclose((fake_quantize(x, scale, zero, bits) - x).abs().flatten(), nearest, atol=1e-5)


def test_an_empty_range_is_harmless() -> None:
    scale, zero = grid(torch.zeros(1), torch.zeros(1), 4)
    assert torch.equal(fake_quantize(torch.zeros(3), scale, zero, 4), torch.zeros(3))
    low, high = grid(torch.tensor([1.0]), torch.tensor([3.0]), 4)  # widened to hold zero
    assert high == 0 and torch.isclose(low, torch.tensor([3.0 / 15]))


@given(seeds, st.integers(2, 5), st.booleans())
def test_range_search_is_never_worse_than_the_whole_range(seed: int, bits: int, symmetric: bool) -> None:
    x = rows(seed)
    whole = grid(x.amin(1, keepdim=True), x.amax(1, keepdim=True), bits, symmetric)
    found = search_grid(x, bits, symmetric)

    def error(scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        return (fake_quantize(x, scale, zero, bits) - x).abs().pow(SEARCH_NORM).sum(1)

    assert (error(*found) <= error(*whole)).all()


@pytest.mark.parametrize("bits", [3, 4])
def test_range_search_finds_what_brute_force_finds(bits: int) -> None:
    x = rows(5, 1, 200)
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)

    def error(factor: float) -> float:
        tried = grid(low * factor, high * factor, bits)
        return float((fake_quantize(x, *tried, bits) - x).abs().pow(SEARCH_NORM).sum())

    best = brute(lambda f: error(float(f[0])), (slice(0.21, 1.001, 0.01),), finish=None)
    ours = float((fake_quantize(x, *search_grid(x, bits), bits) - x).abs().pow(SEARCH_NORM).sum())
    assert ours == pytest.approx(error(float(best)), rel=1e-4)


@given(seeds, some_bits)
def test_the_chosen_percentile_is_the_best_one(seed: int, bits: int) -> None:
    x = rows(seed, 2, 3000)
    x[0, 7] = 60.0  # an outlier that one percentile cuts off
    found = value_range(x, bits, (99.0, 99.9, 100.0))

    def error(ends: torch.Tensor) -> torch.Tensor:
        return (fake_quantize(x, *grid(ends[:, :1], ends[:, 1:], bits), bits) - x).square().sum(1)

    whole = torch.stack([x.amin(1), x.amax(1)], 1)
    assert (error(found) <= error(whole) * (1 + 1e-5)).all()
