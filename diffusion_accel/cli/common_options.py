"""Options that several commands have, each declared once: a type a command's parameter is annotated with.

    def tune(model: Model = None, steps: StepsOr50 = None, count: Annotated[int, count_option(6)] = 24, ...) -> None:

A number's bounds are said in its help and checked when the command line is read; `settings_of` makes settings of what
was given.
"""

from __future__ import annotations

import copy
import functools
import inspect
import re
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer
from typer.models import OptionInfo

from diffusion_accel.errors import ConfigurationError
from diffusion_accel.generation.request import LIMITS, Bounds, at_least
from diffusion_accel.io import shown
from diffusion_accel.model_files.names import EMBEDDED, ModelSource

from .settings import DTYPES, Settings, merge

# numbers that only some commands have; those of `settings.LIMITS` are in every one of them
BATCH = at_least(1, 1024)
ROUNDS = at_least(1, 1000)
SECONDS = Bounds(1, 10_000_000, "at least 1 and at most 10000000")
_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}


# ---------------------------------------------------------------------- what an option allows
def check_range(flag: str, value: float | None, bounds: Bounds) -> None:
    """Raise `ConfigurationError` for a number outside of its bounds."""
    if value is not None:
        bounds.check(value, flag)


def number(text: str, bounds: Bounds, *declarations: str, **options: Any) -> Any:
    """An option for a number or several, whose help says what is allowed, and which refuses others."""

    return bounded(bounds, *declarations, help=f"{text} ({bounds.short})", **options)


def bounded(bounds: Bounds, *declarations: str, **options: Any) -> Any:
    """An option for a number, which refuses those outside of its bounds."""

    def check(param: typer.CallbackParam, value: Any) -> Any:
        for one in value if isinstance(value, (list, tuple)) else [value]:
            check_range(max(param.opts, key=len), one, bounds)
        return value

    return typer.Option(*declarations, callback=check, **options)


def one_of(text: str, names: tuple[str, ...], *declarations: str, **options: Any) -> Any:
    """An option for one of some words; others are refused."""

    def check(param: typer.CallbackParam, value: Any) -> Any:
        if value is not None and value not in names:
            flag = max(param.opts, key=len)
            allowed = " or ".join(names) if len(names) == 2 else f"one of {', '.join(names)}"
            raise ConfigurationError(f"{flag} must be {allowed}, got {shown(value)}")
        return value

    return typer.Option(*declarations, callback=check, help=text, **options)


def seconds(text: str | float) -> float:
    """A time as the command line has it, in seconds: 90, 90s, 20m, 1.5h; a default may be a number."""
    found = re.fullmatch(r"\s*([0-9.eE+-]+|nan|inf)\s*([smh]?)\s*", str(text))
    try:
        return float(found[1]) * _UNITS[found[2]] if found else float("")
    except ValueError:
        raise typer.BadParameter(f"{shown(text)} is no time such as 90 (seconds), 90s, 20m or 1.5h") from None


def time_option(text: str, bounds: Bounds, *declarations: str, **options: Any) -> Any:
    """An option for a time."""
    help_text = f"{text}, such as 90 (seconds), 20m or 1.5h."
    return bounded(bounds, *declarations, metavar="TIME", parser=seconds, help=help_text, **options)


def count_option(low: int = 1, text: str = "How many prompts to use, or images to draw.") -> Any:
    """The option --count: of prompts or images, of which a command needs at least `low`."""
    return number(text, at_least(low, 100_000), "--count")


def recommended(key: str, otherwise: str = "the pipeline's") -> str:
    """What stands for a default where the model has the word."""
    models: dict[Any, list[str]] = {}
    for name, model in EMBEDDED.items():
        if key in model.settings:
            models.setdefault(model.settings[key], []).append(name)
    return ", ".join(f"{value} with {' and '.join(names)}" for value, names in models.items()) + f", else {otherwise}"


def with_defaults(command: Callable[..., None]) -> Callable[..., None]:
    """Let the help say of every option what holds without it: "off" of a switch, "none" where it has no value."""

    def said(parameter: inspect.Parameter) -> inspect.Parameter:
        kind, option = typing.get_args(parameter.annotation)
        wanted = parameter.default is False or parameter.default in (None, "")
        if not isinstance(option, OptionInfo) or not wanted or isinstance(option.show_default, str):
            return parameter
        option = copy.copy(option)
        option.show_default = "off" if kind in (bool, bool | None) else "none"
        return parameter.replace(annotation=Annotated[kind, option])

    return _redeclared(command, said)


