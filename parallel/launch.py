"""Starting a command on several processes of this machine.

The launcher writes no file and runs no server: the processes meet at a socket that it opens and gives to the first of
them, they say through pipes why they fail, and one more pipe tells them when the launcher has ended, however it did.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from diffusion_accel import interrupts
from diffusion_accel.errors import AccelerationError

HOST = "127.0.0.1"
GRACE = 2.0  # seconds that the others have to say why they failed once a process has failed, and then to end
_JOB = "DIFFUSION_ACCEL_JOB"  # the numbers of a process's ends of the pipes, and of the socket
_INTERRUPTED = "interrupted; "
_ends: tuple[int, ...] = ()  # of this process, if `start` started it


class ProcessFailedError(AccelerationError):
    """A process of the job failed; the message is its own. `exit_code` is the one with which it ended."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def start(ranks: int, arguments: Sequence[str]) -> None:
    """Run Python with `arguments` on so many processes of this machine, and wait for all of them.

    Only rank 0 writes to stdout. When a process fails, the others are ended: only the first failure says anything.
    The processes share the threads that this one may use, unless OMP_NUM_THREADS says how many each has. They end
    when this one ends.

    Raises:
        ProcessFailedError: a process failed, with the message that it left by `leave_message`, or was killed.
    """
    job = _Job()
    try:
        job.begin(ranks, arguments)
        with interrupts.explaining(job.interrupted):
            failure = job.wait()
    finally:
        job.end()
    if failure is not None:
        raise failure


# ---------------------------------------------------------------------- in a process that was started
def leave_message(message: str, exit_code: int, consequence: bool = False) -> bool:
    """In a process that `start` runs: leave the reason of its failure to the one that started it.

    Args:
        exit_code: with which it is about to end.
        consequence: another process failed first, and its message says more.

    Returns:
        False in any other process, which has to print it itself.
    """
    left = {"message": message, "exit_code": exit_code, "consequence": consequence}
    with suppress(OSError):  # the launcher has ended
        return bool(_inherited()) and os.write(_inherited()[1], json.dumps(left).encode()) > 0
    return False


def follow() -> None:
    """In a process that `start` runs: end tidily when interrupted, or when the one that started it ends."""
    if _inherited():
        interrupts.install(leave_message)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        interrupts.follow(_inherited()[0])


def started_here() -> bool:
    """Whether `start` runs this process."""
    return bool(_inherited())


def meeting_socket() -> int | None:
    """In the first process that `start` runs: the socket at which it is to await the others."""
    return _inherited()[2] if len(_inherited()) > 2 else None


def _inherited() -> tuple[int, ...]:
    global _ends
    if _JOB in os.environ:  # not for the processes that this one starts
        _ends = tuple(int(number) for number in os.environ.pop(_JOB).split(","))
    return _ends


