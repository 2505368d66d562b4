"""Walking the parts of a model gives what torch gives."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from diffusion_accel.module_tree import parts_above, parts_of


def _tree(shape: list[int]) -> nn.Module:
    """Modules in a tree: the parent of number n + 1 is `shape[n]`; every third one is shared with the root."""
    modules: list[nn.Module] = [nn.Module()]
    for n, parent in enumerate(shape):
        modules.append(nn.Module())
        modules[parent % (n + 1)].add_module(f"part{n}", modules[-1])
        if n % 3 == 2:
            modules[0].add_module(f"again{n}", modules[-1])
    modules[0].register_module("nothing", None)
    return modules[0]


shapes = st.lists(st.integers(0, 30), max_size=30)


@given(shapes)
def test_every_part_once(shape: list[int]) -> None:
    model = _tree(shape)
    found = parts_of(model)
    assert found[0] is model
    assert len(found) == len(set(found))
    assert set(found) == set(model.modules())


@given(shapes, st.sets(st.integers(0, 30)))
def test_what_has_a_wanted_part_inside(shape: list[int], wanted: set[int]) -> None:
    model = _tree(shape)
    chosen = {part for n, part in enumerate(model.modules()) if n in wanted}
    above = parts_above(model, lambda part: part in chosen)
    assert len(above) == len(set(above))
    assert set(above) == {part for part in model.modules() if chosen & (set(part.modules()) - {part})}
