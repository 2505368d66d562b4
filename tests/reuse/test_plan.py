"""Plans, presets and rules of guidance as data."""

from __future__ import annotations

import ast
import importlib.util
import itertools
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reuse_tools import PLANS

from diffusion_accel import ConfigurationError, Reuse
from diffusion_accel.reuse.guidance import GuidanceRule
from diffusion_accel.reuse.plan import Plan
from diffusion_accel.reuse.preset import Preset, branch_depth


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


def test_presets_and_guidance_make_the_plans_that_they_name() -> None:
    assert str(Preset.parse("hold:3@2").for_steps(7)) == "full hold@2 hold@2 full hold@2 hold@2 full"
    assert str(Preset.parse("hold:3").for_steps(35)).startswith("full hold hold full")
    assert str(Preset.parse("hold:3").for_steps(36)).startswith("full hold@1 hold@1 full")
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
