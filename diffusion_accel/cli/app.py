"""The commands of `diffusion-accel`."""

from __future__ import annotations

from inspect import cleandoc
from typing import Annotated, Any

import typer

from diffusion_accel import __version__
from diffusion_accel.registry import FEATURES

from . import (
    accelerate,
    bench,
    estimate,
    evaluate,
    features,
    generate,
    info,
    inspect,
    metadata,
    models,
    quantize,
    serve,
    transparency,
    tune,
)
from .common_options import with_debug, with_defaults
from .feature_flags import join_bare_flags
from .old_names import in_todays_names

app = typer.Typer(
    name="diffusion-accel",
    help="Generate images with any diffusers pipeline, faster, and see what that cost.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _flowing(text: str) -> str:
    """Paragraphs without the line ends of the source: the help would break there, too, beside its own width."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in cleandoc(text).split("\n\n"))


for _command in (
    generate.generate,
    serve.serve,
    accelerate.accelerate,
    tune.tune,
    quantize.quantize,
    inspect.inspect,
    bench.bench,
    estimate.estimate,
    evaluate.evaluate,
    transparency.compose,
    transparency.cutout,
    metadata.metadata,
    models.models,
    features.features,
    info.info,
):
    app.command(help=_flowing(_command.__doc__ or ""))(with_defaults(with_debug(_command)))


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"diffusion-accel {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def flags_of(arguments: list[str]) -> dict[str, str]:
    """The flags of the command that `arguments` call, by the name that the library has for them; without features'."""
    group: Any = typer.main.get_command(app)
    found = group.commands.get(next((word for word in in_todays_names(arguments) if not word.startswith("-")), ""))
    flags = [flag for param in getattr(found, "params", ()) for flag in param.opts if flag.startswith("--")]
    named = {flag.removeprefix("--").replace("-", "_"): flag for flag in flags}
    return {name: flag for name, flag in named.items() if name not in FEATURES}


def command(arguments: list[str]) -> Any:
    """Run one command; returns its exit code, if it has one."""
    try:
        return typer.main.get_command(app).main(
            args=join_bare_flags(in_todays_names(arguments)), prog_name="diffusion-accel", standalone_mode=False
        )
    except typer.Exit as stop:
        return stop.exit_code
    except typer.Abort:
        raise KeyboardInterrupt from None
