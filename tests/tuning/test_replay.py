"""The denoiser repeated without its pipeline: what it says is what was recorded, or there is a reason why not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import zoo
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    UniPCMultistepScheduler,
)
from transformer_pipelines import FAMILIES, cogvideox

from diffusion_accel.errors import UnsupportedPipelineError
from diffusion_accel.tuning.recording import channelwise, record
from diffusion_accel.tuning.replay import Recording, Replay

STEPS = 4


class Calls:
    """What `record` needs of a sampler, for pipelines that take embeddings: one call for each number of images."""

    def __init__(self, built: zoo.Built, sizes: tuple[int, ...] = (2, 1), steps: int = STEPS, **changes: Any) -> None:
        self.pipe, call = built
        self.options, self.sizes, self.steps = {**call, **changes}, sizes, steps
        self.pipe.set_progress_bar_config(disable=True)

    def chunks(self) -> Iterator[tuple[int, int]]:
        start = 0
        for size in self.sizes:
            yield start, start + size
            start += size

    def call(self, start: int, end: int) -> torch.Tensor:
        given = zoo.for_images(self.options, range(start, end))
        generators = [torch.Generator().manual_seed(i) for i in range(start, end)]
        result = self.pipe(num_inference_steps=self.steps, generator=generators, **given)[0]
        return torch.as_tensor(result).float().cpu()


def recorded(built: zoo.Built, **how: Any) -> Recording:
    with torch.inference_mode():
        return record(Calls(built, **how))[0]  # type: ignore[arg-type]


def says_the_same(recording: Recording, tolerance: float = 3e-4) -> None:
    assert recording.reason == ""
    replay = Replay(recording)
    with torch.inference_mode():
        for step in range(len(recording)):
            for which in ([*range(recording.images)], [recording.images - 1], [0, recording.images - 1]):
                wanted = recording.predictions[step][which]
                again = replay(recording.latents[step][which], recording.times[step], which)
                assert again.shape == wanted.shape
                off = float((again - wanted).pow(2).mean().sqrt() / wanted.pow(2).mean().sqrt())
                assert off < tolerance, (step, which, off)
    assert replay.evaluations == len(recording) * (recording.images + 3)


def instruct() -> zoo.Built:
    pipe = zoo._sd(StableDiffusionInstructPix2PixPipeline, zoo.unet(in_channels=8))
    call = {**zoo.text(), "image": zoo.rand(1, 3, 16, 16).sigmoid(), "image_guidance_scale": 1.5}
    return pipe, {**call, "output_type": "latent"}


def pixels() -> zoo.Built:
    pipe, call = zoo.unet2d()
    pipe.scheduler = DDPMScheduler()
    return pipe, call


PIPELINES: dict[str, Callable[[], zoo.Built]] = {
    "sd": zoo.sd,
    "without guidance": zoo.sd_without_guidance,
    "sdxl": zoo.sdxl,
    "flux": zoo.flux,
    "animatediff": zoo.animatediff,
    "pixels": pixels,
    "three branches": instruct,
    "nine channels": zoo.inpaint,
    "ip adapter": zoo.ip_adapter,
    **{f"transformer: {name}": build for name, build in FAMILIES.items() if name != "wan 2.2"},
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", PIPELINES)
def test_what_is_repeated_is_what_was_recorded(name: str) -> None:
    built = PIPELINES[name]()
    sizes = (1,) if name == "ip adapter" else (2, 1)
    recording = recorded(built, sizes=sizes)
    assert len(recording) == len(recording.all_times) and recording.latents.shape[1] == sum(sizes)
    says_the_same(recording)


SCHEDULERS = {
    "ddim": DDIMScheduler,
    "dpm": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
    "euler": EulerDiscreteScheduler,
    "ancestral": EulerAncestralDiscreteScheduler,
    "heun": HeunDiscreteScheduler,
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_with_every_scheduler(name: str) -> None:
    pipe, call = zoo.sd()
    pipe.scheduler = SCHEDULERS[name].from_config(pipe.scheduler.config)
    recording = recorded((pipe, call))
    assert len(recording) == (2 * STEPS - 1 if name == "heun" else STEPS)
    assert recording.draws_noise == (name == "ancestral")
    says_the_same(recording)


@pytest.mark.parametrize("scheduler", [FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler])
def test_with_flow_matching(scheduler: Any) -> None:
    pipe, call = zoo.sd3()
    pipe.scheduler = scheduler()
    says_the_same(recorded((pipe, call)))


def test_in_bfloat16() -> None:
    pipe, call = zoo.sd()
    pipe.to(torch.bfloat16)
    call = {k: v.bfloat16() if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    says_the_same(recorded((pipe, call)), 0.05)


BRANCHES = {"sd": 3, "sdxl": 3, "transformer: dit": 3, "transformer: sana": 3, "transformer: lumina 2": 3}


@pytest.mark.parametrize(("name", "added"), [*BRANCHES.items(), ("transformer: z-image", 4)])
def test_the_branches_of_guidance_are_told_apart(name: str, added: int) -> None:
    """Of four times the difference three are added to the conditional prediction (Z-Image: all); of six, five."""
    build, linear = PIPELINES[name], {"cfg_normalization": False} if "lumina" in name else {}
    some, more = (recorded(build(), guidance_scale=scale, **linear) for scale in (4.0, 6.0))
    with torch.inference_mode():
        for which in ([0, 1, 2], [1], [0, 2]):
            asked = some.latents[0][which], some.times[0], which
            guided, addition, difference = Replay(some).apart(*asked)
            assert addition is not None and torch.equal(guided, Replay(some)(*asked))
            replay = Replay(some)
            torch.testing.assert_close(replay.apart(*asked, difference).prediction, guided, rtol=1e-4, atol=1e-5)
            alone = replay.apart(*asked, torch.zeros_like(addition))
            torch.testing.assert_close(alone.prediction, guided - addition, rtol=1e-4, atol=1e-5)
            assert replay.evaluations == len(which)  # twice a half
            wanted = (more.predictions - some.predictions)[0][which] * added / 2
            torch.testing.assert_close(addition, wanted, rtol=1e-3, atol=1e-4)


def test_without_two_branches_there_is_no_difference() -> None:
    for built in (zoo.sd_without_guidance(), instruct()):
        own = recorded(built)
        assert not own.reason and own.branches is None
        with torch.inference_mode():
            assert Replay(own).apart(own.latents[0], own.times[0], range(3))[1] is None


def test_only_some_steps_are_kept() -> None:
    with torch.inference_mode():
        recording, _ = record(Calls(zoo.sd(), steps=6), lambda i: i % 2 == 0)  # type: ignore[arg-type]
    assert len(recording) == 3 and recording.times == recording.all_times[::2]
    says_the_same(recording)


def test_between_the_timesteps_the_denoiser_is_told_what_lies_between() -> None:
    """AuraFlow is told t / 1000."""
    recording = recorded(zoo.aura_flow())
    call = recording.tapes[0][0][0]
    times, told = recording.times, call.told
    replay = Replay(recording)
    assert replay._told(call, (times[0] + times[1]) / 2) == pytest.approx((told[0] + told[1]) / 2)
    assert replay._told(call, times[-1]) == pytest.approx(told[-1])


# ---------------------------------------------------------------------- what cannot be repeated says so
def test_every_obstacle_has_its_reason() -> None:
    def off_halfway(pipe: Any, i: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        if i == 1:
            pipe._guidance_scale = 0.0
            given["prompt_embeds"] = given["prompt_embeds"].chunk(2)[1]
        return given

    def other_scale(pipe: Any, i: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        pipe._guidance_scale = 5.0 + i
        return given

    def other_latents(pipe: Any, i: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        given["latents"] = given["latents"] * 1.2
        return given

    def callback(function: Any, *names: str) -> dict[str, Any]:
        return {"callback_on_step_end": function, "callback_on_step_end_tensor_inputs": list(names)}

    sum_ = "not the same sum of predictions"
    else_, changed = "told something else at every step", "changes its latents between"
    for built, words, options in (
        (zoo.controlnet(), else_, {}),
        (zoo.sd(), sum_, {"guidance_rescale": 0.7}),
        (zoo.sd(), else_, callback(off_halfway, "prompt_embeds")),
        (zoo.sd(), sum_, callback(other_scale)),
        (zoo.sd(), changed, callback(other_latents, "latents")),
        ((zoo._sd(StableDiffusionInpaintPipeline, zoo.unet()), zoo.inpaint()[1]), changed, {}),
        (zoo.wan(two=True), "two denoisers", {}),
    ):
        recording = recorded(built, sizes=(1,), **options)
        assert words in recording.reason and not recording.tapes, (words, recording.reason)
        with pytest.raises(UnsupportedPipelineError, match=recording.reason):
            Replay(recording)


def test_a_variance_for_the_scheduler_and_views_are_refused() -> None:
    assert "variance" in recorded(zoo.deepfloyd_if(), sizes=(1,)).reason
    with pytest.raises(UnsupportedPipelineError, match=r"calls its scheduler \d+ times for 2"):
        recorded(zoo.panorama(), sizes=(1,), steps=2)


def test_noise_that_is_not_the_images_own_is_refused() -> None:
    """DiT's pipeline gives its scheduler no generator."""
    pipe, call = zoo.dit()
    pipe.scheduler = DDPMScheduler()
    assert "noise that is not the images' own" in recorded((pipe, call), sizes=(1,)).reason


