"""`--patch-parallel` on the command line: starting the processes of one image, or joining those of a launcher."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING

from diffusion_accel.errors import ConfigurationError
from diffusion_accel.io import printable
from diffusion_accel.parallel import launch
from diffusion_accel.parallel.launch import follow, leave_message, started_here
from diffusion_accel.parallel.place import place

__all__ = ["follow", "leave_message", "printable"]  # for main, which imports late and as little as it can

if TYPE_CHECKING:
    from diffusion_accel.generation.request import Request
    from diffusion_accel.parallel import PatchParallel

    from .settings import Settings


command_line: list[str] = []  # of the command that runs: what the other processes are started with
joined = False  # this process is, or tried to become, one of several


def begin(arguments: list[str]) -> None:
    """A command begins."""
    global joined
    command_line[:] = arguments
    joined = False


def launched() -> bool:
    """Whether this process is one of several that a launcher started."""
    return place().size > 1


def must_start(settings: Settings) -> bool:
    """Whether this process is to start those that share the image.

    Raises:
        ConfigurationError: nothing says how many there should be, or the job has another number of them.
    """
    feature = _feature(settings)
    if feature is None or launched():
        return False
    if feature.ranks == 0:
        raise ConfigurationError(
            "--patch-parallel needs the number of processes, for example --patch-parallel 2, or torchrun"
        )
    return feature.ranks > 1


def start(settings: Settings) -> None:
    """Run the same command on several processes, and wait for them."""
    feature = _feature(settings)
    assert feature is not None
    launch.start(feature.ranks, ["-m", "diffusion_accel", *command_line])


def join(settings: Settings) -> Settings:
    """Join the other processes, if there are any: on a CUDA device of its own."""
    feature = _feature(settings)
    if feature is None or not launched():
        return settings
    here = place()
    if feature.ranks not in (0, here.size):
        raise ConfigurationError(
            f"--patch-parallel {feature.ranks} asks for {feature.ranks} processes, but the launcher started "
            f"{here.size}; leave the number out"
        )
    return _joined(settings, feature.timeout)


def share(settings: Settings, timeout: float) -> Settings:
    """Join the other processes that a launcher started for this command, if there are any: on a CUDA device of its
    own. For commands whose work is shared whatever the settings say."""
    return _joined(settings, timeout) if launched() else settings


def _joined(settings: Settings, timeout: float) -> Settings:
    global joined
    joined = True
    import torch  # heavy

    from diffusion_accel.parallel.group import join as join_group  # heavy: torch

    if settings.device in (None, "cuda") and torch.cuda.is_available():
        settings = dataclasses.replace(settings, device=f"cuda:{place().local_rank}")
    join_group(torch.device(settings.device or "cpu"), timeout)
    return settings


def same_seeds(settings: Settings, requests: list[Request]) -> list[Request]:
    """The requests with the seeds of rank 0, unless the command says which seed."""
    if settings.seed is not None or _feature(settings) is None or not launched():
        return requests
    from diffusion_accel.parallel.agreement import same_numbers  # heavy: torch

    (count,) = same_numbers([len(requests)])
    if count != len(requests):
        raise ConfigurationError(
            f"rank 0 has {count} prompts, this process {len(requests)}; give all the same arguments"
        )
    seeds = same_numbers([request.seed for request in requests])
    return [dataclasses.replace(request, seed=seed) for request, seed in zip(requests, seeds, strict=True)]


def writes(settings: Settings) -> bool:
    """Whether this process writes files and prints: rank 0, or the only one."""
    return _feature(settings) is None or place().rank == 0


def speaks() -> bool:
    """Whether this process says what all of them would say: of several with one image, rank 0 does."""
    return not (joined or started_here()) or place().rank == 0


def by_torchrun() -> bool:
    """Whether torchrun started this process, and others that are interrupted with it before it."""
    return "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("RANK", "0") != "0"


def name() -> str:
    """What an error of this process begins with: which of several it is, unless it is the first."""
    here = place() if joined else None
    return f"process {here.rank} of {here.size}: " if here is not None and here.rank > 0 else ""


def _feature(settings: Settings) -> PatchParallel | None:
    return settings.features.get("patch_parallel")  # type: ignore[return-value]
