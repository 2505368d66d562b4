"""Between routes and the engine: submitting, waiting for images as long as somebody wants them, ending."""

from __future__ import annotations

import asyncio
import functools
import math
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from diffusion_accel.errors import AccelerationError
from diffusion_accel.generation.clips import check_images

from .asked import Asked, Reader
from .jobs import Jobs
from .log import event, request_id
from .metrics import Metrics
from .problems import Problem

if TYPE_CHECKING:
    from starlette.requests import Request as HttpRequest

    from diffusion_accel.generation.partial import Partial
    from diffusion_accel.serving.engine import Engine
    from diffusion_accel.serving.handle import Handle, Served

    from .settings import ServerSettings


_LINGER = 10.0  # seconds at the end in which images may be fetched


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


class Service:
    """What the routes of one server share.

    Args:
        engine: draws.
        settings: of the server.

    Raises:
        UnsupportedPipelineError: the engine draws videos.
    """

    def __init__(self, engine: Engine, settings: ServerSettings) -> None:
        check_images(type(engine.pipe))
        self.engine, self.settings = engine, settings
        self.reader = Reader(settings, engine.pipe, engine.features)
        self.metrics = Metrics(engine.stats)
        self.jobs = Jobs(self)
        self.draining = False
        self.showing = 0  # pages that wait for an image, or fetch the one they waited for
        self.ended = asyncio.Event()  # nobody waits for an answer any more; what is kept open is closed

    async def submit(
        self, asked: Asked, partial_images: int = 0, on_partial: Callable[[Partial], object] | None = None
    ) -> Handle:
        """Ask the engine for images; what it has to load or check is done in a thread."""
        submit = functools.partial(
            self.engine.submit,
            asked.request,
            features=asked.features,
            scheduler=asked.scheduler,
            loras=asked.loras,
            lora_deadline=asked.lora_deadline,
            partial_images=partial_images,
            on_partial=on_partial,
        )
        handle = await asyncio.to_thread(submit)
        handle.future.add_done_callback(functools.partial(self._ended, request_id.get()))
        return handle

    def _ended(self, name: str, future: Future[Served]) -> None:
        """Count a request that has ended; in the thread that drew it."""
        if future.cancelled():
            return
        if (error := future.exception()) is None:
            self.metrics.drawn(future.result())
        else:
            event("failed", 20 if isinstance(error, AccelerationError) else 40, error, request_id=name)

    async def finished(self, handle: Handle, http: HttpRequest) -> Served:
        """The images of a request. If the client goes away, or this is cancelled, the request is cancelled, too.

        Raises:
            ClientGoneError: nobody waits any more.
            Problem: it was cancelled from elsewhere.
            BaseException: what the drawing raised.
        """
        ended: asyncio.Future[Any] = asyncio.wrap_future(handle.future)
        ended.add_done_callback(_seen)
        gone: asyncio.Future[Any] = asyncio.ensure_future(_gone(http))
        try:
            await asyncio.wait({ended, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not ended.done():
                raise ClientGoneError
            return self.result_of(handle)
        finally:
            gone.cancel()
            handle.cancel()

    def result_of(self, handle: Handle) -> Served:
        """What a request that has ended gave; raises as `finished`."""
        if handle.future.cancelled():
            raise Problem(409, "the request was cancelled", code="cancelled")
        return handle.result(0)

    async def in_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a function returns that takes a while, such as writing images."""
        return await asyncio.to_thread(function, *arguments)

    @property
    def retry_after(self) -> int:
        """Seconds after which there may be a place in the queue."""
        return max(1, min(60, math.ceil(self.metrics.mean_seconds)))

    async def drain(self, seconds: float) -> None:
        """Take no more requests, and wait for those that were accepted; after so many seconds they are cancelled."""
        self.draining = True
        event("draining", **{key: self.engine.stats()[key] for key in ("running", "queued")})
        await asyncio.to_thread(self.engine.close, True, seconds)
        await self.jobs.told(_LINGER)
        end = time.monotonic() + _LINGER
        while self.showing and time.monotonic() < end:
            await asyncio.sleep(0.05)
        self.ended.set()


def _seen(future: asyncio.Future[Any]) -> None:
    """Look at the error of a future, which is told through its handle: else asyncio says that nobody did."""
    if not future.cancelled():
        future.exception()


async def _gone(http: HttpRequest) -> None:
    """Wait until the client has closed the connection."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
