"""The search by rollouts: what it finds, how it goes on, and how much it does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformer_pipelines
import zoo
from diffusers import DDIMScheduler, DDPMScheduler

from diffusion_accel import ConfigurationError, Reuse, accelerate, tune_solver
from diffusion_accel.measure.fidelity import psnr
from diffusion_accel.measure.sampler import Sampler
from diffusion_accel.reuse.plan import FULL, Plan
from diffusion_accel.reuse.plan_family import PlanFamily
from diffusion_accel.reuse.plan_file import TunedPlan
from diffusion_accel.reuse.preset import Preset
from diffusion_accel.tuning.budget import Budget
from diffusion_accel.tuning.by_rollouts import RolloutTuner, Work, family_sizes, unsurpassed, untraceable
from diffusion_accel.tuning.measure import Reference, reusing
from diffusion_accel.tuning.recording import record
from diffusion_accel.tuning.state import read_search
from diffusion_accel.tuning.timesteps import NodeSearch
from diffusion_accel.tuning.together import ALONE
from diffusion_accel.tuning.tuner import tune

NUMBERS = [
    (2.0, 50.0, 45.0),
    (3.0, 50.0, 44.0),
    (3.0, 50.0, 44.0),
    (2.9, 49.0, 44.0),
    (4.0, 40.0, 35.0),
    (3.5, 39.0, 36.0),
]
PROMPTS = [str(n) for n in range(8)]
CALL = {"guidance_scale": 3.0}


def dit(scheduler: Any = None) -> Any:
    pipe, _ = zoo.dit()
    pipe.labels = {}
    pipe.set_progress_bar_config(disable=True)
    if scheduler is not None:
        pipe.scheduler = scheduler
    return pipe


@contextmanager
def counted(pipe: Any) -> Iterator[list[int]]:
    """The rows that the denoiser computed: its hooks answer in the place of its own forward at held steps."""
    rows: list[int] = [0]

    def count(module: Any, args: Any) -> None:
        rows[0] += args[0].shape[0]

    handle = pipe.transformer.transformer_blocks[0].register_forward_pre_hook(count)
    try:
        yield rows
    finally:
        handle.remove()


def searching(
    pipe: Any, state: Path | None = None, seconds: float = 100.0, images: float | None = None
) -> RolloutTuner:
    sampler = Sampler(pipe, tuple(PROMPTS[:5]), 6, 0, 8, CALL)
    heldout = Sampler(pipe, tuple(PROMPTS[5:]), 6, 5, 8, CALL)
    recording, drawn = record(sampler)
    assert untraceable(recording) is None
    return RolloutTuner(Reference(sampler, heldout, pipe.scheduler, drawn), recording, Budget(100.0), state=state)


def test_a_speedup_is_reached_and_a_preset_of_equal_work_is_beaten() -> None:
    pipe = dit()
    own = pipe.scheduler
    plan = tune(pipe, PROMPTS, steps=8, speedup=1.9, seconds=2, **CALL)
    assert isinstance(plan, TunedPlan) and pipe.scheduler is own and getattr(pipe, "acceleration", None) is None
    assert plan.search["method"] == "rollouts" and plan.measured["pictures"] == 3
    full = plan.measured["full_steps"]
    assert full < 8 and plan.search["predicted_time_ratio"] >= 1.9
    work = {"baseline", "costs", "rollouts", "fits", "plans in the pipeline", "held-out images"}
    assert set(plan.search["work"]) == work
    new = Sampler(pipe, ("8", "9", "1"), 8, 70, 8, CALL)
    with torch.inference_mode():
        base = new.images()
        fidelity = {}
        for name, one in (("tuned", plan.plan), ("preset", Preset("hold", 2, order=1).for_steps(8))):
            with reusing(pipe, one):
                fidelity[name] = float(psnr(base, new.images()).median())
            assert sum(step.mode == "full" for step in one.steps) >= 4 or name == "tuned"
    assert full <= 4 and fidelity["tuned"] > fidelity["preset"] + 2


def two_calls() -> Any:
    """Flux with true guidance, whose texts are numbers; its denoiser is called for one branch after the other."""
    pipe, call = transformer_pipelines.flux()

    def encoded(prompt: Any, **_: Any) -> tuple[torch.Tensor, ...]:
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        seeds = [int(text or "99") for text in texts]
        pooled, tokens = (torch.cat([zoo.rand(1, *shape, seed=s) for s in seeds]) for shape in ((8,), (6, 16)))
        return tokens, pooled, torch.zeros(6, 3)

    pipe.encode_prompt = encoded
    pipe.vae.register_to_config(shift_factor=0.0)
    pipe.set_progress_bar_config(disable=True)
    return pipe, {"height": call["height"], "width": call["width"], "guidance_scale": 3.0}


@pytest.mark.slow
def test_branches_are_left_out_where_each_is_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it is worth: here a rollout is the nearer the more steps it has."""
    pipe, call = two_calls()
    prompts = PROMPTS[:6]
    monkeypatch.setattr(RolloutTuner, "_rolled", lambda self, nodes: [20.0 + len(nodes)] * 4)
    monkeypatch.setattr(NodeSearch, "refine", lambda *_, **__: None)
    (plan,) = tune(pipe, prompts, steps=10, seconds=1000, images=1000, computed_steps=(5,), **call).members
    assert plan.search["guidance_reuse"] == "searched"
    full = [step for step in plan.plan.steps if step.mode == "full"]
    halves = sum(step.guidance == "reuse" for step in full)
    assert 0 < halves < len(full) and len(full) - halves / 2 <= 5
    assert plan.measured["flop_ratio"] == pytest.approx(10 / (len(full) - halves / 2), rel=0.15)
    monkeypatch.undo()
    solver = tune_solver(pipe, prompts, 3, steps=6, towards="baseline", seconds=0, **call)
    assert list(solver.config.solvers) == ["3"]
    alone: Any = tune(pipe, prompts, steps=6, speedup=1.1, seconds=0, **call | {"guidance_scale": 1.0})
    assert alone.search["guidance_reuse"] == "not searched: these calls have no two branches of guidance"