def test_a_guidance_interval_is_refused() -> None:
    pipe, call = zoo.sd3()
    layers = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.3, "skip_layer_guidance_stop": 0.6}
    assert recorded((pipe, call), sizes=(1,), steps=6, **layers).reason


def test_a_denoiser_that_answers_otherwise_the_second_time_is_refused() -> None:
    """Whatever is not seen in arguments and sums: here a model that counts its calls."""
    pipe, call = zoo.sd()
    calls = [0]

    def moody(module: Any, args: Any, output: Any) -> Any:
        calls[0] += 1
        return (output[0] * (1.1 if calls[0] > 2 * STEPS else 1.0),)

    handle = pipe.unet.register_forward_hook(moody)
    assert "asked again" in recorded((pipe, call)).reason
    handle.remove()


def test_coarse_rounding_is_no_reason_to_refuse_but_images_that_see_each_other_are() -> None:
    """As of layers that compute in bfloat16 in a model of float32: another number of rows is rounded otherwise."""
    pipe, call = zoo.sd()

    def rounded(module: Any, args: Any, output: Any) -> Any:
        scale = 8.0 + len(output)
        return (output * scale).bfloat16().to(output.dtype) / scale

    handle = pipe.unet.conv_out.register_forward_hook(rounded)
    assert not recorded((pipe, call)).reason
    handle.remove()

    def mixed(module: Any, args: Any, output: Any) -> Any:
        return output + 0.02 * output.mean(0, keepdim=True)

    handle = pipe.unet.conv_out.register_forward_hook(mixed)
    assert "asked again" in recorded((pipe, call)).reason
    handle.remove()


