"""The engine: requests are drawn at the same time, and what their models compute shares batches."""

from __future__ import annotations

import atexit
import functools
import logging
import math
import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from diffusers import DiffusionPipeline
from torch import distributed, nn

from diffusion_accel.changes import Changes
from diffusion_accel.conditioning import NOTHING, PROMPT, call_parameters, condition_of, usual_texts
from diffusion_accel.diffusers_compat import has_offload_hook, progress_bar_settings
from diffusion_accel.errors import ConfigurationError, EngineClosedError, QueueFullError, UnsupportedPipelineError
from diffusion_accel.feature import Feature
from diffusion_accel.generation.drawing import check_drawable, check_requests
from diffusion_accel.generation.loading import open_pipeline
from diffusion_accel.generation.partial import MOST, Partial, impossible
from diffusion_accel.generation.request import Request, at_least
from diffusion_accel.io import shown
from diffusion_accel.pipelines.loading import as_task
from diffusion_accel.pipelines.schedulers import scheduler_for
from diffusion_accel.switchboard import hold_models

from .adapters import Adapters
from .collector import CancelledHere, Collector, Ticket
from .features import FeatureSets
from .handle import CANCELLED, COMPLETED, FAILED, Handle, Served, Standing
from .twins import Twins
from .worker import Worker

logger = logging.getLogger(__name__)

_SCHEDULERS_KEPT = 32
_DEADLINES = at_least(0, 10_000)
_LONGEST_WAIT = 10**9  # milliseconds


