"""A recipe as a file: features with their settings, a scheduler, a quantized checkpoint, and for which models.

Reading one needs neither torch nor diffusers, so that a command refuses it before a model is loaded. What it names
lies in its own folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from diffusion_accel.arguments import nearest
from diffusion_accel.errors import ConfigurationError, ModelLoadError
from diffusion_accel.feature import Feature
from diffusion_accel.io import at_home, is_there, parse_json, read_text, shown
from diffusion_accel.model_files.folders import check_config, leaves
from diffusion_accel.model_files.index_notes import NUMBERS, check_numbers
from diffusion_accel.model_files.quantized import RUNTIMES
from diffusion_accel.registry import FEATURES, feature_class
from diffusion_accel.schedulers.solver import CLASS, read_solvers

FORMAT = "diffusion-accel recipe"
VERSION = 1
FILE = "acceleration.json"
FILES = ".files"  # behind a recipe's name without its suffix: the folder of what lies beside it
SIZE_LIMIT = 16 * 2**20  # bytes of a recipe; a learned solver in it is the most of them
MOST_FILES = 10_000  # in a folder that a recipe names
KEYS = ("format", "version", "pipeline", "models", "features", "off", "scheduler", "quantize", "runtime", "low_memory")
_KEYS = (*KEYS, "with_model", "call", "measured", "made_by")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What makes a pipeline fast.

    Attributes:
        features: by name.
        off: names of those that are attached and switched off.
        scheduler: its configuration with its class (`_class_name`); None: the model's own.
        quantize: a checkpoint's folder, or another package's quantizer; None: the model is taken as it is.
        runtime, low_memory: how a quantized model computes, see `quant.model.set_runtime`; None: as it is loaded.
        pipeline: the class that it was made for.
        with_model: it was saved with the model into its folder, whose index then says so, too.
        models: of that pipeline, by component: {"class": …, "weights": a fingerprint, or None where it is not known}.
        call: recommended arguments of a call, of which there are steps, guidance_scale, width and height.
        measured: numbers of whoever made it, for the record.
        made_by: versions.
        path: the file that it was read from; None: it was made here.
    """

    features: dict[str, Feature] = field(default_factory=dict)
    off: tuple[str, ...] = ()
    scheduler: dict[str, Any] | None = None
    quantize: str | None = None
    runtime: str | None = None
    low_memory: bool = False
    pipeline: str = ""
    with_model: bool = False
    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)
    made_by: dict[str, str] = field(default_factory=dict)
    path: Path | None = None

    def __str__(self) -> str:
        return "a recipe" if self.path is None else f"the recipe {self.path}"

    @property
    def evaluations(self) -> list[int] | None:
        """The numbers of steps that its scheduler was learnt for; None: any."""
        config = self.scheduler or {}
        return [*_solvers(config)] if config.get("_class_name") == CLASS else None

    def is_of(self, folder: Path | str) -> bool:
        """Whether it lies in this folder, whose models are then what it is for."""
        return self.path is not None and self.path.parent.resolve() == at_home(folder).resolve()


# ---------------------------------------------------------------------- reading
def recipe_file(place: Path | str) -> Path:
    """The recipe that a path means: a file, or a folder with an acceleration.json.

    Raises:
        ConfigurationError: there is none.
    """
    path = at_home(place)
    if is_there(path, "dir"):
        path = path / FILE
        if leaves(path, path.parent.resolve()):
            raise ConfigurationError(f"{path} is a link that leaves its folder; put a copy there instead")
    if not is_there(path):
        raise ConfigurationError(f"recipe {shown(str(place))}: no such file, or folder with an {FILE}")
    return path


def read_recipe(place: Path | str) -> Recipe:
    """The recipe in a file or folder, all of it checked; see `recipe_file`.

    Raises:
        ConfigurationError: it is no recipe, of a later version, has unknown keys or settings, or names a file that is
            not in its folder.
    """
    path = recipe_file(place)
    where = str(path)
    values = parse_json(read_text(path, "the recipe", limit=SIZE_LIMIT), where, nonfinite=True)
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise ConfigurationError(f"{where} is no recipe; pipe.acceleration.save writes one")
    version = values.get("version")
    if type(version) is not int or not 1 <= version <= VERSION:
        later = type(version) is int and version > VERSION
        hint = "; a later diffusion-accel reads it" if later else ""
        raise ConfigurationError(
            f"{where} is a recipe of version {shown(version)}, this program reads version {VERSION}{hint}"
        )
    _only(values, _KEYS, where)
    return Recipe(
        features=_features(_table(values, "features", where), where, path.parent),
        off=_off(values.get("off", []), values.get("features") or {}, where),
        scheduler=_scheduler(values.get("scheduler"), where),
        quantize=_quantize(values.get("quantize"), where, path.parent),
        runtime=_one_of(values.get("runtime"), RUNTIMES, f"{where}: runtime"),
        low_memory=bool(_one_of(values.get("low_memory", False), (False, True), f"{where}: low_memory")),
        pipeline=_text(values.get("pipeline", ""), f"{where}: pipeline"),
        with_model=bool(_one_of(values.get("with_model", False), (False, True), f"{where}: with_model")),
        models=_models(_table(values, "models", where), where),
        call=check_call(_table(values, "call", where), f"{where}: call"),
        measured=_table(values, "measured", where),
        made_by={k: _text(v, f"{where}: made_by: {k}") for k, v in _table(values, "made_by", where).items()},
        path=path,
    )


