"""How many bits each layer gets, and how many of its weights share a grid."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from quantized import WHOLE, sampler

from diffusion_accel.errors import ConfigurationError
from diffusion_accel.quant.ptq.bits import Grid, Option, allocate, rounding_errors
from diffusion_accel.quant.ptq.run import quantize_denoiser


def test_allocation_against_brute_force() -> None:
    torch.manual_seed(0)
    grids = [Grid(2), Grid(3), Grid(4), Grid(4, 32), Grid(6)]
    for _ in range(20):
        need = torch.rand(5).tolist()
        options = {
            f"l{i}": [Option(g, 100 * g.bits + 3 * g.group, need[i] * 4.0 ** -(g.bits + g.group / 64)) for g in grids]
            for i in range(5)
        }
        by_grid = {name: {o.grid: o for o in each} for name, each in options.items()}
        found = allocate(options, 1700)
        taken = [by_grid[name][grid] for name, grid in found.items()]
        assert sum(o.cost for o in taken) <= 1700
        every = (each for each in itertools.product(*options.values()) if sum(o.cost for o in each) <= 1700)
        best = min(sum(o.error for o in each) for each in every)
        assert sum(o.error for o in taken) <= best * 1.5  # greedy: at most one step of one layer is lost
    ordered = sorted(range(5), key=lambda i: need[i])
    costs = [by_grid[f"l{i}"][found[f"l{i}"]].cost for i in ordered]
    assert costs == sorted(costs)  # more need, more bits


def test_a_budget_that_cannot_be_kept_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="below the 1000"):
        allocate({"a": [Option(Grid(2), 200, 1.0)], "first": [Option(Grid(8), 800, 0.0)]}, 900)


@pytest.mark.parametrize("grid", [Grid(4), Grid(3, 16), Grid(8, 64)])
def test_the_cost_of_a_grid_is_what_a_layer_stores(grid: Grid) -> None:
    from diffusion_accel.quant.buckets import Buckets
    from diffusion_accel.quant.layers import quantized_like
    from diffusion_accel.quant.spec import LayerSpec

    for layer in (torch.nn.Linear(70, 5), torch.nn.Conv2d(7, 6, 3)):
        made = quantized_like(layer, LayerSpec(grid.bits, grid.group), Buckets(()))
        stored = (t for name, t in made.named_buffers() if name[0] != "_")
        assert grid.cost(layer.weight) == 8 * sum(t.numel() * t.element_size() for t in stored)


def test_smaller_groups_lose_less() -> None:
    weight = torch.randn(8, 20, 3, 3, generator=torch.Generator().manual_seed(0))
    errors = rounding_errors(weight, [Grid(4), Grid(4, 64), Grid(4, 16), Grid(5, 16)])
    assert sorted(errors.values(), reverse=True) == list(errors.values())


def test_a_budget_of_bits_ends_in_layers_of_several_widths(tmp_path: Path) -> None:
    settings = replace(WHOLE, bits_budget=4.5, groups=(0, 16), rounding=None, finetune=None)
    run = quantize_denoiser(sampler(), settings, tmp_path)
    layers = run.layers()
    count = sum(m.weight_shape.numel() for m in layers.values())
    cost = sum(Grid(m.spec.weight_bits, m.spec.weight_group).cost(m.floats()) for m in layers.values())
    assert cost <= 4.5 * count
    assert len({m.spec.weight_bits for m in layers.values()}) > 2
    assert {m.spec.weight_group for m in layers.values()} == {0, 16}
    assert layers["conv_in"].spec.weight_bits == layers["conv_out"].spec.weight_bits == 8
    assert all(m.spec.sensitivity is not None for m in layers.values())
