"""The reuse engine: other implementations as oracles, plans as data, and no state from one call to the next."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import itertools
import warnings
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from zoo import ZOO, ddim, dit, rand, run, sd, sdxl

from diffusion_accel import AccelerationError, ConfigurationError, EncoderReuse, Reuse, accelerate
from diffusion_accel.hooks import tensors_in
from diffusion_accel.prediction import Conversion
from diffusion_accel.reuse.guidance import GuidanceRule
from diffusion_accel.reuse.history import History, weights
from diffusion_accel.reuse.plan import Plan, Step
from diffusion_accel.reuse.preset import Preset, branch_depth


def counters(pipe: Any) -> dict[str, float]:
    return pipe.acceleration.report().counters["reuse"]


def reused(pipe: Any, call: dict[str, Any], plan: str, **options: Any) -> torch.Tensor:
    changes = {
        k: options.pop(k) for k in ("steps", "latents", "height", "width", "guidance_scale", "strength") if k in options
    }
    accelerate(pipe, Reuse(plan=plan, **options))
    return run(pipe, call, **changes)


# ---------------------------------------------------------------------- other implementations
@pytest.mark.parametrize("build", [sd, sdxl], ids=["sd", "sdxl"])
@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"])
@pytest.mark.parametrize(("interval", "branch"), [(3, 0), (2, 1), (5, 2), (2, 3), (1, 0)])
def test_deepcache_equals_the_deepcache_package(build: Any, scheduler: str, interval: int, branch: int) -> None:
    deepcache = pytest.importorskip("DeepCache")
    pipe, call = build()
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    helper = deepcache.DeepCacheSDHelper(pipe)
    helper.set_params(cache_interval=interval, cache_branch_id=branch)
    helper.enable()
    want = run(pipe, call, steps=8)
    helper.disable()
    assert torch.equal(reused(pipe, call, f"deepcache:{interval},{branch}", steps=8), want)


@pytest.mark.parametrize("kind", ["sd", "controlnet", "ip_adapter", "unet2d", "svd"])
@pytest.mark.parametrize("plan", ["faster-diffusion", "uniform:3", "full"])
def test_its_presets_equal_encoder_reuse_bit_for_bit(kind: str, plan: str) -> None:
    schedule = {"faster-diffusion": "paper", "full": "all"}.get(plan, plan)
    pipe, call = ZOO[kind]()
    accelerate(pipe, EncoderReuse(schedule=schedule))
    want = run(pipe, call, steps=9)
    pipe.acceleration.remove("encoder_reuse")
    assert torch.equal(reused(pipe, call, plan, steps=9), want)


def fit(values: list[tuple[float, torch.Tensor]], order: int, time: float) -> torch.Tensor:
    chosen = values[-(order + 1) :]
    known = np.stack([v.flatten() for _, v in chosen])
    powers = np.polyfit([t / 1000 for t, _ in chosen], known, len(chosen) - 1)
    result = np.array([np.polyval(p, time / 1000) for p in powers.T])
    return torch.tensor(result, dtype=torch.float32).view(chosen[0][1].shape)


def by_hand(pipe: Any, call: dict[str, Any], latents: torch.Tensor, plan: Plan) -> torch.Tensor:
    """A sampling loop without hooks: held predictions by numpy's polynomial fit, one guidance branch at a time."""
    scheduler, scale = ddim(), call["guidance_scale"]
    scheduler.set_timesteps(len(plan))
    x, known, gaps, guided = latents, [], [], True
    for t, step in zip(scheduler.timesteps, plan.steps, strict=True):
        time = float(t)

        if step.mode == "hold":
            if step.weights and len(step.weights) <= len(known):
                newest = [v for _, v in reversed(known)]
                without, given = (sum(w * v[i] for w, v in zip(step.weights, newest, strict=False)) for i in (0, 1))
            else:
                without, given = (fit([(k, v[i]) for k, v in known], step.order, time) for i in (0, 1))
        else:
            given = pipe.unet(x, t, encoder_hidden_states=call["prompt_embeds"]).sample
            if step.guidance == "both":
                without = pipe.unet(x, t, encoder_hidden_states=call["negative_prompt_embeds"]).sample
                gaps.append((time, without - given))
                if known and not guided:
                    known.clear()  # nothing was known of this branch
            else:
                without = given + (fit(gaps, step.order, time) if step.guidance == "reuse" else 0)
            known.append((time, (without, given)))
            guided = step.guidance != "none"
        x = scheduler.step(without + scale * (given - without), t, x).prev_sample
    return x


