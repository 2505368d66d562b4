"""Plans, presets and rules of guidance as data."""

from __future__ import annotations

import ast
import importlib.util
import itertools
import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reuse_tools import FITS, FITTED_PLANS, PLANS

from diffusion_accel import ConfigurationError, Reuse
from diffusion_accel.combination import Combination
from diffusion_accel.reuse.guidance import GuidanceRule
from diffusion_accel.reuse.plan import FULL, Kinds, Plan, Step
from diffusion_accel.reuse.plan_file import TunedPlan
from diffusion_accel.reuse.preset import Preset, branch_depth
from diffusion_accel.reuse.reading import read_plan


@given(plan=PLANS, total=st.integers(1, 40))
def test_plans_survive_text_and_stretching(plan: Plan, total: int) -> None:
    assert Plan.parse(str(plan)) == plan
    assert plan.stretched(len(plan)) is plan
    other = plan.stretched(total)
    assert len(other) == total and other.steps[0].mode == "full"
    full, before = (sum(s.mode == "full" for s in p.steps) for p in (other, plan))
    assert full <= max(before, total * before / len(plan) + 1)
    if total >= len(plan):
        assert full >= before


@given(plan=FITTED_PLANS, total=st.integers(1, 20))
def test_what_was_fitted_survives_text_and_not_stretching(plan: Plan, total: int) -> None:
    assert Plan.parse(str(plan)) == plan and read_plan(plan.text) == plan
    assert Reuse.parse(f"{plan.text},stretch=true") == Reuse(plan=plan, stretch=True)
    assert TunedPlan.from_dict(json.loads(json.dumps(TunedPlan(plan, {}).to_dict()))).plan == plan
    assert plan.part(0, len(plan)) == plan
    other = plan.stretched(len(plan) + total)
    assert not other.kinds().fitted and {step.guidance_weight for step in other.steps} == {1.0}
    assert not any(step.weights for step in other.steps)
    before, after = ({(s.mode, s.space) for s in p.steps if s.mode != "full"} for p in (plan, other))
    assert after <= before


@given(fit=FITS, space=st.sampled_from(["", "epsilon", "sample"]))
def test_kinds_say_what_fits_need(fit: Combination, space: str) -> None:
    held, corrected = (Kinds((FULL, Step(mode, space=space, fit=fit))) for mode in ("hold", "full"))
    assert held.fitted and held.fitted_spaces == {space} and held.spaces == {"": 0, space: 0}
    assert held.looks_back == max(fit.count, fit.count_latents - 1)
    assert corrected.looks_back == max(fit.count - 1, fit.count_latents - 1) and corrected.spaces == {}
    assert not corrected.leaves_branches_out and corrected.highest_order == 0
    plain = Kinds((FULL, Step("hold", order=2, space="sample")))
    assert not plain.fitted and plain.looks_back == 0 and plain.spaces == {"sample": 2}


def test_weights_and_fits_are_told_apart_by_a_semicolon() -> None:
    weights, fit = Plan.parse("full hold:sample=1.2,-0.1 hold:sample=1.2,-0.1;").steps[1:]
    assert weights.weights == (1.2, -0.1) and weights.fit is None
    assert fit.weights == () and fit.fit == Combination(((1.2, -0.1),), ((),)) and str(fit) == "hold:sample=1.2,-0.1;"
    step = Step.parse("full:sample=1,0.1;0.01|0.5,0.25;-1@2/reuse*0.93")
    assert step == Step(
        order=2, guidance="reuse", space="sample", guidance_weight=0.93,
        fit=Combination(((1.0, 0.1), (0.5, 0.25)), ((0.01,), (-1.0,))),
    )  # fmt: skip
    assert (
        Step.parse("full/reuse*1.0") == Step.parse("full/reuse") and str(Step.parse("full/reuse*10")) == "full/reuse*10"
    )
    assert str(step.unfitted()) == "full@2/reuse" and str(fit.unfitted()) == "hold:sample"
    assert str(weights.unfitted()) == "hold:sample@1"
    plan = Plan.parse("full hold:epsilon=1;0.5 full/reuse*0.9 full:sample=1; hold=0.5")
    unguided = GuidanceRule.parse("interval:0.9-1").applied(plan, [1.0, 0.5, 0.5, 0.5, 0.5])
    assert str(unguided) == "full hold:epsilon/none full/none full/none hold=0.5000/none"
    kept = "full hold:epsilon=1;0.5/reuse full/reuse*0.9 full:sample=1;/reuse hold=0.5000/reuse"
    assert str(GuidanceRule("reuse", every=9).applied(plan)) == kept
    bare = "full:sample=1,0.5;0.1 hold:sample=1;"
    assert read_plan(bare) == Plan.parse(bare)


@pytest.mark.parametrize(
    ("token", "words"),
    [
        ("full:sample", "full a space with a fit"),
        ("full:sample@1", "full a space with a fit"),
        ("full=1,2", "only hold takes weights"),
        ("hold:sample=1;@1", "instead of an order or weights"),
        ("hold=1;/none", "guidance both or reuse"),
        ("full=1;/none", "guidance both or reuse"),
        ("decoder=1;", "only full and hold have a fit"),
        ("shallow:2=1;", "only full and hold have a fit"),
        ("decoder:sample=1;", "got 'decoder:sample=1;'"),
        ("hold=;1", "got 'hold=;1'"),
        ("hold=1;|1;1", "a combination has 1 to 8 numbers"),
        ("hold=" + ",".join(["1"] * 9) + ";", "a step of a plan is"),
        ("hold=" + "|".join(["1;"] * 513), "a step of a plan is"),
        ("hold=10001;", "at most 10000"),
        ("hold=1;" + "9" * 10**6, "a step of a plan is"),
        ("hold=" + "1,1;1|" * 10**5, "a step of a plan is"),
        ("hold/reuse*0.5", "only full/reuse has a weight of guidance"),
        ("full*0.5", "a step of a plan is"),
        ("full/none*0.5", "only full/reuse has a weight of guidance"),
        ("full/reuse*10.1", "a weight of guidance must be a number of 0 to 10, got 10.1"),
        ("full/reuse*-1", "a step of a plan is"),
    ],
    ids=range(21),
)
def test_steps_that_are_none_are_refused(token: str, words: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(words)):
        Step.parse(token)


