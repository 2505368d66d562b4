"""The HTTP service on Ray Serve: replicas on several devices or machines, behind one address. Needs the extra `ray`.

    diffusion-accel serve --ray --min-replicas 2 --max-replicas 8

Each replica is the server that `serve` runs: a pipeline, its `Engine`, and the application of `serving/http`. Ray Serve
starts them, looks after their health, drains and scales them, and shares requests among them. The one thing that is
ours in front of them is `Ingress`, which asks again where a replica was lost.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import ray
import transformers
from ray import serve
from ray.exceptions import NodeDiedError, RayActorError, WorkerCrashedError
from ray.serve.config import AutoscalingConfig, HTTPOptions
from ray.serve.exceptions import BackPressureError
from ray.serve.schema import LoggingConfig
from starlette.requests import Request
from starlette.responses import Response

from diffusion_accel import interrupts
from diffusion_accel.errors import AccelerationError
from diffusion_accel.generation.loading import open_pipeline
from diffusion_accel.io import first_line

from .engine import Engine
from .http import log
from .http.app import application
from .http.guard import Guard, Message, Receive, Send
from .http.problems import Problem, answer_to
from .http.run import bound
from .http.service import Service
from .http.settings import ServerSettings

NAME = "diffusion-accel"  # of the application in a cluster
_LOST = (RayActorError, NodeDiedError, WorkerCrashedError)
_CARRIED = (
    "type",
    "asgi",
    "http_version",
    "method",
    "scheme",
    "path",
    "raw_path",
    "query_string",
    "root_path",
    "headers",
)
_INGRESS = 10_000  # requests in the ingress, which only wait there
#: what begins so lives in one replica, and another one would know nothing of it
_OF_ONE_REPLICA = {
    "/jobs": "one replica would keep the job; ask for the images themselves, with stream to see them grow",
    "/sdapi/v1/progress": "one replica knows how far it is; ask for partial_images of a stream",
    "/sdapi/v1/interrupt": "it would end the requests of one replica; close the connection to end a request",
    "/metrics": "each replica counts by itself; Ray has the metrics of all",
    "/v1/loras/": "it would change the LoRAs of one replica; put the files into the folder before the start",
}


@dataclass(frozen=True, kw_only=True)
class Replicas:
    """How many replicas there are, and what each of them has.

    Attributes:
        least, most: how many; Ray starts more while those that are there have all the requests they draw at once.
        gpus: of a replica, also a part of one; None: 1 where the cluster has any, else 0.
        cpus: of a replica.
        drain_seconds: for requests that were accepted, when a replica ends.
    """

    least: int = 1
    most: int = 1
    gpus: float | None = None
    cpus: float = 1.0
    drain_seconds: float = 120.0


class Replica:
    """One of the servers behind the ingress.

    Args:
        opening: arguments of `open_pipeline`.
        engine: of `Engine`.
        settings: of the server.
        warm_up: measure first what batches cost.
        log_format: "text" or "json".
    """

    def __init__(
        self,
        opening: Mapping[str, Any],
        engine: Mapping[str, Any],
        settings: ServerSettings,
        warm_up: bool = False,
        log_format: str = "text",
    ) -> None:
        log.set_up(log_format)
        for library in (diffusers, transformers):
            library.utils.logging.disable_progress_bar()
        pipe: Any = open_pipeline(**opening)
        pipe.set_progress_bar_config(disable=True)
        self._engine = Engine(pipe, **engine)
        if warm_up:
            self._engine.warm_up()
        self._app = application(Service(self._engine, settings))

    async def answer(self, scope: dict[str, Any], body: bytes) -> AsyncIterator[Message]:
        """The messages of the application's answer to one HTTP request; if they are not wanted any more, it ends."""
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        asked: asyncio.Queue[Message] = asyncio.Queue()
        asked.put_nowait({"type": "http.request", "body": body, "more_body": False})
        task = asyncio.ensure_future(self._app(scope, asked.get, messages.put))
        task.add_done_callback(lambda _task: messages.put_nowait(None))
        try:
            while (message := await messages.get()) is not None:
                yield message
        finally:
            asked.put_nowait({"type": "http.disconnect"})
            if not task.done():
                task.cancel()

    def check_health(self) -> None:
        """Ray asks from time to time, and replaces a replica that raises."""
        if not self._engine.works:
            raise RuntimeError("the engine of this replica has ended")

    def __del__(self) -> None:
        """Ray ends a replica once its requests have ended."""
        if hasattr(self, "_engine"):
            self._engine.close(drain=False)


class Ingress:
    """What clients reach: limits and the token are checked here, then a replica answers.

    A request whose replica is lost before it has answered anything is sent to another one, once. That draws the same
    images, as they follow from the seed. (Without a seed nobody knows which they would have been.)

    Args:
        replicas: the deployment of `Replica`.
        settings: of the server.
    """

    def __init__(self, replicas: Any, settings: ServerSettings) -> None:
        self._answers = replicas.options(stream=True, method_name="answer")
        self._guard = Guard(self._forward, settings, lambda _path, _status, _seconds: None)

    async def __call__(self, _http: Request) -> Response:
        """Answer a request."""
        return _Guarded(self._guard)

    async def _forward(self, scope: Message, receive: Receive, send: Send) -> None:
        for path, reason in _OF_ONE_REPLICA.items():
            if scope["path"].startswith(path):
                raise Problem(501, f"not with several replicas: {reason}", code="one_replica")
        body, given = await _whole(receive), {key: scope[key] for key in _CARRIED if key in scope}
        answer = _Answer(send)
        for again in (True, False):
            messages = self._answers.remote(given, body)
            try:
                async for message in messages:
                    await answer.send(message)
                return
            except _LOST:
                if answer.begun or not again:
                    return await answer.give_up(Problem(503, "the replica that drew this was lost; ask again"))
            except BackPressureError as error:
                raise Problem(429, "as many requests wait as may; try again later") from error
            except asyncio.CancelledError:  # the client has gone away
                messages.cancel()
                raise


