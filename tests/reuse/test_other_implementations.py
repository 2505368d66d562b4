"""The engine against other implementations: the DeepCache package, encoder reuse, loops written out by hand."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler
from reuse_tools import reused
from zoo import ZOO, ddim, dit, rand, run, sd, sdxl

from diffusion_accel import AccelerationError, EncoderReuse, accelerate
from diffusion_accel.reuse.plan import Plan


@pytest.mark.sampled(4)
@pytest.mark.parametrize("build", [sd, sdxl], ids=["sd", "sdxl"])
@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"])
@pytest.mark.parametrize(("interval", "branch"), [(3, 0), (2, 1), (5, 2), (2, 3), (1, 0)])
def test_deepcache_equals_the_deepcache_package(build: Any, scheduler: str, interval: int, branch: int) -> None:
    deepcache = pytest.importorskip("DeepCache")
    pipe, call = build()
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    helper = deepcache.DeepCacheSDHelper(pipe)
    helper.set_params(cache_interval=interval, cache_branch_id=branch)
    helper.enable()
    want = run(pipe, call, steps=8)
    helper.disable()
    assert torch.equal(reused(pipe, call, f"deepcache:{interval},{branch}", steps=8), want)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", ["sd", "controlnet", "ip_adapter", "unet2d", "svd"])
@pytest.mark.parametrize("plan", ["faster-diffusion", "uniform:3", "full"])
def test_its_presets_equal_encoder_reuse_bit_for_bit(kind: str, plan: str) -> None:
    schedule = {"faster-diffusion": "paper", "full": "all"}.get(plan, plan)
    pipe, call = ZOO[kind]()
    accelerate(pipe, EncoderReuse(schedule=schedule))
    want = run(pipe, call, steps=9)
    pipe.acceleration.remove("encoder_reuse")
    assert torch.equal(reused(pipe, call, plan, steps=9), want)


def fit(values: list[tuple[float, torch.Tensor]], order: int, time: float) -> torch.Tensor:
    chosen = values[-(order + 1) :]
    known = np.stack([v.flatten() for _, v in chosen])
    powers = np.polyfit([t / 1000 for t, _ in chosen], known, len(chosen) - 1)
    result = np.array([np.polyval(p, time / 1000) for p in powers.T])
    return torch.tensor(result, dtype=torch.float32).view(chosen[0][1].shape)


def by_hand(pipe: Any, call: dict[str, Any], latents: torch.Tensor, plan: Plan) -> torch.Tensor:
    """A sampling loop without hooks: held predictions by numpy's polynomial fit, one guidance branch at a time."""
    scheduler, scale = ddim(), call["guidance_scale"]
    scheduler.set_timesteps(len(plan))
    x, known, gaps, guided = latents, [], [], True
    for t, step in zip(scheduler.timesteps, plan.steps, strict=True):
        time = float(t)

        if step.mode == "hold":
            if step.weights and len(step.weights) <= len(known):
                newest = [v for _, v in reversed(known)]
                without, given = (sum(w * v[i] for w, v in zip(step.weights, newest, strict=False)) for i in (0, 1))
            else:
                without, given = (fit([(k, v[i]) for k, v in known], step.order, time) for i in (0, 1))
        else:
            given = pipe.unet(x, t, encoder_hidden_states=call["prompt_embeds"]).sample
            if step.guidance == "both":
                without = pipe.unet(x, t, encoder_hidden_states=call["negative_prompt_embeds"]).sample
                gaps.append((time, without - given))
                if known and not guided:
                    known.clear()  # nothing was known of this branch
            else:
                without = given + (fit(gaps, step.order, time) if step.guidance == "reuse" else 0)
            known.append((time, (without, given)))
            guided = step.guidance != "none"
        x = scheduler.step(without + scale * (given - without), t, x).prev_sample
    return x


@pytest.mark.parametrize(
    "plan",
    [
        "full hold full hold@1 hold@1 full hold@2 hold@2",
        "full full full full hold@3 hold@3 full hold@2",
        "full hold=0.9 full hold=1.5,-0.4 hold=0.8 full hold=1.2,-0.1,-0.1 hold=0.5,0.5,0.2,-0.2",
        "full full/reuse full/reuse full full/reuse@1 hold@1 full hold",
        "full/none full/none full hold full/reuse hold@2 full/none full/none",
    ],
)
@torch.no_grad()
def test_held_predictions_and_reused_guidance_equal_a_loop_by_hand(plan: str) -> None:
    tokens = plan.replace("/reuse@1", "@1/reuse")
    pipe, call = sd()
    latents = rand(1, 4, 8, 8, seed=9)
    got = reused(pipe, call, f"steps:{tokens}", steps=8, latents=latents.clone(), height=16, width=16)
    want = by_hand(pipe, call, latents, Plan.parse(tokens))
    assert (got - want).abs().max() <= 3e-4 * want.abs().max()


KINDS = ("epsilon", "v_prediction", "sample")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("space", ["epsilon", "sample"])
def test_holding_noise_or_clean_sample_is_a_longer_step_of_ddim(kind: str, space: str) -> None:
    pipe, call = sd()
    pipe.scheduler = ddim(prediction_type=kind, timestep_spacing="trailing")  # every other of 8 steps is one of 4
    few = run(pipe, call, steps=4)
    held = reused(pipe, call, "steps:" + " ".join([f"full hold:{space}"] * 4), steps=8)
    assert (held - few).abs().max() <= 1e-3 * few.abs().max()


def test_spaces_need_a_scheduler_that_says_how_noise_was_added() -> None:
    pipe, call = ZOO["svd"]()
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.scheduler.register_to_config(prediction_type="unknown")
    with pytest.raises(AccelerationError, match="cannot be turned into noise"):
        reused(pipe, call, "hold:2,epsilon")


def test_guidance_over_an_interval_equals_calls_without_it() -> None:
    pipe, call = sd()
    assert not torch.equal(reused(pipe, call, "full", guidance="interval:0-0.5"), run(*sd()))
    never = reused(pipe, call, "full", guidance="interval:1-1")
    assert torch.allclose(never, run(*sd(), guidance_scale=1.0), atol=1e-4)
    assert torch.equal(reused(pipe, call, "full", guidance="interval:0-1"), run(*sd()))


@torch.no_grad()
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_shallow_steps_of_a_transformer_equal_a_loop_over_its_blocks(depth: int) -> None:
    pipe, call = dit()
    got = reused(pipe, call, f"shallow:2,{depth}@0", steps=4)
    blocks = list(pipe.transformer.transformer_blocks)
    first, end = (depth + 1) // 2, len(blocks) - depth // 2
    kept: list[torch.Tensor] = []
    pipe.acceleration.remove()
    count = 0

    class Inner(torch.nn.Module):
        def __init__(self, inner: list[torch.nn.Module]) -> None:
            super().__init__()
            self.inner = torch.nn.ModuleList(inner)

        def forward(self, hidden: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            nonlocal count
            count += 1
            if count % 2 == 0:
                return hidden + kept[-1]
            out = hidden
            for block in self.inner:
                out = block(out, **kwargs)
            kept.append(out - hidden)
            return out

    pipe.transformer.transformer_blocks = torch.nn.ModuleList(
        [*blocks[:first], Inner(blocks[first:end]), *blocks[end:]]
    )
    assert torch.allclose(run(pipe, call, steps=4), got, atol=1e-5)
