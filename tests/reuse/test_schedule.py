"""Key steps: the published lists, their scaling, and what any schedule must satisfy."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusion_accel import ConfigurationError, EncoderReuse
from diffusion_accel.reuse.schedule import PAPER, PRESETS, check_schedule, key_steps, scale

ALL = [*PRESETS, "uniform:1", "uniform:4", "uniform:7"]


def test_the_paper_preset_is_the_published_list_and_its_prefix() -> None:
    assert key_steps("paper", 50) == {0, 1, 2, 3, 5, 10, 15, 25, 35}
    assert key_steps("paper", 20) == {0, 1, 2, 3, 5, 10, 15}
    assert key_steps("paper", 1) == {0}
    # 100 steps: everything moves to twice its place and the dense start stays dense
    assert key_steps("paper", 100) == {0, 1, 2, 3, 4, 5, 6, 10, 20, 30, 50, 70}


def test_deepfloyd_sets_at_their_own_step_counts() -> None:
    assert key_steps("if-stage-1", 100) == {i for i in range(100) if i < 10 or i > 85 or i % 5 == 0}
    assert len(key_steps("if-stage-1", 100)) == 40
    assert key_steps("if-stage-2", 50) == {i for i in range(50) if i < 20 or i > 40 or i % 2 == 0}
    assert len(key_steps("if-stage-2", 50)) == 40
    assert key_steps("if-stage-3", 75) == {0, 2, 5, 9, 14, 20, 27, 35, 44, 54, 65}
    assert all(math.isqrt(9 + 8 * i) ** 2 == 9 + 8 * i for i in key_steps("if-stage-3", 75))


@given(schedule=st.sampled_from(ALL), total=st.integers(1, 400))
def test_any_schedule_at_any_number_of_steps(schedule: str, total: int) -> None:
    keys = key_steps(schedule, total)
    assert 0 in keys
    assert all(0 <= k < total for k in keys)
    if schedule.startswith("uniform"):
        assert keys == {i for i in range(total) if i % int(schedule.split(":")[1]) == 0}


@given(factor=st.integers(1, 8))
def test_scaling_up_keeps_runs_without_holes_and_lone_steps_alone(factor: int) -> None:
    scaled = scale(PAPER, 50, 50 * factor)
    assert set(range(3 * factor + 1)) <= scaled
    for lone in (10, 15, 25, 35):
        assert lone * factor in scaled
        assert factor == 1 or lone * factor + 1 not in scaled


@pytest.mark.parametrize(
    "schedule", ["papr", "uniform:0", "uniform:-2", "uniform:x", "uniform", "", (), (1, 2), (0, 2, 2), (0, 5, 3)]
)
def test_a_bad_schedule_is_refused(schedule: object) -> None:
    with pytest.raises(ConfigurationError):
        check_schedule(schedule)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError):
        EncoderReuse(schedule=schedule)  # type: ignore[arg-type]


def test_a_listed_step_beyond_the_run_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="beyond this run of 20 steps"):
        key_steps((0, 10, 30), 20)


def test_text_form() -> None:
    assert EncoderReuse.parse("schedule=0+1+5,batch_decoder=false") == EncoderReuse(
        schedule=(0, 1, 5), batch_decoder=False
    )
    assert EncoderReuse.parse("schedule=uniform:4").schedule == "uniform:4"
    assert EncoderReuse.from_dict({"schedule": [0, 3]}).schedule == (0, 3)
    assert str(EncoderReuse(schedule=(0, 3))) == "encoder_reuse(schedule=0+3)"
    for bad in (
        "prior_noise=nan",
        "prior_noise=-1",
        "prior_noise=5",
        "max_group_mb=0",
        "max_group_mb=x",
        "batch_decoder=7",
    ):
        with pytest.raises(ConfigurationError):
            EncoderReuse.parse(bad)
