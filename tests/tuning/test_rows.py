"""What is recorded of a run takes bounded memory, and in half precision hardly changes what is found."""

from __future__ import annotations

import errno
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import forks
import pytest
import torch
import tuning_job

from diffusion_accel.errors import AccelerationError
from diffusion_accel.measure.sampler import Sampler
from diffusion_accel.prediction import Conversion
from diffusion_accel.tuning.jumps import Jumps, Trajectory
from diffusion_accel.tuning.recording import record
from diffusion_accel.tuning.replay import Replay
from diffusion_accel.tuning.rows import Rows

ONE = 4 * 3 * 5 * 16  # bytes of latents, predictions or samples below, in float32


def written(limit: int, scaled: bool) -> tuple[Rows, list[torch.Tensor]]:
    """Three steps of five images, in calls of three and two."""
    generator = torch.Generator().manual_seed(0)
    latents, predicted = torch.randn(2, 3, 5, 1, 4, 4, generator=generator)
    rows = Rows(3, 5, limit)
    for own in (slice(0, 3), slice(3, 5)):
        for step in range(4):  # one more than is kept
            x = latents[min(step, 2), own]
            rows.write(step, own.start, x, 10 * x if scaled and step else x, predicted[min(step, 2), own])
    samples = torch.cat([latents[:1], 10 * latents[1:]]) if scaled else latents
    return rows, [latents, predicted, samples]


@pytest.mark.parametrize("scaled", [False, True])
def test_what_fits_is_in_memory_as_it_is(scaled: bool) -> None:
    rows, wanted = written(3 * ONE, scaled)
    for own, value in zip((rows.latents, rows.predictions, rows.samples), wanted, strict=True):
        assert own.dtype == torch.float32 and torch.equal(own, value)
    assert (rows.samples is rows.latents) is not scaled


@pytest.mark.parametrize(
    ("limit", "half"), [(2 * ONE, []), (2 * ONE - 1, ["predictions"]), (ONE - 1, ["latents", "predictions"])]
)
def test_predictions_are_the_first_in_half_precision(
    limit: int, half: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    rows, wanted = written(limit, scaled=False)
    for name, value in zip(("latents", "predictions"), wanted, strict=False):
        own = getattr(rows, name)
        assert own.dtype == (torch.float16 if name in half else torch.float32)
        assert ((own.float() - value).abs() <= value.abs() * 2**-11 + 1e-7).all()
    assert not list(tmp_path.iterdir()), "nothing is left, even while it is used"


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="room is reserved in another way")
def test_a_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(AccelerationError, match="No space left on device; set TMPDIR"):
        written(1, scaled=False)
    assert not list(tmp_path.iterdir())


def test_half_precision_changes_little() -> None:
    """A rollout towards a trajectory in half precision comes as near to the result, which is kept as it is."""
    sampler, found = Sampler(tuning_job.pipeline(), ("",) * 4, 5, batch=3), []
    with torch.inference_mode():
        for limit in (2**30, 1):
            recording, images = record(sampler, in_memory=limit)
            assert not recording.reason and recording.result.dtype == torch.float32
            trajectory = Trajectory.of(recording, Conversion(recording.scheduler))
            rolled = Jumps(Replay(recording), trajectory, range(4)).run([0, 2, 3])
            found.append((recording.latents.dtype, rolled.decibels, images))
    (one, exact, a), (two, halved, b) = found
    assert (one, two) == (torch.float32, torch.float16) and torch.equal(a, b)
    assert torch.allclose(exact, halved, atol=0.2) and not torch.equal(exact, halved)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads how large a process is from /proc")
def test_a_search_of_the_size_of_sdxl_stays_below_two_gigabytes(tmp_path: Path) -> None:
    process = forks.start(tuning_job.large_search, tmp_path / "found.json")
    process.join(timeout=300)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["held"] == 3 * 50 * 24 * 4 * 128 * 128 * 4 < 2**30
    assert 0.9 * found["held"] < found["grown"], "it is counted"
    assert found["grown"] + found["beginnings"] < 2e9, found
    assert 0 < found["beginnings"] <= 2**28
