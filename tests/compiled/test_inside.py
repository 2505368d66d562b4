"""Steps that run parts of a denoiser as graphs of their own: what is kept goes in and out of them."""

from __future__ import annotations

import functools
import logging
from typing import Any

import pytest
import torch
import zoo
from graph_tools import CHANGES, FROZEN, CountingBackend, close, of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from laws import traces
from transparency_weights import tiny_weights
from zoo import run, sd

from diffusion_accel import (
    Compiled,
    EncoderReuse,
    FeatureConflictError,
    LatentTransparency,
    Reuse,
    TaskRouting,
    accelerate,
)
from diffusion_accel.compiled import engines
from diffusion_accel.reuse.plan import Plan, Step

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")


@pytest.fixture(autouse=True)
def engine(monkeypatch: Any) -> None:
    monkeypatch.setitem(engines.ENGINES, "frozen", FROZEN)


def compiled() -> Compiled:
    return Compiled(engine="frozen", parts="denoiser+controlnet")


def agrees(pipe: Any, call: dict[str, Any], feature: Any, graphs: Compiled, bound: float, steps: int = 8) -> None:
    """With graphs the images, the counted work and the second call are those without."""
    expected = run(accelerate(pipe, feature), call, steps)
    counts = pipe.acceleration.report().counters[feature.name]
    accelerate(pipe, graphs)
    found = run(pipe, call, steps)
    close(found, expected, bound)
    assert of(pipe)["graph_calls"] and not of(pipe)["eager_calls"]
    assert pipe.acceleration.report().counters[feature.name] == counts
    assert torch.equal(run(pipe, call, steps), found) and not of(pipe)["graphs_compiled"], "compiled again"
    assert not traces(pipe)


MIXED = Reuse(plan="steps:full full shallow:1@1 hold full/reuse shallow:1@1/reuse full/none shallow:2")
CASES = [
    ("sd", MIXED),
    ("sd", EncoderReuse(schedule=(0, 2, 5))),
    ("sd", EncoderReuse(schedule=(0, 2, 5), batch_decoder=False, prior_noise=0.05)),
    ("controlnets", Reuse(plan="faster-diffusion", guidance="reuse:2")),
    ("sd3", Reuse(plan="shallow:3,2", guidance="reuse:2")),
    ("flux", Reuse(plan="steps:full full shallow:2@1 shallow:1 full shallow:2@1 hold shallow:1")),
]


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("kind", "feature"), CASES, ids=lambda case: str(case))
def test_every_kind_of_step_is_a_graph(kind: str, feature: Any) -> None:
    agrees(*getattr(zoo, kind)(), feature, compiled(), 1e-5)


@pytest.mark.slow
def test_openvino() -> None:
    pytest.importorskip("openvino")
    feature = Reuse(plan="steps:full decoder shallow:1/reuse full shallow:1/reuse hold")
    agrees(*sd(), feature, Compiled(cache=False, parts="denoiser"), 1e-4, 6)


@pytest.mark.slow
def test_inductor(monkeypatch: Any) -> None:
    """Dynamo sees a trace, not hooks that are other objects in every call; other weights are other graphs."""
    graphs, whole = CountingBackend(), torch.compile
    monkeypatch.setattr(
        torch, "compile", functools.wraps(whole)(lambda f, mode=None, **o: whole(f, backend=graphs, **o))
    )
    torch.compiler.reset()
    pipe, call = sd()
    agrees(pipe, call, Reuse(plan="deepcache:3"), Compiled(engine="inductor", parts="denoiser"), 1e-6)
    assert graphs.count == 2
    pipe.unet.load_state_dict({name: value * 1.01 for name, value in pipe.unet.state_dict().items()})
    other = run(pipe, call, 8)
    pipe.acceleration.remove("compiled")
    close(other, run(pipe, call, 8), 1e-6)
    assert graphs.count == 4


MODES = st.builds(
    Step,
    mode=st.sampled_from(["full", "decoder", "hold"]),
    order=st.integers(0, 1),
    guidance=st.sampled_from(["both", "reuse", "none"]),
) | st.builds(
    Step,
    mode=st.just("shallow"),
    depth=st.integers(1, 3),
    order=st.integers(0, 1),
    guidance=st.sampled_from(["both", "reuse"]),
)


@pytest.mark.slow
@settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(rest=st.lists(MODES, min_size=3, max_size=6))
def test_any_plan(rest: list[Step]) -> None:
    pipe, call = sd()
    feature = Reuse(plan=Plan((Step(), *rest)))
    expected = run(accelerate(pipe, feature), call, 1 + len(rest))
    accelerate(pipe, compiled())
    close(run(pipe, call, 1 + len(rest)), expected, 1e-4)
    assert of(pipe)["graph_calls"]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("change", ["another", "freeu"])
def test_no_graph_is_stale(change: str) -> None:
    images = []
    for engine in ((), (compiled(),)):
        pipe, call = sd()
        accelerate(pipe, Reuse(plan="deepcache:3"), *engine)
        run(pipe, call, 6)
        CHANGES[change](pipe.unet)
        images.append(run(pipe, call, 6))
    close(*images, 1e-5)


def test_transparent_images() -> None:
    """The adapted denoiser and the networks beside the VAE are graphs, which another weight makes anew."""
    transparent = LatentTransparency(weights=tiny_weights())
    pipe, call = sd()
    call["output_type"] = "pt"
    agrees(pipe, call, transparent, Compiled(engine="frozen"), 1e-5, 3)
    assert of(pipe)["graph_calls"] == 5  # three steps, and two decoders
    with torch.no_grad():
        pipe.acceleration.models()[1].conv_out.bias.mul_(-3)
    found = run(pipe, call, 3)
    assert of(pipe)["graphs_compiled"] == 1
    pipe.acceleration.remove("compiled")
    close(found, run(pipe, call, 3), 1e-5)


def test_forecasts_within_one_batch_run_uncompiled(caplog: Any) -> None:
    """What the decoder would be given for the steps after a full one depends on the times of the steps, no tensors."""
    pipe, call = sd()
    feature = Reuse(plan="steps:full decoder@1 full decoder@1 decoder@1")
    expected = run(accelerate(pipe, feature), call, 5)
    accelerate(pipe, compiled())
    with caplog.at_level(logging.WARNING):
        close(run(pipe, call, 5), expected, 1e-5)
    assert of(pipe)["eager_calls"] == 1 and "that are forecast" in caplog.text


def test_hooks_of_others_inside_still_act() -> None:
    images = []
    for engine in ((), (compiled(),)):
        pipe, call = sd()
        pipe.unet.conv_in.register_forward_hook(lambda module, given, output: output * 2)
        images.append(run(accelerate(pipe, Reuse(plan="deepcache:3"), *engine), call, 4))
    assert torch.equal(*images) and of(pipe)["eager_calls"] == 4


def test_what_cannot_be_part_of_a_graph_is_refused() -> None:
    weights = tiny_weights()
    for inside in (
        TaskRouting(untrained=True),
        Reuse(plan="taylorseer:3,1"),
        LatentTransparency(weights=weights, until=0.5),
    ):
        pipe, _ = zoo.flux() if isinstance(inside, Reuse) else sd()
        with pytest.raises(FeatureConflictError, match="compiled.* cannot be combined with .*works inside"):
            accelerate(pipe, inside, compiled())
        assert not hasattr(pipe, "acceleration")
