"""The search by rollouts: what a family keeps."""

from __future__ import annotations

from dataclasses import replace

from diffusion_accel import TunedPlan
from diffusion_accel.tuning.by_rollouts import family_sizes, unsurpassed

NUMBERS = [
    (2.0, 50.0, 45.0),
    (3.0, 50.0, 44.0),
    (3.0, 50.0, 44.0),
    (2.9, 49.0, 44.0),
    (4.0, 40.0, 35.0),
    (3.5, 39.0, 36.0),
]


def test_a_family_leaves_out_what_is_surpassed() -> None:
    shipped = TunedPlan.load("tuned:quality")
    plans = [
        replace(shipped, measured={"time_ratio": speed, "psnr_median": median, "psnr_worst_decile": worst})
        for speed, median, worst in NUMBERS
    ]
    kept = [(p.speedup, p.psnr_median, p.psnr_worst_decile) for p in unsurpassed(plans)]
    assert kept == [NUMBERS[i] for i in (0, 1, 2, 4, 5)], "equal ones stay, and who is nearer in the worst decile"


def test_a_family_has_plans_for_every_speed() -> None:
    for total in (4, 5, 20, 50, 1000):
        sizes = family_sizes(total)
        assert sizes == sorted({*sizes}) and sizes[0] >= 2 and sizes[-1] <= max(2, 0.56 * total)
    assert family_sizes(50) == [4, 5, 6, 8, 10, 12, 15, 19, 24]
