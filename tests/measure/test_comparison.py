"""The comparison and its image."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from zoo import sd

from diffusion_accel import ConfigurationError, EncoderReuse, accelerate
from diffusion_accel.measure.comparison import compare_calls
from diffusion_accel.measure.fidelity import as_tensor
from diffusion_accel.measure.grids import difference, grid


def drawing(pipe: Any, call: dict[str, Any]) -> Any:
    pipe.set_progress_bar_config(disable=True)

    def draw(pipe: Any) -> list[Image.Image]:
        generator = torch.Generator().manual_seed(0)
        return pipe(**{**call, "output_type": "pil"}, num_inference_steps=6, generator=generator).images

    return draw


def test_numbers_and_restored_switches() -> None:
    pipe, call = sd()
    accelerate(pipe, EncoderReuse(schedule=(0, 3), batch_decoder=False))
    result = compare_calls(pipe, drawing(pipe, call), rounds=2)
    assert 1.05 < result.flop_ratio < 2 and result.time_ratio > 0
    assert len(result.psnr) == len(result.ssim) == 1 and result.psnr[0] < 80
    assert result.report.counters["encoder_reuse"]["encoder_runs"] == 2 and result.report.flops is None
    assert pipe.acceleration.enabled("encoder_reuse") and not pipe.acceleration.count_flops
    known = compare_calls(pipe, drawing(pipe, call), flop_ratio=1.25)
    assert known.flop_ratio == 1.25 and known.psnr == result.psnr


def test_images_are_those_of_calls_that_are_not_counted() -> None:
    """While operations are counted, torch computes what an engine computes otherwise."""
    pipe, call = sd()
    accelerate(pipe, EncoderReuse(schedule=(0, 3)))
    draw = drawing(pipe, call)

    def counted_otherwise(current: Any) -> list[Image.Image]:
        images: list[Image.Image] = draw(current)
        return [Image.new("RGB", image.size) for image in images] if current.acceleration.count_flops else images

    found, wanted = compare_calls(pipe, counted_otherwise), compare_calls(pipe, draw)
    assert found.psnr == wanted.psnr and found.accelerated == wanted.accelerated and found.baseline == wanted.baseline


def test_the_neutral_setting_is_a_perfect_match() -> None:
    pipe, call = sd()
    accelerate(pipe, EncoderReuse.neutral())
    result = compare_calls(pipe, drawing(pipe, call))
    assert result.psnr == [float("inf")] and result.flop_ratio == 1.0
    assert result.to_dict()["psnr"] == [None] and result.to_dict()["ssim"] == [1.0]


def test_nothing_to_compare() -> None:
    pipe, call = sd()
    accelerate(pipe, EncoderReuse())
    pipe.acceleration.disable()
    with pytest.raises(ConfigurationError, match="nothing to compare"):
        compare_calls(pipe, drawing(pipe, call))


def test_images() -> None:
    red, blue = Image.new("RGB", (20, 16), (255, 0, 0)), Image.new("RGB", (20, 16), (0, 0, 255))
    sheet = grid([[red, blue], [blue, red]], ["left", "right"], [["one"], ["two", "three"]], scale=2, title="title")
    colours = {colour for _, colour in sheet.getcolors(100_000)}
    assert {(255, 0, 0), (0, 0, 255), (255, 255, 255)} <= colours
    assert difference(red, red).getcolors() == [(320, (255, 255, 255))]
    assert difference(red, blue).getcolors() == [(320, (0, 255, 0))]
    assert as_tensor([red, blue]).shape == (2, 3, 16, 20) and as_tensor([red])[0, 0].min() == 1
