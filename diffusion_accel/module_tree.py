"""The parts of a model, for what looks at all of them in every call: `nn.Module.modules` takes three times as long."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def parts_of(model: nn.Module) -> list[nn.Module]:
    """A model and all of its parts, each once, the model first."""
    found: dict[int, nn.Module] = {}
    left: list[nn.Module | None] = [model]
    while left:
        part = left.pop()
        if part is not None and id(part) not in found:
            found[id(part)] = part
            left += part._modules.values()
    return list(found.values())


def parts_above(model: nn.Module, wanted: Callable[[nn.Module], bool]) -> list[nn.Module]:
    """The model and those of its parts that have a part for which `wanted` holds, each once, the lowest first."""
    above: dict[int, nn.Module] = {}
    _visit(model, wanted, above, {})
    return list(above.values())


def _visit(
    part: nn.Module, wanted: Callable[[nn.Module], bool], above: dict[int, nn.Module], known: dict[int, bool]
) -> bool:
    """Whether a part, or one of its own parts, is wanted; no closure, which would keep the model until it is
    collected."""
    if id(part) not in known:
        below = [_visit(inside, wanted, above, known) for inside in part._modules.values() if inside is not None]
        if any(below):
            above[id(part)] = part
        known[id(part)] = id(part) in above or wanted(part)
    return known[id(part)]
