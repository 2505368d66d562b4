"""`AcceleratedPipeline`: any pipeline with features as keyword arguments; named drop-ins for diffusers' classes."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, ClassVar

from diffusion_accel.errors import ConfigurationError
from diffusion_accel.feature import Feature
from diffusion_accel.io import shown
from diffusion_accel.mixin import plain_twin
from diffusion_accel.model_files.names import find_model
from diffusion_accel.registry import FEATURES, feature_class
from diffusion_accel.reuse.plan_names import is_tuned

from .keywords import CONVERSION, check_keywords, components_of
from .recipes import features_over, quantize_of, recipe_of, restore
from .schedulers import check_scheduler, check_steps, set_scheduler

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class AcceleratedPipeline:
    """Loads diffusers pipelines with features switched on.

    Every class method returns the diffusers pipeline itself, accelerated: it is an instance of its own diffusers class
    and has the handle `pipe.acceleration`. Features are keyword arguments by name: True for the recommended settings,
    a `Feature`, a dict of its fields, or the CLI's `key=value,…` text; False or None leaves a feature out.

        pipe = AcceleratedPipeline.from_pretrained("sticker", encoder_reuse=True)
        pipe = AcceleratedPipeline.from_pretrained("owner/model", encoder_reuse={"schedule": "uniform:4"})
    """

    pipeline_class: ClassVar[Any] = None  # the diffusers class to load as; None: the model's own

    def __new__(cls, *_args: Any, **_kwargs: Any) -> Any:
        """Refuse to make an instance: pipelines are instances of their own classes."""
        raise TypeError(
            f"{cls.__name__} is not instantiated; use {cls.__name__}.from_pretrained(...) or .from_pipe(...)"
        )

    @classmethod
    def from_pretrained(cls, model: str, **kwargs: Any) -> DiffusionPipeline:
        """Load an embedded model, a folder, a single `.safetensors` file or a hub id; see `loading.load_pipeline`.

        `scheduler` may be a short name of the command line's ("ddim", "dpm++", …). With a tuned plan, an embedded model
        gets its recommended one, as on the command line: its plans are tuned for that.

        A folder with a recipe (`acceleration.json`, which `save_pretrained` of an accelerated pipeline writes) gets
        back what it says. `recipe` names another one, a file or a folder; False leaves it. What is given here wins:
        features by name (False switches one off), `scheduler`, `quantize`.
        """
        from .loading import load_pipeline  # heavy: torch, diffusers

        if "torch_dtype" in kwargs:
            kwargs["dtype"] = kwargs.pop("torch_dtype")
        recipe = kwargs.pop("recipe", None)
        given, options = given_features(kwargs)
        source = find_model(model, bool(options.get("allow_pickle", False)))
        recipe = recipe_of(source, recipe)
        features = features_over({} if recipe is None else recipe.features, given, recipe)
        own = recipe is None or recipe.scheduler is None
        tuned = own and any(is_tuned(str(getattr(feature, "plan", ""))) for feature in features.values())
        name = options.get("scheduler", source.defaults.get("scheduler") if tuned else None)
        options["quantize"] = options.get("quantize", quantize_of(recipe, source)) or None
        if isinstance(name, str):
            check_scheduler(name)
            check_steps(name, source, None)
            options.pop("scheduler", None)
        pipe = load_pipeline(source, pipeline_class=cls.pipeline_class, **options)
        if recipe is not None:
            restore(pipe, recipe, source, quantize=options["quantize"], scheduler=name is None)
        if isinstance(name, str):
            set_scheduler(pipe, name)
        accelerated: Any = _accelerated(pipe, [*features.values()])
        if recipe is not None and (off := [n for n in recipe.off if n in features and n not in given]):
            accelerated.acceleration.disable(*off)
        return accelerated

    from_single_file = from_pretrained

    @classmethod
    def from_pipe(cls, pipe: DiffusionPipeline, *, task: str | None = None, **kwargs: Any) -> DiffusionPipeline:
        """Accelerate a pipeline; converted first with `task` ("text-to-image", "image-to-image" or "inpainting", as
        diffusers' `AutoPipelineFor…` do it), or to the class of a named drop-in (its own `from_pipe`).

        The features that it has come along, switched on or off as they are, unless they are given anew or as False.
        What does not work on the new pipeline, or with what is given, is said in a warning.
        """
        given, options = given_features(kwargs)
        if (cls.pipeline_class is None and task is None) or isinstance(pipe, cls.pipeline_class or ()):
            check_keywords(options, ())
            return _accelerated(pipe, [feature for feature in given.values() if feature is not None])
        if not hasattr(pipe, "components"):
            raise ConfigurationError(f"from_pipe takes a loaded pipeline, got {shown(pipe)}; use from_pretrained")
        if task is None:
            check_keywords(options, CONVERSION | components_of(cls.pipeline_class) | {"task"})
            made: Any = cls.pipeline_class.from_pipe(plain_twin(pipe), **{"dtype": pipe.dtype, **options})
        else:
            made = _as_task(cls, plain_twin(pipe), task, options)
        return _carried(pipe, made, given)


@functools.cache
def named_drop_in(name: str) -> type[AcceleratedPipeline]:
    """`AcceleratedFooPipeline` for diffusers' `FooPipeline`. Raises `AttributeError` if there is no such class."""
    import diffusers  # heavy: diffusers

    base = name.removeprefix("Accelerated")
    if not name.startswith("Accelerated") or not base.endswith("Pipeline") or not hasattr(diffusers, base):
        raise AttributeError(f"diffusers has no pipeline class {base!r}")
    doc = f"`AcceleratedPipeline` for `diffusers.{base}`."
    return type(name, (AcceleratedPipeline,), {"pipeline_class": getattr(diffusers, base), "__doc__": doc})


def given_features(kwargs: dict[str, Any]) -> tuple[dict[str, Feature | None], dict[str, Any]]:
    """Separate feature keywords from the rest: by name, None for one that is switched off (False); those that are None
    are not given."""
    named = {name: value for name, value in kwargs.items() if name in FEATURES and value is not None}
    made = {name: None if value is False else make_feature(name, value) for name, value in named.items()}
    return made, {k: v for k, v in kwargs.items() if k not in FEATURES}


def make_feature(name: str, value: object) -> Feature:
    """A feature from True, a `Feature`, a dict of fields, or `key=value,…` text."""
    cls = feature_class(name)
    if value is True:
        return cls()
    if isinstance(value, cls):
        return value
    if isinstance(value, dict):
        return cls.from_dict(value)
    if isinstance(value, str):
        return cls.parse(value)
    raise ConfigurationError(f"{name} must be True, False, a {cls.__name__}, a dict or key=value text, got {value!r}")


def _as_task(cls: type[AcceleratedPipeline], pipe: DiffusionPipeline, task: str, options: dict[str, Any]) -> Any:
    from .loading import TASKS, as_task  # heavy: torch, diffusers

    if cls.pipeline_class is not None or task not in TASKS:
        allowed = (
            "none for a named drop-in, whose class says it" if cls.pipeline_class is not None else ", ".join(TASKS)
        )
        raise ConfigurationError(f"task {shown(task)}: allowed: {allowed}")
    check_keywords(options, ("task",))
    return as_task(pipe, task)


def _carried(pipe: DiffusionPipeline, made: DiffusionPipeline, given: dict[str, Feature | None]) -> DiffusionPipeline:
    """The converted pipeline with what is given, and with the features of the one that it was made from."""
    from diffusion_accel.switchboard import carried_over  # heavy: torch, diffusers

    handle: Any = getattr(pipe, "acceleration", None)
    known = {} if handle is None else handle.features
    chosen = features_over(known, given, type(pipe).__name__)
    kept = carried_over([f for name, f in chosen.items() if name not in given], made)
    features = [*kept, *(f for name, f in chosen.items() if name in given)]
    accelerated: Any = _accelerated(made, features)
    if off := [feature.name for feature in kept if not handle.enabled(feature.name)]:
        accelerated.acceleration.disable(*off)
    return accelerated


def _accelerated(pipe: DiffusionPipeline, features: list[Feature]) -> DiffusionPipeline:
    from diffusion_accel.switchboard import accelerate  # heavy: torch, diffusers

    return accelerate(pipe, *features)
