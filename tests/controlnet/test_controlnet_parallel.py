"""A ControlNet beside the U-Net: the same bits on every kind of pipeline, really at the same time, errors, the end."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    ControlNetUnionModel,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLControlNetUnionPipeline,
)
from laws import Stop, default, traces
from zoo import UNET, Built, controlnet, controlnet_guess_mode, controlnets, dit, rand, run, sd, sdxl, seeded, svd

from diffusion_accel import Compiled, ConfigurationError, ControlNetParallel, EncoderReuse, Reuse, accelerate
from diffusion_accel.errors import FeatureConflictError, UnsupportedPipelineError
from diffusion_accel.registry import feature_class
from diffusion_accel.serving.engine import Engine

STEPS = 4
KEYS = ("block_out_channels", "layers_per_block", "down_block_types", "cross_attention_dim", "norm_num_groups")


def image(seed: int = 5) -> torch.Tensor:
    return (rand(1, 3, 16, 16, seed=seed).clamp(-1, 1) + 1) / 2


def img2img() -> Built:
    pipe, call = controlnet()
    made = StableDiffusionControlNetImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    return made, {**call, "control_image": call["image"], "image": image(), "strength": 0.7}


def inpaint() -> Built:
    pipe, call = controlnet()
    made = StableDiffusionControlNetInpaintPipeline(**pipe.components, requires_safety_checker=False)
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 8:] = 1
    return made, {**call, "control_image": call["image"], "image": image(), "mask_image": mask}


def some_steps() -> Built:
    """Outside of its share of the steps the ControlNet is called with a scale of 0."""
    pipe, call = controlnet()
    return pipe, {**call, "control_guidance_start": 0.25, "control_guidance_end": 0.75}


def without_guidance() -> Built:
    pipe, call = controlnet()
    return pipe, {**call, "guidance_scale": 1.0, "num_images_per_prompt": 2}


def _xl(cls: type, model: Any, **more: Any) -> Built:
    pipe, call = sdxl()
    made = cls(**pipe.components, controlnet=model, add_watermarker=False)
    return made, {**call, "image": rand(1, 3, 16, 16), **more}


_OF_XL = {
    **{key: UNET[key] for key in KEYS},
    "attention_head_dim": 4,
    "conditioning_embedding_out_channels": (8, 16),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 8 * 6 + 16,
    "transformer_layers_per_block": (1, 2),
    "use_linear_projection": True,
}
_OF_UNION = {"num_trans_channel": 16, "num_trans_head": 2, "num_trans_layer": 1, "num_proj_channel": 16}


def xl() -> Built:
    from diffusers import ControlNetModel

    return _xl(StableDiffusionXLControlNetPipeline, seeded(lambda: ControlNetModel(**_OF_XL)))


def union() -> Built:
    model = seeded(lambda: ControlNetUnionModel(**_OF_XL, **_OF_UNION))
    pipe, call = _xl(StableDiffusionXLControlNetUnionPipeline, model, control_mode=[1])
    return pipe, {**{k: v for k, v in call.items() if k != "image"}, "control_image": [call["image"]]}


KINDS = (controlnet, controlnets, controlnet_guess_mode, img2img, inpaint, some_steps, without_guidance, xl, union)
each_kind = pytest.mark.parametrize("build", KINDS, ids=lambda f: f.__name__)


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("controlnet")]


@pytest.mark.sampled(4)
@each_kind
def test_the_same_bits_on_every_kind_of_pipeline(build: Callable[[], Built]) -> None:
    pipe, call = build()
    base = run(pipe, call, STEPS)
    accelerate(pipe, ControlNetParallel())
    for _ in range(2):
        assert torch.equal(run(pipe, call, STEPS), base)
        assert not traces(pipe) and not threads()
    report = pipe.acceleration.report()
    assert report.counters["controlnet_parallel"] == {"runs_beside": report.steps, "runs_in_turn": 0}
    pipe.acceleration.remove()
    assert torch.equal(run(pipe, call, STEPS), base)


@pytest.mark.parametrize("build", [controlnet, controlnet_guess_mode, controlnets], ids=lambda f: f.__name__)
def test_it_computes_while_the_encoder_does(build: Callable[[], Built]) -> None:
    """At each step the ControlNet begins when the U-Net's encoder ends: one after the other that never happens."""
    pipe, call = build()
    base = run(pipe, call, 2)
    accelerate(pipe, ControlNetParallel())
    ended, seen = threading.Event(), list[bool]()

    def before(_module: Any, _inputs: Any) -> None:
        seen.append(ended.wait(60))

    nets = getattr(pipe.controlnet, "nets", [pipe.controlnet])
    hooks = [
        nets[0].conv_in.register_forward_pre_hook(before),
        pipe.unet.down_blocks[-1].register_forward_hook(lambda *_: ended.set()),
        pipe.unet.conv_out.register_forward_hook(lambda *_: ended.clear()),
    ]
    assert torch.equal(run(pipe, call, 2), base)
    assert seen == [True, True]
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize(
    "feature",
    [Reuse(plan="hold:2"), Reuse(plan="hold:3", guidance="reuse:2"), EncoderReuse()],
    ids=str,
)
def test_held_steps_need_no_controlnet_beside_either(feature: Any) -> None:
    pipe, call = controlnet()
    accelerate(pipe, feature)
    alone = run(pipe, call)
    runs = pipe.acceleration.report().counters[feature.name]["controlnet_runs"]
    accelerate(pipe, ControlNetParallel())
    assert torch.equal(run(pipe, call), alone)
    counters = pipe.acceleration.report().counters
    assert counters["controlnet_parallel"]["runs_beside"] == runs < 6
    assert counters[feature.name]["controlnet_runs"] == runs


