"""Channels of an input that are mixed before they are rounded, and unmixed in the weights, so that rounding loses less.

Source: Ashkboos et al., "QuaRot" (arXiv 2404.00456); here a Hadamard matrix mixes small blocks.
"""

from __future__ import annotations

import torch


def rotated(x: torch.Tensor, dim: int, block: int) -> torch.Tensor:
    """Every `block` channels (of dimension `dim`) times Sylvester's Hadamard matrix over the root of its size, which is
    its own inverse; 0: `x` itself.

    A weight that is rotated along its input channels makes of a rotated input what the weight makes of the input. By
    sums and differences of pairs (the fast Walsh-Hadamard transform), in float32.
    """
    if not block:
        return x
    dim, y, width = dim % x.dim(), x.float(), 1
    while width < block:
        a, b = y.unflatten(dim, (-1, 2, width)).unbind(dim + 1)
        y = torch.stack([a + b, a - b], dim + 1).flatten(dim, dim + 2)
        width *= 2
    return (y * block**-0.5).to(x.dtype)
