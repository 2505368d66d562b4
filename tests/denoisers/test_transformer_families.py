"""Every family of transformers as a pipeline of diffusers: what reuse leaves out, what it puts there, and its order."""

from __future__ import annotations

import functools
import inspect
import re
from typing import Any

import diffusers
import pytest
import torch
import transformer_pipelines
import zoo
from reuse_tools import close, counted_calls, counters
from transformer_pipelines import FAMILIES

from diffusion_accel import Reuse, UnsupportedPipelineError, accelerate
from diffusion_accel.denoisers import find_denoisers, stream_blocks
from diffusion_accel.denoisers.families import _PIPELINE_OF

STEPS = 6
CONDITIONAL_FIRST = {"dit", "z-image"}  # of those whose branches are halves of a batch
DISTILLED = {"flux distilled", "flux 2"}
TWO_CALLS = {"flux", "flux 2 klein", "qwen-image", "chroma", "wan 2.1", "wan 2.2", "hunyuan video", "cogview 4"}
TWO_CALLS |= {"lumina 2"}
REPEATED = {"flux 2", "flux 2 klein", "qwen-image", "z-image", "pixart", "sana"}
GUIDED = [name for name in FAMILIES if name not in DISTILLED]


def several(name: str) -> zoo.Built:
    """Two prompts, and of each two images where the pipeline repeats embeddings that it is given."""
    pipe, call = FAMILIES[name]()
    return pipe, zoo.for_images(call, range(2)) | ({"num_images_per_prompt": 2} if name in REPEATED else {})


def drawn(pipe: Any, call: dict[str, Any], steps: int = STEPS) -> torch.Tensor:
    """Of a DiT what it decodes: its pipeline returns images."""
    kept: list[torch.Tensor] = []
    decode = pipe.vae.decode
    pipe.vae.decode = lambda z, **how: (kept.append(z), decode(z, **how))[1]
    try:
        image = zoo.run(pipe, call, steps)
    finally:
        del pipe.vae.decode
    return kept[-1].float() if kept else image


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_held_is_not_computed(name: str) -> None:
    pipe, call = several(name)
    plain = drawn(pipe, call)
    ends = [(blocks[0].module, blocks[-1].module) for blocks in map(stream_blocks, find_denoisers(pipe))]
    accelerate(pipe, Reuse(plan="full"))
    assert torch.equal(drawn(pipe, call), plain)
    first, inner = ([counted_calls(module) for module in modules] for modules in zip(*ends, strict=True))

    def computed() -> tuple[int, int]:
        numbers = tuple(sum(map(len, rows)) for rows in (first, inner))
        for rows in (*first, *inner):
            rows.clear()
        return numbers

    drawn(pipe, call)
    whole, _ = computed()
    each = whole // STEPS
    assert whole == STEPS * (1 + (name in TWO_CALLS))
    for plan, outside, inside in (
        ("steps:full hold full hold@1 hold=1.5,-0.5 full", 3, 3),
        ("steps:full shallow:1@1 full shallow:1@2 shallow:1 full", 6, 3),
    ):
        accelerate(pipe, Reuse(plan=plan))
        got = drawn(pipe, call)
        assert computed() == (outside * each, inside * each), plan
        assert got.isfinite().all() and not torch.equal(got, plain)
        assert torch.equal(drawn(pipe, call), got), "the second call"
        computed()
    pipe.acceleration.remove()
    assert torch.equal(drawn(pipe, call), plain)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", GUIDED)
def test_the_branch_that_is_left_out_is_the_conditional_one_and_the_last_difference(name: str) -> None:
    """Against a denoiser that computes both and, at every other step, returns something else for the other one."""
    pipe, call = several(name)
    plain = drawn(pipe, call)
    accelerate(pipe, Reuse(plan="full", guidance="reuse:2"))
    got = drawn(pipe, call)
    assert counters(pipe)["unguided_steps"] == STEPS // 2
    pipe.acceleration.remove()
    wanted = _with_last_differences(pipe, call, name)
    assert close(got, wanted, 1e-4) and (wanted - plain).abs().max() > 20 * (got - wanted).abs().max()


