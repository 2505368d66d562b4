"""Steps with a fit: against a loop that is written out by hand, against plans that they are neutral to; refusals."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler
from reuse_tools import close, counted_calls, counters, reused
from zoo import ZOO, cogview4, ddim, deepfloyd_if, dit, flux, panorama, rand, run, sd, sd3, wan

from diffusion_accel import AccelerationError, ConfigurationError, Reuse, accelerate
from diffusion_accel.reuse.plan import Plan

# step -> (computed, space, what predictions count for each channel, what latents count), for four channels
Fits = dict[int, tuple[bool, str, list[list[float]], list[list[float]]]]
FITS: Fits = {
    2: (
        False,
        "sample",
        [[0.9, 0.1], [1.1, -0.2], [1, 0.05], [0.8, 0.1]],
        [[0.02, -0.01], [0, 0.01], [0.03, 0], [0, 0]],
    ),
    3: (True, "epsilon", [[0.9, 0.1, 0]] * 4, [[0.01, -0.02]] * 4),
    4: (False, "epsilon", [[1.1, -0.2, 0.1]] * 4, [[0.01, -0.02, 0.005]] * 4),
    5: (True, "sample", [[0.95], [1.05], [1], [0.9]], [[0.01], [0], [0.02], [-0.01]]),
    6: (True, "", [[1.02, -0.03]] * 4, [[]] * 4),
    7: (False, "", [[1.2, -0.3]] * 4, [[0.05]] * 4),
}
STEPS = 8
# step -> what guidance adds counts for each channel
Apart = dict[int, list[list[float]]]
APART: Apart = {
    2: [[0.1, -0.05], [0.2, 0], [0, 0.1], [-0.3, 0.2]],
    3: [[0.1]] * 4,
    4: [[-0.1, 0.2]] * 4,
    5: [[0.2, -0.1], [0.1, 0.1], [0, 0.3], [0.1, 0]],
    7: [[0.3, 0.1]] * 4,
}


def written(fits: Fits, steps: int = STEPS, apart: Apart | None = None) -> str:
    """The plan as text."""
    tokens = ["full"] * steps
    for i, (computed, space, predictions, latents) in fits.items():
        rows = [",".join(map(str, p)) + ";" + ",".join(map(str, x)) for p, x in zip(predictions, latents, strict=True)]
        if apart and i in apart:
            rows = [f"{row};{','.join(map(str, d))}" for row, d in zip(rows, apart[i], strict=True)]
        text = rows[0] if len(set(rows)) == 1 else "|".join(rows)
        tokens[i] = ("full" if computed else "hold") + (f":{space}" if space else "") + "=" + text
    return "steps:" + " ".join(tokens)


def by_hand(
    unet: Any,
    call: dict[str, Any],
    x: torch.Tensor,
    kind: str,
    fits: Fits,
    steps: int = STEPS,
    apart: Apart | None = None,
) -> torch.Tensor:
    """DDIM with fits, in float64 but for the denoiser."""
    scheduler, scale, x = ddim(prediction_type=kind), call["guidance_scale"], x.double()
    ratio, past, additions = 1000 // steps, [], []

    def to(space: str, v: torch.Tensor, x: torch.Tensor, a: float, s: float) -> torch.Tensor:
        x0, e = ((x - s * v) / a, v) if kind == "epsilon" else (a * x - s * v, s * x + a * v)
        return {"": v, "sample": x0, "epsilon": e}[space]

    def back(space: str, value: torch.Tensor, x: torch.Tensor, a: float, s: float) -> torch.Tensor:
        if not space:
            return value
        x0, e = (value, (x - a * value) / s) if space == "sample" else ((x - s * value) / a, value)
        return e if kind == "epsilon" else a * e - s * x0

    for i in range(steps):
        t = (steps - 1 - i) * ratio + 1
        a, s = float(scheduler.alphas_cumprod[t]) ** 0.5, float(1 - scheduler.alphas_cumprod[t]) ** 0.5
        computed, space, shares, others = fits.get(i, (True, "", None, None))
        used = [(p, x_, a_, s_) for p, x_, a_, s_ in past]
        if computed:
            v = unet(x.float(), t, encoder_hidden_states=call["prompt_embeds"]).sample.double()
            if scale > 1:
                without = unet(x.float(), t, encoder_hidden_states=call["negative_prompt_embeds"]).sample.double()
                guided = without + scale * (v - without)
                additions, v = [(guided, v, x, a, s), *additions], guided
            used, past = [(v, x, a, s), *past], [(v, x, a, s), *past]
        if shares is not None:
            given = [x, *(x_ for _, x_, _, _ in (past[1:] if computed else past))]
            mixed = torch.zeros_like(x)
            for channel in range(x.shape[1]):
                for share, (p, x_, a_, s_) in zip(shares[channel], used, strict=False):
                    mixed[:, channel] += share * to(space, p, x_, a_, s_)[:, channel]
                for share, x_ in zip(others[channel], given, strict=False):
                    mixed[:, channel] += share * x_[:, channel]
                for share, (g, c, x_, a_, s_) in zip((apart or {}).get(i, [[]] * 4)[channel], additions, strict=False):
                    mixed[:, channel] += share * (to(space, g, x_, a_, s_) - to(space, c, x_, a_, s_))[:, channel]
            v = back(space, mixed, x, a, s)
        before = float(scheduler.alphas_cumprod[t - ratio]) if t >= ratio else 1.0
        x = before**0.5 * to("sample", v, x, a, s) + (1 - before) ** 0.5 * to("epsilon", v, x, a, s)
    return x.float()


@pytest.mark.parametrize(("kind", "scale"), [("epsilon", 4.0), ("v_prediction", 4.0), ("epsilon", 1.0)])
def test_a_loop_written_by_hand_draws_the_same(kind: str, scale: float) -> None:
    pipe, call = sd()
    pipe.scheduler = ddim(prediction_type=kind)
    noise, rows = rand(1, 4, 8, 8, seed=5), counted_calls(pipe.unet.conv_in)
    with torch.no_grad():
        want = by_hand(pipe.unet, {**call, "guidance_scale": scale}, noise, kind, FITS)
        rows.clear()
        got = reused(pipe, call, written(FITS), steps=STEPS, latents=noise, guidance_scale=scale)
        assert len(rows) == 5 == counters(pipe)["full_steps"]
        assert close(got, want) and not close(got, run(*sd(), steps=STEPS, latents=noise, guidance_scale=scale), 1e-3)
        assert torch.equal(got, run(pipe, call, steps=STEPS, latents=noise, guidance_scale=scale)), "the second call"
    assert counters(pipe) == counters(pipe) | {"hold_steps": 3, "corrected_steps": 3, "reused_steps": 3}
    # rows: in the spaces of held steps, of which one may be that of the prediction; three steps, each with its latents
    rows_kept = {("epsilon", 4.0): 4 + 6, ("v_prediction", 4.0): 6 + 6, ("epsilon", 1.0): 2 + 6}[kind, scale]
    assert counters(pipe)["peak_cache_bytes"] == rows_kept * 4 * noise.numel()
    pipe.acceleration.remove()
    plain = sd()[0]
    plain.scheduler = ddim(prediction_type=kind)
    changes = {"steps": STEPS, "latents": noise, "guidance_scale": scale}
    assert torch.equal(run(pipe, call, **changes), run(plain, call, **changes))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_loop_with_the_branches_of_guidance_apart_draws_the_same(kind: str) -> None:
    pipe, call = sd()
    pipe.scheduler = ddim(prediction_type=kind)
    noise, plan = rand(1, 4, 8, 8, seed=5), written(FITS, apart=APART)
    with torch.no_grad():
        want = by_hand(pipe.unet, {**call, "guidance_scale": 4.0}, noise, kind, FITS, apart=APART)
        got = reused(pipe, call, plan, steps=STEPS, latents=noise, guidance_scale=4.0)
        without = reused(pipe, call, written(FITS), steps=STEPS, latents=noise, guidance_scale=4.0)
        assert close(got, want) and not close(got, without, 1e-3)
        again = reused(pipe, call, plan, steps=STEPS, latents=noise, guidance_scale=4.0)
        assert torch.equal(got, again), "the second call"
        two = {"prompt_embeds": call["prompt_embeds"].repeat(2, 1, 1)}
        two["negative_prompt_embeds"] = call["negative_prompt_embeds"].repeat(2, 1, 1)
        both = torch.cat([rand(1, 4, 8, 8, seed=6), noise])
        batch = reused(pipe, call | two, plan, steps=STEPS, latents=both, guidance_scale=4.0)
        assert close(batch[1:], want, 1e-4)
        alone = {"steps": STEPS, "latents": noise, "guidance_scale": 1.0}
        unguided = reused(pipe, call, plan, **alone)
        assert counters(pipe)["corrected_steps"] == 3
        assert close(unguided, reused(pipe, call, written(FITS), **alone), 1e-5), "without guidance nothing is added"


@pytest.mark.parametrize("build", [dit, wan, sd3], ids=lambda build: build.__name__)
def test_branches_are_told_apart_however_they_are_called(build: Callable[[], Any]) -> None:
    """Guidance of its own making: 5 (c − u) is what scale 6 adds, 2/3 more than scale 4."""
    (pipe, call), steps = build(), 4
    plan = "steps:" + " ".join(["full=1;;0.666666667"] * steps)
    with torch.no_grad():
        more = run(*build(), steps=steps, guidance_scale=6.0)
        assert close(reused(pipe, call, plan, steps=steps, guidance_scale=4.0), more, 1e-4)
        assert counters(pipe)["corrected_steps"] == steps


def test_a_pipeline_without_two_branches_is_refused() -> None:
    pipe, _ = panorama()
    with pytest.raises(AccelerationError, match="the plan's fits need both branches of guidance"):
        accelerate(pipe, Reuse(plan="steps:full full hold=1;;0.1"))


# ---------------------------------------------------------------------- fits that change nothing
HELD = "full full hold{0} full hold{0} hold{0} full"  # seven timesteps: Heun has 2 n - 1
CORRECTED = "full{0} full{1} full{0} full{1} full{0} full{1} full{0}"


def neutral(pipe: Any, call: dict[str, Any], steps: int, space: str = ":sample", channels: int = 1) -> None:
    """Fits of one prediction draw what order 0 draws."""
    rows = "|".join(["1;"] * channels)
    held = reused(pipe, call, f"steps:{HELD.format(space)}", steps=steps)
    assert close(reused(pipe, call, f"steps:{HELD.format(f'{space}={rows}')}", steps=steps), held, 3e-5)
    assert counters(pipe)["hold_steps"] == 3 and "corrected_steps" not in counters(pipe)
    base = reused(pipe, call, "full", steps=steps)
    assert not close(base, held, 1e-3)
    plan = CORRECTED.format(f"{space}={rows}", f"{space}=1,0;0,0")
    assert close(reused(pipe, call, f"steps:{plan}", steps=steps), base, 3e-5)
    assert counters(pipe)["corrected_steps"] == 7
    assert torch.equal(run(pipe, call, steps=steps), run(pipe, call, steps=steps))


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("DDIM", {}),
        ("DDIM", {"prediction_type": "v_prediction"}),
        ("DPMSolverMultistep", {}),
        ("EulerDiscrete", {}),
        ("UniPCMultistep", {}),
        ("HeunDiscrete", {}),
        ("KDPM2Discrete", {}),
        ("DDPM", {}),
    ],
)
def test_a_fit_of_one_prediction_is_order_0(name: str, options: dict[str, Any]) -> None:
    pipe, call = sd()
    pipe.scheduler = getattr(diffusers, f"{name}Scheduler").from_config(ddim(**options).config)
    neutral(pipe, call, 4 if name in ("HeunDiscrete", "KDPM2Discrete") else 7)


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("build", "space", "channels", "steps"),
    [
        (sd3, ":sample", 4, 7),
        (flux, ":sample", 16, 7),  # tokens
        (cogview4, ":sample", 4, 7),  # a call for each branch
        (lambda: wan(two=False), ":sample", 16, 7),  # a video; UniPC of flows
        (deepfloyd_if, ":sample", 3, 7),  # a learned variance behind the prediction
        (ZOO["inpaint"], ":sample", 4, 7),  # latents, mask and image
        (ZOO["controlnet"], ":epsilon", 4, 7),
        (dit, ":sample", 4, 7),  # whose latents have a row for each branch
        (ZOO["unet2d"], ":epsilon", 3, 7),
    ],
    ids="sd3 flux cogview4 wan if inpaint controlnet dit unet2d".split(),
)
def test_whatever_the_denoiser(build: Callable[[], Any], space: str, channels: int, steps: int) -> None:
    neutral(*build(), steps, space, channels)


def test_flow_matching_with_two_evaluations_a_step() -> None:
    pipe, call = sd3()
    pipe.scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    neutral(pipe, call, 4, ":sample", 4)


def test_half_precision_stays_half() -> None:
    pipe, call = sd()
    pipe.unet.to(torch.bfloat16)
    seen = []

    class Noting(DDIMScheduler):
        def step(self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, **kwargs: Any) -> Any:
            seen.append(model_output.dtype)
            return super().step(model_output, timestep, sample, **kwargs)

    pipe.scheduler = Noting.from_config(ddim().config)
    call = {k: v.bfloat16() if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    reused(pipe, call, "steps:full hold:sample=1.1;0.1 full:sample=0.9,0.1;0.1", steps=3)
    assert seen == [torch.bfloat16] * 3


# ---------------------------------------------------------------------- where a fit cannot be followed
def test_without_enough_full_steps_before_it_a_step_is_as_without_a_fit() -> None:
    pipe, call = sd()
    fits = "steps:full hold:sample=1,0.5;0.1 full:sample=1,0.2,0.2;0.1 hold=1,0.1,0.1;1 full=1,0.5;0,0,0,0.1 full"
    got = reused(pipe, call, fits, steps=6)
    assert counters(pipe)["corrected_steps"] == 0
    assert close(got, reused(pipe, call, "steps:full hold:sample full hold full full", steps=6))
    pipe, call = ZOO["img2img"]()
    plan = (
        "full full full full hold:sample=0.5,0.5;0.1 full:sample=1,0.5,1;0,0.1 hold=0.4,0.3,0.3; full hold=1,0.2; full"
    )
    got = reused(pipe, call, f"steps:{plan}", steps=10, strength=0.6)
    assert counters(pipe) == counters(pipe) | {"full_steps": 4, "hold_steps": 2, "corrected_steps": 0}
    tail = "full full hold full hold=1,0.2; full"  # the fifth step, with which it begins, is computed
    assert close(got, reused(pipe, call, f"steps:{tail}", steps=10, strength=0.6))
    assert not close(got, reused(pipe, call, "steps:full full hold full hold full", steps=10, strength=0.6), 1e-3)


def test_latents_of_another_size_begin_anew() -> None:
    pipe, call = sd()

    def grow(pipe: Any, index: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        larger = torch.nn.functional.interpolate(kwargs["latents"], scale_factor=2)
        return {"latents": larger} if index == 1 else kwargs

    call = {**call, "callback_on_step_end": grow}
    plan = "steps:full hold:sample=0.9;0.1 {0} {1} full:sample=0.9,0.1;0.1,0.1 hold:sample=0.6,0.4;"
    for third in ("full", "hold:sample=0.9;0.1"):  # both are computed: nothing is known of latents of this size
        got = reused(pipe, call, plan.format(third, "hold:sample=0.5,0.5;0.1"), steps=6)
        assert close(got, reused(pipe, call, plan.format("full", "hold:sample"), steps=6))
        assert got.shape[-1] == 16


@pytest.mark.parametrize("name", ["EulerDiscrete", "HeunDiscrete", "DPMSolverMultistep"])
def test_latents_are_what_the_denoiser_is_given(name: str) -> None:
    cls = getattr(diffusers, f"{name}Scheduler")
    given: list[torch.Tensor] = []
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    class Noting(cls):  # type: ignore[misc, valid-type]
        def scale_model_input(self, sample: torch.Tensor, timestep: Any) -> torch.Tensor:
            given.append(super().scale_model_input(sample, timestep))
            return given[-1]

        def step(self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, **kwargs: Any) -> Any:
            seen.append((model_output, given[0][:1]))  # the pipeline asks first, with a row for each branch
            given.clear()
            return super().step(model_output, timestep, sample, **kwargs)

    pipe, call = sd()
    pipe.scheduler = Noting.from_config(ddim().config)
    steps = 4 if name == "HeunDiscrete" else 7
    reused(pipe, call, "steps:full full hold=0;1 hold=0;0,1 hold=0;0,0,1 full=0;1 full=0,0;0,1", steps=steps)
    made, latents = zip(*seen, strict=True)
    for step, of in ((2, 2), (3, 1), (4, 0), (5, 5), (6, 5)):
        assert torch.equal(made[step], latents[of])


def test_another_pass_over_the_timesteps_begins_anew() -> None:
    pipe, call = ZOO["animatediff"]()
    pipe.enable_free_init(num_iters=2, use_fast_sampling=False)
    got = reused(pipe, call, "steps:full hold:sample=0.5,0.5;0.1 full hold:sample=0.9,0.1;0.1", steps=4)
    assert close(got, reused(pipe, call, "steps:full hold:sample full hold:sample=0.9,0.1;0.1", steps=4))
    assert counters(pipe)["full_steps"] == 4 == counters(pipe)["hold_steps"]


def test_the_first_step_of_a_second_denoiser_is_computed() -> None:
    pipe, call = wan()
    got = reused(pipe, call, "steps:full hold=1; hold=1; hold=1; hold=1; hold=1;", steps=6)
    assert counters(pipe)["full_steps"] == 2
    assert torch.equal(got, reused(pipe, call, "steps:full hold hold hold hold hold", steps=6))
    last = "steps:full hold hold hold hold hold=0.4,0.6;"  # of the second model's prediction and the first one's
    assert not close(got, reused(pipe, call, last, steps=6), 1e-3)


def test_a_branch_of_guidance_that_is_a_call_of_its_own_may_be_left_out() -> None:
    pipe, call = cogview4()
    plan = "steps:full full hold:sample=0.9,0.1;0.1 full:sample=1;0.01@1/reuse*0.9 hold:sample=1;"
    first = reused(pipe, call, plan, steps=5)
    assert torch.isfinite(first).all() and torch.equal(first, run(pipe, call, steps=5))
    assert counters(pipe) == counters(pipe) | {"full_steps": 3, "hold_steps": 2, "unguided_steps": 1}


def test_rules_of_guidance_and_stretching_leave_out_what_was_fitted() -> None:
    pipe, call = sd()
    plan = "full hold:sample=0.9;0.1 full:epsilon=1,0.1;0.1 full hold:epsilon=1.1,-0.1; hold:sample=0.5,0.5;"
    got = reused(pipe, call, f"steps:{plan}", steps=6, guidance="interval:0.4-1")
    plain = "full hold:sample=0.9;0.1 full:epsilon=1,0.1;0.1 full/none hold:epsilon/none hold:sample/none"
    assert torch.equal(got, reused(pipe, call, f"steps:{plain}", steps=6))
    got = reused(pipe, call, f"steps:{plan}", steps=7, stretch=True)
    assert torch.equal(got, reused(pipe, call, f"steps:{Plan.parse(plan).stretched(7)}", steps=7))
    assert counters(pipe)["hold_steps"] >= 3 and "corrected_steps" not in counters(pipe)
    reused(pipe, call, f"steps:{plan}", steps=6, guidance="reuse:3")
    assert counters(pipe) == counters(pipe) | {"corrected_steps": 1, "unguided_steps": 1, "hold_steps": 3}


# ---------------------------------------------------------------------- refusals
def test_what_has_other_channels_is_refused() -> None:
    pipe, call = sd()
    base = run(*sd(), steps=4)
    calls = counted_calls(pipe.unet.conv_in)
    with pytest.raises(ConfigurationError, match="fits are for 3 channels, the latents here have 4"):
        reused(pipe, call, "steps:full full full hold=1;|1;|1;", steps=4)
    assert calls == [2], "at the first step, not where the fit is"
    pipe.acceleration.remove()
    assert torch.equal(run(pipe, call, steps=4), base)
    with pytest.raises(ConfigurationError, match="fits are for 6 channels, the latents here have 3"):
        reused(*deepfloyd_if(), "steps:full hold=1;|1;|1;|1;|1;|1;", steps=2)


class Otherwise(DDIMScheduler):
    def step(self, model_output: torch.Tensor, timestep: Any, latents: torch.Tensor, **kwargs: Any) -> Any:
        return super().step(model_output, timestep, latents, **kwargs)


def test_what_cannot_be_followed_is_refused_before_a_call() -> None:
    with pytest.raises(AccelerationError, match="once for each view"):
        accelerate(panorama()[0], Reuse(plan="steps:full hold=1;"))
    pipe = sd()[0]
    pipe.scheduler = Otherwise.from_config(ddim().config)
    assert "sample" not in inspect.signature(pipe.scheduler.step).parameters
    with pytest.raises(AccelerationError, match="the step of Otherwise takes no sample"):
        accelerate(pipe, Reuse(plan="steps:full full=1;"))
    accelerate(pipe, Reuse(plan="steps:full hold=1"))
    unknown = sd()[0]
    unknown.scheduler.register_to_config(prediction_type="unknown")
    for plan in ("steps:full full:sample=1;", "steps:full hold:epsilon=1;"):
        with pytest.raises(AccelerationError, match="cannot be turned into noise or clean sample"):
            accelerate(unknown, Reuse(plan=plan))


def test_a_prediction_of_another_shape_than_the_latents_is_refused() -> None:
    class Half(DDIMScheduler):
        def step(self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, **kwargs: Any) -> Any:
            return super().step(model_output.repeat(1, 1, 2, 1), timestep, sample, **kwargs)

    pipe, call = sd()
    pipe.scheduler = Half.from_config(ddim().config)
    pipe.unet.register_forward_hook(lambda module, args, output: (output[0][:, :, :4],))
    with pytest.raises(ConfigurationError, match="predictions of the latents' shape"):
        reused(pipe, call, "steps:full hold=1;", steps=2)


# ---------------------------------------------------------------------- the weight of guidance
@pytest.mark.parametrize("build", [sd, cogview4], ids=["halves", "calls"])
def test_without_weight_there_is_no_guidance_and_with_1_all_of_it(build: Callable[[], Any]) -> None:
    pipe, call = build()
    plan = "steps:full full full/reuse{} full"
    none = reused(pipe, call, plan.format("*0"), steps=4)
    assert close(none, reused(pipe, call, "steps:full full full/none full", steps=4))
    one = reused(pipe, call, plan.format("*1"), steps=4)
    assert torch.equal(one, reused(pipe, call, plan.format(""), steps=4)) and not close(one, none, 1e-3)


def test_the_difference_of_the_branches_counts_what_its_weight_says() -> None:
    pipe, call = sd()
    seen: list[torch.Tensor] = []

    class Noting(DDIMScheduler):
        def step(self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, **kwargs: Any) -> Any:
            seen.append(model_output)
            return super().step(model_output, timestep, sample, **kwargs)

    pipe.scheduler = Noting.from_config(ddim().config)
    for weight in ("*0", "*0.37", "", "*2.5"):
        reused(pipe, call, f"steps:full full@1/reuse{weight} full/reuse{weight}", steps=3)
    for step in (1, 2):
        none, part, all_of_it, more = seen[step::3]
        if step == 1:  # whose latents are the same
            assert close(part - none, 0.37 * (all_of_it - none)) and close(more - none, 2.5 * (all_of_it - none))
        assert not close(part, all_of_it, 1e-3)
    assert counters(pipe)["unguided_steps"] == 2
