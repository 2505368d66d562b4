"""Writing the recipe of an accelerated pipeline, with the files that its settings name beside it."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import torch
from torch import nn

from diffusion_accel import interrupts, schedulers
from diffusion_accel._version import __version__
from diffusion_accel.denoisers import denoiser_names, find_denoiser, fingerprint
from diffusion_accel.diffusers_compat import origin_of
from diffusion_accel.errors import ConfigurationError, OutputError
from diffusion_accel.feature import Feature
from diffusion_accel.hooks import model_of
from diffusion_accel.io import first_line, is_there, read_json, replacing, shown, writing
from diffusion_accel.model_files.names import TRANSPARENCY
from diffusion_accel.model_files.quantized import METHOD
from diffusion_accel.outputs import check_free, output_path, replacing_folder

from .recipe import FILE, FILES, FORMAT, SIZE_LIMIT, VERSION, check_call

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)


def save_recipe(
    pipe: DiffusionPipeline,
    features: Mapping[str, Feature],
    off: set[str],
    place: str | Path,
    *,
    overwrite: bool = False,
    with_model: bool = False,
    call: Mapping[str, Any] | None = None,
    measured: Mapping[str, Any] | None = None,
) -> Path:
    """Write a pipeline's recipe, complete or not at all.

    Args:
        pipe: the pipeline.
        features: by name.
        off: those of them that are switched off.
        place: a .json file, or a folder for an acceleration.json.
        overwrite: replace a recipe that is there.
        with_model: the folder is that of the model, which has the quantized denoiser; its index is to say that the
            recipe is its own.
        call, measured: see `Recipe`.

    Returns:
        The file.

    Raises:
        ConfigurationError: `place` is no path, or `call` or `measured` hold what no recipe can.
        OutputError: it exists, or cannot be written.
    """
    file = recipe_path(place)
    beside = file.with_name(f"{file.stem}{FILES}")
    check_free([file], overwrite)
    if not overwrite and is_there(beside):
        raise OutputError(f"{beside} exists; choose another name or pass overwrite=True")
    recommended, numbers = check_call(dict(call or {}), "call"), _as_json(measured or {})
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing_folder(beside) as folder, replacing(file) as temporary:
            names = _Beside(folder, beside.name)
            values = {
                "format": FORMAT,
                "version": VERSION,
                "pipeline": getattr(type(pipe), "_accelerated_base", type(pipe)).__name__,
                "models": {name: _described(part) for name, part in _models(pipe).items()},
                "features": {name: names.settings(feature, pipe) for name, feature in features.items()},
                "off": [name for name in features if name in off],
                "scheduler": _scheduler(pipe, with_model),
                **_quantized(pipe, names, with_model),
                "with_model": with_model or None,
                "call": recommended,
                "measured": numbers,
                "made_by": {
                    "diffusion-accel": __version__,
                    "diffusers": diffusers.__version__,
                    "torch": torch.__version__,
                },
            }
            temporary.write_text(json.dumps({k: v for k, v in values.items() if v not in (None, {}, [])}, indent=1))
        if not any(beside.iterdir()):
            beside.rmdir()
    return file


def check_replaceable(folder: Path) -> None:
    """Raise `OutputError` for a folder with an acceleration.json that is none of ours."""
    if is_there(file := folder / FILE) and not _is_ours(file):
        raise OutputError(f"{file} exists, and is no recipe; move it, or choose another folder")


def _is_ours(file: Path) -> bool:
    try:
        values = read_json(file, limit=SIZE_LIMIT, nonfinite=True)
    except ConfigurationError:
        return False
    return isinstance(values, dict) and values.get("format") == FORMAT


def forget_recipe(folder: Path) -> None:
    """Remove the recipe of a folder, if it has one; a file of that name that is none stays."""
    file = folder / FILE
    if not is_there(file) or not _is_ours(file):
        return
    with interrupts.undivided():
        file.unlink(missing_ok=True)
        shutil.rmtree(file.with_name(f"{file.stem}{FILES}"), ignore_errors=True)


def copy_beside(pipe: DiffusionPipeline, folder: Path) -> None:
    """Copy the weights of transparency that lie beside a pipeline's model into the folder it is saved in."""
    there, place = folder_beside(pipe, TRANSPARENCY), folder / TRANSPARENCY
    if there is None or there.resolve() == place.resolve():
        return
    with writing(place), replacing_folder(place) as made:
        shutil.copytree(there, made, dirs_exist_ok=True)


