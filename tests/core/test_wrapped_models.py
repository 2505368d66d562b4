"""Denoisers that are compiled or wrapped, and pipelines with two of them."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from graph_tools import CountingBackend
from laws import default, traces
from zoo import controlnet, controlnet_guess_mode, run, sd, seeded, wan

from diffusion_accel import AccelerationError, EncoderReuse, Reuse, UnsupportedPipelineError, accelerate
from diffusion_accel.denoisers import find_denoisers, fingerprint
from diffusion_accel.registry import feature_class
from diffusion_accel.reuse.conditions import conditions

NAMES = {sd: ("unet",), wan: ("transformer", "transformer_2")}


def compiled(pipe: Any, names: tuple[str, ...], how: str) -> CountingBackend:
    graphs = CountingBackend()
    for name in names:
        if how == "wrapped":
            setattr(pipe, name, torch.compile(getattr(pipe, name), backend=graphs))
        elif how == "forward":
            getattr(pipe, name).forward = torch.compile(getattr(pipe, name).forward, backend=graphs)
        else:
            getattr(pipe, name).compile(backend=graphs)
    return graphs


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("build", "how"), [(sd, "wrapped"), (wan, "in-place"), (sd, "forward")])
def test_a_denoiser_that_is_compiled_as_a_whole(build: Any, how: str) -> None:
    """What acts around its calls works, on the same graph; what works inside of it is refused with the way out."""
    torch.compiler.reset()
    plain, call = build()
    base = run(plain, call, 4)
    accelerate(plain, Reuse(plan="hold:2"))
    held = run(plain, call, 4)
    pipe, _ = build()
    graphs = compiled(pipe, NAMES[build], how)
    accelerate(pipe)
    assert torch.equal(run(pipe, call, 4), base)
    once = graphs.count
    accelerate(pipe, Reuse(plan="hold:2"))
    assert torch.equal(run(pipe, call, 4), held)
    accelerate(pipe, Reuse(plan="full"))
    assert torch.equal(run(pipe, call, 4), base)
    assert graphs.count == once, "compiled again"
    assert not [trace for trace in traces(pipe) if "_orig_mod" not in trace and not trace.endswith(": forward")]
    assert conditions(pipe, 4)["weights"] == conditions(plain, 4)["weights"]
    assert conditions(pipe, 4)["denoiser"] == conditions(plain, 4)["denoiser"]


INSIDE = [
    default(EncoderReuse),
    *(Reuse(plan=p) for p in ("deepcache:2", "uniform:2", "shallow:2,1", "steps:full shallow:1 hold", "first-block")),
    *(default(feature_class(name)) for name in ("task_routing", "patch_parallel", "transparent")),
]


@pytest.mark.parametrize("how", ["wrapped", "in-place", "forward"])
def test_what_works_inside_says_how_it_can(how: str) -> None:
    pipe, call = sd()
    compiled(pipe, ("unet",), how)
    for feature in INSIDE:
        with pytest.raises(
            UnsupportedPipelineError,
            match=rf"{feature.name} cannot.*its unet is compiled as a whole.*compile_repeated_blocks\(\)",
        ):
            accelerate(pipe, feature)
    assert not hasattr(pipe, "acceleration")
    pipe, _ = sd()
    accelerate(pipe, EncoderReuse())
    compiled(pipe, ("unet",), how)  # after accelerate()
    with pytest.raises(AccelerationError, match=r"any more: its unet is compiled as a whole"):
        run(pipe, call, 2)


def test_transparency_without_an_adapter_works_outside() -> None:
    pipe, _ = sd()
    compiled(pipe, ("unet",), "wrapped")
    feature = feature_class("transparent").neutral()
    assert not feature.works_inside(pipe)
    accelerate(pipe, feature)


@pytest.mark.parametrize("name", ["encoder_reuse", "transparent"])
def test_blocks_that_are_compiled(name: str) -> None:
    """The way out works: compiled blocks are not compiled again, hooks or not."""
    torch.compiler.reset()
    feature = default(feature_class(name))
    plain, call = sd()
    expected = run(accelerate(plain, feature), call, 3)
    pipe, _ = sd()
    graphs = CountingBackend()
    pipe.unet.compile_repeated_blocks(backend=graphs)
    accelerate(pipe, feature)
    assert torch.equal(run(pipe, call, 3), expected)
    once = graphs.count
    assert once and torch.equal(run(pipe, call, 3), expected) and graphs.count == once


def test_hooks_inside_of_what_is_compiled_are_not_compiled(caplog: Any) -> None:
    """A block around the hooked layers, a VAE's method: they run uncompiled in that call, which is said."""
    feature = default(feature_class("task_routing"))
    plain, call = sd()
    expected = run(accelerate(plain, feature), call, 2)
    pipe, _ = sd()
    graphs = CountingBackend()
    block, mid = pipe.unet.down_blocks[0], torch.compile(pipe.unet.mid_block, backend=graphs)
    block.compile(backend=graphs)
    pipe.unet.mid_block = mid
    before = block._compiled_call_impl, vars(mid)["forward"]
    accelerate(pipe, feature)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(run(pipe, call, 2), expected)
    assert graphs.count == 0 and "1 DownBlock2D, 1 UNetMidBlock2DCrossAttn: run uncompiled in this call" in caplog.text
    assert (block._compiled_call_impl, vars(mid)["forward"]) == before


