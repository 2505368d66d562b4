"""Encoder reuse in calls of every kind: schedulers, parts of the steps, several passes, shared and replaced U-Nets."""

from __future__ import annotations

from typing import Any

import pytest
import reuse_tools
import torch
from diffusers.hooks import HookRegistry, ModelHook
from reuse_tools import close, counting
from zoo import ZOO, ddim, run, sd, sdxl, text, unet

from diffusion_accel import AccelerationError, CallStateError, EncoderReuse, accelerate
from diffusion_accel.reuse.schedule import key_steps


def counters(pipe: Any) -> dict[str, float]:
    return reuse_tools.counters(pipe, "encoder_reuse")


SCHEDULERS = sorted(ddim().compatibles, key=lambda c: c.__name__)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda c: c.__name__)
def test_every_compatible_scheduler(scheduler: Any) -> None:
    if scheduler.__name__ == "DPMSolverSDEScheduler":
        pytest.importorskip("torchsde", reason="DPMSolverSDEScheduler itself needs torchsde")
    pipe, call = sd()

    def eight_steps() -> torch.Tensor:
        # a new object each time: DPMSolverSDEScheduler carries its noise over from call to call
        seed = {"noise_sampler_seed": 0} if scheduler.__name__ == "DPMSolverSDEScheduler" else {}
        pipe.scheduler = scheduler.from_config(ddim().config, **seed)
        return run(pipe, call, steps=8)

    base = eight_steps()
    accelerate(pipe, EncoderReuse.neutral())
    assert torch.equal(eight_steps(), base)
    results = []
    for batched in (False, True):
        accelerate(pipe, EncoderReuse(schedule="uniform:4", batch_decoder=batched))
        results.append(eight_steps())
        assert counters(pipe)["encoder_runs"] == len(key_steps("uniform:4", pipe.acceleration.report().steps))
    assert close(*results)
    assert pipe.acceleration.report().steps == len(pipe.scheduler.timesteps)


def test_img2img_counts_from_its_own_first_step() -> None:
    pipe, call = ZOO["img2img"]()
    accelerate(pipe, EncoderReuse(schedule=(0, 2)))
    run(pipe, call, steps=10, strength=0.5)
    assert pipe.acceleration.report().steps == 5
    assert counters(pipe)["encoder_runs"] == 2


def test_sdxl_stopped_early_knows_its_length() -> None:
    pipe, call = sdxl()
    accelerate(pipe, EncoderReuse(schedule=(0, 3), batch_decoder=True))
    run(pipe, call, steps=10, denoising_end=0.5)
    report = pipe.acceleration.report()
    assert report.steps == counters(pipe)["decoder_steps"] < 10


def test_free_init_passes_over_the_timesteps_again() -> None:
    pipe, call = ZOO["animatediff"]()
    pipe.enable_free_init(num_iters=2)
    base = run(pipe, call, steps=4)
    accelerate(pipe, EncoderReuse.neutral())
    assert torch.equal(run(pipe, call, steps=4), base)
    accelerate(pipe, EncoderReuse(schedule=(0, 2)))
    run(pipe, call, steps=4)
    assert counters(pipe)["encoder_runs"] == 4, "two key steps in each of the two passes"


def test_cross_frame_attention_is_never_stacked() -> None:
    from diffusers.pipelines.deprecated.text_to_video_synthesis.pipeline_text_to_video_zero import (
        CrossFrameAttnProcessor2_0,
    )

    pipe, call = sd()
    pipe.unet.set_attn_processor(CrossFrameAttnProcessor2_0(batch_size=2))
    accelerate(pipe, EncoderReuse(schedule=(0, 2)))
    run(pipe, call)
    assert counters(pipe)["decoder_runs"] == counters(pipe)["decoder_steps"] == 6


