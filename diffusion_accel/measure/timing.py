"""How anything here is timed: whole calls, in turn, the accelerator waited for before the clock is read.

A machine that slows down for a while slows down what is measured then; measured in turn, all of it alike. So ratios of
the same round are what is reported, never bare seconds.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch

from diffusion_accel.errors import ConfigurationError

Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result")


#: kind of device -> waits until it has done all its work
WAITS: dict[str, Callable[[torch.device], Any]] = {
    "cuda": lambda device: torch.cuda.synchronize(device),
    "mps": lambda _device: torch.mps.synchronize(),
    "xpu": lambda device: torch.xpu.synchronize(device),
}
#: kind of device -> whether this process has work on it
IN_USE: dict[str, Callable[[], bool]] = {
    "cuda": torch.cuda.is_initialized,
    "mps": torch.backends.mps.is_available,
    "xpu": lambda: hasattr(torch, "xpu") and torch.xpu.is_initialized(),
}


def synchronise(device: torch.device | str | None = None) -> None:
    """Wait until an accelerator (CUDA, MPS, XPU) has done what it was given; a CPU has nothing to wait for.

    Args:
        device: what is waited for; None: every accelerator that this process has used.
    """
    if device is not None:
        device = torch.device(device)
        if (wait := WAITS.get(device.type)) is not None:
            wait(device)
        return
    for kind, used in IN_USE.items():
        if used():
            WAITS[kind](torch.device(kind))


def timed(call: Callable[[], Result], device: torch.device | str | None = None) -> tuple[Result, float]:
    """What a call returns, and its wall-clock seconds: the accelerator's work before it is not in them, its own is."""
    synchronise(device)
    began = time.perf_counter()
    result = call()
    synchronise(device)
    return result, time.perf_counter() - began


def seconds_of(call: Callable[[], object], device: torch.device | str | None = None) -> float:
    """The wall-clock seconds of one call; see `timed`."""
    return timed(call, device)[1]


def interleaved(
    calls: Mapping[Key, Callable[[], object]],
    rounds: int,
    *,
    device: torch.device | str | None = None,
    warmup: int = 1,
    around: Callable[[Key], AbstractContextManager[Any]] | None = None,
) -> dict[Key, list[float]]:
    """Seconds of each call, `rounds` times, in turn: the first, the second, …, the first again.

    Args:
        calls: what is timed, in the order of its turns.
        rounds: 1 or more; five are the least to report a median of.
        device: the accelerator to wait for (`synchronise`).
        warmup: rounds ahead of these, that are not kept.
        around: a context for each turn, entered before the clock starts and left after it stops, for what is to be
            switched on but not timed; it is given the call's name.

    Returns:
        For each name its `rounds` values, the k-th of all of them from the same round.
    """

    def measure(name: Key) -> float:
        with nullcontext() if around is None else around(name):
            return seconds_of(calls[name], device)

    return in_turn({name: functools.partial(measure, name) for name in calls}, rounds, warmup=warmup)


def in_turn(
    measurements: Mapping[Key, Callable[[], float]],
    rounds: int,
    *,
    warmup: int = 1,
    told: Callable[[int], object] | None = None,
) -> dict[Key, list[float]]:
    """The same for measurements that give their own number of seconds (taken in another process, of a part of a call).

    Args:
        told: called ahead of each round with its number, 0 and below for those that warm up.

    Raises:
        ConfigurationError: `rounds` is below 1 or `warmup` below 0.
    """
    if rounds < 1 or warmup < 0:
        raise ConfigurationError(f"rounds must be at least 1 and warmup at least 0, got {rounds} and {warmup}")
    seconds: dict[Key, list[float]] = {name: [] for name in measurements}
    for turn in range(1 - warmup, rounds + 1):
        if told is not None:
            told(turn)
        for name, measure in measurements.items():
            value = measure()
            if turn > 0:
                seconds[name].append(value)
    return seconds


def ratios(base: Sequence[float], other: Sequence[float]) -> list[float]:
    """base / other, round by round: above 1 where `other` was faster.

    Raises:
        ValueError: they are not of the same number of rounds.
    """
    return [b / o for b, o in zip(base, other, strict=True)]
