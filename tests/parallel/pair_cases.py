"""Cases: patch parallelism with whatever else can be switched on, on every kind of pipeline that takes both."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pairs
import torch
import torch.distributed as dist
from case_tools import close, left_behind, once, parallel

from diffusion_accel import accelerate


@contextmanager
def files() -> Iterator[None]:
    """What parts are loaded from lies in one folder for all processes, which compare where it lies."""
    with tempfile.TemporaryDirectory(prefix="pairs-") as own:
        pairs.FILES = Path(once(lambda: own))
        yield
        dist.barrier()


def check(kind: str, names: tuple[str, ...]) -> None:
    """In `sync` the images are those of one process, at displaced steps those of all processes and of a second call;
    what is switched off is gone."""
    case = pairs.Case(kind)
    if kind == "sticker":
        case.call |= {"height": 64, "width": 64}  # its latents are halved twice, and each process needs a part of them
    made = {
        "transparent": pairs.transparency,
        "quantized": pairs.quantized,
        "inputs": partial(pairs.quantized, inputs=True),
    }
    for name in names:
        once(lambda name=name: made.get(name, str)(kind))  # files are made once
    if pairs.refused(case, *names, "patch_parallel"):
        return
    plain = case.draw()
    case.on(*names)
    alone = case.draw()
    accelerate(case.pipe, parallel())
    found = case.draw()
    if "inputs" in names:  # sums that differ in the last digit are rounded to another code here and there
        assert (found - alone).abs().mean() < (alone - plain).abs().mean()
    else:
        close(found, alone, 1e-3)
    assert case.pipe.acceleration.report().counters["patch_parallel"]["exact_steps"] > 0
    accelerate(case.pipe, parallel(mode="displaced", warmup=1))
    first = case.draw()
    assert torch.equal(case.draw(), first), "second call"
    copies = [torch.empty_like(first) for _ in range(dist.get_world_size())]
    dist.all_gather(copies, first)
    assert all(torch.equal(copy, first) for copy in copies)
    case.pipe.acceleration.remove("patch_parallel")
    assert torch.equal(case.draw(), alone), "patch_parallel is off"
    for name in reversed(names):
        case.off(name)
    accelerate(case.pipe, parallel(mode="sync"))
    close(case.draw(), plain, 1e-3)
    case.pipe.acceleration.remove()
    assert torch.equal(case.draw(), plain) and set(left_behind(case.pipe)) <= {""}


def case_of(kind: str, names: tuple[str, ...]) -> Callable[[int, int], None]:
    def run(rank: int, size: int) -> None:
        with files():
            check(kind, names)

    return run


NOT_HERE = {"patch_parallel", "compiled", "controlnet_parallel"}  # refused beside it
PAIRS = [(kind, name) for kind in pairs.KINDS for name in pairs.PARTS if name not in NOT_HERE]
PAIR_CASES = {f"pair_{kind}_{name}": case_of(kind, (name,)) for kind, name in PAIRS}
PAIR_CASES |= {f"stack_{kind}": case_of(kind, pairs.STACK) for kind in ("controlnet", "sticker")}
