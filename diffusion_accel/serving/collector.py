"""The place where requests meet: calls of shared models wait here and are computed, many in one batch."""

from __future__ import annotations

import functools
import logging
import math
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from diffusion_accel.measure.timing import timed

from .baton import Baton
from .calls import Call, near, run_together
from .curve import Curve

logger = logging.getLogger(__name__)

_USUAL_WAIT = 0.005  # seconds, where nothing was measured
_REMEMBERED = 1024  # kinds of calls
_STAY = 10.0  # times as long as a change of adapters took, other ones wait
_UNKNOWN = Curve()
_NEVER, _AT_ONE_TIMESTEP, _ALWAYS = range(3)  # when calls of a kind can be computed in one batch

Adapters = tuple[tuple[str, float], ...]  # names of LoRAs with their scales


class CancelledHere(BaseException):
    """Ends a request's thread where it is. Not an `Exception`: nothing on the way may take it for an error."""


@dataclass(eq=False)
class Ticket:
    """A request while it runs, as the collector knows it.

    Attributes:
        adapters: which LoRAs it is drawn with, and their scales; others only between two of its calls.
        measuring: its calls are measured with growing numbers of rows.
        stopped: why it is to end, if it is.
        spent: seconds of computing that it had so far, its share of each batch.
        away: when its last call was answered.
        calls: how many of its calls were computed in batches.
        together: the rows of these batches, its own and others'.
        alone: how many of its calls ran in its own thread.
    """

    adapters: Adapters = ()
    measuring: bool = False
    stopped: BaseException | None = None
    spent: float = 0.0
    away: float = 0.0
    calls: int = 0
    together: int = 0
    alone: int = 0


@dataclass(eq=False)
class _Waiting:
    """A call that waits for its output, or a thread that waits for its turn (without a call)."""

    ticket: Ticket
    what: str
    function: Callable[..., Any] | None = None
    call: Call | None = None
    came: float = field(default_factory=time.monotonic)
    wake: threading.Event = field(default_factory=threading.Event)
    over: threading.Event = field(default_factory=threading.Event)  # of a turn
    result: Any = None
    error: BaseException | None = None

    def finish(self, result: Any = None, error: BaseException | None = None) -> None:
        """Answer the thread that waits."""
        self.result, self.error = result, error
        self.ticket.away = time.monotonic()
        self.wake.set()

    @property
    def rows(self) -> int:
        return 0 if self.call is None else self.call.rows


