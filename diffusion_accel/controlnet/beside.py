"""Where a ControlNet's calls are computed while the caller goes on: a thread, and streams on CUDA."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from diffusion_accel.hooks import map_tensors, tensors_in


class Beside:
    """A thread for one call of a pipeline; it computes one call of the ControlNet at a time.

    Args:
        home: the device of the pipeline: from there come the arguments, and what is returned is put there.
        there: the device of the ControlNet.
    """

    def __init__(self, home: torch.device, there: torch.device) -> None:
        self.home, self.there = home, there
        self._pool = ThreadPoolExecutor(1, "controlnet")
        self._streams = [torch.cuda.Stream(device) for device in dict.fromkeys((home, there)) if device.type == "cuda"]
        self._running: Job | None = None

    def begin(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Job:
        """Let a function be called in the thread; the one before has to have ended."""
        self.wait()
        began = [torch.cuda.current_stream(stream.device).record_event() for stream in self._streams]
        for tensor in tensors_in([args, kwargs]):
            for stream in self._streams:
                if tensor.device == stream.device:
                    tensor.record_stream(stream)  # its memory is not another's before that stream has read it
        job = self._running = Job(self._streams)
        job.future = self._pool.submit(self._compute, job, _modes(self.home), began, function, args, kwargs)
        return job

    def now(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a function returns, called in this thread, when the one before has ended."""
        self.wait()
        return self._called(function, args, kwargs)

    def wait(self) -> None:
        """Wait for what runs. Raises what it raised."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def close(self) -> None:
        """Wait for what runs, whatever comes of it, and end the thread. Safe to call twice."""
        self._running = None
        self._pool.shutdown()

    def _compute(
        self,
        job: Job,
        modes: Callable[[], contextlib.ExitStack],
        began: list[torch.cuda.Event],
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        with modes() as stack:
            for stream, event in zip(self._streams, began, strict=True):  # the last one is the ControlNet's
                stack.enter_context(torch.cuda.stream(stream))
                stream.wait_event(event)
            output = self._called(function, args, kwargs)
            job.ended = [stream.record_event() for stream in self._streams]
            return output

    def _called(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.home == self.there:
            return function(*args, **kwargs)
        args, kwargs = map_tensors(self._moved, (args, kwargs))
        return map_tensors(lambda tensor: tensor.to(self.home), function(*args, **kwargs))

    def _moved(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.there) if tensor.device == self.home else tensor


class Job:
    """A call that is being computed."""

    future: Future[Any]

    def __init__(self, streams: list[torch.cuda.Stream]) -> None:
        self._streams = streams
        self.ended: list[torch.cuda.Event] = []

    def result(self) -> Any:
        """What it returned, once it has; on CUDA once the stream that is current now gets so far.

        Raises:
            BaseException: what it raised.
        """
        output = self.future.result()
        for stream, event in zip(self._streams, self.ended, strict=True):
            current = torch.cuda.current_stream(stream.device)
            current.wait_event(event)
            for tensor in tensors_in(output):
                if tensor.device == stream.device:
                    tensor.record_stream(current)
        return output


def _modes(device: torch.device) -> Callable[[], contextlib.ExitStack]:
    """What torch keeps for each thread, as this one has it: made anew in the thread that calls what is returned."""
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    kind = device.type
    cast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if cast else None

    def enter() -> contextlib.ExitStack:
        stack = contextlib.ExitStack()
        stack.enter_context(torch.inference_mode(inference))
        stack.enter_context(torch.set_grad_enabled(grad))
        if cast:
            stack.enter_context(torch.autocast(kind, dtype=dtype))
        return stack

    return enter
