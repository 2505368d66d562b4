"""The command `diffusion-accel`: the one place that turns errors and signals into a line and an exit code.

It imports next to nothing at first: signals are to be heard before anything else is loaded.
"""

from __future__ import annotations

import gc
import os
import sys

from diffusion_accel import interrupts
from diffusion_accel.errors import AccelerationError

_TEXTS = ("--negative-prompt", "--class", "--token")  # options whose values are no places

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn


def run(arguments: list[str] | None = None) -> None:
    """`main`, as a process of its own.

    Importing torch and diffusers makes half a million objects that all stay: looking for garbage among them takes a
    second on the way, and two more at the end.
    """
    interrupts.install(_say_at_first)
    from . import processes  # after signals are heard

    processes.follow()
    interrupts.install(_say_interrupted)
    from . import terminal  # after signals are heard

    gc.set_threshold(10_000)
    for stream in (sys.stdout, sys.stderr):
        terminal.set_up_stream(stream)
    try:
        main(arguments)
    except SystemExit as stop:
        if stop.code and processes.joined:  # other threads are about to say at length that the job has ended
            _end_at_once(int(stop.code))
        raise
    finally:
        gc.freeze()


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 wrong usage, 130 interrupted (128 + signal). `--debug` shows
    tracebacks."""
    arguments = at_home(list(sys.argv[1:] if arguments is None else arguments))
    from . import processes, terminal  # after signals are heard

    processes.begin(arguments)
    interrupts.begin()
    debug = "--debug" in arguments
    terminal.show_warnings()
    if not debug:
        _quiet_libraries()
    try:
        from . import app  # after signals are heard and libraries are quiet

        code = app.command(arguments)
        if code == interrupts.INTERRUPTED:  # what the argument parser makes of KeyboardInterrupt
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        code = _fail(f"interrupted; {interrupts.explanation()}", interrupts.INTERRUPTED)
    except BrokenPipeError:  # the reader of our output went away
        code = _nobody_reads()
    except AccelerationError as error:
        if debug:
            raise
        from . import app, errors  # after signals are heard

        code = _fail(errors.in_flags(str(error), app.flags_of(arguments)), errors.exit_code(error), error.consequence)
    except OSError as error:
        if debug:
            raise
        where = f"{error.filename}: " if error.filename is not None else ""
        code = _fail(f"{where}{error.strerror or error}", 1)
    except Exception as error:
        if hasattr(error, "format_message"):  # a usage error of the argument parser
            if type(error).__name__ == "NoArgsIsHelpError":
                app.typer.echo(error.format_message())  # the help, with its colours
            else:
                _fail(error.format_message(), 2)
            sys.exit(2)
        if debug:
            raise
        code = _fail(f"{type(error).__name__}: {error} (--debug shows where)", 1)
    sys.exit(code if isinstance(code, int) else 0)


def at_home(arguments: list[str]) -> list[str]:
    """`--output=~/x` and `--output "~/x"` in the home folder, as `--output ~/x` is: a shell leaves a ~ behind "=" or in
    quotes as it is, and a folder of that name would be made."""
    end = arguments.index("--") if "--" in arguments else len(arguments)

    def expanded(before: str, argument: str) -> str:
        name, equals, value = argument.partition("=") if argument.startswith("--") else (before, "", argument)
        is_option = name.startswith("-") and "=" not in name and name not in _TEXTS
        if not is_option or not (value == "~" or value.startswith("~/")):
            return argument
        place = os.path.expanduser(value)  # noqa: PTH111 (an end "/" stays)
        return f"{name}={place}" if equals else place

    return [expanded(*pair) for pair in zip(["", *arguments], arguments[:end], strict=False)] + arguments[end:]


def _fail(message: str, code: int, consequence: bool = False) -> int:
    """Say what went wrong: on the terminal, or to the process that started this one and others."""
    from . import processes, terminal  # after signals are heard

    interrupts.last_word()
    message = terminal.printable(" ".join(message.split()))
    message = message if len(message) <= terminal.LIMIT else f"{message[: terminal.LIMIT - 1]}…"
    if not processes.leave_message(message, code, consequence):
        terminal.say(f"error: {processes.name()}{message}", err=True)
    return code


def _say_at_first(message: str, _code: int) -> None:
    if not {"DIFFUSION_ACCEL_JOB", "TORCHELASTIC_RUN_ID"} & {*os.environ}:  # one of several: others say it
        interrupts.write_line(f"error: {message}")


def _say_interrupted(message: str, code: int) -> None:
    from . import processes  # after signals are heard

    message = processes.printable(message)
    if not processes.leave_message(message, code) and processes.speaks() and not processes.by_torchrun():
        interrupts.write_line(f"error: {message}")


def _nobody_reads() -> int:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(nowhere, stream.fileno())
    return 1


def _end_at_once(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _quiet_libraries() -> None:
    """Keep the libraries' own logging off the terminal; errors still arrive as exceptions."""
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY", "HF_HUB_VERBOSITY"):
        os.environ.setdefault(name, "error")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    import warnings  # after signals are heard

    warnings.simplefilter("ignore")
