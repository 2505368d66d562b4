"""The processes that share an image: joining them, and losing one."""

from __future__ import annotations

import atexit
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from diffusion_accel.errors import AccelerationError, ConfigurationError
from diffusion_accel.io import first_line

from .launch import meeting_socket
from .place import Place, meeting_point, place

_POLL = 0.05  # seconds
_LINGER = 2.0  # seconds in which the others get to know why a job does not begin
_FAILED = "failed"
_groups: dict[float, tuple[Any, Any]] = {}  # by timeout: the job's group, and the one made of it
_lost = False  # a message failed: what the others still send can no longer be told apart
_store: Any = None  # where the processes of the job meet
_meetings = 0


class PeerError(AccelerationError, RuntimeError):
    """Another process of the job does not answer: it ended, failed or hangs."""

    consequence = True


class NoDeviceError(ConfigurationError):
    """The launcher gave this process, and not all of them, a device that is not there."""


@dataclass(frozen=True)
class World:
    """The processes of a job: how many, which one this is, and the group they talk through (None: one process)."""

    rank: int
    size: int
    group: Any = None


def join(device: torch.device, timeout: float) -> World:
    """Join the processes of the job.

    Uses the process group that is there (`torch.distributed`, accelerate's `PartialState`), else makes one from the
    launcher's environment: NCCL for CUDA devices, gloo for all others. Without a launcher the world is one process.

    Args:
        device: where the pipeline computes.
        timeout: seconds after which a process that does not answer is given up.

    Raises:
        PeerError: the processes did not find each other, or one was lost before.
        ConfigurationError: there is no such device, or it is of a kind that has no messages.
    """
    if not dist.is_available():
        return World(0, 1)
    if not dist.is_initialized():
        here = place()
        if here.size == 1:
            return World(0, 1)
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise NoDeviceError(
                f"this process was given {device}, but there are {torch.cuda.device_count()} CUDA devices; start no "
                "more processes on a host than it has devices"
            )
        if device.type not in ("cpu", "cuda"):
            raise ConfigurationError(f"patch_parallel works on cpu and cuda devices, this pipeline is on {device.type}")
        if device.type == "cuda":
            torch.cuda.set_device(device)  # NCCL's messages are those of the current device
        _within(timeout, lambda: _meet(here, device, timeout))
        atexit.register(leave)
    size = dist.get_world_size()
    if size == 1:
        return World(0, 1)
    if _lost:
        raise PeerError("a process of this job was lost before; start the job again")
    if _groups.get(timeout, (None,))[0] is not dist.group.WORLD:
        group = _within(timeout, lambda: _grouped(timeout))
        _groups[timeout] = dist.group.WORLD, group
    return World(dist.get_rank(), size, _groups[timeout][1])


def leave() -> None:
    """Leave the job: ends its process group. Called when the process ends, if `join` made the group."""
    global _lost
    _groups.clear()
    _lost = False
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def lost_peer() -> Iterator[None]:
    """Turns the failure of a message into a `PeerError`."""
    global _lost
    try:
        yield
    except RuntimeError as error:  # torch has no type of its own for all of them
        if isinstance(error, AccelerationError):
            raise
        _lost = True
        raise PeerError(
            f"another process of this job does not answer any more ({first_line(error, 160)}); its own error, if it "
            "printed one, says why; start the job again"
        ) from error


# ---------------------------------------------------------------------- the beginning
def _within(timeout: float, task: Callable[[], Any]) -> Any:
    """Run what may wait for other processes, for so many seconds.

    It waits in C, some of it without any limit, where no signal and no error reaches it: so it runs in a thread, which
    is left behind.

    Raises:
        PeerError: it took longer, or the others cannot be reached.
    """
    found: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            found.append(task())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True, name="joining")
    thread.start()
    thread.join(timeout)
    if _store is not None:  # what has met has limits of its own, and says more
        thread.join(_LINGER)
    if found:
        return found[0]
    error = errors[0] if errors else None
    if isinstance(error, AccelerationError):
        raise error
    if error is not None and not isinstance(error, RuntimeError | ValueError):
        raise error
    reason = first_line(error, 160) if error is not None else f"no answer from {_where()} within {timeout:g} s"
    raise PeerError(
        f"the processes of this job did not find each other ({reason}); start all of them with torchrun, and check "
        "MASTER_ADDR and MASTER_PORT"
    ) from error


def _meet(here: Place, device: torch.device, timeout: float) -> bool:
    """Find the other processes, and make the process group."""
    global _store, _meetings
    if device.type == "cuda":
        torch.cuda.set_device(device)  # of this thread
    _meetings += 1
    limit = time.monotonic() + timeout
    while True:
        left = max(_POLL, round(limit - time.monotonic(), 1))
        try:
            _store = _store or _connected(here, left)
            store = dist.PrefixStore(f"diffusion-accel/{_meetings}", _store)
            _call_the_roll(store, here, left)
            break
        except dist.DistNetworkError:  # who served it is gone: perhaps of a job before this one, with the same port
            _store = None
            if here.rank == 0 or time.monotonic() + _POLL > limit:
                raise
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    span = timedelta(seconds=timeout)
    dist.init_process_group(backend, store=store, rank=here.rank, world_size=here.size, timeout=span)
    return True


