"""Cases: what goes wrong, and what it leaves behind."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import torch
import zoo
from case_tools import left_behind, parallel
from diffusers import EulerAncestralDiscreteScheduler

from diffusion_accel import accelerate
from diffusion_accel.errors import ConfigurationError
from diffusion_accel.parallel.agreement import DisagreementError
from diffusion_accel.parallel.group import PeerError


def different_arguments_are_named(rank: int, size: int) -> None:
    pipe, call = zoo.sd()
    other = rank == size - 1
    accelerate(pipe, parallel())

    def refused(what: str, change: dict[str, Any], steps: int = 3, seed: int = 0) -> None:
        try:
            zoo.run(pipe, call, steps=steps, seed=seed, **change)
        except DisagreementError as error:
            assert what in str(error) and f"rank {size - 1}" in str(error), error
            assert pipe.acceleration.enabled("patch_parallel") and not left_behind(pipe)
        else:
            raise AssertionError(f"{what} went unnoticed")

    refused("the latents", {}, seed=int(other))
    refused("the number of steps", {}, steps=3 + other)
    refused("the size or number of images", {"height": 16 + 8 * other, "width": 16})
    refused("the prompt", {"prompt_embeds": zoo.rand(1, zoo.TOKENS, zoo.DIM, seed=9 + other)})
    refused("the guidance scale", {"guidance_scale": 3.0 + other})
    scheduler = pipe.scheduler
    pipe.scheduler = type(scheduler).from_config(scheduler.config, beta_end=0.01 + 0.001 * other)
    refused("the scheduler", {})
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(scheduler.config)
    latents = zoo.rand(1, 4, 8, 8)
    refused("the latents after one step", {"latents": latents}, seed=int(other))
    pipe.scheduler = scheduler
    accelerate(pipe, parallel(mode="displaced", warmup=1 + other))
    refused("the features", {})
    accelerate(pipe, parallel())
    assert torch.isfinite(zoo.run(pipe, call)).all()


def an_exception_leaves_nothing(rank: int, size: int) -> None:
    pipe, call = zoo.sd()
    accelerate(pipe, parallel(mode="displaced", warmup=1))
    first = zoo.run(pipe, call, steps=4)

    def stop(pipe: Any, index: int, timestep: Any, values: Any) -> Any:
        if index == 2:
            raise KeyboardInterrupt
        return values

    try:
        zoo.run(pipe, call, steps=4, callback_on_step_end=stop)
    except KeyboardInterrupt:
        assert not left_behind(pipe)
    else:
        raise AssertionError("it was not interrupted")
    assert torch.equal(zoo.run(pipe, call, steps=4), first)


def impossible_requests_are_refused(rank: int, size: int) -> None:
    def refused(says: str, pipe: Any, call: Any, **settings: Any) -> None:
        accelerate(pipe, parallel(**settings))
        try:
            zoo.run(pipe, call)
        except ConfigurationError as error:
            assert says in str(error), error
            assert not left_behind(pipe)
        else:
            raise AssertionError(f"not refused: {says}")

    refused(f"was set to {size + 1} processes", *zoo.sd(), ranks=size + 1)
    pipe, call = zoo.sd()
    if size > 2:
        refused("too small", pipe, {**call, "height": 8, "width": 8})
    pipe, call = zoo.sd()
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    refused("FreeU", pipe, call)
    pipe, call = zoo.sd()
    pipe.fuse_qkv_projections(unet=False, vae=True)
    refused("fused", pipe, call)
    if size % 2:
        refused("even number", *zoo.sd(), cfg_parallel=True)


def a_lost_process(rank: int, size: int) -> None:
    """Run by itself: the last rank ends, or hangs, at the second step; the others end in bounded time."""
    how = os.environ["PATCH_LOST"]
    pipe, call = getattr(zoo, os.environ["PATCH_KIND"])()
    accelerate(pipe, parallel(mode=os.environ["PATCH_MODE"], warmup=1, timeout=5.0))

    def lost(pipe: Any, index: int, timestep: Any, values: Any) -> Any:
        if index == 1 and rank == size - 1:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(600)
        return values

    try:
        zoo.run(pipe, call, callback_on_step_end=lost)
    except PeerError as error:
        assert "does not answer" in str(error) and "\n" not in str(error), error
        assert not left_behind(pipe)
    else:
        raise AssertionError("nobody noticed")
    try:
        zoo.run(pipe, call)
    except PeerError as error:
        assert "start the job again" in str(error)
    else:
        raise AssertionError("a broken job goes on")
