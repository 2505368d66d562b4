"""Shared settings: single-threaded torch (reproducible and fast for tiny models), no network, quiet libraries."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["DIFFUSION_ACCEL_AUTO"] = "off"  # tests write into their own folders only
os.environ["DIFFUSION_ACCEL_GRAPHS"] = "off"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).parent))

import torch
from hypothesis import settings

torch.set_num_threads(1)
# The same examples everywhere and every time; HYPOTHESIS_PROFILE=default searches for new ones.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


def pytest_collection_finish() -> None:
    """Collecting garbage, which training and many tests ask for, need not look at all that imports made each time."""
    gc.collect()
    gc.freeze()
