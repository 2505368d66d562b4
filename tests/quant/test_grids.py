"""Weights with a grid for each group, and inputs whose grids are found at every call."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from quantized import TINY, draw
from quantized import made as made_folder
from quantized_layers import LAYERS, conv, linear, trainable_layer
from torch import nn

from diffusion_accel.errors import ConfigurationError
from diffusion_accel.quant.affine import fake_quantize, grid
from diffusion_accel.quant.kernels import IntMatmul, OneDnn, make_runtime, why_not_integer
from diffusion_accel.quant.layers import QuantizedLayer, Simulated
from diffusion_accel.quant.model import quantized_layers
from diffusion_accel.quant.ptq.settings import QuantizeSettings
from diffusion_accel.quant.spec import LayerSpec


def made(layer: nn.Module, **spec: Any) -> QuantizedLayer:
    trainable = trainable_layer(layer, **spec)
    return trainable.finished(trainable.buckets)


def some_inputs(layer: Any, count: int = 3) -> torch.Tensor:
    """Rows and images of very different size, also with one sign only."""
    shape = (count, 12, 7, 6) if isinstance(layer, nn.Conv2d) else (count, 5, 12)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    x[1] *= 30
    x[2] = x[2].abs() + 1
    return x


def rounded_by_hand(x: torch.Tensor, dims: tuple[int, ...], bits: int) -> torch.Tensor:
    low, high = x.amin(dims, keepdim=True).clamp(max=0), x.amax(dims, keepdim=True).clamp(min=0)
    scale = (high - low) / (2**bits - 1)
    zero = (-low / scale).round()
    return (((x / scale).round() + zero).clamp(0, 2**bits - 1) - zero) * scale


# ---------------------------------------------------------------------- inputs
@pytest.mark.parametrize("split", [0, 4])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_dynamic_inputs_have_a_grid_for_each_row_or_image(kind: str, split: int) -> None:
    layer = made(LAYERS[kind](), dynamic=True, split=split)
    x = some_inputs(layer)
    dim, dims = (1, (1, 2, 3)) if kind == "conv" else (-1, (-1,))
    parts = x.split([4, 8] if split else [12], dim)
    expected = torch.cat([rounded_by_hand(part, dims, 8) for part in parts], dim)
    assert torch.allclose(layer.round_input(x), expected, atol=1e-6)
    assert not [name for name, _ in layer.named_buffers() if name.startswith("input_")]


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_groups_of_a_dynamic_input_are_of_one_position(kind: str) -> None:
    plain = nn.Linear(32, 4) if kind == "linear" else nn.Conv2d(32, 4, 3, padding=1)
    layer = made(plain, dynamic=True, input_group=16, activation_bits=4)
    x = torch.randn(2, 32, 5, 3) if kind == "conv" else torch.randn(2, 5, 32)
    last = x.movedim(1, -1) if kind == "conv" else x
    expected = torch.cat([rounded_by_hand(part, (-1,), 4) for part in last.split(16, -1)], -1)
    expected = expected.movedim(-1, 1) if kind == "conv" else expected
    assert torch.allclose(layer.round_input(x), expected, atol=1e-6)
    assert "each group" in (why_not_integer(layer) or "")


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("weight_bits", [4, 8])
@pytest.mark.parametrize("split", [0, 5])
def test_integers_compute_what_the_simulation_computes(kind: str, weight_bits: int, split: int) -> None:
    layer = made(LAYERS[kind](), weight_bits=weight_bits, split=split, dynamic=True)
    x = layer.round_input(some_inputs(layer))  # on the grid no code depends on how a tie is rounded
    expected = Simulated()(layer, x)
    each = expected.abs().flatten(1).amax(1).view(-1, *[1] * (expected.dim() - 1))
    for way in (OneDnn(), IntMatmul()):
        for _ in range(2):
            assert ((way(layer, x) - expected).abs() / each).max() < 3e-5, type(way).__name__


def test_an_image_is_the_same_beside_others() -> None:
    for kind in ("linear", "conv"):
        layer = made(LAYERS[kind](), dynamic=True)
        x = some_inputs(layer)
        for runtime in ("simulated", "integer"):
            layer.runtime = make_runtime(runtime, layer)
            together = layer(x)
            for i in range(len(x)):
                assert torch.allclose(layer(x[i : i + 1]), together[i : i + 1], rtol=1e-5, atol=1e-5)


def test_gradients_pass_the_rounding_of_dynamic_inputs() -> None:
    layer = trainable_layer(linear(), dynamic=True)
    layer.plain, layer.round_inputs = False, True
    x = some_inputs(linear()).requires_grad_()
    layer(x).sum().backward()
    assert torch.allclose(x.grad, layer.weight.sum(0).expand_as(x))  # type: ignore[arg-type]


# ---------------------------------------------------------------------- weights
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(("bits", "group"), [(4, 16), (3, 32), (8, 64)])
def test_every_group_has_its_own_grid(kind: str, bits: int, group: int) -> None:
    plain = LAYERS[kind]()
    weight = plain.weight.detach()
    weight.view(len(weight), -1)[:, :5] *= 20  # in a group of their own
    layer = made(plain, weight_bits=bits, weight_group=group)
    rows = layer.floats().flatten(1)
    for begin in range(0, rows.shape[1], group):
        part = rows[:, begin : begin + group]
        assert all(len(row.unique()) <= 2**bits for row in part)
        step = layer.weight_scale[begin // group].float()[:, None]
        inside = (part - weight.flatten(1)[:, begin : begin + group]).abs() <= 0.51 * step
        assert inside.float().mean() > 0.7  # range search may cut off some
    whole = made(plain, weight_bits=bits).floats().flatten(1)
    assert (rows - weight.flatten(1)).square().sum() < (whole - weight.flatten(1)).square().sum()


def test_a_group_as_large_as_the_row_is_the_row() -> None:
    plain = linear()
    rows, group = made(plain), made(plain, weight_group=16)
    assert group.weight_scale.shape == (1, 10) and torch.equal(group.codes(), rows.codes())
    assert torch.allclose(group.floats(), rows.floats(), rtol=1e-3)  # float16 scales


def test_what_is_learnt_is_what_is_stored() -> None:
    trainable = trainable_layer(conv(), weight_group=16, weight_bits=3)
    logits = trainable.start_rounding()
    logits.data = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    trainable.end_rounding()
    assert torch.allclose(trainable.finished(trainable.buckets).floats(), trainable.rounded(), atol=1e-6)


# ---------------------------------------------------------------------- checkpoints
@pytest.mark.parametrize("inputs", ["static", "dynamic"])
def test_a_checkpoint_is_loaded_as_it_was_saved(inputs: str, tmp_path: Path) -> None:
    from dataclasses import replace

    folder = made_folder(tmp_path, replace(TINY, groups=(16,), inputs=inputs))
    pipe = DiffusionPipeline.from_pretrained(folder)
    layers = quantized_layers(pipe.unet)
    assert {layer.spec.weight_group for layer in layers.values()} == {16}
    assert {layer.spec.dynamic for layer in layers.values()} == {inputs == "dynamic"}
    again = tmp_path / "again"
    pipe.save_pretrained(again)
    name = "unet/diffusion_pytorch_model.safetensors"
    assert (again / name).read_bytes() == (folder / name).read_bytes()
    assert torch.equal(draw(pipe), draw(DiffusionPipeline.from_pretrained(again)))


def test_zero_is_exact_in_every_grid() -> None:
    for low, high in ((-1.0, 3.0), (0.5, 3.0), (-3.0, -0.5)):
        scale, zero = grid(torch.tensor(low), torch.tensor(high), 8)
        assert float(fake_quantize(torch.zeros(()), scale, zero, 8)) == 0.0


# ---------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"weight_group": 48}, "weight_group must be one of 0, 16, 32, 64, 128, 256, got 48"),
        ({"input_group": 32}, "input_group needs dynamic"),
        ({"dynamic": True}, "dynamic needs activation_bits"),
        ({"dynamic": True, "activation_bits": 4, "per_channel": True}, "excludes per_channel"),
        ({"dynamic": 1}, "must be true or false"),
    ],
)
def test_layers_that_make_no_sense_are_refused(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        LayerSpec(4, **values)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"groups": (32, 64)}, "need a bits_budget"),
        ({"groups": ()}, "must be a tuple of sizes"),
        ({"groups": (48,)}, "groups must be one of"),
        ({"inputs": "sometimes"}, "inputs must be one of static, dynamic"),
        ({"inputs": "dynamic", "activation_bits": None}, "need activation_bits"),
        ({"input_group": 32}, "needs dynamic inputs"),
    ],
)
def test_settings_that_make_no_sense_are_refused(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        QuantizeSettings(**values)


def test_few_bits_of_dynamic_inputs_are_in_groups() -> None:
    assert QuantizeSettings(inputs="dynamic", activation_bits=4).input_groups == 32
    assert QuantizeSettings(inputs="dynamic", activation_bits=4, input_group=0).input_groups == 0
    assert QuantizeSettings(inputs="dynamic").input_groups == QuantizeSettings().input_groups == 0


def test_a_copy_computes_the_same() -> None:
    layer = made(linear(), dynamic=True, weight_group=16)
    x = some_inputs(layer)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
