"""Parts of the task, by hand: clusters, noise, affinities, samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from tiny_training import UNET, arguments, trainer

from diffusion_accel.training import datasets
from diffusion_accel.training.affinity import measure_affinity
from diffusion_accel.training.denoising import Process
from diffusion_accel.training.diffusion_task import Denoiser, DenoisingTask, Objective, prediction_error
from diffusion_accel.training.files import UsageError
from diffusion_accel.training.loop import Settings, train
from diffusion_accel.training.noise import NoiseChoice
from diffusion_accel.training.sampling import sample


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
