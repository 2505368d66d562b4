"""The fields of the page from the settings in an image: our own, or the text that other tools write."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import replace
from io import BytesIO
from typing import Any

from diffusion_accel.errors import ConfigurationError, OutputError
from diffusion_accel.generation.request import LIMITS
from diffusion_accel.image_metadata import parse_parameters, read_embedded
from diffusion_accel.images import loaded
from diffusion_accel.pipelines.learned import LEARNED
from diffusion_accel.pipelines.schedulers import SCHEDULERS
from diffusion_accel.serving.adapters import SCALES
from diffusion_accel.serving.http.bodies import MOST_LORAS
from diffusion_accel.serving.http.plans import Plans
from diffusion_accel.serving.http.webui import SAMPLERS

from .choices import Choices
from .fields import Fields, is_seed

LARGEST = 16 * 2**20  # bytes of an image that is read for its settings; drop.js says the same
_NUMBERS = {"steps": "Steps", "guidance_scale": "CFG scale"}  # by the name that other tools have for it


def fields_of(text: str, plans: Plans, own: str, largest: int = LARGEST) -> Fields:
    """The fields that an image was drawn with; the slider stays where it is without a plan that is known here.

    Args:
        text: the file as base64.
        plans: that the server knows.
        own: the class of the pipeline's own scheduler.
        largest: bytes of the file.

    Raises:
        ConfigurationError: it is no image, too large, or its settings are damaged or missing.
    """
    if len(text) > largest * 4 // 3 + 4:
        raise ConfigurationError(f"the image has more than the {largest >> 20} MiB that are read for its settings")
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ConfigurationError("this is no image that can be read") from error
    try:
        with loaded(BytesIO(data), what="the image") as image:
            words, values = read_embedded(image, "the image")
    except OutputError as error:
        raise ConfigurationError(str(error)) from error
    if values is not None:
        return _ours(values, plans, own)
    if words is not None:
        return _others(words, plans)
    raise ConfigurationError("the image holds no settings")


def _ours(values: Mapping[str, Any], plans: Plans, own: str) -> Fields:
    settings, features = _table(values.get("settings")), _table(values.get("features"))
    scheduler = _text(settings.get("scheduler")) or _short(_text(values.get("scheduler")), own)
    numbers: dict[str, Any] = {name: _number(settings.get(name), name) for name in (*_NUMBERS, "width", "height")}
    found = Fields(
        prompt=_text(values.get("prompt")),
        negative_prompt=_text(settings.get("negative_prompt")),
        transparent="transparent" in features,
        seed=_seed(values.get("seed")),
        strength=_number(settings.get("strength"), "strength"),
        loras=_loras(settings.get("loras")),
        scheduler=scheduler if scheduler in SCHEDULERS or scheduler == LEARNED else "",
        **numbers,
    )
    choices = Choices.of(plans, found.scheduler or None)
    position = choices.position_of(_text(_table(features["reuse"]).get("plan")) if "reuse" in features else None)
    return replace(found, position=choices.usual if position is None else position)


def _others(words: str, plans: Plans) -> Fields:
    prompt, negative, pairs = parse_parameters(words)
    scheduler = {name.lower(): here for name, here in SAMPLERS.items()}.get(pairs.get("Sampler", "").lower(), "")
    width, _, height = pairs.get("Size", "").partition("x")
    numbers: dict[str, Any] = {name: _number(pairs.get(there), name) for name, there in _NUMBERS.items()}
    return Fields(
        prompt=prompt,
        negative_prompt=negative or "",
        position=Choices.of(plans, scheduler or None).usual,
        seed=_seed(pairs.get("Seed")),
        scheduler=scheduler,
        width=_number(width, "width"),
        height=_number(height, "height"),
        strength=_number(pairs.get("Denoising strength"), "strength"),
        **numbers,
    )


# ---------------------------------------------------------------------- values from outside
def _table(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str:
    return value.encode("utf-8", "replace").decode("utf-8") if isinstance(value, str) else ""


def _number(value: Any, name: str) -> float | None:
    """A number within its limits; None for anything else."""
    if isinstance(value, str):
        try:
            value = float(value) if name in ("guidance_scale", "strength") else int(value)
        except ValueError:
            return None
    return value if value in LIMITS[name] else None


def _loras(value: Any) -> dict[str, float]:
    """Scales by name, as far as they are that."""
    low, high = SCALES
    found = {_text(name): scale for name, scale in _table(value).items() if type(scale) in (int, float)}
    return {name: scale for name, scale in list(found.items())[:MOST_LORAS] if low <= scale <= high}


def _seed(value: Any) -> str:
    text = str(value) if isinstance(value, (int, str)) and not isinstance(value, bool) else ""
    return text if is_seed(text) else ""


def _short(name: str, own: str) -> str:
    """The short name of a scheduler's class; empty for the pipeline's own, and for those that have none."""
    plain = {kind: short for short, (kind, changes) in reversed(SCHEDULERS.items()) if not changes}
    return "" if name == own else plain.get(name, "")
