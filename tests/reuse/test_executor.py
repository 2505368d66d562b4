"""The executor: every mode runs everywhere, skips what it says, and leaves no state from one call to the next."""

from __future__ import annotations

import contextlib
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from reuse_tools import PLANS, counted_calls, counters, reused
from zoo import ZOO, ddim, run, sd

from diffusion_accel import Reuse, accelerate


@pytest.mark.sampled(4)
@pytest.mark.parametrize("kind", [k for k in ZOO if k != "unet2d_skip"])
@pytest.mark.parametrize("plan", ["hold:2", "shallow:2,1", "shallow:3,2@2", "uniform:3@1"])
def test_every_mode_runs_everywhere_and_skips_what_it_says(kind: str, plan: str) -> None:
    pipe, call = ZOO[kind]()
    calls = {name: counted_calls(getattr(pipe.unet, name)) for name in ("conv_in", "mid_block", "conv_out")}
    first = reused(pipe, call, plan, steps=7)
    counted = counters(pipe)
    steps = pipe.acceleration.report().steps
    assert counted["full_steps"] + counted["reused_steps"] == steps
    assert len(calls["mid_block"]) == counted["full_steps"] < steps
    shallow = counted.get("shallow_steps", 0)
    assert len(calls["conv_in"]) == counted["full_steps"] + shallow
    assert len(calls["conv_out"]) == counted["decoder_runs"] + shallow
    assert counted["peak_cache_bytes"] > 0
    assert torch.equal(run(pipe, call, steps=7), first)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("scheduler", sorted(ddim().compatibles, key=lambda c: c.__name__), ids=lambda c: c.__name__)
def test_every_compatible_scheduler_with_every_mode(scheduler: Any) -> None:
    if scheduler.__name__ == "DPMSolverSDEScheduler":
        pytest.importorskip("torchsde", reason="DPMSolverSDEScheduler itself needs torchsde")
    pipe, call = sd()
    plan = "steps:full full hold@1 full/reuse hold@2 shallow:2@1 full decoder@1"

    def eight_steps(plan: str) -> torch.Tensor:
        seed = {"noise_sampler_seed": 0} if scheduler.__name__ == "DPMSolverSDEScheduler" else {}
        pipe.scheduler = scheduler.from_config(ddim().config, **seed)
        return reused(pipe, call, plan, steps=8, stretch=True)

    base, first = eight_steps("full"), eight_steps(plan)
    counted = counters(pipe)
    assert torch.isfinite(first).all() and not torch.equal(first, base)
    assert counted["full_steps"] + counted["reused_steps"] == pipe.acceleration.report().steps
    assert counted["hold_steps"] and counted["shallow_steps"] and counted["unguided_steps"]
    assert torch.equal(eight_steps(plan), first)


class Still(DDIMScheduler):
    """Stands still: the same timestep and the same latents at every step, so whatever is kept is exact."""

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        super().set_timesteps(num_inference_steps, device)
        self.timesteps = torch.full_like(self.timesteps, 500)
        self.seen: list[torch.Tensor] = []

    def step(self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, **more: Any) -> Any:
        self.seen.append(model_output)
        return DDIMSchedulerOutput(prev_sample=sample, pred_original_sample=sample)


@pytest.mark.parametrize("freeu", [False, True], ids=["", "freeu"])
@pytest.mark.parametrize(
    "kind", ["sd", "sd_batch", "sdxl", "controlnet", "t2i_adapter", "ip_adapter", "img2img", "unet3d"]
)
def test_what_is_kept_is_exact_where_nothing_moves(kind: str, freeu: bool) -> None:
    pipe, call = ZOO[kind]()
    if freeu:
        pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    pipe.scheduler = Still.from_config(pipe.scheduler.config)
    tokens = (
        "full shallow:1 decoder@1 hold@2 shallow:3@1 full decoder shallow:2 shallow:2/reuse full/reuse decoder/reuse"
    )
    accelerate(pipe, Reuse(plan=f"steps:{tokens} hold:epsilon hold:sample@1", stretch=True))
    run(pipe, call, steps=13)
    first, *others = pipe.scheduler.seen
    assert len(others) >= 4
    for other in others:
        assert (other - first).abs().max() <= 2e-5 * first.abs().max()


