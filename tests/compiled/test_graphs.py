"""Graphs of a module: found by signature, compiled once, checked, and never those of other weights."""

from __future__ import annotations

import dataclasses
import gc
import logging
import weakref
from typing import Any

import pytest
import torch
from graph_tools import CHANGES, FROZEN, FROZEN_CALLS, agrees_after_changes, close, of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from laws import traces
from zoo import run, sd

from diffusion_accel import Compiled, Reuse, accelerate
from diffusion_accel.compiled import engines, store
from diffusion_accel.compiled.engine import Engine, Graph, Target

WRONG = Engine("wrong", lambda flat, tensors, target: lambda module, given: [given[0] * 2], machines=("cpu",))


@pytest.fixture(autouse=True)
def engine(monkeypatch: Any) -> None:
    FROZEN_CALLS.clear()
    monkeypatch.setitem(engines.ENGINES, "frozen", FROZEN)
    monkeypatch.setitem(engines.ENGINES, "wrong", WRONG)


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")


def test_every_step_is_the_graphs_and_it_is_compiled_once() -> None:
    pipe, call = sd()
    base = run(pipe, call, 4)
    accelerate(pipe, Compiled(engine="frozen", parts="denoiser"))
    first = run(pipe, call, 4)
    close(first, base)
    assert of(pipe)["graphs_compiled"] == 1 and of(pipe)["graph_calls"] == 4 and not of(pipe)["eager_calls"]
    assert torch.equal(run(pipe, call, 4), first) and of(pipe)["graphs_compiled"] == 0
    assert not traces(pipe)
    pipe.acceleration.remove()
    assert torch.equal(run(pipe, call, 4), base)
    accelerate(pipe, Compiled(engine="frozen", parts="denoiser"))
    assert torch.equal(run(pipe, call, 4), first)
    assert FROZEN_CALLS == ["UNet2DConditionModel"], "switched on again, it is compiled again"


def test_held_steps_call_no_graph() -> None:
    pipe, call = sd()
    expected = run(accelerate(pipe, Reuse(plan="hold:2")), call, 6)
    accelerate(pipe, Compiled(engine="frozen"))
    close(run(pipe, call, 6), expected)
    assert of(pipe)["graph_calls"] == pipe.acceleration.report().counters["reuse"]["full_steps"] == 3


