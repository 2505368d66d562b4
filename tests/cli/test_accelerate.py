"""`accelerate`: a model made fast from the command line, really searched on a tiny one, and bad input refused first."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from command import call
from model_folder import edit_json, write_folder
from safetensors.torch import save_file


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    (folder / "prompts.txt").write_text("red apple\n" * 12)
    return write_folder(folder / "m")


def test_a_folder_is_made_and_draws_as_it_was_checked(model: Path, tmp_path: Path, capsys: Any) -> None:
    size = ("--height", 16, "--width", 16, "--steps", 4)
    prompts = ("--prompts-file", model.parent / "prompts.txt")
    words = ("accelerate", model, *prompts, *size, "--min-psnr", 5, "--budget", "1s", "-o", tmp_path / "fast")
    code, out, err = call(capsys, *words, "--json", "-q")
    found = json.loads(out)
    assert code == 0, err
    assert found["call"]["steps"] == 4 and found["taken"] in found["tried"] and found["size"] == 1.0
    assert found["measured"]["psnr_median"] > 5 and not (tmp_path / "fast.work").exists()
    image = tmp_path / "o.png"
    code, out, err = call(capsys, "generate", "red apple", "-m", tmp_path / "fast", "--json", "-q", "-o", image)
    assert code == 0, err
    report = json.loads(out)["report"]
    assert report["steps"] == 4, "the recipe's number"
    assert ("reuse" in report["features"]) == (found["taken"] != "every step")
    code, out, err = call(capsys, *words, "--overwrite")
    assert code == 0 and f"draw with it: diffusion-accel generate … --model {tmp_path / 'fast'}\n" in out, err
    assert out.endswith(f"what was tried, with images: {tmp_path / 'fast' / 'report.html'}\n")
    code, _, err = call(capsys, *words)
    assert code == 1 and "exists; choose another name or pass --overwrite" in err


def _without_prompts(model: Path, place: Path) -> tuple[tuple[Any, ...], ...]:
    """Commands that draw prompts and have none, and how many they need."""
    return (
        ("accelerate", model, "-o", place / "fast", 12),
        ("tune", "-m", model, "-o", place / "plan.json", 6),
        ("quantize", "-m", model, "-o", place / "small", 2),
        ("bench", "fewer-steps:2", "-m", model, "-o", place / "found.json", 1),
    )


def test_prompts_that_are_missing_are_asked_for_with_their_form(
    model: Path, tmp_path: Path, no_model: None, capsys: Any
) -> None:
    single = tmp_path / "single.safetensors"
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1)}, single)
    (few := tmp_path / "none.jsonl").write_text("")
    for file in (model, single):
        for *command, least in _without_prompts(file, tmp_path):
            code, _, err = call(capsys, *command)
            says = f"--prompts-file is needed, a text file with a prompt a line, at least {least} of them: "
            assert code == 2 and says in err and err.count("\n") == 1, err
            code, _, err = call(capsys, *command, "--prompts-file", few)
            assert code == 2 and "there is no prompt in --prompts-file" in err, err
    few.write_text('{"prompt": "red apple"}\n')
    for *command, least in _without_prompts(model, tmp_path)[:3]:
        code, _, err = call(capsys, *command, "--prompts-file", few)
        assert code == 2 and f"--prompts-file must have at least {least} prompts, got 1" in err, err


def test_the_index_of_a_hub_id_says_first_that_prompts_are_missing(
    tmp_path: Path, no_model: None, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    asked: list[str] = []

    def download(name: str, file: str) -> str:
        asked.append(f"{name}/{file}")
        (tmp_path / file).write_text('{"_class_name": "FluxPipeline"}')
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    commands = _without_prompts(Path("some/model"), tmp_path)
    for *command, _ in commands:
        code, _, err = call(capsys, *command)
        assert code == 2 and "--prompts-file is needed" in err, err
    assert asked == ["some/model/model_index.json"] * len(commands)


def test_a_pipeline_that_needs_an_image_is_refused_before_it_is_loaded(
    model: Path, tmp_path: Path, no_model: None, capsys: Any
) -> None:
    shutil.copytree(model, starts := tmp_path / "starts")
    prompts = ("--prompts-file", model.parent / "prompts.txt")
    for name, needed in (("Inpaint", "image and mask_image"), ("ControlNet", "image")):
        edit_json(starts / "model_index.json", _class_name=f"StableDiffusion{name}Pipeline")
        for *command, _ in _without_prompts(starts, tmp_path):
            code, _, err = call(capsys, *command, *prompts)
            assert code == 2 and f"StableDiffusion{name}Pipeline needs {needed}, and here" in err
    edit_json(starts / "model_index.json", _class_name="DDPMPipeline")
    code, _, err = call(capsys, "evaluate", "-m", starts)
    assert code == 1 and "DDPMPipeline takes neither a prompt nor a class" in err


def test_bad_input_is_refused_before_a_model_is_loaded(
    model: Path, tmp_path: Path, no_model: None, capsys: Any
) -> None:
    few = tmp_path / "few.txt"
    few.write_text("red apple\n" * 11)
    output = ("-o", tmp_path / "fast")
    for words, says in (
        ((model, *output, "--min-psnr", 90), "--min-psnr must be from 5 to 80 dB, got 90"),
        ((model, *output, "--max-size", 3), "--max-size"),
        ((model, *output, "--steps", 3), "--steps must be at least 4"),
        ((model, *output, "--budget", "soon"), "is no time such as 90"),
        ((model, *output, "--prompts-file", few), "--prompts-file must have at least 12 prompts, got 11"),
        ((model, *output, "--prompts-file", tmp_path / "none.txt"), "cannot be read"),
        ((model, *output, "--count", 3), "--count must be at least 12"),
        ((tmp_path / "none", *output), "no such model file or folder"),
        ((model, "-o", few), "is a file; name a folder"),
        ((model,), "--output"),
        ((), "MODEL"),
    ):
        code, _, err = call(capsys, "accelerate", *words)
        assert code in (1, 2) and says.lower() in err.lower() and err.count("\n") == 1, (words, err)
    assert {p.name for p in tmp_path.iterdir()} == {"few.txt"}
