"""Between routes and the engine."""

from __future__ import annotations

import asyncio
import gc
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from diffusion_accel import ConfigurationError
from diffusion_accel.serving.http.service import ClientGoneError, Service


@pytest.mark.parametrize("gone", [False, True])
def test_a_request_that_fails_is_told_once(gone: bool) -> None:
    said: list[Any] = []

    async def waits() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: said.append(context["message"]))
        future: Future[Any] = Future()
        handle: Any = SimpleNamespace(future=future, result=future.result, cancel=lambda: None)

        async def receive() -> dict[str, str]:
            if not gone:
                future.set_exception(ConfigurationError("steps"))
                await asyncio.sleep(60)
            return {"type": "http.disconnect"}

        service: Any = Service.__new__(Service)
        with pytest.raises(ClientGoneError if gone else ConfigurationError):
            await service.finished(handle, SimpleNamespace(receive=receive))
        if gone:
            future.set_exception(ConfigurationError("steps"))
            await asyncio.sleep(0.01)

    asyncio.run(waits())
    gc.collect()
    assert said == []
