"""Learning a solver: what it becomes, what it is for, and what is refused."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from diffusers import (
    DDPMScheduler,
    DiffusionPipeline,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
)

from diffusion_accel import ConfigurationError, LearnedMultistepScheduler, UnsupportedPipelineError
from diffusion_accel.measure.fidelity import psnr
from diffusion_accel.measure.sampler import Sampler
from diffusion_accel.tuning import jumps
from diffusion_accel.tuning import solver as module
from diffusion_accel.tuning.measure import scheduling
from diffusion_accel.tuning.solver import _chosen, _nearest, distinct, tune_solver
from diffusion_accel.tuning.state import read_search

from .test_by_rollouts import dit

PROMPTS = [str(n) for n in range(8)]
CALL = {"guidance_scale": 2.0}
TEXTS = [f"{name}, {style} style" for name in ("red apple", "panda", "rocket") for style in ("3d", "flat")]
SMALL = {"steps": 5, "towards": "baseline", "guidance_scale": 3.0, "height": 32, "width": 32}


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A converged image in 24 steps instead of 200."""
    monkeypatch.setattr(module, "MANY_STEPS", 24)
    monkeypatch.setattr(module, "CANDIDATES", 16)
    monkeypatch.setattr(module, "LAST", 6)


class FlowMatchUnscaled(FlowMatchEulerDiscreteScheduler):
    """Flow matching for a pipeline that asks its scheduler to scale."""

    def scale_model_input(self, sample: torch.Tensor, timestep: Any) -> torch.Tensor:
        return sample


def unconditional(scheduler: Any) -> Any:
    pipe, _ = zoo.unet2d()
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = scheduler
    return pipe


def falls(scheduler: LearnedMultistepScheduler, *sizes: int) -> None:
    assert sorted(map(int, scheduler.config.solvers)) == sorted(sizes)
    for size in sizes:
        times = scheduler.config.solvers[str(size)]["timesteps"]
        assert len(times) == size and all(a > b for a, b in pairwise(times))


@pytest.fixture(scope="module")
def learnt() -> tuple[Any, LearnedMultistepScheduler]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MANY_STEPS", 24)
        pipe = dit()
        return pipe, tune_solver(pipe, PROMPTS, [4, 3, 4], seconds=1, **CALL)


def test_it_is_a_scheduler_that_is_nearer_than_its_kind(learnt: tuple[Any, LearnedMultistepScheduler]) -> None:
    pipe, scheduler = learnt
    assert type(pipe.scheduler).__name__ == "DDIMScheduler", "the pipeline's own stays"
    assert isinstance(scheduler, LearnedMultistepScheduler)
    falls(scheduler, 3, 4)
    new = Sampler(pipe, ("8", "9", "3"), 4, 50, 8, CALL)
    with torch.inference_mode():
        goal, many = module._goal(pipe, "converged", 4)
        with scheduling(pipe, goal):
            wanted = Sampler(pipe, new.prompts, 200, 50, 8, CALL).images()
        plain = psnr(wanted, new.images()).median()
        with scheduling(pipe, scheduler):
            own = psnr(wanted, new.images()).median()
            assert len(pipe.scheduler.timesteps) == 4
    assert float(own) > float(plain) + 3
    made = scheduler.config.made_for
    assert made["towards"] == "converged" and made["measured"].keys() == {"3", "4"}
    assert made["measured"]["4"]["pictures"] == 3 and made["guidance_scale"] == [2.0, 2.0]
    assert made["reference"].startswith("DPMSolverMultistepScheduler")
    assert made["measured"]["4"]["psnr_median"] == pytest.approx(_heldout(pipe, scheduler, goal), abs=0.02), (
        "what is written is what it does"
    )


def _heldout(pipe: Any, scheduler: Any, goal: Any) -> float:
    held = Sampler(pipe, tuple(PROMPTS[5:]), 4, 5, 8, CALL)
    with torch.inference_mode():
        with scheduling(pipe, goal):
            wanted = Sampler(pipe, held.prompts, 24, 5, 8, CALL).images()
        with scheduling(pipe, scheduler):
            return float(psnr(wanted, held.images()).median())


def test_saved_and_loaded_it_draws_the_same(learnt: tuple[Any, LearnedMultistepScheduler], tmp_path: Path) -> None:
    pipe, scheduler = learnt
    with scheduling(pipe, scheduler):
        pipe.save_pretrained(tmp_path)
        drawn = Sampler(pipe, ("1", "2"), 3, 0, 8, CALL).images()
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    loaded.labels = {}
    assert type(loaded.scheduler) is LearnedMultistepScheduler
    assert loaded.scheduler.config.solvers == scheduler.config.solvers
    assert torch.equal(Sampler(loaded, ("1", "2"), 3, 0, 8, CALL).images(), drawn)


