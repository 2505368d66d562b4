"""The stages of transparency on tiny images: what is trained, what is exported, and going on from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from recipe import TINY, load_script, tensors_of
from safetensors.torch import load_file, save_file
from sticker.low_rank import add_low_rank, low_rank_changes, set_low_rank
from sticker.transparency.pair import Pair, sharpen
from sticker.transparency.tasks import JointTask

from diffusion_accel import LatentTransparency, accelerate
from diffusion_accel.training.files import UsageError
from diffusion_accel.transparency.adapter import Adapter, read_changes

FLAGS = ["--log-every", "1", "--eval-every", "3", "--grid-every", "0"]
transparency = load_script("train_transparency")


@pytest.fixture
def pipe(transparent: Path) -> StableDiffusionPipeline:
    """The pipeline that is made transparent."""
    pipe = StableDiffusionPipeline.from_pretrained(transparent / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.slow
def test_a_run_and_a_folder_that_are_there_are_not_replaced(transparent: Path) -> None:
    steps = [f"--{stage}-steps=3" for stage in ("encoder", "decoder", "joint", "unet", "refine")]
    common = ["--work", str(transparent), "--model", str(transparent / "pipeline")]
    common += ["--out", str(transparent / "weights"), "--rank", "4"]
    assert transparency.main(["all", *common, *steps, *FLAGS]) == 2, "there is a run already"
    assert transparency.main(["export", *common]) == 2, "the folder exists"


@pytest.mark.slow
def test_each_stage_trains_its_part_around_the_frozen_pipeline(
    transparent: Path, pipe: StableDiffusionPipeline
) -> None:
    work = transparent
    fresh = {}
    for part in ("encoder", "decoder"):
        torch.manual_seed(0)
        fresh[part] = Pair(pipe.vae).state_dict()
        trained = tensors_of(work / "transparency" / part)
        moved = {n for n, v in fresh[part].items() if not torch.equal(trained[f"model.{n}"], v)}
        begun = {n for n, v in tensors_of(work / "transparency" / "encoder").items() if n.startswith("average.")}
        if part == "encoder":
            assert moved and all(name.startswith("encoder.") for name in moved)
        else:
            kept = tensors_of(work / "transparency" / "encoder")
            assert all(torch.equal(trained[n.replace("average.", "model.")], kept[n]) for n in begun), "frozen"
            assert any(name.startswith("decoder.") for name in moved)
    states = {part: tensors_of(work / "transparency" / part) for part in ("decoder", "joint", "refine")}
    for name in fresh["decoder"]:
        begun = states["decoder"].get(f"average.{name}", states["decoder"][f"model.{name}"])
        assert not torch.equal(states["joint"][f"model.{name}"], begun), "both are trained"
        kept = torch.equal(states["refine"][f"model.{name}"], states["joint"][f"average.{name}"])
        assert kept == name.startswith("encoder."), "the decoder alone"
    evaluated = json.loads((work / "transparency" / "decoder" / "log.jsonl").read_text().splitlines()[-1])
    assert {"alpha", "composite", "vae", "moved", "offset"} <= set(evaluated)


def test_what_is_exported_draws_transparent_images(transparent: Path, pipe: StableDiffusionPipeline) -> None:
    out = transparent / "weights"
    base = pipe("red disc", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    accelerate(pipe, LatentTransparency(weights=str(out), views=1))
    made = pipe("red disc", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    assert made.mode == "RGBA" and made.size == base.size


def test_the_weights_in_a_folder_are_a_beginning_where_no_earlier_stage_has_left_any(
    transparent: Path, pipe: StableDiffusionPipeline, tmp_path: Path
) -> None:
    work, out = transparent, transparent / "weights"
    common = ["--work", str(work), "--model", str(work / "pipeline"), "--out", str(out), "--rank", "4"]
    bare = tmp_path / "work"
    bare.mkdir()
    for file in ("images.npy", "rows.jsonl", "shape.json"):
        (bare / file).symlink_to(work / file)
    model = JointTask(bare, pipe.vae, start=out).model
    sharpen(model.decoder)  # which begins as it was before it was exported
    begun = model.state_dict()
    for part in ("encoder", "decoder"):
        stored = load_file(out / part / "diffusion_pytorch_model.safetensors")
        assert all(torch.allclose(begun[f"{part}.{name}"], value.float(), atol=1e-6) for name, value in stored.items())
    with pytest.raises(UsageError, match="'encoder' stage"):
        JointTask(bare, pipe.vae)
    more = ["joint", "--work", str(bare), "--model", str(work / "pipeline"), "--from", str(out), "--steps", "1"]
    assert transparency.main([*more, *FLAGS]) == 0
    again = ["export", *more[1:-2], "--out", str(tmp_path / "again")]
    assert transparency.main(again) == 0, "the stages after those that have run are not needed"
    joined = tensors_of(bare / "transparency" / "joint")["average.encoder.blocks.0.weight"]
    exported = load_file(tmp_path / "again" / "encoder" / "diffusion_pytorch_model.safetensors")["blocks.0.weight"]
    assert torch.equal(exported, joined.half())
    assert transparency.main(["latents", "--work", str(bare), *common[2:]]) == 2, "no latents to follow"


def test_what_the_file_holds_is_what_was_trained(pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    model, x = pipe.unet, torch.randn(1, pipe.unet.config.in_channels, 6, 6)
    text = torch.randn(1, 4, TINY["text_width"])
    plain = {n: v.clone() for n, v in model.state_dict().items()}
    twin = type(model).from_config(model.config)
    twin.load_state_dict(plain)
    add_low_rank(twin, 4)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
        save_file(low_rank_changes(twin, model), tmp_path / "adapter.safetensors")
        file = tmp_path / "adapter.safetensors"
        adapter = Adapter(read_changes(file, load_file(file)))
        base_prediction = model.eval()(x, 10, text).sample
        adapter.apply(model)
        adapted, trained_prediction = model(x, 10, text).sample, twin.eval()(x, 10, text).sample
        adapter.restore()
        again = type(model).from_config(model.config)
        again.load_state_dict(plain)
        add_low_rank(again, 4)
        set_low_rank(again, load_file(file))
        begun_prediction = again.eval()(x, 10, text).sample
    moved = (adapted - base_prediction).abs().max()
    assert (adapted - trained_prediction).abs().max() < 1e-2 * moved
    assert (adapted - begun_prediction).abs().max() < 1e-4 * moved, "one can go on from the file"
    other = type(model).from_config(model.config)
    add_low_rank(other, 2)
    with pytest.raises(UsageError, match="rank"):
        set_low_rank(other, load_file(file))
