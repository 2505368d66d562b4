"""The calibration set: the model's own trajectories, kept whole."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from quantized import Killed, Prompted, sampler

from diffusion_accel.errors import ConfigurationError
from diffusion_accel.quant.ptq.calibration import CalibrationSet, Rows, record


def test_the_calibration_set_is_the_models_own_trajectory(calibration: CalibrationSet) -> None:
    s = sampler()
    assert calibration.timesteps == (750.0, 250.0, 0.0) and calibration.rows == 8
    for number in range(3):
        rows = calibration.bucket(number)
        assert len(rows) == 8 and set(rows.arguments["timestep"].tolist()) == {calibration.timesteps[number]}
        assert torch.allclose(rows.run(s.pipe.unet), rows.output, atol=1e-5)
    assert torch.equal(calibration.sample(1, 4, 7).output, calibration.sample(1, 4, 7).output)


def test_both_branches_of_guidance_are_recorded(tmp_path: Path) -> None:
    pipe, call = zoo.sd()
    found = record(Prompted(pipe, call), 2, tmp_path)
    rows = found.bucket(0)
    assert len(rows) == 2 * 4  # four images, with and without the prompt
    text = rows.arguments["encoder_hidden_states"]
    assert not torch.equal(text[0], text[1]) and torch.equal(text[0], text[2])
    assert torch.allclose(rows.run(pipe.unet), rows.output, atol=1e-5)


def test_rows_are_counted_and_belong_to_their_chunks(tmp_path: Path) -> None:
    """A recording that goes on with another number of images a call takes nothing of the old one for its own."""

    def stop(what: str, share: float = 0.0, left: float | None = None) -> None:
        if what.endswith(": 6 of 8 prompts"):
            raise Killed

    with pytest.raises(Killed):
        record(replace(sampler(), batch=3), 3, tmp_path, stop)
    found = record(sampler(), 3, tmp_path)
    assert found.rows == 8 and [len(found.bucket(b)) for b in range(3)] == found.counts == [8, 8, 8]
    whole = record(sampler(), 3, tmp_path / "whole")
    assert all(torch.equal(found.bucket(b).output, whole.bucket(b).output) for b in range(3))
    (tmp_path / f"b001-{found.chunks[0]}.safetensors").write_bytes(b"x")
    with pytest.raises(ConfigurationError, match="is damaged; forget the run"):
        found.bucket(1)


def test_rows_go_to_where_the_model_is() -> None:
    seen: list[str] = []

    class Elsewhere(torch.nn.Linear):
        def forward(self, sample: torch.Tensor, timestep: torch.Tensor, added: dict[str, list[torch.Tensor]]) -> Any:
            seen.extend(tensor.device.type for tensor in (sample, timestep, *added["ids"]))
            return (torch.ones(2, 3),)

    arguments = {"sample": torch.ones(2, 3), "timestep": torch.ones(2), "added": {"ids": [torch.ones(2)]}}
    answer = Rows(arguments, torch.ones(2, 3)).run(Elsewhere(3, 3, device="meta"))
    assert seen == ["meta"] * 3 and answer.device.type == "cpu"
