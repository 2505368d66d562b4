"""What several files here begin with: a recorded calibration set and two checkpoints, made once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from quantized import TINY, made, sampler

from diffusion_accel.quant.ptq.calibration import CalibrationSet, record


@pytest.fixture(scope="session")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> CalibrationSet:
    return record(sampler(), 3, tmp_path_factory.mktemp("calibration"))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One with 8-bit inputs."""
    return made(tmp_path_factory.mktemp("quantized"), TINY)


@pytest.fixture(scope="session")
def compact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One with 4-bit inputs, whose grids are compact."""
    return made(tmp_path_factory.mktemp("compact"), replace(TINY, activation_bits=4))
