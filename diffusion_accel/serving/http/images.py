"""The routes of OpenAI's images API."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from diffusion_accel.generation.layers import by_image

from .answers import FORMATS, as_json, encoded, whole
from .asked import Asked
from .bodies import Generation, Images, Model, Models, Streamed
from .events import ImageEvents
from .problems import ERRORS, Problem
from .service import Service
from .uploads import FORM, read_control, read_edit

LORA_STEP = "X-Lora-Step"  # what usage.lora_step is in JSON

_EITHER: dict[int | str, dict[str, Any]] = {
    200: {
        "model": Images,
        "description": "the images; with stream, events; to a client that accepts an image only, that image",
        "content": {"text/event-stream": {}, **{f"image/{form}": {} for form in FORMATS}},
    }
}


def routes(service: Service) -> APIRouter:
    """The routes, for one server."""
    router = APIRouter(prefix="/v1", tags=["images"], responses=ERRORS)
    settings = service.settings
    model = Model(id=settings.model, created=settings.started)

    @router.post("/images/generations", response_model=Images, responses=_EITHER)
    async def generations(body: Generation, http: Request) -> Response:
        """Draw images from a prompt."""
        _take_accepted(body, http)
        control = await read_control(body, settings.limits.pixels)
        return await _answered(service, service.reader.read(body, **control), body, http, "image_generation")

    @router.post("/images/edits", response_model=Images, responses=_EITHER, openapi_extra=FORM)
    async def edits(http: Request) -> Response:
        """Draw images from an image, or where a mask is transparent."""
        body, images = await read_edit(http, settings.limits.pixels)
        _take_accepted(body, http)
        asked = service.reader.read(body, strength=body.strength, **images)
        return await _answered(service, asked, body, http, "image_edit")

    @router.get("/models")
    async def models() -> Models:
        """The models that are served."""
        return Models(data=[model])

    @router.get("/models/{name:path}")
    async def one_model(name: str) -> Model:
        """One of them."""
        if name != settings.model:
            raise Problem(404, f"no such model; {settings.model} is served", "model", "model_not_found")
        return model

    return router


async def _answered(service: Service, asked: Asked, body: Streamed, http: Request, kind: str) -> Response:
    if body.stream:
        return await ImageEvents(service, asked, kind).begin(body.partial_images or 0)
    if body.partial_images:
        raise Problem(400, "partial_images come with stream: true only", "partial_images")
    handle = await service.submit(asked)
    served = await service.finished(handle, http)
    http.state.log = {"images": len(served.images), "steps": served.report.steps, "rows": round(served.rows, 2)}
    if http.headers.get("accept") == f"image/{asked.output_format}":
        image = by_image(served.images, asked.layers)[0][asked.wanted[0]]
        content = await service.in_thread(encoded, image, asked)
        headers = {} if served.lora_step is None else {LORA_STEP: str(served.lora_step)}
        return Response(content, headers=headers, media_type=f"image/{asked.output_format}")
    return Response(await service.in_thread(lambda: as_json(whole(served, asked))), media_type="application/json")


def _take_accepted(body: Streamed, http: Request) -> None:
    """A client that accepts an image and nothing else gets that, in its format."""
    kind, _, form = http.headers.get("accept", "").partition("/")
    if kind != "image" or form not in FORMATS:
        return
    if (body.n or 1) > 1 or body.stream:
        raise Problem(400, "one image is the answer to Accept: image/…; ask for one, without stream", "n")
    body.output_format = form  # type: ignore[assignment]
