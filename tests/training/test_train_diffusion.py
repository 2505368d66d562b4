"""The generic trainer: every model, prediction and switch on tiny images; exact resuming; processes; errors."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file

from diffusion_accel import accelerate
from diffusion_accel.errors import AccelerationError
from diffusion_accel.routing import Recipe
from diffusion_accel.routing.hooks import trained_recipe
from diffusion_accel.training import datasets
from diffusion_accel.training.affinity import measure_affinity
from diffusion_accel.training.denoising import Process
from diffusion_accel.training.diffusion_task import Denoiser, DenoisingTask, Objective, prediction_error
from diffusion_accel.training.files import TrainingError, UsageError
from diffusion_accel.training.loop import Settings, train
from diffusion_accel.training.noise import NoiseChoice
from diffusion_accel.training.sampling import sample

SCRIPT = Path(__file__).parents[2] / "scripts" / "train_diffusion.py"
UNET = {"block_out_channels": [8, 16], "down_block_types": ["DownBlock2D", "DownBlock2D"], "norm_num_groups": 4}
UNET |= {"up_block_types": ["UpBlock2D", "UpBlock2D"], "attention_head_dim": 8}
DIT = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8}
COLOURS = ("red", "green", "blue")
QUICK = ["--steps", "3", "--batch", "6", "--log-every", "1", "--eval-every", "3", "--grid-every", "0"]


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_diffusion", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


trainer = load_script()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same thirty images as a folder, as three classes and with captions; a tiny VAE and model settings."""
    root = tmp_path_factory.mktemp("pictures")
    rows = []
    for c, name in enumerate(COLOURS):
        for folder in (root / "folder", root / "classes" / name, root / "captions"):
            folder.mkdir(parents=True, exist_ok=True)
        for i in range(10):
            pixels = np.full((20, 24, 3), 255, np.uint8)
            pixels[4:12, i : i + 8] = 0
            pixels[4:12, i : i + 8, c] = 250
            for file in (root / "folder" / f"{name}{i}.png", root / "classes" / name / f"{i}.png"):
                Image.fromarray(pixels).save(file)
            Image.fromarray(pixels).save(root / "captions" / f"{name}{i}.png")
            rows.append({"file": f"{name}{i}.png", "caption": f"a {name} box"})
    (root / "captions" / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    from zoo import vae

    vae().save_pretrained(root / "vae")
    (root / "unet.json").write_text(json.dumps(UNET))
    (root / "dit.json").write_text(json.dumps(DIT))
    text = {"block_out_channels": [8, 16], "norm_num_groups": 4, "down_block_types": ["DownBlock2D"] * 2}
    (root / "text.json").write_text(json.dumps(text | {"up_block_types": ["UpBlock2D"] * 2}))
    return root


def log_of(work: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (work / "train" / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def arguments(data: Path, work: Path, model: str, *more: str) -> list[str]:
    kinds = {"unet": ("folder", "unet.json"), "dit": ("classes", "dit.json"), "unet-text": ("captions", "text.json")}
    kind, config = kinds[model]
    given = ["--data", str(data / kind), "--work", str(work), "--model", model, "--model-config", str(data / config)]
    return [*given, "--size", "16", *QUICK, *more]


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


# ------------------------------------------------------------------------------------------- exactness
def start(command: list[str], **environment: str) -> subprocess.Popen[str]:
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_killed_and_resumed_equals_uninterrupted(data: Path, tmp_path: Path) -> None:
    """kill -9 at an arbitrary moment; the resumed run has the same losses, weights and weighting."""
    switches = ["--task-clusters", "3", "--task-loss", "uw", "--immiscible", "knn:2", "--task-routing", "--fp32"]
    switches += ["--steps", "60", "--save-every", "0", "--eval-every", "20"]
    assert trainer.main(arguments(data, tmp_path / "whole", "unet", *switches)) == 0
    command = [
        sys.executable,
        str(SCRIPT),
        *arguments(data, tmp_path / "parts", "unet", *switches, "--steps", "100000"),
    ]
    process = start(command)
    state = tmp_path / "parts" / "train" / "state.json"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (state.exists() and json.loads(state.read_text())["step"] >= 3):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    stopped = json.loads(state.read_text())["step"]
    assert 3 <= stopped < 60, "the run ended before it could be killed"
    assert trainer.main(arguments(data, tmp_path / "parts", "unet", *switches, "--resume")) == 0
    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")
    whole, parts = (load_file(tmp_path / name / "train" / "state-00000060.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)


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
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    process = start([*run, *arguments(data, tmp_path / "two", "unet", *given)])
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    one, two = log_of(tmp_path / "one"), log_of(tmp_path / "two")
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=1e-4)
    assert two[-1]["error_train"]["mean"] == pytest.approx(one[-1]["error_train"]["mean"], rel=1e-3)


# ------------------------------------------------------------------------------------------- parts
def tiny_task(data: Path, tmp_path: Path, **changes: Any) -> DenoisingTask:
    from diffusers import UNet2DModel

    datasets.prepare(data / "folder", tmp_path, 16)
    torch.manual_seed(0)
    model = UNet2DModel(sample_size=16, layers_per_block=1, **UNET)
    return DenoisingTask(Denoiser(model), datasets.load_examples(tmp_path), Objective(**changes))


def test_one_cluster_and_k_one_are_plain_training(data: Path, tmp_path: Path) -> None:
    losses = {}
    for name, changes in {
        "plain": {},
        "knn:1": {"noise": NoiseChoice("knn", 1)},
        "min-snr, huge": {"min_snr": 1e12, "process": Process("epsilon")},
        "epsilon": {"process": Process("epsilon")},
    }.items():
        task = tiny_task(data, tmp_path / "data", **changes)
        settings = Settings(steps=2, batch=6, lr=1e-3, log_every=1, eval_every=0, grid_every=0)
        task.evaluate = dict  # type: ignore[method-assign]
        train(task, tmp_path / name, settings, Accelerator(cpu=True))
        lines = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        losses[name] = [line["loss"] for line in lines]
    assert losses["plain"] == losses["knn:1"]
    assert losses["epsilon"] == pytest.approx(losses["min-snr, huge"], rel=1e-6)


def test_scaled_images_meet_the_nearest_noise(data: Path, tmp_path: Path) -> None:
    """By brute force, sample by sample: enlarge, then choose the noise, then mix."""

    class Watched(torch.nn.Module):
        def forward(self, x: torch.Tensor, timesteps: torch.Tensor, condition: Any) -> torch.Tensor:
            self.seen = x
            return torch.zeros_like(x)

    task, watched = tiny_task(data, tmp_path, noise=NoiseChoice.parse("knn:5,scale=3")), Watched()
    batch = task.draw(np.random.default_rng(0), 6)
    errors = task.errors(watched, batch)
    signal, sigma = task.objective.process.levels()
    for i in range(6):
        x = 3 * task.examples.clean(batch["index"][i : i + 1])[0]
        rng = np.random.Generator(np.random.Philox(int(batch["seed"][i])))
        candidates = [torch.from_numpy(rng.standard_normal(x.shape, np.float32)) for _ in range(5)]
        noise = min(candidates, key=lambda e: float((e - x).norm()))
        a, s = (float(level[batch["timesteps"][i]]) for level in (signal, sigma))
        torch.testing.assert_close(watched.seen[i], a * x + s * noise, rtol=1e-4, atol=1e-5)
        assert float(errors[i]) == pytest.approx(float(((a * noise - s * x) ** 2).mean()), rel=1e-4)
    assert torch.equal(task._fixed(np.array([0]))[0], 3 * task.examples.clean(torch.tensor([0])))


def test_losses_of_clusters_add_up(data: Path, tmp_path: Path) -> None:
    task = tiny_task(data, tmp_path, intervals=((0, 400), (400, 700), (700, 1000)), task_loss="none")
    batch = task.draw(np.random.default_rng(0), 9)
    each, errors = task.loss(task.model, batch), task.errors(task.model, batch)
    for c in range(3):
        torch.testing.assert_close(each[c], errors[batch["clusters"] == c].mean())
    with pytest.raises(UsageError, match="cannot be divided among 3"):
        task.loss(task.model, {key: value[:4] for key, value in batch.items()})


def test_affinity_is_a_cosine_matrix(data: Path, tmp_path: Path) -> None:
    matrix = np.array(measure_affinity(tiny_task(data, tmp_path), grid=5, samples=6))
    np.testing.assert_allclose(np.diag(matrix), 1, atol=1e-5)
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-6)
    assert np.abs(matrix).max() <= 1 + 1e-5 and matrix.min() < 0.99


def test_gradient_clusters_from_a_trained_run(data: Path, tmp_path: Path, capsys: Any) -> None:
    assert trainer.main(arguments(data, tmp_path / "first", "unet")) == 0
    file = tmp_path / "affinity.json"
    assert trainer.main(arguments(data, tmp_path / "first", "unet", "--measure-affinity", str(file))) == 0
    assert len(json.loads(file.read_text())["affinity"]) == 20
    given = ["--task-clusters", "3", "--clustering", "gradient", "--affinity", str(file)]
    assert trainer.main(arguments(data, tmp_path / "second", "unet", *given)) == 0


def test_samples_of_a_perfect_denoiser_are_the_image() -> None:
    """A denoiser that knows the one image there is: every solver must arrive at it."""

    class Perfect(torch.nn.Module):
        def __init__(self, process: Process, image: torch.Tensor) -> None:
            super().__init__()
            self.process, self.image = process, image
            self.unused = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x: torch.Tensor, timesteps: torch.Tensor, condition: Any) -> torch.Tensor:
            index = (timesteps - 1 if self.process.prediction == "flow" else timesteps).long().clamp(0, 999)
            signal, sigma = (level[index].view(-1, 1, 1, 1) for level in self.process.levels())
            noise = (x - signal * self.image) / sigma
            if self.process.prediction == "epsilon":
                return noise
            return noise - self.image if self.process.prediction == "flow" else signal * noise - sigma * self.image

    image = torch.linspace(-1, 1, 3 * 8 * 8).view(1, 3, 8, 8)
    for prediction in ("epsilon", "v_prediction", "flow"):
        process = Process(prediction)
        made = sample(Perfect(process, image), process, (2, 3, 8, 8), steps=20)
        assert (made - image).abs().mean() < 0.05, prediction
        error = prediction_error(Perfect(process, image), image.expand(8, -1, -1, -1), None, process)
        assert error["mean"] < 1e-6 and len(error["bins"]) == 4


# ------------------------------------------------------------------------------------------- data and errors
def test_kinds_of_data(data: Path, tmp_path: Path) -> None:
    assert datasets.find_rows(data / "folder")[0] == "folder"
    kind, rows = datasets.find_rows(data / "classes")
    assert kind == "classes" and datasets.class_names(rows) == sorted(COLOURS) and len(rows) == 30
    kind, rows = datasets.find_rows(data / "captions")
    assert kind == "captions" and rows[0] == {"file": "red0.png", "caption": "a red box"}
    assert datasets.prepare(data / "classes", tmp_path, 16, heldout=0.2) == "classes"
    examples = datasets.load_examples(tmp_path)
    assert len(examples.heldout) == 6 and examples.clean(torch.tensor([0, 1])).shape == (2, 3, 16, 16)
    dropped = torch.tensor([False, True])
    zeros = torch.zeros(2, dtype=torch.int64)
    assert examples.condition(torch.tensor([0, 29]), zeros, dropped).tolist() == [0, 3]  # type: ignore[union-attr]
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    assert (datasets.load_image(tmp_path / "clear.png", 8) == 255).all()


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


def test_unusable_data_is_refused(data: Path, tmp_path: Path) -> None:
    (tmp_path / "captions.jsonl").write_text(json.dumps({"file": "../x.png", "caption": "out"}) + "\n")
    with pytest.raises(UsageError, match="lies outside"):
        datasets.find_rows(tmp_path)
    (tmp_path / "captions.jsonl").write_text(json.dumps({"file": "x.png", "caption": "gone"}) + "\n")
    with pytest.raises(TrainingError, match="cannot be read"):
        datasets.prepare(tmp_path, tmp_path / "work", 16)
    assert not (tmp_path / "work").exists()
    (tmp_path / "captions.jsonl").write_text('{"file": 3}\n')
    with pytest.raises(AccelerationError, match="needs a file"):
        datasets.find_rows(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="holds no images"):
        datasets.find_rows(tmp_path / "empty")


def test_other_data_in_the_same_work_folder_is_refused(data: Path, tmp_path: Path, capsys: Any) -> None:
    assert trainer.main(arguments(data, tmp_path, "unet")) == 0
    assert trainer.main([*arguments(data, tmp_path, "unet"), "--size", "24"]) == 2
    assert "was prepared from other data" in capsys.readouterr().err
    assert trainer.main(arguments(data, tmp_path, "unet")) == 2
    assert "--resume or --overwrite" in capsys.readouterr().err