def inside(folder: Path, text: object, where: str, whose: str = "recipe") -> Path:
    """A file or folder that a recipe (or an image) names, in its own folder.

    Raises:
        ConfigurationError: it is an absolute path, has "..", is or holds a link that leads elsewhere, or is not there.
    """
    if not isinstance(text, str) or not text or "\0" in text or "\\" in text:
        raise ConfigurationError(f"{where}: a file is a relative path with /, got {shown(text)}")
    relative = PurePosixPath(text)
    if relative.is_absolute() or PureWindowsPath(text).drive or ".." in relative.parts or text.startswith("~"):
        raise ConfigurationError(
            f"{where}: {shown(text)} leaves the {whose}'s folder; what a file names lies beside it"
        )
    path, root = folder / relative, folder.resolve()
    if not is_there(path):
        raise ConfigurationError(f"{where}: there is no {shown(text)} beside it")
    for count, file in enumerate(_all_of(path)):
        if count >= MOST_FILES:
            raise ConfigurationError(f"{where}: {shown(text)} has more than {MOST_FILES} files")
        if leaves(file, root):
            raise ConfigurationError(f"{where}: {shown(text)} has a link that leaves the {whose}'s folder")
    return path


def _all_of(path: Path) -> Iterable[Path]:
    yield path
    for folder, folders, files in os.walk(path):
        yield from (Path(folder, name) for name in (*folders, *files))


def _features(values: dict[str, Any], where: str, folder: Path) -> dict[str, Feature]:
    made = {}
    for name, settings in values.items():
        _only([name], FEATURES, f"{where}: features")
        if not isinstance(settings, dict):
            raise ConfigurationError(f"{where}: {name}: settings must be a table, got {shown(settings)}")
        cls = feature_class(name)
        given = {}
        for key, value in settings.items():
            names_file = cls.file_test(key)
            if isinstance(value, dict):
                if names_file is None or [*value] != ["file"]:
                    raise ConfigurationError(f"{where}: {name}: {key} must be no table, got {shown(value)}")
                value = str(inside(folder, value["file"], f"{where}: {name}: {key}"))
            elif names_file is not None and isinstance(value, str) and names_file(value):
                raise ConfigurationError(
                    f"{where}: {name}: {key} is a file, {shown(value)}; a recipe has files beside it and names them "
                    'so: {"file": "NAME"}'
                )
            given[key] = value
        try:
            made[name] = cls.from_dict(given)
        except ConfigurationError as error:
            raise ConfigurationError(f"{where}: {error}") from error
    return made


def _off(names: object, features: Mapping[str, Any], where: str) -> tuple[str, ...]:
    if not isinstance(names, list) or not all(isinstance(name, str) and name in features for name in names):
        raise ConfigurationError(f"{where}: off must be a list of its features, got {shown(names)}")
    return tuple(names)


def _scheduler(config: object, where: str) -> dict[str, Any] | None:
    if config is None:
        return None
    name = config.get("_class_name") if isinstance(config, dict) else None
    if not isinstance(config, dict) or not isinstance(name, str) or not name.isidentifier():
        raise ConfigurationError(f"{where}: scheduler must be a configuration with a _class_name, got {shown(config)}")
    try:
        check_config(config, f"{where}: scheduler")
        if name == CLASS:
            _solvers(config)
    except (ModelLoadError, ConfigurationError) as error:
        text = str(error)
        raise ConfigurationError(text if text.startswith(where) else f"{where}: scheduler: {text}") from error
    return config


def _solvers(config: Mapping[str, Any]) -> dict[int, Any]:
    return read_solvers(config.get("solvers") or {}, config.get("num_train_timesteps", 1000), bool(config.get("flow")))


def _quantize(value: object, where: str, folder: Path) -> str | None:
    if value is None:
        return None
    if isinstance(value, dict) and [*value] == ["file"]:
        return str(inside(folder, value["file"], f"{where}: quantize"))
    if isinstance(value, str) and ":" in value and not is_there(value):  # another package's; checked where it is used
        return value
    raise ConfigurationError(
        f'{where}: quantize must be {{"file": "FOLDER"}} or a text PACKAGE:KIND, got {shown(value)}'
    )


def _models(values: dict[str, Any], where: str) -> dict[str, dict[str, Any]]:
    for name, entry in values.items():
        if not isinstance(entry, dict):
            raise ConfigurationError(f"{where}: models: {shown(name)} must be a table, got {shown(entry)}")
        _only(entry, ("class", "weights"), f"{where}: models: {shown(name)}")
        _text(entry.get("class", ""), f"{where}: models: {shown(name)}: class")
        if entry.get("weights") is not None:
            _text(entry["weights"], f"{where}: models: {shown(name)}: weights")
    return values


def check_call(values: dict[str, Any], where: str) -> dict[str, Any]:
    """The recommended arguments of a call, checked; `where` stands before an error."""
    _only(values, NUMBERS, where)
    return check_numbers(values, where)


def _table(values: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    value = values.get(key, {})
    if not isinstance(value, dict):
        raise ConfigurationError(f"{where}: {key} must be a table, got {shown(value)}")
    return value


def _text(value: object, what: str) -> str:
    if not isinstance(value, str) or len(value) > 200:
        raise ConfigurationError(f"{what} must be a short text, got {shown(value)}")
    return value


def _one_of(value: Any, allowed: tuple[Any, ...], what: str) -> Any:
    if value is not None and not any(value is one or (isinstance(value, str) and value == one) for one in allowed):
        raise ConfigurationError(f"{what} must be one of {', '.join(map(str, allowed))}, got {shown(value)}")
    return value


def _only(given: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raise `ConfigurationError` for a key that is not known, with the nearest that is."""
    for key in given:
        if key not in (known := list(known)):
            near = nearest(str(key)[:100], known)
            hint = f"did you mean {near!r}?" if near else f"the keys are: {', '.join(sorted(known))}"
            raise ConfigurationError(f"{where}: unknown key {shown(key)}; {hint}")
