"""Counted floating-point operations."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


@dataclass
class FlopCount:
    """The result of `count_flops`; `total` is valid once the block has ended."""

    total: float = 0.0
    excluded: float = 0.0


class _Running(threading.local):
    """The counts that go on in this thread; torch's counter sees its own thread only."""

    def __init__(self) -> None:
        self.counts: list[tuple[FlopCount, FlopCounterMode]] = []


_running = _Running()


@contextmanager
def count_flops() -> Iterator[FlopCount]:
    """Count the operations of everything run inside (2 for a multiply-add), scaled-dot-product attention included.

    torch's own counter knows the CUDA attention kernels but not the CPU one, and no 8-bit products; they are added
    here. Counting slows the run down: take times from another run.
    """
    result = FlopCount()
    counter = FlopCounterMode(
        display=False,
        custom_mapping={
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention_flops,
            torch.ops.aten._int_mm: _product_flops,
            **{getattr(torch.ops.onednn, n): f for n, f in _INTEGER.items() if hasattr(torch.ops.onednn, n)},
        },
    )
    with counter:
        _running.counts.append((result, counter))
        try:
            yield result
        finally:
            _running.counts.remove((result, counter))
    result.total = float(counter.get_total_flops()) - result.excluded


def counting() -> bool:
    """Whether operations are counted in this thread: what is computed elsewhere than in torch must be said then."""
    return bool(_running.counts)


@contextmanager
def uncounted() -> Iterator[None]:
    """What runs inside is left out of every count around it (trials that decide how to compute)."""
    before = [counter.get_total_flops() - result.excluded for result, counter in _running.counts]
    yield
    for (result, counter), count in zip(_running.counts, before, strict=True):
        result.excluded = counter.get_total_flops() - count  # once, also where one of these is inside another


def _cpu_attention_flops(
    query: torch.Size, key: torch.Size, value: torch.Size, *_args: object, **_kwargs: object
) -> int:
    return sdpa_flop_count(query, key, value)


def _product_flops(a: torch.Size, b: torch.Size, *_args: object, **_kwargs: object) -> int:
    return 2 * a[0] * a[1] * b[1]


def _linear_flops(x: torch.Size, *_args: object, out_shape: torch.Size, **_kwargs: object) -> int:
    return 2 * x.numel() * out_shape[-1]


def _convolution_flops(
    _x: torch.Size,
    _scale: float,
    _zero_point: int,
    weight: torch.Size,
    *_args: object,
    out_shape: torch.Size,
    **_kwargs: object,
) -> int:
    return 2 * out_shape.numel() * weight[1:].numel()


_INTEGER = {"qlinear_pointwise": _linear_flops, "qconv2d_pointwise": _convolution_flops}
