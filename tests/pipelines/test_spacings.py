"""Spacings of schedulers by name: the table is what diffusers has, and what each one changes."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import pytest
from zoo import ZOO

from diffusion_accel import ConfigurationError
from diffusion_accel.pipelines.schedulers import SCHEDULERS, check_scheduler, scheduler_for, set_scheduler
from diffusion_accel.pipelines.spacings import _SWITCHES, SPACINGS, TAKES, spacing_changes

PAIRS = [(name, spacing) for name, (cls, _) in SCHEDULERS.items() for spacing in TAKES.get(cls, ())]


@pytest.fixture(scope="module")
def pipe() -> Any:
    return ZOO["sd"]()[0]


@pytest.mark.parametrize("name", sorted({*TAKES, *(cls for cls, _ in SCHEDULERS.values() if hasattr(diffusers, cls))}))
def test_the_table_is_what_diffusers_has(name: str) -> None:
    known = inspect.signature(getattr(diffusers, name)).parameters
    assert set(TAKES[name]) == {s for s in SPACINGS if _SWITCHES.get(s, "timestep_spacing") in known}


@pytest.mark.sampled(5)
@pytest.mark.parametrize(("name", "spacing"), PAIRS)
def test_a_spacing_is_the_only_one(pipe: Any, name: str, spacing: str) -> None:
    check_scheduler(f"{name},{spacing}")
    config = scheduler_for(pipe, f"{name},{spacing}").config
    on = [short for short, switch in _SWITCHES.items() if config.get(switch)]
    assert on == [spacing] if spacing in _SWITCHES else (on == [] and config.timestep_spacing == spacing)


def test_every_spacing_places_the_steps_elsewhere_and_begins_with_noise(pipe: Any) -> None:
    found = {}
    for spacing in SPACINGS:
        scheduler = scheduler_for(pipe, f"dpm++,{spacing}")
        scheduler.set_timesteps(8)
        found[spacing] = tuple(scheduler.timesteps.tolist())
    assert len({*found.values()}) >= len(SPACINGS) - 1  # evenly in log σ is the same as lu but for rounding
    for spacing in ("karras", "exponential", "beta"):
        scheduler = scheduler_for(pipe, f"euler,{spacing}")
        scheduler.set_timesteps(8)
        assert float(scheduler.timesteps[0]) == pytest.approx(999, abs=1)


def test_what_the_model_has_is_replaced(pipe: Any) -> None:
    before = pipe.scheduler
    own = diffusers.DPMSolverMultistepScheduler.from_config(before.config, use_karras_sigmas=True)
    try:
        pipe.scheduler = own
        config = scheduler_for(pipe, "dpm++,lu").config
        assert config.use_lu_lambdas and not config.use_karras_sigmas
        config = scheduler_for(pipe, "dpm++-karras,trailing").config
        assert config.timestep_spacing == "trailing" and not config.use_karras_sigmas
        assert scheduler_for(pipe, "dpm++").config.use_karras_sigmas  # nothing was asked for
    finally:
        pipe.scheduler = before


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ddim,lu", "scheduler 'ddim' has no lu spacing; it has: leading, linspace, trailing"),
        ("dpm++-single,leading", "has no leading spacing; it has: karras, exponential, beta"),
        ("dpm++,lou", "unknown spacing 'lou'; did you mean 'lu'"),
        ("dpm++,", "unknown spacing ''; allowed: leading"),
        ("dpm++,lu,karras", "unknown spacing 'lu,karras'"),
        ("eulr,lu", "unknown scheduler 'eulr,lu'; did you mean 'euler'"),
    ],
)
def test_what_there_is_not_is_refused_without_a_model(name: str, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        check_scheduler(name)


def test_classes_without_a_short_name_are_asked_when_they_are_made(pipe: Any) -> None:
    check_scheduler("SASolverScheduler,lu")
    with pytest.raises(ConfigurationError, match="has no lu spacing; it has: leading, .*karras"):
        spacing_changes("SASolverScheduler", diffusers.SASolverScheduler, "lu")
    assert scheduler_for(pipe, "UniPCMultistepScheduler,beta").config.use_beta_sigmas
    with pytest.raises(ConfigurationError, match="has no karras spacing; it has: only its own"):
        spacing_changes("cm", diffusers.VQDiffusionScheduler, "karras")


@pytest.mark.sampled(6)
@pytest.mark.parametrize(
    "before", ["dpm++-sde", "dpm++-karras", "dpm++,lu", "deis,exponential", "euler,exponential", "ddim,trailing"]
)
def test_a_name_means_the_same_whatever_name_was_given_before(pipe: Any, before: str) -> None:
    """Neither a spacing nor stochastic steps are inherited."""
    own = pipe.scheduler
    try:
        for name in (*SCHEDULERS, "heun,karras"):
            pipe.scheduler = own
            wanted = dict(scheduler_for(pipe, name).config)
            set_scheduler(pipe, before)
            set_scheduler(pipe, name)
            assert dict(pipe.scheduler.config) == wanted, name
    finally:
        pipe.scheduler = own
