"""Inputs that are rotated before they are rounded, and the weights that undo it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from quantized import SHORT, TINY, draw, sampler, tiny_pipeline
from quantized import made as made_folder
from quantized_layers import LAYERS, inputs, trainable_layer
from scipy.linalg import hadamard
from torch import nn

from diffusion_accel.errors import ConfigurationError, ModelLoadError
from diffusion_accel.quant.affine import dynamic_grid, fake_quantize
from diffusion_accel.quant.buckets import Buckets
from diffusion_accel.quant.kernels import make_runtime
from diffusion_accel.quant.layers import Dequantize, Simulated
from diffusion_accel.quant.model import install, quantized_layers, set_runtime
from diffusion_accel.quant.ptq.bits import rotation_within
from diffusion_accel.quant.ptq.budget import PROBE_ROWS
from diffusion_accel.quant.ptq.calibration import relative_error
from diffusion_accel.quant.ptq.run import quantize_denoiser
from diffusion_accel.quant.ptq.settings import QuantizeSettings
from diffusion_accel.quant.ptq.trainable_layer import TrainableLayer
from diffusion_accel.quant.rotation import rotated
from diffusion_accel.quant.spec import LayerSpec, ModelSpec
from diffusion_accel.quant.without_data import quantize_files

ROTATED = replace(TINY, rotate=True, inputs="dynamic", activation_bits=4, attention_bits=None)


# ---------------------------------------------------------------------- arithmetic
def test_the_rotation_is_by_hadamards_matrix_and_its_own_inverse() -> None:
    x = torch.randn(3, 24, generator=torch.Generator().manual_seed(0))
    matrix = torch.from_numpy(hadamard(8)).float() / 8**0.5
    expected = torch.cat([part @ matrix for part in x.split(8, 1)], 1)
    assert torch.allclose(rotated(x, 1, 8), expected, atol=1e-6)
    assert torch.allclose(rotated(rotated(x, 1, 8), 1, 8), x, atol=1e-6)
    assert rotated(x, 1, 0) is x


@pytest.mark.parametrize("kind", LAYERS)
def test_what_is_done_to_inputs_is_undone_in_weights(kind: str) -> None:
    layer: Any = LAYERS[kind]()
    x, dim = inputs(layer), 1 if isinstance(layer, nn.Conv2d) else -1
    weight = layer.weight.detach()
    inner = rotated(weight, 1, 4)
    run = layer._conv_forward if isinstance(layer, nn.Conv2d) else nn.functional.linear
    assert torch.allclose(run(rotated(x, dim, 4), inner, layer.bias), layer(x), atol=1e-5)
    assert torch.allclose(rotated(inner, 1, 4), weight, atol=1e-6)


@pytest.mark.parametrize(("sizes", "block"), [([192], 32), ([12], 4), ([64, 24], 8), ([3], 0), ([320, 1], 0)])
def test_a_rotation_divides_the_channels(sizes: list[int], block: int) -> None:
    assert rotation_within(sizes) == block


# ---------------------------------------------------------------------- layers
def layer_of(kind: str, **spec: Any) -> TrainableLayer:
    values = {"weight_bits": 8, "rotate": 4, "dynamic": True, "activation_bits": 8, **spec}
    return TrainableLayer(LAYERS[kind](), LayerSpec(**values), Buckets(()))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("rank", [0, 2])
def test_all_runtimes_compute_the_same_layer(kind: str, rank: int) -> None:
    trainable = layer_of(kind, rank=rank)
    layer = trainable.finished(trainable.buckets)
    plain, x = LAYERS[kind](), inputs(LAYERS[kind]())
    assert (layer.floats() - plain.weight.detach()).norm() < 0.05 * plain.weight.detach().norm()
    assert torch.allclose(Dequantize()(layer, x), layer.compute(x, layer.floats()), atol=1e-5)
    inner = rotated(x, layer.channel_dim, 4)
    rounded = fake_quantize(inner, *dynamic_grid(inner, layer.spec, layer.channel_dim), 8)
    outer = rotated(rounded, layer.channel_dim, 4)
    codes = rotated(layer.floats(inner=True), 1, 4)
    expected = layer.compute(outer, codes)
    if rank:
        branch = (layer.weight_left.float() @ layer.weight_right.float()).view_as(codes)
        assert torch.allclose(layer.floats(), codes + branch, atol=1e-5)
        expected = expected + layer.compute(x, branch) - layer.compute(torch.zeros_like(x), branch)
    assert torch.allclose(Simulated()(layer, x), expected, atol=1e-4)
    assert torch.allclose(make_runtime("integer", layer)(layer, x), expected, atol=1e-4)
    trainable.plain, trainable.round_weights, trainable.round_inputs = False, True, True
    assert torch.allclose(trainable(x), expected, atol=1e-4)
    trainable.round_inputs = False
    assert torch.allclose(trainable(x), Dequantize()(layer, x), atol=1e-5)


def test_outliers_cost_less() -> None:
    """One channel of inputs is far larger than the others: the rotation spreads it."""
    torch.manual_seed(0)
    layer, x = nn.Linear(32, 10), torch.randn(200, 32)
    x[..., 3] *= 40
    errors = []
    for block in (0, 32):
        values = LayerSpec(8, activation_bits=4, dynamic=True, rotate=block)
        made = TrainableLayer(layer, values, Buckets(()))
        errors.append(float((Simulated()(made.finished(made.buckets), x) - layer(x)).detach().norm()))
    assert errors[1] < 0.7 * errors[0]


# ---------------------------------------------------------------------- checkpoints
def test_a_round_trip_is_exact(tmp_path: Path) -> None:
    folder = made_folder(tmp_path, ROTATED)
    config = json.loads((folder / "unet" / "config.json").read_text())["quantization_config"]
    inner = config["layers"]["mid_block.resnets.0.conv1"]
    assert config["version"] == 4 and inner["rotate"] in (8, 16, 32)
    assert "rotate" not in config["layers"]["conv_in"]
    pipe = DiffusionPipeline.from_pretrained(folder)
    set_runtime(pipe, "simulated")
    image = draw(pipe)
    assert torch.equal(draw(pipe), image)
    pipe.save_pretrained(tmp_path / "again")
    twin = DiffusionPipeline.from_pretrained(tmp_path / "again")
    set_runtime(twin, "simulated")
    assert torch.equal(draw(twin), image)
    name = "unet/diffusion_pytorch_model.safetensors"
    assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_what_a_model_cannot_have_is_refused() -> None:
    with pytest.raises(ModelLoadError, match="channels of 0 cannot be rotated by 8"):
        install(nn.Sequential(nn.Linear(12, 4)), ModelSpec({"0": LayerSpec(4, rotate=8)}))
    with pytest.raises(ConfigurationError, match="rotate must be one of 0, 2, 4"):
        LayerSpec(4, rotate=3)
    with pytest.raises(ConfigurationError, match="rotate must be true or false"):
        QuantizeSettings(rotate=1)  # type: ignore[arg-type]


# ---------------------------------------------------------------------- making it
@pytest.mark.slow
def test_rounding_and_finetuning_learn_with_rotations(tmp_path: Path) -> None:
    run = quantize_denoiser(sampler(), replace(SHORT, rotate=True, rank=1), tmp_path)
    assert run.validation["learnt rounding, weights only"] <= run.validation["nearest, weights only"]
    count = len(run.heldout.timesteps)
    rows = [run.heldout.sample(b, PROBE_ROWS, 0) for b in range(count)]
    assert run.validation["finetuned"] != run.validation["quantized"]  # few steps: not further, but somewhere else
    assert relative_error(run.model, rows) == pytest.approx(run.validation["finetuned"], rel=1e-3)
    assert all(layer.spec.has_inner_weights for n, layer in run.layers().items() if n not in ("conv_in", "conv_out"))


def test_ranges_are_those_of_rotated_inputs() -> None:
    trainable = trainable_layer(LAYERS["linear"](), rotate=4)
    x = inputs(LAYERS["linear"]())
    assert torch.equal(trainable.to_inner(x), rotated(x, -1, 4))


def test_without_data(tmp_path: Path) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "plain")
    quantize_files(tmp_path / "plain", tmp_path / "made", weight_bits=8, rotate=True, rank=2)
    made = DiffusionPipeline.from_pretrained(tmp_path / "made").unet
    for name, layer in quantized_layers(made).items():
        weight = tiny_pipeline().unet.get_submodule(name).weight
        assert (layer.floats() - weight).norm() < 0.02 * weight.norm(), name
        assert (layer.spec.rotate > 0) == (name not in ("conv_in", "conv_out")), name


def test_a_graph_computes_the_same() -> None:
    trainable = layer_of("linear", rank=2)
    layer = trainable.finished(trainable.buckets)
    x = inputs(LAYERS["linear"]())
    torch.compiler.reset()
    for runtime in (Simulated(), Dequantize()):
        layer.runtime = runtime
        assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))
