"""What a search is to reach; importing this imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from diffusion_accel.errors import ConfigurationError
from diffusion_accel.io import shown

TOWARDS = ("converged", "baseline")  # what a learned solver is to draw
LONGEST = 50  # evaluations of a learned solver
CEILING = 80.0  # dB; an image nearer than that counts as equal


@dataclass(frozen=True)
class Target:
    """What to reach: a speed-up of the whole call at the best fidelity, a fidelity at the highest speed-up, or neither:
    a family of plans for every speed-up.

    Attributes:
        speedup: above 1; None if `min_psnr` is given, or if all are wanted.
        min_psnr: dB, the median over the images against the pipeline without reuse.
    """

    speedup: float | None = None
    min_psnr: float | None = None

    def __post_init__(self) -> None:
        if self.speedup is not None and self.min_psnr is not None:
            raise ConfigurationError("give either a speed-up or a lowest PSNR as the target, not both")
        if self.speedup is not None and not (type(self.speedup) in (int, float) and 1 < self.speedup < 1000):
            raise ConfigurationError(f"the speed-up must be above 1, got {shown(self.speedup)}")
        if self.min_psnr is not None and not (type(self.min_psnr) in (int, float) and 5 <= self.min_psnr <= CEILING):
            raise ConfigurationError(f"the lowest PSNR must be 5 to {CEILING:g} dB, got {shown(self.min_psnr)}")

    @property
    def is_family(self) -> bool:
        """Whether plans for every speed-up are wanted."""
        return self.speedup is None and self.min_psnr is None
