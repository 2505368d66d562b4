#!/usr/bin/env python
"""Quantize a model into a checkpoint that diffusers loads; the same as `diffusion-accel quantize`.

python scripts/quantize.py --model sticker --bits w4a8 --budget 30m -o sticker-w4a8
"""

from __future__ import annotations

import runpy
import sys

if __name__ == "__main__":
    sys.argv[1:1] = ["quantize"]
    runpy.run_module("diffusion_accel", run_name="__main__")
