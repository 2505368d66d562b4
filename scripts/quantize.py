#!/usr/bin/env python
"""Quantize a model into a checkpoint that diffusers loads; the same as `diffusion-accel quantize`.

python scripts/quantize.py --model sticker --bits w4a8 --budget-minutes 30 -o sticker-w4a8
"""

from __future__ import annotations

import sys

from diffusion_accel.cli.main import run

if __name__ == "__main__":
    run(["quantize", *sys.argv[1:]])
