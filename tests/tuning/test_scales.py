"""Several guidance scales in one search: which image has which, and that each is drawn and repeated with its own."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusion_accel import ConfigurationError
from diffusion_accel.measure.sampler import Sampler
from diffusion_accel.reuse.plan_file import TunedPlan
from diffusion_accel.tuning.recording import record
from diffusion_accel.tuning.replay import Replay
from diffusion_accel.tuning.request import held_out, parts
from diffusion_accel.tuning.solver import tune_solver
from diffusion_accel.tuning.together import ALONE, Together
from diffusion_accel.tuning.tuner import tune

from .test_by_rollouts import PROMPTS, dit

SCALES = (1.0, 2.0, 4.0)


def sampler(pipe: Any, scales: Any, steps: int = 4) -> Sampler:
    return Sampler(pipe, tuple(PROMPTS[: len(scales)]), steps, 3, 8, {}, scales=tuple(scales))


@given(st.lists(st.sampled_from(SCALES), max_size=12), st.integers(1, 5))
def test_a_call_is_of_one_scale(scales: list[float], batch: int) -> None:
    own = Sampler(None, ("",) * len(scales), 4, batch=batch, scales=tuple(scales))  # type: ignore[arg-type]
    chunks = list(own.chunks())
    assert [i for start, end in chunks for i in range(start, end)] == list(range(len(scales)))
    assert all(len({*scales[start:end]}) == 1 and end - start <= batch for start, end in chunks)
    assert all(b[1] - a[0] > batch or scales[a[0]] != scales[b[0]] for a, b in itertools.pairwise(chunks))


@given(st.integers(6, 60), st.lists(st.floats(0, 9), min_size=1, max_size=3, unique=True), st.integers(1, 3))
def test_every_half_has_every_scale(count: int, scales: list[float], size: int) -> None:
    whole = Sampler(None, tuple(map(str, range(count))), 4, options={"guidance_scale": scales, "eta": 0.5})  # type: ignore[arg-type]
    if len(scales) > min((count - held_out(count)) // 2, held_out(count)):
        with pytest.raises(ConfigurationError, match="guidance scales are too many"):
            parts(whole, ALONE)
        return
    calibration, heldout = parts(whole, ALONE)
    half = len(calibration.prompts) // 2
    for part in (calibration.scales[:half], calibration.scales[half:], heldout.scales):
        counts = [part.count(scale) for scale in scales]
        assert min(counts) >= 1 and max(counts) - min(counts) <= 1 and sum(counts) == len(part)
    assert calibration.options == {"eta": 0.5} and calibration.arguments["guidance_scale"] == sorted(scales)
    mine = Together(0, size).part(calibration)
    assert mine.scales == calibration.scales[::size] and mine.prompts == calibration.prompts[::size]


def test_one_negative_prompt_is_for_all_images(sticker: Any) -> None:
    own = Sampler(sticker, ("a", "b"), 2, options={"negative_prompt": "c", "height": 32, "width": 32})
    each = replace(own, options=own.options | {"negative_prompt": ["c", "c"]})
    without = replace(own, options=own.options | {"negative_prompt": None})
    with torch.inference_mode():
        assert torch.equal(own.images(), each.images()) and not torch.equal(own.images(), without.images())


def test_each_image_is_drawn_and_repeated_with_its_own_scale() -> None:
    pipe, scales = dit(), (1.0, 1.0, 4.0, 4.0, 2.0)
    with torch.inference_mode():
        own = sampler(pipe, scales)
        recording, images = record(own)
        assert recording.reason == "" and recording.branches == (1, 0)
        for i, scale in enumerate(scales):
            alone = replace(own.part(i, i + 1), scales=(), options={"guidance_scale": scale})
            one, image = record(alone)
            torch.testing.assert_close(image[0], images[i], rtol=1e-4, atol=1e-4)
            x, time = recording.latents[1], recording.times[1]
            said, added, _ = Replay(recording).apart(x[[i]], time, [i])
            torch.testing.assert_close(said, Replay(one)(x[[i]], time, [0]), rtol=1e-4, atol=1e-4)
            assert added is not None and (float(added.abs().max()) < 1e-4) == (scale == 1)
        together = Replay(recording).apart(x, time, range(5))[1]
        assert together is not None and torch.allclose(together[[4]], added, atol=1e-4)
        plain, _ = record(sampler(pipe, (1.0, 1.0)))
        assert plain.branches is None


def test_plans_and_solvers_say_for_which_scales_they_are() -> None:
    pipe = dit()
    call: dict[str, Any] = {"seconds": 0, "guidance_scale": [4, 1]}
    plan = tune(pipe, PROMPTS, steps=6, speedup=1.5, **call)
    assert isinstance(plan, TunedPlan)
    assert plan.conditions["call"]["guidance_scale"] == [1, 4] and plan.measured["pictures"] == 3
    assert plan.search["method"] == "rollouts"
    solver = tune_solver(pipe, PROMPTS, 2, steps=4, towards="baseline", **call)
    assert solver.config.made_for["guidance_scale"] == [1, 4]
    for wrong, words in (
        ([], "got none"),
        ([2, "x"], "guidance_scale must be"),
        ([1, 2, 3, 4], "4 guidance scales are"),
    ):
        with pytest.raises(ConfigurationError, match=words):
            tune(pipe, PROMPTS, steps=6, **{**call, "guidance_scale": wrong})
