"""Hooks on transformers: tokens are shared among processes where diffusers cannot, and for steps that do not wait.

Each process has a range of the tokens. They are cut where they enter the first block, self-attention is given the keys
and values of all, and behind the last layer they are put together. What the layers are called is in
`denoisers.Tokens`; keys and values are taken where attention itself is computed, so rotary embeddings,
normalisation, LoRA and quantized layers work unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers.hooks import ModelHook
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from diffusion_accel.denoisers import Tokens, prediction, token_layers, with_prediction
from diffusion_accel.errors import CallStateError, ConfigurationError
from diffusion_accel.hooks import HookSet, bind_forward, map_tensors, tensors_in

from .agreement import latents_given
from .geometry import Level, Split
from .run import PatchRun

TOKENS = 1  # their dimension in (batch, tokens, channels)


def install_tokens(
    hooks: HookSet, run: PatchRun, model: nn.Module, name: str, cfg_parallel: bool, check: Callable[..., None]
) -> None:
    """Put the hooks on a transformer that `token_layers` knows.

    Args:
        name: of the model, goes before the layers' names.
        cfg_parallel: halves of the processes take halves of the batch.
        check: called with the arguments of the call, before anything is exchanged.
    """
    layers = token_layers(model)
    tokens = layers.tokens
    for number, block in enumerate(layers.blocks):
        if number == 0 or tokens.positions:
            hooks.add(block, BlockHook(run, tokens, first=number == 0))
    for where, attention in layers.attentions.items():
        hooks.add(attention, TokenAttentionHook(run, f"{name}.{where}", tokens.text))
    for end in layers.ends:
        hooks.add(end, EndHook(run, f"{name}.{tokens.end}", tokens.text))
    hooks.add(model, TokenDenoiserHook(run, name, tokens, cfg_parallel, check))


def split_tokens(count: int, parts: int, part: int) -> Split:
    """So many tokens in ranges that differ by one at most."""
    if count < parts:
        raise ConfigurationError(f"{count} tokens are too few for {parts} processes; use fewer, or a larger image")
    bounds = tuple(count * r // parts for r in range(parts + 1))
    return Split(TOKENS, parts, part, (Level(count, 1, bounds),))


def own_tokens(split: Split, x: torch.Tensor, dim: int, text: str) -> torch.Tensor:
    """This part of a tensor that has a value for every token of the image, and those of a text beside it.

    One with another number of values (one for all, or those of this part already) stays.
    """
    level = split.levels[0]
    more = x.shape[dim] - level.size
    if more < 0 or (more and not text):
        return x
    low, high = level.slice(split.part)
    begin = more if text == "first" else 0
    own = x.narrow(dim, begin + low, high - low)
    if not more:
        return own
    beside = x.narrow(dim, 0 if begin else level.size, more)
    return torch.cat([beside, own] if begin else [own, beside], dim)


def image_tokens(x: torch.Tensor, dim: int, text: int, place: str) -> torch.Tensor:
    """A tensor without the values of so many tokens of a text, which are "first" or "last"."""
    return x.narrow(dim, text if place == "first" else 0, x.shape[dim] - text)


def of_all_parts(
    split: Split, x: torch.Tensor, others: Mapping[int, torch.Tensor], dim: int, text: int, place: str
) -> torch.Tensor:
    """A tensor with the values of the other parts' tokens around this part's, and the text's where they are."""
    own = image_tokens(x, dim, text, place)
    pieces = [others.get(part, own) for part in range(split.parts)]
    beside = x.narrow(dim, 0 if place == "first" else x.shape[dim] - text, text)
    return torch.cat([beside, *pieces] if place == "first" else [*pieces, beside], dim)


