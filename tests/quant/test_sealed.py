"""Weights of quantized layers are read and not written."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from quantized_layers import LAYERS, linear, made
from torch import nn

from diffusion_accel.errors import ConfigurationError


def assign(layer: Any, value: Any) -> None:
    layer.weight = value


def assign_data(layer: Any) -> None:
    layer.weight.data = layer.weight.data + 1


def add_to_data(layer: Any) -> None:
    layer.weight.data += 1


def set_item(layer: Any) -> None:
    layer.weight[0] = 0


WRITES: dict[str, Any] = {
    "copy": lambda q: q.weight.copy_(q.weight + 1),
    "in place": lambda q: q.weight.mul_(2),
    "through a view": lambda q: q.weight.detach().flatten()[1:].zero_(),
    "as an output": lambda q: torch.add(q.weight, 1, out=q.weight),
    "several at once": lambda q: torch._foreach_add_([q.weight], 1),
    "initialisation": lambda q: nn.init.normal_(q.weight),
    "data": assign_data,
    "data in place": add_to_data,
    "item": set_item,
    "a parameter": lambda q: assign(q, nn.Parameter(q.weight + 1)),
    "a tensor": lambda q: assign(q, q.weight + 1),
    "a state dict": lambda q: q.load_state_dict({"weight": q.weight + 1}, strict=False),
}


@pytest.mark.parametrize("how", WRITES)
def test_writing_to_the_weights_is_refused(how: str) -> None:
    for kind in ("linear", "conv"):
        layer = made(LAYERS[kind]())
        before = layer.weight.clone()
        with torch.no_grad(), pytest.raises(ConfigurationError, match="cannot be written; a LoRA works beside them"):
            WRITES[how](layer)
        assert torch.equal(layer.weight, before) and type(layer.weight + 1) is torch.Tensor


def test_what_is_read_from_the_weights_is_free() -> None:
    layer = made(linear())
    before = layer.weight.clone()
    for free in (layer.weight.clone(), layer.weight * 1, copy.deepcopy(layer.weight), layer.weight.numpy()):
        free[:] = 0
    assert torch.equal(layer.weight, before) and before.any()
