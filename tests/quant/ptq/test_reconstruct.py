"""Learning how weights are rounded, block by block."""

from __future__ import annotations

from pathlib import Path

import torch
import zoo
from quantized import Prompted, drafted

from diffusion_accel.quant.model import candidates
from diffusion_accel.quant.ptq.calibration import CalibrationSet, record
from diffusion_accel.quant.ptq.reconstruct import RoundingSettings, capture, reconstruct, units
from diffusion_accel.quant.ptq.trainable_layer import TrainableLayers, set_quantization_state
from diffusion_accel.quant.spec import LayerSpec


def test_learnt_rounding_is_nearer_than_rounding_to_nearest(calibration: CalibrationSet) -> None:
    model, layers = drafted(calibration)
    rows = [calibration.bucket(b) for b in range(3)]
    name, unit = next((n, u) for n, u in units(model, rows[0]).items() if n.endswith("resnets.0"))

    def switch(full: bool) -> None:
        set_quantization_state(layers, weights=False, inputs=False)

    data = capture(model, unit, rows, switch)
    assert len(data.target) == 24
    set_quantization_state(layers, weights=False, inputs=False)
    mine = [d for n, d in layers.items() if n.startswith(name)]
    before = [(d.up.clone(), d.codes().detach().clone()) for d in mine]
    nearest, learnt = reconstruct(unit, data, RoundingSettings(iterations=150, batch=12, rate=1e-2), seed=0)
    assert learnt < 0.8 * nearest
    for layer, (up, codes) in zip(mine, before, strict=True):
        assert layer.logits is None and not torch.equal(layer.up, up)
        assert (layer.codes() - codes).abs().max() <= 1  # up or down, nothing else
        assert layer.codes().min() >= 0 and layer.codes().max() <= 7


def test_units_are_in_the_order_in_which_the_model_runs() -> None:
    pipe, call = zoo.sd()
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        found = record(Prompted(pipe, call), 1, Path(folder))
        model = pipe.unet
        TrainableLayers(model, {n: LayerSpec(weight_bits=4) for n in candidates(model)}, ())
        names = list(units(model, found.bucket(0)))
    assert names[0].startswith("time_embedding") and names[-1] == "conv_out"
    first = names.index("down_blocks.1.resnets.0")
    assert names.index("down_blocks.1.attentions.0.transformer_blocks.0") > first
    assert not any(".attn1" in n or ".conv1" in n for n in names)  # inside of blocks
