"""What `make_fast` can be asked for, checked without torch."""

from __future__ import annotations

from diffusion_accel.errors import ConfigurationError
from diffusion_accel.quant.ptq.settings import settings_of

LEAST_PROMPTS = 12
LEAST_STEPS = 4
BITS = "w8"  # weights only: the size decides how many bits they have, and rounded inputs would cost fidelity


def check_wish(min_psnr: float, max_size: float | None, seconds: float, steps: int | None) -> None:
    """Raise `ConfigurationError` for what cannot be asked for; see `make_fast`."""
    if not 5 <= min_psnr <= 80:
        raise ConfigurationError(f"min_psnr must be from 5 to 80 dB, got {min_psnr:g}")
    if not seconds > 0:
        raise ConfigurationError(f"seconds must be above 0, got {seconds:g}")
    if steps is not None and steps < LEAST_STEPS:
        raise ConfigurationError(f"steps must be at least {LEAST_STEPS}, of which some can be left out, got {steps}")
    if max_size is not None:
        try:
            settings_of(BITS, size_ratio=max_size)
        except ConfigurationError as error:
            raise ConfigurationError(str(error).replace("size_ratio", "max_size")) from error
