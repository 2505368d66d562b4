"""Layers with a branch of low rank beside their codes."""

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
from quantized_layers import LAYERS, inputs, made, trainable_layer
from torch import nn

from diffusion_accel.errors import ModelLoadError
from diffusion_accel.quant.buckets import Buckets
from diffusion_accel.quant.kernels import IntMatmul, OneDnn, make_runtime
from diffusion_accel.quant.layers import Dequantize, Simulated, quantized_like
from diffusion_accel.quant.low_rank import largest, low_rank, rank_within
from diffusion_accel.quant.model import install, quantized_layers, set_runtime
from diffusion_accel.quant.ptq.run import quantize_denoiser
from diffusion_accel.quant.ptq.settings import QuantizeSettings
from diffusion_accel.quant.spec import LayerSpec, ModelSpec
from diffusion_accel.quant.without_data import quantize_files

BRANCH = replace(TINY, rank=2, groups=(16,), inputs="dynamic", activation_bits=4, attention_bits=None)


def config_of(folder: Path) -> Any:
    return json.loads((folder / "unet" / "config.json").read_text())["quantization_config"]


# ---------------------------------------------------------------------- finding it
def test_the_part_with_the_largest_singular_values_is_that_of_numpy() -> None:
    weight = torch.randn(20, 6, 3, 3, generator=torch.Generator().manual_seed(0))
    u, s, v = torch.linalg.svd(weight.flatten(1).double())
    expected = (u[:, :3] * s[:3]) @ v[:3]
    found = largest(weight, 3).flatten(1).double()
    assert (found - expected).norm() < 0.02 * expected.norm()
    before = torch.get_rng_state()
    assert torch.equal(largest(weight, 3), largest(weight, 3)) and torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("spec", [LayerSpec(4, 16), LayerSpec(3), LayerSpec(4, split=8)])
def test_a_branch_brings_the_weights_nearer(spec: LayerSpec) -> None:
    generator = torch.Generator().manual_seed(0)
    outliers = torch.randn(24, 1, generator=generator) @ torch.randn(1, 32, generator=generator)
    layer = nn.Linear(32, 24)
    layer.weight.data = 0.1 * torch.randn(24, 32, generator=generator) + outliers
    errors = []
    for rank in (0, 1, 4):
        one = made(layer, **{**spec.to_dict(), "rank": rank})
        errors.append(float((one.floats() - layer.weight.detach()).norm()))
    assert errors[0] > 1.3 * errors[1] > 1.3 * errors[2]
    left, right = low_rank(layer.weight, replace(spec, rank=4))
    assert torch.equal(left, left.half().float()) and torch.equal(right, right.half().float())


def test_ranks_that_a_layer_cannot_have() -> None:
    assert rank_within(8, torch.Size((64, 32))) == 8 and rank_within(8, torch.Size((6, 4, 3, 3))) == 3
    assert rank_within(8, torch.Size((1, 4))) == 0


# ---------------------------------------------------------------------- computing
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("bits", [None, 4, 8])
def test_all_runtimes_compute_codes_and_branch(kind: str, bits: int | None) -> None:
    plain = LAYERS[kind]()
    layer = made(plain, rank=3, activation_bits=bits, dynamic=bits is not None)
    x = inputs(plain)
    branch = layer.weight_left.float() @ layer.weight_right.float()
    codes = layer.floats(inner=True)
    assert torch.allclose(layer.floats(), codes + branch.view_as(codes), atol=1e-6)
    assert torch.allclose(Dequantize()(layer, x), layer.compute(x, codes + branch.view_as(codes)), atol=1e-5)
    rounded = layer.compute(layer.round_input(x), codes) + layer.compute(x, branch.view_as(codes))
    expected = rounded if plain.bias is None else rounded - layer.compute(torch.zeros_like(x), codes)
    assert torch.allclose(Simulated()(layer, x), expected, atol=1e-5)
    for way in (OneDnn(), IntMatmul()) if bits else ():
        assert torch.allclose(way(layer, x) + layer.branch(x), expected, atol=1e-4)
        assert torch.allclose(make_runtime("integer", layer)(layer, x), expected, atol=1e-4)


