"""Clean cut-outs and the ad-hoc ways to make them, on drawn shapes."""

from __future__ import annotations

import numpy as np
import pytest

from diffusion_accel.evaluation.cutouts import cutout_faults, flood_filled, thresholded


def disc(size: int = 48, radius: float = 15, soft: float = 1.0, centre: float = 23.5) -> np.ndarray:
    y, x = np.mgrid[:size, :size]
    return np.clip((radius - np.hypot(y - centre, x - centre)) / soft + 0.5, 0, 1)


def test_each_fault_by_itself() -> None:
    assert cutout_faults(disc()) == []
    assert cutout_faults(np.zeros((8, 8))) == ["empty"]
    assert cutout_faults(disc(radius=26)) == ["border"]
    assert cutout_faults(np.clip(disc(radius=8, centre=12) + disc(radius=8, centre=35), 0, 1)) == ["parts"]
    assert cutout_faults(disc(soft=9)) == ["edge"]
    assert cutout_faults(disc() - disc(radius=4)) == ["holes"]


@pytest.mark.parametrize(("soft", "clean"), [(1, True), (2, True), (8, False)])
def test_how_wide_an_edge_may_be(soft: float, clean: bool) -> None:
    assert (cutout_faults(disc(soft=soft)) == []) is clean


def test_the_ad_hoc_ways_on_white() -> None:
    alpha = disc(soft=0.01)
    red = np.where(alpha[..., None] > 0.5, (200, 30, 40), (255, 255, 255)).astype(np.uint8)
    assert np.array_equal(flood_filled(red), alpha.round()) and cutout_faults(thresholded(red)) == []
    eye = np.where((disc(radius=5, soft=0.01) > 0.5)[..., None], 255, red).astype(np.uint8)
    assert cutout_faults(flood_filled(eye)) == []
    assert cutout_faults(thresholded(eye)) == ["holes"], "white inside is taken for background"
    assert flood_filled(np.zeros((4, 4, 3), np.uint8)).all()
