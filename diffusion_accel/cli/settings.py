"""The settings of `generate`: merged from the model's recommendations, a configuration file and flags, and checked.

Everything here is checked before torch or a model is loaded.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigurationError, ModelLoadError
from ..feature import Feature
from ..pipelines.models import ModelSource, check_weights, find_model
from ..pipelines.quantizers import check_quantize
from ..pipelines.schedulers import check_scheduler
from ..registry import FEATURES
from .options import parse_feature

MAX_SEED = 2**63 - 1
DTYPES = ("float32", "bfloat16", "float16")
OFFLOAD = ("none", "model", "sequential")
ATTENTION = ("sdpa", "xformers")
RUNTIMES = ("auto", "integer", "dequantize", "simulated")


@dataclass(frozen=True)
class Job:
    """One prompt with what a line of a prompts file may override; None means the common setting."""

    prompt: str
    negative_prompt: str | None = None
    seed: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    width: int | None = None
    height: int | None = None
    num_images: int | None = None
    output: str | None = None


@dataclass(frozen=True)
class Settings:
    """Everything `generate` was asked for. None: not set, diffusers' own default applies."""

    model: str = "sticker"
    negative_prompt: str | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    scheduler: str | None = None
    width: int | None = None
    height: int | None = None
    seed: int | None = None
    num_images: int = 1
    image: str | None = None
    mask_image: str | None = None
    strength: float | None = None
    controlnet: str | None = None
    control_image: str | None = None
    lora: tuple[str, ...] = ()
    device: str | None = None
    dtype: str = "float32"
    offload: str = "none"
    attention: str = "sdpa"
    compile: bool = False
    quantize: str | None = None
    runtime: str | None = None
    low_memory: bool = False
    output: str = "outputs"
    overwrite: bool = False
    metadata: bool = True
    compare: bool = False
    premultiplied: bool = False
    preview: str | None = None
    layers: str | None = None
    allow_pickle: bool = False
    features: dict[str, Feature] = field(default_factory=dict)

    @property
    def task(self) -> str:
        """The pipeline task that the given images imply."""
        if self.mask_image:
            return "inpainting"
        return "image-to-image" if self.image else "text-to-image"


def read_config(file: str) -> dict[str, Any]:
    """A TOML or JSON file with the long flag names as keys (dashes or underscores)."""
    path = Path(file)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"--config {file} cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from error
    try:
        values = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except ValueError as error:
        raise ConfigurationError(
            f"--config {file} is not valid {path.suffix.lstrip('.') or 'TOML'}: {error}"
        ) from error
    if not isinstance(values, dict):
        raise ConfigurationError(f"--config {file} must be a table of settings")
    values = {k.replace("-", "_"): v for k, v in values.items()}
    known = {f.name for f in dataclasses.fields(Settings)} - {"features"} | set(FEATURES) | {"prompt", "prompts_file"}
    for key in values:
        if key not in known:
            raise ConfigurationError(f"--config {file}: unknown key {key!r}; the keys are: {', '.join(sorted(known))}")
    return values


def merge(flags: dict[str, Any], config: dict[str, Any]) -> tuple[Settings, ModelSource]:
    """Settings from flags over a configuration file over the model's recommendations, checked.

    Raises:
        ConfigurationError, ModelLoadError: for anything that cannot work, before a model is loaded.
    """
    chosen = {**config, **{k: v for k, v in flags.items() if v is not None and v != ()}}
    features = {n: f for n in FEATURES if (f := parse_feature(n, chosen.pop(n, None))) is not None}
    fields = {f.name: f for f in dataclasses.fields(Settings)}
    given = {k: _typed(k, v) for k, v in chosen.items() if k in fields}
    source = find_model(given.get("model", Settings.model), given.get("allow_pickle", False))
    settings = Settings(**{**source.defaults, **given}, features=features)
    check(settings)
    return settings, source


_TYPES: dict[str, type] = {
    **dict.fromkeys(("steps", "width", "height", "seed", "num_images"), int),
    **dict.fromkeys(("guidance_scale", "strength"), float),
    **dict.fromkeys(
        ("compile", "overwrite", "metadata", "compare", "premultiplied", "allow_pickle", "low_memory"), bool
    ),
}


def _typed(key: str, value: Any, where: str = "") -> Any:
    """`value` as the setting's type; for values from files, which may hold anything."""
    flag = f"{where}{key}"
    if key == "lora":
        if not isinstance(value, (list, tuple)) or not all(isinstance(v, str) for v in value):
            raise ConfigurationError(f"{flag} must be a list of texts PATH[:SCALE], got {value!r}")
        return tuple(value)
    kind = _TYPES.get(key, str)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
        raise ConfigurationError(f"{flag} must be {words[kind]}, got {value!r}")
    return value


def check(settings: Settings) -> None:
    """Refuse what cannot work."""
    s = settings
    check_numbers(dataclasses.asdict(dataclasses.replace(s, features={})), "--")
    if s.scheduler is not None:
        check_scheduler(s.scheduler)
    for name, allowed in (("dtype", DTYPES), ("offload", OFFLOAD), ("attention", ATTENTION)):
        if getattr(s, name) not in allowed:
            raise ConfigurationError(f"--{name} must be one of {', '.join(allowed)}, got {getattr(s, name)!r}")
    needs = (
        ("mask_image", "image"),
        ("strength", "image"),
        ("control_image", "controlnet"),
        ("controlnet", "control_image"),
    )
    for one, other in needs:
        if getattr(s, one) is not None and getattr(s, other) is None:
            raise ConfigurationError(f"--{one.replace('_', '-')} needs --{other.replace('_', '-')}")
    for name in ("image", "mask_image", "control_image"):
        file = getattr(s, name)
        if file is not None and not Path(file).is_file():
            raise ConfigurationError(f"--{name.replace('_', '-')}: no such file: {file}")
    for entry in s.lora:
        file, _ = split_lora(entry)
        if not Path(file).is_file():
            raise ModelLoadError(f"--lora: no such file: {file}")
        check_weights(Path(file))
    if s.quantize is not None:
        check_quantize(s.quantize)
    if s.runtime is not None and s.runtime not in RUNTIMES:
        raise ConfigurationError(f"--runtime must be one of {', '.join(RUNTIMES)}, got {s.runtime!r}")
    check_transparency(s)
    if s.compare and all(f.redraws for f in s.features.values()) and s.quantize is None:
        raise ConfigurationError(
            "--compare needs a feature to compare with plain diffusers, for example --encoder-reuse, or --quantize"
        )
    if s.compile and s.offload == "sequential":
        raise ConfigurationError("--compile cannot be combined with --offload sequential")


