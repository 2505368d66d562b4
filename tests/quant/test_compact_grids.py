"""Grids by channel that take half the bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from quantized_layers import LAYERS, TIMES, inputs, linear, trainable_layer

from diffusion_accel.quant.affine import half_scale
from diffusion_accel.quant.ptq.trainable_layer import set_quantization_state

COMPACT: dict[str, Any] = {"per_channel": True, "compact_grids": True}


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize(("bits", "margin"), [(2, 0), (3, 0), (4, 0), (4, 8), (5, 20), (8, 0), (8, 3), (12, 0)])
def test_compact_grids_compute_what_the_draft_computes(kind: str, bits: int, margin: int) -> None:
    trainable = trainable_layer(LAYERS[kind](), activation_bits=bits, output_bits=8, zero_margin=margin, **COMPACT)
    trainable.input_zero_point += torch.arange(12) % 3 - 1  # others in each channel
    if margin:
        trainable.input_zero_point[:, :2] = torch.tensor([-float(margin), 2**bits - 1 + margin])
    trainable.input_scale.data[0, :4] = torch.tensor([0.0, 1e-6, 5e-5, 1e6])  # what float16 does not hold
    layer = trainable.finished(trainable.buckets)
    assert layer.input_scale.dtype == torch.float16 and layer.input_scale.shape == (3, 12)
    wide = (2**bits - 1 + 2 * margin).bit_length()
    packed = (12 * wide + 7) // 8
    stored = (torch.uint8, (3, packed)) if wide <= 8 else (torch.int32, (3, 12))
    assert (layer.input_zero_point.dtype, tuple(layer.input_zero_point.shape)) == stored
    set_quantization_state({"one": trainable}, weights=True, inputs=True)
    x = inputs(layer, 4)
    for times in (*TIMES, torch.tensor([100.0, 900.0, 500.0, 900.0])):
        trainable.buckets.select(times)
        with torch.no_grad():
            assert torch.equal(layer(x), trainable(x)) and torch.isfinite(layer(x)).all()
        assert torch.equal(layer.round_input(x), layer.round_input(layer.round_input(x)))


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_compact_grids_take_half_the_bytes_and_only_round_the_scales(kind: str) -> None:
    compact, wide = (trainable_layer(LAYERS[kind](), activation_bits=4, **c) for c in (COMPACT, {"per_channel": True}))
    wide.input_scale.data = half_scale(wide.input_scale.data).float()
    one, two = compact.finished(compact.buckets), wide.finished(wide.buckets)
    sizes = [sum(b.nbytes for n, b in q.named_buffers() if n.startswith("input_")) for q in (one, two)]
    assert sizes == [3 * 12 * 5 // 2, 3 * 12 * 5]
    x = inputs(one)
    for time in TIMES:
        one.buckets.select(time)
        two.buckets.select(time)
        assert torch.equal(one(x), two(x))


def test_scales_of_compact_grids_learn_through_their_rounding() -> None:
    trainable = trainable_layer(linear(), activation_bits=4, **COMPACT)
    set_quantization_state({"one": trainable}, weights=True, inputs=True)
    trainable.input_scale.requires_grad_(True)
    trainable(inputs(linear())).square().sum().backward()
    assert trainable.input_scale.grad is not None and trainable.input_scale.grad[0].abs().min() > 0
