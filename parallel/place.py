"""What a launcher (torchrun, accelerate launch, a script) says of this process: which of how many it is."""

from __future__ import annotations

import os
from dataclasses import dataclass

from diffusion_accel.errors import ConfigurationError

_MOST = 100_000  # processes
_HOW = "torchrun sets it for every process; to run without other processes, unset RANK, WORLD_SIZE and LOCAL_RANK"


@dataclass(frozen=True)
class Place:
    """One of `size` processes, number `rank` of them and number `local_rank` on this host."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0


def place() -> Place:
    """The place of this process; of a process that no launcher started, the only one of a job of one.

    Raises:
        ConfigurationError: the environment contradicts itself.
    """
    rank, size = _number("RANK"), _number("WORLD_SIZE", 1)
    if rank is None and size in (None, 1):
        return Place()
    if rank is None or size is None:
        given, missing = ("RANK", "WORLD_SIZE") if size is None else ("WORLD_SIZE", "RANK")
        raise ConfigurationError(f"{given}={os.environ[given]} is set in the environment, but {missing} is not; {_HOW}")
    if rank >= size:
        raise ConfigurationError(f"RANK={rank} must be below WORLD_SIZE={size}; {_HOW}")
    local, beside = _number("LOCAL_RANK"), _number("LOCAL_WORLD_SIZE", 1)
    if local is not None and local >= min(size, beside or size):
        name = "WORLD_SIZE" if beside is None or beside > size else "LOCAL_WORLD_SIZE"
        raise ConfigurationError(f"LOCAL_RANK={local} must be below {name}={os.environ[name]}; {_HOW}")
    return Place(rank, size, local or 0)


def meeting_point() -> tuple[str, int]:
    """Host and port at which the processes of a job meet.

    Raises:
        ConfigurationError: the environment does not name them.
    """
    host, port = os.environ.get("MASTER_ADDR", "").strip(), os.environ.get("MASTER_PORT", "").strip()
    for name, value in (("MASTER_ADDR", host), ("MASTER_PORT", port)):
        if not value:
            raise ConfigurationError(f"{name} is not set in the environment; {_HOW}")
    if not (port.isascii() and port.isdigit() and len(port) < 6 and 0 < int(port) < 2**16):
        raise ConfigurationError(f"MASTER_PORT must be a port, 1 to 65535, got {port!r}")
    return host, int(port)


def _number(name: str, least: int = 0) -> int | None:
    text = os.environ.get(name, "").strip()
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 10 and least <= int(text) <= _MOST):
        raise ConfigurationError(f"{name} must be a whole number, {least} to {_MOST}, got {text[:40]!r}; {_HOW}")
    return int(text)
