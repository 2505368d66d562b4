"""Reuse over denoising steps: encoder propagation (Faster Diffusion), and the engine that runs any plan.

`Plan`, `Preset`, `TunedPlan`, `PlanFamily`, `Auto`, `KeySteps` and `DiffusersCache` are all a `PlanSource`: each says
what the steps of a call do, which kinds of steps there are, and which pipelines can follow.
"""

from .auto import Auto
from .diffusers_cache import DiffusersCache
from .encoder_reuse import EncoderReuse
from .guidance import GuidanceRule
from .plan import Plan, PlanSource, Step
from .plan_family import PlanFamily
from .plan_file import TunedPlan
from .preset import Preset
from .reading import read_plan
from .reuse import Reuse
from .schedule import KeySteps

__all__ = [
    "Auto",
    "DiffusersCache",
    "EncoderReuse",
    "GuidanceRule",
    "KeySteps",
    "Plan",
    "PlanFamily",
    "PlanSource",
    "Preset",
    "Reuse",
    "Step",
    "TunedPlan",
    "read_plan",
]
