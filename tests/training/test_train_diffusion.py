"""The generic trainer: every model, prediction and switch on tiny images; exact resuming; processes; errors."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any

import forks
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from tiny_training import COLOURS, arguments, log_of, program, trainer

from diffusion_accel import accelerate
from diffusion_accel.routing import Recipe
from diffusion_accel.routing.hooks import trained_recipe

ENDLESS = ["--steps", "100000"]


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("model", "more", "saved"),
    [
        ("unet", ["--immiscible", "assign", "--min-snr", "5", "--task-routing", "beta=0.5"], "DDIMPipeline"),
        ("unet", ["--prediction", "flow", "--task-clusters", "3", "--task-loss", "nash"], "UNet2DModel without"),
        ("unet", ["--prediction", "epsilon", "--task-clusters", "2", "--clustering", "timestep"], "DDIMPipeline"),
        ("dit", ["--vae", "VAE", "--task-routing", "--task-clusters", "3", "--task-loss", "uw"], "DiTPipeline"),
        ("dit", ["--prediction", "flow", "--task-routing", "--min-snr", "5"], "DiTTransformer2DModel without"),
        ("unet-text", ["--vae", "VAE", "--immiscible", "knn:4,scale=2"], "StableDiffusionPipeline"),
        ("unet-text", ["--vae", "VAE", "--task-clusters", "2", "--task-loss", "pcgrad"], "StableDiffusionPipeline"),
    ],
)
def test_every_model_trains_and_saves(
    model: str, more: list[str], saved: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [str(data / "vae") if word == "VAE" else word for word in more]
    assert trainer.main(arguments(data, tmp_path / "work", model, *more, "--fp32", "--grid-every", "3")) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["finished"] and last["saved"].startswith(saved)
    lines = log_of(tmp_path / "work")
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(np.isfinite(line["loss"]) for line in lines) and lines[-1]["error_train"]["mean"] > 0
    out = tmp_path / "work" / "pipeline"
    assert not [file for file in out.rglob("*") if file.suffix in (".bin", ".pt", ".ckpt", ".pkl")]
    assert list((tmp_path / "work" / "train").glob("grid-*.png"))
    if "Pipeline" in saved:
        from diffusers import DiffusionPipeline

        pipe = DiffusionPipeline.from_pretrained(out, local_files_only=True)
        accelerate(pipe)
        routed = "--task-routing" in more
        assert list(pipe.acceleration.features) == (["task_routing"] if routed else [])
        denoiser = getattr(pipe, "unet", None) or pipe.transformer
        expected = Recipe(beta=0.5) if "beta=0.5" in more else Recipe() if routed else None
        assert trained_recipe(denoiser) == expected
        pipe.set_progress_bar_config(disable=True)
        call: dict[str, Any] = {"unet": {}, "dit": {"class_labels": [0, 2]}, "unet-text": {"prompt": "a red box"}}[
            model
        ]
        assert np.isfinite(np.asarray(pipe(**call, num_inference_steps=2, output_type="np").images)).all()
        if "knn:4,scale=2" in more:
            known = AutoencoderKL.from_pretrained(data / "vae").config.scaling_factor
            assert pipe.vae.config.scaling_factor == pytest.approx(2 * known), "what is drawn is divided by it"
            again = [word.replace(",scale=2", "") for word in more]
            assert trainer.main(arguments(data, tmp_path / "work", model, *again, "--fp32", "--resume")) == 2
            assert "was made with image scale 2.0, not 1.0" in capsys.readouterr().err
        if model == "dit":
            assert pipe.labels == {name: i for i, name in enumerate(sorted(COLOURS))}


def test_killed_and_resumed_equals_uninterrupted(data: Path, tmp_path: Path) -> None:
    """kill -9 at an arbitrary moment; the resumed run has the same losses, weights and weighting."""
    switches = ["--task-clusters", "3", "--task-loss", "uw", "--immiscible", "knn:2", "--task-routing", "--fp32"]
    switches += ["--steps", "60", "--save-every", "0", "--eval-every", "20"]
    assert trainer.main(arguments(data, tmp_path / "whole", "unet", *switches)) == 0
    process = forks.start(program, tmp_path / "log", arguments(data, tmp_path / "parts", "unet", *switches, *ENDLESS))
    state = tmp_path / "parts" / "train" / "state.json"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (state.exists() and json.loads(state.read_text())["step"] >= 3):
        assert process.is_alive(), (tmp_path / "log").read_text()
        time.sleep(0.01)
    process.kill()
    process.join()
    stopped = json.loads(state.read_text())["step"]
    assert 3 <= stopped < 60, "the run ended before it could be killed"
    assert trainer.main(arguments(data, tmp_path / "parts", "unet", *switches, "--resume")) == 0
    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")
    whole, parts = (load_file(tmp_path / name / "train" / "state-00000060.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.slow
def test_resuming_is_exact_with_every_weighting(data: Path, tmp_path: Path) -> None:
    for kind in ("uw", "pcgrad", "nash"):
        switches = ["--task-clusters", "3", "--task-loss", kind, "--steps", "4"]
        assert trainer.main(arguments(data, tmp_path / f"{kind}-whole", "unet", *switches)) == 0
        work = tmp_path / f"{kind}-parts"
        assert trainer.main(arguments(data, work, "unet", *switches, "--minutes", "0")) == 0
        assert json.loads((work / "train" / "state.json").read_text())["step"] == 1
        assert trainer.main(arguments(data, work, "unet", *switches, "--resume")) == 0
        assert log_of(work)[-3:] == log_of(tmp_path / f"{kind}-whole")[-3:]


def test_two_processes_equal_one(data: Path, tmp_path: Path) -> None:
    given = ["--immiscible", "assign", "--task-clusters", "3", "--task-loss", "pcgrad", "--task-routing"]
    assert trainer.main(arguments(data, tmp_path / "one", "unet", *given)) == 0
    with socket.create_server(("127.0.0.1", 0)) as free:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    words = arguments(data, tmp_path / "two", "unet", *given)
    ranks = [place | {"RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2"} for rank in "01"]  # as torchrun does
    processes = [forks.start(program, tmp_path / f"log {r['RANK']}", words, r) for r in ranks]
    try:
        for process in processes:
            process.join(240)
    finally:
        for process in processes:
            process.kill()
    assert [p.exitcode for p in processes] == [0, 0], [(tmp_path / f"log {r}").read_text() for r in "01"]
    one, two = log_of(tmp_path / "one"), log_of(tmp_path / "two")
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=1e-4)
    assert two[-1]["error_train"]["mean"] == pytest.approx(one[-1]["error_train"]["mean"], rel=1e-3)


@pytest.mark.parametrize(
    ("more", "code", "text"),
    [
        (["--data", "nowhere"], 2, "not a folder of images"),
        (["--model", "dit"], 2, "does not go with|needs classes"),
        (["--immiscible", "knn:0"], 2, "knn:k with k >= 1"),
        (["--immiscible", "knn:2,scale=0.5"], 2, "scale=S with S from 1 to 100"),
        (["--immiscible", "scale=2"], 2, "image scaling is for latents"),
        (["--task-clusters", "5"], 2, "use --batch"),
        (["--task-loss", "uw"], 2, "needs --task-clusters"),
        (["--clustering", "gradient", "--task-clusters", "2"], 2, "--affinity FILE"),
        (["--task-routing", "beta=2"], 2, "beta must be between 0 and 1"),
        (["--min-snr", "-1"], 2, "must be above 0"),
        (["--model-config", "MISSING"], 2, "is missing"),
        (["--vae", "MISSING"], 2, "is not a folder"),
        (["--init", "MISSING"], 2, "does not fit this model"),
        (["--batch", "6", "--accumulation", "4"], 2, "cannot be divided"),
    ],
)
def test_unusable_input_is_one_line(
    more: list[str], code: int, text: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    assert trainer.main([*arguments(data, tmp_path / "work", "unet"), *more]) == code
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and re.search(text, error)


def test_other_data_in_the_same_work_folder_is_refused(data: Path, tmp_path: Path, capsys: Any) -> None:
    assert trainer.main(arguments(data, tmp_path, "unet")) == 0
    assert trainer.main([*arguments(data, tmp_path, "unet"), "--size", "24"]) == 2
    assert "was prepared from other data" in capsys.readouterr().err
    assert trainer.main(arguments(data, tmp_path, "unet")) == 2
    assert "--resume or --overwrite" in capsys.readouterr().err