@pytest.mark.parametrize(
    "plan",
    [
        "full hold full hold@1 hold@1 full hold@2 hold@2",
        "full full full full hold@3 hold@3 full hold@2",
        "full hold=0.9 full hold=1.5,-0.4 hold=0.8 full hold=1.2,-0.1,-0.1 hold=0.5,0.5,0.2,-0.2",
        "full full/reuse full/reuse full full/reuse@1 hold@1 full hold",
        "full/none full/none full hold full/reuse hold@2 full/none full/none",
    ],
)
@torch.no_grad()
def test_held_predictions_and_reused_guidance_equal_a_loop_by_hand(plan: str) -> None:
    tokens = plan.replace("/reuse@1", "@1/reuse")
    pipe, call = sd()
    latents = rand(1, 4, 8, 8, seed=9)
    got = reused(pipe, call, f"steps:{tokens}", steps=8, latents=latents.clone(), height=16, width=16)
    want = by_hand(pipe, call, latents, Plan.parse(tokens))
    assert (got - want).abs().max() <= 3e-4 * want.abs().max()


KINDS = ("epsilon", "v_prediction", "sample")


@pytest.mark.parametrize("kind", [*KINDS, "flow"])
@pytest.mark.parametrize("space", ["epsilon", "sample"])
def test_noise_and_clean_sample_are_what_the_schedule_says(kind: str, space: str) -> None:
    x0, noise = torch.randn(2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    if kind == "flow":
        scheduler: Any = FlowMatchEulerDiscreteScheduler()
        x = 0.7 * x0 + 0.3 * noise
        prediction, time = noise - x0, 300.0
    else:
        scheduler, time = ddim(prediction_type=kind), 300.0
        x = scheduler.add_noise(x0, noise, torch.tensor([300]))
        velocity = scheduler.get_velocity(x0, noise, torch.tensor([300]))
        prediction = {"epsilon": noise, "v_prediction": velocity, "sample": x0}[kind]
    conversion = Conversion(scheduler)
    assert conversion.possible
    there = conversion.to(space, prediction, x, time)
    assert torch.allclose(there, noise if space == "epsilon" else x0, atol=1e-4)
    assert torch.allclose(conversion.back(space, there, x, time), prediction, atol=1e-4)
    doubled = torch.cat([prediction, noise], 1)  # a learned variance stays as it is
    assert torch.equal(conversion.to(space, doubled, x, time)[:, 4:], noise)
    wide = torch.cat([x, noise], 1)  # a mask beside the latents does not matter
    assert torch.equal(conversion.to(space, prediction, wide, time), there)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("space", ["epsilon", "sample"])
def test_holding_noise_or_clean_sample_is_a_longer_step_of_ddim(kind: str, space: str) -> None:
    pipe, call = sd()
    pipe.scheduler = ddim(prediction_type=kind, timestep_spacing="trailing")  # every other of 8 steps is one of 4
    few = run(pipe, call, steps=4)
    held = reused(pipe, call, "steps:" + " ".join([f"full hold:{space}"] * 4), steps=8)
    assert (held - few).abs().max() <= 1e-3 * few.abs().max()


def test_spaces_need_a_scheduler_that_says_how_noise_was_added() -> None:
    pipe, call = ZOO["svd"]()
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.scheduler.register_to_config(prediction_type="unknown")
    with pytest.raises(AccelerationError, match="cannot be turned into noise"):
        reused(pipe, call, "hold:2,epsilon")


def test_guidance_over_an_interval_equals_calls_without_it() -> None:
    pipe, call = sd()
    assert not torch.equal(reused(pipe, call, "full", guidance="interval:0-0.5"), run(*sd()))
    never = reused(pipe, call, "full", guidance="interval:1-1")
    assert torch.allclose(never, run(*sd(), guidance_scale=1.0), atol=1e-4)
    assert torch.equal(reused(pipe, call, "full", guidance="interval:0-1"), run(*sd()))


@torch.no_grad()
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_shallow_steps_of_a_transformer_equal_a_loop_over_its_blocks(depth: int) -> None:
    pipe, call = dit()
    got = reused(pipe, call, f"shallow:2,{depth}@0", steps=4)
    blocks = list(pipe.transformer.transformer_blocks)
    first, end = (depth + 1) // 2, len(blocks) - depth // 2
    kept: list[torch.Tensor] = []
    pipe.acceleration.remove()
    count = 0

    class Inner(torch.nn.Module):
        def __init__(self, inner: list[torch.nn.Module]) -> None:
            super().__init__()
            self.inner = torch.nn.ModuleList(inner)

        def forward(self, hidden: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            nonlocal count
            count += 1
            if count % 2 == 0:
                return hidden + kept[-1]
            out = hidden
            for block in self.inner:
                out = block(out, **kwargs)
            kept.append(out - hidden)
            return out

    pipe.transformer.transformer_blocks = torch.nn.ModuleList(
        [*blocks[:first], Inner(blocks[first:end]), *blocks[end:]]
    )
    assert torch.allclose(run(pipe, call, steps=4), got, atol=1e-5)


# ---------------------------------------------------------------------- work
class Note(ModelHook):
    """Notes the rows with which a module is really computed."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        self.rows.append(tensors_in((args, kwargs))[0].shape[0])
        return args, kwargs


def counted_calls(module: torch.nn.Module) -> list[int]:
    """The rows of every computation of `module` from now on; our hooks come before this one and may skip it."""
    hook = Note()
    HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, "note")
    return hook.rows


@pytest.mark.parametrize("kind", [k for k in ZOO if k != "unet2d_skip"])
@pytest.mark.parametrize("plan", ["hold:2", "shallow:2,1", "shallow:3,2@2", "uniform:3@1"])
def test_every_mode_runs_everywhere_and_skips_what_it_says(kind: str, plan: str) -> None:
    pipe, call = ZOO[kind]()
    calls = {name: counted_calls(getattr(pipe.unet, name)) for name in ("conv_in", "mid_block", "conv_out")}
    first = reused(pipe, call, plan, steps=7)
    counted = counters(pipe)
    steps = pipe.acceleration.report().steps
    assert counted["full_steps"] + counted["reused_steps"] == steps
    assert len(calls["mid_block"]) == counted["full_steps"] < steps
    shallow = counted.get("shallow_steps", 0)
    assert len(calls["conv_in"]) == counted["full_steps"] + shallow
    assert len(calls["conv_out"]) == counted["decoder_runs"] + shallow
    assert counted["peak_cache_bytes"] > 0
    assert torch.equal(run(pipe, call, steps=7), first)


@pytest.mark.parametrize("scheduler", sorted(ddim().compatibles, key=lambda c: c.__name__), ids=lambda c: c.__name__)
def test_every_compatible_scheduler_with_every_mode(scheduler: Any) -> None:
    if scheduler.__name__ == "DPMSolverSDEScheduler":
        pytest.importorskip("torchsde", reason="DPMSolverSDEScheduler itself needs torchsde")
    pipe, call = sd()
    plan = "steps:full full hold@1 full/reuse hold@2 shallow:2@1 full decoder@1"

    def eight_steps(plan: str) -> torch.Tensor:
        seed = {"noise_sampler_seed": 0} if scheduler.__name__ == "DPMSolverSDEScheduler" else {}
        pipe.scheduler = scheduler.from_config(ddim().config, **seed)
        return reused(pipe, call, plan, steps=8, stretch=True)

    base, first = eight_steps("full"), eight_steps(plan)
    counted = counters(pipe)
    assert torch.isfinite(first).all() and not torch.equal(first, base)
    assert counted["full_steps"] + counted["reused_steps"] == pipe.acceleration.report().steps
    assert counted["hold_steps"] and counted["shallow_steps"] and counted["unguided_steps"]
    assert torch.equal(eight_steps(plan), first)


class Still(DDIMScheduler):
    """Stands still: the same timestep and the same latents at every step, so whatever is kept is exact."""

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        super().set_timesteps(num_inference_steps, device)
        self.timesteps = torch.full_like(self.timesteps, 500)
        self.seen: list[torch.Tensor] = []

    def step(self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, **more: Any) -> Any:
        self.seen.append(model_output)
        return DDIMSchedulerOutput(prev_sample=sample, pred_original_sample=sample)


@pytest.mark.parametrize("freeu", [False, True], ids=["", "freeu"])
@pytest.mark.parametrize(
    "kind", ["sd", "sd_batch", "sdxl", "controlnet", "t2i_adapter", "ip_adapter", "img2img", "unet3d"]
)
def test_what_is_kept_is_exact_where_nothing_moves(kind: str, freeu: bool) -> None:
    pipe, call = ZOO[kind]()
    if freeu:
        pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    pipe.scheduler = Still.from_config(pipe.scheduler.config)
    tokens = (
        "full shallow:1 decoder@1 hold@2 shallow:3@1 full decoder shallow:2 shallow:2/reuse full/reuse decoder/reuse"
    )
    accelerate(pipe, Reuse(plan=f"steps:{tokens} hold:epsilon hold:sample@1", stretch=True))
    run(pipe, call, steps=13)
    first, *others = pipe.scheduler.seen
    assert len(others) >= 4
    for other in others:
        assert (other - first).abs().max() <= 2e-5 * first.abs().max()


def test_the_unconditional_branch_is_really_left_out() -> None:
    pipe, call = sd()
    rows = counted_calls(pipe.unet.conv_out)
    reused(pipe, call, "full", guidance="reuse:3", steps=7)
    assert rows == [2, 1, 1, 2, 1, 1, 2]
    assert counters(pipe)["unguided_steps"] == 4
    assert torch.equal(
        reused(pipe, call, "full", guidance="reuse:3", guidance_scale=1.0), run(*sd(), guidance_scale=1.0)
    )


def test_repeated_blocks_are_compiled_once_for_all_modes() -> None:
    from torch._dynamo.utils import counters as compiled

    pipe, call = sd()
    plan = "steps:full hold@1 shallow:2 full decoder decoder@1 full hold@2"
    want = reused(pipe, call, plan, steps=8, batch_decoder=False)
    torch._dynamo.reset()
    compiled.clear()
    pipe.unet.compile_repeated_blocks(backend="eager", fullgraph=True)
    assert torch.allclose(run(pipe, call, steps=8), want, atol=1e-5)
    graphs = compiled["stats"]["unique_graphs"]
    assert torch.allclose(run(pipe, call, steps=8), want, atol=1e-5)
    assert compiled["stats"]["unique_graphs"] == graphs, "the second call compiles nothing"
    full = compiled["stats"]["unique_graphs"]
    torch._dynamo.reset()
    compiled.clear()
    pipe.acceleration.disable()
    run(pipe, call, steps=8)
    assert compiled["stats"]["unique_graphs"] == full, "reuse adds no graph to those of the plain model"
    torch._dynamo.reset()


# ---------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"plan": "hold:0"}, "hold:n"),
        ({"plan": "hold:2@4"}, "@ORDER"),
        ({"plan": "shallow:2"}, "shallow:n,depth"),
        ({"plan": "shallow:2,0"}, "shallow:n,depth"),
        ({"plan": "steps:hold full"}, "first step"),
        ({"plan": "steps:full fuller"}, "fuller"),
        ({"plan": "steps:"}, "at least one"),
        ({"plan": "steps:full full=1"}, "only hold takes weights"),
        ({"plan": "steps:full hold=1,2,3,4,5"}, "hold=1,2,3,4,5"),
        ({"plan": "steps:full hold=1e9"}, "hold=1e9"),
        ({"plan": "steps:full hold=" + "9" * 400}, "a weight of hold must be at most 10000"),
        ({"plan": "steps:full hold=10001"}, "at most 10000"),
        ({"plan": f"steps:full shallow:{10**22}"}, "depth of a shallow step must be at most 1000"),
        ({"plan": "steps:" + "full " * 10**5}, "at most 10000 steps, got 100000"),
        ({"plan": f"hold:{10**8}"}, "at most 10000"),
        ({"plan": "hold:" + "9" * 5000}, "unknown reuse plan"),
        ({"plan": "deepcache:3,9999"}, "and 1000"),
        ({"plan": "deepcache-pow:5,15,1"}, "deepcache-pow:n,center,power"),
        ({"plan": "deepcache-pow:5,15,1e9"}, "deepcache-pow:n,center,power"),
        ({"plan": "first-block:1e999"}, "first-block:threshold"),
        ({"plan": "first-block:" + "9" * 400}, "at most 10"),
        ({"plan": "taylorseer:2,99"}, "at most 1000 and 4"),
        ({"guidance": "reuse:\u00b2"}, "reuse:n"),
        ({"guidance": f"reuse:{10**9}"}, "reuse:n"),
        ({"stretch": "no"}, "true or false"),
        ({"guidance": "reuse:0"}, "reuse:n"),
        ({"guidance": "interval:0.8-0.2"}, "interval:low-high"),
        ({"max_group_mb": 0}, "max_group_mb"),
        ({"plan": "nowhere.json"}, "nowhere.json"),
        ({"plan": "tuned:nothing"}, "nothing"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        accelerate(sd()[0], Reuse(**options))


def test_plans_that_do_not_fit_are_refused() -> None:
    pipe, call = sd()
    with pytest.raises(AccelerationError, match="4 skip connections"):
        accelerate(pipe, Reuse(plan="shallow:2,5"))
    with pytest.raises(ConfigurationError, match="for 3 steps, this call has 6"):
        reused(pipe, call, "steps:full hold hold")
    reused(pipe, call, "steps:full hold hold", stretch=True)
    assert counters(pipe)["full_steps"] == 1
    pipe, call = dit()
    for plan, words in (("uniform:2", "not a U-Net"), ("shallow:2,4", "4 blocks")):
        with pytest.raises(AccelerationError, match=words):
            accelerate(pipe, Reuse(plan=plan))
    with pytest.raises(AccelerationError, match="one branch only"):
        accelerate(ZOO["unet2d"]()[0], Reuse(guidance="reuse:2"))
    pipe, call = ZOO["unet2d_skip"]()
    with pytest.raises(AccelerationError, match="SkipDownBlock2D"):
        accelerate(pipe, Reuse(plan="shallow:2,1"))


def test_a_part_of_the_steps_takes_that_part_of_the_plan() -> None:
    """img2img with a strength: the plan for as many steps as were asked for is followed from where the call begins."""
    pipe, call = ZOO["img2img"]()
    plan = "full hold full hold full/reuse hold@1 hold@1 full full hold"
    got = reused(pipe, call, f"steps:{plan}", steps=10, strength=0.6)
    assert counters(pipe) == counters(pipe) | {"full_steps": 3, "hold_steps": 3}
    tail = "full hold@1 hold@1 full full hold"  # nothing is known of the step before it
    assert torch.equal(got, reused(pipe, call, f"steps:{tail}", steps=10, strength=0.6))
    with pytest.raises(ConfigurationError, match=r"for 8 steps, this call has 6 of 10 \(its strength.*use 8 steps"):
        reused(pipe, call, "steps:full hold full hold full hold full hold", steps=10, strength=0.6)
    assert str(Plan.parse("full/none full/none hold full").part(1, 3)) == "full/none hold"


def test_deepcache_pow_places_steps_as_the_package_does() -> None:
    plan = Preset.parse("deepcache-pow:5,15,1.4").for_steps(50)
    assert [i for i, s in enumerate(plan.steps) if s.mode == "full"] == [0, 5, 9, 13, 17, 21, 26, 31, 37, 43]
    assert (
        str(Preset.parse("deepcache-pow:3,2,1.2,4@1").for_steps(6))
        == "full shallow:5@1 full shallow:5@1 shallow:5@1 shallow:5@1"
    )
    spec = importlib.util.find_spec("DeepCache")
    if spec is None or spec.origin is None:
        pytest.skip("DeepCache is not installed")
    source = ast.parse((Path(spec.origin).parent / "sd/pipeline_stable_diffusion.py").read_text())
    of_the_package: dict[str, Any] = {"np": np}
    function = next(n for n in source.body if getattr(n, "name", "") == "sample_from_quad_center")
    exec(ast.unparse(function), of_the_package)  # its module itself does not work with this diffusers
    for total, interval, center, power in itertools.product(
        (10, 25, 50, 100), (2, 3, 5), (0, 7, 15, 40), (1.2, 1.4, 2.0)
    ):
        preset = Preset.parse(f"deepcache-pow:{interval},{center},{power}")
        try:
            with np.errstate(all="ignore"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                slow = -(-total // interval)
                want = {int(i) for i in of_the_package["sample_from_quad_center"](total, slow, center, power)[0]}
        except ValueError:
            want = None
        if want is None or center >= total:
            with pytest.raises(ConfigurationError, match="lower center"):
                preset.for_steps(total)
        else:
            assert {i for i, step in enumerate(preset.for_steps(total).steps) if step.mode == "full"} == want


# ---------------------------------------------------------------------- plans and forecasts as data
STEPS = st.builds(
    Step,
    mode=st.sampled_from(["full", "decoder", "hold"]),
    order=st.integers(0, 3),
    guidance=st.sampled_from(["both", "reuse", "none"]),
) | st.builds(Step, mode=st.just("hold"), order=st.integers(0, 2), space=st.sampled_from(["epsilon", "sample"]))
STEPS |= st.lists(st.integers(-99999, 99999), min_size=1, max_size=4).map(
    lambda w: Step("hold", order=len(w) - 1, weights=tuple(n / 10000 for n in w))
)
STEPS |= st.builds(Step, mode=st.just("shallow"), depth=st.integers(1, 3), order=st.integers(0, 3))
PLANS = st.lists(STEPS, min_size=0, max_size=12).map(lambda rest: Plan((Step(), *rest)))


@given(plan=PLANS, total=st.integers(1, 40))
def test_plans_survive_text_and_stretching(plan: Plan, total: int) -> None:
    assert Plan.parse(str(plan)) == plan
    assert plan.stretched(len(plan)) is plan
    other = plan.stretched(total)
    assert len(other) == total and other.steps[0].mode == "full"
    full, before = (sum(s.mode == "full" for s in p.steps) for p in (other, plan))
    assert full <= max(before, total * before / len(plan) + 1)
    if total >= len(plan):
        assert full >= before


@given(
    times=st.lists(st.integers(0, 999), min_size=1, max_size=4, unique=True),
    at=st.integers(0, 999),
    powers=st.lists(st.floats(-2, 2), min_size=4, max_size=4),
)
def test_forecasts_are_exact_for_polynomials(times: list[int], at: int, powers: list[float]) -> None:
    degree = len(times) - 1

    def value(t: float) -> torch.Tensor:
        return torch.tensor([sum(p * (t / 1000) ** i for i, p in enumerate(powers[: degree + 1]))], dtype=torch.float64)

    history = History(4)
    for t in times:
        history.push(float(t), (value(t), {"twice": 2 * value(t)}))
    one, two = history.at(float(at), degree)
    scale = sum(abs(w) for w in weights([float(t) for t in times], float(at))) * 8
    assert abs(one - value(at)) <= 1e-9 * scale and torch.allclose(two["twice"], 2 * one)
    assert history.at(float(at), 0) is history.values[0]
    history.push(float(times[-1]), (value(0), {"twice": value(0)}))
    assert len(history) == len(times), "a repeated timestep replaces its value"


def test_presets_and_guidance_make_the_plans_that_they_name() -> None:
    assert str(Preset.parse("hold:3@2").for_steps(7)) == "full hold@2 hold@2 full hold@2 hold@2 full"
    assert str(Preset.parse("hold:3").for_steps(35)).startswith("full hold hold full")
    assert str(Preset.parse("hold:3").for_steps(36)).startswith("full hold@1 hold@1 full")
    assert Preset.parse("shallow:2,1").kinds().highest_order == 1
    assert str(Preset.parse("hold:2,epsilon@0").for_steps(3)) == "full hold:epsilon full"
    assert str(Preset.parse("deepcache:2,4@1").for_steps(3)) == "full shallow:5@1 full"
    assert [branch_depth(b, 2) for b in range(6)] == [1, 2, 3, 4, 5, 6]
    assert [branch_depth(b, 1) for b in range(6)] == [1, 2, 2, 3, 4, 4]
    plan = GuidanceRule.parse("interval:0.3-0.8").applied(Preset.parse("full").for_steps(4), [0.9, 0.6, 0.4, 0.1])
    assert str(plan) == "full/none full full full/none"
    assert Reuse.parse("deepcache:3,1,guidance=reuse:2") == Reuse(plan="deepcache:3,1", guidance="reuse:2")
    assert Reuse.parse("plan=hold:3@1") == Reuse(plan="hold:3@1")
    weighted = "steps:full hold=0.9 full hold:sample=1.2,-0.1 hold=0.5"
    assert Reuse.parse(f"{weighted},stretch=true") == Reuse(plan=weighted, stretch=True)


# ---------------------------------------------------------------------- stale state
CALLS = st.fixed_dictionaries(
    {
        "plan": PLANS.map(lambda plan: f"steps:{plan}") | st.sampled_from(["hold:2", "deepcache:3", "uniform:2@1"]),
        "steps": st.integers(1, 8),
        "scheduler": st.sampled_from(
            ["DDIMScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler", "DDPMScheduler"]
        ),
        "guidance_scale": st.sampled_from([1.0, 4.0]),
        "height": st.sampled_from([16, 24]),
        "num_images_per_prompt": st.sampled_from([1, 2]),
        "stop": st.none() | st.integers(0, 3),
        "enabled": st.sampled_from([True, True, False]),
    }
)


class Stop(Exception):
    pass


@settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
)
@given(calls=st.lists(CALLS, min_size=2, max_size=4))
def test_every_result_equals_that_of_a_fresh_pipeline(calls: list[dict[str, Any]]) -> None:
    def one(pipe: Any, call: dict[str, Any], given: dict[str, Any], stopping: bool) -> torch.Tensor:
        changes = dict(given)
        name, stop, enabled = (changes.pop(key) for key in ("scheduler", "stop", "enabled"))
        pipe.scheduler = getattr(diffusers, name).from_config(ddim().config)
        accelerate(pipe, Reuse(plan=changes.pop("plan"), stretch=True))
        pipe.acceleration.enable() if enabled else pipe.acceleration.disable()

        def halt(pipe: Any, index: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
            if index == stop:
                raise Stop
            return kwargs

        if stopping and stop is not None:
            with contextlib.suppress(Stop):
                run(pipe, call, **changes, callback_on_step_end=halt)
        return run(pipe, call, **changes)

    pipe, call = sd()
    for changes in calls:
        assert torch.equal(one(pipe, call, changes, True), one(*sd(), changes, False))