class Engine:
    """Draws requests at the same time with one pipeline, without HTTP or anything else around it.

        with Engine(pipe) as engine:
            handle = engine.submit(Request(prompt="red apple, 3d style", seed=1))
            images = handle.result().images

    Each request is an unmodified call of the pipeline in a thread of its own, with its own scheduler and tokenizers.
    What its models are to compute waits at one place, where rows of the same kind (shapes, types, adapters) are
    computed as one batch, each at its own timestep: so requests with other prompts, steps, schedulers, guidance and
    strengths share batches, and join and leave between steps. Each image is the one that is drawn alone, but for the
    rounding of batches. Steps that a plan holds, and branches of guidance that it leaves out, never get there. Features
    that keep values inside of the denoiser (`Served.alone`) run by themselves between batches.

    While it is open the pipeline's models are the engine's: do not call, move or change the pipeline. Close it, or use
    it in a `with` statement. `submit`, `stats` and `close` may be called from any thread.

    Args:
        pipe: a loaded pipeline, accelerated or not, or what `open_pipeline` opens. Its enabled features are those of
            requests that name none.
        running: requests that are drawn at the same time, 1 to 256. Each has a thread, and a copy of the tokenizers.
        queue: requests that may wait beside them, 0 to 100,000.
        most_rows: rows of a batch at most, 1 to 1024; guidance makes two rows of an image. `warm_up` may find fewer to
            be enough.
        loras: LoRA files by the names that requests have for them; or a folder, whose files are LoRAs by their names.
            Requests with the same LoRAs and scales share batches; those with others take turns.
        loras_kept: LoRAs that are kept in memory, 1 to 1000; others are loaded again when they are asked for.
        wait: milliseconds that a batch waits at most for requests on their way to their next call; None: as long as one
            more row would save, which `warm_up` measures; 5 ms without.

    Raises:
        ConfigurationError: a number is out of its limits.
        UnsupportedPipelineError: the pipeline's models are offloaded, or shared with other processes.
        CallStateError: another call uses the models.
        ModelLoadError: as `open_pipeline`.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline | str,
        *,
        running: int = 8,
        queue: int = 64,
        most_rows: int = 16,
        wait: float | None = None,
        loras: Mapping[str, str | Path] | str | Path | None = None,
        loras_kept: int = 4,
    ) -> None:
        for name, value, low, high in (
            ("loras_kept", loras_kept, 1, 1000),
            ("running", running, 1, 256),
            ("queue", queue, 0, 100_000),
            ("most_rows", most_rows, 1, 1024),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise ConfigurationError(f"{name} must be a whole number of {low} to {high}, got {shown(value)}")
        if wait is not None and not (0 <= wait <= _LONGEST_WAIT or wait == math.inf):
            raise ConfigurationError(f"wait must be 0 to {_LONGEST_WAIT:,} milliseconds, got {shown(wait)}")
        self.pipe: Any = open_pipeline(pipe) if isinstance(pipe, str) else pipe
        if reason := _unservable(self.pipe):
            raise UnsupportedPipelineError(f"{type(self.pipe).__name__} cannot be served: {reason}")
        self.running, self.queue = running, queue
        files = {} if loras is None else loras
        self._adapters = Adapters(self.pipe, files, loras_kept, lambda: self._collector.notify())
        self._compiled = any(feature.of_the_model for feature in _enabled(self.pipe).values())
        if self._adapters.files:
            self._check_takes_loras()
        #: what requests that name no features are drawn with, by name
        self.features: dict[str, Feature] = {n: f for n, f in _enabled(self.pipe).items() if not f.of_the_model}
        self._schedulers: dict[str, Any] = {}
        self._lock = threading.Lock()  # of what is made for requests
        self._for_tasks: dict[tuple[str, bool], Any] = {}  # patterns for requests with images, and without a ControlNet
        self._changes = Changes()  # of the shared models
        try:
            _keep_wide(self.pipe, self._changes)
            # what twins are made of: the pipeline before something concerns its models
            self._pattern: Any = Twins(self.pipe).pipeline(getattr(self.pipe, "scheduler", None))
            self._sets = FeatureSets()
            self._sets.of(self._pattern, tuple(self.features.values()))
            hold_models(self.pipe, self._changes)
        except BaseException:
            self._changes.undo()
            raise
        self._collector = Collector(
            most_rows, None if wait is None else wait / 1000, self._adapters.activate, self._compiled
        )
        self._changed = threading.Condition()
        self._queued: deque[Handle] = deque()
        self._at_work: set[Handle] = set()
        self._ended: Counter[str] = Counter()
        self._closing = False
        self._workers: list[Worker] = []  # that serve no request now
        self._threads = [
            threading.Thread(target=self._work, name=f"request {number}", daemon=True) for number in range(running)
        ]
        for thread in self._threads:
            thread.start()
        atexit.register(self._close_at_exit)

    # ------------------------------------------------------------------ asking
    def submit(
        self,
        request: Request | Mapping[str, Any],
        *,
        features: Sequence[Feature] | None = None,
        scheduler: str | None = None,
        loras: Mapping[str, float] | None = None,
        lora_deadline: int = 0,
        arguments: Mapping[str, Any] | None = None,
        on_progress: Callable[[Standing], object] | None = None,
        partial_images: int = 0,
        on_partial: Callable[[Partial], object] | None = None,
        _measuring: bool = False,
    ) -> Handle:
        """Ask for images. Returns at once.

        Args:
            request: what is drawn; image k of it has the seed `request.seed` + k, also on another engine. One with an
                image, or a mask, is drawn by the pipeline of diffusers for that, with the same models; one without a
                control image as if there were no ControlNet. Or the arguments
                of the pipeline's call by name, with a generator of its own, for what no `Request` says.
            features: exactly those that it is drawn with; None: the pipeline's own (`engine.features`).
            scheduler: a short name or a diffusers class; None: the pipeline's own.
            loras: scales, -10 to 10, of the engine's LoRAs by name.
            lora_deadline: for LoRAs that are not in memory: the request begins without them while their files are read,
                they act from the step on before which that is done, and at this step, 0 to 10,000, the request waits
                for them. 0: they act at every step. `Served.lora_step` says from which on they did.
            arguments: others of the pipeline's call, by name, such as `output_type` or `clip_skip`.
            on_progress: called after each step with how far it is, in the request's thread; what it raises ends the
                request.
            partial_images: how many times the images are shown before they are finished, 0 to 16: what they would be
                without the noise that they still have, evenly over the steps.
            on_partial: called with each of them, as `on_progress` is.

        Raises:
            QueueFullError: `queue` requests wait already.
            EngineClosedError: the engine is closed, or being closed.
            ConfigurationError, UnsupportedPipelineError, FeatureConflictError: the pipeline cannot draw it so.
            ModelLoadError: a `Request` for a pipeline that takes neither a prompt nor a class.
        """
        wanted = tuple(self.features.values()) if features is None else tuple(features)
        if refused := [feature.name for feature in wanted if feature.of_the_model]:
            raise ConfigurationError(f"{', '.join(refused)} belongs to the model: give it to the engine's pipeline")
        adapters = self._adapters.chosen(loras or {})
        _DEADLINES.check(lora_deadline, "lora_deadline")
        chosen = self._sets.of(self._pattern_for(request), wanted, alone=bool(adapters))
        if isinstance(partial_images, bool) or not isinstance(partial_images, int) or not 0 <= partial_images <= MOST:
            raise ConfigurationError(f"partial_images must be 0 to {MOST}, got {shown(partial_images)}")
        if isinstance(request, Request):
            check_drawable(chosen.pipe)
            check_requests(chosen.pipe, [request])
        elif "kwargs" not in (known := call_parameters(chosen.pipe)) and (unknown := sorted(set(request) - {*known})):
            raise ConfigurationError(f"{type(chosen.pipe).__name__} does not take {', '.join(unknown)}")
        if lora_deadline and (not adapters or chosen.alone):
            why = f"with {', '.join(chosen.alone)}, which works inside of the denoiser" if adapters else "without loras"
            raise ConfigurationError(f"lora_deadline is not possible {why}; leave it out")
        handle = Handle(
            request=request,
            features=chosen,
            scheduler=self._scheduler(scheduler),
            arguments=dict(arguments or {}),
            on_progress=on_progress,
            on_partial=on_partial,
            partial_images=partial_images,
            ticket=Ticket(measuring=_measuring),
            ahead=self._ahead,
            adapters=adapters,
            lora_deadline=lora_deadline,
        )
        if partial_images and (reason := impossible(handle.scheduler, self._pattern)):
            raise ConfigurationError(f"{type(self._pattern).__name__} has no partial_images: {reason}")
        return self._enqueue(handle)

    def shows_partial_images(self, scheduler: str | None = None) -> bool:
        """Whether requests with this scheduler may have `partial_images`.

        Args:
            scheduler: see `submit`.

        Raises:
            ConfigurationError: there is no such scheduler.
        """
        return impossible(self._scheduler(scheduler), self._pattern) is None

    @property
    def loras(self) -> tuple[str, ...]:
        """The names of LoRAs that requests may give."""
        return tuple(self._adapters.files)

    def add_lora(self, name: str, file: str | Path) -> None:
        """Let requests name one more LoRA, or another file by a name that there was; it is loaded when one does.

        Raises:
            ConfigurationError: there is no such file, or the model is compiled.
        """
        self._check_takes_loras()
        self._adapters.add(name, Path(file))

    def remove_lora(self, name: str) -> None:
        """Let requests name a LoRA no longer; those that have it already are drawn.

        Raises:
            ConfigurationError: there is none of that name.
        """
        self._adapters.remove(name)

    def _check_takes_loras(self) -> None:
        if self._compiled:
            raise ConfigurationError("a compiled model takes no LoRAs: give the pipeline without, or no loras")

    def warm_up(self, requests: Sequence[Request | Mapping[str, Any]] | None = None) -> dict[str, dict[int, float]]:
        """Measure what batches cost, before the first request: how many rows are worth it, and how long to wait for
        more, follows from it. It also makes what first calls make (memory, graphs).

        Args:
            requests: what is to be expected, one for each size; None: one image of the pipeline's usual size.

        Returns:
            for each kind of call (the part of the pipeline and the shape of a row) the milliseconds of a batch by its
            rows: {"unet 4x64x64": {2: 31.0, 4: 40.2}}.

        Raises:
            ConfigurationError: nobody can guess what this pipeline is to draw; or what `submit` raises.
        """
        for request in [self._usual()] if requests is None else requests:
            self.submit(request, _measuring=True).result()
        return {
            curve.what: {rows: round(1000 * seconds, 3) for rows, seconds in curve.seconds.items()}
            for curve in list(self._collector.curves.values())
        }

    def _usual(self) -> Request:
        steps = getattr(getattr(self.pipe, "scheduler", None), "evaluations", None) or [2]
        condition = condition_of(self._pattern)
        if condition == NOTHING:
            raise ConfigurationError(f"{type(self._pattern).__name__} takes no prompt: give warm_up what to expect")
        prompt = "a picture" if condition == PROMPT else usual_texts(self._pattern, 1)[0]
        return Request(prompt=prompt, seed=0, steps=min(steps))

    def _enqueue(self, handle: Handle) -> Handle:
        with self._changed:
            if self._closing:
                raise EngineClosedError("the engine is closed and takes no more requests")
            free = self.running - len(self._at_work)
            if len(self._queued) >= self.queue + max(0, free):
                raise QueueFullError(f"{self.queue} requests wait already, which is all that may; try again later")
            handle.reading = self._adapters.fetch(handle.adapters)
            self._queued.append(handle)
            self._changed.notify()
        handle.future.add_done_callback(functools.partial(self._done, handle))
        return handle

    def stats(self) -> dict[str, Any]:
        """What was done since it was opened, and what it does now.

        Returns:
            requests that are "queued" and "running", that have "completed", "failed" and were "cancelled"; "calls": how
            many calls of each part of the pipeline were computed ("unet": 1240); "batches": in how many batches of so
            many rows ("unet": {2: 10, 8: 300}); "alone": how many more ran by themselves, in their request's thread.
        """
        batches: dict[str, dict[int, int]] = {}
        alone: dict[str, int] = {}
        for (what, rows), count in sorted(dict(self._collector.batches).items()):
            if rows:
                batches.setdefault(what, {})[rows] = count
            else:
                alone[what] = count
        with self._changed:
            now = {"queued": len(self._queued), "running": len(self._at_work)}
            ended = {state: self._ended[state] for state in (COMPLETED, FAILED, CANCELLED)}
        return {**now, **ended, "calls": dict(self._collector.calls), "batches": batches, "alone": alone}

    @property
    def works(self) -> bool:
        """Whether it takes requests and draws them; False once it is closed."""
        return not self._closing and self._collector.works and all(thread.is_alive() for thread in self._threads)

    # ------------------------------------------------------------------ the end
    def close(self, drain: bool = True, timeout: float | None = None) -> None:
        """Take no more requests, end what runs, and give the pipeline back. Safe to call twice.

        Args:
            drain: finish all requests that were submitted; otherwise they are cancelled.
            timeout: seconds after which those that are left are cancelled; None: as long as it takes.

        Raises:
            ConfigurationError: it is called by a callback of a request, which would wait for itself.
        """
        if threading.current_thread() in self._threads:
            raise ConfigurationError("close waits for all requests, so no callback of a request may call it")
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            if drain:
                self._changed.wait_for(lambda: not self._queued and not self._at_work, timeout)
            left = [*self._queued, *self._at_work]
        for handle in left:
            handle.cancel()
        for thread in self._threads:
            thread.join()
        self._collector.stop(EngineClosedError("the engine is closed"))
        self._adapters.forget()
        self._changes.undo()
        atexit.unregister(self._close_at_exit)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(drain=kind is None)

    def _close_at_exit(self) -> None:
        self.close(drain=False)

    # ------------------------------------------------------------------ threads
    def _work(self) -> None:
        """What each thread does: one request after the other."""
        while (handle := self._take()) is not None:
            with self._changed:  # the one that served last: as few are made as there were requests at a time
                worker = self._workers.pop() if self._workers else None
            worker = worker or Worker(self.pipe, self._pattern, self._collector)
            try:
                worker.serve(handle)
            finally:
                with self._changed:
                    self._workers.append(worker)
                    self._at_work.discard(handle)
                    self._changed.notify_all()
            del handle

    def _take(self) -> Handle | None:
        with self._changed:
            self._changed.wait_for(lambda: self._queued or self._closing)
            if not self._queued:
                return None
            handle = self._queued.popleft()
            self._at_work.add(handle)
            return handle

    def _done(self, handle: Handle, future: Future[Served]) -> None:
        """A request has ended, or was cancelled: then it leaves the queue, or stops where it is."""
        with self._changed:
            if handle in self._queued:
                self._queued.remove(handle)
                self._changed.notify_all()
            state = CANCELLED if future.cancelled() else FAILED if future.exception() else COMPLETED
            self._ended[state] += 1
        if state == CANCELLED:
            self._collector.stop_request(handle.ticket, CancelledHere())

    def _ahead(self, handle: Handle) -> int:
        with self._changed:
            return self._queued.index(handle) if handle in self._queued else 0

    # ------------------------------------------------------------------ what requests are made of
    def _pattern_for(self, request: Request | Mapping[str, Any]) -> Any:
        """The pattern of a pipeline that takes the images of a request."""
        if not isinstance(request, Request):
            return self._pattern
        parameters = call_parameters(self._pattern)
        controlled = "controlnet" in self._pattern.components
        takes_image = "image" in parameters and (not controlled or "control_image" in parameters)  # no ControlNet's
        bare = controlled and not request.control_image  # as if there were no ControlNet
        if request.mask_image and "mask_image" not in parameters:
            task = "inpainting"
        elif request.image and (bare or not takes_image):
            task = "image-to-image"
        elif bare:
            task = "text-to-image"
        else:
            return self._pattern
        with self._lock:
            if (task, bare) not in self._for_tasks:
                made = self._for_tasks[task, bare] = as_task(self._pattern, task, without_controlnet=bare)
                made.set_progress_bar_config(**progress_bar_settings(self._pattern))
            return self._for_tasks[task, bare]

    def _scheduler(self, name: str | None) -> Any:
        """The scheduler of that name for this model, which requests copy; the pipeline's own for None."""
        if name is None:
            return getattr(self.pipe, "scheduler", None)
        with self._lock:
            if name not in self._schedulers:
                self._schedulers[name] = scheduler_for(self.pipe, name)
                for old in list(self._schedulers)[:-_SCHEDULERS_KEPT]:
                    del self._schedulers[old]
            return self._schedulers[name]


def _enabled(pipe: Any) -> dict[str, Feature]:
    """The enabled features of a pipeline by name."""
    handle = getattr(pipe, "acceleration", None)
    return {} if handle is None else {n: f for n, f in handle.features.items() if handle.enabled(n)}


def _keep_wide(pipe: Any, changes: Changes) -> None:
    """A VAE that pipelines cast to float32 and back around each use (SDXL's) stays so: others may be using it."""
    vae = getattr(pipe, "vae", None)
    if isinstance(vae, nn.Module) and vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False):
        changes.add(functools.partial(vae.to, torch.float16))
        vae.to(torch.float32)


def _unservable(pipe: Any) -> str | None:
    """Why requests cannot share the models of a pipeline, as far as that can be seen; None if they can."""
    models = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    if any(has_offload_hook(module) for model in models for module in model.modules()):
        return "its models are offloaded or spread over devices; keep them where they compute"
    if any(getattr(model, "is_cache_enabled", False) for model in models):
        return "a cache of diffusers is enabled on its model, for all requests at once; name it in Reuse(plan=...)"
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        return "several processes draw together; run one engine in each, and share the requests among them"
    return None
