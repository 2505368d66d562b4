"""The feature: what it refuses, and plans for a part of the steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reuse_tools import counters, reused
from zoo import ZOO, dit, sd

from diffusion_accel import AccelerationError, ConfigurationError, Reuse, accelerate
from diffusion_accel.reuse.plan import Plan


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"plan": "hold:0"}, "hold:n"),
        ({"plan": "hold:2@4"}, "@ORDER"),
        ({"plan": "shallow:2"}, "shallow:n,depth"),
        ({"plan": "shallow:2,0"}, "shallow:n,depth"),
        ({"plan": "steps:hold full"}, "first step"),
        ({"plan": "steps:full fuller"}, "fuller"),
        ({"plan": "steps:"}, "at least one"),
        ({"plan": "steps:full full=1"}, "only hold takes weights"),
        ({"plan": "steps:full hold=1,2,3,4,5"}, "hold=1,2,3,4,5"),
        ({"plan": "steps:full hold=1e9"}, "hold=1e9"),
        ({"plan": "steps:full hold=" + "9" * 400}, "a weight of hold must be at most 10000"),
        ({"plan": "steps:full hold=10001"}, "at most 10000"),
        ({"plan": f"steps:full shallow:{10**22}"}, "depth of a shallow step must be at most 1000"),
        ({"plan": "steps:" + "full " * 10**5}, "at most 10000 steps, got 100000"),
        ({"plan": f"hold:{10**8}"}, "at most 10000"),
        ({"plan": "hold:" + "9" * 5000}, "unknown reuse plan"),
        ({"plan": "deepcache:3,9999"}, "and 1000"),
        ({"plan": "deepcache-pow:5,15,1"}, "deepcache-pow:n,center,power"),
        ({"plan": "deepcache-pow:5,15,1e9"}, "deepcache-pow:n,center,power"),
        ({"plan": "first-block:1e999"}, "first-block:threshold"),
        ({"plan": "first-block:" + "9" * 400}, "at most 10"),
        ({"plan": "taylorseer:2,99"}, "at most 1000 and 4"),
        ({"guidance": "reuse:\u00b2"}, "reuse:n"),
        ({"guidance": f"reuse:{10**9}"}, "reuse:n"),
        ({"stretch": "no"}, "true or false"),
        ({"guidance": "reuse:0"}, "reuse:n"),
        ({"guidance": "interval:0.8-0.2"}, "interval:low-high"),
        ({"max_group_mb": 0}, "max_group_mb"),
        ({"plan": "balanced"}, "'balanced'; did you mean tuned:balanced\\? allowed"),
        ({"plan": "nowhere.json"}, "nowhere.json"),
        ({"plan": "tuned:nothing"}, "nothing"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        accelerate(sd()[0], Reuse(**options))


def test_plans_that_do_not_fit_are_refused() -> None:
    pipe, call = sd()
    with pytest.raises(AccelerationError, match="4 skip connections"):
        accelerate(pipe, Reuse(plan="shallow:2,5"))
    with pytest.raises(ConfigurationError, match="for 3 steps, this call has 6"):
        reused(pipe, call, "steps:full hold hold")
    reused(pipe, call, "steps:full hold hold", stretch=True)
    assert counters(pipe)["full_steps"] == 1
    pipe, call = dit()
    for plan, words in (("uniform:2", "not a U-Net"), ("shallow:2,4", "4 blocks")):
        with pytest.raises(AccelerationError, match=words):
            accelerate(pipe, Reuse(plan=plan))
    with pytest.raises(AccelerationError, match="one branch only"):
        accelerate(ZOO["unet2d"]()[0], Reuse(guidance="reuse:2"))
    pipe, call = ZOO["unet2d_skip"]()
    with pytest.raises(AccelerationError, match="SkipDownBlock2D"):
        accelerate(pipe, Reuse(plan="shallow:2,1"))


def test_a_part_of_the_steps_takes_that_part_of_the_plan() -> None:
    """img2img with a strength: the plan for as many steps as were asked for is followed from where the call begins."""
    pipe, call = ZOO["img2img"]()
    plan = "full hold full hold full/reuse hold@1 hold@1 full full hold"
    got = reused(pipe, call, f"steps:{plan}", steps=10, strength=0.6)
    assert counters(pipe) == counters(pipe) | {"full_steps": 3, "hold_steps": 3}
    tail = "full hold@1 hold@1 full full hold"  # nothing is known of the step before it
    assert torch.equal(got, reused(pipe, call, f"steps:{tail}", steps=10, strength=0.6))
    with pytest.raises(ConfigurationError, match=r"for 8 steps, this call has 6 of 10 \(its strength.*use 8 steps"):
        reused(pipe, call, "steps:full hold full hold full hold full hold", steps=10, strength=0.6)
    assert str(Plan.parse("full/none full/none hold full").part(1, 3)) == "full/none hold"
