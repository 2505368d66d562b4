"""A process that is interrupted ends at once and tidily: nothing half-written stays, one line says what was written.

By itself Python raises KeyboardInterrupt in the main thread, wherever that is: inside a library that swallows it or
prints a traceback, or much later, when a long computation in C returns; other signals end the process without a word.
Here a thread hears the signals (the interpreter writes their numbers to a pipe at once), removes what is half-written,
ends the processes that this one started, says the line and ends the process. Only programs call `install`; everything
else here also works without it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from contextlib import contextmanager

TYPE_CHECKING = False  # what is imported here delays the moment from which signals are heard
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path  # late: signals are heard first
    from typing import Any

    Say = Callable[[str, int], object]

SIGNALS = tuple(int(getattr(signal, n)) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n))
INTERRUPTED = 128 + signal.SIGINT  # exit code
_PR_SET_PDEATHSIG = 1

_lock = threading.RLock()  # held where the process must not end; taken for good by what ends it
_unfinished: set[Path] = set()
_written: list[Path] = []
_helpers: set[Any] = set()
_explain: Callable[[], str] | None = None
_postponed: list[Postponed] = []
_installed: Say | None = None  # how the last line is said
_before: dict[int, Any] = {}
_masks: dict[int, Any] = {}


# ---------------------------------------------------------------------- what a sudden end has to know
@contextmanager
def unfinished(path: Path) -> Iterator[Path]:
    """A file or folder that is being written: whatever is still there at the end, also a sudden one, is removed."""
    with _lock:
        _unfinished.add(path)
    try:
        yield path
    finally:
        with _lock:
            _remove(path)
            _unfinished.discard(path)


@contextmanager
def undivided() -> Iterator[None]:
    """Steps between which the process does not end suddenly, such as two renames. Keep them short."""
    with _lock:
        yield


def finish(temporary: Path, path: Path) -> None:
    """Give a file that is complete its name."""
    with _lock:
        os.replace(temporary, path)  # noqa: PTH105 - paths of either kind
        if path not in _unfinished:
            _written.append(path)


def finished() -> set[Path]:
    """What was finished since the command began."""
    return set(_written)


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder for as long as it is needed."""
    import tempfile  # late: signals are heard first
    from pathlib import Path  # late: signals are heard first

    with unfinished(Path(tempfile.mkdtemp(prefix="diffusion-accel-"))) as folder:
        yield folder


@contextmanager
def helper(process: Any) -> Iterator[Any]:
    """A process (with `kill`) that must not outlive this one."""
    with _lock:
        _helpers.add(process)
    try:
        yield process
    finally:
        with _lock:
            _helpers.discard(process)


def begin() -> None:
    """A command begins: nothing was written yet."""
    global _explain
    _written.clear()
    _explain = None


def explain(text: Callable[[], str]) -> None:
    """From now on an interrupt says so what was written and how to go on; before, it names the files."""
    global _explain
    _explain = text


@contextmanager
def explaining(text: Callable[[], str]) -> Iterator[None]:
    """`explain` for a while."""
    global _explain
    before, _explain = _explain, text
    yield
    _explain = before  # not after KeyboardInterrupt, which is still to be explained


def explanation() -> str:
    """What was written, and how to go on."""
    return names() if _explain is None else _explain()


def how_to_go_on(work: Path, kept: bool) -> str:
    """What is said at the end of something that goes on when it is called again, if its state was `kept` in `work`."""
    return f"call it again to go on from here ({work})" if kept else names()


def names() -> str:
    """What was written, by name."""
    files = [str(path) for path in dict.fromkeys(_written)]
    if len(files) > 3:
        return f"{len(files)} files were written, the last one is {files[-1]}"
    return f"{' and '.join(files) or 'nothing'} {'were' if len(files) > 1 else 'was'} written"


class Postponed:
    """What `postponed` has received."""

    received: int | None = None


