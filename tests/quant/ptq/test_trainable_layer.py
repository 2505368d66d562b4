"""Layers that are being quantized."""

from __future__ import annotations

import torch
from quantized import drafted, sampler

from diffusion_accel.quant.ptq.calibration import CalibrationSet


def test_a_draft_that_rounds_nothing_is_the_model(calibration: CalibrationSet) -> None:
    model, layers = drafted(calibration)
    plain = sampler().pipe.unet
    rows = calibration.bucket(1)
    assert torch.equal(rows.run(model), rows.run(plain))
    layers.restore()
    assert "forward" not in model.__dict__ and torch.equal(rows.run(model), rows.run(plain))
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