@pytest.mark.slow
def test_a_plan_that_the_pipeline_has_does_not_count() -> None:
    pipe = dit()
    call: dict[str, Any] = {"steps": 6, "speedup": 1.5, "seconds": 0, **CALL}
    wanted: Any = tune(pipe, PROMPTS, **call)
    solver = tune_solver(pipe, PROMPTS, 2, steps=6, towards="baseline", seconds=0, **CALL)
    accelerate(pipe, Reuse(plan="hold:3"))
    found: Any = tune(pipe, PROMPTS, **call)
    assert found.plan == wanted.plan and found.measured["psnr_each"] == wanted.measured["psnr_each"]
    again = tune_solver(pipe, PROMPTS, 2, steps=6, towards="baseline", seconds=0, **CALL)
    assert again.config.solvers == solver.config.solvers
    assert again.config.made_for["measured"] == solver.config.made_for["measured"]
    assert pipe.acceleration.features["reuse"] == Reuse(plan="hold:3") and pipe.acceleration.enabled("reuse")


@pytest.mark.slow
def test_the_fastest_plan_of_a_fidelity() -> None:
    pipe = dit()
    plan = tune(pipe, PROMPTS, steps=6, min_psnr=30, seconds=1, **CALL)
    assert isinstance(plan, TunedPlan) and plan.measured["full_steps"] < 6
    assert plan.measured["psnr_median"] > 25, "of images that were not seen"
    with torch.inference_mode():
        tuner = searching(pipe)
        found, nodes = tuner.fastest(30.0)
        assert tuner._spread(found)[0] >= 30 and found == tuner.plan(nodes)
        with pytest.raises(ConfigurationError, match="no plan reaches 200 dB"):
            tuner.fastest(200.0)


def test_a_family_has_a_plan_for_every_speed() -> None:
    pipe = dit()
    family = tune(pipe, PROMPTS, steps=8, seconds=1, computed_steps=(2, 4, 4, 6), **CALL)
    assert isinstance(family, PlanFamily)
    assert {plan.measured["full_steps"] for plan in family.members} <= {2, 4, 6}
    assert family.search["rollouts"] >= 3 and set(family.search["work"]) >= {"baseline", "rollouts", "fits"}


def test_all_steps_computed_are_the_baseline() -> None:
    pipe = dit()
    with torch.inference_mode():
        tuner = searching(pipe)
        plan = tuner.plan(tuple(range(6)))
        assert plan == Plan((FULL,) * 6)
        with reusing(pipe, plan):
            drawn = tuner.reference.sampler.images()
    assert torch.equal(drawn, tuner.reference.images)


def test_what_no_plan_reaches_is_refused() -> None:
    with torch.inference_mode():
        tuner = searching(dit())
        limit = 1 / (tuner.fixed + tuner.each)
        assert 1 <= tuner.largest(limit * 0.99) <= 2 and tuner.largest(1.001) <= 6
        with pytest.raises(ConfigurationError, match=rf"limits it to {limit:.1f}"):
            tuner.largest(limit * 1.1)
        with pytest.raises(ConfigurationError, match="images must be a number above 0"):
            tune(dit(), PROMPTS, steps=8, images=0)


