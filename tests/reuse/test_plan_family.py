"""Families of tuned plans: which plan a wish gets, their files, and that a member is the plan given by itself."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from zoo import run, sd

from diffusion_accel import AccelerationError, ConfigurationError, PlanFamily, Reuse, TunedPlan, accelerate
from diffusion_accel.model_files.names import EMBEDDED
from diffusion_accel.report import Report
from diffusion_accel.reuse.conditions import conditions
from diffusion_accel.reuse.plan import Plan
from diffusion_accel.reuse.plan_family import USUAL_FLOOR, in_words, load_shipped
from diffusion_accel.reuse.plan_names import is_tuned, shipped

TINY = sd()[0]
TOKENS = (
    "full hold full hold",
    "full hold hold full",
    "full hold full hold:sample=0.9;0.01",
    "full full shallow:1 hold",
)
NUMBERS = {"time_ratio": 2.0, "psnr_median": 50.0, "psnr_worst_decile": 45.0}


def plan_of(tokens: str = TOKENS[0], name: str = "", **measured: float) -> TunedPlan:
    return TunedPlan(Plan.parse(tokens), {"steps": 4}, {**NUMBERS, **measured}, name=name)


def family_of(*points: tuple[float, float, float]) -> PlanFamily:
    """Plans by speed-up, median and worst decile."""
    return PlanFamily.of(
        [plan_of(time_ratio=fast, psnr_median=median, psnr_worst_decile=worst) for fast, median, worst in points]
    )


POINTS = st.lists(
    st.tuples(st.integers(101, 900), st.integers(200, 700), st.integers(0, 100)).map(
        lambda v: (v[0] / 100, v[1] / 10, (v[1] - v[2]) / 10)
    ),
    min_size=1,
    max_size=8,
)
SOME, NEAR = st.integers(100, 1000).map(lambda n: n / 100), st.integers(150, 750).map(lambda n: n / 10)
WISHES, DECIBELS = st.none() | SOME, st.none() | NEAR


# ---------------------------------------------------------------------- choosing
@given(points=POINTS, speedup=WISHES, min_psnr=DECIBELS)
def test_what_is_chosen_is_the_best_of_what_does(points: Any, speedup: Any, min_psnr: Any) -> None:
    """Against a list comprehension over the numbers themselves."""
    enough = [p for p in points if p[0] >= (speedup or 0) and p[1] >= (min_psnr or 0)]
    family = family_of(*points)
    assert [plan.speedup for plan in family.members] == sorted(p[0] for p in points)
    if not enough:
        with pytest.raises(ConfigurationError) as refused:
            family.choose(speedup, min_psnr)
        assert all(in_words(plan) in str(refused.value) for plan in family.members)
        return
    found = family.choose(speedup, min_psnr)
    numbers = (found.speedup, found.psnr_median, found.psnr_worst_decile)
    assert numbers in enough
    if min_psnr is not None:
        assert numbers[0] == max(p[0] for p in enough)
    elif speedup is not None:
        assert (numbers[2], numbers[1]) == max((p[2], p[1]) for p in enough)
    else:
        near = [p for p in points if p[2] >= USUAL_FLOOR]
        assert numbers[0] == max(p[0] for p in near) if near else numbers[2] == max(p[2] for p in points)


@given(points=POINTS, wishes=st.tuples(SOME, SOME), decibels=st.tuples(NEAR, NEAR))
def test_asking_for_more_never_gives_more(points: Any, wishes: Any, decibels: Any) -> None:
    """A higher speed-up never gives a better worst decile, a higher fidelity never a faster plan."""
    family = family_of(*points)
    with contextlib.suppress(ConfigurationError):
        slow, fast = (family.choose(speedup=wish) for wish in sorted(wishes))
        assert slow.psnr_worst_decile >= fast.psnr_worst_decile
    with contextlib.suppress(ConfigurationError):
        far, near = (family.choose(min_psnr=wish) for wish in sorted(decibels))
        assert far.speedup >= near.speedup


@given(points=POINTS)
def test_what_is_said_to_be_there_can_be_asked_for(points: Any) -> None:
    family = family_of(*points)
    for plan in family.members:
        fast, near = in_words(plan).removesuffix(" dB").split("x ")
        assert family.choose(speedup=float(fast)) and family.choose(min_psnr=float(near))


def test_a_plan_that_is_no_family_is_held_to_what_was_measured(tmp_path: Path) -> None:
    file = str(tmp_path / "one.json")
    plan_of().save(Path(file))
    assert Reuse(plan=file, speedup=2, min_psnr=50).source == plan_of()
    assert Reuse.parse(f"{file},speedup=2").to_dict()["speedup"] == 2.0
    with pytest.raises(ConfigurationError, match="not known to be at least 2.5 times as fast; measured: 2x 50 dB"):
        Reuse(plan=file, speedup=2.5)
    with pytest.raises(ConfigurationError, match="not known to be at 50.1 dB or more"):
        Reuse(plan=file, min_psnr=50.1)
    with pytest.raises(ConfigurationError, match="it says of no measurement"):
        Reuse(plan=TunedPlan(Plan.parse("full hold"), {}), speedup=2)
    for text in ("hold:2", "steps:full hold", "pab"):
        with pytest.raises(ConfigurationError, match=r"choose among tuned plans.* tuned:ddim, tuned:dpm, tuned:flow$"):
            Reuse(plan=text, speedup=2)
    for wrong in ({"speedup": 0.5}, {"speedup": 2000}, {"min_psnr": 4}, {"min_psnr": 81}, {"speedup": float("nan")},
                  {"speedup": True}, {"min_psnr": "45"}):  # fmt: skip
        with pytest.raises(ConfigurationError):
            Reuse(plan="tuned:ddim", **wrong)


def test_a_family_without_a_file_is_kept_as_the_plan_that_was_chosen() -> None:
    family = PlanFamily.of([plan_of(TOKENS[0]), plan_of(TOKENS[1], time_ratio=3.0, psnr_worst_decile=41.0)], ["slow"])
    made = Reuse(plan=family, speedup=2.5)
    assert made.source == family.members[1] and made.choice is made.source
    assert made.to_dict()["plan"] == f"steps:{TOKENS[1]}" and made.speedup is None
    assert Reuse.from_dict(made.to_dict()) == made and Reuse.parse(f"plan={made.plan}") == made
    assert Reuse(plan=family).source.speedup == 3.0 and Reuse(plan=family, min_psnr=50, speedup=1.5).source.name == ""


# ---------------------------------------------------------------------- the same images
def drawn(pipe: Any, feature: Reuse, steps: int) -> torch.Tensor:
    accelerate(pipe, feature)
    images = pipe(
        "red apple", num_inference_steps=steps, guidance_scale=3.0, height=96, width=96, output_type="pt",
        generator=torch.Generator().manual_seed(3),
    ).images  # fmt: skip
    return torch.as_tensor(images)


def test_a_member_draws_what_the_plan_by_itself_draws(tmp_path: Path) -> None:
    pipe, call = sd()
    plans = [replace(plan_of(tokens, time_ratio=1.5 + n), conditions=conditions(pipe, 4))
             for n, tokens in enumerate(TOKENS)]  # fmt: skip
    file = tmp_path / "family.json"
    PlanFamily.of(plans, ["a", "b"]).save(file)
    for n, (name, plan) in enumerate(zip("ab34", plans, strict=True)):
        plan.save(tmp_path / f"{n}.json")
        accelerate(pipe, Reuse(plan=str(tmp_path / f"{n}.json")))
        alone = run(pipe, call, steps=4)
        accelerate(pipe, Reuse(plan=f"{file}:{name}"))
        assert torch.equal(run(pipe, call, steps=4), alone)
        chosen = Reuse(plan=str(file), speedup=1.5 + n, min_psnr=50) if n == 3 else Reuse(plan=f"tuned:{file}:{name}")
        accelerate(pipe, chosen)
        assert torch.equal(run(pipe, call, steps=4), alone)


@pytest.mark.parametrize(("family", "steps", "scheduler"), [
    ("ddim", 50, DDIMScheduler), ("dpm", 20, DPMSolverMultistepScheduler),
])  # fmt: skip
def test_the_shipped_families_choose_the_plans_of_their_old_names(family: str, steps: int, scheduler: Any) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(EMBEDDED["sticker"].path)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    old = f"tuned:{'ddim-' if family == 'ddim' else ''}fast"
    wish = Reuse(plan=f"tuned:{family}", speedup=TunedPlan.load(old).speedup)
    assert wish.source == TunedPlan.load(old) and wish.source.origin == old
    assert torch.equal(drawn(pipe, wish, steps), drawn(pipe, Reuse(plan=old), steps))


def test_every_old_name_is_a_plan_of_a_shipped_family() -> None:
    assert {"ddim", "dpm", "quality", "balanced", "fast", "ddim-quality", "ddim-balanced", "ddim-fast"} <= {*shipped()}
    for family, prefix in (("ddim", "ddim-"), ("dpm", "")):
        found = load_shipped()[family]
        assert [name for name in found.names if not name.isdecimal()] == ["quality", "balanced", "fast"]
        for plan in found.members:
            assert plan.psnr_floor is not None and plan.psnr_floor <= plan.psnr_median
            assert len(plan.measured["psnr_each"]) == plan.measured["pictures"]
            if not plan.name:
                continue
            assert plan.origin == f"tuned:{prefix}{plan.name}" and TunedPlan.load(plan.origin) == plan
            for text in (f"tuned:{family}-{plan.name}", f"tuned:{family}:{plan.name}"):
                assert TunedPlan.load(text) == plan
            assert plan.evaluations == plan.measured["evaluations"]


# ---------------------------------------------------------------------- what says which it was
def test_reports_and_texts_say_which_plan_was_chosen(tmp_path: Path) -> None:
    pipe, call = sd()
    file = tmp_path / "family.json"
    plans = [replace(plan_of(TOKENS[n], time_ratio=2.0 + n), conditions=conditions(pipe, 4)) for n in range(2)]
    PlanFamily.of(plans, ["slow"]).save(file)
    feature = Reuse.parse(f"{file},speedup=2.5")
    assert feature.to_dict()["plan"] == str(file) and feature.to_dict()["speedup"] == 2.5
    assert Reuse.from_dict(feature.to_dict()) == feature
    assert str(feature) == f"reuse(plan={file}, speedup=2.5), its plan 2"
    accelerate(pipe, feature)
    run(pipe, call, steps=4)
    report = pipe.acceleration.report()
    assert report.to_dict()["choices"]["reuse"] == {
        "plan": f"{file}:2", "speedup": 3.0, "evaluations": 2, "psnr_median": 50.0, "psnr_worst_decile": 45.0,
        "psnr_floor": None,
    }  # fmt: skip
    assert f"reuse chose plan {file}:2, speedup 3.0" in str(report)
    accelerate(pipe, Reuse(plan=f"{file}:slow"))
    run(pipe, call, steps=4)
    assert pipe.acceleration.report().choices == {}


def test_what_was_learned_is_said_in_words_and_a_long_plan_in_part() -> None:
    plan = "steps:full" + " hold@2" * 49
    lines = str(
        Report(50, 1.0, choices={"reuse": {"outcome": "learned before: 1 of 50 steps", "plan": plan}})
    ).splitlines()
    assert lines[1] == "  reuse: learned before: 1 of 50 steps"
    assert (
        lines[2].startswith("  reuse chose plan steps:full hold@2 ") and lines[2].endswith("…") and len(lines[2]) < 100
    )


def test_a_plan_and_its_wish_may_stand_behind_a_bare_flag() -> None:
    for text in ("a.json,speedup=3", "tuned:ddim,min_psnr=45,stretch=true", "a/b c.json:fast", "hold:2,guidance=both"):
        assert Reuse.accepts_bare(text)
    for text in ("a prompt, speedup=3", "red apple", "x=1,speedup=3"):
        assert not Reuse.accepts_bare(text)
    assert is_tuned("a.json:fast") and not is_tuned("a.json:Fast") and not is_tuned("a.json:")


# ---------------------------------------------------------------------- files
def test_a_family_file_survives(tmp_path: Path) -> None:
    file = tmp_path / "family.json"
    solver = {"config": {"timesteps": [999, 1.5], "coefficients": [[1.0]]}, "measured": {"psnr_median": 44.0}}
    plans, solvers = [plan_of(time_ratio=3.0), plan_of(TOKENS[1])], {"five": solver, "8": {}}
    family = PlanFamily.of(plans, ["quick"], solvers, {"torch": "x"})
    family.save(file)
    assert list(tmp_path.iterdir()) == [file]
    read = PlanFamily.load(str(file))
    assert read == family and read.names == ("1", "quick") and read.solvers["five"] == solver
    assert [plan.origin for plan in read.members] == [f"{file}:1", f"{file}:quick"]
    assert PlanFamily.from_dict(json.loads(json.dumps(family.to_dict()))) == family
    with pytest.raises(ConfigurationError, match="exists"):
        family.save(file)
    family.save(file, overwrite=True)
    plan_of().save(tmp_path / "one.json")
    for read_it, text, words in (
        (TunedPlan.load, str(file), "is a family of plans, not one plan.*: 1, quick"),
        (TunedPlan.load, f"{file}:slow", "has no plan slow; .*: 1, quick"),
        (PlanFamily.load, str(tmp_path / "one.json"), "is one plan, not a family"),
        (TunedPlan.load, f"{tmp_path / 'one.json'}:quick", "is no family of plans"),
        (PlanFamily.load, "tuned:nothing", "shipped plans: tuned:ddim, tuned:dpm, .*tuned:ddim-quality"),
    ):
        with pytest.raises(ConfigurationError, match=words):
            read_it(text)


def test_plans_that_do_not_belong_together_are_no_family() -> None:
    good = plan_of()
    for wrong, names, words in (
        ([], [], "made of plans"),
        ([good], ["a", "b"], "at most as many names"),
        ([good, replace(good, conditions={"steps": 5})], [], "for another model, scheduler"),
        ([good, replace(good, plan=Plan.parse("full hold"))], [], "has 2 steps, another one 4"),
        ([good, replace(good, measured={"time_ratio": 2.0})], [], "no measured time_ratio, psnr_median"),
        ([plan_of(time_ratio=float("inf"))], [], "no measured time_ratio"),
        ([plan_of(psnr_median=True)], [], "no measured time_ratio"),
        ([good, good], ["a", "a"], "the same name"),
        ([good], ["3"], "small letters"),
        ([good] * 65, [], "1 to 64"),
    ):
        with pytest.raises(ConfigurationError, match=words):
            PlanFamily.of(wrong, names)
    for solvers in (
        {"A": {}},
        {"a": 3},
        {"a": {"weights": {}}},
        {"a": {"config": []}},
        {"a": {"config": {"x": "y" * 2**20}}},
    ):
        with pytest.raises(ConfigurationError, match="solver"):
            PlanFamily.of([good], solvers=solvers)


WHOLE = PlanFamily.of(
    [replace(plan_of(tokens, time_ratio=2.0 + n), conditions=conditions(TINY, 4)) for n, tokens in enumerate(TOKENS)],
    ["a", "b"],
    {"five": {"config": {"n": 5}, "measured": {}}},
).to_dict()
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.sampled_from(["a", "b", "3"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, suppress_health_check=list(HealthCheck))
@given(
    key=st.sampled_from([*WHOLE, *WHOLE["members"][0], *(f"measured.{key}" for key in NUMBERS)]),
    place=st.integers(0, 3), value=VALUES, cut=st.none() | st.integers(0, 2000), wish=WISHES,
)  # fmt: skip
def test_no_content_of_a_family_file_raises_anything_else(
    tmp_path_factory: Any, key: str, place: int, value: Any, cut: Any, wish: Any
) -> None:
    changed = json.loads(json.dumps(WHOLE))
    member = changed["members"][place]
    if key.startswith("measured."):
        member["measured"][key.removeprefix("measured.")] = value
    else:
        (changed if key in WHOLE else member)[key] = value
    file = tmp_path_factory.getbasetemp() / "family.json"
    file.write_text(json.dumps(changed)[:cut])
    for text in (str(file), f"{file}:a"):
        with contextlib.suppress(AccelerationError):
            feature = Reuse(plan=text, speedup=wish)
            assert wish is None or feature.source.speedup >= wish
            if feature.supports(TINY) is None:
                feature.source.check(TINY)


def test_unsorted_and_old_files_are_refused(tmp_path: Path) -> None:
    for change, words in (
        ({"members": WHOLE["members"][::-1]}, "in order of their speed-up"),
        ({"version": 2}, "version 2, this program reads version 1"),
        ({"members": {}}, "must be a list"),
        ({"members": []}, "has no plans, only solvers"),
        ({"members": [3]}, "must be a list"),
        ({"conditions": 3}, "must be objects"),
        ({"members": [{**WHOLE["members"][0], "plan": ["hold"]}]}, "plan a: the first step"),
    ):
        file = tmp_path / "family.json"
        file.write_text(json.dumps({**WHOLE, **change}))
        with pytest.raises(ConfigurationError, match=words) as refused:
            Reuse(plan=str(file))
        assert "\n" not in str(refused.value) and len(str(refused.value)) < 500
