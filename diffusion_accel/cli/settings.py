"""The settings of `generate`: merged from the model's recommendations, a configuration file and flags, and checked.

Everything here is checked before torch or a model is loaded.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusion_accel.errors import ConfigurationError, ModelLoadError
from diffusion_accel.feature import Feature
from diffusion_accel.io import first_line, is_there, parse_json, read_json, read_text, read_toml, shown, split_lines
from diffusion_accel.model_files.names import ModelSource, check_weights, find_model
from diffusion_accel.pipelines.quantizers import check_quantize
from diffusion_accel.pipelines.schedulers import check_scheduler
from diffusion_accel.registry import FEATURES

from .feature_flags import parse_feature

MAX_SEED = 2**63 - 1
MAX_TEXT = 1_000_000  # characters of a prompt
MAX_IMAGES = 10_000  # of one command
MAX_SCALE = 1000  # of a LoRA
_MAY_BE_EMPTY = ("prompt", "negative_prompt", "output")  # or are refused with words of their own
DTYPES = ("float32", "bfloat16", "float16")
OFFLOAD = ("none", "model", "sequential")
ATTENTION = ("sdpa", "xformers")
RUNTIMES = ("auto", "integer", "dequantize", "simulated")


@dataclass(frozen=True)
class Bounds:
    """What a number may be: a test (`value in bounds`), and in words."""

    low: float
    high: float
    words: str
    step: int = 0

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high and (not self.step or value % self.step == 0)  # False for nan

    def allowed(self, value: float) -> str:
        """The words for an error about `value`: without the upper end where it is only too low."""
        return self.words.partition(" and at most ")[0] if not self.step and value < self.low else self.words

    @property
    def short(self) -> str:
        """For the help."""
        return f"{self.low:.10g} to {self.high:.10g}" + (f", a multiple of {self.step}" if self.step else "")


def at_least(low: int, high: int) -> Bounds:
    """Whole numbers from `low` to `high`."""
    return Bounds(low, high, f"at least {low} and at most {high}")


SIZE = Bounds(8, 32_768, "a positive multiple of 8 and at most 32768", 8)
LIMITS: dict[str, Bounds] = {
    "width": SIZE,
    "height": SIZE,
    "steps": at_least(1, 10_000),
    "num_images": at_least(1, MAX_IMAGES),
    "guidance_scale": Bounds(0, 1000, "a finite number of at least 0 and at most 1000"),
    "strength": Bounds(math.ulp(0), 1, "above 0 and at most 1"),
    "seed": Bounds(0, MAX_SEED, f"between 0 and {MAX_SEED}"),
}


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
    paths: bool = False
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
    known = {f.name for f in dataclasses.fields(Settings)} - {"features"} | set(FEATURES) | {"prompt", "prompts_file"}
    for key in values:
        if key not in known:
            raise ConfigurationError(f"{what}: unknown key {shown(key)}; the keys are: {', '.join(sorted(known))}")
    prompts = values.get("prompt", [])
    if not isinstance(prompts, str) and not (isinstance(prompts, list) and all(isinstance(p, str) for p in prompts)):
        raise ConfigurationError(f"{what}: prompt must be a text or a list of texts, got {shown(prompts)}")
    if "prompts_file" in values:
        _typed("prompts_file", values["prompts_file"], f"{what}: ")
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
        ("compile", "overwrite", "metadata", "paths", "compare", "premultiplied", "allow_pickle", "low_memory"),
        bool,
    ),
}


def _typed(key: str, value: Any, where: str = "") -> Any:
    """`value` as the setting's type; for values from files, which may hold anything."""
    flag = f"{where}{key}"
    if key == "lora":
        if not isinstance(value, (list, tuple)) or not all(isinstance(v, str) for v in value):
            raise ConfigurationError(f"{flag} must be a list of texts PATH[:SCALE], got {shown(value)}")
        return tuple(_text(v, flag) for v in value)
    kind = _TYPES.get(key, str)
    if kind is float and type(value) is int and value.bit_length() < 1000:
        value = float(value)
    if type(value) is not kind:
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
        raise ConfigurationError(f"{flag} must be {words[kind]}, got {shown(value)}")
    if value == "" and key not in _MAY_BE_EMPTY:
        raise ConfigurationError(f"{flag.replace('_', '-')} is empty")
    return _text(str(value), flag) if kind is str else value


def _text(value: str, flag: str) -> str:
    if "\0" in value or len(value) > MAX_TEXT:
        what = "no character NUL" if "\0" in value else f"at most {MAX_TEXT} characters"
        raise ConfigurationError(f"{flag} must have {what}, got {shown(value)}")
    return value


def check(settings: Settings) -> None:
    """Refuse what cannot work."""
    s = settings
    check_numbers(dataclasses.asdict(dataclasses.replace(s, features={})), "--")
    if s.seed is not None and s.seed > MAX_SEED - s.num_images + 1:
        raise ConfigurationError(f"--seed {s.seed} with --num-images {s.num_images} goes beyond {MAX_SEED}")
    check_text(s.negative_prompt, "negative prompt")
    check_strength(s)
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
        if file is not None and not is_there(Path(file), "file"):
            raise ConfigurationError(f"--{name.replace('_', '-')}: no such file: {file}")
    for entry in s.lora:
        file, _ = split_lora(entry)
        if not is_there(Path(file), "file"):
            raise ModelLoadError(f"--lora: no such file: {file}")
        check_weights(Path(file))
    if s.quantize is not None:
        check_quantize(s.quantize)
    if s.runtime is not None and s.runtime not in RUNTIMES:
        raise ConfigurationError(f"--runtime must be one of {', '.join(RUNTIMES)}, got {s.runtime!r}")
    check_transparency(s)
    if s.compare and all(f.changes_output for f in s.features.values()) and s.quantize is None:
        raise ConfigurationError(
            "--compare needs a feature to compare with plain diffusers, for example --encoder-reuse, or --quantize"
        )
    if s.compile and s.offload == "sequential":
        raise ConfigurationError("--compile cannot be combined with --offload sequential")


