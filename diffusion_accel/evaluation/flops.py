"""Counted floating-point operations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


@dataclass
class FlopCount:
    """The result of `count_flops`; `total` is valid once the block has ended."""

    total: float = 0.0


@contextmanager
def count_flops() -> Iterator[FlopCount]:
    """Count the operations of everything run inside (2 for a multiply-add), scaled-dot-product attention included.

    torch's own counter knows the CUDA attention kernels but not the CPU one, which is added here. Counting slows the
    run down: take times from another run.
    """
    result = FlopCount()
    counter = FlopCounterMode(
        display=False,
        custom_mapping={torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention_flops},
    )
    with counter:
        yield result
    result.total = float(counter.get_total_flops())


def _cpu_attention_flops(
    query: torch.Size, key: torch.Size, value: torch.Size, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    return sdpa_flop_count(query, key, value)
