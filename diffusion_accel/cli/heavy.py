"""Importing what is large."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def large_imports() -> Iterator[None]:
    """Around the import of torch and diffusers, which makes half a million objects that all stay: nobody looks for
    garbage among them, neither meanwhile (0.8 s of 11) nor later."""
    first, looking = "torch" not in sys.modules, gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if first:
            gc.freeze()
        if looking:
            gc.enable()
