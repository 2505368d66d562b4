"""What each process of a world does; `test_patch_parallel.py` runs these functions. A case gets (rank, size)."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import exact_cases
import failure_cases
import pair_cases
import pipeline_cases
import stale_cases
import token_cases
import zoo
from case_tools import exact

Case = Callable[[int, int], None]
FILES = (token_cases, exact_cases, stale_cases, pipeline_cases, failure_cases)
SUPPORTED = [kind for kind in zoo.ZOO if kind != "unet2d_skip"]


def find(name: str) -> Case:
    """A case by its name: a function of one of the files, or `sync` on a pipeline of the zoo."""
    if name in ZOO_CASES:
        return ZOO_CASES[name]
    found: Case = next(getattr(file, name) for file in FILES if hasattr(file, name))
    return found


def zoo_case(kind: str, wide: bool) -> Case:
    def case(rank: int, size: int) -> None:
        taken = inspect.signature(type(zoo.ZOO[kind]()[0]).__call__).parameters
        shaped = "height" in taken and kind not in ("deepfloyd_if", "inpaint", "t2i_adapter")
        exact(kind, wide, **{"height": 32, "width": 24} if shaped else {})

    return case


ZOO_CASES = {f"sync_{kind}": zoo_case(kind, wide=True) for kind in SUPPORTED}
ZOO_CASES |= pair_cases.PAIR_CASES
ZOO_CASES |= {
    f"sync_float32_{kind}": zoo_case(kind, wide=False) for kind in ("sd", "sdxl", "svd", "controlnet", "sd_batch")
}
