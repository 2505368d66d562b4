"""SADA's and EasyCache's rules: the formulas as published, and whole trajectories by hand."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

from diffusion_accel.bench.adaptive import EasyCache, Sada, adams_moulton, instability, lagrange, slope
from diffusion_accel.prediction import Conversion


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (1, 2, 3, 3)), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("timestep", [40.0, 500.0, 940.0])
def test_slopes_are_those_of_the_probability_flow(kind: str, timestep: float) -> None:
    scheduler = DDIMScheduler(prediction_type=kind)
    conversion, clean, noise = Conversion(scheduler), normal(0), normal(1)
    alpha, sigma = conversion.coefficients(timestep)
    x = alpha * clean + sigma * noise
    said = {"epsilon": noise, "sample": clean, "v_prediction": alpha * noise - sigma * clean}[kind]
    beta = float(scheduler.betas[int(timestep)])
    expected = -0.5 * beta * x + 0.5 * beta / sigma * noise  # of the variance-preserving process
    torch.testing.assert_close(slope(conversion, said, x, timestep), expected, rtol=0.02, atol=1e-5)


def test_slopes_of_flow_matching_are_the_flow() -> None:
    conversion, clean, noise = Conversion(FlowMatchEulerDiscreteScheduler()), normal(0), normal(1)
    x = 0.4 * clean + 0.6 * noise
    torch.testing.assert_close(slope(conversion, noise - clean, x, 600.0), (noise - clean) / 1000, rtol=1e-6, atol=1e-9)


def test_slopes_where_timesteps_are_logarithms_of_sigma() -> None:
    scheduler = EulerDiscreteScheduler(prediction_type="v_prediction", timestep_type="continuous")
    conversion, clean, noise = Conversion(scheduler), normal(0), normal(1)
    assert conversion.by_sigma

    def at(time: float) -> torch.Tensor:
        alpha, sigma = conversion.coefficients(time)
        return alpha * clean + sigma * noise

    alpha, sigma = conversion.coefficients(0.1)
    found = slope(conversion, alpha * noise - sigma * clean, at(0.1), 0.1)
    torch.testing.assert_close(found, (at(0.1001) - at(0.0999)) / 0.0002, rtol=1e-3, atol=1e-4)


def test_the_published_coefficients() -> None:
    x, slopes = torch.tensor([10.0]), [torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([4.0])]
    assert float(adams_moulton(x, slopes, 2.0)) == 10 - 2 * (0.625 + 1.5 - 1.5)
    assert float(adams_moulton(x, slopes[:1] * 3, 2.0)) == 8  # an even slope is followed exactly
    assert instability(torch.tensor([3.0]), torch.tensor([1.0]), slopes) == 2 * (1 - 4 + 4)


def test_lagrange_follows_a_cubic() -> None:
    steps = [5, 9, 13, 17]
    values = [torch.tensor([float(s) ** 3 - s]) for s in steps]
    assert float(lagrange(steps, values, 18)) == pytest.approx(18**3 - 18, rel=1e-5)
    assert float(lagrange(steps, values, 13)) == pytest.approx(13**3 - 13, rel=1e-6)


def followed(rule: Sada, conversion: Conversion, times: list[float]) -> str:
    """A trajectory whose clean sample and noise never change, as one letter a step: computed or left out."""
    clean, noise, pattern = normal(0), normal(1), ""

    def at(time: float) -> torch.Tensor:
        alpha, sigma = conversion.coefficients(time)
        return alpha * clean + sigma * noise

    for index, time in enumerate(times):
        x, full = at(time), rule.full(index)
        if full:
            rule.computed(index, x, noise)
        else:
            torch.testing.assert_close(rule.forecast(index, x), noise, rtol=0.2, atol=0.2)
        pattern += "F" if full else "."
        if index + 1 < len(times):
            rule.arrived(index, at(times[index + 1]))
    return pattern


def test_sada_leaves_out_four_in_a_row_and_none_at_the_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    conversion, times = Conversion(DDIMScheduler()), [float(980 - 20 * i) for i in range(50)]
    monkeypatch.setattr("diffusion_accel.bench.adaptive.instability", lambda *_: 0.0)
    assert followed(Sada(conversion, times), conversion, times) == "F" * 11 + "....F" * 7 + "..FF"
    monkeypatch.setattr("diffusion_accel.bench.adaptive.instability", lambda *_: 1e-9)
    assert followed(Sada(conversion, times), conversion, times) == "F" * 50


def test_sada_with_the_polynomial_computes_every_fourth_step(monkeypatch: pytest.MonkeyPatch) -> None:
    conversion, times = Conversion(DDIMScheduler()), [float(980 - 20 * i) for i in range(50)]
    monkeypatch.setattr("diffusion_accel.bench.adaptive.instability", lambda *_: 1.0)
    pattern = followed(Sada(conversion, times, polynomial=True), conversion, times)
    assert pattern == "F" * 26 + "...F" * 5 + "..FF"


def test_sada_scales_its_places() -> None:
    conversion = Conversion(DDIMScheduler())
    assert Sada(conversion, [0.0] * 50, True).places == (10, 24, 47)
    assert Sada(conversion, [0.0] * 20, True).places == (4, 8, 19)
    assert Sada(conversion, [0.0] * 20).places == (4, 19, 19)


@pytest.mark.parametrize("threshold", [0.02, 0.1, 0.5])
def test_easycache_adds_up_the_changes(threshold: float) -> None:
    total, rule, pattern = 30, EasyCache(threshold, 30), ""
    inputs = [math.sin(i / 5) + 3 for i in range(total)]
    outputs = [math.cos(i / 7) + 2 for i in range(total)]

    def tensor(value: float) -> torch.Tensor:
        return torch.full((1, 2, 2, 2), value, dtype=torch.float64)

    expected, rate, summed = "", None, 0.0
    last_input = last_output = None
    for i in range(total):
        held = False
        if i < total // 5 or i == total - 1:
            summed = 0.0
        elif rate is not None:
            summed += rate * abs(inputs[i] - inputs[i - 1]) / abs(last_output)
            held = summed < threshold
            summed = summed if held else 0.0
        if not held:
            if last_output is not None:
                rate = abs(outputs[i] - last_output) / abs(inputs[i] - last_input)
            last_input, last_output = inputs[i], outputs[i]
        expected += "." if held else "F"

        x, full = tensor(inputs[i]), rule.full(i)
        if full:
            rule.computed(i, x, tensor(outputs[i]))
        else:
            torch.testing.assert_close(rule.forecast(i, x), tensor(inputs[i] + last_output - last_input))
        pattern += "F" if full else "."
        if i + 1 < total:
            rule.arrived(i, tensor(inputs[i + 1]))
    assert pattern == expected and "." in pattern and pattern.startswith("F" * 6) and pattern.endswith("F")
