"""Images that clients send: in forms, and as base64."""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
from io import BytesIO
from typing import TYPE_CHECKING, Any

from fastapi.exceptions import RequestValidationError
from PIL import Image, ImageChops
from pydantic import ValidationError
from starlette.datastructures import UploadFile

from diffusion_accel.errors import ConfigurationError
from diffusion_accel.images import open_image

from .bodies import Drawing, Edit
from .problems import Problem

if TYPE_CHECKING:
    from starlette.requests import Request as HttpRequest

_MOST_FIELDS = 64
_MOST_FILES = 4
_FILES = ("image", "mask", "control_image")
LARGER = 4  # times as many pixels as may be drawn an uploaded image may have
_INSIDE = re.compile(r"(\w+)\[([^\[\]]*)\]")  # lora[NAME], layers[]

#: the form for the OpenAPI page
FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["image", "prompt"],
                    "properties": {
                        "image": {"type": "string", "format": "binary", "description": "Where the drawing starts."},
                        "mask": {
                            "type": "string",
                            "format": "binary",
                            "description": "Of the same size; what is transparent in it is drawn anew.",
                        },
                        "control_image": {
                            "type": "string",
                            "format": "binary",
                            "description": "For the server's ControlNet.",
                        },
                        **{
                            name: {"type": "string", "description": f"{name}, as in generations"}
                            for name in Edit.model_fields
                            if name not in _FILES
                        },
                    },
                }
            }
        },
    }
}


async def read_edit(http: HttpRequest, pixels: int) -> tuple[Edit, dict[str, Image.Image]]:
    """The fields and the images of a form.

    Args:
        http: the request.
        pixels: that may be drawn; an image that is given may have `LARGER` times as many.

    Raises:
        Problem: it is no form, or an image is missing or cannot be used.
        RequestValidationError: a field is out of its bounds.
    """
    if not http.headers.get("content-type", "").startswith("multipart/form-data"):
        raise Problem(400, "the body must be a form with files: multipart/form-data")
    values: dict[str, Any] = {}
    files: dict[str, list[bytes]] = {}
    async with http.form(max_fields=_MOST_FIELDS, max_files=_MOST_FILES, max_part_size=2**20) as form:
        for key, value in form.multi_items():
            if isinstance(value, UploadFile):
                files.setdefault(key.removesuffix("[]"), []).append(await value.read())
            else:
                _put(values, key, value)
    try:
        body = Edit.model_validate(values)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error
    control = await read_control(body, pixels)
    if control and "control_image" in files:
        raise Problem(400, "one control_image is read: a file, or base64", "control_image")
    return body, control | await asyncio.to_thread(_images, files, pixels * LARGER)


async def read_control(body: Drawing, pixels: int) -> dict[str, Image.Image]:
    """The image for a ControlNet that a body has as base64, if any; see `read_edit`."""
    text, name = body.control_image, "control_image"
    if text is None:
        return {}
    return {name: await asyncio.to_thread(lambda: decoded(from_base64(text, name), name, pixels * LARGER))}


def from_base64(text: str, name: str) -> bytes:
    """Base64 with or without "data:image/png;base64," before it; never an address.

    Raises:
        Problem: it is none.
    """
    try:
        return base64.b64decode(text.rpartition("base64,")[2], validate=True)
    except (binascii.Error, ValueError) as error:
        raise Problem(400, f"{name} must be images as base64", name, "invalid_image") from error


def _put(values: dict[str, Any], key: str, value: str) -> None:
    """A field, a member of one (lora[NAME]) or one more in a list (layers[])."""
    found = _INSIDE.fullmatch(key)
    if found is None:
        values[key] = value
    elif found[2]:
        inner = values.setdefault(found[1], {})
        if isinstance(inner, dict):
            inner[found[2]] = value
    else:
        inner = values.setdefault(found[1], [])
        if isinstance(inner, list):
            inner.append(value)


def _images(files: dict[str, list[bytes]], limit: int) -> dict[str, Image.Image]:
    if "ip_adapter_image" in files:
        raise Problem(422, "ip_adapter_image: this server draws without IP-Adapters; leave it out", "ip_adapter_image")
    if unknown := sorted(set(files) - {*_FILES}):
        raise Problem(422, f"the form has a file {unknown[0][:50]!r}; {', '.join(_FILES)} are read", unknown[0][:50])
    for name in _FILES:
        if len(files.get(name, [])) > 1:
            raise Problem(400, f"one {name} is read, got {len(files[name])}", name)
    if "image" not in files:
        raise Problem(422, "image: Field required", "image")
    pictures = [name for name in _FILES if name in files and name != "mask"]
    images = {name: decoded(files[name][0], name, limit) for name in pictures}
    if "mask" not in files:
        return images
    image = images["image"]
    mask = decoded(files["mask"][0], "mask", limit)
    if mask.size != image.size:
        raise Problem(400, f"the mask has {_size(mask)} pixels, the image {_size(image)}; make them equal", "mask")
    lowest, _ = mask.getchannel("A").getextrema()
    if lowest == 255:
        raise Problem(400, "nothing of the mask is transparent, so nothing would be drawn", "mask")
    return {**images, "mask_image": ImageChops.invert(mask.getchannel("A"))}


def decoded(data: bytes, name: str, limit: int) -> Image.Image:
    """An image that a client sent, with alpha.

    Raises:
        Problem: it is none, or has more pixels than that.
    """
    try:
        return open_image(BytesIO(data), "RGBA", what=f"the {name}", limit=limit)
    except ConfigurationError as error:
        raise Problem(400, str(error), name, "invalid_image") from error


def _size(image: Image.Image) -> str:
    return f"{image.width}x{image.height}"
