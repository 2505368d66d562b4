"""Threads of requests run one at a time, and none of them can keep the others waiting for good."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from diffusion_accel.serving.baton import Baton

TIMEOUT = 20.0


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as made:
        yield made


def test_one_thread_runs_at_a_time(pool: ThreadPoolExecutor) -> None:
    baton, inside, most = Baton(patience=TIMEOUT), 0, 0

    def run(_: int) -> None:
        nonlocal inside, most
        with baton.held():
            for _ in range(20):
                inside += 1
                most = max(most, inside)
                time.sleep(0)
                inside -= 1
                with baton.aside():
                    time.sleep(0)

    list(pool.map(run, range(16)))
    assert most == 1 and inside == 0


def test_others_run_while_one_waits(pool: ThreadPoolExecutor) -> None:
    baton, answer = Baton(patience=TIMEOUT), threading.Event()

    def waits() -> bool:
        with baton.held(), baton.aside():
            return answer.wait(TIMEOUT)

    def answers() -> None:
        with baton.held():
            answer.set()

    first = pool.submit(waits)
    pool.submit(answers).result(TIMEOUT)
    assert first.result(TIMEOUT)


def test_a_thread_without_it_waits_for_nobody(pool: ThreadPoolExecutor) -> None:
    baton = Baton(patience=TIMEOUT)
    with baton.held():

        def aside() -> bool:
            with baton.aside():
                return True

        assert pool.submit(aside).result(TIMEOUT)
        assert baton._holder == threading.get_ident()


def test_aside_within_aside_waits_for_nobody() -> None:
    baton, began = Baton(patience=TIMEOUT), time.monotonic()
    with baton.held():
        with baton.aside():
            with baton.aside():
                pass
            assert baton._holder is None  # it is still aside
        assert baton._holder == threading.get_ident()
    assert time.monotonic() - began < TIMEOUT


def test_who_keeps_it_for_long_loses_it_and_gives_away_nothing_of_others(pool: ThreadPoolExecutor) -> None:
    baton, go, entered, leave = Baton(patience=0.01), threading.Event(), threading.Event(), threading.Event()

    def keeps() -> None:
        with baton.held():
            entered.set()
            assert go.wait(TIMEOUT)

    def takes() -> int:
        with baton.held():
            go.set()
            assert leave.wait(TIMEOUT)
            return threading.get_ident()

    first = pool.submit(keeps)
    assert entered.wait(TIMEOUT)
    second = pool.submit(takes)
    first.result(TIMEOUT)  # ends although the other one has it
    holder = baton._holder
    leave.set()
    assert holder == second.result(TIMEOUT) and baton._holder is None


@pytest.mark.parametrize("way", ["held", "aside"])
def test_an_error_gives_it_back(way: str) -> None:
    baton = Baton()

    def failing() -> None:
        with baton.held():
            if way == "aside":
                with baton.aside():
                    raise KeyError(way)
            raise KeyError(way)

    with pytest.raises(KeyError):
        failing()
    assert baton._holder is None and not baton._runners