@contextmanager
def postponed() -> Iterator[Postponed]:
    """For a loop that saves its state and stops: a first signal is only noted, a second one acts as usual."""
    state = Postponed()
    before: dict[int, Any] = {}

    def note(number: int, _frame: object) -> None:
        state.received = number
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    if _installed is None and threading.current_thread() is threading.main_thread():
        before.update({n: signal.signal(n, note) for n in SIGNALS if signal.getsignal(n) is not signal.SIG_IGN})
    _postponed.append(state)
    try:
        yield state
    finally:
        _postponed.remove(state)
        restore()


# ---------------------------------------------------------------------- the end
def install(say: Say) -> None:
    """From now on SIGINT, SIGTERM and SIGHUP end this process; those that it was started to ignore stay ignored.

    Args:
        say: prints one line, given with the exit code; called in another thread.
    """
    global _installed
    if _installed is not None:
        _installed = say
        return
    heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    receiving, sending = os.pipe()
    os.set_blocking(sending, False)
    _installed = say
    signal.set_wakeup_fd(sending, warn_on_full_buffer=False)
    for number in heard:
        _before[number] = signal.signal(number, _heard)
    threading.Thread(target=_listen, args=(receiving, frozenset(heard)), daemon=True, name="interrupts").start()


def follow(descriptor: int) -> None:
    """End this process when the other end of this pipe is closed: the process that holds it has ended."""

    def wait() -> None:
        with contextlib.suppress(OSError):
            while os.read(descriptor, 1):
                pass
        _end("the process that started this one has ended", 1)

    with contextlib.suppress(OSError, AttributeError, ImportError):  # Linux: a process that is stopped must hear of it
        import ctypes  # late: signals are heard first

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGCONT), 0, 0, 0)
    threading.Thread(target=wait, daemon=True, name="follow").start()


def last_word() -> None:
    """The process is about to say why it ends: from here on no signal says something else."""
    if _installed is not None:
        _lock.acquire()


def write_line(text: str) -> None:
    """A line on stderr, past all buffers and locks, in place of a progress bar; given up if nobody reads."""
    import select  # late: signals are heard first

    with contextlib.suppress(OSError, ValueError):
        clear = "\r\x1b[K\x1b[?25h" if os.isatty(2) and os.environ.get("TERM", "dumb") != "dumb" else ""
        if select.select([], [2], [], 1.0)[1]:
            os.write(2, f"{clear}{text}\n".encode(errors="backslashreplace"))


def _heard(number: int, frame: object) -> None:
    """Does nothing: the number is in the pipe."""


def _listen(receiving: int, heard: frozenset[int]) -> None:
    while True:
        for number in os.read(receiving, 64):
            if number not in heard:
                continue
            waiting = _postponed[-1] if _postponed else None
            if waiting is not None and waiting.received is None:
                waiting.received = number
            else:
                _end("interrupted", 128 + number)


def _end(reason: str, code: int) -> None:
    _lock.acquire()
    text = reason
    with contextlib.suppress(Exception):
        text = f"{reason}; {explanation()}"
    for process in list(_helpers):
        with contextlib.suppress(OSError):
            process.kill()
    for path in list(_unfinished):
        _remove(path)
    with contextlib.suppress(Exception):
        (_installed or _say)(text, code)
    os._exit(code)


def _say(text: str, _code: int) -> None:
    write_line(f"error: {text}")


def _remove(path: Path) -> None:
    import shutil  # late: signals are heard first

    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _before_fork() -> None:
    """A signal that a fork receives before it has forgotten this one's pipe would end this one."""
    if _installed is not None:
        _masks[threading.get_ident()] = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _after_fork() -> None:
    mask = _masks.pop(threading.get_ident(), None)
    if mask is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _in_fork() -> None:
    """A fork is another program: it hears signals as before, and tidies up nothing."""
    global _installed, _lock
    _lock = threading.RLock()
    for known in (_unfinished, _written, _helpers, _postponed):
        known.clear()
    if _installed is not None:
        _installed = None
        signal.set_wakeup_fd(-1)
        for number, handler in _before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
    _after_fork()


if sys.platform != "win32":
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_in_fork)
