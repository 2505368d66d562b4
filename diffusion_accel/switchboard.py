"""The switchboard: `accelerate(pipe, …)` and the handle `pipe.acceleration`."""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from diffusers import DiffusionPipeline

from .denoisers import find_controlnet, find_denoiser
from .errors import CallStateError, ConfigurationError, FeatureConflictError, UnsupportedPipelineError
from .evaluation.flops import count_flops
from .feature import Attachment, Feature
from .hooks import bind_method
from .registry import FEATURES, feature_class
from .report import Report
from .steps import StepClock

logger = logging.getLogger(__name__)

_classes: dict[type, type] = {}  # pipeline class -> its accelerated subclass
_busy: set[int] = set()  # ids of the models that a running call uses
_busy_lock = threading.Lock()


def accelerate(pipeline: Any, *features: Feature | type[Feature] | str) -> Any:
    """Switch features on for a diffusers pipeline, in place, and return it.

    The pipeline's class becomes a generated subclass of its own class, so `isinstance` keeps its meaning. A feature
    that is already there is replaced, and one that the model was trained with (such as task routing) is added.
    Everything is checked before anything is changed.

    Args:
        pipeline: a loaded `DiffusionPipeline`.
        features: `Feature` objects, or classes or names for the recommended settings, in any order.

    Raises:
        UnsupportedPipelineError: a feature cannot work on this pipeline.
        FeatureConflictError: two of the features cannot be combined.
    """
    if not isinstance(pipeline, DiffusionPipeline):
        raise UnsupportedPipelineError(
            f"accelerate() takes a loaded diffusers pipeline, got {type(pipeline).__name__}; "
            "load one first, for example with DiffusionPipeline.from_pretrained(...)"
        )
    wanted = [_as_feature(f) for f in features]
    names = [f.name for f in wanted]
    twice = {n for n in names if names.count(n) > 1}
    if twice:
        raise ConfigurationError(f"feature given twice: {', '.join(sorted(twice))}")
    existing: Acceleration | None = getattr(pipeline, "acceleration", None)
    wanted += _trained_in(pipeline, {*names, *(existing.features if existing else ())})
    names = [f.name for f in wanted]
    kept = [f for f in existing.features.values() if f.name not in names] if existing else []
    for feature in wanted:
        reason = feature.supports(pipeline)
        if reason:
            raise UnsupportedPipelineError(f"{feature.name} cannot be used on {type(pipeline).__name__}: {reason}")
    _check_conflicts([*kept, *wanted])
    handle = existing or Acceleration(pipeline)
    handle._attach(wanted)
    if existing is None:
        pipeline.__class__ = accelerated_class(type(pipeline))
        pipeline.__dict__["_acceleration"] = handle
    return pipeline


def accelerated_class(base: Any) -> type:
    """The subclass of the pipeline class `base` whose calls are bracketed by the switchboard.

    It keeps the name of `base`, because diffusers looks pipelines up by class name (`AutoPipeline…from_pipe`) and
    writes that name into `model_index.json`; its qualified name is `Accelerated<Base>`.
    """
    from .pipelines.mixin import AcceleratedMixin

    if base in _classes:
        return _classes[base]

    @functools.wraps(base.__call__)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.acceleration._run(functools.partial(base.__call__, self), args, kwargs)

    namespace = {
        "__call__": __call__,
        "__doc__": base.__doc__,
        "__module__": base.__module__,
        "__qualname__": f"Accelerated{base.__name__}",
        "_accelerated_base": base,
    }
    return _classes.setdefault(base, type(base.__name__, (AcceleratedMixin, base), namespace))


