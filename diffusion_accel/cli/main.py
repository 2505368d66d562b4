"""The command `diffusion-accel`: the app, and the one place that turns errors into a line and an exit code."""

from __future__ import annotations

import gc
import os
import sys
from typing import Annotated

import typer

from .. import AccelerationError, __version__
from ..io import printable
from ..parallel.launch import leave_message
from . import (
    bench,
    evaluate,
    features,
    generate,
    info,
    inspect,
    metadata,
    models,
    plan,
    processes,
    quantize,
    transparency,
    tune,
)
from .options import join_bare_flags
from .terminal import LIMIT, say, set_up_stream, show_warnings

INTERRUPTED = 130

app = typer.Typer(
    name="diffusion-accel",
    help="Generate images with any diffusers pipeline, faster, and see what that cost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(generate.generate)
app.command()(tune.tune)
app.command()(quantize.quantize)
app.command()(inspect.inspect)
app.command()(bench.bench)
app.command()(plan.plan)
app.command()(evaluate.evaluate)
app.command()(transparency.compose)
app.command()(transparency.cutout)
app.command()(metadata.metadata)
app.command()(models.models)
app.command()(features.features)
app.command()(info.info)


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


def run(arguments: list[str] | None = None) -> None:
    """`main`, as a process of its own.

    Importing torch and diffusers makes half a million objects that all stay: looking for garbage among them takes a
    second on the way, and two more at the end.
    """
    gc.set_threshold(10_000)
    for stream in (sys.stdout, sys.stderr):
        set_up_stream(stream)
    try:
        main(arguments)
    finally:
        gc.freeze()


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 wrong usage, 130 interrupted. `--debug` shows tracebacks."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    processes.command_line[:] = arguments
    debug = "--debug" in arguments
    show_warnings()
    if not debug:
        _quiet_libraries()
    try:
        code = typer.main.get_command(app).main(
            args=join_bare_flags(arguments), prog_name="diffusion-accel", standalone_mode=False
        )
    except typer.Exit as stop:
        code = stop.exit_code
    except (typer.Abort, KeyboardInterrupt):
        code = _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:  # the reader of our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except AccelerationError as error:
        if debug:
            raise
        code = _fail(str(error), error.exit_code, error.consequence)
    except Exception as error:
        if hasattr(error, "format_message"):  # a usage error of the argument parser
            if type(error).__name__ == "NoArgsIsHelpError":
                typer.echo(error.format_message())  # the help, with its colours
            else:
                _fail(error.format_message(), 2)
            sys.exit(2)
        if debug:
            raise
        code = _fail(f"{type(error).__name__}: {error} (--debug shows where)", 1)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int, consequence: bool = False) -> int:
    """Say what went wrong: on the terminal, or as one of several processes only if no other one does."""
    message = printable(" ".join(message.split()))
    message = message if len(message) <= LIMIT else f"{message[: LIMIT - 1]}…"
    others_say = os.environ.get("RANK", "0") != "0" and (code == 2 or consequence)
    if not leave_message(message, code, consequence) and not others_say:
        say(f"error: {message}", err=True)
    return code


def _quiet_libraries() -> None:
    """Keep the libraries' own logging off the terminal; errors still arrive as exceptions."""
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY", "HF_HUB_VERBOSITY"):
        os.environ.setdefault(name, "error")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    import warnings

    warnings.simplefilter("ignore")
