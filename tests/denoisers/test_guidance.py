"""The branches of guidance and the views of an image: which is which, and which can be left out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from diffusers import StableDiffusionPipeline
from zoo import rand, run, sd

from diffusion_accel import Reuse, UnsupportedPipelineError, accelerate


def test_two_images_with_equal_latents_are_not_two_branches() -> None:
    """CogView 4 calls its transformer once for each branch; each image of a batch is what it is by itself."""
    pipe, call = zoo.cogview4()
    two = {k: torch.cat([v, rand(*v.shape, seed=5)]) for k, v in call.items() if k.endswith("embeds")}
    latents = rand(1, 4, 8, 8, seed=9)
    for guidance in ("interval:0-0.1", "reuse:2"):
        accelerate(pipe, Reuse(plan="full", guidance=guidance))
        both = pipe(**{**call, **two}, latents=latents.repeat(2, 1, 1, 1), num_inference_steps=4).images
        for i in range(2):
            one = {k: v[i : i + 1] for k, v in two.items()}
            alone = pipe(**{**call, **one}, latents=latents, num_inference_steps=4).images
            assert torch.allclose(both[i : i + 1], alone, atol=1e-4)
        assert (both[0] - both[1]).abs().max() > 1e-3


def test_the_second_call_of_a_step_is_left_out() -> None:
    pipe, call = zoo.cogview4()
    counted: list[int] = []
    pipe.transformer.norm_out.register_forward_pre_hook(lambda module, args: counted.append(len(args[0])))
    base = run(pipe, call, steps=6)
    same = {"negative_prompt_embeds": call["prompt_embeds"]}
    equal = run(pipe, call, steps=6, **same)
    for plan, guidance, calls in (
        ("full", "reuse:3", 8),
        ("full", "interval:0-0", 6),
        ("steps:full full/reuse hold full hold/none full/none", "both", 6),
    ):
        counted.clear()
        accelerate(pipe, Reuse(plan=plan, guidance=guidance))
        got = run(pipe, call, steps=6)
        assert len(counted) == calls and not torch.equal(got, base)
        if plan == "full":  # without a difference nothing is lost
            assert torch.allclose(run(pipe, call, steps=6, **same), equal, atol=1e-5)
    pipe.acceleration.remove()
    alone = run(pipe, call, steps=6, guidance_scale=1.0)
    accelerate(pipe, Reuse(plan="full", guidance="interval:0-0"))
    assert torch.allclose(run(pipe, call, steps=6), alone, atol=1e-5)


def test_branches_that_cannot_be_left_out_are_refused_before_anything_runs() -> None:
    from diffusers import StableDiffusionPAGPipeline
    from diffusers.pipelines.deprecated.text_to_video_synthesis.pipeline_text_to_video_zero import (
        CrossFrameAttnProcessor2_0,
    )

    plain, _ = sd()
    accelerate(sd()[0], Reuse(guidance="reuse:2"))
    crossed, _ = sd()
    crossed.unet.set_attn_processor(CrossFrameAttnProcessor2_0(batch_size=2))
    with pytest.raises(UnsupportedPipelineError, match="other rows"):
        accelerate(crossed, Reuse(guidance="reuse:2"))
    distilled = zoo._sd(StableDiffusionPipeline, zoo.unet(time_cond_proj_dim=8))
    with pytest.raises(UnsupportedPipelineError, match="distilled"):
        accelerate(distilled, Reuse(guidance="reuse:2"))
    pipe = StableDiffusionPAGPipeline(**plain.components, requires_safety_checker=False)
    for feature in (Reuse(plan="full", guidance="interval:0-0.1"), Reuse(plan="steps:full hold full/reuse")):
        with pytest.raises(UnsupportedPipelineError, match="more than an unconditional and a conditional half"):
            accelerate(pipe, feature)
    accelerate(pipe, Reuse(plan="hold:2"))


@pytest.mark.parametrize("build", [zoo.dit, zoo.aura_flow, zoo.sd3, zoo.deepfloyd_if])
def test_the_unconditional_branch_is_known_in_either_order(build: Any) -> None:
    """Without guidance everywhere is what a scale of 1 draws; a wrong half would draw the negative prompt."""
    pipe, call = build()
    call["guidance_scale"] = 30.0
    plain = run(pipe, call, steps=3)
    alone = run(pipe, call, steps=3, guidance_scale=1.0)
    accelerate(pipe, Reuse(plan="full", guidance="interval:0.9991-0.9992"))
    assert (run(pipe, call, steps=3) - alone).abs().max() < 0.01 * (plain - alone).abs().max()
    accelerate(pipe, Reuse(plan="full", guidance="reuse:2"))
    run(pipe, call, steps=3)
    assert pipe.acceleration.report().counters["reuse"]["unguided_steps"] == 1
    run(pipe, call, steps=3, guidance_scale=1.0)
    assert pipe.acceleration.report().counters["reuse"].get("unguided_steps", 0) == 0


def test_panorama_reuses_by_view() -> None:
    pipe, call = zoo.panorama()
    counted: list[int] = []
    pipe.unet.conv_in.register_forward_pre_hook(lambda module, args: counted.append(len(args[0])))
    base = run(pipe, call, steps=4)
    views = len(counted) // 4
    assert views == 3
    accelerate(pipe, Reuse(plan="full"))
    assert torch.equal(run(pipe, call, steps=4), base)
    counted.clear()
    accelerate(pipe, Reuse(plan="steps:full hold full hold"))
    got = run(pipe, call, steps=4)
    report = pipe.acceleration.report()
    assert report.steps == 4 and len(counted) == 2 * views
    assert report.counters["reuse"]["full_steps"] == report.counters["reuse"]["reused_steps"] == 2
    pipe.acceleration.remove()
    forward, calls, kept = pipe.unet.forward, [], {}

    def held(*args: Any, **kwargs: Any) -> Any:
        step, view = divmod(len(calls), views)
        calls.append(step)
        if step % 2 == 0:
            kept[view] = forward(*args, **kwargs)
        return kept[view]

    pipe.unet.forward = held
    assert torch.equal(run(pipe, call, steps=4), got)
    with pytest.raises(UnsupportedPipelineError, match="in turn"):
        accelerate(pipe, Reuse(guidance="reuse:2"))


def test_a_loop_in_which_nothing_is_reused_says_so(caplog: Any) -> None:
    class Twice(StableDiffusionPipeline):
        """Begins anew before every step."""

        def __call__(self, steps: int) -> torch.Tensor:
            x = rand(1, 4, 8, 8)
            for _ in range(steps):
                self.scheduler.set_timesteps(steps)
                t = self.scheduler.timesteps[0]
                x = self.scheduler.step(self.unet(x, t, zoo.text()["prompt_embeds"]).sample, t, x).prev_sample
            return x

    plain, _ = sd()
    pipe = accelerate(Twice(**plain.components, requires_safety_checker=False), Reuse(plan="hold:2"))
    with torch.no_grad():
        pipe(4)
    assert "every step was computed" in caplog.text
