"""What is known of diffusers' pipelines and schedulers as data: complete, and right where it can be tried."""

from __future__ import annotations

import copy
import itertools
import math
import pathlib
import re
import types
from typing import Any

import diffusers
import pytest
import torch
import zoo
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, StableDiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from zoo import ddim, rand, run, sd

from diffusion_accel import Reuse, UnsupportedPipelineError, accelerate
from diffusion_accel.denoisers.families import _PIPELINE_OF, UNITS, UNKNOWN, PipelineFamily, family_of
from diffusion_accel.noise_level import noise_levels, share_of, unknown_noise_levels
from diffusion_accel.prediction import Conversion
from diffusion_accel.steps import StepClock

SOURCES = pathlib.Path(diffusers.__file__).parent / "pipelines"


def test_every_pipeline_with_a_denoiser_has_a_family() -> None:
    """By their sources: a new release of diffusers may bring others."""
    there: dict[str, bool] = {}
    for path in SOURCES.rglob("pipeline_*.py"):
        for text in re.split(r"^class ", path.read_text(encoding="utf-8"), flags=re.M)[1:]:
            if "\n    def __call__(" in text:
                there[re.split(r"\W", text)[0]] = bool(re.search(r"^        (unet|transformer)\b[:,]", text, re.M))
    called = {name for name, with_denoiser in there.items() if with_denoiser}
    # they call other pipelines, or denoise in another way: tokens, chords of notes
    apart = {"UnCLIPPipeline", "Amused", "LLaDA2", "Onnx", "Combined", "VisualClozePipeline", "RFD4Proteina"}
    apart |= {"DiffusionDecode", "ConsistencyDecoder"}
    assert {name for name in called - _PIPELINE_OF.keys() if not any(part in name for part in apart)} == set()
    assert _PIPELINE_OF.keys() <= there.keys(), "a name that diffusers does not have"


def test_a_subclass_is_of_the_family_whose_loop_it_runs() -> None:
    class Same(StableDiffusionPipeline):
        pass

    class Around(StableDiffusionPipeline):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(*args, **kwargs)

    class Own(StableDiffusionPipeline):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return self.unet(*args, **kwargs)

    plain, _ = sd()
    known = family_of(plain)
    assert known.branches is not None and not known.branches.conditional_first
    for cls, expected in ((Same, known), (Around, known), (Own, UNKNOWN)):
        pipe = cls(**plain.components, requires_safety_checker=False)
        assert family_of(pipe) == expected
        assert family_of(accelerate(pipe)) == expected, "also when it is accelerated"
        if expected is UNKNOWN:
            with pytest.raises(UnsupportedPipelineError, match="guidance=both"):
                accelerate(pipe, Reuse(guidance="reuse:2"))


# ---------------------------------------------------------------------- the timestep
class Told(torch.nn.Module):
    def forward(self, sample: torch.Tensor, timestep: Any) -> torch.Tensor:
        return 0.1 * sample


# written down once more, from the pipelines: (timestep, sigma) -> what the denoiser is told
TOLD: dict[str, Any] = {
    "t": lambda t, s: t,
    "t/1000": lambda t, s: t / 1000,
    "1-t/1000": lambda t, s: (1000 - t) / 1000,
    "t*scale": lambda t, s: t * 0.001,
    "sigma": lambda t, s: s,
    "sigma/(1+sigma)": lambda t, s: s / (s + 1),
    "log(sigma)/4": lambda t, s: torch.log(s) * 0.25,
    "scm": lambda t, s: torch.sin(t) / (torch.cos(t) + torch.sin(t)),
}


@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
@pytest.mark.parametrize("unit", TOLD)
def test_the_step_is_found_whatever_the_unit(unit: str, known: bool) -> None:
    """With a shift of 1 the timesteps are 1000 … 1: what is told at one step is what another step's timestep is."""
    assert TOLD.keys() == UNITS.keys()
    if not known and unit == "t*scale":
        return  # nothing says what the scale is
    for dtype in (torch.float32, torch.bfloat16):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
        model = Told()
        model.config = types.SimpleNamespace(timestep_scale=0.001)
        clock = StepClock(types.SimpleNamespace(scheduler=scheduler, unet=model))
        clock.family = PipelineFamily(time=unit) if known else UNKNOWN
        clock.start([model])
        scheduler.set_timesteps(8)
        if unit == "scm":  # angles
            scheduler.timesteps = torch.linspace(math.pi / 2, 0.1, 8)
        seen, x = [], torch.ones(2, 4)
        for _ in range(2):
            scheduler._step_index = None
            for t, s in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
                told = torch.as_tensor(TOLD[unit](t, s)).expand(2).to(dtype)
                for _call in range(2):
                    model(x, told)
                    seen.append((clock.segment, clock.index, clock.call))
                if unit != "scm":
                    scheduler.step(x, t, x)
                else:
                    clock._stepped = True
        clock.stop()
        assert seen == [(again, i, c) for again in range(2) for i in range(8) for c in range(2)], dtype