def _connected(here: Place, timeout: float) -> Any:
    """The store where the processes of the job meet, which the first one serves."""
    (host, port), limit = meeting_point(), timedelta(seconds=timeout)
    if here.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":  # else the launcher serves it
        listening = _listen(port) if meeting_socket() is None else meeting_socket()
        return dist.TCPStore(
            host, port, None, True, limit, wait_for_workers=False, master_listen_fd=listening, use_libuv=True
        )
    _await(host, port, timeout)
    return dist.TCPStore(host, port, None, False, limit, wait_for_workers=False)


def _grouped(timeout: float) -> Any:
    """A group of all processes. None returns, and perhaps ends, while another one still connects to it."""
    limit = timedelta(seconds=timeout)
    group = dist.new_group(timeout=limit)
    if _store is not None:
        own, everyone = dist.get_rank(), range(dist.get_world_size())
        store = dist.PrefixStore(f"groups/{_meetings}/{timeout}", _store)
        store.set(f"here {own}", "")
        store.wait([f"here {rank}" for rank in everyone], limit)
        store.set(f"done {own}", "")
        if own == 0:  # the store ends with the process that serves it
            store.wait([f"done {rank}" for rank in everyone], limit)
    return group


def _listen(port: int) -> int:
    """A socket of this machine at which the others are awaited."""
    both = socket.has_dualstack_ipv6()
    try:
        return socket.create_server(
            ("", port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both, backlog=1024
        ).detach()
    except OSError as error:
        raise PeerError(
            f"MASTER_PORT={port}, where the other processes of this job are to find this one, cannot be opened "
            f"({os.strerror(error.errno or 0)}); set another MASTER_PORT for all of them"
        ) from error


def _await(host: str, port: int, timeout: float) -> None:
    """Wait until somebody listens there. torch's store waits, too, but writes at length about every attempt."""
    limit = time.monotonic() + timeout
    while True:
        try:
            return socket.create_connection((host, port), max(_POLL, limit - time.monotonic())).close()
        except OSError as error:
            if time.monotonic() + _POLL > limit:
                raise PeerError(
                    f"the first process of this job cannot be reached at {_where()} within {timeout:g} s "
                    f"({error.strerror or error}); start all of them, and check MASTER_ADDR and MASTER_PORT"
                ) from error
        time.sleep(_POLL)


def _call_the_roll(store: Any, here: Place, timeout: float) -> None:
    """Wait until every process is here, each once, and sees a job of the same size. If not, all of them get to know."""
    if store.add(f"rank {here.rank}", 1) > 1:  # perhaps of another job, which is not to be disturbed
        raise ConfigurationError(
            f"there are two processes with RANK={here.rank} at {_where()}; give every process a RANK of its own, and "
            "every job a MASTER_PORT of its own"
        )
    store.set(f"size {here.rank}", str(here.size))
    others = [rank for rank in range(here.size) if rank != here.rank]
    missing = list(others)
    try:
        _await_all(store, here, missing, timeout)
    except AccelerationError as error:
        store.set(_FAILED, str(error))
        store.set(f"left {here.rank}", "")
        left = [f"left {rank}" for rank in others if rank not in missing]
        limit = time.monotonic() + _LINGER
        while here.rank == 0 and left and not store.check(left) and time.monotonic() < limit:
            time.sleep(_POLL)  # the store ends with the process that serves it
        raise


def _await_all(store: Any, here: Place, missing: list[int], timeout: float) -> None:
    """Wait until all ranks in `missing` have come, which are removed from it."""
    limit = time.monotonic() + timeout
    while missing:
        if store.check([_FAILED]):
            raise PeerError(store.get(_FAILED).decode())
        for rank in [rank for rank in missing if store.check([f"size {rank}"])]:
            missing.remove(rank)
            size = int(store.get(f"size {rank}"))
            if size != here.size:
                raise ConfigurationError(
                    f"the processes of this job disagree about their number: process {here.rank} was told "
                    f"WORLD_SIZE={here.size}, process {rank} WORLD_SIZE={size}; start all of them with the same"
                )
        if missing and time.monotonic() > limit:
            names = ", ".join(map(str, missing[:8])) + (", …" if len(missing) > 8 else "")
            raise PeerError(
                f"of the {here.size} processes of this job, {len(missing)} did not come to {_where()} within "
                f"{timeout:g} s (RANK {names}); start all of them, and check MASTER_ADDR and MASTER_PORT"
            )
        time.sleep(_POLL if missing else 0)


def _where() -> str:
    return f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
