"""`generate --from IMAGE`: the settings that an image was drawn with, as if they were those of a configuration file.

An image may come from anybody. So nothing that it says reaches further than a flag could, files that it names are
looked for beside it, models and weights that are no part of this package have to be named by the user, and what it
asks for is no larger than itself.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion_accel.errors import ConfigurationError, OutputError
from diffusion_accel.generation.clips import FPS, frames_shown
from diffusion_accel.generation.request import FILES, LIMITS, MAX_IMAGES, check_numbers, check_text
from diffusion_accel.image_metadata import read_embedded
from diffusion_accel.images import loaded
from diffusion_accel.io import is_there, plain, shown
from diffusion_accel.model_files.names import EMBEDDED, HUB_ID
from diffusion_accel.pipelines.learned import LEARNED
from diffusion_accel.pipelines.schedulers import SCHEDULERS
from diffusion_accel.recipes.recipe import inside
from diffusion_accel.registry import FEATURES, feature_class

from .settings import typed

MOST_STEPS = 1000
MOST_LORAS = MOST_NETS = 64
_ROUNDED = 64  # pixels by which pipelines round a size
_PLAIN = (
    *("negative_prompt", "steps", "guidance_scale", "width", "height", "strength"),
    *("controlnet_conditioning_scale", "control_guidance_start", "control_guidance_end", "ip_adapter_scale"),
    *("device", "dtype", "attention", "runtime", "low_memory", "premultiplied", "prompt_weights", "frames", "fps"),
)
#: settings that belong to another one, or to a feature
_BELONGING = {"transparent": ("premultiplied",), "quantize": ("runtime", "low_memory")}
_KNOWN = (*FILES, *_PLAIN, "scheduler", "lora", "quantize", "of_recipe")


@dataclass(frozen=True)
class Again:
    """How an image was drawn.

    Attributes:
        file: the image.
        values: by the names of flags, without those that the user has given.
        versions: of what drew it.
        weights: what `generation.loading.model_hash` said of the model; None: nothing.
        together: which of how many images that were drawn in one call it is, from 0; None: alone.
    """

    file: str
    values: dict[str, Any]
    versions: Mapping[str, Any]
    weights: str | None = None
    together: tuple[int, int] | None = None

    def notes(self, versions: Mapping[str, str], weights: str | None) -> list[str]:
        """Why the new image may have other pixels.

        Args:
            versions: of what draws now.
            weights: `model_hash` of the model that draws now.
        """
        others = [f"{n} {plain(str(v))}" for n, v in self.versions.items() if n in versions and versions[n] != v]
        found = []
        if others:
            here = ", ".join(f"{name} {versions[name]}" for name in self.versions if versions.get(name, "") != "")
            found.append(f"{self.file} was drawn with {', '.join(others)}; here are {here}: its pixels may be others")
        if None not in (weights, self.weights) and weights != self.weights:
            found.append(f"the model has other weights than the one that drew {self.file}: its pixels will be others")
        if self.together is not None and "seed" in self.values:
            index, count = self.together
            found.append(
                f"{self.file} was image {index + 1} of {count} of one call; --seed {self.values['seed'] - index} "
                f"--count {count} draws all of them with the same pixels, alone it may differ by rounding"
            )
        return found


def read_again(file: str, given: Collection[str], whole_paths: bool = False, off: Collection[str] = ()) -> Again:
    """How the image in a file was drawn.

    Args:
        file: an image that `generate` or the server's page has written.
        given: the flags, by name, that the user has given: what the image says of them does not count.
        whole_paths: follow whole paths of local files.
        off: of those that are given, what is switched off, with all that belongs to it.

    Raises:
        OutputError: the file cannot be read, or has no settings of ours.
        ConfigurationError: it names what is not there, or asks for what only a user may ask for.
    """
    with loaded(file, what="--from", error=OutputError) as image:
        _, data = read_embedded(image, file)
        size, frames = image.size, getattr(image, "n_frames", 1)
        if frames > 1:
            frames = frames_shown(image, _fps(data))
    if data is None or not {"prompt", "seed", "model", "settings"} <= data.keys():
        raise OutputError(f"--from {file}: it has no settings that diffusion-accel has written")
    reading = _Reading(Path(file), f"--from {file}: ", whole_paths)
    settings, features = _table(data, "settings", reading), _table(data, "features", reading)
    of_recipe = settings.get("of_recipe", [])
    if unknown := [key for key in settings if key not in _KNOWN]:
        raise ConfigurationError(f"{reading.where}{shown(unknown[0])} is a setting that generate does not know")
    asked = {"prompt": data["prompt"], "seed": data["seed"], "model": data["model"], **settings}
    values = {key: reading.value(key, asked[key]) for key in asked if key not in given and key != "of_recipe"}
    brought = of_recipe if isinstance(of_recipe, list) else []  # by a recipe: the one that is given has its own
    for name, fields in features.items():
        if name not in given and name not in brought:
            values[name] = reading.feature(name, _as_chosen(fields, data, name))
    for key in (key for switch in off for key in _BELONGING.get(switch, ())):
        values.pop(key, None)
    reading.check(values, size, frames)
    return Again(file, values, _table(data, "versions", reading), _hash(data), _together(data))


@dataclass(frozen=True)
class _Reading:
    """What an image says, as values of flags.

    Attributes:
        file: the image.
        where: the first words of an error.
        whole: whether whole paths are followed.
    """

    file: Path
    where: str
    whole: bool

    def value(self, key: str, value: Any) -> Any:
        """A setting, checked; files as paths."""
        if key == "prompt":
            check_text(value, f"prompt of {self.file}")
            if value is None:
                raise ConfigurationError(f"{self.where}it has no prompt")
            return value
        value = typed(key, value, self.where)
        if key == "model":
            return self._model(value)
        if key == "lora":
            if len(value) > MOST_LORAS:
                raise ConfigurationError(
                    f"{self.where}{len(value)} LoRAs; at most {MOST_LORAS} are taken from an image"
                )
            return tuple(self._lora(entry) for entry in value)
        if isinstance(value, tuple):
            if len(value) > MOST_NETS:
                raise ConfigurationError(
                    f"{self.where}{len(value)} of {key}; at most {MOST_NETS} are taken from an image"
                )
            return tuple(self.path(one, key) for one in value) if key in FILES else value
        if key == "scheduler":
            short = value.partition(",")[0]
            known = short in SCHEDULERS or value == LEARNED or (short.endswith("Scheduler") and short.isidentifier())
            return value if known else self.path(value, key)
        if key == "quantize":
            return value if value == "off" or self._foreign(value) else self.path(value, key)
        if key == "recipe":
            return value if value in ("on", "off") else self.path(value, key)
        return self.path(value, key) if key in FILES else value

    def path(self, text: str, key: str) -> str:
        """Where a file or folder lies that the image names."""
        flag = f"--{key.replace('_', '-')}"
        if self.whole and Path(text).is_absolute():
            if not is_there(text):
                raise ConfigurationError(f"{self.where}there is no {shown(text)}; give {flag}")
            return text
        try:
            return str(inside(self.file.parent, text, f"{self.where}{key}", whose="image"))
        except ConfigurationError as error:
            raise ConfigurationError(f"{error}; give {flag}") from error

    def _model(self, name: str) -> str:
        if name in EMBEDDED:
            return name
        if self.whole and Path(name).is_absolute():
            return self.path(name, "model")
        raise ConfigurationError(
            f"{self.where}it was drawn with the model {shown(name)}, which is no part of this package; say where it is "
            "with --model"
        )

    def _lora(self, entry: str) -> str:
        name, colon, scale = entry.rpartition(":")
        try:
            float(scale)
        except ValueError:
            name, colon, scale = entry, "", ""
        return f"{self.path(name if colon else entry, 'lora')}{colon}{scale if colon else ''}"

    def _foreign(self, quantize: str) -> bool:
        package, colon, kind = quantize.partition(":")
        return bool(colon) and package.isidentifier() and kind.isidentifier()

    def feature(self, name: str, fields: Any) -> dict[str, Any]:
        """A feature's settings."""
        if name not in FEATURES:
            raise ConfigurationError(f"{self.where}{shown(name)} is no feature that this version knows")
        if not isinstance(fields, dict):
            raise ConfigurationError(f"{self.where}{name}: settings must be a table, got {shown(fields)}")
        cls = feature_class(name)
        made = {}
        for key, value in fields.items():
            test = cls.file_test(key)
            if isinstance(value, str) and value and test is not None:
                if test(value):
                    value = self._of_feature(value, cls.flag(), key)
                elif HUB_ID.fullmatch(value):
                    raise ConfigurationError(f"{self.where}{name} names {shown(value)}, of the hub; give {cls.flag()}")
            made[key] = value
        try:
            feature = cls.from_dict(made)
        except ConfigurationError as error:
            raise ConfigurationError(f"{self.where}{error}") from error
        most = os.cpu_count() or 1
        if getattr(feature, "ranks", 0) > most:
            raise ConfigurationError(f"{self.where}{name} asks for more processes than {most}; give {cls.flag()}")
        return made

    def _of_feature(self, text: str, flag: str, key: str) -> str:
        """A file that a feature's text names, maybe between a prefix and a member: tuned:FILE.json:NAME."""
        prefix = "tuned:" if text.startswith("tuned:") else ""
        name, member = text.removeprefix(prefix), ""
        if not name.endswith(".json") and ".json:" in name:
            name, _, member = name.rpartition(":")
        try:
            path = self.path(name, key)
        except ConfigurationError as error:
            raise ConfigurationError(f"{str(error).partition('; give --')[0]}; give {flag}") from error
        return prefix + path + (f":{member}" if member else "")

    def check(self, values: dict[str, Any], size: tuple[int, int], frames: int) -> None:
        """Refuse numbers that are not allowed, and more work than the image itself was."""
        check_numbers(values, self.where, "-")
        if values.get("steps", 0) > MOST_STEPS:
            raise ConfigurationError(
                f"{self.where}it asks for {values['steps']} steps; more than {MOST_STEPS} need --steps"
            )
        if values.get("frames", 0) > frames:
            raise ConfigurationError(
                f"{self.where}it asks for {values['frames']} frames and has {frames} itself; give --frames"
            )
        for key, pixels in zip(("width", "height"), size, strict=True):
            if values.get(key, 0) > pixels + _ROUNDED:
                raise ConfigurationError(
                    f"{self.where}it asks for a {key} of {values[key]} pixels and has {pixels} itself; give --{key}"
                )


