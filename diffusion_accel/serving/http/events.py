"""Server-sent events: images while they are drawn."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from fastapi.responses import StreamingResponse

from .answers import about, as_json, image_list, usage
from .problems import answer_to

if TYPE_CHECKING:
    from diffusion_accel.generation.partial import Partial
    from diffusion_accel.serving.handle import Handle

    from .asked import Asked
    from .service import Service

_QUIET = 10.0  # seconds after which a comment keeps the connection open


class ImageEvents(StreamingResponse):
    """The events of one request; if nobody reads them any more, the request is cancelled.

    Args:
        service: draws.
        asked: what.
        kind: what names of events begin with, "image_generation" or "image_edit".
    """

    def __init__(self, service: Service, asked: Asked, kind: str) -> None:
        self._service, self._asked, self._kind = service, asked, kind
        self._news: asyncio.Queue[Partial | None] = asyncio.Queue()
        self._handle: Handle | None = None
        super().__init__(self._events(), media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})

    async def begin(self, partial_images: int) -> ImageEvents:
        """Submit the request: whatever refuses it does so before an answer has begun."""
        loop = asyncio.get_running_loop()

        def news(partial: Partial | None) -> None:
            loop.call_soon_threadsafe(self._news.put_nowait, partial)

        self._handle = await self._service.submit(self._asked, partial_images, news)
        self._handle.future.add_done_callback(lambda _future: news(None))
        return self

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send them."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            if self._handle is not None:
                self._handle.cancel()

    async def _events(self) -> AsyncIterator[bytes]:
        assert self._handle is not None
        while True:
            try:
                partial = await asyncio.wait_for(self._news.get(), _QUIET)
            except TimeoutError:
                yield b": waiting\n\n"
                continue
            if partial is None:
                break
            yield await self._service.in_thread(self._shown, partial)
        try:
            served = self._service.result_of(self._handle)
            yield await self._service.in_thread(self._finished, served)
        except Exception as error:
            yield b"event: error\ndata: " + bytes(answer_to(error, self._service.retry_after).body) + b"\n\n"

    def _shown(self, partial: Partial) -> bytes:
        words = about(partial.images, self._asked)
        return b"".join(
            self._event("partial_image", {**words, **entry, "partial_image_index": partial.index})
            for entry in image_list(partial.images, self._asked)
        )

    def _finished(self, served: Any) -> bytes:
        words = {**about(served.images, self._asked), "usage": usage(served)}
        return b"".join(self._event("completed", words | entry) for entry in image_list(served.images, self._asked))

    def _event(self, what: str, values: dict[str, Any]) -> bytes:
        name = f"{self._kind}.{what}"
        values = {"type": name, "created_at": values.pop("created"), **values}
        return b"event: " + name.encode() + b"\ndata: " + as_json(values) + b"\n\n"