def _with_last_differences(pipe: Any, call: dict[str, Any], name: str) -> torch.Tensor:
    step, here = [0], {}
    scheduled = pipe.scheduler.step

    @functools.wraps(scheduled)  # a pipeline looks for a generator among its arguments
    def stepped(*args: Any, **kwargs: Any) -> Any:
        step[0] += 1
        here.clear()
        return scheduled(*args, **kwargs)

    def watched(forward: Any) -> Any:
        kept: dict[str, torch.Tensor] = {}

        def run(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            value = torch.stack(output[0]) if isinstance(output[0], list) else output[0]
            if name in TWO_CALLS:
                conditional, other = here.setdefault("conditional", value), value
                alone = conditional is value
            else:
                halves = value.chunk(2)
                conditional, other = halves if name in CONDITIONAL_FIRST else halves[::-1]
                alone = False
            if not alone and (step[0] % 2 == 0 or not kept):
                kept["difference"] = other - conditional
            if not alone:
                other = conditional + kept["difference"]
                joined = [conditional, other] if name in CONDITIONAL_FIRST else [other, conditional]
                value = other if name in TWO_CALLS else torch.cat(joined)
            if not isinstance(output, tuple):
                output.sample = value
                return output
            return (list(value) if isinstance(output[0], list) else value,)

        return run

    denoisers = find_denoisers(pipe)
    pipe.scheduler.step = stepped
    for denoiser in denoisers:
        denoiser.forward = watched(denoiser.forward)
    try:
        return drawn(pipe, call)
    finally:
        del pipe.scheduler.step
        for denoiser in denoisers:
            del denoiser.forward


@pytest.mark.parametrize("name", GUIDED)
def test_clean_samples_are_what_the_scheduler_takes_them_for(name: str) -> None:
    """Euler's method goes straight on if the clean sample stays, as it does if the velocity stays."""
    pipe, call = several(name)
    if type(pipe.scheduler).__name__ != "FlowMatchEulerDiscreteScheduler" or name == "qwen-image":
        return  # Qwen-Image's guided velocity is as long as the conditional one, which is held for itself
    call |= {"cfg_normalization": False} if name == "lumina 2" else {}
    accelerate(pipe, Reuse(plan="steps:full full hold hold full hold"))
    straight = drawn(pipe, call)
    for space in ("epsilon", "sample"):
        accelerate(pipe, Reuse(plan=f"steps:full full hold:{space} hold:{space} full hold:{space}"))
        assert close(drawn(pipe, call), straight, 1e-4), space


def test_every_pipeline_with_two_calls_asks_for_the_conditional_branch_first() -> None:
    """By its source, as what is said first is told from what is said second."""
    names = r"\n +(\w+) = (?:self\.transformer|current_model)\("
    for name, family in _PIPELINE_OF.items():
        if not family.calls:
            assert not re.search(r"PAG", name) or family.reason, name
            continue
        source = inspect.getsource(getattr(diffusers, name).__call__)
        first, second = re.findall(names, source)
        assert not re.search("neg|uncond|null", first) and re.search("neg|uncond|null", second), (name, first, second)


def test_z_image_may_end_its_guidance_early() -> None:
    """Then the last steps have half of the rows, none of which are the other branch."""
    pipe, call = several("z-image")
    call["cfg_truncation"] = 0.5
    plain = drawn(pipe, call)
    rows = counted_calls(pipe.transformer.layers[0])
    accelerate(pipe, Reuse(plan="full", guidance="reuse:2"))
    got = drawn(pipe, call)
    assert rows[0] == 8 and set(rows) == {8, 4} and close(got, plain, 0.5) and not torch.equal(got, plain)
    accelerate(pipe, Reuse(plan="full", guidance="interval:0.45-1"))
    assert close(drawn(pipe, call), plain, 1e-4), "without guidance where there is none"


def test_texts_of_other_lengths_do_not_fit_half_of_a_batch() -> None:
    pipe, _ = FAMILIES["z-image"]()
    for plan, guidance in (("shallow:2,1", "reuse:2"), ("steps:full shallow:1 full/reuse", "both")):
        with pytest.raises(UnsupportedPipelineError, match="shallow steps need guidance=both here"):
            accelerate(pipe, Reuse(plan=plan, guidance=guidance))
    accelerate(pipe, Reuse(plan="shallow:2,1"))


def test_sd3_skips_layers_in_a_third_call() -> None:
    """Which has the conditional rows only, and is computed at every step."""
    pipe, call = several("stable diffusion 3")
    call |= {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    rows = counted_calls(pipe.transformer.transformer_blocks[0])
    accelerate(pipe, Reuse(plan="full", guidance="reuse:2"))
    drawn(pipe, call)
    assert rows == [4, 2, 2, 4, 2, 2, 2, 4, 2, 2, 2]  # not in the first step


def test_distilled_guidance_has_no_branch() -> None:
    with pytest.raises(UnsupportedPipelineError, match="guidance=both is the only choice"):
        accelerate(transformer_pipelines.flux2()[0], Reuse(guidance="reuse:2"))
    pipe, call = transformer_pipelines.flux_distilled()
    plain = drawn(pipe, call)
    accelerate(pipe, Reuse(plan="full", guidance="reuse:2"))  # a call may have true guidance beside it
    assert torch.equal(drawn(pipe, call), plain) and counters(pipe)["unguided_steps"] == 0