def _table(data: dict[str, Any], key: str, reading: _Reading) -> dict[str, Any]:
    value = data.get(key, {})
    if not isinstance(value, dict):
        raise ConfigurationError(f"{reading.where}{key} must be a table, got {shown(value)}")
    return value


def _as_chosen(fields: Any, data: dict[str, Any], name: str) -> Any:
    """A feature's settings, with what it chose by itself in the place of "auto", which may choose otherwise today."""
    found: Any = data
    for key in ("report", "choices", name, "plan"):
        found = found.get(key) if isinstance(found, dict) else None
    if not isinstance(fields, dict) or fields.get("plan") != "auto" or not isinstance(found, str):
        return fields
    return {key: value for key, value in fields.items() if key not in ("speedup", "min_psnr")} | {"plan": found}


def _fps(data: dict[str, Any] | None) -> float:
    settings = (data or {}).get("settings")
    fps = settings.get("fps") if isinstance(settings, dict) else None
    return float(fps) if isinstance(fps, int | float) and fps in LIMITS["fps"] else FPS


def _hash(data: dict[str, Any]) -> str | None:
    value = data.get("model_hash")
    return value if isinstance(value, str) else None


def _together(data: dict[str, Any]) -> tuple[int, int] | None:
    found, seed = data.get("together"), data["seed"]
    if not isinstance(found, list) or len(found) != 2 or not all(type(number) is int for number in (*found, seed)):
        return None
    index, count = found
    return (index, count) if 0 <= index < count <= MAX_IMAGES and index <= seed else None