def test_what_is_learnt_is_what_is_stored() -> None:
    for kind in LAYERS:
        plain = LAYERS[kind]()
        trainable = trainable_layer(plain, rank=2, dynamic=True, activation_bits=4)
        trainable.plain, trainable.round_weights, trainable.round_inputs = False, True, True
        layer = trainable.finished(trainable.buckets)
        x = inputs(plain)
        assert torch.allclose(trainable(x), Simulated()(layer, x), atol=1e-5)
        trainable.round_inputs = False
        assert torch.allclose(trainable(x), Dequantize()(layer, x), atol=1e-5)
        trainable.round_weights, trainable.round_inputs = False, True  # codes as numbers, the branch apart
        y = trainable._compute(layer.round_input(x), trainable.weight - trainable.low, trainable.bias)
        assert torch.allclose(trainable(x), y + trainable._compute(x, trainable.low, None), atol=1e-5)


# ---------------------------------------------------------------------- checkpoints
def test_a_round_trip_is_exact(tmp_path: Path) -> None:
    folder = made_folder(tmp_path, BRANCH)
    config = config_of(folder)
    assert config["version"] == 4 and config["layers"]["mid_block.resnets.0.conv1"]["rank"] == 2
    assert "rank" not in config["layers"]["conv_in"]
    pipe = DiffusionPipeline.from_pretrained(folder)
    set_runtime(pipe, "simulated")
    image = draw(pipe)
    pipe.save_pretrained(tmp_path / "again")
    twin = DiffusionPipeline.from_pretrained(tmp_path / "again")
    set_runtime(twin, "simulated")
    assert torch.equal(draw(twin), image)
    name = "unet/diffusion_pytorch_model.safetensors"
    assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    half = DiffusionPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    layers = quantized_layers(half.unet)
    assert layers["mid_block.resnets.0.conv1"].weight_left.dtype == torch.float16


def test_without_branches_checkpoints_have_the_version_that_they_had(checkpoint: Path) -> None:
    assert config_of(checkpoint)["version"] == 3
    assert not any("rank" in layer for layer in config_of(checkpoint)["layers"].values())


def test_a_branch_where_there_can_be_none_is_refused() -> None:
    model = nn.Sequential(nn.Embedding(10, 4))
    with pytest.raises(ModelLoadError, match="not a quantizable layer"):
        install(model, ModelSpec({"0": LayerSpec(8, rank=2)}))
    layer = quantized_like(nn.Linear(4, 4), LayerSpec(4, rank=2), Buckets(()))
    assert layer.weight_left.shape == (4, 2) and layer.weight_right.shape == (2, 4)


# ---------------------------------------------------------------------- making it
@pytest.mark.slow
def test_rounding_and_finetuning_learn_around_a_branch(tmp_path: Path) -> None:
    asked = replace(SHORT, rank=2, activation_bits=4)
    run = quantize_denoiser(sampler(), asked, tmp_path)
    assert run.validation["finetuned"] < run.validation["quantized"]
    plain = quantize_denoiser(sampler(), replace(asked, rank=0, rounding=None, finetune=None), tmp_path / "plain")
    branch = quantize_denoiser(sampler(), replace(asked, rounding=None, finetune=None), tmp_path / "branch")
    assert branch.validation["quantized"] < plain.validation["quantized"]


def test_without_data(tmp_path: Path) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "plain")
    kept = []
    for rank in (0, 4):
        report = quantize_files(tmp_path / "plain", tmp_path / f"{rank}", weight_bits=4, group=32, rank=rank)
        kept.append(min(report.sqnr[n] for n in report.sqnr if not n.startswith("conv_")))
    assert kept[1] > kept[0] + 1
    layers = quantized_layers(DiffusionPipeline.from_pretrained(tmp_path / "4").unet)
    weight = tiny_pipeline().unet.mid_block.resnets[0].conv1.weight
    left, right = low_rank(weight, layers["mid_block.resnets.0.conv1"].spec)
    assert torch.equal(layers["mid_block.resnets.0.conv1"].weight_left.float(), left)
    assert torch.equal(layers["mid_block.resnets.0.conv1"].weight_right.float(), right)


def test_a_budget_of_bits_counts_branches(tmp_path: Path) -> None:
    run = quantize_denoiser(sampler(), replace(BRANCH, groups=(0, 16), bits_budget=6.0, split=False), tmp_path)
    layers = run.layers().values()
    names = ("weight_codes", "weight_scale", "weight_zero_point", "weight_left", "weight_right")
    stored = [getattr(layer, name) for layer in layers for name in names if hasattr(layer, name)]
    bits = 8 * sum(t.numel() * t.element_size() for t in stored)
    assert bits <= 6.0 * sum(layer.weight_shape.numel() for layer in layers)


def test_the_name_says_it() -> None:
    assert QuantizeSettings(weight_bits=4, activation_bits=4, rank=16).name == "w4a4 rank 16"
