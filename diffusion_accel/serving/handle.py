"""What whoever asked for images holds while they are drawn: a future, a way to cancel, how far it is."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from diffusion_accel.generation.drawing import Drawn

from .collector import Adapters, Ticket

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from diffusion_accel.generation.partial import Partial
    from diffusion_accel.generation.request import Request

    from .features import FeatureSet

QUEUED, RUNNING, COMPLETED, FAILED, CANCELLED = "queued", "running", "completed", "failed", "cancelled"


@dataclass(frozen=True)
class Standing:
    """How far a request is.

    Attributes:
        state: "queued", "running", "completed", "failed" or "cancelled".
        step: denoising steps that are done.
        steps: of how many; 0: not known yet.
        ahead: requests that are in front of it in the queue; 0 once it runs.
    """

    state: str
    step: int = 0
    steps: int = 0
    ahead: int = 0


@dataclass(frozen=True)
class Served(Drawn):
    """What one request gave; see `Drawn`.

    Attributes:
        images: what the pipeline returned as such: a tensor with `output_type="latent"`; its whole output where that
            has no images (videos, sound).
        alone: features that keep values inside of the denoiser, for which its calls ran alone, between the batches; or
            the class of the pipeline, if that changes its denoiser, or keeps something there, while it is called.
        rows: of the batches in which the others of its calls were computed, on average.
        waited: seconds in the queue.
        lora_step: from which step on its LoRAs acted, 0: all; None: it had none, or they came too late for any.
    """

    alone: tuple[str, ...] = ()
    rows: float = 0.0
    waited: float = 0.0
    lora_step: int | None = None


@dataclass(eq=False)
class Handle:
    """A request that was submitted.

    Attributes:
        request: what is drawn.
        future: of a `Served`; it raises what the drawing raised, or `CancelledError`. `future.cancel()` works at any
            moment, also while the request runs: it ends at its next call of a model, or step.
    """

    request: Request | Mapping[str, Any]
    features: FeatureSet
    scheduler: Any
    arguments: Mapping[str, Any]
    on_progress: Callable[[Standing], object] | None
    on_partial: Callable[[Partial], object] | None
    partial_images: int
    ticket: Ticket
    ahead: Callable[[Handle], int]
    adapters: Adapters = ()
    reading: Sequence[Future[None]] = ()
    lora_deadline: int = 0
    future: Future[Served] = field(default_factory=Future)
    submitted: float = field(default_factory=time.monotonic)
    began: float | None = None
    step: int = 0
    steps: int = 0
    lora_step: int | None = None

    def cancel(self) -> bool:
        """End the request, whether it waits or runs; False if it has its images, or failed, already."""
        return self.future.cancel()

    def result(self, timeout: float | None = None) -> Served:
        """Wait for the images.

        Args:
            timeout: seconds; None: as long as it takes.

        Raises:
            TimeoutError: it takes longer; the request goes on.
            CancelledError: it was cancelled.
            BaseException: what the drawing raised.
        """
        return self.future.result(timeout)

    @property
    def progress(self) -> Standing:
        """How far it is."""
        if self.future.cancelled():
            state = CANCELLED
        elif self.future.done():
            state = FAILED if self.future.exception() else COMPLETED
        else:
            state = QUEUED if self.began is None else RUNNING
        return Standing(state, self.step, self.steps, self.ahead(self) if state == QUEUED else 0)


__all__ = ["CancelledError", "Handle", "Served", "Standing"]
