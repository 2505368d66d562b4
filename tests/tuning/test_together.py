"""A search that several processes share finds what one process finds."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import forks
import pytest
import torch
import tuning_job

from diffusion_accel.measure.sampler import Sampler
from diffusion_accel.reuse.plan import Plan
from diffusion_accel.reuse.plan_family import PlanFamily
from diffusion_accel.tuning.fits import Moments, fitted_moments
from diffusion_accel.tuning.together import ALONE, Together


def job(target: Callable[..., None], size: int, folder: Path, *arguments: Any) -> list[int | None]:
    """Run a function of `tuning_job` on real processes. Returns their exit codes."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    processes = [forks.start(target, rank, size, port, folder, *arguments) for rank in range(size)]
    try:
        for process in processes:
            process.join(timeout=300)
    finally:
        for process in processes:
            process.kill()
    return [process.exitcode for process in processes]


def logs(folder: Path) -> str:
    return "\n".join(file.read_text()[-2000:] for file in sorted(folder.glob("*.log")))


def assert_alike(found: Any, alone: Any) -> None:
    """Equal but for the rounding of numbers. Those of a fit answer to the rounding of latents by as much as they are
    uncertain; what they make of the images does not."""
    if isinstance(alone, dict):
        assert found.keys() == alone.keys()
        for key in alone:
            assert_alike(found[key], alone[key])
    elif isinstance(alone, list) and alone and isinstance(alone[0], str) and alone[0].startswith("full"):
        for step, own in zip(Plan.parse(found).steps, Plan.parse(alone).steps, strict=True):
            assert (step.mode, step.space) == (own.mode, own.space)
            if own.fit is None:
                assert step.fit is None
                continue
            for rows, wanted in ((step.fit.predictions, own.fit.predictions), (step.fit.latents, own.fit.latents)):
                assert torch.allclose(torch.tensor(rows), torch.tensor(wanted), atol=1e-3)
    elif isinstance(alone, list):
        assert len(found) == len(alone)
        for one, other in zip(found, alone, strict=True):
            assert_alike(one, other)
    elif isinstance(alone, float):
        assert found == pytest.approx(alone, abs=0.021)  # decibels and images, to two digits
    else:
        assert found == alone


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    assert job(tuning_job.tune_together, 2, tmp_path) == [0, 0], logs(tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert second["family"] == first["family"] and second["plan"] == first["plan"], "all return the same"
    alone = tuning_job.search(ALONE, tmp_path / "state")
    assert len(alone.members) == 2
    assert_alike(first["family"], json.loads(json.dumps(alone.to_dict())))
    assert_alike(first["plan"], json.loads(json.dumps(tuning_job.search(ALONE, min_psnr=20.0).to_dict())))
    assert not (tmp_path / "state-1").exists(), "the first process writes"
    states = [[json.loads(line) for line in (tmp_path / f).read_text().splitlines()] for f in ("state-0", "state")]
    assert_alike(states[0][0], states[1][0])
    assert [line["plan"] for line in states[0][1:]] == [line["plan"] for line in states[1][1:]], "the same way"
    for one, other in zip(states[0][1:], states[1][1:], strict=True):
        assert one["psnr"] == pytest.approx(other["psnr"], abs=0.002)
    assert "ConfigurationError: no plan is 900" in first["nothing"]
    assert second["nothing"] == first["nothing"].replace("Configuration", "FirstFailed")
    for found in (first, second):
        assert "seed" in found["different"] and "asked for the same" in found["different"]
        assert "5 processes are too many for 4 images" in found["too many"]


def test_a_process_that_ends_leaves_no_other_waiting(tmp_path: Path) -> None:
    assert job(tuning_job.lose_one, 2, tmp_path) == [0, 9], logs(tmp_path)
    assert (tmp_path / "0.txt").read_text().startswith("PeerError: another process of this job"), logs(tmp_path)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_image_belongs_to_one_process(size: int) -> None:
    sampler = Sampler(None, tuple("abcdefg"), 4, seed=10)  # type: ignore[arg-type]
    processes = [Together(rank, size) for rank in range(size)]
    parts = [process.part(sampler) for process in processes]
    drawn = {part.seed + i * part.stride: prompt for part in parts for i, prompt in enumerate(part.prompts)}
    assert drawn == {10 + i: prompt for i, prompt in enumerate("abcdefg")}
    for process, part in zip(processes, parts, strict=True):
        later = part.part(1, len(part.prompts))
        assert later.seed + (len(later.prompts) - 1) * later.stride == part.seed + (len(part.prompts) - 1) * part.stride
        assert process.part(sampler.part(2, 7)).seed == 12 + process.rank
    for count in range(8):
        own = [process.numbers(process.among(count)) for process in processes]
        assert sorted(n for numbers in own for n in numbers) == list(range(count))


def test_fits_of_shares_are_those_of_all_images() -> None:
    """The halves of the images by which the ridge is chosen are those of the whole search, whoever has them."""
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(7, 2, 3, 3, generator=generator) for _ in range(3)]
    target = features[0] * 0.7 + features[2] * 0.2 + 0.1 * torch.randn(7, 2, 3, 3, generator=generator)
    middle = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    whole = fitted_moments(Moments.of(features, target), middle)
    said: dict[int, Any] = {}
    barrier = threading.Barrier(2, timeout=60)

    class Half(Together):
        """One of two threads that tell each other everything."""

        def everyone(self, value: Any) -> list[Any]:
            said[self.rank] = value
            barrier.wait()
            both = [said[0], said[1]]
            barrier.wait()
            return both

        def total(self, tensor: torch.Tensor) -> torch.Tensor:
            return sum(self.everyone(tensor.double()), torch.zeros(()).double())

    def fit(rank: int) -> torch.Tensor:
        own = Moments.of([f[rank::2] for f in features], target[rank::2])
        return fitted_moments(own, middle, together=Half(rank, 2))

    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(fit, (0, 1)):
            assert torch.allclose(found, whole, rtol=1e-9, atol=1e-11)


@pytest.mark.slow
def test_the_command_is_shared_by_the_processes_of_a_launcher(tmp_path: Path) -> None:
    """One writes and prints; of an error that all have, one line is said."""
    small = ["--count", "6", "--steps", "4", "--budget", "1", "--device", "cpu", "--width", "32", "--height", "32"]
    (tmp_path / "made").mkdir()
    output = tmp_path / "made" / "f.json"
    solver = ["--evaluations", "2", "--towards", "baseline"]
    arguments = ["tune", "-o", str(output), *small, *solver, "--json"]
    assert job(tuning_job.command, 2, tmp_path, arguments) == [0, 0], logs(tmp_path)
    assert [path.name for path in output.parent.iterdir()] == ["f.json"]
    family = PlanFamily.load(str(output))
    assert family.solvers and family.search["work"]["baseline"] == 5, "four images, and one step of each to check"
    said, silent = ((tmp_path / f"{rank}.log").read_text() for rank in (0, 1))
    assert json.loads(said) and not silent
    arguments = ["tune", "-o", str(output.with_name("g.json")), *small, "--speedup", "900", "-q"]
    assert job(tuning_job.command, 2, tmp_path, arguments) == [2, 1], logs(tmp_path)
    said, silent = ((tmp_path / f"{rank}.log").read_text() for rank in (0, 1))
    assert said.splitlines()[-1].startswith("error: no plan is 900") and not silent
    assert [path.name for path in output.parent.iterdir()] == ["f.json"]
