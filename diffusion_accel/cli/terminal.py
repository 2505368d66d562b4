"""What commands print: text from outside never reaches the terminal as it is.

Names of files, metadata of images, class names in a model's files, prompts and error messages may hold escape
sequences, marks that reverse the direction of reading, or rich's markup. Everything a command prints goes through here.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

import typer

from diffusion_accel.io import printable

from .processes import speaks

if TYPE_CHECKING:
    from rich.console import Console

LIMIT = 1500  # characters of an error message
EVERY = 30.0  # seconds between two lines of progress, where stderr is no terminal


def say(text: Any, *, lines: bool = False, err: bool = False) -> None:
    """Print a text; `lines`: its line ends are ours and stay."""
    typer.echo(printable(text, lines=lines), err=err)


def note(text: str) -> None:
    """Print something worth knowing on stderr; of several processes with one image, rank 0 does."""
    if speaks():
        say(f"note: {text}", err=True)


def console(err: bool = False, quiet: bool = False) -> Console:
    """A rich console that prints texts, also those of tables and titles, as text: no markup, nothing unprintable."""
    from rich.console import Console  # 50 ms, for tables only
    from rich.text import Text  # with it

    class SafeConsole(Console):
        def render_str(self, text: str, **options: Any) -> Text:
            options |= {"markup": False, "emoji": False, "highlight": False}
            return super().render_str(printable(text, lines=True), **options)

    return SafeConsole(stderr=err, quiet=quiet, highlight=False, markup=False, emoji=False)


class Bar:
    """A progress bar on stderr; a line every half minute where that is no terminal, so that a log says how far a search
    of an hour is. A `Progress`, in parts of the whole work."""

    def __init__(self, quiet: bool) -> None:
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn  # 60 ms, for long commands only

        shown = console(err=True, quiet=quiet)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            console=shown,
            transient=True,
            disable=quiet or not shown.is_terminal,
        )
        self._lines = not (quiet or shown.is_terminal)
        self._told = time.monotonic()
        self._task = self._progress.add_task("", total=1.0)
        self._progress.start()

    def __call__(self, what: str, share: float = 0.0, left: float | None = None) -> None:
        """Show what is done now, how much of all is done, and the seconds that are left."""
        text = what if left is None or left != left else f"{what}, {_clock(left)} left"
        self._progress.update(self._task, description=printable(text), completed=share)
        if self._lines and time.monotonic() - self._told >= EVERY:
            self._told = time.monotonic()
            say(f"{share:.0%} {text}", err=True)

    def close(self) -> None:
        """Take the bar off the terminal."""
        self._progress.stop()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


class _Lines(logging.Handler):
    """Warnings and notes of this package as lines on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        if not speaks():
            return
        try:
            kind = "note" if record.levelno == logging.INFO else record.levelname.lower()
            say(f"{kind}: {record.getMessage()}", err=True)
        except Exception:
            self.handleError(record)


def show_warnings() -> None:
    """Let warnings of this package appear like everything else that is printed."""
    logger = logging.getLogger("diffusion_accel")
    if not any(isinstance(handler, _Lines) for handler in logger.handlers):
        logger.addHandler(_Lines())


def set_up_stream(stream: Any) -> None:
    """Let no character be one that the terminal's encoding cannot show."""
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")
