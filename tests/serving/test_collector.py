"""The meeting point by itself: what runs together, in which order, and what an error or the end does to it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch
from serving_tools import TIMEOUT

from diffusion_accel.errors import ModelLoadError
from diffusion_accel.serving.calls import Call
from diffusion_accel.serving.collector import CancelledHere, Collector, Ticket, _Waiting
from diffusion_accel.serving.curve import Curve


class Model(torch.nn.Module):
    """Notes the rows of its calls; what it does is given."""

    def __init__(self, does: Callable[[torch.Tensor], Any] = lambda x: x * 2) -> None:
        super().__init__()
        self.does, self.calls = does, list[int]()

    def forward(self, x: torch.Tensor) -> Any:
        self.calls.append(len(x))
        return self.does(x)


class Requests:
    """Threads that each ask for one call at a time, all answered together."""

    def __init__(self, collector: Collector, threads: int = 8) -> None:
        self.collector, self.pool = collector, ThreadPoolExecutor(threads)

    def ask(self, model: Model, rows: list[Any], tickets: list[Ticket] | None = None) -> list[Future[Any]]:
        """Ask for calls with these values, one a request, in this order; all are there before the first is computed."""
        tickets = tickets or [Ticket() for _ in rows]
        for ticket in tickets:
            self.collector.enter(ticket)
        with self.collector.turn(Ticket(), "a test"):
            futures: list[Future[Any]] = []
            for x, ticket in zip(rows, tickets, strict=True):
                futures.append(self.pool.submit(self._one, model, x, ticket))
                with self.collector._changed:
                    assert self.collector._changed.wait_for(
                        lambda: len(self.collector._waiting) == len(futures), TIMEOUT
                    )
        return futures

    def _one(self, model: Model, x: Any, ticket: Ticket) -> Any:
        try:
            x = x if isinstance(x, torch.Tensor) else torch.full((1, 2), float(x))
            return self.collector.compute(ticket, "model", model, Call.of(model, "forward", (x,), {}))
        finally:
            self.collector.leave(ticket)


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector(most=4)
    yield made
    made.stop(RuntimeError("the test is over"))


@pytest.fixture
def requests(collector: Collector) -> Iterator[Requests]:
    made = Requests(collector)
    yield made
    made.pool.shutdown()


def results(futures: list[Future[Any]]) -> list[float]:
    return [float(future.result(TIMEOUT)[0, 0]) for future in futures]


def test_one_batch_up_to_the_limit(requests: Requests) -> None:
    model = Model()
    assert results(requests.ask(model, [1, 2, 3, 4, 5, 6])) == [2, 4, 6, 8, 10, 12]
    assert sorted(model.calls) == [1, 2, 4]  # the 1: compared with the first batch
    assert results(requests.ask(model, [1, 2, 3])) == [2, 4, 6]
    assert model.calls[3:] == [3]


def test_batches_that_double(requests: Requests) -> None:
    model, requests.collector._doubling = Model(), True
    assert results(requests.ask(model, [1, 2, 3])) == [2, 4, 6]
    assert sorted(model.calls) == [1, 1, 2]  # one of them compared


def test_a_call_with_more_rows_than_the_limit(requests: Requests) -> None:
    (found,) = requests.ask(Model(), [torch.ones(9, 2)])
    assert found.result(TIMEOUT).shape == (9, 2)


def test_rows_that_are_not_independent(requests: Requests, caplog: pytest.LogCaptureFixture) -> None:
    model = Model(lambda x: x + x.mean())
    assert results(requests.ask(model, [1, 2, 3])) == [2, 4, 6]
    assert results(requests.ask(model, [1, 2, 3])) == [2, 4, 6]
    assert model.calls == [3, 1, 1, 1, 1, 1, 1, 1]
    assert [r.getMessage() for r in caplog.records] == [
        "model: rows of a batch are not independent; calls like this one run by themselves"
    ]


def test_a_model_that_looks_at_one_timestep_only(collector: Collector) -> None:
    """As long as all are alike nobody would notice."""

    class Timed(torch.nn.Module):
        def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return sample * torch.as_tensor(timestep).reshape(-1)[0]

    model, pool = Timed(), ThreadPoolExecutor(2)

    def ask(timesteps: list[float]) -> list[float]:
        tickets = [Ticket() for _ in timesteps]
        with collector.turn(Ticket(), "a test"):
            calls = [Call.of(model, "forward", (torch.ones(1, 1), torch.tensor(t)), {}) for t in timesteps]
            futures = [
                pool.submit(collector.compute, t, "model", model, call) for t, call in zip(tickets, calls, strict=True)
            ]
            with collector._changed:
                assert collector._changed.wait_for(lambda: len(collector._waiting) == 2, TIMEOUT)
        return [float(future.result(TIMEOUT)) for future in futures]

    assert ask([3.0, 3.0]) == [3, 3] and collector.batches["model", 2] == 1
    assert ask([3.0, 3.0]) == [3, 3] and collector.batches["model", 2] == 2
    assert ask([3.0, 5.0]) == [3, 5] and collector.batches["model", 2] == 2
    assert ask([3.0, 3.0]) == [3, 3] and collector.batches["model", 2] == 2
    pool.shutdown()


def test_an_error_reaches_the_request_that_caused_it(requests: Requests) -> None:
    def does(x: torch.Tensor) -> torch.Tensor:
        if (x == 13).any():
            raise ArithmeticError("unlucky")
        return x * 2

    futures = requests.ask(Model(does), [1, 13, 3])
    assert results([futures[0], futures[2]]) == [2, 6]
    with pytest.raises(ArithmeticError, match="unlucky"):
        futures[1].result(TIMEOUT)


def test_what_nobody_expected_ends_no_thread(requests: Requests, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(requests.collector, "_together", lambda group: [][1])
        for future in requests.ask(Model(), [1, 2]):
            with pytest.raises(IndexError):
                future.result(TIMEOUT)
    assert results(requests.ask(Model(), [1, 2])) == [2, 4]


def test_too_many_rows_for_the_memory(requests: Requests) -> None:
    def does(x: torch.Tensor) -> torch.Tensor:
        if len(x) > 2:
            raise MemoryError("no room")
        return x * 2

    model = Model(does)
    assert results(requests.ask(model, [1, 2, 3, 4])) == [2, 4, 6, 8]
    assert model.calls == [4, 1, 1, 1, 1]
    assert results(requests.ask(model, [1, 2, 3, 4])) == [2, 4, 6, 8]
    assert model.calls[5:] == [2, 1, 2]


def test_who_had_least_is_next(requests: Requests) -> None:
    """Calls of other shapes cannot share a batch: they are served by what their requests had so far."""
    order: list[int] = []

    def does(x: torch.Tensor) -> torch.Tensor:
        order.append(x.shape[1])
        return x

    tickets = [Ticket() for _ in range(3)]
    rows = [torch.zeros(1, width) for width in (1, 2, 3)]
    collector = requests.collector
    for ticket in tickets:
        collector.enter(ticket)
    for ticket, spent in zip(tickets, (0.3, 0.1, 0.2), strict=True):
        ticket.spent = spent
    enter, collector.enter = collector.enter, lambda ticket: None  # type: ignore[method-assign]
    futures = requests.ask(Model(does), rows, tickets)
    collector.enter = enter  # type: ignore[method-assign]
    assert [future.result(TIMEOUT).shape[1] for future in futures] == [1, 2, 3]
    assert order == [2, 3, 1]
    assert tickets[0].spent == 0.3, "the first call of a kind is charged nothing"


def test_a_newcomer_has_had_as_much_as_the_others(collector: Collector) -> None:
    old, new = Ticket(), Ticket()
    collector.enter(old)
    old.spent = 5.0
    collector.enter(new)
    assert new.spent == 5.0


def test_a_first_call_that_takes_long_is_not_charged(collector: Collector) -> None:
    slow = [0.2, 0.0, 0.2]
    model, ticket = Model(lambda x: time.sleep(slow.pop(0)) or x), Ticket()
    collector.enter(ticket)
    spent = []
    for _ in range(3):
        collector.compute(ticket, "model", model, Call.of(model, "forward", (torch.ones(1, 2),), {}))
        with collector.turn(Ticket(), "a test"):  # then what was computed before is charged
            spent.append(ticket.spent)
    assert spent[0] == 0 < spent[1] < spent[2] <= 2 * spent[1], "the third took longer than the second"
    collector.leave(ticket)


def test_a_turn_is_alone(collector: Collector) -> None:
    model, ticket = Model(), Ticket()
    collector.enter(ticket)
    with ThreadPoolExecutor(1) as pool:
        with collector.turn(Ticket(), "a test"):
            future = pool.submit(
                collector.compute, ticket, "model", model, Call.of(model, "forward", (torch.ones(1),), {})
            )
            with collector._changed:
                assert collector._changed.wait_for(lambda: collector._waiting, TIMEOUT)
            assert not model.calls
        assert future.result(TIMEOUT) == 2
    assert collector.batches == {("a test", 0): 1, ("model", 1): 1}


def test_the_end(collector: Collector) -> None:
    """What waits and what comes later ends with the reason that is given, each with an exception of its own."""
    model, errors = Model(), list[BaseException]()

    def ask() -> None:
        try:
            collector.compute(Ticket(), "model", model, Call.of(model, "forward", (torch.ones(1),), {}))
        except CancelledHere as error:
            errors.append(error)

    with collector.turn(Ticket(), "a test"):
        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        with collector._changed:
            assert collector._changed.wait_for(lambda: len(collector._waiting) == 2, TIMEOUT)
        stopping = threading.Thread(target=collector.stop, args=(CancelledHere("closed"),))
        stopping.start()
        for thread in threads:
            thread.join(TIMEOUT)
    stopping.join(TIMEOUT)
    ask()
    assert [str(error) for error in errors] == ["closed"] * 3 and len(set(map(id, errors))) == 3
    assert not model.calls


def test_adapters_are_changed_between_batches(requests: Requests) -> None:
    changes: list[Any] = []
    collector = requests.collector
    collector._activate = changes.append
    a, b = (("a", 1.0),), (("b", 1.0),)
    model = Model()
    futures = requests.ask(model, [1, 2, 3, 4], [Ticket(adapters=one) for one in (a, b, a, b)])
    assert results(futures) == [2, 4, 6, 8]
    assert changes == [a, b]

    def broken(adapters: Any) -> None:
        if adapters == a:
            raise ModelLoadError("lost")
        changes.append(adapters)

    collector._activate = broken
    futures = requests.ask(model, [1, 2], [Ticket(adapters=one) for one in (a, b)])
    with pytest.raises(ModelLoadError, match="lost"):
        futures[0].result(TIMEOUT)
    assert results(futures[1:]) == [4] and changes[-1] == b


def test_requests_that_come_one_after_the_other_are_waited_for_each_in_its_turn(requests: Requests) -> None:
    """Threads that share one interpreter come back one by one, which can take longer in all than one is waited for."""
    collector = Collector(most=8, wait=100.0)
    here, coming = Ticket(), Ticket()
    collector.enter(here)
    collector.enter(coming)
    here.away = coming.away = time.monotonic() - 1000
    call = _Waiting(here, "unet", None, Call.of(Model(), "forward", (torch.zeros(1, 1),), {}))
    assert collector._worth_waiting([call]) > 50
    call.came -= 1000
    assert collector._worth_waiting([call]) < 0
    collector.stop(RuntimeError())


def test_measured(requests: Requests) -> None:
    """A call that is measured is computed with more and more rows; the cap follows from what it found."""
    model, collector = Model(), requests.collector
    assert results(requests.ask(model, [1], [Ticket(measuring=True)])) == [2]
    (key,) = collector.curves
    assert sorted(collector.curves[key].seconds) == [1, 2, 4]
    assert model.calls == [1, 2, 4] * 4 + [1]  # each size in turn, so that all meet what else the machine does
    collector.curves[key] = Curve("unet", {1: 1.0, 2: 1.1, 4: 2.2})
    model.calls.clear()
    assert results(requests.ask(model, [1, 2, 3, 4])) == [2, 4, 6, 8]
    assert model.calls[0] == 2 and max(model.calls) == 2
