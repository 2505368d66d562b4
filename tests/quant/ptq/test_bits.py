"""How many bits each layer gets."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from quantized import WHOLE, sampler

from diffusion_accel.errors import ConfigurationError
from diffusion_accel.quant.ptq.bits import allocate
from diffusion_accel.quant.ptq.run import quantize_denoiser


def test_allocation_against_brute_force() -> None:
    torch.manual_seed(0)
    choices = (2, 3, 4, 6)
    for _ in range(20):
        need = torch.rand(5).tolist()
        errors = {f"l{i}": {b: need[i] * 4.0**-b for b in choices} for i in range(5)}
        sizes = dict.fromkeys(errors, 100)
        found = allocate(errors, sizes, 3.4)
        assert sum(found.values()) / 5 <= 3.4
        cost = sum(errors[n][b] for n, b in found.items())
        every = (dict(zip(errors, bits, strict=True)) for bits in itertools.product(choices, repeat=5))
        best = min(sum(errors[n][b] for n, b in e.items()) for e in every if sum(e.values()) / 5 <= 3.4)
        assert cost <= best * 1.5  # greedy: at most one step of one layer is lost
    ordered = sorted(range(5), key=lambda i: need[i])
    assert [found[f"l{i}"] for i in ordered] == sorted(found.values())  # more need, more bits


def test_a_budget_that_cannot_be_kept_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="not enough"):
        allocate({"a": {2: 1.0, 4: 0.1}}, {"a": 10, "first": 10}, 3.0, {"first": 8})


def test_a_budget_of_bits_ends_in_layers_of_several_widths(tmp_path: Path) -> None:
    run = quantize_denoiser(sampler(), replace(WHOLE, bits_budget=3.5, rounding=None, finetune=None), tmp_path)
    layers = run.layers()
    sizes = {n: m.weight_shape.numel() for n, m in layers.items()}
    bits = {n: m.spec.weight_bits for n, m in layers.items()}
    assert sum(bits[n] * sizes[n] for n in bits) / sum(sizes.values()) <= 3.5
    assert len(set(bits.values())) > 2 and bits["conv_in"] == bits["conv_out"] == 8
    assert all(m.spec.sensitivity is not None for m in layers.values())
