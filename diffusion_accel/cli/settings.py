"""The settings of `generate`: merged from the model's recommendations, a configuration file and flags, and checked.

Everything here is checked before torch or a model is loaded.
"""

from __future__ import annotations

import dataclasses
import os
import typing
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from diffusion_accel.compositing import background_of
from diffusion_accel.errors import ConfigurationError, ModelLoadError
from diffusion_accel.feature import Feature
from diffusion_accel.generation.layers import drawn_layers
from diffusion_accel.generation.request import (
    IMAGES,
    IP_ADAPTER_SCALE,
    MAX_SEED,
    MAX_TEXT,
    SEVERAL,
    Options,
    at_least,
    check_counts,
    check_numbers,
    check_text,
    listed,
    one_or_several,
)
from diffusion_accel.images import loaded
from diffusion_accel.io import at_home, is_there, read_json, read_toml, shown
from diffusion_accel.model_files.folders import controlnets_in
from diffusion_accel.model_files.headers import lora_file
from diffusion_accel.model_files.names import ModelSource, check_weights, find_model
from diffusion_accel.model_files.quantized import RUNTIMES
from diffusion_accel.pipelines.quantizers import check_quantize
from diffusion_accel.pipelines.recipes import features_over, quantize_of, recipe_of
from diffusion_accel.pipelines.schedulers import check_scheduler, check_steps, most_steps
from diffusion_accel.recipes.recipe import Recipe
from diffusion_accel.registry import FEATURES
from diffusion_accel.report import several
from diffusion_accel.schedulers.solver import not_learnt

from .feature_flags import parse_feature

MAX_SCALE = 1000  # of a LoRA
PREVIEW_STEPS = at_least(1, 10_000)
OLD_KEYS = {"num_images": "count"}  # keys of files that go by another name now
_MAY_BE_EMPTY = ("prompt", "negative_prompt", "output")  # or are refused with words of their own
DTYPES = ("float32", "bfloat16", "float16")
OFFLOAD = ("none", "model", "sequential")
_PER_NET = ("controlnet", *SEVERAL)  # one, or one for each ControlNet
LISTS = ("lora", *_PER_NET)  # what may be given several times
ATTENTION = ("sdpa", "xformers")


@dataclass(frozen=True, kw_only=True)
class Settings(Options):
    """Everything `generate` was asked for. None: not set, diffusers' own default applies."""

    model: str = "sticker"
    scheduler: str | None = None
    seed: int | None = None
    controlnet: str | tuple[str, ...] | None = None
    lora: tuple[str, ...] = ()
    ip_adapter: str | None = None
    ip_adapter_scale: float | None = None
    device: str | None = None
    dtype: str = "float32"
    offload: str = "none"
    attention: str = "sdpa"
    quantize: str | None = None
    runtime: str | None = None
    low_memory: bool = False
    output: str = "outputs"
    overwrite: bool = False
    distribute: str | None = None
    metadata: bool = True
    paths: bool = False
    compare: bool = False
    premultiplied: bool = False
    preview: str | None = None
    preview_steps: int | None = None
    layers: str | None = None
    allow_pickle: bool = False
    recipe: str | None = None
    features: dict[str, Feature] = field(default_factory=dict)
    restored: Recipe | None = None

    @property
    def task(self) -> str:
        """The pipeline task that the given images imply."""
        if self.mask_image:
            return "inpainting"
        return "image-to-image" if self.image else "text-to-image"

    @property
    def scheduler_name(self) -> str | None:
        """The scheduler that is asked for, by its short name, or that a recipe brings, by its class."""
        config = None if self.restored is None else self.restored.scheduler
        return self.scheduler if self.scheduler is not None or config is None else str(config["_class_name"])

    @property
    def wanted_layers(self) -> tuple[str, ...] | None:
        """The drawn layers that are written; None: all."""
        return None if self.layers is None else tuple(layer.strip() for layer in self.layers.split(","))

    @property
    def loras(self) -> list[tuple[str, float]]:
        """Files of LoRAs with their scales."""
        return [split_lora(entry) for entry in self.lora]


