"""What the text of a plan means; importing this imports no torch."""

from __future__ import annotations

import re

from diffusion_accel.errors import ConfigurationError
from diffusion_accel.io import shown

from .auto import Auto, is_auto
from .diffusers_cache import DiffusersCache, is_cache
from .plan import Plan, PlanSource
from .plan_family import PlanFamily, load_tuned
from .plan_file import TunedPlan
from .plan_names import is_tuned, shipped
from .preset import Preset, looks_like_a_preset

_SETTINGS = re.compile(r"(?:,[A-Za-z_]\w*=[^,]*)+$")  # of the feature, behind the plan
_STEPS = re.compile(r"full[@/0-9a-z:=,;|.*-]* \S.*", re.DOTALL)  # more than one, of which the first is always full


def read_plan(text: str) -> Plan | Preset | Auto | TunedPlan | PlanFamily | DiffusersCache:
    """What a plan's text names: steps, a file, a cache of diffusers, "auto", or a preset; the inverse of their `str`.

    Raises:
        ConfigurationError: it is none of these, or the file is not a plan.
    """
    if text.startswith("steps:") or _STEPS.fullmatch(text):
        return Plan.parse(text)
    if is_tuned(text):
        return load_tuned(text)
    if is_auto(text):
        return Auto.parse(text)
    return DiffusersCache.parse(text) if is_cache(text) else Preset.parse(text)


def read_plan_option(given: str | PlanSource) -> tuple[str, PlanSource]:
    """What the field `plan` keeps, and the plan that it means: what was given as text stays as it was given."""
    if isinstance(given, PlanSource):
        return given.text, given
    settings = _SETTINGS.search(given)
    if settings is not None and is_tuned(plan := given[: settings.start()]):
        others = ", ".join(settings[0].split(",")[1:])
        raise ConfigurationError(f"{shown(given)} is a plan and settings; give plan={plan!r} and, beside it, {others}")
    source = read_plan(given)
    return (source.text if isinstance(source, Plan) and not given.startswith("steps:") else given), source


def accepts_bare(text: str) -> bool:
    """Whether a text is a plan, with settings behind it or without; also one that is mistyped (name:value), lacks its
    level (tuned) or what stands before it (balanced), which no prompt looks like."""
    text = _SETTINGS.sub("", text)
    tuned = is_tuned(text) or text == "tuned" or text in shipped()
    known = tuned or looks_like_a_preset(text) or is_cache(text) or is_auto(text)
    return known or re.fullmatch(r"[\w-]+:\S+", text) is not None
