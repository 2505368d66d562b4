"""Quantized layers: what they compute, by which runtime, for which timestep."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from diffusion_accel.errors import ConfigurationError
from diffusion_accel.quant import kernels
from diffusion_accel.quant.affine import fake_quantize, half_scale
from diffusion_accel.quant.kernels import Auto, Integer, IntMatmul, OneDnn, make_runtime, unsaturated, why_not_integer
from diffusion_accel.quant.layers import Buckets, Dequantize, QuantizedLayer, Simulated
from diffusion_accel.quant.ptq.trainable_layer import TrainableLayer, set_quantization_state
from diffusion_accel.quant.spec import LayerSpec

TIMES = (900.0, 500.0, 100.0)


def conv(**changes: Any) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(**{"in_channels": 12, "out_channels": 9, "kernel_size": 3, "padding": 1, **changes})


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(12, 10)


LAYERS = {
    "linear": linear,
    "conv": conv,
    "conv 1x1": lambda: conv(kernel_size=1, padding=0),
    "conv with stride, dilation and uneven padding": lambda: conv(
        stride=2, dilation=(1, 2), padding=(2, 1), bias=False
    ),
}


def made(layer: nn.Module, **spec: Any) -> QuantizedLayer:
    """A quantized layer with grids that fit inputs of about -3 … 3, others in each bucket."""
    trainable = trainable_layer(layer, **spec)
    return trainable.finished(trainable.buckets)


def trainable_layer(layer: nn.Module, **spec: Any) -> TrainableLayer:
    """What `made` is made of."""
    values = LayerSpec(**{"weight_bits": 4, "activation_bits": 8, **spec})
    trainable = TrainableLayer(layer, values, Buckets(TIMES))
    if values.activation_bits:
        top = 2**values.activation_bits - 1
        ranges = torch.tensor([5.0, 6.0, 8.0])[:, None]
        channels = 1 + 0.1 * torch.arange(trainable.input_scale.shape[1])
        trainable.input_scale.data.copy_(ranges * channels / top)
        trainable.input_zero_point.copy_(
            (torch.tensor([0.4, 0.5, 0.6])[:, None] * top).round().expand(-1, len(channels))
        )
    if values.output_bits:
        trainable.output_scale.data.fill_(8 / (2**values.output_bits - 1))
        trainable.output_zero_point.fill_(2 ** (values.output_bits - 1))
    return trainable


def inputs(layer: nn.Module, count: int = 2, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (count, 12, 7, 6) if isinstance(layer, nn.Conv2d) else (count, 5, 12)
    return torch.randn(*shape, generator=generator)


def on_grid(layer: QuantizedLayer, x: torch.Tensor) -> torch.Tensor:
    return layer.round_input(x)


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


@pytest.mark.parametrize("kind", LAYERS)
def test_simulation_is_the_plain_layer_with_rounded_parts(kind: str) -> None:
    plain = LAYERS[kind]()
    layer = made(plain, output_bits=8)
    layer.buckets.select(100)
    x = inputs(plain)
    scale, zero = layer.input_scale[2, 0], layer.input_zero_point[2, 0].float()
    twin = copy.deepcopy(plain)
    twin.weight.data = (
        layer.codes().float() - layer.weight_zero_point[0].view(-1, *[1] * (plain.weight.dim() - 1))
    ) * (layer.weight_scale[0].view(-1, *[1] * (plain.weight.dim() - 1)))
    y = twin(fake_quantize(x, scale, zero, 8))
    y = fake_quantize(y, layer.output_scale[2, 0], layer.output_zero_point[2, 0].float(), 8)
    assert torch.equal(layer(x), y)


def test_split_with_equal_grids_is_not_split() -> None:
    whole, parts = made(conv()), made(conv(), split=5)
    parts.store(whole.codes(), whole.weight_scale.expand(2, -1), whole.weight_zero_point.expand(2, -1))
    parts.input_scale.copy_(whole.input_scale.expand(-1, 2))
    parts.input_zero_point.copy_(whole.input_zero_point.expand(-1, 2))
    for layer in (whole, parts):
        layer.buckets.select(900)
    x = inputs(whole)
    assert torch.equal(whole(x), parts(x))


def test_rows_of_several_timesteps_use_their_own_grids() -> None:
    for kind in ("linear", "conv"):
        layer = made(LAYERS[kind]())
        x = inputs(layer, 4)
        layer.buckets.select(torch.tensor([100.0, 900.0, 500.0, 900.0]))
        together = layer(x)
        product = IntMatmul()(layer, on_grid(layer, x))
        for i, time in enumerate((100, 900, 500, 900)):
            layer.buckets.select(time)
            assert torch.allclose(layer(x[i : i + 1]), together[i : i + 1], atol=1e-6)
        layer.buckets.select(torch.tensor([100.0, 900.0, 500.0, 900.0]))
        assert torch.allclose(product, layer(on_grid(layer, x)), atol=1e-4)


def test_the_bucket_is_the_nearest_timestep_and_the_noisier_of_two() -> None:
    buckets = Buckets(TIMES)
    for time, number in ((999, 0), (900, 0), (701, 0), (700, 0), (699, 1), (300, 1), (299.5, 2), (0, 2)):
        buckets.select(time)
        assert buckets.number == number, time
    buckets.select(torch.tensor([900, 100]))
    assert buckets.number is None
    assert buckets.rows(2).tolist() == [0, 2]
    assert buckets.rows(6).tolist() == [0, 0, 0, 2, 2, 2]  # frames of each row
    assert buckets.rows(1).tolist() == [0]  # the first rows only


def test_one_bucket_is_no_bucket() -> None:
    layer = made(linear())
    for table in (layer.input_scale, layer.input_zero_point):
        table.copy_(table[:1].expand_as(table))
    x = inputs(layer)
    results = []
    for time in TIMES:
        layer.buckets.select(time)
        results.append(layer(x))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_what_integers_cannot_do_is_simulated() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"activation_bits": None}, "not quantized"),
        ({"activation_bits": 12}, "more than 8 bits"),
        ({"activation_bits": 4, "per_channel": True}, "each channel"),
    ]
    for spec, reason in cases:
        layer = made(linear(), **spec)
        assert reason in (why_not_integer(layer) or "")
        assert make_runtime("integer", layer).name == "simulated" and make_runtime("auto", layer).name == "dequantize"
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
    assert layer.runtime.name in ("integer", "dequantize")
    assert torch.equal(layer(x), first)


@pytest.mark.parametrize(
    ("machine", "bits", "width", "dtype", "faster"),
    [
        ("AMX", 8, 256, torch.float32, True),
        ("AMX", 8, 128, torch.float32, False),
        ("AMX", 8, 256, torch.bfloat16, False),
        ("AMX", 8, 768, torch.bfloat16, True),
        ("32 bits", 8, 256, torch.bfloat16, True),
        ("16 bits", 8, 768, torch.float32, False),
        ("16 bits", 7, 768, torch.float32, True),
        ("16 bits", 4, 256, torch.float32, False),
        ("none", 4, 768, torch.float32, False),
    ],
)
def test_auto_goes_by_the_layer_and_the_machine_alone(
    monkeypatch: pytest.MonkeyPatch, machine: str, bits: int, width: int, dtype: torch.dtype, faster: bool
) -> None:
    """Not by a clock, so that a machine draws the same image every time; not by the rows, so that shares agree."""
    monkeypatch.setattr(kernels, "products", lambda device: machine)
    spec = LayerSpec(weight_bits=bits, activation_bits=8)
    layer = TrainableLayer(nn.Linear(width, width), spec, Buckets((900.0,)), search=False).finished(Buckets((900.0,)))
    layer.runtime = Auto()
    for rows in (1, 300):
        x = torch.randn(rows, width).to(dtype)
        expected = Integer() if faster else Dequantize()
        layer.bias.data = layer.bias.data.to(dtype)
        assert torch.equal(layer(x), expected(layer, x))
        assert layer.runtime.name == ("integer" if faster else "dequantize")


def assign(layer: Any, value: Any) -> None:
    layer.weight = value


def assign_data(layer: Any) -> None:
    layer.weight.data = layer.weight.data + 1


def add_to_data(layer: Any) -> None:
    layer.weight.data += 1


def set_item(layer: Any) -> None:
    layer.weight[0] = 0


WRITES: dict[str, Any] = {
    "copy": lambda q: q.weight.copy_(q.weight + 1),
    "in place": lambda q: q.weight.mul_(2),
    "through a view": lambda q: q.weight.detach().flatten()[1:].zero_(),
    "as an output": lambda q: torch.add(q.weight, 1, out=q.weight),
    "several at once": lambda q: torch._foreach_add_([q.weight], 1),
    "initialisation": lambda q: nn.init.normal_(q.weight),
    "data": assign_data,
    "data in place": add_to_data,
    "item": set_item,
    "a parameter": lambda q: assign(q, nn.Parameter(q.weight + 1)),
    "a tensor": lambda q: assign(q, q.weight + 1),
    "a state dict": lambda q: q.load_state_dict({"weight": q.weight + 1}, strict=False),
}


@pytest.mark.parametrize("how", WRITES)
def test_writing_to_the_weights_is_refused(how: str) -> None:
    for kind in ("linear", "conv"):
        layer = made(LAYERS[kind]())
        before = layer.weight.clone()
        with torch.no_grad(), pytest.raises(ConfigurationError, match="cannot be written; a LoRA works beside them"):
            WRITES[how](layer)
        assert torch.equal(layer.weight, before) and type(layer.weight + 1) is torch.Tensor


def test_what_is_read_from_the_weights_is_free() -> None:
    layer = made(linear())
    before = layer.weight.clone()
    for free in (layer.weight.clone(), layer.weight * 1, copy.deepcopy(layer.weight), layer.weight.numpy()):
        free[:] = 0
    assert torch.equal(layer.weight, before) and before.any()


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_the_class_of_a_quantized_layer_makes_plain_ones(kind: str) -> None:
    """peft builds the two layers of a LoRA with the class of the layer that it stands beside."""
    layer = made(LAYERS[kind]())
    twin = type(layer)(3, 5, **({"kernel_size": 1} if kind == "conv" else {}), bias=False)
    assert type(twin) is {"linear": nn.Linear, "conv": nn.Conv2d}[kind]
    assert isinstance(twin.weight, nn.Parameter) and twin.bias is None


@pytest.mark.parametrize("runtime", ["dequantize", "simulated", "integer", "auto"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_gradients_flow_whatever_a_layer_was_used_for_before(kind: str, runtime: str) -> None:
    """Through the rounding as if it was not there; what inference mode left behind must not be in the way."""
    layer = made(LAYERS[kind](), weight_bits=8)
    layer.buckets.select(500)
    layer.runtime = make_runtime(runtime, layer)
    x = inputs(layer)
    with torch.inference_mode():
        expected = layer(x)
    weight = layer.weight.clone().requires_grad_()
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = layer(a)
    assert torch.equal(y, expected)
    y.square().sum().backward()
    (layer.compute(b, weight) * 2 * y.detach()).sum().backward()
    assert a.grad is not None and torch.allclose(a.grad, b.grad, atol=1e-5) and a.grad.abs().max() > 0.1


@pytest.mark.parametrize("runtime", ["dequantize", "simulated", "integer"])
def test_what_is_kept_follows_the_stored_tensors(runtime: str) -> None:
    layer, other = made(conv()), made(conv(bias=False))
    other.weight_scale.mul_(2)
    for one in (layer, other):
        one.runtime = make_runtime(runtime, one)
        one.buckets.select(900)
    x = inputs(layer)
    before = layer(x)
    layer.weight_scale.mul_(2)
    doubled = layer(x)
    bias = layer.bias.view(-1, 1, 1)
    assert torch.allclose(doubled - bias, 2 * (before - bias), atol=1e-5)
    layer.load_state_dict(other.state_dict(), strict=False)
    with torch.no_grad():
        layer.bias.zero_()
    assert torch.equal(layer(x), other(x))


def test_another_type_leaves_the_grids_alone() -> None:
    layer = made(conv(), output_bits=8)
    stored = {name: t.clone() for name, t in layer.state_dict().items() if name != "bias"}
    layer.to(torch.bfloat16)
    assert layer.bias.dtype == layer.weight.dtype == torch.bfloat16
    assert all(
        layer.state_dict()[n].dtype == t.dtype and torch.equal(layer.state_dict()[n], t) for n, t in stored.items()
    )


def test_low_memory_unpacks_again_and_computes_the_same() -> None:
    layer = made(conv(), weight_bits=3)
    x = inputs(layer)
    kept = layer(x)
    assert layer._floats is not None
    layer.keep_floats, layer._floats = False, None
    assert torch.equal(layer(x), kept) and layer._floats is None


def test_state_copies_and_devices() -> None:
    layer = made(linear())
    assert set(layer.state_dict()) == {
        "bias", "weight_codes", "weight_scale", "weight_zero_point", "input_scale", "input_zero_point",
    }  # fmt: skip
    x = inputs(layer)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x)) and isinstance(layer, nn.Linear)
    assert layer.weight.shape == (10, 12) and layer.weight_codes.shape == (10, 6)


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


def test_compact_grids_without_grids_by_channel_are_refused() -> None:
    for bad in ({"activation_bits": 4}, {"per_channel": True}):
        with pytest.raises(ConfigurationError, match="compact_grids needs"):
            LayerSpec(weight_bits=4, compact_grids=True, **bad)  # type: ignore[arg-type]
        with pytest.raises(ConfigurationError, match="zero_margin needs"):
            LayerSpec(weight_bits=4, zero_margin=8, **bad)  # type: ignore[arg-type]
    for margin in (-1, 65, 1.0):
        with pytest.raises(ConfigurationError, match="zero_margin must be 0 to 64"):
            LayerSpec(weight_bits=4, activation_bits=4, per_channel=True, zero_margin=margin)  # type: ignore[arg-type]


def test_bits_out_of_range_are_refused() -> None:
    for bad in ({"weight_bits": 1}, {"weight_bits": 9}, {"weight_bits": 4, "activation_bits": 17}):
        with pytest.raises(ConfigurationError, match="must be"):
            LayerSpec(**bad)