def read_config(file: str) -> dict[str, Any]:
    """A TOML or JSON file with the long flag names as keys (dashes or underscores)."""
    path, what = Path(file), f"--config {file}"
    read = read_json if path.suffix.lower() == ".json" else read_toml
    found = read(path, "--config")
    if not isinstance(found, dict):
        raise ConfigurationError(f"{what} must be a table of settings")
    values: dict[str, Any] = {}
    for key, value in found.items():
        if (name := key.replace("-", "_")) in values:
            raise ConfigurationError(f"{what}: {name!r} is given twice")
        values[name] = value
    known = (
        {f.name for f in dataclasses.fields(Settings)} - {"features", "restored"}
        | set(FEATURES)
        | {"prompt", "prompts_file"}
    )
    values = renamed(values, what)
    for key in values:
        if key not in known:
            raise ConfigurationError(f"{what}: unknown key {shown(key)}; the keys are: {', '.join(sorted(known))}")
    prompts = values.get("prompt", [])
    if not isinstance(prompts, str) and not (isinstance(prompts, list) and all(isinstance(p, str) for p in prompts)):
        raise ConfigurationError(f"{what}: prompt must be a text or a list of texts, got {shown(prompts)}")
    if "prompts_file" in values:
        typed("prompts_file", values["prompts_file"], f"{what}: ")
    return values


def renamed(values: dict[str, Any], what: str) -> dict[str, Any]:
    """Values of a file with old keys under their names of today. Raises `ConfigurationError` for both at once."""
    for old, new in OLD_KEYS.items():
        if old in values and new in values:
            raise ConfigurationError(f"{what}: {new!r} is given twice, once as {old!r}")
    values = {OLD_KEYS.get(key, key): value for key, value in values.items()}
    if "compile" in values:
        if type(compile := values.pop("compile")) is not bool:
            raise ConfigurationError(f"{what}: compile must be true or false, got {shown(compile)}")
        if compile and "compiled" in values:
            raise ConfigurationError(f"{what}: 'compiled' is given twice, once as 'compile'")
        values |= {"compiled": {"engine": "inductor", "blocks": True}} if compile else {}
    return values


def merge(flags: dict[str, Any], config: dict[str, Any], *, restoring: bool = False) -> tuple[Settings, ModelSource]:
    """Settings from flags over a configuration file over a recipe over the model's recommendations, checked.

    Args:
        flags, config: by name.
        restoring: whether the command draws with what a recipe says: the one that is named, or the model's own.

    Raises:
        ConfigurationError, ModelLoadError: for anything that cannot work, before a model is loaded.
    """
    chosen = {**config, **{k: v for k, v in flags.items() if v is not None and v != ()}}
    named = {n: parse_feature(n, chosen.pop(n)) for n in FEATURES if chosen.get(n) is not None}
    fields = {f.name: f for f in dataclasses.fields(Settings)}
    given = {k: typed(k, v) for k, v in chosen.items() if k in fields}
    for key in ("output", "quantize"):  # what reads other files knows ~ by itself
        if key in given:
            given[key] = os.path.expanduser(given[key])  # noqa: PTH111 (the end "/" of a folder stays)
    source = find_model(given.get("model", Settings.model), given.get("allow_pickle", False))
    recipe = recipe_of(source, _READ.get(str(given.get("recipe")), given.get("recipe"))) if restoring else None
    found = features_over({} if recipe is None else recipe.features, named, recipe)
    off = () if recipe is None else recipe.off
    features = {n: found[n] for n in FEATURES if n in found and (n in named or n not in off)}
    usual = {**source.defaults, **_of_recipe(recipe, source)}
    if "steps" not in given and (most := _most_steps(given.get("scheduler"), recipe, "steps" in usual, source)):
        usual["steps"] = most
    settings = Settings(**{**usual, **given}, features=features, restored=recipe)
    if settings.quantize == "off":
        settings = dataclasses.replace(settings, quantize=None)
    check(settings, source)
    check_steps(settings.scheduler, source, None)
    return settings, source


_READ = {"on": True, "off": False}  # of --recipe, beside files and folders


def _of_recipe(recipe: Recipe | None, source: ModelSource) -> dict[str, Any]:
    """Settings that a recipe brings. Its scheduler comes when the model is loaded, in place of a recommended one."""
    if recipe is None:
        return {}
    values = {**recipe.call, "quantize": quantize_of(recipe, source)}
    return values | ({} if recipe.scheduler is None else {"scheduler": None})


def _kind(hint: Any) -> type:
    """The type of a setting in a file: bool, int, float or text, whatever else it may be."""
    parts = typing.get_args(hint) or (hint,)
    return next((kind for kind in (bool, int, float) if kind in parts), str)