def test_the_unconditional_branch_is_really_left_out() -> None:
    pipe, call = sd()
    rows = counted_calls(pipe.unet.conv_out)
    reused(pipe, call, "full", guidance="reuse:3", steps=7)
    assert rows == [2, 1, 1, 2, 1, 1, 2]
    assert counters(pipe)["unguided_steps"] == 4
    assert torch.equal(
        reused(pipe, call, "full", guidance="reuse:3", guidance_scale=1.0), run(*sd(), guidance_scale=1.0)
    )


def test_repeated_blocks_are_compiled_once_for_all_modes() -> None:
    from torch._dynamo.utils import counters as compiled

    pipe, call = sd()
    plan = "steps:full hold@1 shallow:2 full decoder decoder@1 full hold@2"
    want = reused(pipe, call, plan, steps=8, batch_decoder=False)
    torch._dynamo.reset()
    compiled.clear()
    pipe.unet.compile_repeated_blocks(backend="eager", fullgraph=True)
    assert torch.allclose(run(pipe, call, steps=8), want, atol=1e-5)
    graphs = compiled["stats"]["unique_graphs"]
    assert torch.allclose(run(pipe, call, steps=8), want, atol=1e-5)
    assert compiled["stats"]["unique_graphs"] == graphs, "the second call compiles nothing"
    full = compiled["stats"]["unique_graphs"]
    torch._dynamo.reset()
    compiled.clear()
    pipe.acceleration.disable()
    run(pipe, call, steps=8)
    assert compiled["stats"]["unique_graphs"] == full, "reuse adds no graph to those of the plain model"
    torch._dynamo.reset()


FITTED = [
    "steps:full hold:sample=1,0.1;0.1|0.9,0;0|1,0;0.2|1,-0.1;0.1 full:epsilon=1,0.1;0.02 hold=0.9,0.1;0.1,0.1",
    "steps:full full=0.9;0.1 full/reuse*0.8 hold:epsilon=0.5,0.5; shallow:1 hold=1.1;0.1",
]
CALLS = st.fixed_dictionaries(
    {
        "plan": PLANS.map(lambda plan: f"steps:{plan}")
        | st.sampled_from(["hold:2", "deepcache:3", "uniform:2@1", *FITTED]),
        "steps": st.integers(1, 8),
        "scheduler": st.sampled_from(
            ["DDIMScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler", "DDPMScheduler"]
        ),
        "guidance_scale": st.sampled_from([1.0, 4.0]),
        "height": st.sampled_from([16, 24]),
        "num_images_per_prompt": st.sampled_from([1, 2]),
        "stop": st.none() | st.integers(0, 3),
        "enabled": st.sampled_from([True, True, False]),
    }
)


class Stop(Exception):
    pass


@pytest.mark.slow
@settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
)
@given(calls=st.lists(CALLS, min_size=2, max_size=4))
def test_every_result_equals_that_of_a_fresh_pipeline(calls: list[dict[str, Any]]) -> None:
    def one(pipe: Any, call: dict[str, Any], given: dict[str, Any], stopping: bool) -> torch.Tensor:
        changes = dict(given)
        name, stop, enabled = (changes.pop(key) for key in ("scheduler", "stop", "enabled"))
        pipe.scheduler = getattr(diffusers, name).from_config(ddim().config)
        accelerate(pipe, Reuse(plan=changes.pop("plan"), stretch=True))
        pipe.acceleration.enable() if enabled else pipe.acceleration.disable()

        def halt(pipe: Any, index: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
            if index == stop:
                raise Stop
            return kwargs

        if stopping and stop is not None:
            with contextlib.suppress(Stop):
                run(pipe, call, **changes, callback_on_step_end=halt)
        return run(pipe, call, **changes)

    pipe, call = sd()
    for changes in calls:
        assert torch.equal(one(pipe, call, changes, True), one(*sd(), changes, False))