def check_features(s: Settings) -> None:
    """Refuse features that cannot do so many steps. Without `steps` only the pipeline knows them."""
    for feature in s.features.values():
        if s.steps is not None and (reason := feature.unfit_for(s.steps, s.scheduler or "")):
            raise ConfigurationError(f"{feature.flag()} with --steps {s.steps}: {reason}")


def check_images(s: Settings) -> None:
    """Refuse files that hold no image that can be read: opened here, so that it is said before a model is loaded."""
    for name in ("image", "mask_image", "control_image"):
        if getattr(s, name) is not None:
            from diffusion_accel.images import loaded

            with loaded(getattr(s, name), what=f"--{name.replace('_', '-')}"):
                pass


def check_strength(s: Settings) -> None:
    """Refuse a strength at which no step is left to run. Without `strength` or `steps` only the pipeline knows them."""
    if s.strength is not None and s.steps is not None and int(s.steps * s.strength) < 1:
        raise ConfigurationError(
            f"--strength {s.strength:g} of {s.steps} steps leaves no step to run; use --strength "
            f"{math.ceil(1000 / s.steps) / 1000:g} or more, or --steps {math.ceil(1 / s.strength)} or more"
        )


def check_transparency(s: Settings) -> None:
    """Refuse what cannot be written, and flags that need transparent images."""
    from diffusion_accel.transparency.latent_transparency import LAYERS, LatentTransparency

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
    for layer in s.layers.split(",") if s.layers is not None else ():
        if layer.strip() not in drawn:
            raise ConfigurationError(
                f"--layers {layer.strip()}: the variant {feature.variant} draws {', '.join(drawn)}"
            )


def refuse_jpeg(path: Path, what: str = "") -> None:
    """Raise `ConfigurationError` for a file type that has no alpha."""
    if path.suffix.lower() in (".jpg", ".jpeg"):
        raise ConfigurationError(
            f"{what}{path}: JPEG cannot hold transparency; use .png or .webp (compose makes opaque images)"
        )


def parse_background(text: str) -> Any:
    """ "checkerboard", a colour (a name or #rrggbb), or an image file: None, a tuple, or an image."""
    if text == "checkerboard":
        return None
    from PIL import ImageColor

    if is_there(Path(text), "file"):
        from diffusion_accel.images import open_image

        return open_image(Path(text), "RGBA")
    try:
        return ImageColor.getrgb(text)
    except ValueError as error:
        raise ConfigurationError(
            f"the background {shown(text)} is neither checkerboard, nor a colour (white, #ff8800), nor an image file"
        ) from error


def check_numbers(values: dict[str, Any], prefix: str) -> None:
    """Ranges of the numeric settings; `prefix` goes before the name in the message."""

    for key, bounds in LIMITS.items():
        value = values.get(key)
        if value is not None and value not in bounds:
            name = f"{prefix}{key.replace('_', '-')}"
            raise ConfigurationError(f"{name} must be {bounds.allowed(value)}, got {shown(value)}")


def split_lora(entry: str) -> tuple[str, float]:
    """`PATH[:SCALE]` as path and scale (1 if none is given)."""
    path, colon, scale = entry.rpartition(":")
    if not colon or is_there(Path(entry), "file"):
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


def read_jobs(prompts: list[str], file: str | None, flag: str = "--prompts-file") -> list[Job]:
    """The prompts of the command line, then those of a prompts file (a prompt a line, or JSON objects a line)."""
    jobs = [Job(prompt=p) for p in prompts]
    if file is not None:
        text = read_text(file, flag)
        jsonl = Path(file).suffix.lower() in (".jsonl", ".json", ".ndjson")
        for number, line in enumerate(split_lines(text), 1):
            if line.strip():
                jobs.append(_json_job(line, f"{file}, line {number}") if jsonl else Job(prompt=line.strip()))
    if not jobs:
        raise ConfigurationError(
            f"there is no prompt in {flag} {file}"
            if file is not None
            else "there is no prompt; give one, --class, or --prompts-file"
        )
    for job in jobs:
        if not job.prompt.strip():
            raise ConfigurationError("a prompt is empty")
        for name in ("prompt", "negative_prompt"):
            check_text(getattr(job, name), name.replace("_", " "))
    return jobs


def check_text(text: str | None, what: str) -> None:
    """Raise `ConfigurationError` for a prompt that is no Unicode text, or longer than any model reads."""
    if text is None:
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigurationError(
            f"the {what} {shown(text)} is not valid UTF-8 at character {error.start + 1}; check the encoding of the "
            "terminal or file it comes from"
        ) from error
    if len(text) > MAX_TEXT:
        raise ConfigurationError(f"the {what} has {len(text)} characters; at most {MAX_TEXT} are allowed")


def _json_job(line: str, where: str) -> Job:
    try:
        values = parse_json(line, where, nonfinite=True)
    except ConfigurationError as error:
        raise ConfigurationError(f"{where}: not valid JSON: {first_line(error.__cause__ or error)}") from error
    known = {f.name for f in dataclasses.fields(Job)}
    if not isinstance(values, dict) or "prompt" not in values:
        raise ConfigurationError(f'{where}: expected an object with a "prompt"')
    for key in values:
        if key not in known:
            raise ConfigurationError(f"{where}: unknown key {shown(key)}; the keys are: {', '.join(sorted(known))}")
    values = {k: _typed(k, v, f"{where}: ") for k, v in values.items()}
    check_numbers(values, f"{where}: ")
    return Job(**values)
