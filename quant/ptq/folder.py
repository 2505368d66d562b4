"""The folder of a run that is not finished: one process at a time, and settings that must agree with those it began
with."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from diffusion_accel.errors import ConfigurationError, DamagedStateError, OutputError
from diffusion_accel.io import plain, read_json, replacing

_LOCK, _SETTINGS, _LOG = "lock", "settings.json", "log.jsonl"
_OLD_NAMES = {"seed of the pictures": "seed of the images"}  # of settings, in the folders of earlier versions
_HELD: dict[Path, int] = {}  # folders that threads of this process hold


@contextmanager
def held(work: Path, what: str = "quantize") -> Iterator[None]:
    """Have the folder `work` for oneself. When it ends, a folder in which nothing was done is gone.

    The lock is the system's, so that the one of a process that was killed is free; a thread may hold a folder twice.
    `what` may hold it, for the message.

    Raises:
        OutputError: somebody else holds it, or it cannot be written.
    """
    place = work.absolute()
    if _HELD.get(place) == threading.get_ident():
        yield
        return
    try:
        lock = _take(work, what)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"cannot write to {work}: {error.strerror or error}") from error
    _HELD[place] = threading.get_ident()
    try:
        yield
    finally:
        del _HELD[place]
        (work / _LOCK).unlink(missing_ok=True)
        os.close(lock)
        if work.is_dir() and not any(f.is_file() and f.name not in (_SETTINGS, _LOG) for f in work.rglob("*")):
            shutil.rmtree(work, ignore_errors=True)


def _take(work: Path, what: str) -> int:
    file = work / _LOCK
    while True:
        work.mkdir(parents=True, exist_ok=True)
        lock = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise OutputError(
                f"{work} is in use by another {what} ({_holder(file)}); wait for it, end it, or name another output"
            ) from None
        except OSError:  # a file system without locks
            pass
        try:
            same = os.fstat(lock).st_ino == file.stat().st_ino
        except FileNotFoundError:
            same = False
        if same:  # else its last holder has just taken it away
            break
        os.close(lock)
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    os.ftruncate(lock, 0)
    os.pwrite(lock, json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}).encode(), 0)
    return lock


def _holder(file: Path) -> str:
    try:
        told = read_json(file, error=ConfigurationError)
        return f"process {plain(told['pid'])} on {plain(told['host'])}, since {plain(told['since'])}"
    except (ConfigurationError, KeyError, TypeError):
        return "a process that has just begun"


def clear(work: Path) -> None:
    """Forget everything in a folder that one holds. Raises `OutputError` where it is no run's."""
    _check_ours(work)
    for entry in work.iterdir():
        if entry.name == _LOCK:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def agree(work: Path, wanted: dict[str, Any]) -> None:
    """Note what a run is asked for, or check that it is what the folder's run was asked for.

    Raises:
        OutputError: the folder holds something else than a run: at the end of one it is removed.
        ConfigurationError: it is not, with the settings that differ.
    """
    file = work / _SETTINGS
    wanted = json.loads(json.dumps(wanted))
    if not file.is_file():
        _check_ours(work)
        write(file, wanted)
        return
    before, now = _flat(read(file)), _flat(wanted)
    before = {_OLD_NAMES.get(key, key): value for key, value in before.items()}
    different = [key for key in {**now, **before} if before.get(key) != now.get(key)]
    if different:
        told = [_told(key, before.get(key), now.get(key)) for key in different[:3]]
        more = f" and {len(different) - 3} more" if len(different) > 3 else ""
        raise ConfigurationError(
            f"{work} holds a run with other settings or another model: {', '.join(told)}{more}; forget it (restart), "
            "or name another output"
        )


def _check_ours(work: Path) -> None:
    if not (work / _SETTINGS).exists() and (others := sorted({entry.name for entry in work.iterdir()} - {_LOCK, _LOG})):
        raise OutputError(f"{work} holds {plain(others[0])}, which is of no run; move it away, or name another output")


def _flat(values: Any, name: str = "") -> dict[str, Any]:
    """Settings by name; of tables within tables the names that lead to them."""
    if not isinstance(values, dict):
        return {name: values}
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{name}.{key}" if name else str(key))
    return found


def _told(key: str, before: Any, now: Any) -> str:
    simple = all(isinstance(v, (int, float, str, type(None))) and len(str(v)) < 40 for v in (before, now))
    return f"{key} ({plain(before)} then, {plain(now)} now)" if simple else key


def write(file: Path, values: Any) -> None:
    """Write JSON."""
    with replacing(file) as temporary:
        temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def read(file: Path) -> Any:
    """Read JSON of a run. Raises `ConfigurationError` if it is damaged."""
    try:
        return read_json(file)
    except ConfigurationError as error:
        raise ConfigurationError(f"{error}; forget the run (restart)") from error


def load(file: Path) -> dict[str, Any]:
    """Read tensors of a run. Raises `ConfigurationError` if they are damaged."""
    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise DamagedStateError(f"{file} is damaged; forget the run (restart)") from error


def read_values(file: Path) -> dict[str, Any]:
    """What a stage has kept: a table of JSON values, or tensors. Raises `ConfigurationError` if it is damaged."""
    return read(file) if file.suffix == ".json" else load(file)


def write_values(file: Path | None, values: dict[str, Any]) -> None:
    """Keep what a stage has made, whole or not at all; without a file, nothing is."""
    if file is None:
        return
    if file.suffix == ".json":
        write(file, values)
        return
    with replacing(file) as temporary:
        save_file(values, temporary)
