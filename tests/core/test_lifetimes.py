"""Who keeps what alive, and what is said to be lost: pipelines that are freed, saved, converted."""

from __future__ import annotations

import functools
import gc
import logging
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from laws import Stop, default, kind_for, stop_at
from zoo import flux, run, sd

from diffusion_accel import AccelerationError, CallStateError, Reuse, accelerate, switchboard
from diffusion_accel.registry import all_features

KINDS = [pytest.param(kind_for(f), f, id=f.name) for f in all_features()] + [
    pytest.param(flux, Reuse, id="diffusers-cache")
]
each_kind = pytest.mark.parametrize(("build", "feature"), KINDS)


def set_for(build: Any, feature: Any) -> Any:
    return Reuse(plan="first-block") if build is flux else default(feature)


@pytest.mark.sampled(4)
@each_kind
@pytest.mark.parametrize("fails", [False, True], ids=["", "failed"])
def test_a_pipeline_is_freed_with_its_last_user(build: Callable[[], Any], feature: Any, fails: bool) -> None:
    """Not only at the next garbage collection, which knows nothing of memory on other devices."""
    pipe, call = build()
    accelerate(pipe, set_for(build, feature))
    handle = pipe.acceleration
    gc.collect()
    gc.disable()
    try:
        if fails:
            with pytest.raises(Stop) as failed:
                run(pipe, call, 4, callback_on_step_end=stop_at(1, Stop))
            del failed
        else:
            run(pipe, call, 4)
        denoiser = weakref.ref(pipe.unet if build is not flux else pipe.transformer)
        del pipe
        assert denoiser() is None
    finally:
        gc.enable()
    assert list(handle.features) == [set_for(build, feature).name]
    with pytest.raises(CallStateError, match="does not exist any more"):
        handle.remove()


def test_the_models_of_a_call_are_claimed_whatever_is_around_them() -> None:
    """A second pipeline with the same U-Net, here around its compiled form, is refused while a call runs."""
    pipe, call = sd()
    other, _ = sd()
    other.unet = torch.compile(pipe.unet, backend="eager")
    accelerate(pipe, Reuse())
    accelerate(other, Reuse())

    def callback(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        with pytest.raises(AccelerationError, match="in use by a pipeline call"):
            run(other, call, 2)
        return values

    run(pipe, call, 2, callback_on_step_end=callback)
    assert not switchboard._busy


def test_what_converting_loses_is_said(tmp_path: Any, caplog: Any) -> None:
    from diffusers import AutoPipelineForImage2Image, StableDiffusionImg2ImgPipeline
    from zoo import unet2d

    from diffusion_accel.pipelines import AcceleratedStableDiffusionImg2ImgPipeline  # type: ignore[attr-defined]

    again = "accelerate(other, *pipe.acceleration.features.values())"
    small, small_call = unet2d()
    base = run(small, small_call, 2)
    accelerate(small, Reuse(plan="hold:3"))
    pipe, call = sd()
    accelerate(pipe, Reuse(plan="hold:3"))

    def said(doing: Callable[[], Any]) -> tuple[Any, list[str]]:
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="diffusion_accel"):
            made = doing()
        return made, [r.getMessage() for r in caplog.records if r.name.startswith("diffusion_accel")]

    _, told = said(lambda: small.save_pretrained(tmp_path))
    assert not told and (tmp_path / "acceleration.json").is_file()
    loaded = type(small).from_pretrained(tmp_path)
    assert torch.equal(run(loaded, small_call, 2), base) and not loaded.acceleration.features
    for converter in (AutoPipelineForImage2Image, StableDiffusionImg2ImgPipeline):
        other, told = said(functools.partial(converter.from_pipe, pipe))
        assert type(other) is StableDiffusionImg2ImgPipeline
        assert len(told) == 1 and "(reuse) do not come along: diffusers' from_pipe makes a plain one" in told[0]
        assert told[0].endswith(again)
    accelerate(other, *pipe.acceleration.features.values())
    assert other.acceleration.features == pipe.acceleration.features
    ours = AcceleratedStableDiffusionImg2ImgPipeline
    other, told = said(lambda: ours.from_pipe(pipe))
    assert not told and other.acceleration.features == pipe.acceleration.features
    assert not ours.from_pipe(pipe, reuse=False).acceleration.features
    _, told = said(lambda: (pipe.config, pipe.components, run(pipe, call, 2)))
    assert not told
    pipe.acceleration.remove()
    assert not said(lambda: AutoPipelineForImage2Image.from_pipe(pipe))[1]


def test_what_measures_a_pipeline_leaves_its_switches() -> None:
    from diffusion_accel.measure.comparison import compare_calls
    from diffusion_accel.reuse.plan import Plan
    from diffusion_accel.tuning.measure import reusing

    pipe, _ = sd()
    accelerate(pipe, Reuse(plan="hold:3"))
    pipe.acceleration.disable("reuse")
    with reusing(pipe, Plan.parse("full hold")):
        assert pipe.acceleration.enabled("reuse")
    assert pipe.acceleration.features["reuse"] == Reuse(plan="hold:3") and not pipe.acceleration.enabled("reuse")
    pipe.acceleration.enable()
    pipe.acceleration.count_flops = True

    def stopped(pipe: Any) -> Any:
        raise Stop

    with pytest.raises(Stop):
        compare_calls(pipe, stopped)
    assert pipe.acceleration.count_flops and pipe.acceleration.enabled("reuse")
