"""What is done to the channels of an input, and undone in the weights, so that rounding loses less.

Sources: Xiao et al., "SmoothQuant" (arXiv 2211.10438), equation 3 and 4; Ashkboos et al., "QuaRot" (arXiv 2404.00456),
for the rotation by a Hadamard matrix.
"""

from __future__ import annotations

import torch

from .affine import half_scale


def to_inner(x: torch.Tensor, dim: int, factor: torch.Tensor | None, block: int) -> torch.Tensor:
    """An input as it is rounded: multiplied by a factor for each channel, then rotated.

    Args:
        x: the input, its channels in dimension `dim`.
        factor: (C,) or None.
        block: channels that are mixed with each other, see `rotated`.
    """
    if factor is not None:
        x = x * _along(factor, x, dim).to(x.dtype)
    return rotated(x, dim, block)


def inner_weight(weight: torch.Tensor, factor: torch.Tensor | None, block: int) -> torch.Tensor:
    """The weight (O, C, …) that makes of `to_inner(x)` what `weight` makes of x."""
    return rotated(weight if factor is None else weight / _along(factor, weight, 1), 1, block)


def outer_weight(weight: torch.Tensor, factor: torch.Tensor | None, block: int) -> torch.Tensor:
    """The inverse of `inner_weight`."""
    weight = rotated(weight, 1, block)
    return weight if factor is None else weight * _along(factor, weight, 1)


def rotated(x: torch.Tensor, dim: int, block: int) -> torch.Tensor:
    """Every `block` channels (of dimension `dim`) times Sylvester's Hadamard matrix over the root of its size, which is
    its own inverse; 0: `x` itself.

    By sums and differences of pairs (the fast Walsh-Hadamard transform), in float32.
    """
    if not block:
        return x
    dim, y, width = dim % x.dim(), x.float(), 1
    while width < block:
        a, b = y.unflatten(dim, (-1, 2, width)).unbind(dim + 1)
        y = torch.stack([a + b, a - b], dim + 1).flatten(dim, dim + 2)
        width *= 2
    return (y * block**-0.5).to(x.dtype)


def smoothing(inputs: torch.Tensor, weight: torch.Tensor, strength: float) -> torch.Tensor:
    """The factor of each input channel, as float16 holds it: max|w|^(1 - strength) / max|x|^strength, with a geometric
    mean of 1.

    Args:
        inputs: (C,), the largest magnitude of each channel of the input.
        weight: (O, C, …).
        strength: 0 … 1, how much of the range of inputs goes into the weights (SmoothQuant's alpha).
    """
    most = weight.detach().float().transpose(0, 1).flatten(1).abs().amax(1)
    logs = (1 - strength) * most.clamp(min=1e-5).log() - strength * inputs.float().clamp(min=1e-5).log()
    return half_scale((logs - logs.mean()).exp()).float()


def _along(factor: torch.Tensor, x: torch.Tensor, dim: int) -> torch.Tensor:
    shape = [1] * x.dim()
    shape[dim] = -1
    return factor.float().view(shape)
