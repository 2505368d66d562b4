"""`evaluate` end to end, and a model that was trained with task routing on the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from command import call
from PIL import Image

from diffusion_accel.model_files.names import EMBEDDED
from diffusion_accel.routing import Recipe

FEW = ["--count", "4", "--steps", "2", "--quiet"]


@pytest.mark.parametrize("grid", ["grid.txt", "grid", ""])
def test_a_grid_must_be_an_image_file(grid: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "evaluate", "--grid", grid)
    assert code == 2 and not out and "--grid" in err and err.count("\n") == 1


def test_the_embedded_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = tmp_path / "grid.png"
    code, out, err = call(capsys, "evaluate", *FEW, "--json", "--grid", grid, "--encoder-reuse")
    assert code == 0 and not err
    result = json.loads(out)
    assert result["model"] == "sticker" and list(result["features"]) == ["encoder_reuse"]
    for part in ("train", "heldout"):
        assert result[part]["n"] == 4 and result[part]["frechet"] > 0 and 0 <= result[part]["precision"] <= 1
        assert set(result[part]["retrieval"]) >= {"style_top1", "any_top5", "nearest_style"}
        assert "loss" not in result[part]
    assert Image.open(grid).size == (8 * 96, 96)
    again = json.loads(call(capsys, "evaluate", *FEW, "--json", "--encoder-reuse")[1])
    assert again == result, "the same seeds give the same numbers"
    code, _, err = call(capsys, "evaluate", *FEW, "--grid", grid)
    assert code == 1 and "exists" in err


def test_captioned_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = []
    for i in range(24):
        name = ("red", "green", "blue")[i % 3]
        pixels = np.full((40, 40, 3), 255, np.uint8)
        pixels[8:20, i : i + 12] = 0
        pixels[8:20, i : i + 12, i % 3] = 240
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        rows.append({"file": f"{i}.png", "caption": f"{name} square", "split": "heldout" if i % 2 else "train"})
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, _ = call(capsys, "evaluate", "--data", tmp_path, "--count", 12, "--steps", 2, "-q", "--json")
    assert code == 0
    result = json.loads(out)
    for part in ("train", "heldout"):
        assert len(result[part]["loss"]["bins"]) == 10 and 0 < result[part]["loss"]["mean"] < 5
    code, out, _ = call(capsys, "evaluate", "--data", tmp_path, "--count", 12, "--steps", 2, "-q")
    assert code == 0 and "validation loss" in out and "900–999" in out and "no FID" in out


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--count", "3"], 2, "--count must be at least 4"),
        (["--batch", "0"], 2, "--batch must be at least 1"),
        (["--data", "nowhere"], 2, "no such folder: nowhere"),
        (["--model", "nope"], 2, "unknown model 'nope'"),
        (["--steps", "0"], 2, "--steps must be at least 1"),
        (["--task-routing"], 2, "trained without task routing"),
        (["--task-routing", "beta=3"], 2, "--task-routing: beta must be between 0 and 1"),
    ],
)
def test_bad_input(arguments: list[str], code: int, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    got, out, err = call(capsys, "evaluate", *arguments)
    assert got == code and not out and len(err.splitlines()) == 1 and text in err


def test_a_routed_model_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "routed"
    shutil.copytree(EMBEDDED["sticker"].path, model)
    config = json.loads((model / "unet" / "config.json").read_text())
    (model / "unet" / "config.json").write_text(json.dumps(config | {"_task_routing": Recipe(beta=0.9).to_dict()}))
    image = tmp_path / "apple.png"
    common = ["generate", "red apple", "--model", model, "--steps", 2, "--seed", 1, "--width", 96, "--height", 96]
    code, out, err = call(capsys, *common, "-o", image)
    assert code == 0 and "task routing is on: the model was trained with it" in err
    assert "task_routing: 11 blocks routed" in out
    data = json.loads(call(capsys, "metadata", image, "--json")[1])["diffusion_accel"]
    assert "task_routing" in data["report"]["features"]
    code, _, err = call(capsys, *common, "-o", tmp_path / "b.png", "--task-routing", "beta=0.5")
    assert code == 2 and "was trained with beta=0.9" in err and not (tmp_path / "b.png").exists()
