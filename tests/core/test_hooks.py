"""Hooks come and go in any order and leave no trace."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import pytest
import torch
from diffusers.hooks import ModelHook
from hypothesis import given
from hypothesis import strategies as st

from diffusion_accel.errors import CallStateError
from diffusion_accel.hooks import HookSet, bind_bound, bind_method
from diffusion_accel.steps import WatchedStep


class Times(ModelHook):
    """Multiplies the output, around the forward or after it."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def post_forward(self, module: Any, output: Any) -> Any:
        return output * self.factor


class Around(ModelHook):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def new_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        return self.fn_ref.original_forward(*args, **kwargs) * self.factor


def test_of_two_calls_the_first_keeps_its_hook() -> None:
    layer = torch.nn.Linear(1, 1).requires_grad_(False)
    first, second = HookSet("here"), HookSet("here")
    first.add(layer, Times(2.0))
    with pytest.raises(CallStateError, match="Linear is in use by another call"):
        second.add(layer, Times(3.0))
    second.remove()
    assert len(second) == 0 and float(layer(torch.zeros(1))) == 2 * float(layer.bias)
    first.remove()
    assert float(layer(torch.zeros(1))) == float(layer.bias)


@pytest.mark.parametrize("kinds", list(itertools.product((Times, Around), repeat=3)))
@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_hooks_are_removed_in_any_order(kinds: Any, order: tuple[int, ...]) -> None:
    module, x = torch.nn.Identity(), torch.ones(1)
    sets = [HookSet(f"test.{i}") for i in range(4)]
    factors = [2.0, 3.0, 5.0, 7.0]
    for hooks, kind, factor in zip(sets, kinds, factors, strict=False):
        hooks.add(module, kind(factor))
    sets[3].add(module, Around(factors[3]), innermost=True)
    left = set(range(4))
    for i in order:
        sets[i].remove()
        sets[i].remove()
        left -= {i}
        assert float(module(x)) == float(torch.tensor([factors[k] for k in left]).prod() if left else 1)
    assert "_diffusers_hook" not in vars(module) and "forward" not in vars(module)


class Notes(ModelHook):
    def __init__(self, name: str, order: list[str]) -> None:
        super().__init__()
        self.name, self.order = name, order

    def new_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        self.order.append(self.name)
        return self.fn_ref.original_forward(*args, **kwargs)


@pytest.mark.parametrize("own", [False, True], ids=["the class's forward", "one on the instance"])
def test_the_innermost_hook_runs_last(own: bool) -> None:
    module, order = torch.nn.Identity(), list[str]()
    if own:
        module.forward = lambda input: order.append("own") or input  # type: ignore[method-assign,assignment]
    before = dict(vars(module))
    hooks = {name: HookSet(f"test.{name}") for name in ("first", "inside", "last")}
    for name, one in hooks.items():
        one.add(module, Notes(name, order), innermost=name == "inside")
    module(torch.ones(1))
    assert order == ["last", "first", "inside"] + ["own"] * own
    assert list(inspect.signature(module.forward).parameters) == ["input"]
    for one in hooks.values():
        one.remove()
    assert vars(module) == before


def test_arguments_of_what_an_object_has_are_found_by_name() -> None:
    """Of a method, of what stands in its place and wraps it, and of a function; as Python binds them."""

    class Scheduler:
        def step(self, model_output: int, timestep: int, sample: int = 3, **more: int) -> int:
            return model_output

    def function(model_output: int, timestep: int, sample: int = 3, **kwargs: int) -> int:
        return model_output

    scheduler = Scheduler()
    around = WatchedStep(scheduler, scheduler.step, lambda step, args, kwargs: step(*args, **kwargs))
    for call in (scheduler.step, around, WatchedStep(scheduler, around, around.around), function):
        assert bind_bound(call, (1, 2), {}) == {"model_output": 1, "timestep": 2}
        assert bind_bound(call, (1,), {"timestep": 2, "eta": 4}) == {"model_output": 1, "timestep": 2, "eta": 4}
        with pytest.raises(TypeError, match="timestep"):
            bind_bound(call, (1,), {})


class _Forwards:
    """Methods with parameters of every kind."""

    def plain(self, a: Any, b: Any, c: Any = 3, d: Any = None) -> None: ...

    def none(self) -> None: ...

    def only_named(self, a: Any, *, b: Any, c: Any = 3) -> None: ...

    def only_placed(self, a: Any, b: Any = 2, /, c: Any = 3) -> None: ...

    def many(self, a: Any, *args: Any, b: Any = 2) -> None: ...

    def others(self, a: Any, b: Any = 2, **kwargs: Any) -> None: ...


METHODS = [value for value in vars(_Forwards).values() if inspect.isfunction(value)]


@given(
    st.sampled_from(METHODS),
    st.lists(st.integers(), max_size=5),
    st.dictionaries(st.sampled_from("abcdef"), st.integers()),
)
def test_arguments_are_bound_as_python_binds_them(method: Any, args: list[int], kwargs: dict[str, int]) -> None:
    signature = inspect.signature(method)
    try:
        expected = dict(signature.bind(None, *args, **kwargs).arguments)
    except TypeError:
        with pytest.raises(TypeError):
            bind_method(method, tuple(args), kwargs)
        return
    expected.pop("self")
    expected.update(expected.pop("kwargs", {}))
    given_before = dict(kwargs)
    found = bind_method(method, tuple(args), kwargs)
    assert list(found.items()) == list(expected.items())
    assert kwargs == given_before
