"""Where files are to be written: checks that are made before anything is computed, and folders as a whole."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from . import interrupts
from .errors import ConfigurationError, OutputError
from .io import is_there

NAME_LIMIT = 255 - 30  # bytes of a file name; the rest is for what is put around it while the file is written


def output_path(text: str, what: str = "output", suffixes: Iterable[str] = ()) -> Path:
    """A path to write to.

    Args:
        text: the path.
        what: what it is, the first word of an error.
        suffixes: those that must have a name before them.

    Raises:
        ConfigurationError: the text names nothing, or a suffix alone.
    """
    try:
        os.fsencode(text)
    except ValueError as error:
        raise ConfigurationError(f"{what}: {text!r} cannot be the name of a file") from error
    if not text.strip() or "\0" in text:
        raise ConfigurationError(f"{what}: {text!r} cannot be the name of a file")
    if Path(text).name.lower() in suffixes:
        raise ConfigurationError(f"{what}: {text} has nothing before its suffix")
    return Path(text)


def check_free(paths: Sequence[Path], overwrite: bool) -> None:
    """Raise `OutputError` if a path is a folder, exists and may not be replaced, or has a name that is too long."""
    for path in paths:
        if len(os.fsencode(path.name)) > NAME_LIMIT:
            raise OutputError(f"the name of {path} is too long: at most {NAME_LIMIT} bytes")
        if is_there(path, "dir"):
            raise OutputError(f"{path} is a folder")
        if is_there(path) and not overwrite:
            raise OutputError(f"{path} exists; choose another name or pass overwrite=True")


def check_distinct(paths: Sequence[Path]) -> None:
    """Raise `ConfigurationError` if a file would be written twice."""
    twice = next((path for path in paths if paths.count(path) > 1), None) if len(set(paths)) < len(paths) else None
    if twice is not None:
        raise ConfigurationError(f"{twice} would be written twice; give the prompts different outputs")


def check_writable(folder: Path) -> None:
    """Raise `OutputError` unless files can be made in `folder` (or in the nearest parent that exists)."""
    parent = folder.absolute()
    try:
        while not parent.exists():
            parent = parent.parent
        if not parent.is_dir():
            raise OutputError(f"cannot write to {folder}: {parent} is not a folder")
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"cannot write to {folder}: {error.strerror}") from error


def work_folder(folder: Path) -> Path:
    """Where the state of what makes a folder lies until it is done, so that it goes on when it is called again."""
    return folder.with_name(f"{folder.name}.work")


def remove_folder(folder: Path, ignore_errors: bool = False) -> None:
    """Remove a folder with what is in it; of a link to one the link."""
    folder.unlink() if folder.is_symlink() else shutil.rmtree(folder, ignore_errors=ignore_errors)


def check_free_folder(folder: Path, overwrite: bool) -> None:
    """Raise `OutputError` unless a pipeline folder of this name can be written (and, with `overwrite`, replaced)."""
    if folder.is_file():
        raise OutputError(f"{folder} is a file; name a folder")
    if folder.is_symlink() and not folder.exists():
        raise OutputError(f"{folder} is a link to what is not there; remove it, or name another folder")
    if folder.is_dir() and any(folder.iterdir()):
        if not overwrite:
            raise OutputError(f"{folder} exists; choose another name or pass overwrite=True")
        if not (folder / "model_index.json").is_file():
            raise OutputError(f"{folder} is not a pipeline folder, so overwrite=True does not replace it")
    check_writable(folder.absolute().parent)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`; takes the place of `path` at the end, removed after an error. `io.replacing` is
    the same for a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    temporary.chmod(0o755)
    with interrupts.unfinished(temporary):
        yield temporary
        with interrupts.undivided():
            old = path.with_name(f"{temporary.name}.old")
            if path.exists():
                path.rename(old)
            interrupts.finish(temporary, path)
            remove_folder(old, ignore_errors=True)
