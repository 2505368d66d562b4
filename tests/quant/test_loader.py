"""Checkpoints: loaded and written by diffusers, bit for bit."""

from __future__ import annotations

import copy
import filecmp
import gc
import json
import pickle
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DModel
from quantized import TINY, draw, made
from safetensors.torch import load_file

from diffusion_accel.quant.layers import quantized_layers
from diffusion_accel.quant.model import RUNTIMES, set_runtime
from diffusion_accel.quant.ptq import assemble


@pytest.mark.parametrize("which", ["checkpoint", "compact"])
def test_loads_with_plain_from_pretrained_and_writes_the_same_bytes(
    which: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    checkpoint: Path = request.getfixturevalue(which)
    pipe = DiffusionPipeline.from_pretrained(checkpoint)
    assert len(quantized_layers(pipe.unet)) > 10
    pipe.save_pretrained(tmp_path / "again")
    name = "diffusion_pytorch_model.safetensors"
    assert filecmp.cmp(checkpoint / "unet" / name, tmp_path / "again" / "unet" / name, shallow=False)
    configs = [json.loads((p / "unet" / "config.json").read_text()) for p in (checkpoint, tmp_path / "again")]
    for config in configs:  # diffusers itself notes where a model was loaded from, whatever it is
        config.pop("_name_or_path", None)
    assert json.dumps(configs[0]) == json.dumps(configs[1])
    again = DiffusionPipeline.from_pretrained(tmp_path / "again")
    for one in (pipe, again):
        set_runtime(one, "simulated")
    assert torch.equal(draw(pipe), draw(again))


def test_compact_grids_and_those_of_older_checkpoints(
    compact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint without the option has float32 scales and a byte for each zero point, and loads as it did."""
    specs = assemble.layer_specs
    monkeypatch.setattr(
        assemble,
        "layer_specs",
        lambda *a: {n: replace(s, compact_grids=False, zero_margin=0) for n, s in specs(*a).items()},
    )
    older = made(tmp_path, replace(TINY, activation_bits=4))
    assert "zero_margin" not in (older / "unet" / "config.json").read_text()
    assert "compact_grids" not in (older / "unet" / "config.json").read_text()
    name = "mid_block.resnets.0.conv1"
    shapes = {}
    for folder in (older, compact):
        tensors = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
        found = [tensors[f"{name}.input_{k}"] for k in ("scale", "zero_point")]
        shapes[folder] = [(t.dtype, t.nbytes) for t in found]
        pipe = DiffusionPipeline.from_pretrained(folder)
        layer = quantized_layers(pipe.unet)[name]
        assert layer.spec.compact_grids == (folder == compact) and torch.equal(layer.input_scale, found[0])
        set_runtime(pipe, "simulated")
        assert torch.isfinite(draw(pipe)).all()
    count = 3 * layer.weight_shape[1]
    assert shapes[older] == [(torch.float32, 4 * count), (torch.uint8, count)]
    assert shapes[compact] == [(torch.float16, 2 * count), (torch.uint8, count * 5 // 8)]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("diffusers_first", [False, True])
def test_a_new_process_needs_one_import(checkpoint: Path, diffusers_first: bool) -> None:
    code = (
        "import sys, diffusion_accel\n"
        "assert 'torch' not in sys.modules and 'diffusers' not in sys.modules\n"
        "from diffusers import UNet2DModel\n"
        "model = UNet2DModel.from_pretrained(sys.argv[1])\n"
        "print(type(model.conv_in).__name__)"
    )
    if diffusers_first:
        code = "import diffusers, diffusers.quantizers.auto\n" + code.replace("assert", "assert True or")
    run = subprocess.run([sys.executable, "-c", code, str(checkpoint / "unet")], capture_output=True, text=True)
    assert run.stdout.strip() == "QuantizedConv2d", run.stderr


@pytest.mark.parametrize("which", ["checkpoint", "compact"])
def test_another_dtype_leaves_grids_alone(which: str, request: pytest.FixtureRequest) -> None:
    model = DiffusionPipeline.from_pretrained(request.getfixturevalue(which), dtype=torch.bfloat16).unet
    assert model.dtype == torch.bfloat16
    for layer in quantized_layers(model).values():
        stored = torch.float16 if layer.spec.compact_grids else torch.float32
        assert layer.weight_scale.dtype == torch.float32 and layer.input_scale.dtype == stored
    x = torch.randn(1, 3, 8, 8).bfloat16()
    for runtime in RUNTIMES:
        set_runtime(model, runtime)
        assert model(x, 10).sample.dtype == torch.bfloat16


def test_a_model_that_nobody_needs_is_freed_at_once(checkpoint: Path) -> None:
    model = UNet2DModel.from_pretrained(checkpoint / "unet")
    sample = torch.randn(1, 3, 8, 8)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    expected = model(sample, 750).sample
    for twin in twins:
        assert twin.forward.module is twin and torch.equal(twin(sample, 750).sample, expected)
    left = [weakref.ref(one) for one in (model, *twins)]
    gc.collect()
    gc.disable()
    try:
        del model, twin, twins
        assert [reference() for reference in left] == [None] * 3
    finally:
        gc.enable()


def test_what_was_changed_on_purpose_is_saved_whole(checkpoint: Path, tmp_path: Path) -> None:
    """Biases, norms and types belong to the user; the digest is of what is saved, also by a copy."""
    model = UNet2DModel.from_pretrained(checkpoint / "unet", torch_dtype=torch.bfloat16)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.conv_out.bias.add_(1)
    for number, one in enumerate((model, twin)):
        one.save_pretrained(tmp_path / str(number))
        again = UNet2DModel.from_pretrained(tmp_path / str(number), torch_dtype=torch.bfloat16)
        assert all(torch.equal(v, again.state_dict()[k]) for k, v in one.state_dict().items())
    assert not torch.equal(model.conv_out.bias, again.conv_out.bias)


def test_no_pickle_is_written(checkpoint: Path) -> None:
    assert {f.suffix for f in checkpoint.rglob("*") if f.is_file()} <= {".json", ".safetensors"}