STEPS = st.tuples(
    st.sampled_from(sorted(CHANGES)),
    st.sampled_from([(1, 8), (2, 8), (1, 12)]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)


@pytest.mark.sampled(2)
@settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(steps=st.lists(STEPS, min_size=2, max_size=5))
@pytest.mark.parametrize("name", ["frozen"])
def test_no_graph_is_stale(name: str, steps: list[Any]) -> None:
    agrees_after_changes(Compiled(engine=name), steps, 1e-4)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("change", [c for c in CHANGES if c not in ("nothing", "no lora")])
def test_each_change_is_noticed(change: str) -> None:
    """Also by itself, between two calls of one shape."""
    before = ["lora"] if change in ("scale", "fused") else []
    plain = [(name, (1, 8), torch.float32) for name in ["nothing", *before, change]]
    agrees_after_changes(Compiled(engine="frozen"), plain, 1e-4)


def test_a_graph_that_is_wrong_is_not_used(caplog: Any) -> None:
    pipe, call = sd()
    base = run(pipe, call, 4)
    accelerate(pipe, Compiled(engine="wrong", parts="denoiser"))
    with caplog.at_level(logging.WARNING):
        assert torch.equal(run(pipe, call, 4), base)
    assert "is off by" in caplog.text and of(pipe)["eager_calls"] == 4


def test_what_cannot_be_compiled_runs_uncompiled_and_says_so(caplog: Any, monkeypatch: Any) -> None:
    def fails(flat: Any, tensors: Any, target: Any) -> Graph:
        raise ValueError("no such operation")

    monkeypatch.setitem(engines.ENGINES, "fails", Engine("fails", fails, machines=("cpu",)))
    pipe, call = sd()
    base = run(pipe, call, 3)
    accelerate(pipe, Compiled(engine="fails", parts="denoiser"))
    with caplog.at_level(logging.WARNING):
        assert torch.equal(run(pipe, call, 3), base)
    assert caplog.text.count("fails cannot compile UNet2DConditionModel, so it runs uncompiled: no such operation") == 1


def test_a_constant_that_should_be_an_input_is_found_out() -> None:
    """A value that a trace has taken as a constant shows at the second call, where it is another one."""

    def constant(flat: Any, tensors: list[torch.Tensor], target: Target) -> Graph:
        returned = [t.clone() for t in flat(*tensors)]
        return lambda module, given: returned

    pipe, call = sd()
    base = run(pipe, call, 4)
    engines.ENGINES["wrong"] = dataclasses.replace(WRONG, compile=constant)
    accelerate(pipe, Compiled(engine="wrong", parts="denoiser"))
    assert torch.equal(run(pipe, call, 4), base) and of(pipe)["eager_calls"] == 3


def test_new_shapes_may_run_uncompiled() -> None:
    pipe, call = sd()
    accelerate(pipe, Compiled(engine="frozen", parts="denoiser", on_new_shape="eager"))
    run(pipe, call, 3)
    other, _ = sd()
    assert torch.equal(run(pipe, call, 3, height=24, width=24), run(other, call, 3, height=24, width=24))
    assert of(pipe)["eager_calls"] == 3
    assert FROZEN_CALLS == ["UNet2DConditionModel"]


def test_a_model_with_hooks_inside_runs_uncompiled() -> None:
    pipe, call = sd()
    accelerate(pipe, Compiled(engine="frozen", parts="denoiser"))
    run(pipe, call, 3)
    handle = pipe.unet.conv_in.register_forward_hook(lambda module, given, output: output * 2)
    other, _ = sd()
    other.unet.conv_in.register_forward_hook(lambda module, given, output: output * 2)
    assert torch.equal(run(pipe, call, 3), run(other, call, 3)) and of(pipe)["eager_calls"] == 3
    handle.remove()
    run(pipe, call, 3)
    assert of(pipe)["graph_calls"] == 3


@pytest.mark.slow
def test_a_model_that_changes_all_the_time_runs_uncompiled(caplog: Any) -> None:
    pipe, call = sd()
    accelerate(pipe, Compiled(engine="frozen", parts="denoiser", cache=False))

    def change(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        with torch.no_grad():
            pipe.unet.conv_in.weight.mul_(1.001)
        return values

    with caplog.at_level(logging.WARNING):
        run(pipe, call, 12, callback_on_step_end=change)
    assert of(pipe)["eager_calls"] == 4 and "changes from call to call" in caplog.text


def test_graphs_are_freed_with_their_model() -> None:
    pipe, call = sd()
    accelerate(pipe, Compiled(engine="frozen"))
    run(pipe, call, 2)
    gc.collect()
    gc.disable()
    try:
        model = weakref.ref(pipe.unet)
        del pipe
        assert model() is None
    finally:
        gc.enable()


def test_operations_are_counted_as_without_it() -> None:
    pipe, call = sd()
    accelerate(pipe, Reuse(plan="full"))
    pipe.acceleration.count_flops = True
    run(pipe, call, 3)
    plain = pipe.acceleration.report().flops
    accelerate(pipe, Compiled(engine="frozen"))
    for _ in range(2):
        run(pipe, call, 3)
        assert pipe.acceleration.report().flops == plain > 0


def test_the_store_keeps_what_was_used_last(tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv(store.VARIABLE, str(tmp_path / "graphs"))
    assert store.load("a") is None
    for name in "abc":
        store.save(name, name.encode() * 1000, 2500)
    assert store.load("a") is None and store.load("b") == b"b" * 1000 and store.load("c") == b"c" * 1000
    store.save("large", b"1" * 5000, 4000)
    store.save("empty", b"", 4000)
    assert store.load("large") is None is store.load("empty")
    (tmp_path / "graphs" / "b.safetensors").write_bytes(b"damaged")
    assert store.load("b") is None and not (tmp_path / "graphs" / "b.safetensors").exists()
    monkeypatch.setenv(store.VARIABLE, "off")
    assert store.load("c") is None
