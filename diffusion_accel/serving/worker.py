"""One thread that serves requests: unmodified calls of a pipeline whose models are twins."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
import traceback
import types
from concurrent.futures import InvalidStateError
from typing import TYPE_CHECKING, Any

import torch

from diffusion_accel.denoisers import denoiser_names, family_of
from diffusion_accel.denoisers.find import DECODERS
from diffusion_accel.errors import ConfigurationError
from diffusion_accel.generation import partial
from diffusion_accel.generation.drawing import prepare
from diffusion_accel.generation.request import Request
from diffusion_accel.hooks import map_tensors, model_of
from diffusion_accel.snapshot import Snapshot
from diffusion_accel.steps import WatchedStep

from .calls import Call
from .collector import Adapters, CancelledHere, Collector
from .handle import Handle, Served
from .twins import Twins

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

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
        self._denoising = [n for n in (*denoiser_names(pipe), "controlnet") if getattr(pipe, n, None) is not None]
        self._devices: dict[str, str] = {}  # kinds of them, by the name of a model: asking takes milliseconds
        self._twins: Twins | None = None
        self._made: dict[str, Snapshot] = {}  # the twins of denoisers, as they were made
        self._changed = False  # a twin was found changed in this request
        self._adapters: Adapters = ()  # that the twins of denoisers have
        self._handle: Handle | None = None
        self._in_turn = False  # nothing else is computed, so calls of other parts run here as well

    def serve(self, handle: Handle) -> None:
        """Draw a request; whatever happens, its future is done afterwards."""
        ticket = handle.ticket
        self._collector.enter(ticket)
        self._handle, handle.began = handle, time.monotonic()
        answer: Any
        settle: Callable[[Any], None] = handle.future.set_result
        try:
            with self._collector.baton.held():
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
        self._let_loras_act(handle)
        pipe = self._pipeline(handle)
        request = handle.request
        if isinstance(request, Request):
            images = prepare(pipe, request).images(**self._arguments(handle.arguments))
        else:
            output = pipe(**self._arguments(request), **self._arguments(handle.arguments))
            images = getattr(output, "images", output)
        return Served(
            images,
            pipe.acceleration.report(),
            alone=handle.features.alone or ((type(pipe).__name__,) if self._changed else ()),
            rows=ticket.together / max(1, ticket.calls),
            waited=(handle.began or handle.submitted) - handle.submitted,
            lora_step=handle.lora_step,
        )

    def _arguments(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """Arguments of the pipeline's call; a function of the caller's runs while others do, whatever it waits for."""
        function = given.get("callback_on_step_end")
        if not isinstance(function, types.FunctionType | types.MethodType | functools.partial):
            return given

        @functools.wraps(function)
        def aside(*args: Any, **kwargs: Any) -> Any:
            with self._collector.baton.aside():
                return function(*args, **kwargs)

        return {**given, "callback_on_step_end": aside}

    def _let_loras_act(self, handle: Handle) -> None:
        """Let the LoRAs of a request act from its next call on, if their files are there; wait for them at the step at
        which they must be."""
        ticket = handle.ticket
        if ticket.adapters == handle.adapters or 0 < handle.steps <= handle.step:
            return
        if handle.step >= handle.lora_deadline:
            self._collector.wait_for(ticket, lambda: all(one.done() for one in handle.reading))
        if all(one.done() for one in handle.reading):
            for one in handle.reading:
                one.result()  # raises why one cannot be read
            ticket.adapters, handle.lora_step = handle.adapters, handle.step

    def _pipeline(self, handle: Handle) -> Any:
        self._changed = False
        if self._twins is None:
            self._twins = Twins(self._pattern, self._answer)
            self._note_as_made()
        elif not all(map(_as_made, self._made.values())):  # a call that failed left something there
            self._renew(self._pattern, ())
        if handle.features.alone and handle.ticket.adapters != self._adapters:
            with self._collector.turn(handle.ticket, "adapters"):  # they are active now
                self._renew(self.pipe, handle.ticket.adapters)
        pipe = handle.features.accelerated(self._twins.pipeline(handle.scheduler, handle.features.pipe))
        if (scheduler := getattr(pipe, "scheduler", None)) is not None:
            around = functools.partial(self._stepped, handle, pipe)
            vars(scheduler)["step"] = WatchedStep(scheduler, scheduler.step, around)
        return pipe

    def _renew(self, pipe: Any, adapters: Adapters) -> None:
        """Make the twins of the denoisers anew, of those of a pipeline, in which these adapters act."""
        assert self._twins is not None
        for name in self._denoising:
            self._twins.renew(name, getattr(pipe, name))
        self._note_as_made()
        self._adapters = adapters

    def _note_as_made(self) -> None:
        assert self._twins is not None
        self._made = {name: Snapshot(self._twins.parts[name], hooks=False) for name in self._denoising}

    # ------------------------------------------------------------------ while it runs
    def _inside(self, name: str) -> bool:
        """Whether what is to be computed depends on what is inside of a twin: hooks of features, attention processors
        of pipelines (perturbed attention guidance), keys and values that a pipeline keeps there."""
        assert self._handle is not None
        known = self._made.get(name)
        if known is None or self._handle.features.alone:
            return known is not None
        self._changed |= family_of(self._handle.features.pipe).whole is not None or not _as_made(known)
        if self._changed and (self._handle.features.models or self._handle.ticket.adapters != self._adapters):
            raise ConfigurationError(
                f"{type(self._handle.features.pipe).__name__} changes its denoiser while it is called, so in an engine "
                "it takes no LoRAs, and no features that change the denoiser's weights or blocks"
            )
        return self._changed

    def _answer(self, name: str, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a method of a shared model returns for a call of its twin."""
        handle, twins = self._handle, self._twins
        assert handle is not None and twins is not None
        if self._in_turn:
            return twins.own(name, method)(*args, **kwargs)
        shared = handle.features.models.get(name, getattr(self.pipe, name))
        if name not in self._devices:
            self._devices[name] = model_of(shared).device.type
        if self._inside(name) or torch.is_grad_enabled() or torch.is_autocast_enabled(self._devices[name]):
            with self._turn(handle, name):
                return twins.own(name, method)(*args, **kwargs)
        if name in DECODERS:  # a VAE that is kept in float32 gets latents of half precision
            args = map_tensors(lambda t: t.to(shared.dtype) if t.is_floating_point() else t, args)
        function = shared if method == "forward" else getattr(shared, method)
        what = name if method == "forward" else f"{name}.{method}"
        return self._collector.compute(handle.ticket, what, function, Call.of(model_of(shared), method, args, kwargs))

    @contextlib.contextmanager
    def _turn(self, handle: Handle, name: str) -> Iterator[None]:
        """While nothing else is computed; see `Collector.turn`."""
        with self._collector.turn(handle.ticket, name):
            self._in_turn = True
            try:
                yield
            finally:
                self._in_turn = False

    def _stepped(
        self, handle: Handle, pipe: Any, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A step of the request's scheduler."""
        self._collector.check(handle.ticket)
        handle.steps = partial.steps_in_all(pipe)
        due = partial.steps_of(handle.partial_images, handle.steps)
        latents: torch.Tensor | None = None
        if handle.on_partial is not None and handle.step + 1 in due:
            latents = partial.clean(pipe.scheduler, step, args, kwargs)
        output = step(*args, **kwargs)
        handle.step += 1
        self._let_loras_act(handle)
        if latents is not None and handle.on_partial is not None:
            images = self._shown(handle, pipe, latents)
            with self._collector.baton.aside():  # whatever it does may take long
                handle.on_partial(partial.Partial(due.index(handle.step), handle.step, handle.steps, images))
        if handle.on_progress is not None:
            with self._collector.baton.aside():
                handle.on_progress(handle.progress)
        return output

    def _shown(self, handle: Handle, pipe: Any, latents: torch.Tensor) -> list[Any]:
        """Latents without noise as images."""
        asked = handle.request
        given = {"height": asked.height, "width": asked.width} if isinstance(asked, Request) else asked
        height, width = given.get("height"), given.get("width")

        def decode(z: torch.Tensor) -> Any:
            return self._answer("vae", "decode", (z.to(pipe.vae.dtype),), {"return_dict": False})[0]

        return partial.decoded(pipe, latents, height, width, decode)


def _as_made(known: Snapshot) -> bool:
    return known.holds(values=False) and known.untouched
