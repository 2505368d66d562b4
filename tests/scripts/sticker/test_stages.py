"""The stages on tiny images: what they leave, what they export, and what they say of unusable input."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from recipe import SIZE, STAGES, tensors_of, trainer
from safetensors.torch import load_file
from sticker import data as sticker_data
from sticker.latents import PatchCodec, write_encoder
from sticker.models import Shape, build_vae

from diffusion_accel.training import archives


def test_written_encoder_equals_the_convolution(work: Path) -> None:
    codec = PatchCodec.load(work / "codec.safetensors")
    images = archives.on_colours(sticker_data.load_images(work))
    vae = build_vae(Shape.of_work(work))
    write_encoder(vae, codec, images)
    with torch.no_grad():
        expected, got = codec.encode(images), vae.encode(images).latent_dist.mean
    assert (got - expected).norm() / expected.norm() < 1e-2
    assert expected.square().mean().sqrt().item() == pytest.approx(1, abs=0.1)
    linear = codec.decode(expected)
    assert (linear - images).square().mean() < 0.05 * images.var()


def test_work_folder_holds_no_pickles(work: Path) -> None:
    suffixes = {file.suffix for file in work.rglob("*") if file.is_file()}
    assert suffixes <= {".safetensors", ".json", ".jsonl", ".png", ".npy", ".txt"}
    np.load(work / "images.npy", allow_pickle=False)
    for stage in STAGES:
        names = {file.name for file in (work / stage).iterdir()}
        assert {"state.json", "state-00000003.safetensors", "log.jsonl", "grid-000003.png"} <= names


def test_export_loads_and_draws(work: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(work / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.unet.dtype == pipeline.text_encoder.dtype == pipeline.vae.dtype == torch.float32
    image = pipeline("red disc, 3d style", num_inference_steps=2).images[0]
    assert image.size == (SIZE, SIZE)
    stored = load_file(work / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")
    average = tensors_of(work / "finish")["average.unet.conv_in.weight"]
    assert torch.equal(stored["conv_in.weight"], average.half())
    result = json.loads((work / "evaluate.json").read_text())
    assert result["train"]["retrieval"]["n"] == 4 and result["heldout"]["retrieval"]["n"] == 1
    assert len(result["train"]["v_error"]["bins"]) == 4
    with Image.open(work / "grid.png") as grid:
        assert grid.size == (2 * SIZE, 2 * SIZE)


def test_unusable_input_gives_one_line(
    work: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def attempt(*arguments: object) -> tuple[int, str]:
        code = trainer.main([str(argument) for argument in arguments])
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and "Traceback" not in lines[0]
        return code, lines[0]

    new = tmp_path / "new"
    assert attempt("cache", "--data", tmp_path / "nothing", "--work", new)[0] == 2
    (tmp_path / "captions.jsonl").write_text("not json\n")
    code, line = attempt("cache", "--data", tmp_path, "--work", new)
    assert code == 1 and "captions.jsonl" in line
    (tmp_path / "captions.jsonl").write_text('{"id": 1}\n')
    assert "line 1: no style" in attempt("cache", "--data", tmp_path, "--work", new)[1]
    (tmp_path / "captions.jsonl").write_text((data / "captions.jsonl").read_text())
    code, line = attempt("cache", "--data", tmp_path, "--work", new)
    assert code == 1 and "flat.zip" in line
    code, line = attempt("text", "--work", new)
    assert code == 2 and "'cache' stage" in line
    code, line = attempt("text", "--work", work)
    assert code == 2 and "--resume" in line
    code, line = attempt("export", "--work", work)
    assert code == 2 and "--overwrite" in line
    code, line = attempt("latents", "--work", work, "--styles", "oil", "--concepts", data / "concepts.txt")
    assert code == 2 and "oil" in line
    with pytest.raises(SystemExit) as usage:
        trainer.main(["text", "--steps", "0"])
    assert usage.value.code == 2
