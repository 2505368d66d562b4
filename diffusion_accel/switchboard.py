"""The switchboard: `accelerate(pipe, …)` and the handle `pipe.acceleration`."""

from __future__ import annotations

import functools
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import DiffusionPipeline

from .arguments import public
from .changes import Changes
from .denoisers import called_denoisers, closed_inside, find_controlnet, find_denoisers, models_of_a_call
from .diffusers_compat import announced_steps
from .errors import CallStateError, ConfigurationError, FeatureConflictError, UnsupportedPipelineError
from .feature import Attachment, Feature, alive
from .finite import finite_call
from .flops import count_flops
from .hooks import bind_method, call_arguments, run_uncompiled
from .mixin import AcceleratedMixin
from .recipes.saving import check_replaceable, copy_beside, forget_recipe, save_recipe
from .registry import FEATURES, feature_class
from .report import Report
from .schedulers.measured import unmeasured
from .steps import StepClock

logger = logging.getLogger(__name__)

PipelineT = TypeVar("PipelineT", bound=DiffusionPipeline)

_classes: dict[type, type] = {}  # pipeline class -> its accelerated subclass
_busy: dict[int, object] = {}  # ids of the models that running calls use -> the call
_busy_lock = threading.Lock()


@public
def accelerate(pipeline: PipelineT, *features: Feature | type[Feature] | str) -> PipelineT:
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
        reason = why_not(feature, pipeline)
        if reason:
            raise UnsupportedPipelineError(f"{feature.name} cannot be used on {type(pipeline).__name__}: {reason}")
    _check_conflicts([*kept, *wanted], pipeline)
    handle = existing or Acceleration(pipeline)
    handle._attach(wanted)
    if existing is None:
        pipeline.__dict__["_acceleration"] = handle
        pipeline.__class__ = accelerated_class(type(pipeline))
    return pipeline


def accelerated_class(base: type[DiffusionPipeline]) -> type:
    """The subclass of the pipeline class `base` whose calls are bracketed by the switchboard.

    It keeps the name of `base`, because diffusers looks pipelines up by class name (`AutoPipeline…from_pipe`) and
    writes that name into `model_index.json`; its qualified name is `Accelerated<Base>`.
    """
    if base in _classes:
        return _classes[base]

    @functools.wraps(base.__call__)
    def __call__(self: AcceleratedMixin, *args: object, **kwargs: object) -> Any:  # noqa: N807 - it becomes the class's
        return self.acceleration._run(functools.partial(base.__call__, self), args, kwargs)

    namespace = {
        "__call__": __call__,
        "__doc__": base.__doc__,
        "__module__": base.__module__,
        "__qualname__": f"Accelerated{base.__name__}",
        "_accelerated_base": base,
        "_new_handle": Acceleration,
        "_accelerated_class": staticmethod(accelerated_class),
    }
    return _classes.setdefault(base, type(base.__name__, (AcceleratedMixin, base), namespace))


def hold_models(pipeline: DiffusionPipeline, changes: Changes) -> None:
    """Claim the models of a pipeline until `changes` are undone, which is longer than a call, and switch on for so long
    what concerns the models whoever calls them (`Feature.of_the_model`).

    Raises:
        CallStateError: a call uses one of them.
        ConfigurationError: such a feature cannot be used any more.
    """
    _claim(models_of_a_call(pipeline), changes)
    handle: Acceleration | None = getattr(pipeline, "acceleration", None)
    for name, attachment in handle._attachments.items() if handle is not None else ():
        if attachment.feature.of_the_model and handle is not None and handle.enabled(name):
            changes.add(attachment.changes.undo)
            changes.add(attachment.after_call)
            attachment.before_call(StepClock(pipeline))


def put_inside(pipeline: DiffusionPipeline) -> None:
    """Put what works inside of the denoisers of an accelerated pipeline into them, for as long as they are there: for
    models that are called by themselves, and features that treat each row by itself (`Feature.rows_apart`)."""
    for attachment in pipeline.acceleration._attachments.values():
        if attachment.feature.works_inside(pipeline):
            attachment.before_call(StepClock(pipeline))