def test_a_timestep_for_each_token_counts_by_the_noisiest() -> None:
    scheduler = DDIMScheduler()
    clock, model = StepClock(types.SimpleNamespace(scheduler=scheduler)), Told()
    clock.start([model])
    scheduler.set_timesteps(5)
    seen = []
    for t in scheduler.timesteps:
        model(torch.ones(1), torch.stack([0 * t, t, t]))  # the first frame is given
        seen.append(clock.index)
        scheduler.step(torch.ones(1), t, torch.ones(1))
    clock.stop()
    assert seen == list(range(5))


def test_a_copy_of_the_scheduler_steps_by_itself() -> None:
    """Pipelines of video with sound copy their scheduler in a call; what the copy does is no step of the image."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    clock = StepClock(types.SimpleNamespace(scheduler=scheduler))
    clock.start([])
    scheduler.set_timesteps(4)
    other = copy.deepcopy(scheduler)
    for t in scheduler.timesteps:
        for one in (scheduler, other):
            one.step(torch.ones(1), t, torch.ones(1))
    clock.stop()
    assert clock.steps == 4 and scheduler.step_index == other.step_index == 4


def test_aura_flow_is_told_thousandths() -> None:
    pipe, call = zoo.aura_flow(shift=1.0)
    accelerate(pipe, Reuse(plan="hold:2"))
    run(pipe, call, steps=6)
    counted = pipe.acceleration.report().counters["reuse"]
    assert (counted["full_steps"], counted["hold_steps"]) == (3, 3)


# ---------------------------------------------------------------------- noise
SCHEDULERS = sorted(
    {
        cls
        for name in dir(diffusers)
        if name.endswith("Scheduler") and isinstance(cls := getattr(diffusers, name), type)
        if issubclass(cls, SchedulerMixin) and getattr(cls, "_backends", None) is None
    },
    key=lambda c: c.__name__,
)
NOT_NOISE = {  # tokens, or steps without a level of noise
    "AmusedScheduler",
    "BlockRefinementScheduler",
    "DiscreteDDIMScheduler",
    "EntropyBoundScheduler",
    "RFD4ProteinaScheduler",
}


@pytest.mark.parametrize("cls", SCHEDULERS, ids=lambda c: c.__name__)
def test_noise_levels_of_every_scheduler(cls: Any) -> None:
    if cls.__name__ in NOT_NOISE:
        assert "not known" in str(unknown_noise_levels(cls.__new__(cls)))
        return
    name = cls.__name__.removesuffix("Scheduler")
    needed = {"VQDiffusion": {"num_vec_classes": 8}, "Helios": {"stages": 1}, "HeliosDMD": {"stages": 1}}
    steps = {"VQDiffusion": 100, "SCM": 2}.get(name, 10)
    scheduler = cls(**needed.get(name, {}))
    scheduler.set_timesteps(steps)
    if cls.__name__ == "ScoreSdeVeScheduler":
        scheduler.set_sigmas(10)
    levels = noise_levels(scheduler)
    assert len(levels) == len(scheduler.timesteps) and all(0 <= level <= 1 for level in levels)
    order = levels[::-1] if "Inverse" in cls.__name__ else levels
    falling = all(later <= level + 1e-6 for level, later in itertools.pairwise(order))
    assert falling and order[0] > 0.85 and order[-1] < 0.65, levels


def test_equal_noise_is_an_equal_level_whatever_the_timestep_is() -> None:
    sigmas = [10.0, 3.0, 1.0, 0.3, 0.05]
    table = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    discrete = diffusers.EulerDiscreteScheduler(**table)
    discrete.set_timesteps(sigmas=[*sigmas, 0.0])
    continuous = diffusers.EulerDiscreteScheduler(**table, timestep_type="continuous", prediction_type="v_prediction")
    continuous.set_timesteps(5)
    edm = diffusers.EDMEulerScheduler()
    edm.set_timesteps(5)
    uneven = diffusers.EulerDiscreteScheduler(**table, interpolation_type="log_linear")
    uneven.set_timesteps(5)
    for other in (continuous, edm, uneven):
        other.sigmas = torch.tensor([*sigmas, 0.0])
        other.timesteps = 0.25 * other.sigmas[:-1].log()
    known = noise_levels(discrete)
    assert known == pytest.approx([t / 1000 for t in discrete.timesteps.tolist()])
    assert noise_levels(continuous) == pytest.approx(known, abs=2e-3)
    assert noise_levels(edm) == pytest.approx(known, abs=2e-3)
    assert noise_levels(uneven) == pytest.approx(known, abs=2e-3)
    for scheduler in (discrete, continuous, uneven):  # and what a prediction means follows from it
        for t, sigma in zip(scheduler.timesteps.tolist(), sigmas, strict=True):
            a, s = Conversion(scheduler).coefficients(t)
            assert s / a == pytest.approx(sigma, rel=2e-2)
    shifted = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    shifted.set_timesteps(sigmas=[1.0, 0.5, 0.1], timesteps=[1000.0, 500.0, 100.0], mu=1.0)  # as CogView 4 does
    assert noise_levels(shifted) == pytest.approx(shifted.sigmas[:-1].tolist())
    inverted = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    inverted.set_timesteps(4)
    plain = FlowMatchEulerDiscreteScheduler()
    plain.set_timesteps(4)
    assert noise_levels(inverted) == pytest.approx(noise_levels(plain), abs=1e-6)


def test_guidance_over_an_interval_acts_by_noise() -> None:
    """The same steps for the same noise: EDM's timesteps are logarithms, of which none is within 0.2 … 0.8."""
    pipe, call = sd()
    unguided = {}
    for scheduler in (ddim(), diffusers.EDMEulerScheduler(), diffusers.DPMSolverMultistepScheduler()):
        pipe.scheduler = scheduler
        accelerate(pipe, Reuse(plan="full", guidance="interval:0.2-0.8"))
        run(pipe, call, steps=8)
        unguided[type(scheduler).__name__] = pipe.acceleration.report().counters["reuse"].get("unguided_steps")
    edm = [0.2 <= share_of(float(s)) <= 0.8 for s in pipe_sigmas(8)]
    assert unguided == {"DDIMScheduler": 3, "EDMEulerScheduler": 8 - sum(edm), "DPMSolverMultistepScheduler": 3}
    assert 0 < sum(edm) < 8
    pipe.acceleration.remove()
    pipe.scheduler = type("Odd", (SchedulerMixin,), {"config": {}})()
    with pytest.raises(UnsupportedPipelineError, match="noise levels of Odd"):
        accelerate(pipe, Reuse(plan="full", guidance="interval:0.2-0.8"))


