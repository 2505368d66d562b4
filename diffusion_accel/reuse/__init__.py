"""Reuse over denoising steps: encoder propagation (Faster Diffusion), and the engine that runs any plan."""

from .encoder_reuse import EncoderReuse
from .plan import Plan, Step
from .reuse import Reuse
from .tuned import TunedPlan

__all__ = ["EncoderReuse", "Plan", "Reuse", "Step", "TunedPlan"]
