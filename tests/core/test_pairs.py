"""Every two parts of tests/pairs.py on every kind of pipeline: together they obey the laws, or are refused."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

import pytest
import torch
from graph_tools import FROZEN
from laws import traces
from pairs import DATA, KINDS, PAGE, PAIRS, PARTS, Case, page, reasons, refused

from diffusion_accel.compiled import engines
from diffusion_accel.registry import FEATURES


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place of OpenVINO an engine that compiles in no time, and has copies of the weights as well."""
    monkeypatch.setitem(engines.ENGINES, "openvino", dataclasses.replace(FROZEN, name="openvino"))


class Drawn:
    """A case, and what it draws plainly and with each part alone."""

    def __init__(self, kind: str) -> None:
        self.case = Case(kind)
        self.base = type(self.case.pipe)
        self.plain = self.case.draw()
        self.left = traces(self.case.pipe)  # diffusers' own: the context of a cache
        self._alone: dict[str, torch.Tensor] = {}

    def alone(self, name: str) -> torch.Tensor:
        """What is drawn with one part."""
        if name not in self._alone:
            self.case.on(name)
            self._alone[name] = self.case.draw()
            assert PARTS[name].exact or not torch.equal(self._alone[name], self.plain), f"{name} did nothing"
            self.case.off(name)
        return self._alone[name]


@functools.cache
def drawn(kind: str) -> Drawn:
    """One for all pairs: with everything off a pipeline is what it was, bit for bit."""
    return Drawn(kind)


def equal(a: torch.Tensor, b: torch.Tensor, what: str) -> None:
    assert a.shape == b.shape and torch.equal(a, b), what


def check(kind: str, a: str, b: str) -> None:
    """Hold two parts to the laws on a pipeline."""
    one = drawn(kind)
    case = one.case
    order = a in ("quantized", "inputs") and b == "lora"  # what has adapters is not quantized
    features = [name for name in (a, b) if PARTS[name].setting is not None]
    others = [name for name in (a, b) if name not in features]
    if refused(case, *others, *features):
        assert others or refused(case, b, a), "refused in one order only"
        equal(case.draw(), one.plain, "refused, and changed")
        return
    alone = {name: one.alone(name) for name in (a, b)}
    case.on(a, b)
    both = case.draw()
    for name, other in ((a, b), (b, a)):
        assert PARTS[name].exact or not torch.equal(both, alone[other]), f"{name} did nothing beside {other}"
    equal(case.draw(), both, "second call")
    for first, second in ((a, b),) if order else ((a, b), (b, a)):
        case.off(second)
        if case.idle(second):
            equal(case.draw(), alone[first], f"{first}, and {second} in its neutral setting")
            case.off(second)
        equal(case.draw(), alone[first], f"{first} is left, {second} is off")
        case.off(first)
        if first == a and not order:
            case.on(b, a)
            equal(case.draw(), both, "the other order")
    if hasattr(case.pipe, "acceleration"):
        case.pipe.acceleration.remove()
    assert type(case.pipe) is one.base and set(traces(case.pipe)) <= {*one.left}
    equal(case.draw(), one.plain, "both are off")


ALWAYS = {  # a few of each way to act; all others are slow
    ("controlnet", "compiled", "task_routing"),
    ("controlnet", "patch_parallel", "inputs"),
    ("controlnet", "controlnet_parallel", "encoder_reuse"),
    ("controlnet", "task_routing", "encoder_reuse"),
    ("animatediff", "hold", "inputs"),
    ("wan", "shallow", "quantized"),
    ("flux", "compiled", "shallow"),
    ("flux", "task_routing", "learned"),
    ("flux", "quantized", "lora"),
}


def slow(*values: str, always: bool) -> Any:
    return pytest.param(*values, marks=() if always else pytest.mark.slow)


CELLS = [slow(kind, a, b, always=(kind, a, b) in ALWAYS) for kind in KINDS for a, b in PAIRS]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("kind", "a", "b"), CELLS)
def test_pair(kind: str, a: str, b: str) -> None:
    one = drawn(kind)
    if refused(one.case, a) or refused(one.case, b):
        return
    try:
        check(kind, a, b)
    except BaseException:
        drawn.cache_clear()
        raise


@pytest.mark.parametrize("kind", [slow(kind, always=kind == "controlnet") for kind in KINDS])
def test_what_is_refused_is_what_the_page_says(kind: str) -> None:
    assert reasons(kind) == json.loads(DATA.read_text(encoding="utf-8"))[kind]


def test_every_feature_is_among_the_parts() -> None:
    assert {part.setting("controlnet").name for part in PARTS.values() if part.setting} == {*FEATURES}


def test_the_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(json.loads(DATA.read_text(encoding="utf-8")))
