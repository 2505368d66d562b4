"""Transformers: the blocks that add to their streams, and the layers through which their tokens go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from diffusion_accel.hooks import model_of

from .families import SEPARABLE_BLOCKS, ModelFamily, Tokens, model_family
from .find import getattr_path

# Attention processors that hand the queries, keys and values of all tokens to torch's scaled_dot_product_attention, for
# all rows of the batch or row by row.
_DOT_PRODUCT_PROCESSORS = frozenset(
    {
        "AllegroAttnProcessor2_0",
        "AttnProcessor2_0",
        "AuraFlowAttnProcessor2_0",
        "CogVideoXAttnProcessor2_0",
        "CogView4AttnProcessor",
        "Flux2AttnProcessor",
        "Flux2ParallelSelfAttnProcessor",
        "FluxAttnProcessor",
        "HunyuanAttnProcessor2_0",
        "HunyuanVideoAttnProcessor2_0",
        "JointAttnProcessor2_0",
        "LTXVideoAttnProcessor",
        "Lumina2AttnProcessor2_0",
        "MochiAttnProcessor2_0",
        "QwenDoubleStreamAttnProcessor2_0",
        "StableAudioAttnProcessor2_0",
        "WanAttnProcessor",
        "ZSingleStreamAttnProcessor",
    }
)


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


def is_ragged(module: nn.Module) -> bool:
    """Whether the streams of a transformer are as long as the longest text of a batch, so that half of the rows may
    have shorter ones."""
    family = _stream_family(type(module))
    return family is not None and family.ragged


def _stream_family(cls: type[nn.Module]) -> ModelFamily | None:
    """The family of the first class among `cls` and its bases whose streams are known, if `cls` runs its `forward`."""
    bases: tuple[Any, ...] = cls.__mro__
    for base in bases:
        family = model_family(base)
        if family is not None and family.stream_lists:
            return family if base.forward is cls.forward else None
    return None


@dataclass(frozen=True)
class TokenLayers:
    """The layers of a transformer at which its tokens are shared; see `Tokens`.

    Attributes:
        blocks: in the order in which `forward` runs them.
        attentions: those of the blocks, by their name in the model.
        ends: the layers of which a call runs one, after the blocks.
    """

    tokens: Tokens
    blocks: list[nn.Module]
    attentions: dict[str, nn.Module]
    ends: list[nn.Module]


def token_layers(module: nn.Module) -> TokenLayers:
    """Where the tokens of a transformer can be shared.

    Raises:
        ValueError: with the reason if they cannot be, as the model is now.
    """
    name = type(module).__name__
    family = model_family(type(module))
    if family is None or family.tokens is None:
        raise ValueError(f"{name} is not a transformer whose tokens are known to be sharable")
    tokens = family.tokens
    lists = tokens.lists or tuple(part for names in family.stream_lists for part in names.split("|"))
    blocks = {f"{part}.{i}": block for part in lists for i, block in enumerate(getattr(module, part))}
    unknown = sorted({type(block).__name__ for block in blocks.values()} - set(family.streams or tokens.blocks))
    if unknown:
        raise ValueError(f"{name} has blocks that are not known to this toolkit: {', '.join(unknown)}")
    found: dict[str, Any] = {
        f"{above}.{below}": part
        for above, block in blocks.items()
        for below, part in block.named_modules()
        if getattr(part, "processor", None) is not None
    }
    strange = sorted({type(part.processor).__name__ for part in found.values()} - _DOT_PRODUCT_PROCESSORS)
    if strange:
        raise ValueError(f"{name} has attention processors that are not known to work on a part: {', '.join(strange)}")
    above, each, _ = tokens.end.partition(".*")
    end: Any = getattr_path(module, above)
    return TokenLayers(tokens, list(blocks.values()), found, list(end.values()) if each else [end])


def residual_stream_blocks(module: nn.Module) -> list[nn.Module]:
    """The blocks of a transformer whose branches can be told apart, in order; empty if it is not one we know."""
    module = model_of(module)
    if hasattr(module, "up_blocks"):
        return []
    lists = [getattr(module, name, ()) for name in ("transformer_blocks", "single_transformer_blocks")]
    blocks = [block for part in lists for block in part]
    return blocks if blocks and all(type(block).__name__ in SEPARABLE_BLOCKS for block in blocks) else []
