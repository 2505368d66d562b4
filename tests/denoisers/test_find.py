"""Fingerprints follow the weights, whatever was asked before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn
from zoo import sd

from diffusion_accel.denoisers import find, fingerprint


def _written(unet: Any) -> None:
    with torch.no_grad():
        unet.conv_out.weight[0, 0, 0, 0] += 1


def _replaced(unet: Any) -> None:
    unet.conv_out.weight = nn.Parameter(unet.conv_out.weight.detach() * 2)


def _other_data(unet: Any) -> None:
    unet.conv_out.weight.data = unet.conv_out.weight.data * 2


def _adapter(unet: Any) -> None:
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "some")


def _loaded(unet: Any) -> None:
    unet.load_state_dict({name: value + 1 for name, value in unet.state_dict().items()})


def _past_versions(unet: Any) -> None:
    unet.conv_out.weight.data[0, 0, 0, 0] += 1


def _exchanged(unet: Any) -> None:
    """Two parameters of one shape under each other's names."""
    first, second = unet.conv_in.weight, nn.Parameter(unet.conv_in.weight.detach() + 1)
    unet.conv_in.weight = second
    fingerprint(unet)
    unet.conv_in.weight = first
    unet.conv_in.bias, unet.time_embedding.linear_1.bias = unet.time_embedding.linear_1.bias, unet.conv_in.bias


@pytest.mark.parametrize("change", [_written, _replaced, _other_data, _adapter, _loaded, _past_versions, _exchanged])
def test_as_one_that_was_never_asked(change: Any) -> None:
    unet = sd()[0].unet
    first = fingerprint(unet)
    assert fingerprint(unet) == first
    change(unet)
    now = fingerprint(unet)
    find._known.clear()
    assert fingerprint(unet) == now != first
    if change is _adapter:
        unet.delete_adapters("some")
        assert fingerprint(unet) == first


def test_names_are_hashed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = sd()[0].unet
    first = fingerprint(unet)
    monkeypatch.setattr(find, "_digest", lambda *_: "made anew")
    assert fingerprint(unet) == first


def test_one_model_and_two_are_told_apart() -> None:
    unet, other = sd()[0].unet, sd()[0].vae
    found = [fingerprint(*models) for models in ((unet,), (unet, other), (other, unet))]
    assert len(set(found)) == 3
    assert [fingerprint(*models) for models in ((unet,), (unet, other), (other, unet))] == found
    assert fingerprint() == fingerprint()
