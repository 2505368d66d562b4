"""Jobs: requests whose images are fetched later."""

from __future__ import annotations

import asyncio
import time
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from .answers import as_json, whole
from .bodies import Job, JobBody
from .problems import ERRORS, Problem, answer_to
from .uploads import FORM, read_control, read_edit

if TYPE_CHECKING:
    from diffusion_accel.serving.handle import Handle

    from .asked import Asked
    from .service import Service

KEPT = 100  # jobs that have ended
KEPT_SECONDS = 3600.0
KEPT_BYTES = 2**29  # of their images
_STATES = {"running": "generating"}  # of a `Standing`, by other names


@dataclass(eq=False)
class Known:
    """A job.

    Attributes:
        asked: what is drawn.
        handle: of the engine.
        name: its id, which nobody guesses.
        created: when, in seconds since 1970.
        ended: when, by the monotonic clock; None: it goes on.
        fetched: whether somebody was told how it ended.
        size: bytes of its images.
    """

    asked: Asked
    handle: Handle
    name: str = field(default_factory=lambda: f"job-{uuid.uuid4().hex}")
    created: float = field(default_factory=time.time)
    ended: float | None = None
    fetched: bool = False
    size: int = 0


class Jobs:
    """The jobs of one server; of those that have ended, the last ones are kept: an hour, a hundred, 512 MiB."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._known: dict[str, Known] = {}

    async def begin(self, asked: Asked) -> Known:
        """Submit a request as a job."""
        job = Known(asked, await self._service.submit(asked))
        self._known[job.name] = job
        loop = asyncio.get_running_loop()
        job.handle.future.add_done_callback(lambda _future: loop.call_soon_threadsafe(self._end, job))
        return job

    def get(self, name: str) -> Known:
        """A job by its id. Raises `Problem` if there is none."""
        self._forget()
        if name not in self._known:
            raise Problem(404, "there is no such job; they are kept for an hour after their end", "id")
        return self._known[name]

    async def told(self, seconds: float) -> None:
        """Wait until the images of all jobs that have ended were fetched, at most so many seconds."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and any(not job.fetched for job in self._known.values()):
            await asyncio.sleep(0.05)

    def body(self, job: Known) -> bytes:
        """What is known of a job, with its images if it has them."""
        standing = job.handle.progress
        values = {
            "id": job.name,
            "status": _STATES.get(standing.state, standing.state),
            "created": int(job.created),
            "queue_position": standing.ahead,
            "progress": 1.0 if standing.state == "completed" else round(standing.step / max(1, standing.steps), 4),
            "step": standing.step,
            "steps": standing.steps,
            "poll_url": f"/jobs/{job.name}",
            "cancel_url": f"/jobs/{job.name}/cancel",
        }
        if standing.state == "completed":
            values["result"] = whole(job.handle.result(0), job.asked)
        elif standing.state == "failed":
            error = job.handle.future.exception()
            assert isinstance(error, Exception)
            values["error"] = answer_to(error).values["error"]
        return as_json(values)

    def _end(self, job: Known) -> None:
        job.ended = time.monotonic()
        future = job.handle.future
        if not future.cancelled() and future.exception() is None:
            job.size = sum(image.width * image.height * len(image.getbands()) for image in future.result().images)
        self._forget()

    def _forget(self) -> None:
        ended = [(job.ended, job) for job in self._known.values() if job.ended is not None]
        ended.sort(key=lambda pair: pair[0], reverse=True)
        old, size = time.monotonic() - KEPT_SECONDS, 0
        for number, (when, job) in enumerate(ended):
            size += job.size
            if number >= KEPT or when < old or (number and size > KEPT_BYTES):
                del self._known[job.name]


def routes(service: Service) -> APIRouter:
    """The routes, for one server."""
    router, jobs = APIRouter(prefix="/jobs", tags=["jobs"], responses=ERRORS), service.jobs
    made: dict[str, Any] = {"status_code": 202, "response_model": Job}

    async def answer(job: Known, status: int = 200) -> Response:
        ended = job.handle.future.done()
        body = await service.in_thread(jobs.body, job)
        job.fetched = job.fetched or ended
        headers = {"Location": f"/jobs/{job.name}"} if status == 202 else {}
        return Response(body, status, headers, "application/json")

    @router.post("", **made)
    async def begin(body: JobBody) -> Response:
        """Draw images from a prompt, to be fetched later."""
        control = await read_control(body, service.settings.limits.pixels)
        return await answer(await jobs.begin(service.reader.read(body, **control)), 202)

    @router.post("/edits", openapi_extra=FORM, **made)
    async def begin_edit(http: Request) -> Response:
        """Draw images from an image, to be fetched later."""
        body, images = await read_edit(http, service.settings.limits.pixels)
        return await answer(await jobs.begin(service.reader.read(body, strength=body.strength, **images)), 202)

    @router.get("/{name}", response_model=Job)
    async def get(name: str) -> Response:
        """How far a job is; its images, once it has them."""
        return await answer(jobs.get(name))

    @router.post("/{name}/cancel", response_model=Job)
    async def cancel(name: str) -> Response:
        """End a job, whether it waits or is drawn."""
        job = jobs.get(name)
        job.handle.cancel()
        return await answer(job)

    return router
