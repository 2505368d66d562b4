"""Hooks on the blocks of a transformer: shallow steps run the outer blocks and reuse what the inner ones add."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.hooks import ModelHook
from torch import nn

from ..denoisers import residual_stream_blocks
from ..errors import UnsupportedPipelineError
from ..hooks import bind_forward
from .executor import ReuseRun


def install_parts(run: ReuseRun, denoiser: nn.Module) -> None:
    """The hooks on a denoiser that the kinds of steps of `run` need.

    Raises:
        UnsupportedPipelineError: decoder steps, which only U-Nets have, or shallow steps on blocks that are not known.
    """
    name = type(denoiser).__name__
    if run.kinds.orders("decoder") >= 0:
        raise UnsupportedPipelineError(
            f"{name} is not a U-Net: it has no decoder to run alone; use hold:n or shallow:n,depth"
        )
    depths = run.kinds.depths
    if not depths:
        return
    blocks = residual_stream_blocks(denoiser)
    if not blocks:
        raise UnsupportedPipelineError(f"the blocks of {name} are not known to this toolkit; use hold:n")
    if max(depths) >= len(blocks):
        raise UnsupportedPipelineError(
            f"{name} has {len(blocks)} blocks: the depth of a shallow step must be 1 to {len(blocks) - 1}, "
            f"got {max(depths)}"
        )
    for i, block in enumerate(blocks):
        run.hooks.add(block, BlockHook(run, i, len(blocks)))


def inner(depth: int, blocks: int) -> tuple[int, int]:
    """The first of the blocks that a shallow step leaves out, and the first one behind them."""
    return (depth + 1) // 2, blocks - depth // 2


class BlockHook(ModelHook):
    """On every block. The inner blocks become one sum: h + (what they added at the last full steps, forecast)."""

    def __init__(self, run: ReuseRun, number: int, blocks: int) -> None:
        super().__init__()
        self.run = run
        spans = {depth: inner(depth, blocks) for depth in run.kinds.depths}
        self.inside = {depth for depth, (first, end) in spans.items() if first <= number < end}
        self.begins = {depth for depth, (first, _) in spans.items() if first == number}
        self.ends = {depth for depth, (_, end) in spans.items() if end == number + 1}

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        current = self.run.current
        if current is None:
            return self.fn_ref.original_forward(*args, **kwargs)
        named = bind_forward(module, args, kwargs)
        streams = (named.get("encoder_hidden_states"), named["hidden_states"])
        depth = current.step.depth
        if current.step.mode == "shallow" and depth in self.inside:
            if depth in self.begins:
                current.inputs[depth] = added = current.recall(("added", depth))
                streams = _plus(streams[-len(added) :], added)
            return streams[-1] if len(current.inputs[depth]) == 1 else streams
        if current.full:
            for d in self.begins:
                current.inputs[d] = streams
        output = self.fn_ref.original_forward(*args, **kwargs)
        for d in self.ends if current.full else ():
            results = output if isinstance(output, tuple) else (output,)
            added = _plus(results, current.inputs.pop(d)[-len(results) :], -1)
            current.keep(("added", d), self.run.kinds.orders("shallow", d) + 1, added)
        return output


def _plus(streams: tuple[Any, ...], others: tuple[Any, ...], sign: int = 1) -> tuple[Any, ...]:
    """The sums of two lists of streams, [text and] pictures; a last block may have no text any more."""
    return tuple(None if s is None else torch.add(s, o, alpha=sign) for s, o in zip(streams, others, strict=True))
