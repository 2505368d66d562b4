"""Times are taken in turn, and an accelerator is waited for before the clock is read."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from diffusion_accel import ConfigurationError
from diffusion_accel.measure import timing
from diffusion_accel.measure.timing import in_turn, interleaved, ratios, seconds_of, synchronise


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens, in order: readings of the clock, waits for a device, calls."""
    seen: list[str] = []
    clock = iter(range(10_000))

    def read() -> float:
        seen.append("clock")
        return float(next(clock))

    monkeypatch.setattr(time, "perf_counter", read)
    monkeypatch.setitem(timing.WAITS, "cuda", lambda device: seen.append(f"wait for {device}"))
    monkeypatch.setattr(timing, "IN_USE", {"cuda": lambda: False})
    return seen


def test_a_device_is_waited_for_before_the_clock_is_read(events: list[str]) -> None:
    assert seconds_of(lambda: events.append("call"), "cuda:1") == 1.0
    assert events == ["wait for cuda:1", "clock", "call", "wait for cuda:1", "clock"]


def test_without_a_device_every_accelerator_in_use_is_waited_for(
    events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for device in (None, "cpu", torch.device("meta")):
        synchronise(device)
    assert events == []
    monkeypatch.setattr(timing, "IN_USE", {"cuda": lambda: True})
    seconds_of(lambda: None)
    assert events == ["wait for cuda", "clock", "wait for cuda", "clock"]


def test_calls_take_turns_and_what_is_around_them_is_not_timed(events: list[str]) -> None:
    @contextmanager
    def around(name: str) -> Iterator[None]:
        events.append(f"{name} on")
        yield
        events.append(f"{name} off")

    calls = {name: lambda name=name: events.append(name) for name in "ab"}
    seconds = interleaved(calls, 2, device="cuda", warmup=1, around=around)
    assert list(seconds) == ["a", "b"] and [len(values) for values in seconds.values()] == [2, 2]
    assert [event for event in events if event in "ab"] == ["a", "b"] * 3
    turn = ["a on", "wait for cuda", "clock", "a", "wait for cuda", "clock", "a off"]
    assert events[: len(turn)] == turn


def test_a_round_that_warms_up_is_not_kept() -> None:
    values, told = iter(range(100)), []
    found = in_turn({"a": lambda: next(values), "b": lambda: next(values)}, 2, warmup=2, told=told.append)
    assert found == {"a": [4, 6], "b": [5, 7]} and told == [-1, 0, 1, 2]


def test_ratios_are_of_the_same_round() -> None:
    assert ratios([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]
    with pytest.raises(ValueError, match="zip"):
        ratios([1.0], [1.0, 2.0])


@pytest.mark.parametrize(("rounds", "warmup"), [(0, 1), (1, -1)])
def test_numbers_of_rounds_are_checked(rounds: int, warmup: int) -> None:
    with pytest.raises(ConfigurationError, match="rounds must be at least 1"):
        interleaved({"a": lambda: None}, rounds, warmup=warmup)
