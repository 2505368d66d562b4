"""How many rows are worth it, from measured times."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusion_accel.serving.curve import Curve

CURVES = st.dictionaries(st.integers(1, 32), st.floats(1e-4, 10), max_size=6).map(
    lambda seconds: Curve("unet", seconds)
)


def test_the_fewest_rows_that_are_nearly_the_best() -> None:
    assert Curve().cap(16) == 16
    assert Curve("unet", {1: 1.0, 2: 1.2, 4: 2.0, 8: 3.9}).cap(16) == 4  # 2 rows a second, 8 rows are hardly faster
    assert Curve("unet", {1: 1.0, 2: 2.0, 4: 4.0}).cap(16) == 1
    assert Curve("unet", {1: 1.0, 2: 1.0, 4: 1.0}).cap(2) == 2


@given(CURVES, st.integers(1, 32))
def test_never_more_than_allowed_and_nearly_the_best(curve: Curve, most: int) -> None:
    cap, measured = curve.cap(most), {r: s for r, s in curve.seconds.items() if r <= most}
    assert 1 <= cap <= most
    if measured:
        assert cap / measured[cap] >= 0.95 * max(r / s for r, s in measured.items())


def test_between_what_was_measured() -> None:
    curve = Curve("unet", {2: 1.0, 4: 2.0, 8: 2.0})
    assert [curve.at(rows) for rows in (1, 2, 3, 4, 6, 8, 12)] == [1.0, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0]
    assert Curve().at(3) == 0 and Curve("unet", {2: 1.0}).at(4) == 2.0


def test_what_one_more_saves() -> None:
    assert Curve("unet", {1: 1.0, 2: 1.2}).saved(1, 1) == pytest.approx(0.8)
    assert Curve("unet", {1: 1.0, 2: 2.5}).saved(1, 1) == 0


@given(CURVES, st.integers(1, 40), st.integers(1, 8))
def test_never_negative(curve: Curve, rows: int, more: int) -> None:
    assert curve.saved(rows, more) >= 0