def test_values_of_the_wrong_kind_are_refused() -> None:
    for options in ({"fit": "1;"}, {"fit": 1.0}, {"fit": Combination(((1.0,),), ((),)), "weights": (1.0,)}):
        with pytest.raises(ConfigurationError, match="which is a Combination"):
            Step("hold", **options)
    assert Step(guidance="reuse", guidance_weight=np.float32(0.5)) == Step.parse("full/reuse*0.5")
    for weight in (float("nan"), -0.1, 11, True, "1"):
        with pytest.raises(ConfigurationError, match="a weight of guidance must be a number of 0 to 10"):
            Step(guidance="reuse", guidance_weight=weight)


def test_presets_and_guidance_make_the_plans_that_they_name() -> None:
    assert str(Preset.parse("hold:3@2").for_steps(7)) == "full hold@2 hold@2 full hold@2 hold@2 full"
    assert str(Preset.parse("hold:3").for_steps(35)).startswith("full hold hold full")
    assert str(Preset.parse("hold:3").for_steps(36)).startswith("full hold@1 hold@1 full")
    elsewhere = Preset.parse("hold:3").for_model(None)  # no U-Net
    assert str(elsewhere) == "hold:3" and str(elsewhere.for_steps(17)).startswith("full hold hold full")
    assert str(elsewhere.for_steps(18)).startswith("full hold@1 hold@1 full") and elsewhere.kinds().orders("hold") == 1
    assert Preset.parse("hold:3").for_model(1).for_steps(18) == Preset.parse("hold:3").for_steps(18)
    assert Preset.parse("shallow:2,1").kinds().highest_order == 1
    assert str(Preset.parse("hold:2,epsilon@0").for_steps(3)) == "full hold:epsilon full"
    assert str(Preset.parse("deepcache:2,4@1").for_steps(3)) == "full shallow:5@1 full"
    assert [branch_depth(b, 2) for b in range(6)] == [1, 2, 3, 4, 5, 6]
    assert [branch_depth(b, 1) for b in range(6)] == [1, 2, 2, 3, 4, 4]
    plan = GuidanceRule.parse("interval:0.3-0.8").applied(Preset.parse("full").for_steps(4), [0.9, 0.6, 0.4, 0.1])
    assert str(plan) == "full/none full full full/none"
    assert Reuse.parse("deepcache:3,1,guidance=reuse:2") == Reuse(plan="deepcache:3,1", guidance="reuse:2")
    assert Reuse.parse("plan=hold:3@1") == Reuse(plan="hold:3@1")
    weighted = "steps:full hold=0.9 full hold:sample=1.2,-0.1 hold=0.5"
    assert Reuse.parse(f"{weighted},stretch=true") == Reuse(plan=weighted, stretch=True)


def test_deepcache_pow_places_steps_as_the_package_does() -> None:
    plan = Preset.parse("deepcache-pow:5,15,1.4").for_steps(50)
    assert [i for i, s in enumerate(plan.steps) if s.mode == "full"] == [0, 5, 9, 13, 17, 21, 26, 31, 37, 43]
    assert (
        str(Preset.parse("deepcache-pow:3,2,1.2,4@1").for_steps(6))
        == "full shallow:5@1 full shallow:5@1 shallow:5@1 shallow:5@1"
    )
    spec = importlib.util.find_spec("DeepCache")
    if spec is None or spec.origin is None:
        pytest.skip("DeepCache is not installed")
    source = ast.parse((Path(spec.origin).parent / "sd/pipeline_stable_diffusion.py").read_text())
    of_the_package: dict[str, Any] = {"np": np}
    function = next(n for n in source.body if getattr(n, "name", "") == "sample_from_quad_center")
    exec(ast.unparse(function), of_the_package)  # its module itself does not work with this diffusers
    for total, interval, center, power in itertools.product(
        (10, 25, 50, 100), (2, 3, 5), (0, 7, 15, 40), (1.2, 1.4, 2.0)
    ):
        preset = Preset.parse(f"deepcache-pow:{interval},{center},{power}")
        try:
            with np.errstate(all="ignore"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                slow = -(-total // interval)
                want = {int(i) for i in of_the_package["sample_from_quad_center"](total, slow, center, power)[0]}
        except ValueError:
            want = None
        if want is None or center >= total:
            with pytest.raises(ConfigurationError, match="lower center"):
                preset.for_steps(total)
        else:
            assert {i for i, step in enumerate(preset.for_steps(total).steps) if step.mode == "full"} == want


def test_a_plan_still_has_its_old_names() -> None:
    plan = Plan.parse(tokens="full hold@1 shallow:2 hold:epsilon@2")
    assert plan.depths == {2} and plan.highest_order == 2
    assert plan.spaces == {"": 1, "epsilon": 2} and plan.orders("hold") == 2 and plan.orders("shallow", 2) == 0
    assert not hasattr(plan, "depth")
    with pytest.raises(ConfigurationError, match="tokens is the old name of text; give one of them"):
        Plan.parse(text="full", tokens="full")
    with pytest.raises(TypeError, match="token"):
        Plan.parse(token="full")
