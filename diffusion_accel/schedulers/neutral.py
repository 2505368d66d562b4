"""Known solvers as combinations: what a learned solver starts from, and does where it has nothing of its own.

Each function takes α and σ at the timesteps of the evaluations, of variance-preserving latents (α² + σ² = 1) or of a
flow (α = 1 − σ), and returns one combination for each: xᵢ₊₁ from the clean samples and the latents so far.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from diffusion_accel.combination import Combination

CLEAN = (1.0, 0.0)  # α and σ without noise
_FEW = 15  # evaluations below which diffusers ends DPM-Solver++ with a step of first order


def ddim_coefficients(
    alphas: Sequence[float], sigmas: Sequence[float], final: tuple[float, float] = CLEAN
) -> list[Combination]:
    """DDIM with η = 0 (Song et al., 2020, equation 12); of a flow the same is Euler's method.

    Args:
        alphas, sigmas: at each evaluation, from noisy to clean; σ above 0.
        final: α and σ of the result (diffusers' `set_alpha_to_one=False`: those of timestep 0).
    """
    return [_first_order(*pair) for pair in _pairs(alphas, sigmas, final)]


def dpmpp_2m_coefficients(
    alphas: Sequence[float],
    sigmas: Sequence[float],
    final: tuple[float, float] = CLEAN,
    lower_order_final: bool = True,
) -> list[Combination]:
    """DPM-Solver++(2M), midpoint (Lu et al., 2022, algorithm 2), with the first and last steps that diffusers makes.

    Args:
        alphas, sigmas: at each evaluation, from noisy to clean; σ above 0.
        final: α and σ of the result (diffusers' `final_sigmas_type="sigma_min"`: those of timestep 0).
        lower_order_final: with fewer than 15 evaluations, the last step is of first order; towards σ = 0 it always is.
    """
    made: list[Combination] = []
    before = -math.inf
    for i, ((a, s), (b, r)) in enumerate(_pairs(alphas, sigmas, final)):
        here = _log_snr(a, s)
        last = i == len(alphas) - 1 and (r == 0 or (lower_order_final and len(alphas) < _FEW))
        if i == 0 or last:
            made.append(_first_order((a, s), (b, r)))
        else:
            half = (_log_snr(b, r) - here) / (here - before) / 2
            share = b - r / s * a
            made.append(Combination(((share * (1 + half), -share * half),), ((r / s,),)))
        before = here
    return made


def _pairs(
    alphas: Sequence[float], sigmas: Sequence[float], final: tuple[float, float]
) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """α and σ of each step, and where it leads."""
    levels = [*zip(alphas, sigmas, strict=True), final]
    return list(itertools.pairwise(levels))


def _first_order(here: tuple[float, float], there: tuple[float, float]) -> Combination:
    (a, s), (b, r) = here, there
    return Combination(((b - r / s * a,),), ((r / s,),))


def _log_snr(a: float, s: float) -> float:
    return math.log(a / s) if a > 0 else -math.inf
