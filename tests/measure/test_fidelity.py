"""PSNR and SSIM against torchmetrics, and their properties."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from diffusion_accel import ConfigurationError
from diffusion_accel.measure.fidelity import EQUAL, Fidelity, conformal_floor, decibels, fidelity, psnr, ssim


def images(seed: int, n: int = 3, size: tuple[int, int] = (24, 31)) -> torch.Tensor:
    return torch.rand(n, 3, *size, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1000), sigma=st.floats(0.001, 0.5))
def test_against_torchmetrics(seed: int, sigma: float) -> None:
    a = images(seed)
    b = (a + sigma * torch.randn(a.shape, generator=torch.Generator().manual_seed(seed + 1))).clamp(0, 1)
    for i in range(len(a)):
        x, y = a[i : i + 1].double(), b[i : i + 1].double()
        assert math.isclose(psnr(a, b)[i], peak_signal_noise_ratio(y, x, data_range=1.0), abs_tol=1e-4)
        full = structural_similarity_index_measure(y, x, data_range=1.0, return_full_image=True)[1]
        whole_windows = full[..., 5:-5, 5:-5].mean()  # torchmetrics also averages over reflected borders
        assert math.isclose(ssim(a, b)[i], whole_windows, abs_tol=1e-6)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1000))
def test_symmetric_and_perfect_for_equal_images(seed: int) -> None:
    a, b = images(seed), images(seed + 1)
    assert torch.allclose(psnr(a, b), psnr(b, a)) and torch.allclose(ssim(a, b), ssim(b, a))
    assert torch.isinf(psnr(a, a)).all() and torch.allclose(ssim(a, a), torch.ones(3, dtype=torch.float64))
    assert torch.equal(psnr(a, b)[1:2], psnr(a[1:2], b[1:2])), "an image's value does not depend on its batch"


def test_both_fall_with_noise() -> None:
    a = torch.linspace(0, 1, 32).expand(1, 3, 32, 32).clone()
    noise = torch.randn(a.shape, generator=torch.Generator().manual_seed(0))
    values = [(float(psnr(a, a + s * noise)), float(ssim(a, a + s * noise))) for s in (0.005, 0.02, 0.1, 0.3)]
    assert values == sorted(values, reverse=True)
    assert math.isclose(values[1][0], -20 * math.log10(0.02), abs_tol=0.3)


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="one shape"):
        psnr(torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 15))
    with pytest.raises(ConfigurationError, match="11x11"):
        ssim(torch.zeros(1, 3, 8, 16), torch.zeros(1, 3, 8, 16))


def test_the_record_of_a_batch() -> None:
    a, b = images(0, 20), images(1, 20)
    found = fidelity(a, b)
    assert found.psnr == tuple(psnr(a, b).tolist()) and found.ssim == tuple(ssim(a, b).tolist()) and len(found) == 20
    assert found.psnr_median == float(psnr(a, b).quantile(0.5))
    assert found.ssim_worst_decile == float(ssim(a, b).quantile(0.1))
    assert found.psnr_worst_decile <= found.psnr_median
    assert found.to_dict()["psnr"] == [round(value, 2) for value in found.psnr]


def test_decibels_for_people() -> None:
    assert decibels(46.06) == "46.1 dB" and decibels(46.06, "") == "46.1"
    assert decibels(EQUAL) == decibels(math.inf, "") == "equal"


def test_equal_and_small_images_have_a_record_too() -> None:
    same = fidelity(images(0), images(0))
    assert (same.psnr_median, same.ssim_median) == (EQUAL, 1.0) and same.to_dict()["psnr"] == [None] * 3
    small = fidelity(images(0, size=(8, 8)), images(1, size=(8, 8)))
    assert small.ssim == () and small.ssim_median is None and small.ssim_worst_decile is None
    red, blue = Image.new("RGB", (20, 16), (255, 0, 0)), Image.new("RGB", (20, 16), (0, 0, 255))
    assert fidelity([red, red], [red, blue]) == Fidelity(
        (float("inf"), pytest.approx(1.76, abs=0.01)), (1.0, pytest.approx(0.33, abs=0.05))
    )


# ---------------------------------------------------------------------- the conformal floor
@given(
    values=st.lists(st.floats(0, 100), min_size=1, max_size=60),
    share=st.sampled_from([0.5, 0.75, 0.8, 0.9, 0.95]),
)
def test_the_floor_is_the_value_that_few_enough_lie_below(values: list[float], share: float) -> None:
    """By the definition: the highest of the values that at most (n + 1)(1 - share) - 1 others lie below."""
    floor = conformal_floor(values, share)
    allowed = round((len(values) + 1) * (1 - share), 9)
    if allowed < 1:
        assert floor is None
        return
    assert floor is not None and floor in values
    assert floor == max(v for v in values if sum(other < v for other in values) <= allowed - 1)


def test_nine_values_are_the_fewest_for_nine_of_ten() -> None:
    assert conformal_floor(range(8)) is None and conformal_floor([]) is None
    assert conformal_floor([5.0, *range(10, 18)]) == 5.0, "the lowest of nine"
    assert conformal_floor(list(range(24))) == 1 and conformal_floor(torch.arange(96)) == 8
    assert conformal_floor([math.inf] * 9) == EQUAL
    for values, share in (([1.0] * 8 + [math.nan], 0.9), ([1.0] * 9, 1.0), ([1.0] * 9, 0.0), ([1.0], math.nan)):
        with pytest.raises(ConfigurationError, match="a floor needs"):
            conformal_floor(values, share)


@pytest.mark.parametrize("size", [9, 10, 24])
@pytest.mark.parametrize("kind", ["normal", "skewed", "some prompts are hard"])
def test_fresh_values_lie_below_the_floor_no_more_often_than_promised(size: int, kind: str) -> None:
    """10,000 held-out sets, each with one fresh value of the same kind: a standard error of 0.3%."""
    generator = torch.Generator().manual_seed(size)
    draws = torch.randn(10_000, size + 1, generator=generator, dtype=torch.float64)
    if kind == "skewed":
        draws = -draws.abs().pow(3)
    elif kind != "normal":
        draws = draws - 8 * (torch.rand(draws.shape, generator=generator) < 0.3)
    floors = torch.tensor([conformal_floor(row[:-1]) for row in draws], dtype=torch.float64)
    below = float((draws[:, -1] < floors).double().mean())
    exact = math.floor((size + 1) * 0.1 + 1e-9) / (size + 1)  # for values without ties
    assert exact <= 0.1 and abs(below - exact) < 0.012
