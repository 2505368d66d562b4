"""The command line end to end on the embedded model."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import forks
import interrupted
import numpy as np
import pytest
from command import call
from PIL import Image

PROMPT = "red apple, 3d style"
FEW = ["--steps", "3", "--seed", "1"]


@pytest.fixture(scope="module", autouse=True)
def one_loaded_model() -> Any:
    """Load the embedded model once a task; each command gets a pipeline of its own around it."""
    import diffusion_accel.generation.loading as run
    from diffusion_accel.pipelines.loading import load_pipeline

    patch = pytest.MonkeyPatch()
    loaded: dict[str, Any] = {}

    def cached(source: Any, *, task: str, controlnet: Any, **options: Any) -> Any:
        if source.kind != "embedded" or controlnet or options["dtype"] != run.torch.float32:
            return load_pipeline(source, task=task, controlnet=controlnet, **options)
        pipe = loaded.setdefault(task, load_pipeline(source, task=task, **options))
        return type(pipe)(**pipe.components, requires_safety_checker=False)

    patch.setattr(run, "load_pipeline", cached)
    yield
    patch.undo()


def test_an_image_and_what_is_written_into_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "apple.png"
    code, out, err = call(capsys, "generate", PROMPT, *FEW, "--encoder-reuse", "schedule=0+2", "-o", path)
    assert code == 0 and not err
    assert str(path) in out and "seed 1" in out and "encoder_reuse: 2 steps computed" in out
    image = Image.open(path)
    assert image.size == (96, 96) and image.text["parameters"].startswith(PROMPT + "\nSteps: 3, Sampler: DPMSolver")
    assert "Seed: 1, Size: 96x96, Model hash: " in image.text["parameters"]
    code, out, _ = call(capsys, "metadata", path, "--json")
    data = json.loads(out)["diffusion_accel"]
    assert data["features"] == {
        "encoder_reuse": {
            "schedule": [0, 2],
            "batch_decoder": True,
            "max_group_mb": 1024,
            "prior_noise": 0.0,
            "prior_noise_below": 0.5,
        }
    }
    assert data["seed"] == 1 and data["settings"]["steps"] == 3 and data["report"]["steps"] == 3
    code, out, _ = call(capsys, "metadata", path)
    assert code == 0 and out.startswith(PROMPT)


def test_off_and_neutral_give_the_same_pixels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pixels = []
    for k, flags in enumerate(([], ["--encoder-reuse", "off"], ["--encoder-reuse", "schedule=all"])):
        assert call(capsys, "generate", *flags, PROMPT, *FEW, "-o", tmp_path / f"{k}.png", "-q")[0] == 0
        pixels.append(np.asarray(Image.open(tmp_path / f"{k}.png")))
    assert (pixels[0] == pixels[1]).all() and (pixels[0] == pixels[2]).all()


def test_json_lines_numbering_and_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "out"
    flags = ["--json", "--count", "2", "-o", folder, *FEW]
    code, out, _ = call(capsys, "generate", PROMPT, "pizza, 3d style", *flags)
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [Path(line["path"]).name for line in lines] == ["0001-1.png", "0002-2.png", "0003-1.png", "0004-2.png"]
    assert [line["seed"] for line in lines] == [1, 2, 1, 2]
    code, out, _ = call(capsys, "generate", PROMPT, "--json", "-o", folder, "--steps", "3", "--seed", "2")
    assert Path(json.loads(out)["path"]).name == "0005-2.png"
    a, b = (np.asarray(Image.open(folder / n), dtype=int) for n in ("0002-2.png", "0005-2.png"))
    assert abs(a - b).max() <= 1, "image k of a batch is the image of seed + k"


def test_a_random_seed_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = call(capsys, "generate", PROMPT, "--steps", "2", "--json", "-o", tmp_path / "a.png")
    seed = json.loads(out)["seed"]
    _, _, _ = call(capsys, "generate", PROMPT, "--steps", "2", "-q", "--seed", seed, "-o", tmp_path / "b.png")
    a, b = (np.asarray(Image.open(tmp_path / n)) for n in ("a.png", "b.png"))
    assert (a == b).all()


def test_prompts_file_with_overrides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(
        '{"prompt": "panda, flat style", "steps": 2, "output": "panda.webp", "width": 64, "height": 64}\n'
        '{"prompt": "rainbow, 3d style", "negative_prompt": "grey", "seed": 9, "output": "rainbow.jpg"}\n'
    )
    code, out, err = call(capsys, "generate", "--prompts-file", file, *FEW, "--json", "-o", tmp_path / "out")
    assert code == 0, err
    first, second = (json.loads(line) for line in out.splitlines())
    assert first["report"]["steps"] == 2 and second["seed"] == 9
    assert Image.open(first["path"]).size == (64, 64)
    assert err == "note: the model was trained for 96x96 pixels; at 64x64 it may not draw what the prompt says\n"
    for line, word in ((first, "panda"), (second, "Negative prompt: grey")):
        code, out, _ = call(capsys, "metadata", line["path"])
        assert code == 0 and word in out


def test_no_metadata_and_overwrite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"old")
    code, _, err = call(capsys, "generate", PROMPT, *FEW, "-q", "-o", path)
    assert code == 1 and "--overwrite" in err and path.read_bytes() == b"old"
    code, out, _ = call(capsys, "generate", PROMPT, *FEW, "-q", "-o", path, "--overwrite", "--no-metadata")
    assert code == 0 and not out
    assert not Image.open(path).text
    assert call(capsys, "metadata", path)[0] == 1
    assert call(capsys, "metadata", tmp_path / "none.png")[0] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--encoder-reuse", "--compare", "--steps", "8", "--seed", "1"]
    code, out, err = call(capsys, "generate", PROMPT, *flags, "-o", tmp_path / "a.png")
    assert code == 0, err
    assert "FLOP ratio" in out and (tmp_path / "a-compare.png").is_file()
    code, out, _ = call(capsys, "generate", PROMPT, *flags, "--json", "--overwrite", "-o", tmp_path / "a.png")
    comparison = json.loads(out)["comparison"]
    assert comparison["flop_ratio"] > 1.05 and comparison["psnr"][0] > 15 and 0 < comparison["ssim"][0] < 1
    (tmp_path / "a.png").unlink()
    code, _, err = call(capsys, "generate", PROMPT, *flags, "-o", tmp_path / "a.png")
    assert code == 1 and "a-compare.png exists" in err


@pytest.fixture(scope="module")
def four_channel_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion-shaped folder with random weights and 4 latent channels, as diffusers' inpainting needs."""
    from diffusers import StableDiffusionPipeline
    from zoo import ddim, unet, vae

    from diffusion_accel.pipelines.loading import load_pipeline

    text = load_pipeline("sticker")
    folder = tmp_path_factory.mktemp("model") / "tiny"
    StableDiffusionPipeline(
        vae=vae(),
        text_encoder=text.text_encoder,
        tokenizer=text.tokenizer,
        unet=unet(cross_attention_dim=192),
        scheduler=ddim(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def test_image_to_image_and_inpainting(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], four_channel_model: Path
) -> None:
    start, mask = tmp_path / "start.png", tmp_path / "mask.png"
    Image.new("RGBA", (120, 90), (255, 0, 0, 128)).save(start)
    Image.new("L", (96, 96), 255).save(mask)
    common = ["--steps", "4", "--seed", "1", "-q", "--encoder-reuse", "--image", start]
    code, _, err = call(capsys, "generate", PROMPT, "--strength", "0.5", *common, "-o", tmp_path / "a.png")
    assert code == 0, err
    assert Image.open(tmp_path / "a.png").size == (96, 96)
    out = call(capsys, "metadata", tmp_path / "a.png", "--json")[1]
    assert json.loads(out)["diffusion_accel"]["settings"]["image"] == "start.png" and str(tmp_path) not in out
    code, _, err = call(capsys, "generate", PROMPT, "--steps", "1", "--image", start, "-o", tmp_path / "c.png")
    assert code == 2 and "--strength 0.8 of 1 steps leaves no step to run" in err, "the strength is the pipeline's"
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    moving = ["--steps", "2", "--image", tmp_path / "moving.gif", "-o", tmp_path / "moving.png"]
    code, _, err = call(capsys, "generate", PROMPT, *moving)
    assert code == 0 and err.count("the first one is taken") == 1, err
    code, _, err = call(capsys, "generate", PROMPT, "--mask-image", mask, *common, "-o", tmp_path / "b.png")
    assert code == 1 and "cannot do inpainting" in err and err.count("\n") == 1
    tiny = ["--model", four_channel_model, "--width", "64", "--height", "64", "--mask-image", mask]
    code, _, err = call(capsys, "generate", PROMPT, *tiny, *common, "--paths", "-o", tmp_path / "b.png")
    assert code == 0, err
    data = json.loads(call(capsys, "metadata", tmp_path / "b.png", "--json")[1])["diffusion_accel"]
    assert data["settings"]["mask_image"] == str(mask)
    assert Image.open(tmp_path / "b.png").size == (64, 64)
    mask.write_bytes(b"no image")
    code, _, err = call(capsys, "generate", PROMPT, *tiny, *common, "-o", tmp_path / "c.png")
    assert code == 2 and "not an image" in err and not (tmp_path / "c.png").exists()


def test_controlnet_lora_and_bfloat16(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch
    from diffusers import ControlNetModel
    from safetensors.torch import save_file

    from diffusion_accel.pipelines.loading import load_pipeline

    unet = load_pipeline("sticker").unet
    ControlNetModel.from_unet(unet, conditioning_channels=3).save_pretrained(tmp_path / "net")
    key = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    lora = {f"{key}.lora_A.weight": torch.randn(4, 128), f"{key}.lora_B.weight": torch.randn(128, 4)}
    (tmp_path / "lora").mkdir()
    save_file(lora, tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    save_file({"other": torch.zeros(1)}, tmp_path / "odd.safetensors")
    Image.new("RGB", (96, 96)).save(tmp_path / "c.png")
    control = ["--controlnet", tmp_path / "net", "--control-image", tmp_path / "c.png", "--encoder-reuse"]
    code, out, err = call(capsys, "generate", PROMPT, *FEW, *control, "-o", tmp_path / "a.png")
    assert code == 0 and "the ControlNet called 1 time, left out 2 times" in out, err
    code, _, err = call(
        capsys,
        "generate",
        PROMPT,
        *FEW,
        "--lora",
        f"{tmp_path / 'lora'}:0.5",
        "-q",
        "-o",
        tmp_path / "b.png",
    )
    assert code == 0, err
    code, _, err = call(
        capsys, "generate", PROMPT, *FEW, "--lora", tmp_path / "odd.safetensors", "-o", tmp_path / "d.png"
    )
    assert code == 1 and "does not fit this model" in err and err.count("\n") == 1
    code, _, err = call(capsys, "generate", PROMPT, *FEW, "--dtype", "bfloat16", "-q", "-o", tmp_path / "e.png")
    assert code == 0, err


def test_a_long_prompt_is_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "generate", "apple " * 40, *FEW, "-q", "-o", tmp_path / "a.png")
    assert code == 0 and "the model reads the first 24" in err


def test_other_commands(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("features", "models", "info"):
        code, text, _ = call(capsys, command)
        assert code == 0 and text
        assert json.loads(call(capsys, command, "--json")[1])
    assert "| `--encoder-reuse` |" in call(capsys, "features", "--markdown")[1]
    assert call(capsys)[0] == 2
    assert call(capsys, "nonsense")[0] == 2


def test_the_documented_table_is_the_generated_one(capsys: pytest.CaptureFixture[str]) -> None:
    page = Path(__file__).parents[2] / "docs" / "features.md"
    assert call(capsys, "features", "--markdown")[1].strip() in page.read_text(encoding="utf-8")


def test_ctrl_c_during_sampling_leaves_no_file(tmp_path: Path) -> None:
    arguments = ["generate", "apple " * 40, PROMPT, "--steps", "900", "--encoder-reuse", "-o", str(tmp_path / "out")]
    logs = tmp_path / "logs"
    logs.mkdir()
    process = forks.start(interrupted.command, logs, tmp_path, arguments, "any_moment")
    try:
        while not ((logs / "err").exists() and "\n" in (logs / "err").read_text()):
            assert process.is_alive()
            time.sleep(0.01)
        assert "the model reads the first 24" in (logs / "err").read_text()  # printed just before sampling begins
        time.sleep(1)
        os.kill(process.pid or 0, signal.SIGINT)
        process.join(60)
    finally:
        process.kill()
    _, err = (logs / "err").read_text().split("\n", 1)
    assert process.exitcode == 130, err
    assert err == "error: interrupted; nothing was written\n"
    assert not (logs / "out").read_text() and not list(tmp_path.rglob("*.*"))
