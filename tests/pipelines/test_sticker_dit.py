"""The embedded transformer: a stock FluxPipeline, and what can be switched on for it as for the U-Net."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command import call
from diffusers import DiffusionPipeline, FluxPipeline
from PIL import Image
from reuse_tools import counters
from transformers import AutoTokenizer

from diffusion_accel import (
    AcceleratedPipeline,
    ConfigurationError,
    LearnedMultistepScheduler,
    Reuse,
    UnsupportedPipelineError,
    accelerate,
)
from diffusion_accel.conditioning import own_arguments
from diffusion_accel.model_files.names import EMBEDDED
from diffusion_accel.pipelines.loading import load_pipeline
from diffusion_accel.reuse.plan_family import PlanFamily
from diffusion_accel.reuse.plan_names import SHIPPED

PATH = EMBEDDED["sticker-dit"].path


@pytest.fixture(scope="module")
def dit() -> Any:
    pipe = load_pipeline("sticker-dit")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, steps: int = 2, text: str = "red apple, 3d style", **changes: Any) -> torch.Tensor:
    given = own_arguments(pipe, {"guidance_scale": 3.0, "height": 96, "width": 96, **changes})
    generator = torch.Generator().manual_seed(0)
    return pipe(text, num_inference_steps=steps, output_type="pt", generator=generator, **given).images


def test_plain_diffusers_loads_it(dit: Any) -> None:
    plain = DiffusionPipeline.from_pretrained(PATH)
    plain.set_progress_bar_config(disable=True)
    assert type(plain) is FluxPipeline and plain.transformer.dtype == torch.float32
    assert torch.equal(draw(plain), draw(dit))
    assert draw(plain).shape == (1, 3, 96, 96)


def test_its_tokenizers_are_read_by_transformers() -> None:
    """Capital letters make no difference, and a prompt of any training caption fits."""
    for name in ("tokenizer", "tokenizer_2"):
        tokenizer = AutoTokenizer.from_pretrained(PATH / name)
        assert tokenizer("Red Apple, 3D style").input_ids == tokenizer("red apple, 3d style").input_ids
        assert tokenizer.model_max_length <= 64


def test_guidance_and_words_matter(dit: Any) -> None:
    images = [draw(dit), draw(dit, text="panda, 3d style"), draw(dit, guidance_scale=1.0)]
    assert not any(torch.equal(images[0], other) for other in images[1:])


@pytest.mark.sampled(3)
@pytest.mark.parametrize("plan", ["full", "hold:1", "shallow:1,1"])
def test_neutral_plans_change_nothing(dit: Any, plan: str) -> None:
    before = draw(dit)
    accelerate(dit, Reuse(plan=plan))
    assert torch.equal(draw(dit), before) and torch.equal(draw(dit), before)
    dit.acceleration.disable("reuse")
    assert torch.equal(draw(dit), before)


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("plan", "computed"), [("hold:2", 3), ("hold:3@1", 2), ("shallow:2,1", 3), ("taylorseer:2,1", 3)]
)
def test_plans_skip_work_and_repeat(dit: Any, plan: str, computed: int) -> None:
    before = draw(dit, 5)
    accelerate(dit, Reuse(plan=plan))
    first = draw(dit, 5)
    assert plan.startswith("taylorseer") or counters(dit)["full_steps"] == computed
    assert torch.equal(draw(dit, 5), first) and not torch.equal(first, before)
    dit.acceleration.disable("reuse")
    assert torch.equal(draw(dit, 5), before)


@pytest.mark.slow
def test_what_ships_for_it_is_for_it(dit: Any) -> None:
    family = PlanFamily.load(SHIPPED / "flow.json")
    assert {plan.name for plan in family.members} >= {"fast", "balanced", "quality"}
    pipe = AcceleratedPipeline.from_pretrained("sticker-dit", reuse="tuned:flow-fast")
    pipe.set_progress_bar_config(disable=True)
    draw(pipe, 28)  # a warning that the plan is for something else would be an error
    assert counters(pipe)["full_steps"] == 8
    solver = LearnedMultistepScheduler.for_model("sticker-dit")
    learned = load_pipeline("sticker-dit")
    learned.set_progress_bar_config(disable=True)
    learned.scheduler = solver
    steps = min(solver.evaluations)
    good = draw(dit, 40)
    near = (draw(learned, steps) - good).square().mean()
    assert near < 0.25 * (draw(dit, steps) - good).square().mean()


def test_what_it_has_not_is_refused() -> None:
    with pytest.raises((ConfigurationError, UnsupportedPipelineError), match="no weights for transparency"):
        AcceleratedPipeline.from_pretrained("sticker-dit", transparent=True)
    with pytest.raises(UnsupportedPipelineError, match="not a U-Net"):
        AcceleratedPipeline.from_pretrained("sticker-dit", encoder_reuse=True)
    with pytest.raises(UnsupportedPipelineError, match="trained without task routing"):
        AcceleratedPipeline.from_pretrained("sticker-dit", task_routing=True)
    with pytest.raises(ConfigurationError, match="fitting: euler, heun"):
        AcceleratedPipeline.from_pretrained("sticker-dit", scheduler="dpm++")


def test_a_folder_of_it_draws_its_own_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing recommends a size for a folder, and FluxPipeline's own would be 512 pixels."""
    shutil.copytree(PATH, tmp_path / "model")
    given = ("-m", tmp_path / "model", "--steps", 2, "--preview-steps", 1, "-q", "-o", tmp_path / "a.png")
    code, _, err = call(capsys, "generate", "red apple", *given)
    assert (code, err) == (0, "")
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (96, 96)


def test_parts_of_an_image_are_drawn_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Black of the mask stays as the VAE reads it, white becomes something else."""
    Image.new("RGB", (96, 96), (200, 30, 30)).save(tmp_path / "start.png")
    mask = Image.new("L", (96, 96), 0)
    mask.paste(255, (48, 0, 96, 96))
    mask.save(tmp_path / "mask.png")
    given = ("--image", tmp_path / "start.png", "--mask-image", tmp_path / "mask.png", "--strength", 1, "--steps", 2)
    code, _, err = call(capsys, "generate", "panda", "-m", "sticker-dit", *given, "-q", "-o", tmp_path / "a.png")
    assert (code, err) == (0, "")
    with Image.open(tmp_path / "a.png") as image:
        drawn = torch.tensor(list(image.convert("RGB").getdata()), dtype=torch.float32).view(96, 96, 3)
    apart = (drawn - torch.tensor([200.0, 30.0, 30.0])).abs()
    assert apart[:, :40].mean() < 12 < apart[:, 56:].mean()
