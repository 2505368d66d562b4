"""Starting a command on several processes of this machine, through torch's elastic launcher."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from diffusion_accel.errors import AccelerationError

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

RUN = "diffusion-accel"  # the launcher's name for a job that was started here
GRACE = 5  # seconds that the others have to end once a process has failed
_ENDED = (-signal.SIGTERM, 128 + signal.SIGTERM)  # exit codes of processes that the launcher ended
_SIGNALS = [getattr(signal, n) for n in ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT") if hasattr(signal, n)]  # it hears


class ProcessFailedError(AccelerationError):
    """A process of the job failed; the message is its own. `exit_code` is the one with which it ended."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]


def start(ranks: int, arguments: Sequence[str]) -> None:
    """Run Python with `arguments` on so many processes of this machine, and wait for all of them.

    Only rank 0 writes to stdout. When a process fails, the others are ended: only the first failure says anything.
    The processes share the threads that this one may use, unless OMP_NUM_THREADS says how many each has.

    Raises:
        ProcessFailedError: a process failed, with the message that it left by `leave_message`, or was killed.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    with tempfile.TemporaryDirectory(prefix="diffusion-accel-") as folder, _surroundings(ranks):
        logs = DefaultLogsSpecs(log_dir=folder, redirects={rank: Std.OUT for rank in range(1, ranks)})
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=ranks,
            run_id=RUN,
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            local_addr="127.0.0.1",
            max_restarts=0,
            shutdown_timeout=GRACE,
            logs_specs=logs,
        )
        try:
            elastic_launch(config, sys.executable)(*arguments)
        except ChildFailedError as error:
            raise _failed(error.failures, ranks) from None
        except SignalException as stop:  # the launcher has ended the processes
            if stop.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            raise SystemExit(128 + stop.sigval) from None


def leave_message(message: str, exit_code: int, consequence: bool = False) -> bool:
    """In a process that `start` runs: leave the reason of its failure to the one that started it.

    Args:
        exit_code: with which it is about to end.
        consequence: another process failed first, and its message says more.

    Returns:
        False in any other process, which has to print it itself.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if os.environ.get("TORCHELASTIC_RUN_ID") != RUN or not file:
        return False
    # the form that the launcher reads
    left = {"message": {"message": message, "extraInfo": {"timestamp": int(time.time())}}}
    Path(file).write_text(json.dumps(left | {"consequence": consequence, "exit_code": exit_code}))
    return True


def _failed(failures: Mapping[int, ProcessFailure], ranks: int) -> ProcessFailedError:
    """The failure that the others followed from."""

    def follows(rank: int) -> tuple[bool, int]:
        failure = failures[rank]
        left = failure.error_file_data
        # a process that left its reason may be ended with the others while it is still about to end itself
        ended = bool(left["consequence"]) if "consequence" in left else failure.exitcode in _ENDED
        return ended, failure.timestamp

    rank = min(failures, key=follows)
    failure, name = failures[rank], f"process {rank} of {ranks}"
    left = failure.error_file_data
    if "exit_code" in left:
        return ProcessFailedError(left["message"]["message"], left["exit_code"])
    if failure.exitcode < 0:
        message = f"{name} was killed by {failure.signal_name()}; nothing more was written"
        return ProcessFailedError(message, AccelerationError.exit_code)
    return ProcessFailedError(f"{name} failed; what it printed says why", failure.exitcode)


@contextmanager
def _surroundings(ranks: int) -> Iterator[None]:
    """Each process its share of the threads, and nothing of the launcher itself on the terminal or left behind."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = os.environ.get("OMP_NUM_THREADS")
    here = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in _SIGNALS} if here else {}
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    os.environ["OMP_NUM_THREADS"] = threads or str(max(1, cores // ranks))
    try:
        yield
    finally:
        logging.disable(level)
        if threads is None:
            del os.environ["OMP_NUM_THREADS"]
        for number, handler in handlers.items():
            signal.signal(number, handler)
