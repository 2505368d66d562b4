"""torch.compile as an engine. Its graphs run as Dynamo traces them: what Inductor makes of them takes minutes."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from graph_tools import CountingBackend, agrees_after_changes, close, of
from laws import traces
from zoo import flux, run, sd, unet2d

from diffusion_accel import Compiled, ConfigurationError, EncoderReuse, UnsupportedPipelineError, accelerate


@pytest.fixture(autouse=True)
def graphs(monkeypatch: Any) -> CountingBackend:
    torch.compiler.reset()
    found, whole = CountingBackend(), torch.compile

    def compile(function: Any, *, mode: Any = None, **options: Any) -> Any:
        return whole(function, backend=found, **options)

    monkeypatch.setattr(torch, "compile", functools.wraps(whole)(compile))
    return found


INDUCTOR = Compiled(engine="inductor")


@pytest.mark.slow
def test_one_graph_a_signature(graphs: CountingBackend) -> None:
    pipe, call = sd()
    base = run(pipe, call, 4)
    accelerate(pipe, INDUCTOR)
    close(run(pipe, call, 4), base, 1e-5)
    assert graphs.count == 1 and of(pipe)["graph_calls"] == 4 and not traces(pipe)
    run(pipe, call, 4)
    run(pipe, call, 4, height=24, width=24)
    run(pipe, call, 4)
    assert graphs.count == 2
    pipe.acceleration.remove()
    assert torch.equal(run(pipe, call, 4), base)


@pytest.mark.slow
def test_other_weights_need_no_other_graph_and_none_is_stale(graphs: CountingBackend) -> None:
    shape = ((1, 8), torch.float32)
    agrees_after_changes(INDUCTOR, [(change, *shape) for change in ("nothing", "in place", "counted")], 1e-5)
    assert graphs.count == 1
    agrees_after_changes(INDUCTOR, [(change, *shape) for change in ("nothing", "lora", "no lora")], 1e-5)


def test_lower_precision() -> None:
    pipe, call = sd()
    base = run(pipe, call, 4)
    accelerate(pipe, Compiled(engine="inductor", precision="bf16"))
    near = run(pipe, call, 4)
    close(near, base, 0.05)
    assert not torch.equal(near, base)


@pytest.mark.slow
def test_what_is_not_one_graph_is_several(graphs: CountingBackend, caplog: Any) -> None:
    pipe, call = sd()
    forward = pipe.unet.conv_in.forward

    def broken(x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return forward(x)

    pipe.unet.conv_in.forward = broken
    base = run(pipe, call, 3)
    accelerate(pipe, INDUCTOR)
    close(run(pipe, call, 3), base, 1e-5)
    assert graphs.count > 1 and of(pipe)["graph_calls"] == 3


def test_blocks_are_compiled_and_go_with_what_works_inside(graphs: CountingBackend) -> None:
    """What --compile always did: the repeated blocks, and nothing but them."""
    pipe, call = sd()
    base = run(pipe, call, 4)
    inside = run(accelerate(sd()[0], EncoderReuse()), call, 4)
    accelerate(pipe, Compiled(engine="inductor", blocks=True))
    close(run(pipe, call, 4), base, 1e-5)
    assert 0 < graphs.count and not traces(pipe)
    accelerate(pipe, EncoderReuse())
    close(run(pipe, call, 4), inside, 1e-5)
    count = graphs.count
    run(pipe, call, 4)
    assert graphs.count == count and not traces(pipe)


def test_blocks_are_refused_where_there_are_none() -> None:
    with pytest.raises(UnsupportedPipelineError, match="UNet2DModel names no blocks that repeat"):
        accelerate(unet2d()[0], Compiled(engine="inductor", blocks=True))
    for wrong in ({"engine": "openvino"}, {"engine": "inductor", "precision": "bf16"}):
        with pytest.raises(ConfigurationError, match="blocks=true is for engine=inductor"):
            Compiled(blocks=True, **wrong)


def test_a_transformer(graphs: CountingBackend) -> None:
    pipe, call = flux()
    base = run(pipe, call, 3)
    accelerate(pipe, INDUCTOR)
    close(run(pipe, call, 3), base, 1e-5)
    assert graphs.count == 1 and of(pipe)["graph_calls"] == 3
