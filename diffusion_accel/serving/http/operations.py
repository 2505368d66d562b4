"""The routes for whoever runs the server."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from .bodies import Health
from .service import Service

_TEXT = "text/plain; version=1.0.0; charset=utf-8"


def routes(service: Service) -> APIRouter:
    """The routes, for one server."""
    router = APIRouter(tags=["operations"])

    @router.get("/health")
    async def health() -> Health:
        """Whether the process lives."""
        return Health(status="ok")

    @router.get("/ready", response_model=Health, responses={503: {"model": Health, "description": "not any more"}})
    async def ready() -> JSONResponse:
        """Whether it takes requests."""
        if service.draining:
            return JSONResponse({"status": "draining"}, 503, {"Retry-After": "1"})
        return JSONResponse({"status": "ready"})

    @router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Counters for Prometheus."""
        return Response(service.metrics.text(), media_type=_TEXT)

    return router
