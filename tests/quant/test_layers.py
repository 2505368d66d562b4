"""Quantized layers: what they compute, for which timestep."""

from __future__ import annotations

import copy

import pytest
import torch
import zoo
from quantized_layers import LAYERS, TIMES, conv, inputs, linear, made, on_grid
from torch import nn

from diffusion_accel import PatchParallel, UnsupportedPipelineError, accelerate
from diffusion_accel.quant.affine import fake_quantize
from diffusion_accel.quant.kernels import IntMatmul, make_runtime
from diffusion_accel.quant.layers import Buckets


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


def test_inputs_are_called_as_in_torch() -> None:
    """AnimateDiff's motion modules give theirs by name."""
    layer = made(LAYERS["linear"]())
    x = inputs(layer)
    assert torch.equal(layer(input=x), layer(x))


@pytest.mark.parametrize("runtime", ["simulated", "dequantize"])
def test_patch_parallelism_needs_grids_that_do_not_hang_on_the_whole_image(runtime: str) -> None:
    pipe, call = zoo.sd()
    dynamic = {"activation_bits": 8, "dynamic": True}
    pipe.unet.conv_out = layer = made(pipe.unet.conv_out, weight_bits=8, **dynamic)
    layer.runtime = make_runtime(runtime, layer)
    whole = layer.reads_whole_input
    assert whole == (runtime == "simulated")
    # a part of the image has another grid where one is found at all
    x = torch.cat([torch.ones(1, 16, 2, 8), torch.full((1, 16, 6, 8), 0.013)], 2)
    assert torch.equal(layer(x)[..., 4:, :], layer(x[..., 2:, :])[..., 2:, :]) != whole
    if whole:
        with pytest.raises(UnsupportedPipelineError, match="grid of their input over the whole image"):
            accelerate(pipe, PatchParallel())
        assert not hasattr(pipe, "acceleration")
    else:
        zoo.run(accelerate(pipe, PatchParallel()), call, 2)


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


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_the_class_of_a_quantized_layer_makes_plain_ones(kind: str) -> None:
    """peft builds the two layers of a LoRA with the class of the layer that it stands beside."""
    layer = made(LAYERS[kind]())
    twin = type(layer)(3, 5, **({"kernel_size": 1} if kind == "conv" else {}), bias=False)
    assert type(twin) is {"linear": nn.Linear, "conv": nn.Conv2d}[kind]
    assert isinstance(twin.weight, nn.Parameter) and twin.bias is None


@pytest.mark.parametrize("runtime", ["dequantize", "simulated", "integer", "bfloat16", "auto"])
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
    assert layer._kept.floats is not None
    layer.keep_floats = False
    layer.forget()
    assert torch.equal(layer(x), kept) and layer._kept.floats is None


def test_state_copies_and_devices() -> None:
    layer = made(linear())
    assert set(layer.state_dict()) == {
        "bias", "weight_codes", "weight_scale", "weight_zero_point", "input_scale", "input_zero_point",
    }  # fmt: skip
    x = inputs(layer)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x)) and isinstance(layer, nn.Linear)
    assert layer.weight.shape == (10, 12) and layer.weight_codes.shape == (10, 6)
