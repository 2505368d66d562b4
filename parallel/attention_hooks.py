"""Hooks on self-attention: its keys and values are those of all parts, or of one's own part and its neighbours."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.hooks import ModelHook
from torch import nn

from diffusion_accel.hooks import bind_forward

from .geometry import Level, adjacent
from .run import PatchRun


class AttentionHook(ModelHook):
    """On a self-attention whose processor treats keys and values as usual: tells their layers which part this is."""

    def __init__(self, run: PatchRun, name: str) -> None:
        super().__init__()
        self.run, self.name = run, name
        self.level: Level | None = None  # of the call that is running, if its keys and values are of all parts
        # what entered the layer of keys or that of values last, as it was and with the tokens of other parts
        self._tokens: tuple[torch.Tensor, torch.Tensor] | None = None

    def new_forward(self, module: nn.Module, *args: object, **kwargs: object) -> Any:
        """Run the attention; meanwhile `level` says which part of the image its tokens are."""
        if self.run.split is None:
            return self.fn_ref.original_forward(*args, **kwargs)
        named = bind_forward(module, args, kwargs)
        self.level = own_level(self.run, module, named, self.name)
        try:
            return self.fn_ref.original_forward(*args, **kwargs)
        finally:
            self.level = self._tokens = None

    def with_neighbours(self, tokens: torch.Tensor, level: Level) -> torch.Tensor:
        """Tokens that enter the layer of keys, or that of values, with those of the neighbours: exchanged once."""
        if self._tokens is None or self._tokens[0] is not tokens:
            pieces = gather_tokens(self.run, ("attention", self.name), tokens, level, partial=True)
            self._tokens = tokens, torch.cat(pieces, 1)
        return self._tokens[1]


def own_level(run: PatchRun, module: nn.Module, named: dict[str, Any], name: str) -> Level | None:
    """The resolution of a self-attention; None if this call is one to a text, which is the same for all parts."""
    hidden = named["hidden_states"]
    attends_itself = named.get("encoder_hidden_states") is None
    if not attends_itself and getattr(module, "added_kv_proj_dim", None) is None:
        return None
    return run.level(hidden, name) if hidden.dim() == 4 else run.level_of_tokens(hidden.shape[1], name)


class KeyValueHook(ModelHook):
    """On the layers that make keys and values: adds those of the other parts, (batch, tokens, channels).

    In mode "partial" the tokens that enter are exchanged instead of the keys and values that come out: half the bytes,
    for computing those of the few neighbouring ones here as well.
    """

    def __init__(self, run: PatchRun, attention: AttentionHook, name: str) -> None:
        super().__init__()
        self.run, self.attention, self.name = run, attention, name

    def pre_forward(self, module: nn.Module, *args: object, **kwargs: object) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """In mode "partial": the tokens of the neighbours enter with one's own."""
        run, level = self.run, self.attention.level
        if run.split is None or level is None or run.mode != "partial":
            return args, kwargs
        named = bind_forward(module, args, kwargs)
        first = next(iter(named))
        return (), {**named, first: self.attention.with_neighbours(named[first], level)}

    def post_forward(self, _module: nn.Module, output: torch.Tensor) -> torch.Tensor:
        """In the other modes: keys or values of all parts, in the order of the parts."""
        run, level = self.run, self.attention.level
        local = run.mode == "partial" or (run.mode == "naive" and not run.exact)
        if run.split is None or level is None or local:
            return output
        return torch.cat(gather_tokens(run, ("attention", self.name), output, level, partial=False), 1)


def gather_tokens(
    run: PatchRun, what: tuple[str, str], own: torch.Tensor, level: Level, partial: bool
) -> list[torch.Tensor]:
    """The tokens of all parts, or with `partial` at steps that are not exact, those next to one's own.

    PCPP: part i attends to its own tokens, the last p of the part before and the first p of the part after it.
    """
    split = run.split
    assert split is not None
    batch, _, channels = own.shape
    columns = split.dim == -1

    def ordered(tokens: torch.Tensor, part: int, back: bool = False) -> torch.Tensor:
        """Tokens in the order of the split: column after column where the image is split by columns."""
        if not columns:
            return tokens
        grid = (level.rows(part), level.other) if back else (level.other, level.rows(part))
        return tokens.reshape(batch, *grid, channels).transpose(1, 2).reshape(batch, -1, channels)

    sent = ordered(own, split.part) if partial else own
    shapes = {part: (batch, level.rows(part) * level.other, channels) for part in run.others()}
    later = None
    if partial:
        near = adjacent(split.parts, split.part)
        mine = round(run.fraction * sent.shape[1])
        edge = {part: sent[:, :mine] if before else sent[:, sent.shape[1] - mine :] for part, before in near.items()}
        lengths = {part: round(run.fraction * shapes[part][1]) for part in near}
        later = (
            {part: t.contiguous() for part, t in edge.items()},
            {part: (batch, length, channels) for part, length in lengths.items()},
        )
    got, _ = run.exchange(what, dict.fromkeys(run.others(), sent.contiguous()), shapes, own, later=later)
    if partial and not run.exact:
        for part, before in near.items():
            tokens, length = got[part], lengths[part]
            if tokens.shape[1] != length:  # of the last exact step, which sent all of them
                got[part] = tokens[:, tokens.shape[1] - length :] if before else tokens[:, :length]
        got = {part: got[part] for part in near}
    elif partial:
        got = {part: ordered(tokens, part, back=True) for part, tokens in got.items()}
    return [own if part == split.part else got[part] for part in sorted([*got, split.part])]


class WholeAttentionHook(ModelHook):
    """On a self-attention with a processor of its own: runs it on all positions, and returns this part of them."""

    def __init__(self, run: PatchRun, name: str) -> None:
        super().__init__()
        self.run, self.name = run, name

    def new_forward(self, module: nn.Module, *args: object, **kwargs: object) -> Any:
        """Put the tokens of all parts together, run the attention, and cut this part out of what it returns."""
        run = self.run
        if run.split is None or (run.mode == "naive" and not run.exact):
            return self.fn_ref.original_forward(*args, **kwargs)
        named = bind_forward(module, args, kwargs)
        level = own_level(run, module, named, self.name)
        if level is None:
            return self.fn_ref.original_forward(*args, **kwargs)
        hidden, split = named["hidden_states"], run.split
        tokens = hidden.flatten(2).transpose(1, 2) if hidden.dim() == 4 else hidden
        batch, _, channels = tokens.shape
        pieces = gather_tokens(run, ("attention", self.name), tokens, level, partial=False)
        columns = split.dim == -1
        grids = [(level.other, level.rows(p)) if columns else (level.rows(p), level.other) for p in range(split.parts)]
        whole = torch.cat(
            [t.reshape(batch, *grid, channels) for t, grid in zip(pieces, grids, strict=True)], 2 if columns else 1
        )
        size = whole.shape[1:3]
        named["hidden_states"] = whole.permute(0, 3, 1, 2).contiguous() if hidden.dim() == 4 else whole.flatten(1, 2)
        with run.running("whole", None, (), exact=True):  # its own group normalisation has all positions as well
            output = self.fn_ref.original_forward(**named)
        low, high = level.slice(split.part)
        if hidden.dim() == 4:
            return output.narrow(split.dim, low, high - low).contiguous()
        grid = output.unflatten(1, size)
        return grid.narrow(2 if columns else 1, low, high - low).flatten(1, 2)