# ---------------------------------------------------------------------- going on, and how much is done
def test_a_search_that_was_interrupted_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, pipe = tmp_path / "search", dit()
    with torch.inference_mode():
        first = searching(pipe, state)
        runs: list[Any] = []
        run = first.jumps.run

        def stop(nodes: Any) -> Any:
            if len(runs) == 3:
                raise KeyboardInterrupt
            runs.append(nodes)
            return run(nodes)

        monkeypatch.setattr(first.jumps, "run", stop)
        with pytest.raises(KeyboardInterrupt):
            first.every([2, 3, 4])
        known = read_search(state)[1]
        assert len(known) == 3
        second, again = searching(pipe, state), []
        monkeypatch.setattr(
            second.jumps, "run", lambda nodes, own=second.jumps.run: (again.append(nodes), own(nodes))[1]
        )
        plans = second.every([2, 3, 4])
        assert again and not {*map(tuple, runs)} & {*map(tuple, again)}, "nothing is evaluated twice"
        third, more = searching(pipe, state), []
        monkeypatch.setattr(third.jumps, "run", lambda nodes, own=third.jumps.run: (more.append(nodes), own(nodes))[1])
        assert third.every([2, 3, 4]) == plans and not more
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
        other = searching(pipe, state)
        other.every([2])
        assert other.work.spent["rollouts"] > 0, "another scheduler begins anew"
    assert json.loads(state.read_text().splitlines()[0])["method"] == "rollouts"


def test_work_is_counted() -> None:
    pipe = dit()
    with torch.inference_mode():
        tuner = searching(pipe)
        assert tuner.work.spent["baseline"] == pytest.approx(5 + 5 / 6)
        before = tuner.replay.evaluations
        with counted(pipe) as rows:
            tuner._run((0, 2))
            tuner._run((0, 2))
            assert rows[0] == 2 * 2 * 5 and tuner.replay.evaluations - before == 2 * 5
            assert tuner.work.spent["rollouts"] == pytest.approx(10 / 6, abs=0.01)
            tuner.plan((0, 2, 3))
            assert rows[0] == 2 * 5 * 5 and tuner.work.spent["fits"] == pytest.approx(15 / 6, abs=0.01)
    work = Work(5)
    work.add("a", 1.5), work.add("a", 1), work.add("b", 2)
    assert work.spent == work.total(ALONE) == {"a": 2.5, "b": 2}


@pytest.mark.slow
def test_a_family_takes_96_images_of_work_for_24_prompts() -> None:
    """By counted rows of the denoiser, in the whole call, whatever time there is."""
    pipe, prompts = dit(), [str(n % 10) for n in range(24)]
    with counted(pipe) as rows:
        family = tune(pipe, prompts, steps=20, seconds=10_000, **CALL)
    assert isinstance(family, PlanFamily)
    images = rows[0] / 2 / 20
    assert 70 < images <= 96
    assert sum(family.search["work"].values()) == pytest.approx(images, rel=0.03)
    assert len(family.members) >= 3 and family.search["rollouts"] > 8


def test_a_bound_of_images_ends_a_search_for_a_speedup() -> None:
    pipe = dit()
    with counted(pipe) as rows:
        plan = tune(pipe, PROMPTS, steps=8, speedup=1.9, seconds=10_000, images=32, **CALL)
    assert rows[0] / 2 / 8 <= 32 and plan.search["plans_evaluated"] >= 1  # type: ignore[union-attr]


def test_noise_is_rolled_out_with_the_schedulers_own_steps() -> None:
    pipe, _ = zoo.unet2d()
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDPMScheduler(clip_sample=False)
    plan = tune(pipe, PROMPTS, steps=5, speedup=1.3, seconds=0.5)
    assert isinstance(plan, TunedPlan) and plan.search["method"] == "rollouts" and plan.measured["full_steps"] < 5


def test_a_family_leaves_out_what_is_surpassed() -> None:
    shipped = TunedPlan.load("tuned:quality")
    plans = [
        replace(shipped, measured={"time_ratio": speed, "psnr_median": median, "psnr_worst_decile": worst})
        for speed, median, worst in NUMBERS
    ]
    kept = [(p.speedup, p.psnr_median, p.psnr_worst_decile) for p in unsurpassed(plans)]
    assert kept == [NUMBERS[i] for i in (0, 1, 2, 4, 5)], "equal ones stay, and who is nearer in the worst decile"


@pytest.mark.parametrize("total", [4, 5, 8, 20, 50, 200])
def test_sizes_of_a_family(total: int) -> None:
    for growth in (1.25, 2.0):
        sizes = family_sizes(total, growth)
        assert sizes and sizes == sorted(set(sizes)) and sizes[0] >= 2 and sizes[-1] < total
    assert family_sizes(50) == [4, 5, 6, 8, 10, 12, 15, 19, 24]
    assert len(family_sizes(total, 2.0)) <= len(family_sizes(total))
