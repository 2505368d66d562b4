"""What the cases of all files share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import zoo

from diffusion_accel import accelerate
from diffusion_accel.hooks import map_tensors
from diffusion_accel.parallel import PatchParallel

STEPS = 2  # a first step, and one after a step; all others are as that one


def parallel(**changes: Any) -> PatchParallel:
    return PatchParallel(**{"mode": "sync", "timeout": 60.0, **changes})


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Equal to a relative error, in the norm of the largest value."""
    error = float((a.detach() - b.detach()).abs().max() / b.abs().max().clamp(min=1))
    assert error <= tolerance, f"differs by {error:.2e}, allowed {tolerance:.0e}"


def once(make: Callable[[], Any]) -> Any:
    """What rank 0 computes by itself, at every rank: the others need not do the same."""
    box = [make() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box)
    return box[0]


def double(pipe: Any, call: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The same in double precision, in which two orders of a sum differ by 1e-14 and a wrong row does not."""
    wide = map_tensors(lambda t: t.double() if t.is_floating_point() else t, call)
    return pipe.to(torch.float64), wide


def exact(kind: str, wide: bool, feature: dict[str, Any] | None = None, **changes: Any) -> Any:
    """`sync` against one process, for a pipeline of the zoo."""
    pipe, call = double(*zoo.ZOO[kind]()) if wide else zoo.ZOO[kind]()
    tolerance = 1e-9 if wide else 1e-5
    steps = STEPS if wide else 4  # longer steps make the differences of single precision larger
    steps += kind in ("img2img", "inpaint")  # which leave out a share of the steps
    plain = once(lambda: zoo.run(pipe, call, steps=steps, **changes))
    accelerate(pipe, parallel(**feature or {}))
    close(zoo.run(pipe, call, steps=steps, **changes), plain, tolerance)
    counters = pipe.acceleration.report().counters["patch_parallel"]
    assert counters["bytes_sent"] > 0 and counters["stale_steps"] == 0, counters
    return pipe


def left_behind(pipe: Any) -> list[str]:
    models = [m for m in pipe.components.values() if isinstance(m, torch.nn.Module)]
    return [n for model in models for n, m in model.named_modules() if "_diffusers_hook" in m.__dict__]