def pipe_sigmas(steps: int) -> Any:
    scheduler = diffusers.EDMEulerScheduler()
    scheduler.set_timesteps(steps)
    return scheduler.sigmas[:-1]


# ---------------------------------------------------------------------- branches, views
def test_two_images_with_equal_latents_are_not_two_branches() -> None:
    """CogView 4 calls its transformer once for each branch; each image of a batch is what it is by itself."""
    pipe, call = zoo.cogview4()
    two = {k: torch.cat([v, rand(*v.shape, seed=5)]) for k, v in call.items() if k.endswith("embeds")}
    latents = rand(1, 4, 8, 8, seed=9)
    for guidance in ("interval:0-0.1", "reuse:2"):
        accelerate(pipe, Reuse(plan="full", guidance=guidance))
        both = pipe(**{**call, **two}, latents=latents.repeat(2, 1, 1, 1), num_inference_steps=4).images
        for i in range(2):
            one = {k: v[i : i + 1] for k, v in two.items()}
            alone = pipe(**{**call, **one}, latents=latents, num_inference_steps=4).images
            assert torch.allclose(both[i : i + 1], alone, atol=1e-4)
        assert (both[0] - both[1]).abs().max() > 1e-3


def test_the_second_call_of_a_step_is_left_out() -> None:
    pipe, call = zoo.cogview4()
    counted: list[int] = []
    pipe.transformer.norm_out.register_forward_pre_hook(lambda module, args: counted.append(len(args[0])))
    base = run(pipe, call, steps=6)
    same = {"negative_prompt_embeds": call["prompt_embeds"]}
    equal = run(pipe, call, steps=6, **same)
    for plan, guidance, calls in (
        ("full", "reuse:3", 8),
        ("full", "interval:0-0", 6),
        ("steps:full full/reuse hold full hold/none full/none", "both", 6),
    ):
        counted.clear()
        accelerate(pipe, Reuse(plan=plan, guidance=guidance))
        got = run(pipe, call, steps=6)
        assert len(counted) == calls and not torch.equal(got, base)
        if plan == "full":  # without a difference nothing is lost
            assert torch.allclose(run(pipe, call, steps=6, **same), equal, atol=1e-5)
    pipe.acceleration.remove()
    alone = run(pipe, call, steps=6, guidance_scale=1.0)
    accelerate(pipe, Reuse(plan="full", guidance="interval:0-0"))
    assert torch.allclose(run(pipe, call, steps=6), alone, atol=1e-5)