@pytest.mark.parametrize("name", ["compiled", "task_routing", "transparent"])
def test_beside_other_features(name: str) -> None:
    pipe, call = controlnet()
    accelerate(pipe, default(feature_class(name)))
    alone = run(pipe, call, 2)
    accelerate(pipe, ControlNetParallel())
    assert torch.equal(run(pipe, call, 2), alone)
    assert pipe.acceleration.report().counters["controlnet_parallel"]["runs_beside"] == 2


def test_a_denoiser_that_is_one_graph_is_refused() -> None:
    """It takes all residuals when it begins."""
    pipe, _ = controlnet()
    with pytest.raises(FeatureConflictError, match="works inside of the denoiser"):
        accelerate(pipe, ControlNetParallel(), Compiled(engine="inductor"))


def test_an_error_of_the_controlnet_ends_the_call() -> None:
    pipe, call = controlnet()
    base = run(pipe, call, STEPS)
    accelerate(pipe, ControlNetParallel())

    def fails(_module: Any, _inputs: Any) -> None:
        raise Stop("no memory for the ControlNet")

    hook = pipe.controlnet.mid_block.register_forward_pre_hook(fails)
    with pytest.raises(Stop, match="no memory"):
        run(pipe, call, STEPS)
    assert not traces(pipe) and not threads()
    hook.remove()
    assert torch.equal(run(pipe, call, STEPS), base)


def test_an_error_of_the_unet_waits_for_the_controlnet() -> None:
    """Nothing computes any more when the call has ended; what the ControlNet raises meanwhile is not what ended it."""
    pipe, call = controlnet()
    accelerate(pipe, ControlNetParallel())
    failed, ended = threading.Event(), threading.Event()

    def fails(_module: Any, _inputs: Any) -> None:
        failed.set()
        raise Stop("of the U-Net")

    def late(_module: Any, _inputs: Any) -> None:
        assert failed.wait(60)
        ended.set()
        raise ValueError("of the ControlNet")

    pipe.unet.down_blocks[0].register_forward_pre_hook(fails)
    pipe.controlnet.conv_in.register_forward_pre_hook(late)
    with pytest.raises(Stop, match="of the U-Net"):
        run(pipe, call, STEPS)
    assert ended.is_set() and not threads() and not traces(pipe)


def test_the_thread_computes_as_the_caller_would() -> None:
    """Gradients and inference mode are kept by torch for each thread."""
    pipe, call = controlnet()
    accelerate(pipe, ControlNetParallel())
    seen = []
    pipe.controlnet.conv_in.register_forward_pre_hook(
        lambda *_: seen.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
    )
    base = run(pipe, call, 1)
    with torch.inference_mode():
        assert torch.equal(run(pipe, call, 1), base)
    assert seen == [(False, False), (False, True)]
    pipe.acceleration.disable()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = run(pipe, call, 2)
        pipe.acceleration.enable()
        assert torch.equal(run(pipe, call, 2), half)


def test_operations_are_counted_in_turn() -> None:
    pipe, call = controlnet()
    accelerate(pipe, ControlNetParallel())
    pipe.acceleration.count_flops = True
    run(pipe, call, 2)
    beside = pipe.acceleration.report()
    assert beside.counters["controlnet_parallel"] == {"runs_beside": 0, "runs_in_turn": 2}
    pipe.acceleration.disable()
    run(pipe, call, 2)
    assert beside.flops == pipe.acceleration.report().flops


def test_what_cannot_run_so_is_refused() -> None:
    for build, why in ((sd, "no ControlNet"), (dit, "no ControlNet"), (svd, "no ControlNet")):
        with pytest.raises(UnsupportedPipelineError, match=why):
            accelerate(build()[0], ControlNetParallel())
    pipe, _ = controlnet()
    with pytest.raises(UnsupportedPipelineError, match="there is no device cuda:99"):
        accelerate(pipe, ControlNetParallel(device="cuda:99"))
    for text in ("gpu", "cuda:-1", "cuda:1 ", "../cuda"):
        with pytest.raises(ConfigurationError, match="use cpu, cuda"):
            ControlNetParallel(device=text)
    with pytest.raises(ConfigurationError, match="not for an engine"):
        Engine(accelerate(pipe, ControlNetParallel()))
    pipe.unet = torch.nn.Identity()
    with pytest.raises(ConfigurationError, match="cannot be used on this pipeline any more: Identity is not known"):
        run(pipe, controlnet()[1], 1)


def test_a_device_is_where_it_computes_during_calls() -> None:
    pipe, call = controlnet()
    base = run(pipe, call, 2)
    accelerate(pipe, ControlNetParallel(device="cpu"))
    assert torch.equal(run(pipe, call, 2), base)
    assert next(pipe.controlnet.parameters()).device == torch.device("cpu")