class Collector:
    """One thread computes what the threads of requests ask for; everything else they do by themselves.

    It takes the request that had the least of its time so far, and with it every other that asks for the same: so
    small images are not kept waiting by large ones, nor large ones by small ones. Before it begins it waits for
    requests that are on their way to their next call, as long as a larger batch would save, and no longer than `wait`
    after the last one came.

    The first batch of a kind is compared with one of its calls computed alone, and so is the first with several
    timesteps. Where rows turn out not to be independent (a model that looks at the whole batch, or is given something
    that only looked like rows), calls of this kind are computed one after the other from then on. A batch that fails is
    computed call by call, so that an error reaches the request that caused it and no other.

    Args:
        most: rows of a batch at most; a single call may have more.
        wait: seconds at most; None: what was measured says how long, 5 ms where nothing was.
        activate: called before a batch with the adapters that it is drawn with, if they are others than before.
        doubling: a batch has 1, 2, 4, 8, … rows: each number of rows is a graph of its own where models are compiled.

    Attributes:
        curves: by kind of call, what rows of it cost.
        calls: what was called -> how many calls were answered.
        batches: (what was called, rows) -> how many batches they were; of no rows: turns of a thread.
        baton: what a request's thread holds while it runs Python; given away while it waits here.
    """

    def __init__(
        self,
        most: int = 16,
        wait: float | None = None,
        activate: Callable[[Adapters], None] | None = None,
        doubling: bool = False,
    ) -> None:
        self.most, self.wait, self._activate, self._doubling = most, wait, activate, doubling
        self.curves: dict[Any, Curve] = {}
        self.calls: Counter[str] = Counter()
        self.batches: Counter[tuple[str, int]] = Counter()
        self._changed = threading.Condition()
        self._waiting: list[_Waiting] = []
        self._live: set[Ticket] = set()
        self._trusted: OrderedDict[Any, int] = OrderedDict()  # by kind: one of those above
        self._least: OrderedDict[Any, float] = OrderedDict()  # seconds of a row, by kind
        self._limits: dict[Any, int] = {}  # rows that were not too many, of kinds of which some were
        self._adapters: Adapters | None = ()
        self._change_cost = self._since_change = 0.0  # seconds
        self._latest = 0.0  # what the request that was served last had spent
        self._stopped: BaseException | None = None
        self.baton = Baton()
        self._thread = threading.Thread(target=self._loop, name="collector", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------ threads of requests
    def enter(self, ticket: Ticket) -> None:
        """A request begins to run: batches wait for its calls."""
        with self._changed:
            ticket.spent = min((other.spent for other in self._live), default=self._latest)
            ticket.away = time.monotonic()
            self._live.add(ticket)

    def leave(self, ticket: Ticket) -> None:
        """It has ended."""
        with self._changed:
            self._live.discard(ticket)
            self._changed.notify_all()

    def stop_request(self, ticket: Ticket, why: BaseException) -> None:
        """End a request where it waits, or at its next call."""
        with self._changed:
            ticket.stopped = ticket.stopped or why
            for one in [one for one in self._waiting if one.ticket is ticket]:
                self._waiting.remove(one)
                one.finish()
            self._changed.notify_all()

    def check(self, ticket: Ticket) -> None:
        """Raise why a request is to end, if it is."""
        if why := ticket.stopped or self._stopped:
            raise type(why)(*why.args)

    def wait_for(self, ticket: Ticket, ready: Callable[[], bool]) -> None:
        """Wait until something is there (`notify` asks again); meanwhile no batch waits for this request.

        Raises:
            BaseException: why the request is to end.
        """
        with self.baton.aside(), self._changed:
            self._live.discard(ticket)
            self._changed.notify_all()
            self._changed.wait_for(lambda: ready() or ticket.stopped or self._stopped)
            ticket.away = time.monotonic()
            self._live.add(ticket)
        self.check(ticket)

    def notify(self) -> None:
        """Something that `wait_for` waits for may be there."""
        with self._changed:
            self._changed.notify_all()

    def compute(self, ticket: Ticket, what: str, function: Callable[..., Any], call: Call) -> Any:
        """What a function returns for a call, computed with others in a batch.

        Raises:
            BaseException: what the function raises for this call, or why the request is to end.
        """
        one = _Waiting(ticket, what, function, call)
        with self.baton.aside():
            self._park(one)
        if one.error is not None:
            raise one.error
        return one.result

    @contextmanager
    def turn(self, ticket: Ticket, what: str) -> Iterator[None]:
        """While nothing else is computed: for calls that cannot share a batch, in the request's own thread."""
        one = _Waiting(ticket, what)
        with self.baton.aside():
            try:
                self._park(one)
                if one.error is not None:
                    raise one.error
                yield
            finally:
                ticket.away = time.monotonic()
                one.over.set()

    def _park(self, one: _Waiting) -> None:
        with self._changed:
            self.check(one.ticket)
            self._waiting.append(one)
            self._changed.notify_all()
        one.wake.wait()
        self.check(one.ticket)

    @property
    def works(self) -> bool:
        """Whether its thread lives."""
        return self._thread.is_alive()

    def stop(self, why: BaseException) -> None:
        """End everything: what waits, and whatever is asked for from now on, raises `why`."""
        with self._changed:
            self._stopped = why
            while self._waiting:
                self._waiting.pop().finish()
            self._changed.notify_all()
        self._thread.join()

    # ------------------------------------------------------------------ which calls are next
    def _loop(self) -> None:
        with torch.no_grad():
            while self._serve():
                pass

    def _next(self) -> list[_Waiting]:
        """The calls of the next batch, taken from those that wait; none when everything is to end."""
        with self._changed:
            while not self._stopped:
                group = self._group()
                left = self._worth_waiting(group) if group else None
                if group and left is not None and left <= 0:
                    for one in group:
                        self._waiting.remove(one)
                    return group
                self._changed.wait(left if left != math.inf else None)
            return []

    def _group(self) -> list[_Waiting]:
        """The waiting call whose request had least so far, and those that can be computed with it."""
        here = [one for one in self._waiting if one.ticket.adapters == self._adapters]
        settled = here and self._since_change < _STAY * self._change_cost
        first = min(here if settled else self._waiting, key=_spent, default=None)
        if first is None:
            return []
        if first.call is None or first.ticket.measuring or self._trusted.get(first.call.key) == _NEVER:
            return [first]
        same = (first.call.key, first.ticket.adapters)
        mates = [one for one in self._waiting if one.call and (one.call.key, one.ticket.adapters) == same]
        mates.sort(key=_spent)
        group, rows, cap = [first], first.rows, self._cap(first)
        for one in mates:
            if one is not first and not one.ticket.measuring and rows + one.rows <= cap:
                group.append(one)
                rows += one.rows
        while self._doubling and len(group) > 1 and rows & (rows - 1):
            rows -= group.pop().rows
        return group

    def _worth_waiting(self, group: list[_Waiting]) -> float:
        """Seconds that are left to wait for requests on their way to their next call."""
        waiting, rows = {one.ticket for one in self._waiting}, sum(one.rows for one in group)
        coming = [ticket.away for ticket in self._live if ticket not in waiting]
        first = group[0]
        if not coming or first.call is None or rows + first.rows > self._cap(first):
            return 0.0
        curve = self._curve(first)
        bound = curve.saved(rows, first.rows) if curve.seconds else _USUAL_WAIT
        if self.wait is not None:
            bound = self.wait if not curve.seconds or self.wait == math.inf else min(bound, self.wait)
        # while they come one after the other, each may be waited for from when the one before came
        return max(*coming, *(one.came for one in group)) + bound - time.monotonic()

    def _cap(self, one: _Waiting) -> int:
        assert one.call is not None
        return min(self._curve(one).cap(self.most), self._limits.get(one.call.key, self.most))

    def _curve(self, one: _Waiting) -> Curve:
        return self.curves.get(one.call.key if one.call else None, _UNKNOWN)

    # ------------------------------------------------------------------ computing
    def _serve(self) -> bool:
        """Compute the next batch, or give one thread its turn; False when everything is to end."""
        group = self._next()
        if not group:
            return False
        first, began = group[0], time.perf_counter()
        try:
            self._with_adapters(first.ticket.adapters)
            if first.call is None:
                self.batches[first.what, 0] += 1
                first.wake.set()
                first.over.wait()
            elif first.ticket.measuring:
                self._measured(first)
            else:
                self._computed(group)
        except BaseException as error:
            for one in group:
                if not one.wake.is_set():
                    one.finish(error=error)
        rows, took = sum(one.rows for one in group), time.perf_counter() - began
        seconds = self._cost(first, rows, took)
        with self._changed:
            self._since_change += took
            self._latest = first.ticket.spent
            for one in group:
                one.ticket.spent += seconds * (one.rows / rows if rows else 1)
        return True

    def _cost(self, one: _Waiting, rows: int, took: float) -> float:
        """Seconds that a batch is charged: what was measured, or the least that so many rows of its kind took so far.

        The first of a kind is charged nothing: it makes memory and graphs, while threads may be making twins, and who
        came first would wait for all others until they had as much.
        """
        if (measured := self._curve(one).at(rows)) or one.call is None:
            return measured or took
        known = self._least.get(one.call.key, math.inf)
        least = self._least[one.call.key] = min(took / max(1, rows), known)
        while len(self._least) > _REMEMBERED:
            self._least.popitem(last=False)
        return 0.0 if known == math.inf else least * rows

    def _with_adapters(self, adapters: Adapters) -> None:
        if adapters != self._adapters and self._activate is not None:
            self._adapters = None  # should it fail, nobody knows
            _, self._change_cost = timed(functools.partial(self._activate, adapters))
            self._since_change = 0.0
        self._adapters = adapters

    def _computed(self, group: list[_Waiting]) -> None:
        """Answer calls with one key."""
        first = group[0]
        assert first.call is not None
        outputs = self._together(group) if len(group) > 1 else None
        if outputs is None:
            failed = [self._by_itself(one) for one in group]
            if len(group) > 1 and not any(failed):  # too many rows for the memory, for example
                self._limits[first.call.key] = max(1, sum(one.rows for one in group) // 2)
            return
        rows = sum(one.rows for one in group)
        self.batches[first.what, rows] += 1
        for one, output in zip(group, outputs, strict=True):
            self._answer(one, output, rows)

    def _together(self, group: list[_Waiting]) -> list[Any] | None:
        """The outputs of calls computed as one batch; None if they have to be computed one after the other."""
        first, calls = group[0], [one.call for one in group if one.call is not None]
        assert first.call is not None and first.function is not None
        try:
            outputs = run_together(first.function, calls)
            return outputs if self._independent(first, calls, outputs) else None
        except Exception as error:  # one of the requests is to blame, or there are too many rows, or rows there are not
            logger.info("%s: a batch failed (%r); its calls are computed one after the other", first.what, error)
            return None

    def _independent(self, one: _Waiting, calls: Sequence[Call], outputs: Sequence[Any]) -> bool:
        """Whether a batch gave what its calls give alone: known of their kind, or found out with one of them."""
        key, function = calls[0].key, one.function
        known = self._trusted.get(key)
        if known == _ALWAYS:
            return True
        other = next((i for i, call in enumerate(calls) if call.time != calls[0].time), None)
        if known == _AT_ONE_TIMESTEP and other is None:
            return True
        assert function is not None
        place = len(calls) - 1 if other is None else other
        if not near(outputs[place], calls[place].run(function)):
            logger.warning("%s: rows of a batch are not independent; calls like this one run by themselves", one.what)
            self._trusted[key] = _NEVER
        else:
            self._trusted[key] = _ALWAYS if other is not None or not calls[0].time else _AT_ONE_TIMESTEP
        while len(self._trusted) > _REMEMBERED:
            self._trusted.popitem(last=False)
        return self._trusted[key] != _NEVER

    def _by_itself(self, one: _Waiting) -> bool:
        """Answer one call; whether it failed."""
        assert one.call is not None and one.function is not None
        try:
            output = one.call.run(one.function)
        except BaseException as error:
            one.finish(error=error)
            return True
        self.batches[one.what, one.rows] += 1
        self._answer(one, output, one.rows)
        return False

    def _answer(self, one: _Waiting, output: Any, rows: int) -> None:
        """Give a call its output, which was computed in a batch of so many rows."""
        self.calls[one.what] += 1
        one.ticket.calls += 1
        one.ticket.together += rows
        one.finish(output)

    def _measured(self, one: _Waiting) -> None:
        """Answer a call after it was computed with more and more rows."""
        call, function = one.call, one.function
        assert call is not None and function is not None
        batches: list[list[Call]] = []
        times = 1 if call.key not in self.curves else self.most + 1
        while call.rows and times * call.rows <= max(self.most, call.rows) and isinstance(call.key, tuple):
            try:
                run_together(function, [call] * times)  # the first time memory is made, or a graph compiled
            except Exception as error:
                logger.info("%s: %d rows cannot be computed together (%r)", one.what, times * call.rows, error)
                break
            batches.append([call] * times)
            times *= 2
        # in turn: whatever else the machine does meanwhile meets all of them
        rounds = [[timed(functools.partial(run_together, function, b))[1] for b in batches] for _ in range(3)]
        if batches:
            seconds = {
                len(b) * call.rows: min(each) for b, each in zip(batches, zip(*rounds, strict=True), strict=True)
            }
            self.curves[call.key] = Curve(f"{one.what} {call.shape}", seconds)
        self._by_itself(one)


def _spent(one: _Waiting) -> float:
    return one.ticket.spent