class _Guarded(Response):
    """A response that an application makes."""

    def __init__(self, app: Any) -> None:
        super().__init__()
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self._app(scope, receive, send)


class _Answer:
    """An answer on its way to the client; `begun`: it has got something that another replica would not repeat."""

    def __init__(self, send: Send) -> None:
        self._send, self._open = send, False
        self._start: Message = {}
        self.begun = False

    async def send(self, message: Message) -> None:
        """Pass a message on; how the answer starts waits for what is in it."""
        if message["type"] == "http.response.start":
            self._start = self._start if self._open else message
            return
        self.begun = self.begun or not message.get("body", b"").startswith(b":")  # a comment keeps a stream open
        if not self._open:
            self._open = True
            await self._send(self._start)
        await self._send(message)

    async def give_up(self, problem: Problem) -> None:
        """End it: with an error, which in a stream is an event."""
        if not self._open:
            raise problem
        event = b"event: error\ndata: " + bytes(answer_to(problem).body) + b"\n\n"
        await self._send({"type": "http.response.body", "body": event, "more_body": False})


async def _whole(receive: Receive) -> bytes:
    """The body of a request; the guard has limits for it."""
    parts, more = [], True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise asyncio.CancelledError
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts)


def app(
    opening: Mapping[str, Any],
    engine: Mapping[str, Any],
    settings: ServerSettings,
    replicas: Replicas = Replicas(),
    warm_up: bool = False,
    log_format: str = "text",
) -> serve.Application:
    """The application, for `serve.run`.

    Args:
        opening: arguments of `open_pipeline`. Files that it names must be there on every machine.
        engine: of `Engine`; as many requests as it has `running` go to a replica at a time, `queue` wait for one.
        settings: of the server.
        replicas: how many.
        warm_up, log_format: see `Replica`.
    """
    gpus = replicas.gpus
    if gpus is None:
        gpus = 1.0 if ray.cluster_resources().get("GPU", 0) else 0.0
    running = engine.get("running", 8)
    quiet = LoggingConfig(enable_access_log=False, log_level="WARNING")
    deployment = serve.deployment(
        name="replica",
        max_ongoing_requests=running,
        max_queued_requests=engine.get("queue", 64),
        autoscaling_config=AutoscalingConfig(
            min_replicas=replicas.least, max_replicas=replicas.most, target_ongoing_requests=running
        ),
        ray_actor_options={"num_cpus": replicas.cpus, "num_gpus": gpus},
        graceful_shutdown_timeout_s=replicas.drain_seconds,
        health_check_period_s=5,
        logging_config=quiet,
    )(Replica)
    front = serve.deployment(
        name="ingress",
        max_ongoing_requests=_INGRESS,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=replicas.drain_seconds,
        logging_config=quiet,
    )(Ingress)
    return front.bind(deployment.bind(dict(opening), dict(engine), settings, warm_up, log_format), settings)


def run(
    make: Callable[[], serve.Application], host: str, port: int, *, ready: Callable[[str], object] = lambda _: None
) -> None:
    """Deploy an application and wait for a signal; then take it back, when what was accepted is drawn.

    It uses the cluster that RAY_ADDRESS names, else it starts one on this machine.

    Args:
        make: makes the application, once Ray is there.
        host, port: where Ray listens, unless Ray Serve is there already, which keeps its own.
        ready: called with the address.

    Raises:
        ConfigurationError: the address cannot be listened at.
        AccelerationError: Ray or the application could not be started.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if "RAY_ADDRESS" not in os.environ and not ray.is_initialized():
        bound(host, port).close()  # Ray would say so in a log file only
    heard = signal.getsignal(signal.SIGTERM)
    try:
        if not ray.is_initialized():
            ray.init(include_dashboard=False, logging_level=logging.ERROR)
        signal.signal(signal.SIGTERM, heard)  # Ray has put one of its own there
    except Exception as error:  # it has no type of its own for any of them
        raise AccelerationError(f"Ray could not be started: {first_line(error)}") from error
    try:
        serve.start(http_options=HTTPOptions(host=host, port=port), logging_config=LoggingConfig(log_level="WARNING"))
        try:
            serve.run(make(), name=NAME, route_prefix="/")
        except RuntimeError as error:
            raise AccelerationError(f"Ray could not start the server: {_why(error)}") from error
        with interrupts.postponed() as signals:
            ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")
            while signals.received is None:
                time.sleep(0.1)
            serve.delete(NAME)
    finally:
        ray.shutdown()


def _why(error: RuntimeError) -> str:
    """Why an application was not started: the last error that a replica has told Ray, or else Ray's own."""
    known = serve.status().applications.get(NAME)
    messages = [] if known is None else [deployment.message for deployment in known.deployments.values()]
    found = re.findall(r"^\s*(?:[\w.]+\.)?(\w+Error: .+)$", "\n".join(messages), re.MULTILINE)
    return first_line(found[-1] if found else error)
