#!/usr/bin/env python3
"""What learning brings on the embedded model: what each part is worth, how far it holds, how near to the truth it is.

    python scripts/measure_learned.py parts --count 24
    python scripts/measure_learned.py robustness --of plans --count 24
    python scripts/measure_learned.py robustness --of solver --count 12
    python scripts/measure_learned.py converged --count 24 --grid docs/images/learned-solver.png

Prompts and noises are those of `bench`, which nothing was tuned on. What is measured is what ships; --solver and
--plans take others from files.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import learned_converged
import learned_parts
import learned_robustness
import torch
from measuring import quiet, write

from diffusion_accel.schedulers.solver import SHIPPED

WHAT = {"parts": learned_parts.run, "robustness": learned_robustness.run, "converged": learned_converged.run}


def main() -> int:
    """Measure one of them, print a table row by row, write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=WHAT)
    parser.add_argument("--model", default="sticker")
    parser.add_argument("--count", type=int, default=24, help="images")
    parser.add_argument("--seed", type=int, default=1000, help="of the first one")
    parser.add_argument("--batch", type=int, default=12, help="images in a call")
    parser.add_argument("--calibration", type=int, default=40, help="parts: images that are fitted to")
    parser.add_argument("--rollouts", type=int, default=150, help="parts: of the local search")
    parser.add_argument("--before", type=Path, help="parts: folder of the plans that shipped before, to begin with")
    parser.add_argument("--sizes", type=int, nargs="+", help="parts and converged: these numbers of evaluations only")
    parser.add_argument("--of", choices=learned_robustness.OF, nargs="+", default=learned_robustness.OF)
    parser.add_argument("--only", nargs="+", help="robustness: settings of these kinds, or with this in the name, only")
    parser.add_argument("--solver", default=str(SHIPPED / "sticker"), help="a learned solver, as --scheduler takes it")
    parser.add_argument("--plans", nargs="+", default=("tuned:ddim-balanced", "tuned:ddim-fast"))
    parser.add_argument("--rounds", type=int, default=7, help="converged: of timing")
    parser.add_argument("--grid", type=Path, help="converged: an image to write, a row for each of six prompts")
    parser.add_argument("--json", type=Path, help="write every row, image by image")
    options = parser.parse_args()
    pipe = quiet(options.model)
    with torch.inference_mode():
        rows = WHAT[options.what](pipe, options)
    write(options.json, {"what": options.what, "seed": options.seed, "count": options.count}, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