class TokenDenoiserHook(ModelHook):
    """On the transformer: compares what the processes were asked for, and says which steps are exact.

    With `cfg_parallel` the first half of the ranks takes the first half of the batch, the second half the other, and
    each half shares the tokens among its ranks.
    """

    def __init__(
        self, run: PatchRun, name: str, tokens: Tokens, cfg_parallel: bool, check: Callable[..., None]
    ) -> None:
        super().__init__()
        self.run, self.name, self.tokens, self.cfg_parallel, self.check = run, name, tokens, cfg_parallel, check

    def new_forward(self, module: nn.Module, *args: object, **kwargs: object) -> Any:
        """Run the transformer on this process's tokens, and return the whole prediction."""
        run, world = self.run, self.run.world
        named = bind_forward(module, args, kwargs)
        self.check(named)
        for name in self.tokens.refused:
            if named.get(name) is not None:
                raise ConfigurationError(
                    f"patch_parallel cannot share {type(module).__name__} with {name}; leave it out"
                )
        rows = len(latents_given(named))
        halves = 2 if self.cfg_parallel and rows % 2 == 0 else 1
        parts = world.size // halves
        half, part = divmod(world.rank, parts)
        if halves == 2:
            named = batch_half(named, rows, half)
        for name in self.tokens.controls:
            if parts > 1 and named.get(name) is not None:
                named[name] = map_tensors(
                    lambda t: own_tokens(split_tokens(t.shape[TOKENS], parts, part), t, TOKENS, ""), named[name]
                )
        peers = tuple(range(half * parts, (half + 1) * parts))
        with run.counted() as stale:
            with run.running(self.name, None, peers, exact=not stale, keeps=run.mode == "displaced"):
                output = self.fn_ref.original_forward(**named)
            run.communicator.flush(tensors_in(named)[0].device)
            return output if halves == 1 else self._both(output, half, parts)

    def _both(self, output: Any, half: int, parts: int) -> Any:
        """The predictions of both halves of the batch, each a tensor or a list of one for each row."""
        run = self.run
        own: Any = prediction(output)
        listed = isinstance(own, list)
        mine = torch.stack(own) if listed else own.contiguous()
        mate = run.world.rank + (parts if half == 0 else -parts)
        what = ("output", f"{self.name}.prediction")
        theirs = run.communicator.swap(what, {mate: mine}, {mate: tuple(mine.shape)}, mine)[mate]
        whole: Any = torch.cat([mine, theirs] if half == 0 else [theirs, mine])
        if listed:
            whole = list(whole)
        return with_prediction(output, whole)


