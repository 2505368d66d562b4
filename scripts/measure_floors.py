#!/usr/bin/env python3
"""Whether the floors of the shipped families hold: the share of fresh images below each, other prompts and seeds.

python scripts/measure_floors.py --count 96
"""

from __future__ import annotations

import argparse
import sys

import torch
from tune_embedded import CALL, FAMILIES, opened

from diffusion_accel import Reuse, accelerate
from diffusion_accel.evaluation.prompts import embedded_prompts
from diffusion_accel.measure.fidelity import psnr, spread
from diffusion_accel.measure.sampler import Sampler
from diffusion_accel.reuse.plan_family import load_shipped

UNSEEN, MEASURED = 200, 24  # of the prompts: where those begin that no plan was tuned on, and how many gave the floors


def fresh_prompts(count: int) -> tuple[str, ...]:
    """Prompts that neither the search nor the floors have seen."""
    seen = set(embedded_prompts(MEASURED, UNSEEN))
    found = [prompt for prompt in embedded_prompts(count + 64, UNSEEN) if prompt not in seen]
    return tuple(found[:count])


def main() -> int:
    """Measure, and print a table row by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=96, help="fresh images")
    parser.add_argument("--seed", type=int, default=5000, help="of the first image")
    options = parser.parse_args()
    print(
        "| family | plan | floor dB | below it | median dB | worst decile dB |\n| --- | --- | --- | --- | --- | --- |"
    )
    for name, family in load_shipped().items():
        pipe = opened(FAMILIES[name].model, FAMILIES[name].scheduler)
        prompts = fresh_prompts(options.count)
        sampler = Sampler(pipe, prompts, family.made_for, options.seed, options=CALL)
        with torch.inference_mode():
            plain = sampler.images()
            for plan in family.members:
                accelerate(pipe, Reuse(plan=plan))
                values = psnr(plain, sampler.images())
                pipe.acceleration.remove()
                if plan.psnr_floor is not None:
                    share, (median, worst) = float((values < plan.psnr_floor).double().mean()), spread(values)
                    print(f"| {family} | {plan.name} | {plan.psnr_floor} | {share:.0%} | {median:.1f} | {worst:.1f} |")
                    sys.stdout.flush()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
