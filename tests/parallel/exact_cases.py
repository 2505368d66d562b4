"""Cases: `sync` equals one process, bare models in double precision."""

from __future__ import annotations

import copy
from typing import Any

import bare
import torch
import zoo
from case_tools import close, once

from diffusion_accel.parallel.geometry import Level, Split, Window

SIZES = [(1, 16, 8), (2, 24, 16), (3, 20, 12), (1, 13, 9), (2, 9, 14), (1, 4, 32)]


DEEP_SIZES = [(1, 37, 24), (2, 40, 16), (1, 8, 43)]


def sync_any_size(rank: int, size: int) -> None:
    """Odd heights, uneven splits, columns where rows are too few; sizes and batches change between calls."""
    for model, sizes in ((bare.unet(), SIZES), (bare.deep_unet(), DEEP_SIZES)):
        with bare.split(model, "sync"):
            together = [bare.predict(model, **bare.inputs(*shape)) for shape in sizes]
        plain = once(lambda model=model, sizes=sizes: [bare.predict(model, **bare.inputs(*shape)) for shape in sizes])
        for expected, found in zip(plain, together, strict=True):
            close(found, expected, 1e-9)


def sync_other_convolutions(rank: int, size: int) -> None:
    """Kernels, strides, dilations and paddings that no U-Net of the zoo has, by themselves."""
    x = zoo.rand(2, 3, 24, 10).double()
    for kernel, stride, dilation, padding in [
        (5, 1, 1, 2),
        (3, 1, 3, 3),
        (4, 2, 1, 1),
        (1, 2, 1, 0),
        (7, 2, 2, 6),
        (3, 3, 1, 0),
    ]:
        torch.manual_seed(0)
        conv = torch.nn.Conv2d(3, 4, kernel, stride, padding, dilation).double()
        whole = conv(x)
        for dim in (-2, -1):
            x_, whole_ = (x, whole) if dim == -2 else (x.transpose(2, 3), whole.transpose(2, 3))
            layer = conv if dim == -2 else transposed(conv)
            bounds = tuple(24 * r // size for r in range(size + 1))
            level = Level(24, 10, bounds)
            split = Split(dim, size, rank, (level,))
            with bare.split(layer, "sync") as run, run.running("test", split, tuple(range(size)), True):
                own = layer(x_.narrow(dim, bounds[rank], bounds[rank + 1] - bounds[rank]))
            ends = Window(kernel, stride, dilation, padding, padding).output(level)
            close(own, whole_.narrow(dim, ends[rank], ends[rank + 1] - ends[rank]), 1e-12)


def transposed(conv: Any) -> Any:
    other = copy.deepcopy(conv)
    other.weight = torch.nn.Parameter(conv.weight.detach().transpose(2, 3).contiguous())
    return other


def group_norm_is_chans_formula(rank: int, size: int) -> None:
    """In single precision, with a mean that is large beside the spread: sums of squares alone would lose it."""
    torch.manual_seed(0)
    x = torch.randn(2, 8, 25, 6) + 300 * torch.randn(1, 8, 1, 1)
    norm = torch.nn.GroupNorm(8, 8)
    bounds = tuple(25 * r // size for r in range(size + 1))
    split = Split(-2, size, rank, (Level(25, 6, bounds),))
    with bare.split(norm, "sync") as run, run.running("test", split, tuple(range(size)), True):
        own = norm(x[:, :, bounds[rank] : bounds[rank + 1]])
    wide = torch.nn.GroupNorm(8, 8).double()(x.double())[:, :, bounds[rank] : bounds[rank + 1]]
    close(own.double(), wide, 2e-4)
    torch.manual_seed(1)
    y = torch.randn(2, 8, 25, 6)
    with bare.split(norm, "sync") as run, run.running("test", split, tuple(range(size)), True):
        own = norm(y[:, :, bounds[rank] : bounds[rank + 1]])
    close(own, norm(y)[:, :, bounds[rank] : bounds[rank + 1]], 1e-6)
