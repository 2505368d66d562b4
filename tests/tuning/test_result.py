"""What a plan's file says of its measurement, and what a search may be asked for."""

from __future__ import annotations

import math

import pytest
import torch

from diffusion_accel import ConfigurationError
from diffusion_accel.tuning.result import fidelity_of
from diffusion_accel.tuning.target import CEILING, Target


def test_the_numbers_of_a_file_are_those_of_its_images() -> None:
    values = torch.tensor([math.inf, *(50.005 + n for n in range(23))], dtype=torch.float64)
    found = fidelity_of(values)
    assert found["pictures"] == 24 == len(found["psnr_each"]) and found["psnr_each"][0] == CEILING
    assert found["psnr_median"] == round(float(values.quantile(0.5)), 2)
    assert found["psnr_worst_decile"] == round(float(values.quantile(0.1)), 2)
    assert found["psnr_floor"] == 51.0 and found["floor_share"] == 0.9, "the second lowest of 24, rounded down"
    assert fidelity_of([50.0] * 8)["psnr_floor"] is None, "too few to promise anything"


def test_a_target_may_be_a_family_but_not_two_things_at_once() -> None:
    assert Target().is_family and not Target(speedup=2).is_family and not Target(min_psnr=40).is_family
    with pytest.raises(ConfigurationError, match="not both"):
        Target(speedup=2, min_psnr=40)
