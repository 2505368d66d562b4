"""Encoder reuse: exact identities, counted work, and an independent loop as the oracle."""

from __future__ import annotations

from typing import Any

import encoder_oracle as oracle
import pytest
import reuse_tools
import torch
from diffusers.hooks import HookRegistry, ModelHook
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reuse_tools import close, counting
from zoo import ZOO, Built, rand, run, sd, sdxl

from diffusion_accel import EncoderReuse, accelerate
from diffusion_accel.reuse.schedule import key_steps


def counters(pipe: Any) -> dict[str, float]:
    return reuse_tools.counters(pipe, "encoder_reuse")


VIDEO_AND_IMAGE = pytest.mark.parametrize("kind", ZOO)


@pytest.mark.sampled(4)
@VIDEO_AND_IMAGE
def test_sequential_and_batched_decoders_agree(kind: str) -> None:
    pipe, call = ZOO[kind]()
    results = []
    for batched in (False, True):
        accelerate(pipe, EncoderReuse(schedule="uniform:3", batch_decoder=batched))
        results.append(run(pipe, call, steps=7))
    assert close(*results, tolerance=3e-5), (results[0] - results[1]).abs().max()
    assert counters(pipe)["decoder_runs"] < counters(pipe)["decoder_steps"]


@pytest.mark.sampled(4)
@VIDEO_AND_IMAGE
@pytest.mark.parametrize("batched", [False, True], ids=["sequential", "batched"])
def test_work_is_really_skipped(kind: str, batched: bool) -> None:
    pipe, call = ZOO[kind]()
    with counting(pipe.unet.down_blocks[0].resnets[0]) as plain:
        run(pipe, call, steps=6)
    accelerate(pipe, EncoderReuse(schedule=(0, 2), batch_decoder=batched))
    with counting(pipe.unet.down_blocks[0].resnets[0]) as encoder, counting(pipe.unet.conv_out) as decoder:
        run(pipe, call, steps=6)
    report = pipe.acceleration.report()
    keys = len(key_steps((0, 2), report.steps))
    assert encoder.calls == counters(pipe)["encoder_runs"] == keys
    assert encoder.rows * report.steps == plain.rows * keys
    assert decoder.rows * 1 == plain.rows, "the decoder computes every step once"
    assert counters(pipe)["decoder_steps"] == report.steps
    assert counters(pipe)["full_steps"] + counters(pipe)["reused_steps"] == report.steps
    assert counters(pipe)["peak_cache_bytes"] > 0


@pytest.mark.sampled(3)
@pytest.mark.parametrize("build", [sd, sdxl], ids=["sd", "sdxl"])
@pytest.mark.parametrize("batched", [False, True], ids=["sequential", "batched"])
@pytest.mark.parametrize("keys", [(0,), (0, 1, 2, 5), (0, 4), tuple(range(8))], ids=str)
def test_it_equals_a_loop_that_calls_the_blocks_by_hand(build: Any, batched: bool, keys: tuple[int, ...]) -> None:
    pipe, call = build()
    latents = rand(1, 4, 8, 8, seed=9)
    accelerate(pipe, EncoderReuse(schedule=keys, batch_decoder=batched))
    got = run(pipe, {**call, "height": 16, "width": 16}, steps=8, latents=latents.clone())
    embeds = torch.cat([call["negative_prompt_embeds"], call["prompt_embeds"]])
    added = None
    if build is sdxl:
        pooled = torch.cat([call["negative_pooled_prompt_embeds"], call["pooled_prompt_embeds"]])
        added = {"text_embeds": pooled, "time_ids": torch.tensor([[16.0, 16, 0, 0, 16, 16]] * 2)}
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    want = oracle.sample(pipe.unet, scheduler, latents, embeds, call["guidance_scale"], 8, set(keys), added)
    assert close(got, want)


def test_a_non_key_prediction_does_not_see_the_latents() -> None:
    """Latents changed by a callback before a non-key step must not change that step's prediction."""
    pipe, call = sd()
    predictions: list[torch.Tensor] = []

    class Record(ModelHook):
        def post_forward(self, module: Any, output: Any) -> Any:
            predictions.append(output[0].clone())
            return output

    def disturb(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        return {"latents": values["latents"] + (10.0 if index == 3 else 0.0)}  # seen by step 4

    HookRegistry.check_if_exists_or_initialize(pipe.unet).register_hook(Record(), "record")
    for batched in (False, True):
        accelerate(pipe, EncoderReuse(schedule=(0, 2, 6), batch_decoder=batched))
        # the recording hook is inside ours, so it sees what the U-Net computes
        predictions.clear()
        plain = run(pipe, call, steps=8)
        before = list(predictions)
        predictions.clear()
        disturbed = run(pipe, call, steps=8, callback_on_step_end=disturb)
        assert not torch.equal(plain, disturbed), "the disturbance must reach the result"
        if batched:
            continue
        assert all(torch.equal(a, b) for a, b in zip(before[:6], predictions[:6], strict=True))
        assert not torch.equal(before[6], predictions[6]), "the key step sees it"
    pipe.unet._diffusers_hook.remove_hook("record")


def test_callbacks_and_previews_see_true_intermediate_latents() -> None:
    pipe, call = sd()
    seen: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    for batched in seen:
        accelerate(pipe, EncoderReuse(schedule=(0, 4), batch_decoder=batched))

        def note(pipe: Any, i: int, t: Any, values: dict[str, Any], into: list = seen[batched]) -> dict[str, Any]:
            into.append(values["latents"].clone())
            return values

        final = run(pipe, call, steps=8, callback_on_step_end=note)
        assert torch.equal(seen[batched][-1], final)
    assert len(seen[True]) == 8
    assert all(close(a, b) for a, b in zip(seen[True], seen[False], strict=True))
    assert len({tuple(x.flatten()[:4].tolist()) for x in seen[True]}) == 8


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(cap_kib=st.integers(1, 64), interval=st.integers(2, 8))
def test_the_group_cap_limits_memory_and_changes_nothing(cap_kib: int, interval: int) -> None:
    pipe, call = sd()
    accelerate(pipe, EncoderReuse(schedule=f"uniform:{interval}", batch_decoder=False))
    want = run(pipe, call, steps=9)
    feature = EncoderReuse(schedule=f"uniform:{interval}")
    object.__setattr__(feature, "max_group_mb", cap_kib / 1024)  # finer than the option, to exercise the split
    accelerate(pipe, feature)
    with counting(pipe.unet.conv_out) as out:
        got = run(pipe, call, steps=9)
    assert close(got, want)
    per_step = counters(pipe)["peak_cache_bytes"]
    largest = max(1, cap_kib * 1024 // per_step)
    assert out.rows == 18 and out.calls >= 9 / largest


@pytest.fixture(scope="module")
def sd_pipe() -> Built:
    return sd()


@settings(max_examples=20, deadline=None, derandomize=True)
@given(keys=st.sets(st.integers(1, 7)), batched=st.booleans())
def test_counts_for_any_key_steps(sd_pipe: Built, keys: set[int], batched: bool) -> None:
    pipe, call = sd_pipe
    schedule = tuple(sorted({0} | keys))
    accelerate(pipe, EncoderReuse(schedule=schedule, batch_decoder=batched))
    run(pipe, call, steps=8)
    c = counters(pipe)
    assert c["encoder_runs"] == c["full_steps"] == len(schedule)
    assert c["decoder_steps"] == 8 and c["reused_steps"] == 8 - len(schedule)
    assert c["decoder_runs"] == 8 if not batched else len(schedule) <= c["decoder_runs"] <= len(schedule) + 1