def in_panels(panels: dict[str, str]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Sort a command's options under headings of its help.

    Args:
        panels: heading -> the parameters below it, separated by spaces.
    """
    panel_of = {name: panel for panel, names in panels.items() for name in names.split()}

    def sort(command: Callable[..., None]) -> Callable[..., None]:
        def put(parameter: inspect.Parameter) -> inspect.Parameter:
            if (panel := panel_of.get(parameter.name)) is None:
                return parameter
            kind, option = typing.get_args(parameter.annotation)
            option = copy.copy(option)
            option.rich_help_panel = panel
            return parameter.replace(annotation=Annotated[kind, option])

        return _redeclared(command, put)

    return sort


def _redeclared(
    command: Callable[..., None], change: Callable[[inspect.Parameter], inspect.Parameter]
) -> Callable[..., None]:
    """A command whose parameters are declared otherwise."""
    signature = inspect.signature(command, eval_str=True)
    own = [p for p in signature.parameters.values() if len(typing.get_args(p.annotation)) == 2]
    changed = {p.name: change(p) for p in own if typing.get_origin(p.annotation) is Annotated}
    parameters = [changed.get(name, p) for name, p in signature.parameters.items()]
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def settings_of(options: Mapping[str, Any], features: Mapping[str, Any] | None = None) -> tuple[Settings, ModelSource]:
    """What a command's options say about the model and its calls, with defaults from the model, checked.

    Args:
        options: the command's parameters by name (`locals()`); those below are taken, whichever it has.
        features: values of feature flags.

    Raises:
        ConfigurationError, ModelLoadError: for anything that cannot work, before a model is loaded.
    """
    keys = "model steps guidance_scale scheduler seed width height device dtype allow_pickle recipe".split()
    return merge({**{key: options.get(key) for key in keys}, **(features or {})}, {}, restoring=features is not None)


def with_debug(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the switch --debug, which `main` has seen before the command is run."""
    signature = inspect.signature(command, eval_str=True)
    debug = inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Debug)

    @functools.wraps(command)
    def run(*given: Any, **options: Any) -> None:
        options.pop("debug", None)
        command(*given, **options)

    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), debug])  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in run.__signature__.parameters.values()}  # type: ignore[attr-defined]
    return run


# ---------------------------------------------------------------------- options
Model = Annotated[
    str | None,
    typer.Option(
        "--model", "-m", help="Embedded name, hub id, folder, or .safetensors file.", show_default=Settings.model
    ),
]
PromptsFile = Annotated[
    str | None, typer.Option("--prompts-file", metavar="FILE", help="A prompt a line; the embedded model needs none.")
]
Steps = Annotated[int | None, number("Denoising steps.", LIMITS["steps"], show_default=recommended("steps"))]
StepsOr50 = Annotated[int | None, number("Denoising steps.", LIMITS["steps"], show_default=recommended("steps", "50"))]
GuidanceScale = Annotated[
    float | None,
    number(
        "Classifier-free guidance; 1 switches it off.",
        LIMITS["guidance_scale"],
        show_default=recommended("guidance_scale"),
    ),
]
Scheduler = Annotated[
    str | None,
    typer.Option(
        help="ddim, dpm++, euler, unipc, learned, … a diffusers class, also with a spacing (dpm++,lu), or a saved "
        "learned solver.",
        show_default=recommended("scheduler"),
    ),
]
Pixels = Annotated[int | None, number("Pixels.", LIMITS["width"], show_default=recommended("width"))]
Seed = Annotated[int, bounded(LIMITS["seed"], help="Image k uses seed + k.")]
Batch = Annotated[int, number("Images in a call.", BATCH)]
Budget = Annotated[
    float | None,
    time_option(
        "Time for the search", SECONDS, show_default="5m; a family also ends after the work of 4 images a prompt"
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")]
Restart = Annotated[bool, typer.Option("--restart", help="Forget what an interrupted run left.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps, …", show_default="the best one here")]
Dtype = Annotated[str | None, typer.Option(help=", ".join(DTYPES) + ".", show_default=Settings.dtype)]
RecipeOption = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="FILE|FOLDER|off",
        help="What makes the model fast, as pipe.acceleration.save or accelerate wrote it.",
        show_default="the model folder's own",
    ),
]
AllowPickle = Annotated[
    bool | None, typer.Option("--allow-pickle", help="Also load pickled weights, which can run code.")
]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and the libraries' own logs.")]
