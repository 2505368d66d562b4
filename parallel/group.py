"""The processes that share a picture: joining them, comparing what they were asked for, and losing one."""

from __future__ import annotations

import atexit
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from diffusion_accel.errors import AccelerationError, ConfigurationError
from diffusion_accel.hooks import tensors_in

_DIGEST = 8  # bytes of a hash
_groups: dict[float, tuple[Any, Any]] = {}  # by timeout: the job's group, and the one made of it
_lost = False  # a message failed: what the others still send can no longer be told apart


class PeerError(AccelerationError, RuntimeError):
    """Another process of the job does not answer: it ended, failed or hangs."""

    consequence = True


class DisagreementError(ConfigurationError):
    """The processes of a job were asked for different pictures."""


@dataclass(frozen=True)
class World:
    """The processes of a job: how many, which one this is, and the group they talk through (None: one process)."""

    rank: int
    size: int
    group: Any = None


def launched() -> int:
    """How many processes the launcher started (torchrun, accelerate launch, Slurm's wrappers of them); 1 without."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


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
        if launched() == 1:
            return World(0, 1)
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise ConfigurationError(
                f"this process was given {device}, but there are {torch.cuda.device_count()} CUDA devices; start no "
                "more processes on a host than it has devices"
            )
        if device.type not in ("cpu", "cuda"):
            raise ConfigurationError(f"patch_parallel works on cpu and cuda devices, this pipeline is on {device.type}")
        with _lost_at_start():
            if device.type == "cuda":
                torch.cuda.set_device(device)  # NCCL's messages are those of the current device
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
            atexit.register(leave)
    size = dist.get_world_size()
    if size == 1:
        return World(0, 1)
    if _lost:
        raise PeerError("a process of this job was lost before; start the job again")
    if _groups.get(timeout, (None,))[0] is not dist.group.WORLD:
        with _lost_at_start():
            _groups[timeout] = dist.group.WORLD, dist.new_group(timeout=timedelta(seconds=timeout))
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
            f"another process of this job does not answer any more ({_first_line(error)}); its own error, if it "
            "printed one, says why; start the job again"
        ) from error


@contextmanager
def _lost_at_start() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise PeerError(
            f"the processes of this job did not find each other ({_first_line(error)}); start all of them with "
            "torchrun, and check MASTER_ADDR and MASTER_PORT"
        ) from error


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."


# ---------------------------------------------------------------------- agreement
def agree(world: World, asked: dict[str, Any], device: torch.device) -> None:
    """Check that all processes were asked for the same.

    Args:
        asked: what to compare, by the name that an error gives it; tensors are compared by value.

    Raises:
        DisagreementError: on every process, naming what differs and where.
    """
    mine = torch.tensor([list(digest(value)) for value in asked.values()], dtype=torch.uint8)
    on_device = dist.get_backend(world.group) == "nccl"
    mine = mine.to(device) if on_device else mine
    theirs = [torch.empty_like(mine) for _ in range(world.size)]
    with lost_peer():
        dist.all_gather(theirs, mine, group=world.group)
    different = {
        name: [rank for rank in range(1, world.size) if not torch.equal(theirs[rank][i], theirs[0][i])]
        for i, name in enumerate(asked)
    }
    found = [
        f"{name} ({'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))})"
        for name, ranks in different.items()
        if ranks
    ]
    if found:
        raise DisagreementError(
            f"the processes of this job must be asked for the same picture, but these differ from rank 0: "
            f"{'; '.join(found)}; give all the same arguments and a generator with the same seed"
        )


def digest(value: Any) -> bytes:
    """A hash of a nested value: of the bytes of its tensors, and of everything else as text."""
    found = hashlib.blake2b(digest_size=_DIGEST)
    for tensor in tensors_in(value):
        found.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    if not isinstance(value, torch.Tensor):
        found.update(json.dumps(value, sort_keys=True, default=_plain).encode())
    return found.digest()


def _plain(value: Any) -> str:
    return "" if isinstance(value, torch.Tensor) else type(value).__name__


def share_random_state(world: World, device: torch.device) -> None:
    """Give torch's own generators at every process the state that they have at rank 0."""
    state = torch.get_rng_state()
    if device.type == "cuda":
        state = torch.cat([state, torch.cuda.get_rng_state(device)])
    on_device = dist.get_backend(world.group) == "nccl"
    state = state.to(device) if on_device else state
    with lost_peer():
        dist.broadcast(state, 0, group=world.group)
    if world.rank == 0:
        return
    state = state.cpu()
    length = len(torch.get_rng_state())
    torch.set_rng_state(state[:length].clone())
    if len(state) > length:
        torch.cuda.set_rng_state(state[length:].clone(), device)


def same_numbers(numbers: list[int]) -> list[int]:
    """The whole numbers of rank 0, at every process of the job; as many at each."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return numbers
    sent = torch.tensor(numbers, dtype=torch.int64)
    if dist.get_backend() == "nccl":
        sent = sent.cuda()
    with lost_peer():
        dist.broadcast(sent, 0)
    return [int(number) for number in sent.tolist()]
