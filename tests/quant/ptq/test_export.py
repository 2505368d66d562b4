"""`diffusion_accel.quantize`: from a pipeline to a folder, or to the same pipeline quantized, with one report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from diffusers import DiffusionPipeline

import diffusion_accel
from diffusion_accel.errors import ConfigurationError, OutputError
from diffusion_accel.quant import QuantizationReport
from diffusion_accel.quant.layers import quantized_layers
from diffusion_accel.quant.ptq.settings import FinetuneSettings, QuantizeSettings, settings_of

QUICK: dict[str, Any] = {"buckets": 2, "rounding": None, "finetune": None, "steps": 3, "batch": 4}


def pipeline() -> Any:
    pipe, _ = zoo.unet2d()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_folder_is_written_and_the_pipeline_stays(tmp_path: Path) -> None:
    pipe, told = pipeline(), list[str]()
    before = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    report = diffusion_accel.quantize(
        pipe,
        [""] * 4,
        bits="w4a8",
        output=tmp_path / "w4a8",
        images=1,
        progress=lambda what, *_: told.append(what),
        **QUICK,
    )
    assert isinstance(report, QuantizationReport) and report.name == "w4a8" and len(report.psnr) == 1
    assert set(report.ratio) == {"integer", "bfloat16", "dequantize", "simulated", "auto"}
    assert report.prompts == (4, 4) and "writing" in told and "measuring" in told
    assert sorted(p.name for p in tmp_path.iterdir()) == ["w4a8"]  # nothing is left beside it
    assert (tmp_path / "w4a8" / "report.html").is_file() and not quantized_layers(pipe.unet)
    assert all(torch.equal(v, before[k]) for k, v in pipe.unet.state_dict().items())
    assert len(quantized_layers(DiffusionPipeline.from_pretrained(tmp_path / "w4a8").unet)) > 10
    with pytest.raises(OutputError, match="exists; choose another name"):
        diffusion_accel.quantize(pipe, [""] * 4, output=tmp_path / "w4a8", **QUICK)


def test_without_an_output_the_pipeline_itself_is_quantized() -> None:
    pipe = pipeline()
    report = diffusion_accel.quantize(pipe, [""] * 4, bits="w4", **QUICK)
    layers = quantized_layers(pipe.unet)
    assert {layer.spec.activation_bits for layer in layers.values()} == {None} and report.layers.keys() == layers.keys()
    assert report.steps and not report.psnr and report.text().startswith("in place: w4, ")
    assert report.bytes["checkpoint"] < 0.5 * report.bytes["float32"]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"bit": "w4a8"}, r"quantize\(\): unknown argument bit; did you mean bits"),
        ({"bits_buget": 4}, "did you mean bits_budget"),
        ({"weight_bits": 4}, "unknown argument weight_bits"),
        ({"bits": "int8"}, "^bits must look like w8a8"),
        ({"bits_budget": 1.0}, "^bits_budget must be between 2 and 8"),
        ({"minutes": 0}, "minutes must be a number above 0, got 0"),
        ({"steps": 0}, "steps must be a whole number"),
        ({"guidance_scale": 3.0}, "DDPMPipeline does not take guidance_scale"),
        ({"seed": -1}, "seed must be a whole number"),
        ({"batch": 0}, "batch must be a whole number"),
        ({"prompts": ["x"]}, "prompts must be at least 2"),
    ],
)
def test_what_is_not_allowed_is_refused_by_name(tmp_path: Path, given: dict[str, Any], says: str) -> None:
    values = {"prompts": [""] * 4, "output": tmp_path / "new", **given}
    with pytest.raises(ConfigurationError, match=says):
        diffusion_accel.quantize(pipeline(), **values)
    assert not list(tmp_path.iterdir())


def test_settings_with_single_fields_changed() -> None:
    base = QuantizeSettings(weight_bits=3, seed=5)
    assert settings_of(settings=base) == base and settings_of("w4a4", base).seed == 5
    assert settings_of("w4", base, 7, layers="all") == QuantizeSettings(4, None, layers="all", seed=7)


def test_weights_alone_are_finetuned() -> None:
    """Without inputs to round there are no grids that learn."""
    quick = QUICK | {"finetune": FinetuneSettings(time_epochs=(1, 1, 1), epochs=1, rows=4)}
    report = diffusion_accel.quantize(pipeline(), [""] * 4, bits="w4", **quick)
    assert {"nearest, weights only", "finetuned"} == report.validation.keys()