def check_transparency(s: Settings) -> None:
    """Refuse what cannot be written, and flags that need transparent pictures."""
    from ..transparency.latent_transparency import LAYERS, LatentTransparency

    feature = s.features.get("transparent")
    transparent = isinstance(feature, LatentTransparency) and feature.views != 0
    for name in ("premultiplied", "preview", "layers"):
        if getattr(s, name) and not transparent:
            raise ConfigurationError(f"--{name} needs --transparent")
    if not transparent:
        return
    assert isinstance(feature, LatentTransparency)
    if s.preview is not None:
        parse_background(s.preview)
    drawn = LAYERS[feature.variant]
    for layer in (s.layers or "").split(",") if s.layers else ():
        if layer.strip() not in drawn:
            raise ConfigurationError(
                f"--layers {layer.strip()}: the variant {feature.variant} draws {', '.join(drawn)}"
            )


def refuse_jpeg(path: Path, what: str = "") -> None:
    """Raise `ConfigurationError` for a file type that has no alpha."""
    if path.suffix.lower() in (".jpg", ".jpeg"):
        raise ConfigurationError(
            f"{what}{path}: JPEG cannot hold transparency; use .png or .webp (compose makes opaque pictures)"
        )


def parse_background(text: str) -> Any:
    """ "checkerboard", a colour (a name or #rrggbb), or a picture file: None, a tuple, or an image."""
    if text == "checkerboard":
        return None
    from PIL import Image, ImageColor, UnidentifiedImageError

    if Path(text).is_file():
        try:
            with Image.open(text) as image:
                return image.convert("RGBA")
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
            raise ConfigurationError(f"{text} is not an image that can be read") from error
    try:
        return ImageColor.getrgb(text)
    except ValueError as error:
        raise ConfigurationError(
            f"the background {text!r} is neither checkerboard, nor a colour (white, #ff8800), nor a picture file"
        ) from error


def check_numbers(values: dict[str, Any], prefix: str) -> None:
    """Ranges of the numeric settings; `prefix` goes before the name in the message."""

    def refuse(key: str, allowed: str) -> None:
        raise ConfigurationError(f"{prefix}{key.replace('_', '-')} must be {allowed}, got {values[key]}")

    for key in ("width", "height"):
        if values.get(key) is not None and (values[key] < 8 or values[key] % 8):
            refuse(key, "a positive multiple of 8")
    for key in ("steps", "num_images"):
        if values.get(key) is not None and values[key] < 1:
            refuse(key, "at least 1")
    guidance = values.get("guidance_scale")
    if guidance is not None and not (math.isfinite(guidance) and guidance >= 0):
        refuse("guidance_scale", "a finite number of at least 0")
    strength = values.get("strength")
    if strength is not None and not 0 < strength <= 1:
        refuse("strength", "above 0 and at most 1")
    if values.get("seed") is not None and not 0 <= values["seed"] <= MAX_SEED:
        refuse("seed", f"between 0 and {MAX_SEED}")


def split_lora(entry: str) -> tuple[str, float]:
    """`PATH[:SCALE]` as path and scale (1 if none is given)."""
    path, colon, scale = entry.rpartition(":")
    if not colon or Path(entry).is_file():
        return entry, 1.0
    try:
        value = float(scale)
    except ValueError:
        return entry, 1.0
    if not math.isfinite(value):
        raise ConfigurationError(f"--lora: the scale must be a finite number, got {scale!r}")
    return path, value


def read_jobs(prompts: list[str], file: str | None) -> list[Job]:
    """The prompts of the command line, then those of a prompts file (a prompt a line, or JSON objects a line)."""
    jobs = [Job(prompt=p) for p in prompts]
    if file is not None:
        try:
            text = Path(file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise ConfigurationError(f"--prompts-file {file} cannot be read: {reason}") from error
        jsonl = Path(file).suffix in (".jsonl", ".json", ".ndjson")
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                jobs.append(_json_job(line, f"{file}, line {number}") if jsonl else Job(prompt=line.strip()))
    if not jobs:
        raise ConfigurationError("there is no prompt; give one, or --prompts-file")
    for job in jobs:
        if not job.prompt.strip():
            raise ConfigurationError("a prompt is empty")
    return jobs


def _json_job(line: str, where: str) -> Job:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise ConfigurationError(f"{where}: not valid JSON: {error}") from error
    known = {f.name for f in dataclasses.fields(Job)}
    if not isinstance(values, dict) or "prompt" not in values:
        raise ConfigurationError(f'{where}: expected an object with a "prompt"')
    for key in values:
        if key not in known:
            raise ConfigurationError(f"{where}: unknown key {key!r}; the keys are: {', '.join(sorted(known))}")
    values = {k: _typed(k, v, f"{where}: ") for k, v in values.items()}
    check_numbers(values, f"{where}: ")
    return Job(**values)