# ---------------------------------------------------------------------- in the one that starts them
@dataclass
class _Rank:
    """A process, and what it left."""

    process: subprocess.Popen[bytes]
    messages: int
    text: bytearray = field(default_factory=bytearray)
    hung: bool = False  # it had not ended long after the others gave it up

    def read(self) -> bool:
        """Read what it wrote; False at the end."""
        with interrupts.undivided():
            data = os.read(self.messages, 2**16)
            self.text += data
        return bool(data)

    @property
    def left(self) -> dict[str, Any]:
        with suppress(ValueError):
            return json.loads(self.text)
        return {}

    @property
    def failed(self) -> bool:
        return bool(self.left) or bool(self.process.poll())

    @property
    def follows(self) -> bool:
        """It failed because another one did."""
        return bool(self.left.get("consequence"))


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """A process that is started here hears of Ctrl-C from `follow` on: before, it could only print a traceback."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Job:
    """The processes of one call of `start`."""

    def __init__(self) -> None:
        self.ranks: list[_Rank] = []
        self._life = -1  # the end of the pipe that nobody but this process has
        self._said = ""  # by rank 0

    def begin(self, ranks: int, arguments: Sequence[str]) -> None:
        """Start them."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        others = ("TORCHELASTIC_", "GROUP_", "ROLE_")  # of a launcher that started this process
        known = {k: v for k, v in os.environ.items() if not k.startswith(others)}
        known["OMP_NUM_THREADS"] = known.get("OMP_NUM_THREADS") or str(max(1, cores // ranks))
        known |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        life, self._life = os.pipe()
        with socket.create_server((HOST, 0)) as meeting:
            known |= {"MASTER_ADDR": HOST, "MASTER_PORT": str(meeting.getsockname()[1])}
            for rank in range(ranks):
                messages, told = os.pipe()
                ends = [life, told] + ([meeting.fileno()] if rank == 0 else [])
                with _interrupts_blocked():
                    process = subprocess.Popen(
                        [sys.executable, *arguments],
                        env=known | {"RANK": str(rank), "LOCAL_RANK": str(rank), _JOB: ",".join(map(str, ends))},
                        stdout=None if rank == 0 else subprocess.DEVNULL,
                        pass_fds=ends,
                    )
                os.close(told)
                self.ranks.append(_Rank(process, messages))
        os.close(life)

    def wait(self) -> ProcessFailedError | None:
        """Until all have ended or one has failed, whose error is returned."""
        limit = float("inf")
        with selectors.DefaultSelector() as selector:
            for rank in self.ranks:
                selector.register(rank.messages, selectors.EVENT_READ, rank)
            while selector.get_map():
                for key, _ in selector.select(max(0.0, min(limit - time.monotonic(), 1.0))):
                    if not key.data.read():
                        selector.unregister(key.fileobj)
                        key.data.process.wait()
                failed = [rank for rank in self.ranks if rank.failed]
                if not all(rank.follows for rank in failed):
                    break
                if failed:  # because of another one, which may be about to say why
                    limit = min(limit, time.monotonic() + GRACE)
                    if time.monotonic() >= limit:
                        for key in selector.get_map().values():
                            key.data.hung = True
                        break
        return self._failure()

    def _failure(self) -> ProcessFailedError | None:
        """What the other failures followed from."""
        size = len(self.ranks)
        failed = [(number, rank) for number, rank in enumerate(self.ranks) if rank.failed or rank.hung]
        if not failed:
            return None
        number, rank = min(failed, key=lambda each: (each[1].follows, each[1].hung, not each[1].left, each[0]))
        name, left, code = f"process {number} of {size}", rank.left, rank.process.poll() or 0
        if rank.hung:
            message = f"{name} did not answer any more and was ended; nothing more was written"
            return ProcessFailedError(message, 1)
        if left:
            return ProcessFailedError(left["message"], left["exit_code"])
        if code < 0:
            message = f"{name} was killed by {signal.Signals(-code).name}; nothing more was written"
            return ProcessFailedError(message, 1)
        return ProcessFailedError(f"{name} failed; what it printed says why", code)

    def end(self) -> None:
        """End those that have not ended, wait for all, and read what they left."""
        with interrupts.undivided():
            ranks, self.ranks = self.ranks, []
            living = [rank.process for rank in ranks if rank.process.poll() is None]
            for process in living:
                process.terminate()
            limit = time.monotonic() + GRACE
            for process in living:
                try:
                    process.wait(max(0.0, limit - time.monotonic()))
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
            for rank in ranks:
                os.set_blocking(rank.messages, False)
                with suppress(BlockingIOError):
                    while rank.read():
                        pass
                os.close(rank.messages)
            if self._life >= 0:
                os.close(self._life)
            self._life = -1
            self._said = str(ranks[0].left.get("message", "")) if ranks else self._said

    def interrupted(self) -> str:
        """End all when this process is interrupted; what was written, as rank 0 says."""
        self.end()
        _, found, words = self._said.partition(_INTERRUPTED)
        return words if found else "nothing more was written"
