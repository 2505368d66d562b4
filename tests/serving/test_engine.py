"""An image that is served in batches is the one that is drawn alone; what ends one request ends no other."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from laws import traces
from serving_tools import (
    FOREVER,
    LATENTS,
    TIMEOUT,
    alone,
    generator,
    held,
    request,
    same,
    served,
    sharing,
    sticker,
    until_parked,
)

from diffusion_accel import Compiled, EncoderReuse, Reuse
from diffusion_accel.errors import (
    AccelerationError,
    CallStateError,
    ConfigurationError,
    EngineClosedError,
    QueueFullError,
    UnsupportedPipelineError,
)
from diffusion_accel.generation.drawing import prepare
from diffusion_accel.serving.engine import Engine


@pytest.fixture(scope="module")
def pipe() -> Any:
    return sticker()


@pytest.fixture
def engine(pipe: Any) -> Iterator[Engine]:
    with Engine(pipe, running=4, queue=4, wait=FOREVER) as made:
        yield made


# ---------------------------------------------------------------------- the same images
MIXTURES = {
    "requests": [
        ({"prompt": "rocket, flat style"}, {}),
        ({"steps": 5, "guidance_scale": 1.0}, {}),
        ({"count": 2, "guidance_scale": 7.5}, {}),
        ({"steps": 4, "negative_prompt": "blue"}, {}),
    ],
    "schedulers": [({}, {"scheduler": name}) for name in ("ddim", "euler-a", "heun", "dpm++-sde")],
    "sizes": [({"width": width}, {}) for width in (48, 64, 48)],
    "plans": [
        ({"steps": 6}, {}),
        ({"steps": 6}, {"features": [Reuse(plan="hold:2")]}),
        ({"steps": 6}, {"features": [Reuse(plan="hold:3", guidance="reuse:2")]}),
        ({"steps": 6}, {"features": [Reuse(plan="steps:full full hold=1.5,-0.5 full/reuse hold:sample@1 full")]}),
    ],
    "inside": [
        ({"steps": 6}, {}),
        ({"steps": 6}, {"features": [EncoderReuse()]}),
        ({"steps": 6}, {"features": [Reuse(plan="deepcache:3")]}),
    ],
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("kind", MIXTURES)
def test_mixtures(pipe: Any, engine: Engine, kind: str) -> None:
    asked = [(request(seed, **changes), more) for seed, (changes, more) in enumerate(MIXTURES[kind])]
    found = served(engine, asked)
    assert "unet" in sharing(engine) or kind == "inside"
    engine.close()
    for one, (wanted, more) in zip(found, asked, strict=True):
        same(one.images, alone(pipe, wanted, **more))
        assert one.alone == tuple(f.name for f in more.get("features", ()) if f.works_inside(pipe))


def test_everything_a_pipeline_returns(pipe: Any, engine: Engine) -> None:
    """Images, not latents: decoded in batches, with the report of the call."""
    asked = [request(seed) for seed in (1, 2)]
    with held(engine, 2):
        handles = [engine.submit(one, arguments={"output_type": "np"}) for one in asked]
    found = [handle.result(TIMEOUT) for handle in handles]
    assert engine.stats()["batches"]["vae.decode"] == {2: 1}
    engine.close()
    for one, wanted in zip(found, asked, strict=True):
        exact = alone(pipe, wanted, output_type="np")
        assert -10 * np.log10(np.mean((one.images - exact) ** 2)) >= 60
        assert one.report.steps == 3 and one.rows > 1 and one.waited >= 0


# ---------------------------------------------------------------------- what ends a request
class Broken(Exception):
    pass


def breaking(step: int, error: BaseException) -> Any:
    def callback(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if index == step:
            raise error
        return values

    return callback


def test_one_that_raises_harms_no_other(pipe: Any, engine: Engine) -> None:
    bad = {"callback_on_step_end": breaking(1, Broken("here"))}
    with held(engine, 3):
        good = [engine.submit(request(seed), arguments=LATENTS) for seed in (1, 2)]
        failing = engine.submit(request(3), arguments=LATENTS | bad)
    with pytest.raises(Broken, match="here"):
        failing.result(TIMEOUT)
    found = [one.result(TIMEOUT).images for one in good]
    assert failing.progress.state == "failed" and engine.stats()["failed"] == 1
    engine.close()
    for seed, one in zip((1, 2), found, strict=True):
        same(one, alone(pipe, request(seed)))


def test_damaged_latents_of_one_request(pipe: Any, engine: Engine) -> None:
    latents = torch.full((1, 4, 6, 6), float("nan"))
    with pytest.raises(ConfigurationError, match="latents holds numbers that are not finite"):
        engine.submit(request(3), arguments=LATENTS | {"latents": latents}).result(TIMEOUT)


@pytest.mark.parametrize("how", ["handle", "future"])
def test_cancelled_while_it_runs(pipe: Any, engine: Engine, how: str) -> None:
    reached, go_on = threading.Event(), threading.Event()

    def progress(standing: Any) -> None:
        if standing.step == 2:
            reached.set()
            go_on.wait(TIMEOUT)

    with held(engine, 2):
        other = engine.submit(request(1), arguments=LATENTS)
        handle = engine.submit(request(2, steps=50), on_progress=progress)
    assert reached.wait(TIMEOUT)
    assert (handle.progress.state, handle.progress.step, handle.progress.steps) == ("running", 2, 50)
    assert handle.cancel() if how == "handle" else handle.future.cancel()
    go_on.set()
    with pytest.raises(CancelledError):
        handle.result(TIMEOUT)
    assert handle.progress.state == "cancelled"
    found = other.result(TIMEOUT)
    engine.close()
    assert handle.step == 2  # it ended there
    same(found.images, alone(pipe, request(1)))


def test_cancelled_while_it_waits(engine: Engine) -> None:
    """In the queue, and at the meeting point, where nothing else would wake it."""
    with held(engine, 3):
        handles = [engine.submit(request(seed)) for seed in range(6)]
        until_parked(engine, 4)
        assert [handle.progress.ahead for handle in handles[4:]] == [0, 1]
        assert [handle.cancel() for handle in (handles[4], handles[0])] == [True, True]
    assert [handle.result(TIMEOUT) for handle in (*handles[1:4], handles[5])]
    assert not handles[1].cancel()
    assert engine.stats()["cancelled"] == 2 and engine.stats()["completed"] == 4


def test_a_full_queue(engine: Engine) -> None:
    with held(engine, 4):
        handles = [engine.submit(request(seed)) for seed in range(8)]
        with pytest.raises(QueueFullError, match="4 requests wait already"):
            engine.submit(request(8))
        handles.pop(5).cancel()
        handles.append(engine.submit(request(8)))
    assert [handle.result(TIMEOUT) for handle in handles]


def test_closed_with_all_requests_finished(pipe: Any) -> None:
    engine = Engine(pipe, running=2)
    handles = [engine.submit(request(seed, steps=2)) for seed in range(5)]
    engine.close()
    assert [handle.progress.state for handle in handles] == ["completed"] * 5
    with pytest.raises(EngineClosedError):
        engine.submit(request(1))
    engine.close()


def test_closed_at_once(pipe: Any) -> None:
    before = threading.active_count()
    engine = Engine(pipe, running=2)
    handles = [engine.submit(request(seed, steps=1000)) for seed in range(5)]
    engine.close(drain=False)
    assert [handle.progress.state for handle in handles] == ["cancelled"] * 5
    assert threading.active_count() == before
    assert not traces(pipe)


def test_an_interrupt_of_whoever_waits(pipe: Any) -> None:
    with pytest.raises(KeyboardInterrupt), Engine(pipe) as engine:
        handle = engine.submit(request(1, steps=1000))
        raise KeyboardInterrupt
    assert handle.progress.state == "cancelled"


# ---------------------------------------------------------------------- what is refused
def test_the_models_are_the_engines(pipe: Any) -> None:
    with Engine(pipe) as engine:
        with pytest.raises(CallStateError, match="in use"):
            Engine(pipe)
        asked = engine.submit(request(1), arguments=LATENTS, features=[Reuse(plan="hold:2")])
        assert asked.result(TIMEOUT).report.counters["reuse"]["hold_steps"] == 1
    assert not traces(pipe)


@pytest.mark.parametrize(
    ("changes", "more", "message"),
    [
        ({"strength": 0.5}, {}, "does not take strength"),
        ({}, {"scheduler": "eular"}, "did you mean 'euler'"),
        ({}, {"features": [Compiled(engine="eager")]}, "compiled belongs to the model"),
        ({}, {"features": [Reuse(), EncoderReuse()]}, "cannot be combined"),
    ],
)
def test_refused_before_it_waits(engine: Engine, changes: Any, more: Any, message: str) -> None:
    with pytest.raises(AccelerationError, match=message):
        engine.submit(request(1, **changes), **more)
    assert engine.stats()["queued"] == engine.stats()["running"] == 0


def test_a_model_that_cannot_be_shared() -> None:
    own = sticker()
    own.unet.lock = threading.Lock()
    with pytest.raises(UnsupportedPipelineError, match="its modules cannot be copied"):
        Engine(own)
    assert prepare(own, request(1)).images(**LATENTS) is not None  # and nobody has claimed it


@pytest.mark.parametrize("settings", [{"running": 0}, {"queue": -1}, {"most_rows": True}, {"wait": -1.0}])
def test_settings_out_of_their_limits(pipe: Any, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=f"{next(iter(settings))} must be"):
        Engine(pipe, **settings)


# ---------------------------------------------------------------------- memory
def test_memory_is_flat(pipe: Any) -> None:
    def tensors() -> int:
        gc.collect()
        return sum(isinstance(one, torch.Tensor) for one in gc.get_objects())

    with Engine(pipe, running=2) as engine:
        counts = []
        for _ in range(3):
            for seed in range(4):
                bad = {} if seed else {"callback_on_step_end": breaking(0, Broken())}
                handle = engine.submit(request(seed, steps=2), arguments=bad, features=[Reuse(plan="hold:2")])
                handle.future.exception(TIMEOUT)
            counts.append(tensors())
    assert counts[2] <= counts[1]


# ---------------------------------------------------------------------- before the first request
def test_no_more_twins_than_requests_at_a_time(pipe: Any) -> None:
    with Engine(pipe, running=6) as engine:
        for seed in range(8):
            engine.submit(request(seed)).result(TIMEOUT)
        assert len(engine._workers) <= 2  # an answer is there a moment before its worker is


def test_warm_up(pipe: Any) -> None:
    with Engine(pipe, running=2, most_rows=4) as engine:
        found = engine.warm_up([request(1, steps=2)])
        assert {kind: sorted(rows) for kind, rows in found.items()} == {
            "text_encoder 24": [1, 2, 4],
            "unet 12x6x6": [2, 4],
            "vae.decode 12x6x6": [1, 2, 4],
        }
        one = engine.submit(request(2), arguments=LATENTS).result(TIMEOUT)
    same(one.images, alone(pipe, request(2)))


@pytest.mark.filterwarnings("ignore:`upcast_vae` is deprecated:FutureWarning")
def test_a_vae_that_is_cast_for_each_use() -> None:
    """SDXL's in half precision: it stays in float32 while it is shared, which changes no image."""
    pipe, call = zoo.sdxl()
    pipe.set_progress_bar_config(disable=True)
    pipe.vae.to(torch.float16)
    pipe.vae.register_to_config(force_upcast=True)
    asked = {**call, "num_inference_steps": 2, "output_type": "np"}
    wanted = pipe(**asked, generator=generator(1)).images
    with Engine(pipe, running=1) as engine:
        found = engine.submit({**asked, "generator": generator(1)}).result(TIMEOUT).images
    assert np.abs(found - wanted).max() < 1e-3 and pipe.vae.dtype == torch.float16


