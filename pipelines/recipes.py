"""Restoring what a recipe says: which one a model has, what wins over it, and whether it is for this model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_accel import schedulers
from diffusion_accel.errors import ConfigurationError, UnsupportedPipelineError
from diffusion_accel.feature import Feature
from diffusion_accel.io import first_line, is_there, plain, shown
from diffusion_accel.model_files.index_notes import RECIPE, notes_of
from diffusion_accel.model_files.names import ModelSource
from diffusion_accel.model_files.quantized import METHOD
from diffusion_accel.recipes.recipe import FILE, Recipe, read_recipe
from diffusion_accel.schedulers.solver import CLASS

from .quantizers import check_quantize
from .schedulers import FLOW_SCHEDULERS

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)


def recipe_of(source: ModelSource, given: object = None) -> Recipe | None:
    """The recipe to restore: the one that is given, else that of the model's own folder.

    Args:
        source: the model.
        given: a file or folder; a `Recipe`; None or True: the model's own, if it has one; False: none.

    Raises:
        ConfigurationError: see `read_recipe`; True, and the model has none.
    """
    if given is False:
        return None
    if isinstance(given, Recipe):
        return given
    if given is None or given is True:
        here = source.kind in ("embedded", "folder") and is_there(Path(source.location) / FILE)
        if not here and given:
            raise ConfigurationError(
                f"recipe: {plain(source.name)} has no {FILE}; name a file or folder, or switch it off"
            )
        if not here:
            return None
        return _own(source, required=given is True)
    if not isinstance(given, (str, Path)):
        raise ConfigurationError(f"recipe must be a file, a folder, True or False, got {shown(given)}")
    return _read(given)


def _read(place: str | Path) -> Recipe:
    recipe = read_recipe(place)
    if recipe.quantize is not None:
        check_quantize(recipe.quantize)
    return recipe


def _own(source: ModelSource, required: bool) -> Recipe | None:
    """The recipe in a model's folder; none if the model was saved there again without it, which leaves the file."""
    recipe = _read(source.location)
    if not recipe.with_model or RECIPE in notes_of(source.location):
        return recipe
    left = f"{recipe.path} is left from an earlier save: the model was saved there again without features"
    if required:
        raise ConfigurationError(f"recipe: {left}; name the file to use it all the same")
    logger.warning("%s; it is not used", left)
    return None


def features_over(
    known: Mapping[str, Feature], given: Mapping[str, Feature | None], whose: object
) -> dict[str, Feature]:
    """The features to switch on: those that are given win over those that are known.

    Args:
        known: of a recipe or another pipeline, by name.
        given: by name, None: switched off.
        whose: what knows them, for the log.

    Returns:
        By name. What is known and cannot be combined with what is given is left out, which is logged.
    """
    chosen = {name: feature for name, feature in given.items() if feature is not None}
    for name, feature in known.items():
        if name in given:
            continue
        against = [other for other in chosen.values() if clash(feature, other)]
        if against and any(other.name in given for other in against):
            names = ", ".join(other.name for other in against)
            logger.warning("%s of %s is left out: it cannot be combined with %s, which was given", name, whose, names)
        else:
            chosen[name] = feature
    return chosen


def clash(one: Feature, other: Feature) -> bool:
    """Whether two features exclude each other."""
    excluded = other.name in one.conflicts or one.name in other.conflicts
    return excluded or bool(one.clash(other) or other.clash(one))


def quantize_of(recipe: Recipe | None, source: ModelSource) -> str | None:
    """What `load_pipeline` is given as `quantize`: nothing where the model's folder is the recipe's."""
    if recipe is None or recipe.quantize is None or (source.kind == "folder" and recipe.is_of(source.location)):
        return None
    return recipe.quantize