def test_perturbed_attention_guidance() -> None:
    from diffusers import StableDiffusionPAGPipeline

    plain, call = sd()
    pipe = StableDiffusionPAGPipeline(**plain.components, requires_safety_checker=False, pag_applied_layers=["mid"])
    call = {**call, "pag_scale": 2.0}
    base = run(pipe, call)
    accelerate(pipe, EncoderReuse.neutral())
    assert torch.equal(run(pipe, call), base)
    results = []
    for batched in (False, True):
        accelerate(pipe, EncoderReuse(schedule=(0, 2), batch_decoder=batched))
        results.append(run(pipe, call))
    assert close(*results)


def test_two_pipelines_that_share_a_unet() -> None:
    from diffusers import StableDiffusionPipeline

    pipe, call = sd()
    other = StableDiffusionPipeline(**{**pipe.components, "scheduler": ddim()}, requires_safety_checker=False)
    base = run(other, call)
    accelerate(pipe, EncoderReuse())
    assert torch.equal(run(other, call), base), "a plain pipeline beside an accelerated one"
    accelerate(other, EncoderReuse())

    def nested(pipe: Any, i: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        with pytest.raises(CallStateError, match="has not ended"):
            run(other, call)
        return values

    first = run(pipe, call)
    assert torch.equal(run(pipe, call, callback_on_step_end=nested), first)
    assert torch.equal(run(other, call), first)


def test_a_thread_that_borrows_the_unet_is_refused() -> None:
    import threading

    pipe, call = sd()
    accelerate(pipe, EncoderReuse())
    errors: list[BaseException] = []

    def borrow() -> None:
        try:
            pipe.unet(torch.zeros(1, 4, 8, 8), 3, encoder_hidden_states=text()["prompt_embeds"])
        except CallStateError as error:
            errors.append(error)

    def in_thread(pipe: Any, i: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        if i == 1:
            thread = threading.Thread(target=borrow)
            thread.start()
            thread.join()
        return values

    first = run(pipe, call)
    assert torch.equal(run(pipe, call, callback_on_step_end=in_thread), first)
    assert len(errors) == 1
    borrow()
    assert len(errors) == 1, "outside a call the U-Net is plain"


def test_memory_is_freed_after_the_call() -> None:
    import gc
    import weakref

    pipe, call = sd()
    accelerate(pipe, EncoderReuse(schedule="uniform:3"))
    kept: list[weakref.ref] = []

    class Watch(ModelHook):
        def post_forward(self, module: Any, output: Any) -> Any:
            kept.append(weakref.ref(output))
            return output

    HookRegistry.check_if_exists_or_initialize(pipe.unet.conv_in).register_hook(Watch(), "watch")
    run(pipe, call)
    gc.collect()
    assert kept and all(ref() is None for ref in kept)


def test_a_key_step_beyond_the_run_is_refused_before_the_unet_runs() -> None:
    pipe, call = sd()
    accelerate(pipe, EncoderReuse(schedule=(0, 30)))
    with counting(pipe.unet.conv_in) as conv, pytest.raises(AccelerationError, match="beyond this run of 6 steps"):
        run(pipe, call)
    assert conv.calls == 0


def test_a_unet_replaced_by_something_else_is_refused_at_the_call() -> None:
    pipe, call = sd()
    accelerate(pipe, EncoderReuse())
    first = run(pipe, call)
    pipe.unet = unet()
    assert torch.equal(run(pipe, call), first), "another U-Net with equal weights just works"
    pipe.unet = torch.compile(pipe.unet)
    with pytest.raises(AccelerationError, match="compile_repeated_blocks"):
        run(pipe, call)


def test_regional_compilation_marks_are_respected() -> None:
    """`compile_repeated_blocks` compiles the transformer blocks inside the stages, which no hook touches."""
    pipe, call = sd()
    accelerate(pipe, EncoderReuse(schedule="uniform:3"))
    want = run(pipe, call)
    pipe.unet.compile_repeated_blocks(backend="eager")
    assert close(run(pipe, call), want)