def test_timesteps_of_a_solver_are_kept_where_one_is_given(
    learnt: tuple[Any, LearnedMultistepScheduler], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, scheduler = learnt
    monkeypatch.setattr(module, "CANDIDATES", 64)  # as it was made: every step
    again = tune_solver(pipe, PROMPTS, 4, start=scheduler, seconds=0, **CALL)
    falls(again, 4)
    assert again.config.solvers["4"]["timesteps"] == scheduler.config.solvers["4"]["timesteps"]
    for start, words in ((scheduler, "start: learnt for 3 and 4 evaluations"), (pipe.scheduler, "start must be a")):
        with pytest.raises(ConfigurationError, match=words):
            tune_solver(pipe, PROMPTS, 5, start=start, seconds=0, **CALL)


@pytest.mark.parametrize(
    ("wanted", "found"),
    [([9, 5, 1], (0, 2, 4)), ([9, 5, 5], (0, 2, 3)), ([9, 0, -1], (0, 3, 4)), ([9, 8, 8], (0, 1, 2))],
)
def test_each_timestep_is_the_nearest_that_is_free(wanted: list[float], found: tuple[int, ...]) -> None:
    assert _nearest([9, 7, 5, 3, 1], wanted) == found


def test_towards_the_baseline() -> None:
    pipe = dit()
    scheduler = tune_solver(pipe, PROMPTS, 3, towards="baseline", steps=8, seconds=0.5, **CALL)
    falls(scheduler, 3)
    assert scheduler.config.made_for["reference"] == "DDIMScheduler, 8 steps"
    pipe.scheduler.set_timesteps(8)
    assert set(scheduler.config.solvers["3"]["timesteps"]) <= {float(t) for t in pipe.scheduler.timesteps}


def test_flow_matching_and_unconditional_pipelines() -> None:
    pipe = unconditional(DDPMScheduler(clip_sample=False))
    scheduler = tune_solver(pipe, PROMPTS, 3, seconds=0)
    falls(scheduler, 3)
    pipe.scheduler = scheduler
    assert pipe(batch_size=1, num_inference_steps=3, output_type="np").images.shape == (1, 8, 8, 3)
    flow = dit(FlowMatchUnscaled())
    scheduler = tune_solver(flow, PROMPTS, 3, seconds=0, **CALL)
    falls(scheduler, 3)
    assert scheduler.config.flow and scheduler.config.made_for["reference"] == "FlowMatchUnscaled, 24 steps"
    by_sigma = dit(EulerDiscreteScheduler())
    falls(tune_solver(by_sigma, PROMPTS, 2, seconds=0, **CALL), 2)


def test_schedulers_that_draw_noise_are_refused_in_a_line() -> None:
    pipe = unconditional(DDPMScheduler(clip_sample=False))
    with pytest.raises(UnsupportedPipelineError, match="draws noise") as error:
        tune_solver(pipe, PROMPTS, 3, towards="baseline", steps=4, seconds=0)
    assert "\n" not in str(error.value)
    with pytest.raises(UnsupportedPipelineError, match="noise"):
        tune_solver(
            unconditional(EulerAncestralDiscreteScheduler()), PROMPTS, 3, towards="baseline", steps=4, seconds=0
        )
    for options, words in (
        ({"evaluations": 0}, "evaluations must be a whole number"),
        ({"seconds": -1}, "seconds must be a number"),
        ({"guidance_scale": "x"}, "guidance_scale"),
        ({"guidence_scale": 3}, "guidance_scale"),
    ):
        with pytest.raises(ConfigurationError, match=words):
            tune_solver(dit(), **{"prompts": PROMPTS, "evaluations": 3, "seconds": 0, **options})


def test_candidates_are_dense_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    chosen = [i for i in range(200) if _chosen(200)(i)]
    assert chosen[0] == 0 and chosen[-20:] == list(range(180, 200)) and 55 <= len(chosen) <= 70


def test_rollouts_are_kept_and_not_made_again(sticker: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, made = jumps.Jumps.run, []

    def watched(self: Any, nodes: Any) -> Any:
        if nodes[0] == 0:  # from the noise
            made.append((tuple(nodes), len(self.images)))
        return run(self, nodes)

    monkeypatch.setattr(jumps.Jumps, "run", watched)
    state = tmp_path / "s.search"
    first = tune_solver(sticker, TEXTS, 2, seconds=0, state=state, **SMALL)
    head, known = read_search(state)
    assert head["method"] == "solver" and head["prompts"] == TEXTS[:4]
    assert [*known] == ["rollout 0,2"] and len(made) == 2, "one rollout, and the fit of the solver itself"
    again = tune_solver(sticker, TEXTS, 2, seconds=0, state=state, **SMALL)
    assert len(made) == 3 and read_search(state) == (head, known)
    assert dict(again.config.solvers) == dict(first.config.solvers)
    tune_solver(sticker, TEXTS, 2, seconds=0, state=state, **{**SMALL, "seed": 1})
    assert len(made) == 5, "another search begins anew"


def test_no_timestep_is_evaluated_twice() -> None:
    heun = HeunDiscreteScheduler()
    heun.set_timesteps(4)
    times = [float(t) for t in heun.timesteps]
    assert len(times) == 7 and distinct(times) == [0, 2, 4, 6], "the corrected latents, not the predicted ones"
    assert distinct([900.0, 500.0, 499.9995, 3.0]) == [0, 2, 3]


def test_what_cannot_be_learnt_is_refused(sticker: Any) -> None:
    for values, words in (
        ({"evaluations": 6}, "towards the baseline of 5 steps at most 5 evaluations, got 6"),
        ({"evaluations": []}, "a number or several, got none"),
        ({"evaluations": 51, "towards": "converged"}, "evaluations must be a whole number"),
        ({"evaluations": 2, "towards": "truth"}, "towards must be one of converged, baseline"),
        ({"evaluations": 2, "prompts": TEXTS[:5]}, "at least 6 prompts"),
        ({"evaluations": 2, "state": 3}, "state must be a text or a path"),
    ):
        with pytest.raises(ConfigurationError, match=words):
            tune_solver(sticker, **{"prompts": TEXTS, **SMALL, **values})
