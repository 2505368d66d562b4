"""One thread that serves requests: unmodified calls of a pipeline whose models are twins."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
import traceback
from concurrent.futures import InvalidStateError
from typing import TYPE_CHECKING, Any

import torch

from diffusion_accel.denoisers import denoiser_names
from diffusion_accel.diffusers_compat import announced_steps
from diffusion_accel.generation.drawing import prepare
from diffusion_accel.generation.request import Request
from diffusion_accel.hooks import model_of
from diffusion_accel.steps import WatchedStep

from .calls import Call
from .collector import CancelledHere, Collector
from .handle import Handle, Served
from .twins import Twins

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger(__name__)


class Worker:
    """What one thread needs to serve one request after the other.

    Args:
        pipe: the pipeline whose models are shared.
        pattern: what the twins are made of; see `Engine`.
        collector: computes the calls of its models.
    """

    def __init__(self, pipe: Any, pattern: Any, collector: Collector) -> None:
        self.pipe, self._pattern, self._collector = pipe, pattern, collector
        self._twins: Twins | None = None
        self._handle: Handle | None = None

    def serve(self, handle: Handle) -> None:
        """Draw a request; whatever happens, its future is done afterwards."""
        ticket = handle.ticket
        self._collector.enter(ticket)
        self._handle, handle.began = handle, time.monotonic()
        answer: Any
        settle: Callable[[Any], None] = handle.future.set_result
        try:
            answer = self._drawn(handle)
        except BaseException as error:
            answer, settle = error, handle.future.set_exception
            traceback.clear_frames(error.__traceback__)  # they hold tensors, and whoever asked may keep the future
            if not isinstance(error, CancelledHere):
                logger.info("a request failed: %r", error)
        finally:
            self._handle = None
            self._collector.leave(ticket)
        with contextlib.suppress(InvalidStateError):  # it was cancelled meanwhile
            settle(answer)

    def _drawn(self, handle: Handle) -> Served:
        ticket = handle.ticket
        self._collector.check(ticket)
        pipe = self._pipeline(handle)
        request = handle.request
        if isinstance(request, Request):
            images = prepare(pipe, request).images(**handle.arguments)
        else:
            output = pipe(**request, **handle.arguments)
            images = getattr(output, "images", output)
        return Served(
            images,
            pipe.acceleration.report(),
            alone=handle.features.alone,
            rows=ticket.together / max(1, ticket.calls),
            waited=(handle.began or handle.submitted) - handle.submitted,
        )

    def _pipeline(self, handle: Handle) -> Any:
        if self._twins is None:
            self._twins = Twins(self._pattern, self._answer)
        pipe = handle.features.accelerated(self._twins.pipeline(handle.scheduler))
        if (scheduler := getattr(pipe, "scheduler", None)) is not None:
            around = functools.partial(self._stepped, handle, pipe)
            vars(scheduler)["step"] = WatchedStep(scheduler, scheduler.step, around)
        return pipe

    # ------------------------------------------------------------------ while it runs
    def _answer(self, name: str, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a method of a shared model returns for a call of its twin."""
        handle, twins = self._handle, self._twins
        assert handle is not None and twins is not None
        shared = handle.features.models.get(name, getattr(self.pipe, name))
        inside = handle.features.alone and name in (*denoiser_names(self.pipe), "controlnet")
        if inside or torch.is_grad_enabled() or torch.is_autocast_enabled(model_of(shared).device.type):
            with self._collector.turn(handle.ticket, name):
                return twins.own(name, method)(*args, **kwargs)
        function = shared if method == "forward" else getattr(shared, method)
        what = name if method == "forward" else f"{name}.{method}"
        return self._collector.compute(handle.ticket, what, function, Call.of(model_of(shared), method, args, kwargs))

    def _stepped(
        self, handle: Handle, pipe: Any, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A step of the request's scheduler."""
        self._collector.check(handle.ticket)
        output = step(*args, **kwargs)
        handle.step += 1
        announced = announced_steps(pipe)
        handle.steps = announced if isinstance(announced, int) else len(pipe.scheduler.timesteps)
        if handle.on_progress is not None:
            handle.on_progress(handle.progress)
        return output
