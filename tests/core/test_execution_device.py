"""Where a pipeline computes is what diffusers says, found faster."""

from __future__ import annotations

from typing import Any

import accelerate
import pytest
import torch
from diffusers.hooks import apply_group_offloading
from torch import nn
from zoo import ZOO, sd

from diffusion_accel.diffusers_compat import execution_device


@pytest.mark.parametrize("name", sorted(ZOO))
def test_as_it_was_loaded(name: str) -> None:
    pipe, _ = ZOO[name]()
    assert execution_device(pipe) == pipe._execution_device == torch.device("cpu")


def _moved(pipe: Any) -> None:
    pipe.to("meta")


def _one_moved(pipe: Any) -> None:
    pipe.vae.to("meta")


def _offloaded(pipe: Any) -> None:
    pipe.to("meta")
    accelerate.cpu_offload(pipe.unet, execution_device="cpu", state_dict=sd()[0].unet.state_dict())


def _offloaded_in_groups(pipe: Any) -> None:
    for model in (pipe.unet, pipe.vae):
        apply_group_offloading(model, torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")
        nn.Module.to(model, "meta")


@pytest.mark.parametrize("change", [_moved, _one_moved, _offloaded, _offloaded_in_groups])
def test_after_it_was_moved(change: Any) -> None:
    pipe, _ = sd()
    change(pipe)
    assert execution_device(pipe) == pipe._execution_device
