"""Tries mutants of one kind of file after the other, and says what was not refused as it should be."""

from __future__ import annotations

import logging
import random
import resource
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusion_accel import AccelerationError

from . import mutate

SECONDS = 5  # that one file may take
MEMORY = 2**30  # bytes by which one file may let the process grow
ROOM = 4 * MEMORY  # of address space, beyond which allocating fails


class Hang(BaseException):
    """A file took longer than `SECONDS`."""


@dataclass
class Kind:
    """A kind of file.

    Attributes:
        make: writes a good one into an empty folder.
        read: reads it as the product does; returns what was read, for comparison.
        files: patterns of the files in the folder that are broken.
        exact: a digest or check covers all of it: what is not refused must read as the good one does.
        judge: says what is wrong with what was read and the lines that were logged, or None.
        mutant: a way of its own to break a file; None: by its suffix.
        special: whether files may be replaced by pipes, devices, links and folders.
        count: mutants in the test suite.
    """

    make: Callable[[Path], Any]
    read: Callable[[Path], Any]
    files: tuple[str, ...] = ("**/*",)
    exact: bool = False
    judge: Callable[[Any, list[str]], str | None] = lambda value, logged: None
    mutant: Callable[[str, bytes, random.Random, list[bytes]], bytes] = mutate.file_mutant
    special: bool = True
    count: int = 300


@dataclass
class Tried:
    """What a run found.

    Attributes:
        inputs, refused, same, other: how many were tried; refused; read as the good one; read as something else, where
            that is allowed.
        faults: of each fault, which mutant and what happened.
    """

    inputs: int = 0
    refused: int = 0
    same: int = 0
    other: int = 0
    faults: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.inputs} inputs, {self.refused} refused, {self.same} read alike, {self.other} read otherwise, "
            f"{len(self.faults)} faults"
        )


def fuzz(
    name: str,
    kind: Kind,
    folder: Path,
    *,
    seed: int = 0,
    first: int = 0,
    count: int | None = None,
    seconds: float | None = None,
    save: Path | None = None,
    tell: Callable[[int], None] = lambda number: None,
) -> Tried:
    """Try mutants `first`, `first` + 1, … of `seed`; each is the same every time.

    Args:
        name: of the kind.
        kind: the kind.
        folder: an empty folder to work in.
        seed: of the mutants.
        first: the number of the first one.
        count: of mutants; None: until `seconds` have passed.
        seconds: to go on for.
        save: where faulty inputs are kept, each in a folder of its own.
        tell: called with the number of each mutant before it is tried.
    """
    good = folder / "good"
    good.mkdir(parents=True)
    kind.make(good)
    files = {
        str(f.relative_to(good)): f.read_bytes()
        for pattern in kind.files
        for f in sorted(good.glob(pattern))
        if f.is_file()
    }
    place = folder / "mutant"
    shutil.copytree(good, place)
    with _logged() as logged:
        expected = kind.read(place)
        wrong = kind.judge(expected, logged)
        assert wrong is None, f"the good {name} is refused: {wrong}"
        found = Tried()
        began = time.monotonic()
        number = first
        while number - first < count if count is not None else time.monotonic() - began < (seconds or 0):
            rng = random.Random(f"{name} {seed} {number}")
            changed = _break(place, files, rng, kind)
            del logged[:]
            tell(number)
            fault = _try(kind, place, expected, logged, found)
            found.inputs += 1
            if fault is not None:
                found.faults.append(f"{name} --seed {seed} --first {number} --count 1 ({', '.join(changed)}): {fault}")
                if save is not None:
                    shutil.copytree(place, save / f"{name}-{seed}-{number}", symlinks=True, dirs_exist_ok=True)
            for file in changed:
                _put_back(place / file, files[file])
            number += 1
    shutil.rmtree(folder)
    return found


def _break(place: Path, files: dict[str, bytes], rng: random.Random, kind: Kind) -> list[str]:
    """Break one file, sometimes two; returns which."""
    changed = rng.sample(sorted(files), min(len(files), rng.choice((1, 1, 1, 1, 2))))
    for name in changed:
        if kind.special and rng.random() < 0.04:
            mutate.replace_by_another_kind(place / name, rng)
        else:
            _put_back(place / name, kind.mutant(name, files[name], rng, list(files.values())))
    return changed


def _put_back(file: Path, data: bytes) -> None:
    """Write a file anew: what was read from the old one may still be mapped into memory."""
    if file.is_dir() and not file.is_symlink():
        file.rmdir()
    else:
        file.unlink(missing_ok=True)
    file.write_bytes(data)


def _try(kind: Kind, place: Path, expected: Any, logged: list[str], found: Tried) -> str | None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with _alarm(), _room():
            value = kind.read(place)
    except AccelerationError as error:
        found.refused += 1
        text = str(error)
        if "\n" in text or not text.strip():
            return f"not one line: {text[:300]!r}"
        return _memory(before)
    except Hang:
        return f"longer than {SECONDS} s"
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} at {where.filename}:{where.lineno}: {str(error)[:200]!r}"
    wrong = kind.judge(value, logged)
    if wrong is not None:
        return wrong
    if value == expected:
        found.same += 1
    elif kind.exact:
        return "read, but not as the good one"
    else:
        found.other += 1
    return _memory(before)


def _memory(before: int) -> str | None:
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return f"took {grown / 2**30:.1f} GB" if grown > MEMORY else None


@contextmanager
def _room() -> Iterator[None]:
    """An allocation beyond all bounds fails, instead of bringing the machine down."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextmanager
def _alarm() -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _logged() -> Iterator[list[str]]:
    """The lines that the product logs, instead of the terminal."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger, handler = logging.getLogger("diffusion_accel"), Keep(logging.WARNING)
    before = logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.propagate = before
