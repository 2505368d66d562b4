"""Shared settings: single-threaded torch (reproducible and fast for tiny models), no network, quiet libraries."""

from __future__ import annotations

import gc
import os
import sys
import zlib
from collections import defaultdict
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes that tests start, whose threads would wait for each other
os.environ["DIFFUSION_ACCEL_AUTO"] = "off"  # tests write into their own folders only
os.environ["DIFFUSION_ACCEL_GRAPHS"] = "off"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
# The same examples everywhere and every time; HYPOTHESIS_PROFILE=default searches for new ones.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


@pytest.hookimpl(tryfirst=True)  # before pytest looks for those that are not slow
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of the cases of a test that is `sampled(n)` about each n-th is in `make test`, always the same; the others are
    slow."""
    cases: dict[str, list[tuple[int, pytest.Item]]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("sampled"):
            name = item.nodeid.removeprefix(item.nodeid.split("::")[0])
            cases[item.nodeid.partition("[")[0]].append((zlib.crc32(name.encode()), item))
    for found in cases.values():
        ordered = [item for _, item in sorted(found, key=lambda one: one[0])]
        marker = ordered[0].get_closest_marker("sampled")
        assert marker is not None
        for item in ordered[-(-len(ordered) // marker.args[0]) :]:
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """Collecting garbage, which training and many tests ask for, need not look at all that imports made each time."""
    gc.collect()
    gc.freeze()