def test_timesteps_that_differ_in_a_batch_are_refused() -> None:
    pipe, call = zoo.sd()
    forward = pipe.unet.forward

    def several(sample: torch.Tensor, timestep: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return forward(sample, timestep, *args, **kwargs)

    pipe.unet.register_forward_pre_hook(
        lambda m, args, kwargs: ((args[0], _two(args), *args[2:]), kwargs), with_kwargs=True
    )
    pipe.unet.forward = several
    assert "timesteps differ" in recorded((pipe, call), sizes=(1,)).reason


def _two(args: Any) -> torch.Tensor:
    return args[1].expand(args[0].shape[0]) + torch.arange(args[0].shape[0])


# ---------------------------------------------------------------------- nothing is left behind
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_pipeline_is_as_before(error: type[BaseException]) -> None:
    pipe, call = zoo.sd()
    attributes, step = dict(vars(pipe.unet)), pipe.scheduler.step
    before = zoo.run(pipe, call, 3)
    recorded((pipe, call))

    def stop(*_: Any) -> Any:
        raise error("stopped")

    with pytest.raises(error, match="stopped"):
        recorded((pipe, call), callback_on_step_end=stop)
    assert vars(pipe.unet).keys() == attributes.keys()
    assert "forward" not in vars(pipe.unet) and "step" not in vars(pipe.scheduler) and pipe.scheduler.step == step
    assert not pipe.unet._forward_hooks
    torch.testing.assert_close(zoo.run(pipe, call, 3), before, rtol=0, atol=0)


def test_where_the_channels_are() -> None:
    def denoiser(channels: int) -> Any:
        return SimpleNamespace(config={"in_channels": channels})

    for channels, shape, wanted in (
        (4, (1, 4, 8, 8), True),
        (9, (1, 4, 8, 8), True),
        (16, (1, 16, 5, 8, 8), True),
        (16, (1, 5, 16, 8, 8), False),
        (16, (1, 16, 16, 8, 8), False),  # it may be either
        (64, (1, 256, 64), True),
        (64, (1, 64, 1024), False),
    ):
        assert channelwise(denoiser(channels), torch.zeros(shape)) is wanted, shape
    assert not recorded(cogvideox(), sizes=(1,)).channelwise
    assert recorded(zoo.flux(), sizes=(1,), height=24).channelwise


def test_a_device_is_waited_for_once_in_an_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many calls of the pipeline the images come from."""
    recording, _ = record(Calls(zoo.sd(), sizes=(1, 2, 1)))  # type: ignore[arg-type]
    replay, moved, cpu = Replay(recording), [], torch.Tensor.cpu

    def noted(tensor: torch.Tensor) -> torch.Tensor:
        moved.append(tuple(tensor.shape))
        return cpu(tensor)

    monkeypatch.setattr(torch.Tensor, "cpu", noted)
    with torch.inference_mode():
        said = replay(recording.latents[1], recording.times[1], range(4))
    assert len(recording.tapes) == 3 and len(moved) == 1 and said.shape[0] == 4
