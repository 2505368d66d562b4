"""What Prometheus reads."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from .answers import skipped_steps

if TYPE_CHECKING:
    from diffusion_accel.serving.handle import Served

_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
_STEPS = (1, 4, 8, 12, 16, 20, 25, 30, 40, 50, 75, 100, 150)
_PREFIX = "diffusion_accel_"


class Metrics:
    """Counters of one server.

    Args:
        stats: `Engine.stats`.
    """

    def __init__(self, stats: Callable[[], dict[str, Any]]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_FromEngine(stats))

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(_PREFIX + name, text, labels, registry=self._registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(_PREFIX + name, text, buckets=buckets, registry=self._registry)

        self._answers = counter("http_answers", "HTTP answers; status 499: the client went away", "path", "status")
        self._images = counter("images", "images drawn")
        self._all_steps = counter("steps", "denoising steps")
        self._skipped = counter("skipped_steps", "denoising steps that were not computed in full")
        self._seconds = histogram("request_seconds", "from asking for images to having them", _SECONDS)
        self._waited = histogram("waiting_seconds", "of it in the queue", _SECONDS)
        self._steps = histogram("request_steps", "denoising steps of a request", _STEPS)
        self.mean_seconds = 1.0

    def answered(self, path: str, status: int, _seconds: float) -> None:
        """An HTTP answer was sent."""
        self._answers.labels(path, str(status)).inc()

    def drawn(self, served: Served) -> None:
        """A request has its images."""
        seconds = served.waited + served.report.seconds
        self.mean_seconds += 0.1 * (served.report.seconds - self.mean_seconds)
        self._seconds.observe(seconds)
        self._waited.observe(served.waited)
        self._images.inc(len(served.images))
        if served.report.steps is not None:
            self._steps.observe(served.report.steps)
            self._all_steps.inc(served.report.steps)
            self._skipped.inc(skipped_steps(served))

    def text(self) -> bytes:
        """All of it, in Prometheus' form."""
        return generate_latest(self._registry)


class _FromEngine(Collector):
    """What the engine counts by itself."""

    def __init__(self, stats: Callable[[], dict[str, Any]]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        now = GaugeMetricFamily(_PREFIX + "requests", "requests that run or wait", labels=["state"])
        for state in ("running", "queued"):
            now.add_metric([state], stats[state])
        ended = CounterMetricFamily(_PREFIX + "requests_ended", "requests that have ended", labels=["outcome"])
        for outcome in ("completed", "failed", "cancelled"):
            ended.add_metric([outcome], stats[outcome])
        batches = CounterMetricFamily(_PREFIX + "batches", "batches of so many rows", labels=["part", "rows"])
        for part, rows in stats["batches"].items():
            for count, times in rows.items():
                batches.add_metric([part, str(count)], times)
        alone = CounterMetricFamily(_PREFIX + "calls_alone", "calls that could not share a batch", labels=["part"])
        for part, times in stats["alone"].items():
            alone.add_metric([part], times)
        memory = GaugeMetricFamily(_PREFIX + "peak_memory_bytes", "the most memory that was in use", labels=["where"])
        for where, size in _peaks().items():
            memory.add_metric([where], size)
        yield from (now, ended, batches, alone, memory)


def _peaks() -> dict[str, int]:
    found = {}
    if sys.platform != "win32":
        import resource  # not on Windows

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found["process"] = most if sys.platform == "darwin" else most * 1024
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        found["cuda"] = sum(torch.cuda.max_memory_allocated(device) for device in range(torch.cuda.device_count()))
    return found
