"""What processes that share a folder tell each other: who draws what, by locks, and what became of it, by log files."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffusion_accel.errors import ConfigurationError, OutputError
from diffusion_accel.io import parse_json

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class Claims:
    """Locks on the bytes of an empty file. The system gives them back when a process ends, however it does.

    They hold between the processes of one machine, and between machines where the file system has locks (NFS, Lustre,
    CephFS, …). They do not hold within a process.

    Args:
        file: is made if it is not there.

    Raises:
        ConfigurationError: this system has no such locks.
        OutputError: the file cannot be opened.
    """

    def __init__(self, file: Path) -> None:
        if fcntl is None:
            raise ConfigurationError("prompts are shared with POSIX file locks, which this system does not have")
        self.file = file
        try:
            self._descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise OutputError(f"{file} cannot be opened: {error.strerror}") from error

    def take(self, number: int, *, wait: bool = False) -> bool:
        """Claim a number from 0. False: another process has it; with `wait` this waits until it has given it back.

        Raises:
            OutputError: the file system has no locks.
        """
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, number)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            raise OutputError(
                f"{self.file} cannot be locked ({error.strerror}); use a folder on a file system with locks"
            ) from error
        return True

    def give_back(self, number: int) -> None:
        """Let others claim it."""
        fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, number)

    def close(self) -> None:
        """Give back all."""
        os.close(self._descriptor)


class Events:
    """What the processes have done since this one began: a file of JSON lines for each of them, in one folder.

    Args:
        folder: where the files are.
        name: of this process, in every line of its own.
    """

    def __init__(self, folder: Path, name: str) -> None:
        host = re.sub(r"[^\w.-]", "-", socket.gethostname())[:60]
        self.folder, self.name = folder, name
        self._own = folder / f"{host}-{os.getpid()}-{secrets.token_hex(4)}.jsonl"
        self._read = {file: file.stat().st_size for file in self._files()}

    def add(self, **values: Any) -> None:
        """Write a line."""
        line = json.dumps({"process": self.name, **values}) + "\n"
        descriptor = os.open(self._own, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)

    def news(self) -> Iterator[dict[str, Any]]:
        """The lines that were written since the last time, those of this process too. What is no line is left out."""
        for file in self._files():
            with file.open("rb") as opened:
                opened.seek(self._read.get(file, 0))
                text = opened.read()
            whole = text[: text.rfind(b"\n") + 1]
            self._read[file] = self._read.get(file, 0) + len(whole)
            for line in whole.decode(errors="replace").splitlines():
                try:
                    values = parse_json(line, file.name)
                except ConfigurationError:  # of a process that ended while it wrote
                    continue
                if isinstance(values, dict):
                    yield values

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("*.jsonl"))
