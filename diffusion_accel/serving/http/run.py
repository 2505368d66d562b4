"""A server from start to end: its socket, uvicorn, and signals."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import uvicorn

from diffusion_accel import interrupts
from diffusion_accel.errors import ConfigurationError

from .app import application
from .guard import READS_SLOWEST
from .log import event
from .service import Service

if TYPE_CHECKING:
    from diffusion_accel.serving.engine import Engine

    from .settings import ServerSettings

_LAST_ANSWERS = 10  # seconds for answers to leave, at the end
_BACKLOG = 512


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens at an address; port 0: any that is free.

    Raises:
        ConfigurationError: it cannot.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(_BACKLOG)
    except (OSError, UnicodeError) as error:
        raise ConfigurationError(
            f"cannot listen at {host}, port {port}: {getattr(error, 'strerror', error)}"
        ) from error
    return listening


def serve(
    engine: Engine,
    settings: ServerSettings,
    listening: socket.socket,
    *,
    drain_seconds: float = 120.0,
    ready: Callable[[str], object] = lambda _address: None,
) -> None:
    """Serve until a signal comes; then finish what was accepted. A second signal ends the process at once.

    Args:
        engine: draws; it is closed at the end.
        settings: of the server.
        listening: see `bound`.
        drain_seconds: after which requests that were accepted are given up.
        ready: called with the address once requests are taken.
    """
    service = Service(engine, settings)
    config = uvicorn.Config(
        application(service),
        log_config=None,
        access_log=False,
        lifespan="off",
        ws="none",
        http="h11",
        loop="asyncio",
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=_LAST_ANSWERS,
    )
    server = _Server(config, service, drain_seconds)
    host, port = listening.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    event("listening", address=address, model=settings.model)
    ready(address)
    try:
        with interrupts.postponed() as signals:
            server.signals = signals
            asyncio.run(server.serve([listening]))
    finally:
        engine.close(drain=False)
    event("stopped")


class Unread:
    """Ends connections whose clients take nothing of an answer that is written already. `Guard` sees that only where
    there is more to be written; uvicorn closes a connection when all of it was taken, which may be never."""

    def __init__(self) -> None:
        self._seen: WeakKeyDictionary[Any, tuple[int, float]] = WeakKeyDictionary()  # bytes that are left, since when

    def end(self, connections: Iterable[Any]) -> None:
        """End those of which as much was left for `READS_SLOWEST` seconds.

        Args:
            connections: uvicorn's protocols.
        """
        now = time.monotonic()
        for one in list(connections):
            left = one.transport.get_write_buffer_size()
            before, since = self._seen.get(one, (0, now))
            if left != before:
                self._seen[one] = (left, now)
            elif left and now - since >= READS_SLOWEST:
                one.transport.abort()


class _Server(uvicorn.Server):
    """uvicorn's server, which drains at a signal before it stops to listen."""

    def __init__(self, config: uvicorn.Config, service: Service, drain_seconds: float) -> None:
        super().__init__(config)
        self._service, self._drain_seconds = service, drain_seconds
        self.signals: Any = interrupts.Postponed()
        self._draining: asyncio.Task[None] | None = None
        self._unread = Unread()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are heard by `interrupts`."""
        yield

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second."""
        self._unread.end(self.server_state.connections)
        if self.signals.received is not None and self._draining is None:
            self._draining = asyncio.ensure_future(self._service.drain(self._drain_seconds))
        if self._draining is not None and self._draining.done():
            self.should_exit = True
        return await super().on_tick(counter)
