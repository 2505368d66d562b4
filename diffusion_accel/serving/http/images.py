"""The routes of OpenAI's images API."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from .answers import about, as_json, image_list, usage
from .asked import Asked
from .bodies import Generation, Images, Model, Models
from .problems import ERRORS, Problem
from .service import Service


def routes(service: Service) -> APIRouter:
    """The routes, for one server."""
    router = APIRouter(prefix="/v1", tags=["images"], responses=ERRORS)
    settings = service.settings
    model = Model(id=settings.model, created=settings.started)

    @router.post("/images/generations", response_model=Images)
    async def generations(body: Generation, http: Request) -> Response:
        """Draw images from a prompt."""
        return await _drawn(service, service.reader.read(body), http)

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


async def _drawn(service: Service, asked: Asked, http: Request) -> Response:
    handle = await service.submit(asked)
    served = await service.finished(handle, http)
    _note(http, served)

    def body() -> bytes:
        return as_json({**about(served, asked), "data": image_list(served, asked), "usage": usage(served)})

    return Response(await service.in_thread(body), media_type="application/json")


def _note(http: Request, served: Any) -> None:
    """What the log line of the request says beside the usual."""
    http.state.log = {"images": len(served.images), "steps": served.report.steps, "rows": round(served.rows, 2)}