def carried_over(features: Iterable[Feature], pipeline: DiffusionPipeline) -> list[Feature]:
    """Features of one pipeline that work on another, too; those that do not are said in one warning, with why."""
    reasons = {feature: why_not(feature, pipeline) for feature in features}
    if lost := [f"{feature.name} ({reason})" for feature, reason in reasons.items() if reason]:
        logger.warning("not carried over to %s: %s", type(pipeline).__name__, "; ".join(lost))
    return [feature for feature, reason in reasons.items() if not reason]


def share_features(pipeline: DiffusionPipeline, other: PipelineT) -> PipelineT:
    """Switch the features of an accelerated pipeline on for a plain one of the same class and models, and return it.

    What the features have loaded is shared. Both may be called at the same time if their models are different objects
    (twins with the same weights) and no feature works inside of a denoiser.
    """
    handle, known = Acceleration(other), pipeline.acceleration
    handle._attachments = {name: one.shared(other) for name, one in known._attachments.items()}
    handle._disabled = set(known._disabled)
    other.__dict__["_acceleration"] = handle
    other.__class__ = accelerated_class(type(other))
    return other


class Acceleration:
    """The handle `pipe.acceleration`: which features a pipeline has, and what its last call did.

    The pipeline owns it and not the other way round, so that `del pipe` frees the models.
    """

    def __init__(self, pipeline: DiffusionPipeline) -> None:
        self._pipeline = weakref.ref(pipeline)
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

    def models(self) -> list[torch.nn.Module]:
        """Models that the enabled features bring along, beside those of the pipeline."""
        return [model for name, one in self._attachments.items() if self.enabled(name) for model in one.models()]

    def report(self) -> Report:
        """What the last call did. Raises `CallStateError` before the first call."""
        if self._report is None:
            raise CallStateError("there is nothing to report: the pipeline has not been called since accelerate()")
        return self._report

    def preview(self, images: list[Any], z: torch.Tensor, decoded: torch.Tensor) -> list[Any]:
        """Images that are shown while a call runs, as the enabled features have them; see `Attachment.preview`."""
        for name, one in self._attachments.items():
            if self.enabled(name):
                images = one.preview(images, z, decoded)
        return images

    def save(
        self,
        place: str | Path,
        *,
        overwrite: bool = False,
        call: Mapping[str, Any] | None = None,
        measured: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write what makes this pipeline fast as a recipe: the features with their settings, plans and weights, the
        scheduler, a quantized denoiser; not the model itself, which `save_pretrained` writes as well.

        `AcceleratedPipeline.from_pretrained(model, recipe=...)` and `--recipe` restore it.

        Args:
            place: a .json file, or a folder for an acceleration.json. What the recipe names is put in a folder beside
                it, NAME.files.
            overwrite: replace a recipe that is there.
            call: recommended arguments of a call, for the command line: steps, guidance_scale, width, height.
            measured: numbers to keep with it, for the record.

        Returns:
            The file.

        Raises:
            ConfigurationError: `place` is no path, or `call` or `measured` hold what no recipe can.
            OutputError: it exists, or cannot be written.
        """
        return self._save(place, overwrite=overwrite, call=call, measured=measured)

    def _save(self, place: str | Path, **options: Any) -> Path:
        return save_recipe(alive(self._pipeline), self.features, self._disabled, place, **options)

    def save_with_model(self, folder: str | Path) -> bool:
        """Write the recipe into the folder of the model, and what lies beside the model; without features, a recipe
        that is there is removed.

        Returns:
            Whether there is one now, which the folder's index is to say.

        Raises:
            OutputError: it cannot be written, or an acceleration.json that is no recipe is there.
        """
        if self.features:
            check_replaceable(Path(folder))
            self._save(folder, overwrite=True, with_model=True)
        else:
            forget_recipe(Path(folder))
        copy_beside(alive(self._pipeline), Path(folder))
        return bool(self.features)

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
            pipeline = alive(self._pipeline)
            pipeline.__class__ = type(pipeline)._accelerated_base
            pipeline.__dict__.pop("_acceleration", None)

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
                done.append(feature.attach(alive(self._pipeline)))
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
        pipeline = alive(self._pipeline)
        active = [a for n, a in self._attachments.items() if n not in self._disabled]
        began = time.perf_counter()
        flops: float | None = None
        clock: StepClock | None = None
        _warn_unmeasured(pipeline, args, kwargs)
        if not active or getattr(pipeline, "scheduler", None) is None:
            output, flops = self._counted(call, args, kwargs)
        else:
            clock = StepClock(pipeline)
            for attachment in active:
                if type(attachment).process_input is not Attachment.process_input:
                    named = bind_method(type(pipeline)._accelerated_base.__call__, args, kwargs)
                    args, kwargs = (), attachment.process_input(named)
            clock.arguments = call_arguments(type(pipeline)._accelerated_base.__call__, args, kwargs)
            with Changes() as changes:
                self._begin(active, clock, changes)
                output, flops = self._counted(call, args, kwargs)
            with Changes() as changes:
                for attachment in active:
                    changes.add(attachment.changes.undo)
                    attachment.before_output()
                for attachment in reversed(active):
                    output = attachment.process_output(output)
        self._report = Report(
            steps=clock.steps if clock is not None else announced_steps(pipeline),
            seconds=time.perf_counter() - began,
            flops=flops,
            calls=None if clock is None else clock.calls,
            features={a.feature.name: a.feature.to_dict() for a in active},
            counters={a.feature.name: a.counters() for a in active},
            words={a.feature.name: a.words() for a in active},
            details={a.feature.name: found for a in active if (found := a.details())},
            choices={a.feature.name: chosen for a in active if (chosen := a.choices())},
        )
        return output

    def _begin(self, active: list[Attachment], clock: StepClock, changes: Changes) -> None:
        """Claim the models and put everything in place; what undoes it is on `changes` before it is done."""
        pipeline = clock.pipeline
        _claim(models_of_a_call(pipeline), changes)
        if reason := closed_inside(pipeline):
            for attachment in active:
                if attachment.feature.works_inside(pipeline):
                    name = attachment.feature.name
                    raise ConfigurationError(f"{name} cannot be used on this pipeline any more: {reason}")
        models = [*called_denoisers(pipeline), find_controlnet(pipeline), getattr(pipeline, "vae", None)]
        for attachment in active:
            changes.add(attachment.changes.undo)  # also where after_call fails
            changes.add(attachment.after_call)
            attachment.before_call(clock)
        run_uncompiled(changes, [m for m in models if isinstance(m, torch.nn.Module)])
        changes.add(clock.changes.undo)
        changes.add(clock.stop)
        controlnet = find_controlnet(pipeline)
        clock.start(called_denoisers(pipeline), () if controlnet is None else (controlnet,))

    def _counted(
        self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, float | None]:
        with finite_call(alive(self._pipeline), kwargs) as outputs:
            if not self.count_flops:
                outputs.append(call(*args, **kwargs))
                return outputs[0], None
            with count_flops() as count:
                outputs.append(call(*args, **kwargs))
            return outputs[0], count.total

    def carry_over(self, pipeline: DiffusionPipeline) -> Acceleration:
        """A handle for another pipeline with the features of this one that work on it, switched on or off as here."""
        handle = Acceleration(pipeline)
        handle._attach(carried_over(self.features.values(), pipeline))
        handle._disabled = self._disabled & {*handle._attachments}
        return handle

    def _rebind(self, pipeline: DiffusionPipeline) -> Acceleration:
        """A handle with the same features and switches for a copy of the pipeline."""
        handle = Acceleration(pipeline)
        handle._attach(list(self.features.values()))
        handle._disabled = set(self._disabled)
        handle.count_flops = self.count_flops
        return handle

    def __reduce__(self) -> Any:  # copied or pickled with its pipeline: what is attached is attached anew
        return _Recipe, (list(self.features.values()), set(self._disabled), self.count_flops)


class _Recipe:
    """What is left of a handle while its pipeline is copied: `Acceleration._rebind` needs no more."""

    def __init__(self, features: list[Feature], disabled: set[str], count_flops: bool) -> None:
        self.features = {feature.name: feature for feature in features}
        self._disabled, self.count_flops = disabled, count_flops

    def _pipeline(self) -> None:
        """None: it belongs to no pipeline yet."""

    _rebind = Acceleration._rebind


# ---------------------------------------------------------------------- helpers
def _as_feature(feature: Feature | type[Feature] | str) -> Feature:
    if isinstance(feature, str):
        feature = feature_class(feature)
    if isinstance(feature, type) and issubclass(feature, Feature):
        feature = feature()
    if not isinstance(feature, Feature):
        raise ConfigurationError(f"expected a Feature, a feature class or its name, got {feature!r}")
    return feature


def why_not(feature: Feature, pipeline: DiffusionPipeline) -> str | None:
    """Why a feature cannot work on a pipeline, in one sentence; None if it can."""
    closed = closed_inside(pipeline)
    return closed if closed and feature.works_inside(pipeline) else feature.supports(pipeline)


def _trained_in(pipeline: DiffusionPipeline, there: set[str]) -> list[Feature]:
    """Features without which a denoiser does not work as it was trained: its config has their name after a "_"."""
    found: dict[str, Feature] = {}
    for denoiser in find_denoisers(pipeline):
        config: Any = getattr(denoiser, "config", {})
        for name in FEATURES:
            if name not in there and name not in found and f"_{name}" in config:
                found[name] = feature_class(name)()
                logger.info("%s is on: the model was trained with it (%s)", name, config[f"_{name}"])
    return list(found.values())


def _check_conflicts(features: list[Feature], pipeline: DiffusionPipeline) -> None:
    names = {f.name for f in features}
    for feature in features:
        clash = sorted(names.intersection(feature.conflicts))
        if clash:
            given = feature.conflicts if isinstance(feature.conflicts, Mapping) else {}
            why = "; ".join([given[name] for name in clash if name in given] + ["remove one of them first"])
            raise FeatureConflictError(
                f"{feature.name} cannot be combined with {', '.join(clash)}{': ' if given else '; '}{why}"
            )
        for other in features:
            if reason := feature.clash(other):
                raise FeatureConflictError(f"{feature.name} cannot be combined with {other}: {reason}")
            closes = other is not feature and feature.closes_inside() and other.works_inside(pipeline)
            if closes and not other.goes_into_graphs(pipeline):
                raise FeatureConflictError(
                    f"{feature.name} cannot be combined with {other}: that works inside of the denoiser, which runs as "
                    "one compiled graph; remove one of them, or use settings that act on whole calls (hold steps)"
                )


def _warn_unmeasured(pipeline: DiffusionPipeline, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Log how a call differs from what the pipeline's learned solver was measured with."""
    named = call_arguments(type(pipeline)._accelerated_base.__call__, args, kwargs)
    if reason := unmeasured(pipeline, named):
        logger.warning("%s", reason)


def _claim(models: list[torch.nn.Module], changes: Changes) -> None:
    """Claim the models until `changes` are undone. Raises `CallStateError` if one of them is claimed."""
    call = object()
    changes.add(functools.partial(_release, call))
    with _busy_lock:
        for model in models:
            if id(model) in _busy:
                raise CallStateError(
                    f"{type(model).__name__} is in use by a pipeline call that has not ended; "
                    "run one call at a time, or give each pipeline its own copy of the model"
                )
        _busy.update((id(model), call) for model in models)


def _release(call: object) -> None:
    with _busy_lock:
        for claimed in [key for key, by in _busy.items() if by is call]:
            del _busy[claimed]
