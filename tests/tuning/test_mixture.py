"""What guidance makes of outputs: found from examples, or there is none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from diffusion_accel.tuning.mixture import Mixing, Mixture

Guidance = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def guided(c: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    return u + 3.5 * (c - u)


def lengthened(c: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """As Qwen-Image has it."""
    combined = guided(c, u)
    return combined * (c.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True))


def mixed(guidance: Guidance, like: int | None = 0) -> Mixture | None:
    mixing = Mixing(like)
    for step in range(3):
        c, u = torch.randn(2, 2, 5, 6, generator=torch.Generator().manual_seed(step))
        mixing.add([c, u], guidance(c, u))
    return mixing.found(1e-3)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("guidance", [guided, lengthened])
def test_it_makes_the_same_of_other_outputs(guidance: Guidance, sign: int) -> None:
    found = mixed(lambda c, u: sign * guidance(c, u))
    assert found is not None and (found.like is None) == (guidance is guided)
    assert found.shares == pytest.approx((3.5 * sign, -2.5 * sign), rel=1e-4)
    c, u = torch.randn(2, 2, 5, 6, generator=torch.Generator().manual_seed(9))
    torch.testing.assert_close(found([c, u]), sign * guidance(c, u), rtol=1e-4, atol=1e-4)


def test_what_is_neither_is_not_found() -> None:
    assert mixed(lengthened, None) is None, "whose length it has is not known"
    assert mixed(lengthened, 1) is None
    assert mixed(lambda c, u: guided(c, u).clamp(-1, 1)) is None
    assert mixed(lambda c, u: lengthened(c, u).clamp(-1, 1)) is None