class Acceleration:
    """The handle `pipe.acceleration`: which features a pipeline has, and what its last call did."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self._attachments: dict[str, Attachment] = {}
        self._disabled: set[str] = set()
        self._report: Report | None = None
        #: count FLOPs during calls (slows them down); the report then carries them
        self.count_flops = False

    # ------------------------------------------------------------------ what is there
    @property
    def features(self) -> dict[str, Feature]:
        """The attached features by name, enabled or not, in the order in which they act."""
        return {name: attachment.feature for name, attachment in self._attachments.items()}

    def enabled(self, name: str) -> bool:
        """Whether the feature is attached and enabled."""
        return name in self._attachments and name not in self._disabled

    def report(self) -> Report:
        """What the last call did. Raises `CallStateError` before the first call."""
        if self._report is None:
            raise CallStateError("there is nothing to report: the pipeline has not been called since accelerate()")
        return self._report

    # ------------------------------------------------------------------ switching
    def disable(self, *names: str) -> None:
        """Switch features off (all if none is named); they keep their settings."""
        self._disabled.update(self._known(names))

    def enable(self, *names: str) -> None:
        """Switch features on again (all if none is named)."""
        self._disabled.difference_update(self._known(names))

    def remove(self, *names: str) -> None:
        """Detach features for good; without names, all of them, which also gives the pipeline its own class back."""
        for name in reversed(self._known(names)):
            self._attachments.pop(name).detach()
            self._disabled.discard(name)
        if not names:
            self._pipeline.__class__ = type(self._pipeline)._accelerated_base
            self._pipeline.__dict__.pop("_acceleration", None)

    def _known(self, names: Iterable[str]) -> list[str]:
        asked = [n.replace("-", "_") for n in names]
        for name in asked:
            if name not in self._attachments:
                have = ", ".join(self._attachments) or "none"
                raise ConfigurationError(f"feature {name!r} is not on this pipeline; attached: {have}")
        return [n for n in self._attachments if not asked or n in asked]

    def _attach(self, features: list[Feature]) -> None:
        done: list[Attachment] = []
        try:
            for feature in sorted(features, key=lambda f: (f.order, f.name)):
                done.append(feature.attach(self._pipeline))
        except BaseException:
            for attachment in reversed(done):
                attachment.detach()
            raise
        for attachment in done:
            old = self._attachments.pop(attachment.feature.name, None)
            if old is not None:
                old.detach()
            self._attachments[attachment.feature.name] = attachment
            self._disabled.discard(attachment.feature.name)
        self._attachments = dict(sorted(self._attachments.items(), key=lambda item: (item[1].feature.order, item[0])))

    # ------------------------------------------------------------------ one call
    def _run(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        active = [a for n, a in self._attachments.items() if n not in self._disabled]
        clock = StepClock(self._pipeline) if getattr(self._pipeline, "scheduler", None) is not None else None
        modules = [m for m in (find_controlnet(self._pipeline), find_denoiser(self._pipeline)) if m is not None]
        began = time.perf_counter()
        flops: float | None = None
        if not active or clock is None:
            output, flops = self._counted(call, args, kwargs)
        else:
            for attachment in active:
                if type(attachment).process_input is not Attachment.process_input:
                    named = bind_method(type(self._pipeline)._accelerated_base.__call__, args, kwargs)
                    args, kwargs = (), attachment.process_input(named)
            _claim(modules)
            entered: list[Attachment] = []
            try:
                for attachment in active:
                    entered.append(attachment)
                    attachment.before_call(clock)
                clock.start(modules)
                output, flops = self._counted(call, args, kwargs)
            finally:
                clock.stop()
                for attachment in reversed(entered):
                    attachment.after_call()
                _release(modules)
            for attachment in reversed(active):
                output = attachment.process_output(output)
        self._report = Report(
            steps=clock.steps if clock is not None and active else getattr(self._pipeline, "_num_timesteps", 0) or 0,
            seconds=time.perf_counter() - began,
            flops=flops,
            features={a.feature.name: a.feature.to_dict() for a in active},
            counters={a.feature.name: a.counters() for a in active},
            details={a.feature.name: found for a in active if (found := a.details())},
        )
        return output

    def _counted(
        self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, float | None]:
        if not self.count_flops:
            return call(*args, **kwargs), None
        with count_flops() as count:
            output = call(*args, **kwargs)
        return output, count.total

    def _rebind(self, pipeline: Any) -> Acceleration:
        """A handle with the same features and switches for a copy of the pipeline."""
        handle = Acceleration(pipeline)
        handle._attach(list(self.features.values()))
        handle._disabled = set(self._disabled)
        handle.count_flops = self.count_flops
        return handle


# ---------------------------------------------------------------------- helpers
def _as_feature(feature: Feature | type[Feature] | str) -> Feature:
    if isinstance(feature, str):
        feature = feature_class(feature)
    if isinstance(feature, type) and issubclass(feature, Feature):
        feature = feature()
    if not isinstance(feature, Feature):
        raise ConfigurationError(f"expected a Feature, a feature class or its name, got {feature!r}")
    return feature


def _trained_in(pipeline: Any, there: set[str]) -> list[Feature]:
    """Features without which the denoiser does not work as it was trained: its config has their name after a "_"."""
    config = getattr(find_denoiser(pipeline), "config", {})
    found = [feature_class(name)() for name in FEATURES if name not in there and f"_{name}" in config]
    for feature in found:
        logger.info("%s is on: the model was trained with it (%s)", feature.name, config[f"_{feature.name}"])
    return found


def _check_conflicts(features: list[Feature]) -> None:
    names = {f.name for f in features}
    for feature in features:
        clash = sorted(feature.conflicts & names)
        if clash:
            raise FeatureConflictError(
                f"{feature.name} cannot be combined with {', '.join(clash)}; remove one of them first"
            )


def _claim(modules: list[torch.nn.Module]) -> None:
    with _busy_lock:
        for module in modules:
            if id(module) in _busy:
                raise CallStateError(
                    f"{type(module).__name__} is in use by a pipeline call that has not ended; "
                    "run one call at a time, or give each pipeline its own copy of the model"
                )
        _busy.update(id(m) for m in modules)


def _release(modules: list[torch.nn.Module]) -> None:
    with _busy_lock:
        _busy.difference_update(id(m) for m in modules)
