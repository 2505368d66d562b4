"""What a call changes on objects: one stack, undone in reverse order whatever happens in the middle of it."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from types import TracebackType
from typing import Any

logger = logging.getLogger(__name__)

_ABSENT = object()
_TRIES = 3  # a step of the way back that something interrupts is begun again so often


class Changes:
    """A stack of what undoes each change. Undoing goes on whatever one of them raises.

    Whoever changes something registers first how it is undone, then changes it, so that an interrupt between the two
    costs nothing. What is registered must do no harm if it is called twice, or if the change was never made.

        with Changes() as changes:
            changes.set(scheduler, "step", watched)
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], Any]] = []

    def add(self, undo: Callable[[], Any]) -> None:
        """Register what undoes a change that is about to be made."""
        self._undo.append(undo)

    def set(self, owner: object, name: str, value: object) -> None:
        """Set an attribute of one object; undone, the object has the one that it had, or none of its own."""
        self.add(functools.partial(_put_back, owner, name, vars(owner).get(name, _ABSENT)))
        vars(owner)[name] = value

    def undo(self) -> None:
        """Undo everything, the last change first. Safe to call twice.

        Raises:
            BaseException: the first that was raised on the way, after everything else was undone.
        """
        raised: list[BaseException] = []
        try:
            try:
                self._run(raised)
            finally:
                self._run(raised)  # an interrupt that came between two steps
            for error in raised[1:]:
                logger.warning("while a call was tidied up: %r", error)
            if raised:
                raise raised[0]
        finally:
            raised.clear()  # an exception that a frame of its own traceback refers to is a cycle

    def _run(self, raised: list[BaseException]) -> None:
        while self._undo:
            undo, failed = self._undo[-1], False
            for _ in range(_TRIES):
                try:
                    undo()
                    break
                except BaseException as error:  # Ctrl-C, or what a signal's handler raises: it may be half done
                    if not failed:
                        raised.append(error)
                    failed = True
            if self._undo and self._undo[-1] is undo:
                self._undo.pop()

    def __enter__(self) -> Changes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            try:
                self.undo()
            finally:
                self.undo()  # an interrupt that came before the first step
        except BaseException as later:
            if error is None or (isinstance(error, Exception) and not isinstance(later, Exception)):
                raise  # nothing ended the call before, or only an error and now somebody wants to stop
            logger.warning("while a call was tidied up: %r", later)  # what ended the call counts


def _put_back(owner: object, name: str, before: object) -> None:
    if before is _ABSENT:
        vars(owner).pop(name, None)
    else:
        vars(owner)[name] = before
