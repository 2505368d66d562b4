"""Tensors that come later: whatever looks at one waits for it, and sees the tensor itself."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

from diffusion_accel.controlnet.later import Later, resolved

VALUE = torch.arange(6.0).reshape(2, 3)


def later(asked: list[int]) -> Later:
    def get() -> torch.Tensor:
        asked.append(1)
        return VALUE

    return Later.of(get)


@pytest.mark.parametrize(
    "use",
    [
        lambda t: torch.ones(2, 3) + t,
        lambda t: t + 1,
        lambda t: t * 2.0,
        lambda t: torch.stack([VALUE, t]),
        lambda t: t[1],
        lambda t: torch.nn.functional.silu(t),
        lambda t: torch.nn.functional.conv2d(t[None, None], torch.ones(1, 1, 1, 1)),
        lambda t: t.to(torch.float64),
        lambda t: t.detach().clone(),
        lambda t: t.chunk(2)[0],
        copy.deepcopy,
        lambda t: pickle.loads(pickle.dumps(t)),
        lambda t: VALUE.clone().add_(t),
        lambda t: torch.as_tensor(t.numpy()),
        lambda t: torch.cat([torch.zeros_like(t), t]) + 0,
        lambda t: torch.cat((t, t), dim=1) * 1,
    ],
)
def test_every_use_gives_what_it_gives_for_the_tensor(use: Any) -> None:
    asked: list[int] = []
    found = use(later(asked))
    assert type(found) is torch.Tensor and asked
    assert torch.equal(found, use(VALUE))


def test_what_it_says_of_itself_is_true() -> None:
    made = later([])
    assert made.shape == (2, 3) and made.dtype == torch.float32 and made.dim() == 2 and len(made) == 2
    assert made.device == VALUE.device and made.numel() == 6 and made.stride() == (3, 1)
    assert repr(made) == repr(VALUE) and made.tolist() == VALUE.tolist() and made.data_ptr() == VALUE.data_ptr()
    assert torch.equal(made, VALUE) and resolved({"a": [made]})["a"][0] is VALUE


def test_on_the_way_nothing_is_waited_for() -> None:
    asked: list[int] = []
    joined = torch.cat([torch.zeros_like(later(asked)), later(asked)])
    assert not asked
    assert joined.shape == (4, 3) and asked


def test_an_error_is_raised_at_each_use() -> None:
    def fails() -> torch.Tensor:
        raise ValueError("not computed")

    broken = Later.of(fails)
    for _ in range(2):
        with pytest.raises(ValueError, match="not computed"):
            VALUE + broken
    with pytest.raises(ValueError, match="not computed"):
        torch.cat([broken, broken]).sum()