def test_branches_that_cannot_be_left_out_are_refused_before_anything_runs() -> None:
    from diffusers import StableDiffusionPAGPipeline
    from diffusers.pipelines.deprecated.text_to_video_synthesis.pipeline_text_to_video_zero import (
        CrossFrameAttnProcessor2_0,
    )

    plain, _ = sd()
    accelerate(sd()[0], Reuse(guidance="reuse:2"))
    crossed, _ = sd()
    crossed.unet.set_attn_processor(CrossFrameAttnProcessor2_0(batch_size=2))
    with pytest.raises(UnsupportedPipelineError, match="other rows"):
        accelerate(crossed, Reuse(guidance="reuse:2"))
    distilled = zoo._sd(StableDiffusionPipeline, zoo.unet(time_cond_proj_dim=8))
    with pytest.raises(UnsupportedPipelineError, match="distilled"):
        accelerate(distilled, Reuse(guidance="reuse:2"))
    pipe = StableDiffusionPAGPipeline(**plain.components, requires_safety_checker=False)
    for feature in (Reuse(plan="full", guidance="interval:0-0.1"), Reuse(plan="steps:full hold full/reuse")):
        with pytest.raises(UnsupportedPipelineError, match="more than an unconditional and a conditional half"):
            accelerate(pipe, feature)
    accelerate(pipe, Reuse(plan="hold:2"))


@pytest.mark.parametrize("build", [zoo.dit, zoo.aura_flow, zoo.sd3, zoo.deepfloyd_if])
def test_the_unconditional_branch_is_known_in_either_order(build: Any) -> None:
    """Without guidance everywhere is what a scale of 1 draws; a wrong half would draw the negative prompt."""
    pipe, call = build()
    call["guidance_scale"] = 30.0
    plain = run(pipe, call, steps=3)
    alone = run(pipe, call, steps=3, guidance_scale=1.0)
    accelerate(pipe, Reuse(plan="full", guidance="interval:0.9991-0.9992"))
    assert (run(pipe, call, steps=3) - alone).abs().max() < 0.01 * (plain - alone).abs().max()
    accelerate(pipe, Reuse(plan="full", guidance="reuse:2"))
    run(pipe, call, steps=3)
    assert pipe.acceleration.report().counters["reuse"]["unguided_steps"] == 1
    run(pipe, call, steps=3, guidance_scale=1.0)
    assert pipe.acceleration.report().counters["reuse"].get("unguided_steps", 0) == 0


def test_panorama_reuses_by_view() -> None:
    pipe, call = zoo.panorama()
    counted: list[int] = []
    pipe.unet.conv_in.register_forward_pre_hook(lambda module, args: counted.append(len(args[0])))
    base = run(pipe, call, steps=4)
    views = len(counted) // 4
    assert views == 3
    accelerate(pipe, Reuse(plan="full"))
    assert torch.equal(run(pipe, call, steps=4), base)
    counted.clear()
    accelerate(pipe, Reuse(plan="steps:full hold full hold"))
    got = run(pipe, call, steps=4)
    report = pipe.acceleration.report()
    assert report.steps == 4 and len(counted) == 2 * views
    assert report.counters["reuse"]["full_steps"] == report.counters["reuse"]["reused_steps"] == 2
    pipe.acceleration.remove()
    forward, calls, kept = pipe.unet.forward, [], {}

    def held(*args: Any, **kwargs: Any) -> Any:
        step, view = divmod(len(calls), views)
        calls.append(step)
        if step % 2 == 0:
            kept[view] = forward(*args, **kwargs)
        return kept[view]

    pipe.unet.forward = held
    assert torch.equal(run(pipe, call, steps=4), got)
    with pytest.raises(UnsupportedPipelineError, match="in turn"):
        accelerate(pipe, Reuse(guidance="reuse:2"))


def test_a_loop_in_which_nothing_is_reused_says_so(caplog: Any) -> None:
    class Twice(StableDiffusionPipeline):
        """Begins anew before every step."""

        def __call__(self, steps: int) -> torch.Tensor:
            x = rand(1, 4, 8, 8)
            for _ in range(steps):
                self.scheduler.set_timesteps(steps)
                t = self.scheduler.timesteps[0]
                x = self.scheduler.step(self.unet(x, t, zoo.text()["prompt_embeds"]).sample, t, x).prev_sample
            return x

    plain, _ = sd()
    pipe = accelerate(Twice(**plain.components, requires_safety_checker=False), Reuse(plan="hold:2"))
    with torch.no_grad():
        pipe(4)
    assert "every step was computed" in caplog.text


def test_pipelines_whose_denoiser_cannot_be_followed_are_refused() -> None:
    plain, _ = sd()
    for name, words in (("StableDiffusionParadigmsPipeline", "several timesteps"), ("ScoreSdeVePipeline", "step")):
        cls = getattr(diffusers, name)
        pipe = cls.__new__(cls)
        pipe.__dict__.update(unet=plain.unet, scheduler=plain.scheduler)
        assert words in str(Reuse().supports(pipe))
