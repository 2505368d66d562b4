"""Hooks on the blocks of a transformer: shallow steps run the outer blocks and reuse what the inner ones add."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.hooks import ModelHook
from torch import nn

from diffusion_accel.denoisers import StreamBlock, stream_blocks
from diffusion_accel.hooks import bind_forward

from .plan import Kinds
from .state import ReuseState

Streams = tuple[Any, ...]


def missing_parts(denoiser: nn.Module, kinds: Kinds) -> str | None:
    """Why a transformer cannot run the kinds of steps of plans; None if it can."""
    name = type(denoiser).__name__
    if kinds.orders("decoder") >= 0:
        return f"{name} is not a U-Net: it has no decoder to run alone; use hold:n or shallow:n,depth"
    if not kinds.depths:
        return None
    try:
        blocks = stream_blocks(denoiser)
    except ValueError as error:
        return f"{error}; use hold:n"
    if len(blocks) < 2:
        return f"{name} has {len(blocks)} block: a shallow step would leave out nothing or all; use hold:n"
    if max(kinds.depths) >= len(blocks):
        return (
            f"{name} has {len(blocks)} blocks: the depth of a shallow step must be 1 to {len(blocks) - 1}, "
            f"got {max(kinds.depths)}"
        )
    return None


def install_parts(state: ReuseState, denoiser: nn.Module) -> None:
    """The hooks on a transformer that the kinds of steps of `state` need; see `missing_parts`."""
    if not state.kinds.depths:
        return
    blocks = stream_blocks(denoiser)
    spans = {depth: inner(depth, len(blocks)) for depth in state.kinds.depths}
    for i, block in enumerate(blocks):
        inside = frozenset(depth for depth, (first, end) in spans.items() if first <= i < end)
        if inside:
            state.hooks.add(block.module, BlockHook(state, block, inside))


def inner(depth: int, blocks: int) -> tuple[int, int]:
    """The first of the blocks that a shallow step leaves out, and the first one behind them."""
    return (depth + 1) // 2, blocks - depth // 2


class BlockHook(ModelHook):
    """On every inner block. The inner blocks of a list become one sum: h + (what they added at the last full steps,
    forecast), at the first of them that is called.

    What lies between two blocks (another list's block, a ControlNet's residual, another layout) runs at every step; so
    it must not be in the sum.
    """

    def __init__(self, state: ReuseState, block: StreamBlock, inside: frozenset[int]) -> None:
        super().__init__()
        self.state, self.inside = state, inside
        self.group, self.streams = block.group, block.streams

    def new_forward(self, module: nn.Module, *args: object, **kwargs: object) -> Any:
        """The block's own forward; what it added is kept at a full step, or stands in for it at a shallow one."""
        current = self.state.current
        shallow = current is not None and current.step.mode == "shallow" and current.step.depth in self.inside
        if current is None or not (shallow or current.full):
            return self.fn_ref.original_forward(*args, **kwargs)
        named = bind_forward(module, args, kwargs)
        given: Streams = tuple(named.get(name) for name in self.streams)
        if shallow:
            key = ("shallow", current.step.depth, self.group)
            if key not in current.entered:
                current.entered.add(key)
                given = _plus(given, current.recall(key))
            return given if len(given) > 1 else given[0]
        output = self.fn_ref.original_forward(*args, **kwargs)
        for depth in self.inside:
            sums = current.added.setdefault((depth, self.group), Added())
            sums.follow(given, output if isinstance(output, tuple) else (output,))
        return output


class Added:
    """What blocks add to their streams. As long as each takes what the one before it returned, that is one difference;
    where something lies between them, one difference more."""

    def __init__(self) -> None:
        self.start: Streams = ()
        self.last: Streams = ()
        self.sum: Streams | None = None

    def follow(self, given: Streams, returned: Streams) -> None:
        """A block has made `returned` of `given`."""
        if not self.last:
            self.start = given
        elif any(a is not b for a, b in zip(given, self.last, strict=True)):
            self.sum, self.start = self.total(), given
        self.last = returned

    def total(self) -> Streams:
        """The sum of all differences; a stream that a block no longer returns (SD 3's text) adds nothing."""
        difference = _plus(self.last, self.start, -1)
        return difference if self.sum is None else _plus(self.sum, difference)


def _plus(streams: Streams, others: Streams, sign: int = 1) -> Streams:
    """The sums of two lists of streams; None where one has ended."""
    pairs = zip(streams, others, strict=True)
    if sign > 0:
        return tuple(s if o is None else o if s is None else s + o for s, o in pairs)
    return tuple(None if s is None or o is None else torch.sub(s, o) for s, o in pairs)