# ---------------------------------------------------------------------- what callbacks may do
def test_callbacks_run_beside_others(pipe: Any) -> None:
    """Two callbacks that wait for each other end, so neither holds what the other one's thread needs."""
    with Engine(pipe, running=2) as made:
        made._collector.baton._patience = 10 * TIMEOUT
        both = threading.Barrier(2)

        def meets(_pipe: Any, _step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            both.wait(TIMEOUT)
            return tensors

        arguments = {**LATENTS, "callback_on_step_end": meets}
        handles = [made.submit(request(seed, steps=3), arguments=arguments) for seed in (1, 2)]
        for seed, handle in zip((1, 2), handles, strict=True):
            same(handle.result(TIMEOUT).images, alone(pipe, request(seed, steps=3)))


def test_a_call_inside_of_a_turn_is_computed_there(pipe: Any) -> None:
    with Engine(pipe, running=2) as made:

        def encodes(own: Any, _step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            with torch.enable_grad():  # its forward calls encode and decode
                own.vae(torch.zeros(1, own.vae.config.in_channels, 48, 48))
            return tensors

        arguments = {**LATENTS, "callback_on_step_end": encodes}
        first = made.submit(request(1, steps=2), arguments=arguments)
        second = made.submit(request(2, steps=2), arguments=LATENTS)
        assert first.result(TIMEOUT) and second.result(TIMEOUT)


@pytest.mark.parametrize("drain", [True, False])
def test_no_callback_closes_the_engine(pipe: Any, drain: bool) -> None:
    with Engine(pipe, running=1) as made:
        handle = made.submit(request(1, steps=2), on_progress=lambda _: made.close(drain=drain))
        with pytest.raises(ConfigurationError, match="no callback of a request may call it"):
            handle.result(TIMEOUT)
        assert made.submit(request(1, steps=2)).result(TIMEOUT)


@pytest.mark.parametrize("wait", [-1.0, float("nan"), 1e13])
def test_a_wait_that_no_clock_counts_is_refused(pipe: Any, wait: float) -> None:
    with pytest.raises(ConfigurationError, match="wait must be 0 to 1,000,000,000 milliseconds"):
        Engine(pipe, wait=wait)


def test_an_argument_that_is_given_twice_is_refused(pipe: Any) -> None:
    with Engine(pipe, running=1) as made:
        handle = made.submit({"prompt": "a", "num_inference_steps": 2}, arguments={"num_inference_steps": 3})
        with pytest.raises(TypeError, match="multiple values for keyword argument 'num_inference_steps'"):
            handle.result(TIMEOUT)
