"""What several tests of reuse need: calls with a plan, counted work, plans made at random."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from hypothesis import strategies as st
from zoo import run

from diffusion_accel import Reuse, accelerate
from diffusion_accel.combination import Combination
from diffusion_accel.hooks import tensors_in
from diffusion_accel.reuse.plan import Plan, Step


def counters(pipe: Any, feature: str = "reuse") -> dict[str, float]:
    """What the last call of a pipeline counted."""
    return pipe.acceleration.report().counters[feature]


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return bool(((a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1)).item())


class Count(ModelHook):
    """Counts the rows that a module really computes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.rows = 0

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        tensor = tensors_in((args, kwargs))[0]
        self.calls, self.rows = self.calls + 1, self.rows + tensor.shape[0]
        return args, kwargs


@contextlib.contextmanager
def counting(module: torch.nn.Module) -> Any:
    hook = Count()
    HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, "count")
    yield hook
    module._diffusers_hook.remove_hook("count")


def reused(pipe: Any, call: dict[str, Any], plan: str, **options: Any) -> torch.Tensor:
    changes = {
        k: options.pop(k) for k in ("steps", "latents", "height", "width", "guidance_scale", "strength") if k in options
    }
    accelerate(pipe, Reuse(plan=plan, **options))
    return run(pipe, call, **changes)


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

# ---------------------------------------------------------------------- with fits, for any number of channels
NUMBERS = st.integers(-9_999_999_999, 9_999_999_999).map(lambda n: n / 10**6)
SPACES = st.sampled_from(["", "epsilon", "sample"])


def _tables(rows: int, numbers: int) -> Any:
    row = st.lists(NUMBERS, min_size=numbers, max_size=numbers).map(tuple)
    return st.lists(row, min_size=rows, max_size=rows).map(tuple)


FITS = st.tuples(st.integers(1, 5), st.integers(1, 8), st.integers(0, 8)).flatmap(
    lambda sizes: st.builds(Combination, _tables(sizes[0], sizes[1]), _tables(sizes[0], sizes[2]))
)
FITTED = st.builds(Step, mode=st.just("hold"), space=SPACES, guidance=st.sampled_from(["both", "reuse"]), fit=FITS)
FITTED |= st.builds(
    lambda fit, space, **others: Step(fit=fit, space=space if fit else "", guidance="reuse", **others),
    fit=st.none() | FITS,
    space=SPACES,
    order=st.integers(0, 3),
    guidance_weight=st.integers(0, 100_000).map(lambda n: n / 10**4),
)
FITTED |= st.builds(Step, space=SPACES, fit=FITS)
FITTED_PLANS = st.lists(STEPS | FITTED, min_size=0, max_size=8).map(lambda rest: Plan((Step(), *rest)))
