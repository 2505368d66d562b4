"""Integer arithmetic, and what decides for it."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quantized_layers import LAYERS, TIMES, conv, inputs, linear, made, on_grid
from torch import nn

from diffusion_accel.quant import kernels
from diffusion_accel.quant.kernels import (
    AMX,
    VNNI_BFLOAT16,
    Auto,
    Bfloat16,
    Integer,
    IntMatmul,
    OneDnn,
    fastest,
    make_runtime,
    products,
    unsaturated,
    why_not_integer,
)
from diffusion_accel.quant.layers import Buckets, Dequantize, Simulated
from diffusion_accel.quant.ptq.trainable_layer import TrainableLayer
from diffusion_accel.quant.spec import LayerSpec


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("weight_bits", [2, 4, 5, 8])
@pytest.mark.parametrize("split", [0, 5])
def test_integers_compute_what_the_simulation_computes(kind: str, weight_bits: int, split: int) -> None:
    layer = made(LAYERS[kind](), weight_bits=weight_bits, split=split)
    assert why_not_integer(layer) is None
    for number, time in enumerate(TIMES):
        layer.buckets.select(time)
        assert layer.buckets.number == number
        x = on_grid(layer, inputs(layer))  # then no code depends on how a tie is rounded, and only float sums differ
        expected = Simulated()(layer, x)
        for way in (OneDnn(), IntMatmul()):
            assert torch.allclose(way(layer, x), expected, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("saturates", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_integers_without_enough_bits_to_add_them_are_split(
    kind: str, saturates: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not saturates and kernels.saturates():
        pytest.skip("this CPU cuts off large sums of 8-bit products")
    monkeypatch.setattr(kernels, "saturates", lambda: saturates)
    layer = made(LAYERS[kind](), weight_bits=8)
    layer.buckets.select(500)
    x = on_grid(layer, inputs(layer))
    way, expected = OneDnn(), Simulated()(layer, x)
    assert torch.allclose(way(layer, x), expected, atol=2e-5 * float(expected.abs().max()))
    assert way.weights is not None and [len(terms) for terms in way.weights] == [1 + saturates]


@pytest.mark.parametrize("saturates", [False, True])
def test_products_of_bytes_are_exact_on_every_cpu(saturates: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if saturates:
        monkeypatch.setattr(kernels, "saturates", lambda: True)
    extremes = torch.tensor([-128, -1, 0, 1, 127], dtype=torch.int8)
    for rows in (1, 5, 40):
        a = extremes[torch.randint(5, (rows, 70))]
        b = extremes[torch.randint(5, (70, 9))]
        assert torch.equal(kernels.int_mm(a, b), a.int() @ b.int())


@given(st.integers(0, 2**32), st.integers(1, 8))
def test_terms_of_weights_sum_to_them_and_fit_sixteen_bits(seed: int, bits: int) -> None:
    weight = torch.randint(-128, 128, (6, 5), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    terms = unsaturated(weight, bits)
    assert torch.equal(torch.stack(terms).sum(0), weight.long())
    assert all(2 * (2**bits - 1) * term.long().abs().max() <= 32767 for term in terms)


@pytest.mark.parametrize("kind", LAYERS)
def test_integers_differ_by_no_more_than_ties_of_rounding(kind: str) -> None:
    layer = made(LAYERS[kind]())
    layer.buckets.select(500)
    x = inputs(layer, 4)
    scale = float(layer.input_scale[1])
    # one code apart where x / scale is a tie in one arithmetic and not in the other: scale x |weights| of that window
    near_tie = ((x / scale - (x / scale).floor() - 0.5).abs() < 1e-3).float()
    weight = layer.floats().abs()
    with torch.no_grad():
        bound = layer.compute(near_tie * scale, weight)
        if layer.bias is not None:
            bound = bound - (layer.bias.view(-1, 1, 1) if isinstance(layer, nn.Conv2d) else layer.bias)
        wrong = (Integer()(layer, x) - Simulated()(layer, x)).abs()
    assert (wrong <= bound + 1e-4).all()


@pytest.mark.skipif(products("cpu") not in (AMX, VNNI_BFLOAT16), reason="this CPU multiplies no bfloat16")
@pytest.mark.parametrize("kind", LAYERS)
def test_products_are_rounded_to_bfloat16_at_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = made(LAYERS[kind]())
    layer.buckets.select(500)
    x = inputs(layer, 4).bfloat16()
    at_once = Integer()(layer, x)
    monkeypatch.setattr(kernels, "products", lambda device: "32 bits")
    assert at_once.dtype == torch.bfloat16 and torch.equal(at_once, Integer()(layer, x))


def test_what_integers_cannot_do_is_simulated() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"activation_bits": None}, "not quantized"),
        ({"activation_bits": 12}, "more than 8 bits"),
        ({"activation_bits": 4, "per_channel": True}, "each channel"),
    ]
    for spec, reason in cases:
        layer = made(linear(), **spec)
        assert reason in (why_not_integer(layer) or "")
        assert make_runtime("integer", layer).name == "simulated"
        layer.runtime = make_runtime("auto", layer)
        layer.buckets.select(500)
        layer(inputs(layer))
        assert layer.runtime.name == "dequantize"
    layer = made(linear(), weight_bits=8)
    layer.weight_zero_point.fill_(100)
    assert "symmetric" in (why_not_integer(layer) or "")


def test_auto_picks_one_of_two_and_keeps_it() -> None:
    layer = made(conv())
    layer.runtime = Auto()
    assert layer.runtime.name == "auto"
    layer.buckets.select(900)
    x = inputs(layer)
    first = layer(x)
    assert layer.runtime.name in ("integer", "bfloat16", "dequantize")
    assert torch.equal(layer(x), first)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("spec", [{}, {"activation_bits": None, "weight_bits": 8}])
def test_bfloat16_keeps_fifty_decibels(kind: str, spec: dict[str, Any]) -> None:
    layer = made(LAYERS[kind](), **spec)
    x = inputs(layer, 4)
    expected, found = Dequantize()(layer, x), Bfloat16()(layer, x)
    assert found.dtype == torch.float32 and torch.equal(Bfloat16()(layer, x), found)
    noise = (found - expected).square().sum() / expected.square().sum()
    assert 1e-8 < noise < 10**-4.8
    weight, bias = layer.floats(torch.bfloat16), None if layer.bias is None else layer.bias.bfloat16()
    plain: Any = layer.plain
    twin = plain(12, 10) if plain is nn.Linear else copy.deepcopy(LAYERS[kind]())
    twin = twin.bfloat16()
    twin.weight.data, twin.bias = weight, None if bias is None else nn.Parameter(bias)
    assert torch.equal(found, twin(x.bfloat16()).float())


def test_bfloat16_leaves_other_types_alone() -> None:
    layer = made(linear())
    layer.bias.data = layer.bias.data.double()
    x = inputs(layer).double()
    assert torch.equal(Bfloat16()(layer, x), Dequantize()(layer, x))


#: machine, bits of weights, type of the input; then by number of weights what is fastest
STATIC: list[tuple[str, int, torch.dtype, dict[int, str]]] = [
    ("AMX", 8, torch.float32, {128: "dequantize", 256: "bfloat16", 320: "integer"}),
    ("AMX", 8, torch.bfloat16, {256: "dequantize", 768: "integer"}),
    ("32 bits", 8, torch.float32, {128: "dequantize", 256: "integer"}),
    ("32 bits", 8, torch.bfloat16, {128: "dequantize", 256: "integer"}),
    ("32 bits, bfloat16", 8, torch.float32, {128: "dequantize", 256: "integer"}),
    ("32 bits, bfloat16", 8, torch.bfloat16, {128: "dequantize", 256: "integer"}),
    ("16 bits", 8, torch.float32, {768: "dequantize"}),
    ("16 bits", 7, torch.float32, {256: "dequantize", 768: "integer"}),
    ("none", 4, torch.float32, {768: "dequantize"}),
]


@pytest.mark.parametrize(("machine", "bits", "dtype", "expected"), STATIC)
def test_auto_goes_by_the_layer_and_the_machine_alone(
    monkeypatch: pytest.MonkeyPatch, machine: str, bits: int, dtype: torch.dtype, expected: dict[int, str]
) -> None:
    """Not by a clock, so that a machine draws the same image every time; not by the rows, so that shares agree."""
    monkeypatch.setattr(kernels, "products", lambda device: machine)
    spec = LayerSpec(weight_bits=bits, activation_bits=8)
    ways = {"integer": Integer, "bfloat16": Bfloat16, "dequantize": Dequantize}
    for width, name in expected.items():
        plain = TrainableLayer(nn.Linear(width, width), spec, Buckets((900.0,)), search=False)
        layer = plain.finished(Buckets((900.0,)))
        layer.runtime = Auto()
        for rows in (1, 300):
            x = torch.randn(rows, width).to(dtype)
            layer.bias.data = layer.bias.data.to(dtype)
            assert torch.equal(layer(x), ways[name]()(layer, x))
            assert layer.runtime.name == name


@pytest.mark.parametrize("machine", ["AMX", "32 bits, bfloat16"])
def test_auto_takes_bfloat16_only_within_the_error_that_a_layer_has(
    monkeypatch: pytest.MonkeyPatch, machine: str
) -> None:
    monkeypatch.setattr(kernels, "products", lambda device: machine)
    layer = made(conv(in_channels=128, out_channels=128), weight_bits=8, activation_bits=None)
    for sqnr, name in ((40.0, "bfloat16"), (48.1, "dequantize"), (None, "dequantize")):
        layer.spec = dataclasses.replace(layer.spec, sqnr=sqnr)
        assert fastest(layer, torch.float32, "cpu") == name
        assert fastest(layer, torch.bfloat16, "cpu") == fastest(layer, torch.float16, "cpu") == "dequantize"
    layer.spec = dataclasses.replace(layer.spec, weight_group=64, activation_bits=8, dynamic=True, input_group=32)
    assert fastest(layer, torch.float32, "cpu") == "bfloat16"  # its inputs are coarser


def test_dynamic_rows_need_larger_layers_than_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Finding a grid for each row costs as much as a small product."""
    found = {}
    for machine in ("AMX", "32 bits", "32 bits, bfloat16"):
        monkeypatch.setattr(kernels, "products", lambda device, machine=machine: machine)
        small, large = conv(in_channels=64, out_channels=64), conv(in_channels=256, out_channels=256)
        layers = {"rows": nn.Linear(384, 384), "more rows": nn.Linear(640, 640), "small image": small, "image": large}
        for kind, layer in layers.items():
            quantized = made(layer, weight_bits=8, dynamic=True)
            found[machine, kind] = fastest(quantized, torch.float32, "cpu")
    assert found["AMX", "rows"] == found["AMX", "more rows"] == "bfloat16" and found["AMX", "image"] == "integer"
    assert found["32 bits", "rows"] == "dequantize"
    assert found["32 bits", "more rows"] == found["32 bits", "image"] == found["32 bits", "small image"] == "integer"
    assert found["32 bits, bfloat16", "rows"] == found["32 bits, bfloat16", "small image"] == "bfloat16"
    assert found["32 bits, bfloat16", "more rows"] == found["32 bits, bfloat16", "image"] == "integer"
