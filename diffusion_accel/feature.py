"""The one contract: a `Feature` is a configuration to attach, an `Attachment` what it became on a pipeline."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import operator
import typing
import weakref
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeVar

from .arguments import nearest, refuse_unknown
from .changes import Changes
from .errors import CallStateError, ConfigurationError
from .field_values import check_limits, from_json, from_text, objects_of
from .io import shown
from .report import by_name

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline
    from torch import nn

    from .steps import StepClock


_OLD_NAMES = {"redraws": "changes_output", "takes": "accepts_bare"}  # of facts that a subclass may still state


@dataclass(frozen=True, kw_only=True)
class Feature:
    """Base class of every feature: a frozen, keyword-only dataclass whose fields are its whole configuration.

    A subclass gives every field a default that is the recommended value, its documentation and, if it is a number, its
    limits (see `option`), and states its facts as class attributes. Fields are bool, int, float, str or tuples of
    them, so that a configuration survives JSON and the `key=value,…` syntax of the CLI; a text may mean an object,
    which may be given instead. Types and limits are checked here; a subclass that checks more does so in
    `__post_init__` behind `super().__post_init__()`, and raises `ConfigurationError`.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str]
    order: ClassVar[int] = 100
    #: features that it cannot be combined with, and why: name -> reason; or only their names
    conflicts: ClassVar[Collection[str]] = frozenset()
    shorthand: ClassVar[str | None] = None
    #: it changes what is drawn, not how fast: comparisons keep it on both sides
    changes_output: ClassVar[bool] = False
    #: it concerns how a model computes, whoever calls it: where requests share a model, it is the model's
    of_the_model: ClassVar[bool] = False
    #: requests that share their models can be drawn with it
    served: ClassVar[bool] = True
    #: the module that does the work on a pipeline, imported when it is first needed, so that a configuration costs no
    #: import of torch; it has functions `supports`, `attach` and, if the class has not, `works_inside`,
    #: `goes_into_graphs` and `rows_apart`, which are called with the feature and the pipeline
    runtime: ClassVar[str] = ""
    #: what fields were called before, old name -> field; see `with_old_names`
    old_names: ClassVar[dict[str, str]] = {}

    def __init_subclass__(cls, **options: object) -> None:
        super().__init_subclass__(**options)
        for old, name in _OLD_NAMES.items():
            if old in vars(cls):
                setattr(cls, name, vars(cls)[old])

    def __new__(cls, *args: object, **values: object) -> Self:
        """Refuses unknown fields, and values without a name, as any bad input is; the rest is the dataclass's own."""
        if args:
            raise ConfigurationError(
                f"{cls.__name__} takes settings by name, {cls.__name__}(name=value), got {shown(args[0])}"
            )
        if values and dataclasses.is_dataclass(cls):
            refuse_unknown(_renamed(cls, values), [field.name for field in dataclasses.fields(cls)], cls.name)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        hints, objects = typing.get_type_hints(type(self)), dict[str, Any]()
        for field in dataclasses.fields(self):
            value, hint, read = getattr(self, field.name), hints[field.name], field.metadata.get("read")
            if read is None or not isinstance(value, objects_of(hint)):
                value = from_json(type(self).name, field.name, value, hint)
                check_limits(type(self).name, field, value)
            if read is not None:
                value, objects[field.name] = read(value)
            object.__setattr__(self, field.name, value)
        object.__setattr__(self, "objects_by_name", objects)

    def object_of(self, name: str) -> Any:
        """What the text of a field means, read once, when the feature was made; see `option`."""
        return self.__dict__["objects_by_name"][name]

    @classmethod
    def neutral(cls) -> Self:
        """The setting in which the feature runs but must not change a single bit of the output."""
        raise NotImplementedError(f"{cls.__name__} names no neutral setting")

    @classmethod
    def accepts_bare(cls, text: str) -> bool:
        """Whether `text` looks like a value for the field that `shorthand` names (the CLI asks)."""
        return False

    def supports(self, pipeline: DiffusionPipeline) -> str | None:
        """Why this feature cannot work on `pipeline` (one sentence), or None if it can. Changes nothing."""
        return self._runtime().supports(self, pipeline)

    def works_inside(self, pipeline: DiffusionPipeline) -> bool:
        """Whether this setting hooks or changes the inside of a denoiser, which a model compiled as a whole does not
        allow. False: it acts on calls of the denoiser, on the VAE or on the scheduler only."""
        return not self.runtime or getattr(self._runtime(), "works_inside", _always)(self, pipeline)

    def goes_into_graphs(self, pipeline: DiffusionPipeline) -> bool:
        """Whether what works inside of a denoiser becomes part of a graph that is made of a call of it: its hooks say
        what they do as a `CallInside`, or only weights are others."""
        return bool(self.runtime) and getattr(self._runtime(), "goes_into_graphs", _never)(self, pipeline)

    def rows_apart(self, pipeline: DiffusionPipeline) -> bool:
        """Whether what works inside of a denoiser does the same whoever calls it, to each row by itself (other weights,
        masks by a row's timestep): then calls of several requests can share a batch."""
        return bool(self.runtime) and getattr(self._runtime(), "rows_apart", _never)(self, pipeline)

    def closes_inside(self) -> bool:
        """Whether it runs a denoiser as one graph, so that only what `goes_into_graphs` can act inside of it."""
        return False

    def learns(self) -> bool:
        """Whether a first call may only teach the next ones, or make what they need; what measures this feature calls
        once before, without counting operations."""
        return False

    def parts_branches(self) -> bool:
        """Whether it tells the branches of guidance apart: computes one of them only at some steps, or needs
        both at once."""
        return False

    def clash(self, other: Feature) -> str | None:
        """Why this setting cannot be combined with that of another feature, beside `conflicts`; None if it can."""
        return None

    def unfit_for(self, steps: int, scheduler: str) -> str | None:
        """Why this feature cannot do a call of so many steps with a scheduler (its short name), as far as that is known
        before a model is loaded; None if it can."""
        return None

    def portable(self, pipeline: DiffusionPipeline) -> dict[str, Any]:
        """Fields whose text holds only on this machine or for this folder of the model, as a recipe is to have them:
        a `Path` of a file or folder to copy, a dict to write as JSON, or another text."""
        return getattr(self._runtime(), "portable", _nothing)(self, pipeline) if self.runtime else {}

    def attach(self, pipeline: DiffusionPipeline) -> Attachment:
        """Attach to `pipeline` (already known to be supported) and return the attachment."""
        return self._runtime().attach(self, pipeline)

    def _runtime(self) -> Any:
        if not self.runtime:
            raise NotImplementedError(f"{type(self).__name__} names no module that does its work (Feature.runtime)")
        return importlib.import_module(self.runtime)

    # ------------------------------------------------------------------ configuration as data
    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_dict`. Raises `ConfigurationError` for an unknown key or a value of the wrong type."""
        if not isinstance(values, Mapping):
            raise ConfigurationError(f"{cls.name}: settings must be a table of names and values, got {shown(values)}")
        values, known = _renamed(cls, values), {f.name for f in dataclasses.fields(cls)}
        for key in values:
            if key not in known:
                near = nearest(str(key)[:100], known)
                raise ConfigurationError(
                    f"{cls.name}: unknown key {shown(key)}; the keys are: {', '.join(sorted(known)) or 'none'}"
                    + (f"; did you mean {near!r}?" if near else "")
                )
        return cls(**values)

    @classmethod
    def file_test(cls, key: str) -> Callable[[str], bool] | None:
        """What says whether a field's text names a file or folder of this machine; None: it never does.

        Args:
            key: the field's name, or an old one.
        """
        field = cls.__dataclass_fields__.get(cls.old_names.get(key) or key)
        return None if field is None else field.metadata.get("names_file")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Build from the CLI's `key=value,key=value` (empty text: the defaults). Tuples are written `a+b+c`.

        A text without a key belongs to the field that `shorthand` names, with the commas that follow it.
        """
        values: dict[str, Any] = {}
        hints = typing.get_type_hints(cls)
        parts = [p.strip() for p in text.split(",") if p.strip()]
        if cls.shorthand and parts:
            keyed = [p.partition("=")[0].isidentifier() and "=" in p for p in parts]  # "full hold=0.9" is not
            bare = next((i for i, pair in enumerate(keyed) if i and pair), len(parts))
            first = ",".join(parts[:bare])
            if not keyed[0] or first.startswith(f"{cls.shorthand}="):
                text = first.removeprefix(f"{cls.shorthand}=")
                values[cls.shorthand] = from_text(cls.name, cls.shorthand, text, hints[cls.shorthand])
                parts = parts[bare:]
        for part in parts:
            key, eq, value = part.partition("=")
            if not eq:
                raise ConfigurationError(f"{cls.name}: expected key=value, got {part!r}")
            key = cls.old_names.get(key, key)
            if key in values:
                raise ConfigurationError(f"{cls.name}: {key!r} is given twice")
            if key not in hints or key not in {f.name for f in dataclasses.fields(cls)}:
                cls.from_dict({key: value})  # raises, naming the keys
            values[key] = from_text(cls.name, key, value, hints[key])
        return cls.from_dict(values)

    @classmethod
    def flag(cls) -> str:
        """The CLI flag, for example `--encoder-reuse`."""
        return "--" + cls.name.replace("_", "-")

    def __str__(self) -> str:
        return self.described({})

    def described(self, instead: dict[str, Any]) -> str:
        """The name, and the fields that differ from their defaults; some of them are shown as what `instead` holds."""
        changed = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default
        }
        shown = {name: instead.get(name, value) for name, value in changed.items()}
        pairs = [f"{k}={'+'.join(map(str, v)) if isinstance(v, (tuple, list)) else v}" for k, v in shown.items()]
        return f"{self.name}({', '.join(pairs)})"


def option(
    default: object,
    doc: str,
    within: tuple[float, float] | None = None,
    read: Callable[[Any], tuple[Any, Any]] | None = None,
    names_file: Callable[[str], bool] | None = None,
) -> Any:
    """A dataclass field with its documentation, which the CLI help and the docs print.

    Args:
        default: the recommended value.
        doc: what it means, in a few words.
        within: the lowest and the highest value of a number, or of each number of a list; every number has them.
        read: for a field whose text means an object. Called once, when a feature is made, with what was given: a plain
            value, or an object of a class that the field's type names beside the plain ones. Returns the plain value,
            which the field keeps (it is what JSON, metadata and comparisons see), and the object, which
            `Feature.object_of` answers. Raises `ConfigurationError` if the text means nothing.
        names_file: for a field whose text may name a file or folder of this machine: whether it does. See
            `Feature.portable`.
    """
    facts = {"doc": doc, "within": within, "read": read, "names_file": names_file}
    return dataclasses.field(default=default, metadata=facts)


_F = TypeVar("_F", bound=Feature)


def with_old_names(cls: type[_F]) -> type[_F]:
    """Let a feature be made with its fields' old names (`Feature.old_names`), and be read by them.

    Goes above `@dataclass`. Files and `key=value` texts may have old names in any case; what is written has the new
    ones.
    """
    plain = cls.__init__

    @functools.wraps(plain)
    def init(self: _F, **values: Any) -> None:
        plain(self, **_renamed(cls, values))

    cls.__init__ = init  # type: ignore[method-assign,assignment]
    for old, new in cls.old_names.items():
        setattr(cls, old, property(operator.attrgetter(new), doc=f"Old name of `{new}`."))
    return cls


def _renamed(cls: type[Feature], values: Mapping[str, Any]) -> dict[str, Any]:
    """Values under their fields' names of today."""
    for old, new in cls.old_names.items():
        if old in values and new in values:
            raise ConfigurationError(f"{cls.name}: {old} is the old name of {new}; give one of them")
    return {cls.old_names.get(key, key): value for key, value in values.items()}


FeatureT = TypeVar("FeatureT", bound=Feature, covariant=True)


class Attachment(Generic[FeatureT]):
    """What a feature became on one pipeline. The default implementation does nothing.

    A subclass names the class of its feature: `class RoutingAttachment(Attachment[TaskRouting])`.

    The switchboard calls `before_call`, runs the pipeline, then calls `after_call` in every case, also after an
    exception or an interrupt. Between two calls no hook stays on any module, so that saving, copying, offloading
    and sharing models see plain diffusers models.

    Attributes:
        feature: the configuration.
        changes: what a call changes on objects is registered here (hooks, attributes, whatever must be undone); it is
            undone when the call ends, also if `after_call` fails or is interrupted, and after `process_output`.
    """

    def __init__(self, feature: FeatureT, pipeline: DiffusionPipeline) -> None:
        self.feature: FeatureT = feature
        self.changes = Changes()
        self._pipeline = weakref.ref(pipeline)  # which owns this: otherwise neither would be freed with its last user

    @property
    def pipeline(self) -> Any:
        """The pipeline. Raises `CallStateError` if it does not exist any more."""
        return alive(self._pipeline)

    def shared(self, pipeline: DiffusionPipeline) -> Self:
        """The same for another pipeline of the same models, which may be called at the same time: what was loaded is
        shared, what belongs to a call is not. For features that do not work inside of the denoiser."""
        other = copy.copy(self)
        other.changes, other._pipeline = Changes(), weakref.ref(pipeline)
        return other

    def models(self) -> list[nn.Module]:
        """Models that the feature brings along and calls, beside those of the pipeline."""
        return []

    def process_input(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Change what the pipeline is called with, by name. Called before `before_call`, in order of attachment."""
        return arguments

    def before_call(self, clock: StepClock) -> None:
        """Check that this call can work, and make `changes`. Called before the pipeline's own `__call__`."""

    def after_call(self) -> None:
        """Undo what the call changed and free buffers. Must be safe to call twice, also after half a `before_call`."""
        self.changes.undo()

    def before_output(self) -> None:
        """Make `changes` for what `process_output` calls; other calls may use the pipeline's models now."""

    def process_output(self, output: Any) -> Any:
        """Change what the pipeline returned. Called in reverse order of attachment, only after success."""
        return output

    def preview(self, images: list[Any], z: torch.Tensor, decoded: torch.Tensor) -> list[Any]:
        """Change images that are shown while the call runs; the default leaves them.

        Args:
            images: PIL images, as the pipeline makes them.
            z: the latents that they were decoded from, as the VAE takes them.
            decoded: what the VAE made of these, (B, 3, H, W) in -1 to 1.
        """
        return images

    def detach(self) -> None:
        """Undo whatever `attach` changed on the pipeline."""

    def counters(self) -> dict[str, float]:
        """What the last call did, as numbers: work done, work skipped, bytes held or sent."""
        return {}

    def words(self) -> str:
        """The counters for people, in plain words and with units; the default has their names."""
        return by_name(self.counters())

    def details(self) -> dict[str, float]:
        """The same by layer, where that is known."""
        return {}

    def choices(self) -> dict[str, Any]:
        """What it chose by itself where the settings leave a choice, as JSON values."""
        return {}


def _always(_feature: Feature, _pipeline: DiffusionPipeline) -> bool:
    return True


def _never(_feature: Feature, _pipeline: DiffusionPipeline) -> bool:
    return False


def _nothing(_feature: Feature, _pipeline: DiffusionPipeline) -> dict[str, Any]:
    return {}


def alive(pipeline: weakref.ref[Any]) -> Any:
    """What a reference to a pipeline refers to. Raises `CallStateError` if it does not exist any more."""
    found = pipeline()
    if found is None:
        raise CallStateError("the pipeline does not exist any more; keep a reference to it while its handle is used")
    return found
