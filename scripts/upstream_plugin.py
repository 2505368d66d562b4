"""A pytest plugin that runs somebody else's tests of diffusers pipelines with accelerated pipelines.

`pytest -p upstream_plugin`, told by the environment: UPSTREAM_SETTING is a name of `SETTINGS`, UPSTREAM_RESULTS a file
that gets a line of JSON for each test, UPSTREAM_TIMEOUT the seconds that a test may take, UPSTREAM_LEAVE_OUT a file
with names of tests that are not to run. It changes what the classes of pipelines do in this process: each object is
accelerated when it is made, and what calls return is remembered as a digest, to be compared with that of plain calls.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import random
import signal
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from diffusion_accel import ConfigurationError, FeatureConflictError, Reuse, UnsupportedPipelineError, accelerate
from diffusion_accel.feature import Feature
from diffusion_accel.registry import feature_class


def _neutral(*names: str) -> tuple[Feature, ...]:
    return tuple(feature_class(name).neutral() for name in names)


REST = ("task_routing", "controlnet_parallel", "compiled", "transparent", "patch_parallel")
#: what pipelines are accelerated with, in this order, each where it can be used
SETTINGS: dict[str, Callable[[], tuple[Feature, ...]]] = {
    "plain": tuple,
    "neutral": lambda: _neutral("reuse", *REST),
    "encoder": lambda: _neutral("encoder_reuse"),
    "real": lambda: (Reuse(plan="hold:2"),),
}


class Calls(threading.local):
    """What the running test has done so far."""

    def __init__(self) -> None:
        self.depth = 0
        self.begin()

    def begin(self) -> None:
        """Forget the test before."""
        self.digests: list[str] = []
        self.attached: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.accelerated = 0


calls = Calls()
_wrapped: set[type] = set()
_recorded: set[Any] = set()


# ---------------------------------------------------------------------- pipelines
def arrays(value: Any) -> Iterator[np.ndarray]:
    """All tensors, arrays and images in what a pipeline returns."""
    if isinstance(value, torch.Tensor):
        yield value.detach().float().cpu().numpy()
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from arrays(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from arrays(one)
    elif isinstance(value, np.ndarray) or hasattr(value, "getbands"):
        yield np.asarray(value)


def digest(value: Any) -> str:
    """A text that is the same for the same bits."""
    found = hashlib.sha256()
    for one in arrays(value):
        found.update(f"{one.shape}{one.dtype}".encode())
        found.update(np.ascontiguousarray(one).tobytes())
    return found.hexdigest()[:16]


def record_calls(cls: Any) -> None:
    """Let the calls of a class of pipelines be remembered, but not those that others make."""
    call = cls.__call__
    if call in _recorded:
        return

    @functools.wraps(call)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807 - it becomes the class's
        calls.depth += 1
        try:
            output = call(self, *args, **kwargs)
        finally:
            calls.depth -= 1
        if not calls.depth:
            calls.digests.append(digest(output))
            calls.accelerated += bool(getattr(self, "acceleration", None))
        return output

    _recorded.add(__call__)
    cls.__call__ = __call__


def switch_on(pipe: Any, features: tuple[Feature, ...]) -> None:
    """Accelerate a pipeline with those of the features that it can have."""
    for feature in features:
        try:
            accelerate(pipe, feature)
        except (UnsupportedPipelineError, FeatureConflictError, ConfigurationError) as error:
            calls.refused[f"{feature.name}: {error}"] += 1
        else:
            calls.attached[feature.name] += 1


def wrap(cls: Any, features: tuple[Feature, ...]) -> None:
    """Let every object of a class of pipelines be accelerated when it is made, and its calls remembered."""
    made = cls.__init__

    @functools.wraps(made)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807 - it becomes the class's
        made(self, *args, **kwargs)
        if type(self).__init__ is __init__:  # not where a class above it is made
            switch_on(self, features)
            record_calls(type(self))

    cls.__init__ = __init__
    _wrapped.add(cls)


def wrap_all(features: tuple[Feature, ...]) -> None:
    """Do it for all classes that are there by now."""
    waiting = DiffusionPipeline.__subclasses__()
    while waiting:
        cls: Any = waiting.pop()
        waiting += cls.__subclasses__()
        if "__init__" in vars(cls) and cls not in _wrapped:
            wrap(cls, features)


# ---------------------------------------------------------------------- tests
class Plugin:
    """The hooks of pytest.

    Args:
        features: what pipelines are accelerated with.
        results: the file that gets a line for each test.
        timeout: seconds that a test may take.
        leave_out: names of tests that are not to run.
    """

    def __init__(self, features: tuple[Feature, ...], results: Path, timeout: float, leave_out: frozenset[str]) -> None:
        self.features, self.results, self.timeout, self.leave_out = features, results, timeout, leave_out
        self.reports: list[Any] = []

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        """Leave out the tests that are not to run."""
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in self.leave_out])
        items[:] = [item for item in items if item.nodeid not in self.leave_out]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Generator[None, object, object]:
        """Run one test from the same random numbers, for so long at most, and write down what came of it."""

        def stop(*_: object) -> None:
            raise TimeoutError(f"the test took longer than {self.timeout:g} seconds")

        wrap_all(self.features)
        calls.begin()
        self.reports.clear()
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        before = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, self.timeout)
        try:
            done = yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        with self.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"test": item.nodeid, **self.result()}) + "\n")
        return done

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Remember how a part of a test ended."""
        self.reports.append(report)

    def result(self) -> dict[str, Any]:
        """What came of the test that ran last."""
        failed = [report for report in self.reports if report.failed]
        skipped = any(report.skipped for report in self.reports)
        message = failed[0].longreprtext.strip() if failed else ""
        return {
            "outcome": "failed" if failed else "skipped" if skipped else "passed",
            "seconds": round(sum(report.duration for report in self.reports), 2),
            "message": message[-3000:],
            "digests": calls.digests,
            "accelerated_calls": calls.accelerated,
            "attached": dict(calls.attached),
            "refused": dict(calls.refused),
        }


def pytest_configure(config: Any) -> None:
    """Begin, if a setting is asked for."""
    setting = os.environ.get("UPSTREAM_SETTING")
    if setting:
        names = frozenset(Path(os.environ["UPSTREAM_LEAVE_OUT"]).read_text(encoding="utf-8").splitlines())
        results, timeout = Path(os.environ["UPSTREAM_RESULTS"]), float(os.environ["UPSTREAM_TIMEOUT"])
        config.pluginmanager.register(Plugin(SETTINGS[setting](), results, timeout, names), "upstream-tests")
