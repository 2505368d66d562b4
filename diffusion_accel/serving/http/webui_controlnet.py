"""ControlNet units of AUTOMATIC1111's web UI (its extension sd-webui-controlnet), for the ControlNet of this server.

A unit's image is given to the ControlNet as it is, in the size that is drawn: there are no preprocessors. Left aside
are how it is fitted (`resize_mode`, `pixel_perfect`) and settings of preprocessors.
"""

from __future__ import annotations

from pathlib import PurePath
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from diffusion_accel.denoisers import find_controlnet
from diffusion_accel.diffusers_compat import origin_of
from diffusion_accel.io import shown

from .bodies import SCALE
from .problems import Problem

if TYPE_CHECKING:
    from .service import Service

_SCRIPT = "controlnet"  # its name in alwayson_scripts, in small letters
_WHERE = "alwayson_scripts.controlnet"
_VERSION = 2  # of the extension whose units are read
_NONE = ("", "none")
# what would change the picture and is not here -> the values that ask for nothing, in small letters
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "module": _NONE,
    "control_mode": ("balanced", 0),
    "mask": ("", None),
    "mask_image": ("", None),
    "effective_region_mask": ("", None),
    "ipadapter_input": ("", None, []),
    "advanced_weighting": (None, []),
}
_Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class Unit(BaseModel):
    """The fields that are read; others are left aside, or refused where they would change the picture."""

    model_config = ConfigDict(extra="allow", strict=True)

    enabled: bool = True
    image: str | dict[str, Any] | None = None
    input_image: str | None = None
    model: str | None = None
    weight: Annotated[float, Field(ge=SCALE.low, le=SCALE.high, allow_inf_nan=False)] = 1.0
    guidance_start: _Share = 0.0
    guidance_end: _Share = 1.0

    @property
    def picture(self) -> str | None:
        """The image for the ControlNet as base64; None: the one that the drawing starts from.

        Raises:
            Problem: it has a mask, or is no text.
        """
        image = self.image or self.input_image or None
        if isinstance(image, dict):
            if image.get("mask"):
                raise Problem(422, f"{_WHERE}: a mask is not there on this server", _WHERE, "not_supported")
            image = image.get("image") or None
        if not isinstance(image, str | None):
            raise Problem(422, f"{_WHERE}: image must be an image as base64", _WHERE)
        return image

    def fields(self) -> dict[str, Any]:
        """In the words of the other routes, without its image."""
        return {
            "controlnet_conditioning_scale": self.weight,
            "control_guidance_start": self.guidance_start,
            "control_guidance_end": self.guidance_end,
        }


def routes(service: Service) -> APIRouter:
    """The routes, for one server."""
    router = APIRouter(prefix="/controlnet", tags=["web UI"])

    @router.get("/version")
    async def version() -> dict[str, int]:
        """Of the extension whose units are read."""
        return {"version": _VERSION}

    @router.get("/model_list")
    async def models() -> dict[str, list[str]]:
        """The ControlNet that is served, if there is one."""
        return {"model_list": _names(service)}

    @router.get("/module_list")
    async def modules() -> dict[str, list[str]]:
        """The preprocessors: none."""
        return {"module_list": ["none"]}

    return router


def unit_of(scripts: dict[str, Any] | None, service: Service) -> Unit | None:
    """The unit that is switched on; None without any.

    Args:
        scripts: `alwayson_scripts` of a body.
        service: of the server.

    Raises:
        Problem: there is another script, more than one unit, or something that is not here.
        RequestValidationError: a field is out of its bounds.
    """
    for name, values in (scripts or {}).items():
        args = values.get("args") if isinstance(values, dict) else None
        if name.lower() != _SCRIPT or not isinstance(args, list):
            where = "alwayson_scripts"
            raise Problem(422, f"{where}: {shown(name)} is not there on this server", where, "not_supported")
        try:
            units = [Unit.model_validate(one) for one in args]
        except ValidationError as error:
            raise RequestValidationError([{**one, "loc": (_WHERE, *one["loc"])} for one in error.errors()]) from error
        units = [unit for unit in units if unit.enabled]
        if len(units) > 1:
            raise Problem(422, f"{_WHERE}: one unit is read, got {len(units)}", _WHERE, "not_supported")
        for unit in units:
            _check(unit, service)
            return unit
    return None


def _names(service: Service) -> list[str]:
    found = find_controlnet(service.engine.pipe)
    return [] if found is None else [PurePath(str(origin_of(found) or _SCRIPT)).name]


def _check(unit: Unit, service: Service) -> None:
    names = _names(service)
    if not names:
        raise Problem(422, f"{_WHERE}: this server has no ControlNet; leave it out", _WHERE, "not_supported")
    for name, neutral in _NEUTRAL.items():
        value = (unit.model_extra or {}).get(name, neutral[0])
        if (value.lower() if isinstance(value, str) else value) not in neutral:
            words = f"{_WHERE}: {name} {shown(value)} is not there on this server"
            raise Problem(422, words, _WHERE, "not_supported")
    if (unit.model or "").lower() not in _NONE and unit.model not in names:
        words = f"{_WHERE}: no model {shown(unit.model)}; there is: {names[0]}"
        raise Problem(404, words, _WHERE, "not_found")
