"""One family of plans: each is given as text or as an object, read once, and written as it was."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reuse_tools import PLANS
from zoo import flux, run, sd, sdxl

from diffusion_accel import ConfigurationError, EncoderReuse, Reuse, accelerate
from diffusion_accel.reuse import (
    DiffusersCache,
    GuidanceRule,
    KeySteps,
    Plan,
    PlanFamily,
    PlanSource,
    Preset,
    Step,
    TunedPlan,
    plan_file,
    read_plan,
)
from diffusion_accel.reuse.diffusers_cache import CACHES
from diffusion_accel.reuse.plan_names import shipped

NUMBERS = st.integers(1, 9_999)
ORDERS = st.none() | st.integers(0, 3)
PRESETS = (
    st.sampled_from(["full", "faster-diffusion"]).map(Preset)
    | st.builds(Preset, st.just("uniform"), NUMBERS, order=st.integers(0, 3))
    | st.builds(Preset, st.just("deepcache"), NUMBERS, st.integers(0, 999), st.integers(0, 3))
    | st.builds(Preset, st.just("shallow"), NUMBERS, st.integers(1, 999), ORDERS)
    | st.builds(Preset, st.just("hold"), NUMBERS, order=ORDERS, space=st.sampled_from(["", "epsilon", "sample"]))
    | st.builds(
        lambda n, branch, order, center, power: Preset("deepcache-pow", n, branch, order, "", center, power / 1000),
        st.integers(2, 999), st.integers(0, 9), st.integers(0, 3), st.integers(0, 99), st.integers(1001, 5000),
    )
)  # fmt: skip
CACHE = st.sampled_from(sorted(CACHES)).map(DiffusersCache) | st.builds(
    lambda n, skips: DiffusersCache("mag", (n / 10**6, skips)), st.integers(1, 10**7), st.integers(1, 1000)
)
SOURCES = PLANS.filter(lambda plan: len(plan) > 1) | PRESETS | CACHE | st.sampled_from(shipped()).map(
    lambda name: read_plan(f"tuned:{name}")
)  # fmt: skip
RULES = (
    st.just(GuidanceRule())
    | st.builds(GuidanceRule, st.just("reuse"), st.integers(1, 9_999))
    | st.lists(st.integers(0, 10**6), min_size=2, max_size=2).map(
        lambda ends: GuidanceRule("interval", low=min(ends) / 10**6, high=max(ends) / 10**6)
    )
)
KEYS = st.sampled_from(["paper", "all", "if-stage-2", "uniform:7"]) | st.sets(st.integers(1, 99)).map(
    lambda keys: (0, *sorted(keys))
)


@given(source=SOURCES)
def test_every_plan_is_read_back_from_its_text_and_from_json(source: Any) -> None:
    assert read_plan(str(source)) == source == read_plan(source.text)
    assert type(source).parse(str(source)) == source
    assert type(source).from_dict(source.to_dict()) == source
    made = Reuse(plan=source)
    assert made == Reuse(plan=str(source)) == Reuse.from_dict(made.to_dict())
    assert isinstance(made.plan, str) and made.source is (source.choose() if isinstance(source, PlanFamily) else source)
    assert hash(made) == hash(Reuse(plan=str(source))) and str(made) == str(Reuse(plan=source.text))


@given(rule=RULES)
def test_every_rule_of_guidance_is_read_back(rule: GuidanceRule) -> None:
    assert GuidanceRule.parse(str(rule)) == rule
    assert Reuse(guidance=rule) == Reuse(guidance=str(rule)) and Reuse(guidance=rule).rule is rule


@given(schedule=KEYS, total=st.integers(100, 200))
def test_key_steps_are_a_plan_too(schedule: str | tuple[int, ...], total: int) -> None:
    keys = KeySteps(schedule)
    assert KeySteps.parse(str(keys)) == keys == KeySteps.from_dict(keys.to_dict())
    assert EncoderReuse(schedule=keys) == EncoderReuse(schedule=schedule)
    assert EncoderReuse.parse(f"schedule={keys}").source == keys
    plan = keys.for_steps(total)
    assert len(plan) == total and plan.kinds() <= keys.kinds()


@given(source=SOURCES, total=st.integers(1, 60))
def test_kinds_are_those_of_the_plans(source: PlanSource, total: int) -> None:
    try:
        plan = source.for_steps(total)
    except ConfigurationError:
        assert isinstance(source, Preset) and source.name == "deepcache-pow"
        return
    assert len(plan) == total
    kinds = source.kinds()
    for step in plan.steps:
        same = [k for k in kinds if (k.mode, k.depth) == (step.mode, step.depth)]
        same = [k for k in same if k.space == step.space or step.mode == "full"]  # stretched, it is not corrected
        assert same and max(k.order for k in same) >= step.order
    assert source.works_inside == (kinds.inside or isinstance(source, DiffusersCache))


def test_what_is_kept_is_what_was_given() -> None:
    """JSON, metadata and text of a feature are as they were when the field was a text and nothing else."""
    for text in ("hold:3@0", "deepcache:2,0", "steps:full  hold", "tuned:fast", "pab", "taylorseer:03"):
        assert Reuse(plan=text).to_dict()["plan"] == text and str(Reuse(plan=text)) == f"reuse(plan={text})"
    plan = Plan.parse("full hold@1 hold@1")
    assert Reuse(plan=plan).to_dict() == {
        "plan": "steps:full hold@1 hold@1", "speedup": None, "min_psnr": None, "guidance": "both",
        "stretch": False, "batch_decoder": True, "max_group_mb": 1024,
    }  # fmt: skip
    assert Reuse(plan=TunedPlan.load("tuned:fast")).plan == "tuned:fast"
    assert Reuse(plan=TunedPlan(plan, {})).plan == "steps:full hold@1 hold@1"
    assert Reuse(plan=Plan((Step(),))).plan == "steps:full", "a plan of one step is not the preset"
    assert EncoderReuse(schedule=KeySteps((0, 3))).to_dict()["schedule"] == [0, 3]


def test_settings_behind_a_plan_are_arguments_of_their_own() -> None:
    with pytest.raises(ConfigurationError, match=r"give plan='tuned:dpm' and, beside it, speedup=2, stretch=true"):
        Reuse(plan="tuned:dpm,speedup=2,stretch=true")
    assert Reuse.parse("tuned:dpm,speedup=2") == Reuse(plan="tuned:dpm", speedup=2)


def test_objects_that_mean_nothing_are_refused() -> None:
    for wrong in (KeySteps("paper"), GuidanceRule(), 3, None):
        with pytest.raises(ConfigurationError, match="is not a text"):
            Reuse(plan=wrong)  # type: ignore[arg-type]
    for make in (
        lambda: Preset("holding"), lambda: Preset("shallow", 2), lambda: DiffusersCache("hold"),
        lambda: DiffusersCache("pab", (1.5,)), lambda: GuidanceRule("reuse", 0), lambda: Step("shallow"),
        lambda: Step("full", weights=(1.0,)), lambda: Step("hold", weights=(float("nan"),)),
        lambda: Plan.from_dict({"plan": "steps:full", "more": 1}), lambda: Plan.from_dict({"plan": 3}),
    ):  # fmt: skip
        with pytest.raises(ConfigurationError):
            make()


READERS = ((Plan, "parse"), (Preset, "parse"), (TunedPlan, "load"), (TunedPlan, "from_dict"), (DiffusersCache, "parse"),
           (GuidanceRule, "parse"), (KeySteps, "parse"), (Step, "parse"), (plan_file, "read_json"))  # fmt: skip


def test_nothing_is_read_during_a_call(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """A text is read when the feature is made, a file once; a call of the pipeline reads neither."""
    pipe, call = sd()
    TunedPlan(Plan.parse("full hold full hold"), {"denoiser": "UNet2DConditionModel"}).save(tmp_path / "plan.json")
    counted: list[str] = []
    for owner, name in READERS:
        honest = getattr(owner, name)

        def note(*args: Any, _honest: Any = honest, _name: str = name, **kwargs: Any) -> Any:
            counted.append(_name)
            return _honest(*args, **kwargs)

        monkeypatch.setattr(owner, name, staticmethod(note) if isinstance(owner, type) else note)
    texts = ("hold:2", "steps:full hold full hold", str(tmp_path / "plan.json"), "deepcache:2,1")
    for plan, guidance in itertools.product(texts, ("both", "reuse:2", "interval:0.2-0.8")):
        counted.clear()
        feature = Reuse(plan=plan, guidance=guidance)
        assert counted.count("read_json") == plan.endswith(".json") and counted.count("load") <= 1
        run_once = accelerate(pipe, feature)
        run(pipe, call, steps=4)  # the first may look at the shipped plans, once for all, to name one that fits
        counted.clear()
        run(run_once, call, steps=4)
        assert not counted
    pipe.acceleration.remove()
    accelerate(pipe, EncoderReuse(schedule="uniform:3"))
    counted.clear()
    run(pipe, call, steps=4)
    assert not counted


def test_each_says_which_pipelines_can_follow() -> None:
    unet, transformer = sdxl()[0], flux()[0]
    assert Preset.parse("deepcache:2").supports(unet) is None
    assert "4 skip connections" in str(Plan.parse("full shallow:5").supports(unet))
    assert KeySteps("paper").supports(unet) is None and "no decoder" in str(KeySteps("paper").supports(transformer))
    assert DiffusersCache("pab").supports(transformer) is None
    assert "none of diffusers' caches" in str(DiffusersCache("pab").supports(unet))
    assert "tuned for UNet2DConditionModel" in str(TunedPlan.load("tuned:fast").supports(transformer))
    assert not hasattr(unet, "acceleration") and not hasattr(transformer, "acceleration")
