"""Finetuning: what learns, from what, and that it goes on from its state."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from quantized import drafted

from diffusion_accel.denoisers import TIME_LAYERS
from diffusion_accel.quant.ptq.calibration import CalibrationSet
from diffusion_accel.quant.ptq.finetune import matching
from diffusion_accel.quant.ptq.finetuner import Finetuner, batches
from diffusion_accel.quant.ptq.ranges import observe
from diffusion_accel.quant.ptq.settings import QuantizeSettings
from diffusion_accel.quant.ptq.trainable_layer import TrainableLayers, set_quantization_state


@pytest.mark.parametrize("stage", ["time", "attention"])
def test_only_what_is_chosen_learns(calibration: CalibrationSet, stage: str) -> None:
    model, layers = drafted(calibration)
    set_quantization_state(layers, weights=True, inputs=False)
    observe(model, layers, calibration, QuantizeSettings().observation, range(3), {})
    times = matching(layers, (TIME_LAYERS,))
    assert times and all("time_emb" in n for n in times)
    chosen = times if stage == "time" else matching(layers, (r".*\.(to_q|to_k|to_v)",))
    scales = times if stage == "time" else [n for n in layers if n not in times]
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    finetuner = Finetuner(model, layers, chosen, scales, rate=1e-3, scale_rate=1e-2, layer_loss=True)
    finetuner.visit(1)
    rows = next(iter(batches(calibration, 1, 8, 8, 0)))
    for _ in range(2):  # Adam's first step may leave what has no gradient yet
        finetuner.step(rows)
    finetuner.close()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert {n for n in changed if n.endswith((".weight", ".bias"))} <= {
        f"{c}.{k}" for c in chosen for k in ("weight", "bias")
    }
    assert {f"{c}.weight" for c in chosen} <= changed
    moved = {n.removesuffix(".input_scale") for n in changed if n.endswith("input_scale")}
    assert moved and moved <= set(scales)
    for name in moved:  # only at the timestep of the rows
        now, was = layers[name].input_scale, before[f"{name}.input_scale"]
        assert torch.equal(now[[0, 2]], was[[0, 2]]) and not torch.equal(now[1], was[1])
    assert all(not p.requires_grad for p in model.parameters())
    assert all(torch.equal(d.layer.weight, before[f"{n}.layer.weight"]) for n, d in layers.items())


def test_finetuning_begins_at_the_error_and_reduces_it(calibration: CalibrationSet) -> None:
    model, layers = drafted(calibration)
    set_quantization_state(layers, weights=True, inputs=False)
    observe(model, layers, calibration, QuantizeSettings().observation, range(3), {})
    finetuner = Finetuner(model, layers, list(layers), list(layers), rate=1e-4, scale_rate=1e-3, layer_loss=False)
    finetuner.visit(2)
    rows = calibration.bucket(2)
    set_quantization_state(layers, weights=True, inputs=True)
    with torch.no_grad():
        expected = float((rows.run(model) - rows.output).square().mean())
    losses = [finetuner.step(rows) for _ in range(30)]
    assert losses[0] == pytest.approx(expected, rel=1e-5)
    assert losses[-1] < 0.9 * losses[0]


def moved_scales(calibration: CalibrationSet, moments: str, visits: tuple[int, ...]) -> list[torch.Tensor]:
    """Scales of all layers after two steps at each of `visits`, with weights that stay."""
    model, layers = drafted(calibration)
    set_quantization_state(layers, weights=True, inputs=False)
    observe(model, layers, calibration, QuantizeSettings().observation, range(3), {})
    finetuner = Finetuner(model, layers, [], list(layers), 1e-4, 1e-2, False, moments)
    for number in visits:
        finetuner.visit(number)
        for _ in range(2):
            finetuner.step(calibration.bucket(number))
    return [d.input_scale.detach().clone() for d in layers.values()]


@pytest.mark.slow
def test_every_timestep_has_moments_of_its_own(calibration: CalibrationSet) -> None:
    """The error at a timestep depends on its own scales alone: their order of turns must not matter, unless moments are
    shared."""
    turns, alone = (0, 1, 0, 1), (0, 0, 1, 1)
    kept = moved_scales(calibration, "timestep", turns)
    for mine, other in zip(kept, moved_scales(calibration, "timestep", alone), strict=True):
        assert torch.equal(mine, other)
    shared = moved_scales(calibration, "shared", turns)
    assert any(not torch.equal(a, b) for a, b in zip(kept, shared, strict=True))
    anew = moved_scales(calibration, "visit", turns)
    assert any(not torch.equal(a, b) for a, b in zip(kept, anew, strict=True))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("moments", ["visit", "timestep", "shared"])
def test_a_stage_goes_on_from_its_state(calibration: CalibrationSet, moments: str) -> None:
    def tuned(model: Any, layers: TrainableLayers) -> Finetuner:
        return Finetuner(model, layers, list(layers), list(layers), 1e-3, 1e-2, False, moments)

    def turn(finetuner: Finetuner, number: int) -> None:
        finetuner.visit(number)
        for rows in batches(calibration, number, 8, 4, number):
            finetuner.step(rows)

    model, layers = drafted(calibration)
    set_quantization_state(layers, weights=True, inputs=False)
    observe(model, layers, calibration, QuantizeSettings().observation, range(3), {})
    whole = tuned(model, layers)
    turn(whole, 0)
    turn(whole, 1)
    stopped = copy.deepcopy(model)
    state = {k: v.clone() for k, v in whole.state().items()}
    turn(whole, 0)
    resumed = tuned(stopped, {n: stopped.get_submodule(n) for n in layers})
    resumed.restore(state)
    turn(resumed, 0)
    for (name, one), other in zip(model.named_parameters(), stopped.parameters(), strict=True):
        assert torch.equal(one, other), name