def restore(
    pipe: DiffusionPipeline, recipe: Recipe, source: ModelSource, *, quantize: object = None, scheduler: bool = True
) -> None:
    """Give a loaded pipeline what its recipe has beside features, and check that it is the recipe's model.

    Args:
        pipe: without features.
        recipe: of `recipe_of`.
        source: what the pipeline was loaded from.
        quantize: what `load_pipeline` was given; where that is something else than `quantize_of`, nothing is expected
            of the denoisers' weights.
        scheduler: set its scheduler.

    Raises:
        UnsupportedPipelineError: it is for another class of denoiser.
        ConfigurationError: its scheduler does not fit the model.
    """
    from diffusion_accel.denoisers import denoiser_names  # heavy: torch
    from diffusion_accel.hooks import model_of  # heavy: torch
    from diffusion_accel.quant.model import set_runtime  # heavy: torch
    from diffusion_accel.recipes.saving import method_of, weights_of  # heavy: torch, diffusers

    quantized = (quantize or None) == quantize_of(recipe, source)
    parts = {name: pipe.components[name] for name in recipe.models if pipe.components.get(name) is not None}
    denoisers = denoiser_names(pipe)
    known = {name: recipe.models[name].get("class") for name in recipe.models}
    here = [type(model_of(getattr(pipe, name))).__name__ for name in denoisers]
    there = [known[name] for name in denoisers if name in known]
    if known and there != here:
        made_for = plain(", ".join(map(str, there)) or recipe.pipeline or "another model")
        raise UnsupportedPipelineError(
            f"{recipe} was made for {made_for}, this pipeline has {', '.join(here) or 'none'}"
        )
    other = []
    for name, part in parts.items():
        weights = recipe.models[name].get("weights")
        if weights is not None and (quantized or name not in denoisers) and weights_of(part) not in (None, weights):
            other.append(name)
    if other:
        what = ", ".join(map(plain, other))
        logger.warning("%s was made with other weights of %s: what was measured does not hold here", recipe, what)
    if scheduler and recipe.scheduler is not None:
        pipe.scheduler = scheduler_from(pipe, recipe)
    ours = any(method_of(getattr(pipe, name)) == METHOD for name in denoisers)
    if quantized and ours and (recipe.runtime is not None or recipe.low_memory):
        set_runtime(pipe, recipe.runtime or "auto", recipe.low_memory)  # type: ignore[arg-type]


def scheduler_from(pipe: DiffusionPipeline, recipe: Recipe) -> Any:
    """The scheduler of a recipe, for a pipeline whose own is one like it.

    Raises:
        ConfigurationError: it does not fit the model, or its configuration cannot be used.
    """
    import diffusers  # heavy: diffusers

    from diffusion_accel.noise_level import matches_flow  # heavy: torch

    config: Any = dict(recipe.scheduler or {})
    name, own = config["_class_name"], pipe.scheduler
    cls: Any = getattr(diffusers, name, None) or getattr(schedulers, name, None)
    fitting = {type(own).__name__, *(kind.__name__ for kind in getattr(own, "compatibles", ()))}
    fitting |= {CLASS, "LCMScheduler"} | ({*FLOW_SCHEDULERS.values()} if matches_flow(own) else set())
    predicts = {config.get("prediction_type"), own.config.get("prediction_type")} - {None}
    is_one = isinstance(cls, type) and issubclass(cls, diffusers.SchedulerMixin)
    if not is_one or name not in fitting or len(predicts) > 1:
        raise ConfigurationError(
            f"the scheduler of {recipe}, {name[:80]}, does not fit this model's {type(own).__name__}"
        )
    try:
        made = cls.from_config(config)
    except Exception as error:  # a configuration may hold anything
        raise ConfigurationError(f"the scheduler of {recipe} cannot be used: {first_line(error)}") from error
    if (unfit := getattr(made, "unfit_for", None)) is not None and (reason := unfit(own)):
        raise ConfigurationError(f"the scheduler of {recipe} does not fit this model: {reason}")
    return made
