"""Reuse over denoising steps: encoder propagation (Faster Diffusion), and the engine that runs any plan."""

from .encoder_reuse import EncoderReuse
from .plan import Plan, Step
from .plan_file import TunedPlan
from .reuse import Reuse

__all__ = ["EncoderReuse", "Plan", "Reuse", "Step", "TunedPlan"]