@pytest.mark.slow
def test_a_compiled_controlnet_and_vae() -> None:
    plain, call = controlnet()
    call = {**call, "output_type": "np"}
    features = EncoderReuse(), default(feature_class("transparent"))
    expected = run(accelerate(plain, *features), call, 2)
    pipe, _ = controlnet()
    graphs = CountingBackend()
    pipe.controlnet = torch.compile(pipe.controlnet, backend=graphs)
    pipe.vae.decode = torch.compile(pipe.vae.decode, backend=graphs)
    decode = pipe.vae.decode
    assert torch.equal(run(accelerate(pipe, *features), call, 2), expected)
    assert graphs.count >= 2 and pipe.vae.decode is decode
    assert pipe.acceleration.report().counters["encoder_reuse"]["controlnet_skipped"] == 1


# ---------------------------------------------------------------------- two denoisers
def calls_of(model: Any) -> list[int]:
    """How often a model computes: calls of its first block."""
    counted = [0]
    block = next(part for part in model.children() if isinstance(part, torch.nn.ModuleList))[0]

    def count(*_: Any) -> None:
        counted[0] += 1

    block.register_forward_hook(count)
    return counted


@pytest.mark.parametrize("plan", ["hold:2", "hold:3@1", "steps:full hold hold hold hold full hold hold"])
def test_both_denoisers_follow_one_plan(plan: str) -> None:
    """The first step of the second one is computed in full: what the first one said is not the second's to repeat."""
    pipe, call = wan()
    pipe.scheduler.set_timesteps(8)
    early = sum(float(t) >= 875 for t in pipe.scheduler.timesteps)  # steps of the first transformer
    assert 1 < early < 7
    base = run(pipe, call, 8)
    accelerate(pipe, Reuse(plan="full"))
    assert torch.equal(run(pipe, call, 8), base)
    accelerate(pipe, Reuse(plan=plan))
    counted = [calls_of(pipe.transformer), calls_of(pipe.transformer_2)]
    assert not torch.equal(run(pipe, call, 8), base)
    modes = Reuse(plan=plan)
    full = {"hold:2": {0, 2, 4, 6}, "hold:3@1": {0, 3, 6}}.get(modes.plan, {0, 5}) | {early}
    first, second = (sum(2 for i in full if (i < early) == is_first) for is_first in (True, False))
    assert [c[0] for c in counted] == [first, second]
    report = pipe.acceleration.report()
    counters = report.counters["reuse"]
    assert (report.steps, report.calls) == (8, 16)
    assert (counters["full_steps"], counters["reused_steps"]) == (len(full), 8 - len(full))
    assert "8 steps (16 calls of the denoiser)" in str(report) and report.to_dict()["calls"] == 16


def test_the_second_denoiser_counts_everywhere() -> None:
    pipe, call = wan()
    here = conditions(pipe, 4)
    assert here["denoiser"] == "WanTransformer3DModel+WanTransformer3DModel"
    assert len({fingerprint(m) for m in find_denoisers(pipe)} | {here["weights"]}) == 3
    other, _ = wan()
    other.transformer = pipe.transformer_2  # shares the second one only
    accelerate(pipe, Reuse())
    accelerate(other, Reuse())

    def callback(_: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        with pytest.raises(AccelerationError, match="in use by a pipeline call"):
            run(other, call, 2)
        return values

    run(pipe, call, 2, callback_on_step_end=callback)
    alone, _ = wan()
    alone.transformer, alone.transformer_2 = None, alone.transformer
    assert conditions(alone, 4)["denoiser"] == "WanTransformer3DModel"


def test_a_denoiser_for_each_branch_of_guidance() -> None:
    """Ideogram 4 calls two transformers at each step; each keeps what is its own."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Ideogram4Pipeline, Ideogram4Transformer2DModel

    def transformer(seed: int) -> Any:
        return seeded(
            lambda: Ideogram4Transformer2DModel(
                in_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=2, intermediate_size=32,
                adaln_dim=16, llm_features_dim=16, mrope_section=(2, 2, 2),
            ),
            seed,
        )  # fmt: skip

    pipe = Ideogram4Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=None, tokenizer=None,
        transformer=transformer(0), unconditional_transformer=transformer(1),
    )  # fmt: skip
    pipe.vae_scale_factor, pipe.patch_size = 8, 2
    tokens = 6

    def encode_prompt(grid_h: int, grid_w: int, **_: Any) -> Any:
        length = tokens + grid_h * grid_w
        features = torch.randn(1, length, 16, generator=torch.Generator().manual_seed(0))
        indicator = torch.tensor([[3] * tokens + [2] * grid_h * grid_w])
        return features, torch.arange(length)[None, :, None].repeat(1, 1, 3), torch.ones(1, length), indicator

    pipe.encode_prompt = encode_prompt
    call = {
        "prompt": "x", "height": 64, "width": 64, "max_sequence_length": tokens, "output_type": "latent",
        "guidance_scale": 3.0, "guidance_schedule": None,
    }  # fmt: skip
    base = run(pipe, call, 6)
    accelerate(pipe, Reuse(plan="full"))
    assert torch.equal(run(pipe, call, 6), base)
    accelerate(pipe, Reuse(plan="hold:2"))
    counted = [calls_of(pipe.transformer), calls_of(pipe.unconditional_transformer)]
    run(pipe, call, 6)
    assert [c[0] for c in counted] == [3, 3]
    report = pipe.acceleration.report()
    assert (report.steps, report.calls, report.counters["reuse"]["reused_steps"]) == (6, 12, 3)


def test_steps_are_counted_apart_from_calls() -> None:
    pipe, call = controlnet_guess_mode()
    accelerate(pipe, Reuse(plan="hold:2"))
    run(pipe, call, 6)
    report = pipe.acceleration.report()
    counters = report.counters["reuse"]
    assert (report.steps, counters["full_steps"], counters["reused_steps"]) == (6, 3, 3)
