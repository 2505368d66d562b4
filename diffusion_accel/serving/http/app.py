"""The application: routes, errors, and what stands before them."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from diffusion_accel import __version__
from diffusion_accel.errors import AccelerationError

from . import images, jobs, loras, operations, webui, webui_controlnet
from .guard import Guard
from .page.route import PageRoute
from .problems import answer_to
from .service import ClientGoneError, Service


def application(service: Service) -> Guard:
    """The ASGI application of one server."""
    app = FastAPI(
        title="diffusion-accel",
        version=__version__,
        description=f"Draws images with {service.settings.model}.",
        redoc_url=None,
        docs_url="/docs",
    )
    for module in (images, jobs, loras, webui, webui_controlnet, operations):
        app.include_router(module.routes(service))
    if service.settings.page:
        app.router.routes.append(PageRoute(service))

    async def refused(http: Request, error: Any) -> JSONResponse:
        answer = answer_to(error, service.retry_after)
        if answer.status_code == 405:  # of the routes of a path only the first one was asked
            methods = app.openapi()["paths"].get(getattr(http.scope.get("route"), "path", None), {})
            answer.headers["Allow"] = ", ".join(sorted(methods)).upper() or answer.headers["Allow"]
        return answer

    async def gone(_http: Request, _error: Any) -> Response:
        return Response(status_code=499)

    for kind in (RequestValidationError, HTTPException, AccelerationError, Exception):
        app.add_exception_handler(kind, refused)
    app.add_exception_handler(ClientGoneError, gone)
    return Guard(app, service.settings, service.metrics.answered)
