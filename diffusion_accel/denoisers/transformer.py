"""Transformers: the blocks that add to their streams."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from diffusion_accel.hooks import model_of

from .families import SEPARABLE_BLOCKS, ModelFamily, model_family


@dataclass(frozen=True)
class StreamBlock:
    """A block of a transformer that adds to its streams.

    Attributes:
        group: of blocks whose streams have the same form, so that what they add can be summed up.
        streams: the arguments that it adds to, in the order in which it returns them.
    """

    module: nn.Module
    group: str
    streams: tuple[str, ...]


def stream_blocks(module: nn.Module) -> list[StreamBlock]:
    """The blocks of a transformer that add to its streams, in the order in which its `forward` runs them.

    Raises:
        ValueError: with the reason if they are not known.
    """
    family = _stream_family(type(module))
    if family is None:
        raise ValueError(f"the blocks of {type(module).__name__} are not known to this toolkit")
    blocks: list[StreamBlock] = []
    for names in family.stream_lists:
        lists = [[(name, block) for block in getattr(module, name, None) or ()] for name in names.split("|")]
        for turn in zip(*lists, strict=True):
            for name, block in turn:
                streams = family.streams.get(type(block).__name__)
                if streams is None:
                    raise ValueError(f"{type(block).__name__} is not a block that is known to this toolkit")
                blocks.append(StreamBlock(block, name if "|" in names else "+".join(streams), streams))
    return blocks


def _stream_family(cls: type[nn.Module]) -> ModelFamily | None:
    """The family of the first class among `cls` and its bases whose streams are known, if `cls` runs its `forward`."""
    bases: tuple[Any, ...] = cls.__mro__
    for base in bases:
        family = model_family(base)
        if family is not None and family.stream_lists:
            return family if base.forward is cls.forward else None
    return None


def residual_stream_blocks(module: nn.Module) -> list[nn.Module]:
    """The blocks of a transformer whose branches can be told apart, in order; empty if it is not one we know."""
    module = model_of(module)
    if hasattr(module, "up_blocks"):
        return []
    lists = [getattr(module, name, ()) for name in ("transformer_blocks", "single_transformer_blocks")]
    blocks = [block for part in lists for block in part]
    return blocks if blocks and all(type(block).__name__ in SEPARABLE_BLOCKS for block in blocks) else []
