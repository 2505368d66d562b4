"""What hooks inside of a model do during one call of it, as a function of tensors, so that it can be compiled.

Such hooks read and leave tensors beside what the model takes and returns. Whoever puts them there says for each call
what they read; whoever makes a graph of the call makes that inputs of it, makes what they leave outputs, and traces the
model with its hooks.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

CALL = "_diffusion_accel_call"  # of a model whose call runs
_thread = threading.local()


@contextmanager
def making_a_graph() -> Iterator[None]:
    """Within it what runs is traced, for calls with other values: nothing may depend on those of this one."""
    _thread.traced = True
    try:
        yield
    finally:
        _thread.traced = False


def is_traced() -> bool:
    """Whether what runs in this thread is traced for a graph; see `making_a_graph`."""
    return getattr(_thread, "traced", False)


class CallInside:
    """What the hooks of one feature do inside of a model during one call of it.

    Args:
        hooks: the name under which they are installed (`HookSet`).
        signature: the same text for all calls in which they do the same; None where it depends on more than tensors.
        given: the tensors that they read, nested.

    Attributes:
        left: what they leave: nested tensors and plain values.
    """

    def __init__(self, hooks: str, signature: str | None, given: Any) -> None:
        self.hooks, self.signature = hooks, signature
        self.start(given)

    def start(self, given: Any) -> None:
        """The model's forward begins, with these tensors to read; what an earlier one left is forgotten."""
        self.given: Any = given
        self.left: Any = {}

    def finish(self) -> Any:
        """The forward has ended, or a graph has run and its outputs are in `left`: what is left."""
        return self.left


@contextmanager
def calling(model: nn.Module, call: CallInside) -> Iterator[None]:
    """While a model is called: what its hooks inside do."""
    vars(model)[CALL] = call
    try:
        yield
    finally:
        vars(model).pop(CALL, None)


def call_inside(model: nn.Module) -> CallInside | None:
    """What hooks inside of a model do in the call that runs, if they are there and can say it."""
    return getattr(model, CALL, None)