def batch_half(named: dict[str, Any], rows: int, half: int) -> dict[str, Any]:
    """The arguments of a transformer for one half of its batch: of every tensor with so many rows, or every list where
    the latents are one."""
    listed = isinstance(latents_given(named), list)

    def cut(value: Any) -> Any:
        if listed and isinstance(value, list):
            return value[half * rows // 2 : (half + 1) * rows // 2]
        return map_tensors(lambda t: t.chunk(2)[half] if t.dim() and t.shape[0] == rows else t, value)

    return {name: cut(value) for name, value in named.items()}


class BlockHook(ModelHook):
    """On a block: cuts what has a value for every token; the first block's tokens are cut here."""

    def __init__(self, run: PatchRun, tokens: Tokens, first: bool) -> None:
        super().__init__()
        self.run, self.tokens, self.first = run, tokens, first

    def pre_forward(self, module: nn.Module, *args: object, **kwargs: object) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments for this process's tokens."""
        run, tokens = self.run, self.tokens
        named = bind_forward(module, args, kwargs)
        if self.first and len(run.peers) > 1:
            whole, part = named[tokens.argument], run.peers.index(run.world.rank)
            split = run.split = split_tokens(whole.shape[TOKENS], len(run.peers), part)
            named[tokens.argument] = own_tokens(split, whole, TOKENS, "")
        if run.split is not None:
            for name, dims in tokens.positions.items():
                if named.get(name) is not None:
                    named[name] = self._cut(named[name], dims)
        return (), named

    def _cut(self, value: Any, dims: int | tuple[int | None, ...]) -> Any:
        split = self.run.split
        assert split is not None
        if isinstance(dims, tuple):
            return tuple(v if d is None else self._cut(v, d) for v, d in zip(value, dims, strict=True))
        return map_tensors(lambda t: own_tokens(split, t, dims, self.tokens.text), value)


class TokenAttentionHook(ModelHook):
    """On an attention: the one over the image's tokens gets the keys and values of all.

    Args:
        text: see `Tokens`.
    """

    def __init__(self, run: PatchRun, name: str, text: str) -> None:
        super().__init__()
        self.run, self.name, self.text = run, name, text

    def new_forward(self, module: nn.Module, *args: object, **kwargs: object) -> Any:
        """Run the attention; where it computes softmax(q k) v, k and v are those of all processes."""
        if self.run.split is None:
            return self.fn_ref.original_forward(*args, **kwargs)
        named = bind_forward(module, args, kwargs)
        given = named.get("encoder_hidden_states")
        if not self.text and given is not None and given is not named["hidden_states"]:
            return self.fn_ref.original_forward(*args, **kwargs)  # it attends to the text, which every process has
        with DotProduct(self._attend):
            return self.fn_ref.original_forward(*args, **kwargs)

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        *more: Any,
        **named: Any,
    ) -> torch.Tensor:
        """`scaled_dot_product_attention` of (batch, heads, own tokens, channels)."""
        run, split = self.run, self.run.split
        assert split is not None
        level = split.levels[0]
        text = key.shape[-2] - level.rows(split.part)
        if text < 0 or (text and not self.text):
            raise CallStateError(
                f"patch_parallel: {self.name} has {key.shape[-2]} keys, where this part of the image has "
                f"{level.rows(split.part)} tokens; it cannot be shared, switch patch_parallel off"
            )
        local = run.mode == "naive" and not run.exact
        if attn_mask is not None:
            attn_mask = self._mask(attn_mask, text, local)
        if not local:
            both = torch.cat([key, value], -1)
            sent = image_tokens(both, -2, text, self.text).transpose(1, 2).flatten(2)  # (batch, tokens, channels)
            others = {p: t.unflatten(2, (key.shape[1], -1)).transpose(1, 2) for p, t in self._exchange(sent, 1).items()}
            both = of_all_parts(split, both, others, -2, text, self.text)
            key, value = both.split([key.shape[-1], value.shape[-1]], -1)
        return scaled_dot_product_attention(query, key, value, attn_mask, *more, **named)

    def _mask(self, mask: torch.Tensor, text: int, local: bool) -> torch.Tensor:
        """A mask (..., queries, keys) for this part's queries and the keys that they get."""
        split = self.run.split
        assert split is not None
        whole = text + split.levels[0].size
        if mask.shape[-2] == whole:
            mask = own_tokens(split, mask, -2, self.text)
        if local:
            return own_tokens(split, mask, -1, self.text) if mask.shape[-1] == whole else mask
        if mask.shape[-1] in (1, whole):
            return mask
        if mask.shape[-2] != 1:
            raise CallStateError(f"patch_parallel: {self.name} has a mask of its own for each query; leave it out")
        others = self._exchange(image_tokens(mask, -1, text, self.text), -1, ".mask")  # made from this part's tokens
        return of_all_parts(split, mask, others, -1, text, self.text)

    def _exchange(self, own: torch.Tensor, dim: int, of: str = "") -> dict[int, torch.Tensor]:
        """What the other parts have, along `dim` one for each of their tokens; only keys and values are forecast."""
        run, split = self.run, self.run.split
        assert split is not None
        own, shapes = own.contiguous(), {}
        for part in run.others():
            shape = list(own.shape)
            shape[dim] = split.levels[0].rows(part)
            shapes[part] = tuple(shape)
        sends = dict.fromkeys(shapes, own)
        kept = () if of else None  # of what is kept with a message the others' is not forecast
        return run.exchange(("attention", self.name + of), sends, shapes, own, own=kept)[0]


class DotProduct(TorchFunctionMode):
    """While it is entered, `attend` is called for torch's `scaled_dot_product_attention`."""

    def __init__(self, attend: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.attend = attend

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func`, or what stands in for it."""
        return (self.attend if func is scaled_dot_product_attention else func)(*args, **(kwargs or {}))


class EndHook(ModelHook):
    """On the last layer that treats every token by itself: the tokens of all processes, fresh at every step."""

    def __init__(self, run: PatchRun, name: str, text: str) -> None:
        super().__init__()
        self.run, self.name, self.text = run, name, text

    def post_forward(self, _module: nn.Module, output: torch.Tensor) -> torch.Tensor:
        """Put (batch, own tokens, channels) together; a text's tokens stay where they are."""
        run, split = self.run, self.run.split
        if split is None:
            return output
        level = split.levels[0]
        text = output.shape[TOKENS] - level.rows(split.part)
        own = image_tokens(output, TOKENS, text, self.text).contiguous()
        shapes = {part: (len(own), level.rows(part), own.shape[-1]) for part in run.others()}
        others = run.swap(("output", self.name), dict.fromkeys(shapes, own), shapes, own)
        run.split = None
        return of_all_parts(split, output, others, TOKENS, text, self.text)