_TYPES = {name: _kind(hint) for name, hint in typing.get_type_hints(Settings).items()}


def typed(key: str, value: Any, where: str = "") -> Any:
    """`value` as the setting's type; for values from files, which may hold anything."""
    flag = f"{where}{key}"
    if key == "lora":
        if not isinstance(value, (list, tuple)) or not all(isinstance(v, str) for v in value):
            raise ConfigurationError(f"{flag} must be a list of texts PATH[:SCALE], got {shown(value)}")
        return tuple(_text(v, flag) for v in value)
    if key in _PER_NET and isinstance(value, (list, tuple)):
        return one_or_several([_single(key, one, where) for one in value], flag.replace("_", "-"))
    return _single(key, value, where)


def _single(key: str, value: Any, where: str) -> Any:
    flag, kind = f"{where}{key}", _TYPES.get(key, str)
    if kind is float and type(value) is int and value.bit_length() < 1000:
        value = float(value)
    if type(value) is not kind:
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
        raise ConfigurationError(f"{flag} must be {words[kind]}, got {shown(value)}")
    if value == "" and key not in _MAY_BE_EMPTY:
        raise ConfigurationError(f"{where}{key.replace('_', '-')} is empty")
    return _text(str(value), flag) if kind is str else value


def _text(value: str, flag: str) -> str:
    if "\0" in value or len(value) > MAX_TEXT:
        what = "no character NUL" if "\0" in value else f"at most {MAX_TEXT} characters"
        raise ConfigurationError(f"{flag} must have {what}, got {shown(value)}")
    return value


def check(settings: Settings, source: ModelSource) -> None:
    """Refuse what cannot work."""
    s, own = settings, own_controlnets(settings, source)
    check_numbers({f.name: getattr(s, f.name) for f in dataclasses.fields(s)}, "--", "-")
    if s.seed is not None and s.seed > MAX_SEED - s.count + 1:
        raise ConfigurationError(f"--seed {s.seed} with --count {s.count} goes beyond {MAX_SEED}")
    check_text(s.negative_prompt, "negative prompt")
    if s.scheduler is not None:
        check_scheduler(s.scheduler)
    for name, allowed in (("dtype", DTYPES), ("offload", OFFLOAD), ("attention", ATTENTION)):
        if getattr(s, name) not in allowed:
            raise ConfigurationError(f"--{name} must be one of {', '.join(allowed)}, got {getattr(s, name)!r}")
    needs = (
        ("mask_image", "image"),
        ("strength", "image"),
        *((("control_image", "controlnet"),) if not own else ()),
        ("controlnet_conditioning_scale", "control_image"),
        ("control_guidance_start", "control_image"),
        ("control_guidance_end", "control_image"),
        ("controlnet", "control_image"),
        ("ip_adapter_image", "ip_adapter"),
        ("ip_adapter_scale", "ip_adapter"),
        ("ip_adapter", "ip_adapter_image"),
    )
    for one, other in needs:
        if getattr(s, one) is not None and getattr(s, other) is None:
            raise ConfigurationError(f"--{one.replace('_', '-')} needs --{other.replace('_', '-')}")
    nets, images = len(listed(s.controlnet)) or len(own), len(listed(s.control_image))
    if nets != images and (images or not own):  # of one that the model has it is asked for where something is drawn
        which = f"ControlNet of {source.name}" if own else "--controlnet"
        raise ConfigurationError(
            f"--control-image must be given once for each {which}, in their order: {nets}, got {images}"
        )
    check_counts(vars(s), "--", "-")
    for flag, file in _images(s):
        if not is_there(Path(file), "file"):
            raise ConfigurationError(f"{flag}: no such file: {file}")
    for entry in s.lora:
        file, _ = split_lora(entry)
        if not is_there(Path(file)):
            raise ModelLoadError(f"--lora: no such file: {file}")
        check_weights(lora_file(file), allow_pickle=None)
    if s.ip_adapter is not None:
        if not is_there(Path(s.ip_adapter), "file"):
            raise ModelLoadError(f"--ip-adapter: no such file: {s.ip_adapter}")
        check_weights(at_home(s.ip_adapter), allow_pickle=None)
    if s.ip_adapter_scale is not None:
        IP_ADAPTER_SCALE.check(s.ip_adapter_scale, "--ip-adapter-scale")
    if s.prompt_weights and find_spec("compel") is None:
        raise ConfigurationError("--prompt-weights needs compel: pip install 'diffusion-accel[prompts]'")
    if s.quantize is not None:
        check_quantize(s.quantize)
    if s.runtime is not None and s.runtime not in RUNTIMES:
        raise ConfigurationError(f"--runtime must be one of {', '.join(RUNTIMES)}, got {s.runtime!r}")
    check_transparency(s)
    if s.preview_steps is not None:
        PREVIEW_STEPS.check(s.preview_steps, "--preview-steps")
    for flag, given in (("--compare", s.compare), ("--patch-parallel", "patch_parallel" in s.features)):
        if s.preview_steps is not None and given:
            raise ConfigurationError(f"--preview-steps cannot be combined with {flag}")
    if s.compare and all(f.changes_output for f in s.features.values()) and s.quantize is None:
        raise ConfigurationError(
            "--compare needs a feature to compare with plain diffusers, for example --encoder-reuse, or --quantize"
        )