def folder_beside(pipe: DiffusionPipeline, name: str) -> Path | None:
    """The folder of this name beside the parts of the model that a pipeline was loaded from; None: there is none."""
    for owner in (pipe, find_denoiser(pipe), getattr(pipe, "vae", None)):
        origin = origin_of(owner)
        for folder in (Path(origin), Path(origin).parent) if origin else ():
            if (folder / name).is_dir():
                return folder / name
    return None


def recipe_path(place: str | Path) -> Path:
    """The file that is written for a .json file or a folder. Raises `ConfigurationError` for what can be neither."""
    if not isinstance(place, str | Path):
        raise ConfigurationError(f"recipe must be the path of a .json file or of a folder, got {shown(place)}")
    path = output_path(str(place), "recipe")
    return path if path.suffix == ".json" and not is_there(path, "dir") else path / FILE


def _as_json(measured: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return {**json.loads(json.dumps(dict(measured)))}
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigurationError(f"measured must be a table of JSON values: {first_line(error)}") from error


class _Beside:
    """What lies beside a recipe, while it is written.

    Args:
        folder: to write to.
        name: what it will be called.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name

    def settings(self, feature: Feature, pipe: DiffusionPipeline) -> dict[str, Any]:
        """A feature's settings as the recipe has them; what they name is copied."""
        values = feature.to_dict()
        for field, value in feature.portable(pipe).items():
            name = f"{feature.name}-{field}"
            if isinstance(value, dict):
                name += ".json"
                (self.folder / name).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
            elif isinstance(value, Path) and value.is_dir():
                shutil.copytree(value, self.folder / name)
            elif isinstance(value, Path):
                name += value.suffix
                shutil.copyfile(value, self.folder / name)
            values[field] = value if isinstance(value, str) else self.named(name)
        return values

    def named(self, name: str) -> dict[str, str]:
        """How the recipe names it."""
        return {"file": f"{self.name}/{name}"}


def _models(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def _described(part: nn.Module) -> dict[str, Any]:
    """The class of a model and a fingerprint of its weights, as far as they are here and its own."""
    return {"class": type(model_of(part)).__name__, "weights": weights_of(part)}


def weights_of(part: nn.Module) -> str | None:
    """A model's fingerprint; None where its weights are elsewhere, or another package's."""
    return None if method_of(part) not in (None, METHOD) else fingerprint(part)


def method_of(part: Any) -> str | None:
    """What a model was quantized with: "diffusion_accel", another method's name, or None."""
    config: Any = getattr(model_of(part), "config", None)
    method = config.get("quantization_config") if hasattr(config, "get") else None
    method = getattr(config, "quantization_config", None) if method is None else method
    name = method.get("quant_method") if isinstance(method, dict) else getattr(method, "quant_method", None)
    return None if name is None else str(getattr(name, "value", name))


def _scheduler(pipe: DiffusionPipeline, with_model: bool) -> dict[str, Any] | None:
    scheduler: Any = getattr(pipe, "scheduler", None)
    if scheduler is None:
        return None
    name = type(scheduler).__name__
    if any(getattr(library, name, None) is type(scheduler) for library in (diffusers, schedulers)):
        config: dict[str, Any] = json.loads(scheduler.to_json_string())
        return config
    if not with_model:
        logger.warning("the recipe does not bring the scheduler: %s is none of diffusers'; set it after loading", name)
    return None


def _quantized(pipe: DiffusionPipeline, names: _Beside, with_model: bool) -> dict[str, Any]:
    """Where the quantized denoisers are, and how they compute."""
    parts = {name: model_of(getattr(pipe, name)) for name in denoiser_names(pipe)}
    methods = {name: method_of(part) for name, part in parts.items()}
    if others := {method for method in methods.values() if method not in (None, METHOD)}:
        logger.warning("the recipe does not bring what %s quantized: load the model so, too", ", ".join(others))
    ours = {name: parts[name] for name, method in methods.items() if method == METHOD}
    if not ours:
        return {}
    if not with_model:
        for name, part in ours.items():
            part.save_pretrained(names.folder / "quantized" / name)
    runtime = next((str(r) for part in ours.values() if (r := getattr(part, "low_bit_runtime", None))), "auto")
    packed = any(getattr(layer, "keep_floats", True) is False for part in ours.values() for layer in part.modules())
    return {
        "quantize": {"file": "."} if with_model else names.named("quantized"),
        "runtime": None if runtime.startswith("auto") else runtime,
        "low_memory": packed or None,
    }
