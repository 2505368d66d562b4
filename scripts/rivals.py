"""What the serving engine is compared with: whole requests in static batches; in batches of one, a pipeline behind a
lock. A `Rival` has what the HTTP server needs of an `Engine`, so it can stand in its place. And the requests that all
of them draw."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Any

import torch
from measuring import STICKER

from diffusion_accel import accelerate
from diffusion_accel.errors import ConfigurationError, EngineClosedError, QueueFullError
from diffusion_accel.generation.drawing import prepare
from diffusion_accel.generation.request import Request
from diffusion_accel.serving.handle import Served

PROMPTS = ("red apple, 3d style", "panda, twemoji style", "rocket, flat style", "pizza, noto style")


def workload(kind: str, count: int, steps: int) -> list[Request]:
    """The requests: all alike but for prompt and seed, or with steps, guidance and sizes of their own."""
    made = []
    for i in range(count):
        given: dict[str, Any] = {"prompt": PROMPTS[i % 4], "seed": i, "steps": steps, **STICKER}
        if kind == "mixed":
            given["steps"] = (steps // 2, steps, 2 * steps)[i % 3]
            given["guidance_scale"] = (2.0, 3.0, 5.0)[i // 3 % 3]
        if kind == "sizes":
            given["width"] = given["height"] = (96, 64)[i % 2]
        made.append(Request(**given))
    return made


class Asked:
    """A request that waits; see `Handle`."""

    def __init__(self, request: Request, features: tuple[Any, ...], arguments: dict[str, Any]) -> None:
        self.request, self.features, self.arguments = request, features, arguments
        self.scheduler = None
        self.future: Future[Served] = Future()
        self.submitted = time.monotonic()

    def cancel(self) -> bool:
        """Leave the queue; a batch that has begun is drawn to its end."""
        return self.future.cancel()

    def result(self, timeout: float | None = None) -> Served:
        """Wait for the images."""
        return self.future.result(timeout)

    @property
    def kind(self) -> Any:
        """What the requests of one batch have in common; of those that cannot be in one, an object of their own."""
        one = self.request
        if one.count > 1 or one.image or one.control_image:
            return self
        return (self.features, one.steps, one.guidance_scale, one.width, one.height, one.negative_prompt is None)


class Rival:
    """Draws the request that waits longest, together with those that wait and are alike; see `Engine` for the rest.

    Args:
        pipe: an accelerated pipeline.
        most: requests of a batch; 1: one at a time, as a pipeline behind a lock.
        queue: requests that may wait.
    """

    def __init__(self, pipe: Any, most: int = 1, queue: int = 100_000) -> None:
        self.pipe, self.most, self.queue = pipe, most, queue
        self.features = dict(pipe.acceleration.features)
        self._on = tuple(self.features.values())
        self._waiting: list[Asked] = []
        self._drawing = 0
        self._batches: Counter[int] = Counter()
        self._ended: Counter[str] = Counter()
        self._closing, self._changed = False, threading.Condition()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def submit(self, request: Request, *, features: Any = None, arguments: Any = None, **others: Any) -> Asked:
        """Ask for images."""
        if refused := [name for name, value in others.items() if value]:
            raise ConfigurationError(f"only the engine takes {', '.join(refused)}")
        asked = Asked(request, self._on if features is None else tuple(features), dict(arguments or {}))
        with self._changed:
            if self._closing:
                raise EngineClosedError("it is closed")
            if len(self._waiting) >= self.queue:
                raise QueueFullError(f"{self.queue} requests wait already")
            self._waiting.append(asked)
            self._changed.notify_all()
        return asked

    def stats(self) -> dict[str, Any]:
        """As `Engine.stats`; the rows of a batch are requests."""
        with self._changed:
            ended = {state: self._ended[state] for state in ("completed", "failed", "cancelled")}
            now = {"queued": len(self._waiting), "running": self._drawing}
        return {**now, **ended, "batches": {"requests": dict(self._batches)}, "alone": {}}

    def close(self, drain: bool = True, timeout: float | None = None) -> None:
        """Take no more requests, and finish those that wait."""
        with self._changed:
            self._closing = True
            for asked in [] if drain else self._waiting:
                asked.cancel()
            self._changed.notify_all()
        self._thread.join(timeout)

    def _work(self) -> None:
        while batch := self._next():
            try:
                answers: Sequence[Any] = self._drawn(batch)
                settle = Future.set_result
            except Exception as error:
                answers, settle = [error] * len(batch), Future.set_exception
            for asked, answer in zip(batch, answers, strict=True):
                with suppress(InvalidStateError):  # it was cancelled meanwhile
                    settle(asked.future, answer)
            with self._changed:
                self._drawing = 0
                self._ended["failed" if settle is Future.set_exception else "completed"] += len(batch)
                self._batches[len(batch)] += 1

    def _next(self) -> list[Asked]:
        batch: list[Asked] = []
        with self._changed:
            while not batch and (self._waiting or not self._closing):
                self._changed.wait_for(lambda: self._waiting or self._closing)
                there = [asked for asked in self._waiting if not asked.future.cancelled()]
                self._ended["cancelled"] += len(self._waiting) - len(there)
                batch = [asked for asked in there if asked.kind == there[0].kind][: self.most]
                self._waiting = [asked for asked in there if asked not in batch]
            self._drawing = len(batch)
        return batch

    def _drawn(self, batch: Sequence[Asked]) -> list[Served]:
        first, began = batch[0], time.monotonic()
        if first.features != self._on:
            self.pipe.acceleration.remove()
            accelerate(self.pipe, *first.features)
            self._on = first.features
        calls = [prepare(self.pipe, asked.request) for asked in batch]
        if len(batch) == 1:
            images = [calls[0].images(**first.arguments)]
        else:
            each: dict[str, Any] = {"prompt": [asked.request.prompt for asked in batch]}
            if first.request.negative_prompt is not None:
                each["negative_prompt"] = [asked.request.negative_prompt for asked in batch]
            each["generator"] = [torch.Generator().manual_seed(asked.request.seed) for asked in batch]
            together = self.pipe(**(calls[0].arguments | first.arguments | each)).images
            images = [together[i : i + 1] for i in range(len(batch))]
        report = self.pipe.acceleration.report()
        return [
            Served(found, report, rows=len(batch), waited=began - asked.submitted)
            for found, asked in zip(images, batch, strict=True)
        ]