def _most_steps(scheduler: str | None, recipe: Recipe | None, known: bool, source: ModelSource) -> int | None:
    """The most steps of the learned solver that draws; None if none does, or if steps that it can do are `known`."""
    if scheduler is None and recipe is not None and recipe.scheduler is not None:
        return None if "steps" in recipe.call else max(recipe.evaluations or (), default=None)
    return None if scheduler is None and known else most_steps(scheduler, source)


def check_features(settings: Settings, steps: int | None, source: ModelSource) -> None:
    """Refuse features, and a scheduler, that cannot do so many steps. Without `steps` only the pipeline knows them."""
    scheduler = settings.scheduler_name
    check_steps(scheduler, source, steps)
    learnt = None if settings.restored is None or settings.scheduler else settings.restored.evaluations
    if steps is not None and learnt is not None and (reason := not_learnt(learnt, steps)):
        raise ConfigurationError(f"the scheduler of {settings.restored} with --steps {steps}: {reason}")
    for feature in settings.features.values():
        if steps is not None and (reason := feature.unfit_for(steps, scheduler or "")):
            raise ConfigurationError(f"{feature.flag()} with --steps {steps}: {reason}")


def own_controlnets(settings: Settings, source: ModelSource) -> list[str]:
    """The ControlNets in the model's own folder that are used: with --controlnet none of them."""
    local = settings.controlnet is None and source.kind in ("embedded", "folder")
    return controlnets_in(Path(source.location)) if local else []


def check_controlled(settings: Settings, source: ModelSource) -> None:
    """Refuse to draw without an image for the ControlNets that the model has."""
    if settings.control_image is None and (own := own_controlnets(settings, source)):
        raise ConfigurationError(f"--control-image is needed: {source.name} has {several(len(own), 'ControlNet')}")


def check_images(s: Settings) -> None:
    """Refuse files that hold no image that can be read: opened here, so that it is said before a model is loaded."""
    for flag, file in _images(s):
        with loaded(file, what=flag):
            pass


def _images(s: Settings) -> list[tuple[str, str]]:
    """The image files that are given, each with its flag."""
    return [(f"--{name.replace('_', '-')}", file) for name in IMAGES for file in listed(getattr(s, name))]


def check_transparency(s: Settings) -> None:
    """Refuse what cannot be written, and flags that need transparent images."""
    drawn = drawn_layers(s.features)
    transparent = drawn != ("",)
    for name in ("premultiplied", "preview", "layers"):
        if getattr(s, name) and not transparent:
            raise ConfigurationError(f"--{name} needs --transparent")
    if not transparent:
        return
    if s.preview is not None:
        background_of(s.preview)
    for layer in s.wanted_layers or ():
        if layer not in drawn:
            variant = s.features["transparent"].to_dict()["variant"]
            raise ConfigurationError(f"--layers {layer}: the variant {variant} draws {', '.join(drawn)}")


def split_lora(entry: str) -> tuple[str, float]:
    """`PATH[:SCALE]` as path and scale (1 if none is given)."""
    path, colon, scale = entry.rpartition(":")
    if not colon or is_there(Path(entry)):
        return entry, 1.0
    try:
        value = float(scale)
    except ValueError:
        return entry, 1.0
    if not -MAX_SCALE <= value <= MAX_SCALE:
        raise ConfigurationError(
            f"--lora: the scale must be a finite number from -{MAX_SCALE} to {MAX_SCALE}, got {shown(scale)}"
        )
    return path, value
