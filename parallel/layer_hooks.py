"""Hooks on the layers that look beyond one position: convolutions, group normalisation and self-attention.

They act on what goes into a layer and comes out of it, so that quantized layers, LoRA and attention processors keep
working: a convolution gets the rows around its own, a group normalisation the statistics of the whole image, and the
keys and values of self-attention are those of all parts. All other layers treat every position by itself.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.hooks import ModelHook
from torch import nn

from diffusion_accel.hooks import bind_forward

from .geometry import Halo, Level, Window, adjacent, plan_halo
from .run import PatchRun


class HaloHook(ModelHook):
    """On a convolution: gives it the rows around its own, and zeros only at the borders of the image.

    Args:
        entry: the rows around its own are already there (the first layer of a model: every process has its input).
        asymmetric: its input was padded by one row and column at the end (diffusers' `Downsample2D` with padding 0).
    """

    def __init__(self, run: PatchRun, name: str, entry: bool = False, asymmetric: bool = False) -> None:
        super().__init__()
        self.run, self.name = run, name
        self.entry, self.asymmetric = entry, asymmetric
        self._plans: dict[Any, Halo] = {}

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        run = self.run
        if run.split is None:
            return self.fn_ref.original_forward(*args, **kwargs)
        named = bind_forward(module, args, kwargs)
        name = next(iter(named))
        x, dim = named[name], run.split.dim
        if self.asymmetric:
            x = x.narrow(dim, 0, x.shape[dim] - 1)
        level = run.level(x, self.name, more=int(self.asymmetric))
        window = conv_window(module, dim, self.asymmetric)
        halo = self._plan(window, level)
        local = run.mode == "naive" and not run.exact and not self.entry
        pieces = self._around(x, level, halo, local)
        named[name] = torch.cat(pieces, dim) if len(pieces) > 1 else pieces[0]
        padding = module.padding
        changed = list(padding)  # type: ignore[arg-type]
        changed[dim] = 0
        module.padding = tuple(changed)
        try:
            return self.fn_ref.original_forward(**named)
        finally:
            module.padding = padding

    def _plan(self, window: Window, level: Level) -> Halo:
        split = self.run.split
        assert split is not None
        key = (window, level, split.part)
        if key not in self._plans:
            self._plans[key] = plan_halo(window, level, split.parts, split.part)
        return self._plans[key]

    def _around(self, x: torch.Tensor, level: Level, halo: Halo, local: bool) -> list[torch.Tensor]:
        """The rows to compute from, in order."""
        run = self.run
        assert run.split is not None
        dim, begin = run.split.dim, level.bounds[run.split.part]

        def rows(count: int) -> list[int]:
            shape = list(x.shape)
            shape[dim] = count
            return shape

        def zeros(count: int) -> list[torch.Tensor]:
            return [x.new_zeros(rows(count))] if count > 0 else []

        if self.entry:
            return [*zeros(halo.above), x, *zeros(halo.below)]
        if local:
            missing = {part: r[1] - r[0] for part, r in halo.receives.items()}
            before = halo.above + sum(n for part, n in missing.items() if part < run.split.part)
            after = halo.below + sum(n for part, n in missing.items() if part > run.split.part)
            return [*zeros(before), self._own(x, dim, begin, halo), *zeros(after)]
        sends = {p: x.narrow(dim, low - begin, high - low).contiguous() for p, (low, high) in halo.sends.items()}
        shapes = {p: tuple(rows(high - low)) for p, (low, high) in halo.receives.items()}
        got, _ = run.exchange(("halo", self.name), sends, shapes, x)  # also if this part needs nothing: others may
        above = [got[p] for p in sorted(got) if p < run.split.part]
        below = [got[p] for p in sorted(got) if p > run.split.part]
        return [*zeros(halo.above), *above, self._own(x, dim, begin, halo), *below, *zeros(halo.below)]

    @staticmethod
    def _own(x: torch.Tensor, dim: int, begin: int, halo: Halo) -> torch.Tensor:
        # at odd sizes an upsampler before may have made a row too many at the end, since it sees one part only
        low, high = halo.own
        return x if high - low == x.shape[dim] else x.narrow(dim, low - begin, high - low)


def conv_window(module: Any, axis: int, asymmetric: bool = False) -> Window:
    """How a convolution moves along an axis, -2 (rows) or -1 (columns)."""
    padding = module.padding[axis]
    before, after = (0, 1) if asymmetric else (padding, padding)
    return Window(module.kernel_size[axis], module.stride[axis], module.dilation[axis], before, after)


class NormHook(ModelHook):
    """On a group normalisation: the statistics are those of the whole image.

    At exact steps each part sends mean and biased variance of its own, and they are put together by Chan's formula. At
    the others (DistriFusion, section 4.2), "corrected" adds the change of the own statistics to the others' old ones
    and takes its own where that gives no variance; "stale" puts its fresh ones together with the others' old ones.
    """

    def __init__(self, run: PatchRun, name: str) -> None:
        super().__init__()
        self.run, self.name = run, name

    def new_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        run = self.run
        if run.split is None:
            return self.fn_ref.original_forward(*args, **kwargs)
        x = next(iter(bind_forward(module, args, kwargs).values()))
        local = run.group_norm == "local" or run.mode == "naive"
        if local and not run.exact:
            return self.fn_ref.original_forward(*args, **kwargs)
        tokens = x.dim() == 3
        level = run.level_of_tokens(x.shape[-1], self.name) if tokens else run.level(x, self.name)
        wide = (x if x.dtype in (torch.float32, torch.float64) else x.float()).contiguous()
        fresh = statistics_of(wide, module.num_groups, module.eps)
        mean, variance = self._whole(fresh, level)
        scale = torch.rsqrt(variance + module.eps)
        shape = (len(x), module.num_groups, 1)
        weight = x.new_ones(module.num_channels) if module.weight is None else module.weight
        bias = x.new_zeros(module.num_channels) if module.bias is None else module.bias
        factor = scale.view(shape) * weight.to(scale.dtype).view(1, module.num_groups, -1)
        offset = bias.to(scale.dtype).view(1, module.num_groups, -1) - mean.view(shape) * factor
        ones = [1] * (x.dim() - 2)
        factor, offset = (v.reshape(len(x), -1, *ones).to(wide.dtype) for v in (factor, offset))
        return torch.addcmul(offset, wide, factor).to(x.dtype)

    def _whole(self, fresh: torch.Tensor, level: Level) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and variance of the whole image, in double precision, from this part's (2, batch, groups)."""
        run = self.run
        assert run.split is not None
        others, what = run.others(), ("norm", self.name)
        sends, shapes = dict.fromkeys(others, fresh), dict.fromkeys(others, tuple(fresh.shape))
        if not run.exact and run.group_norm == "sync":
            got, before = run.swap(what, sends, shapes, fresh), None
        else:
            got, before = run.exchange(what, sends, shapes, fresh, own=fresh)
        wide = torch.float64 if fresh.device.type != "mps" else torch.float32
        parts = {part: moments(t.to(wide)) for part, t in got.items()}
        own = moments(fresh.to(wide))
        parts[run.split.part] = own if before is None or run.group_norm != "corrected" else moments(before.to(wide))
        shares = {part: level.rows(part) / level.size for part in parts}
        mean = sum(parts[part][0] * share for part, share in shares.items())
        square = sum(parts[part][1] * share for part, share in shares.items())
        if before is not None and run.group_norm == "corrected":
            old = parts[run.split.part]
            mean, square = mean + (own[0] - old[0]), square + (own[1] - old[1])
        variance = square - mean * mean
        if before is not None:
            variance = torch.where(variance < 0, fresh[1].to(wide), variance)
        return mean, variance.clamp(min=0)


def statistics_of(x: torch.Tensor, groups: int, eps: float) -> torch.Tensor:
    """Mean and biased variance (2, batch, groups) of a contiguous tensor (batch, channels, ...).

    From torch's kernel for group normalisation, whose output is not used: on CPUs it is several times as fast as its
    kernel for variances.
    """
    batch, channels = x.shape[:2]
    size = x[0, 0].numel()
    _, mean, scale = torch.native_group_norm(x, None, None, batch, channels, size, groups, eps)
    return torch.stack([mean, (scale**-2 - eps).clamp(min=0)])


def moments(statistics: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and mean of squares from mean and variance (2, ...)."""
    mean, variance = statistics
    return mean, variance + mean * mean


class AttentionHook(ModelHook):
    """On a self-attention whose processor treats keys and values as usual: tells their layers which part this is."""

    def __init__(self, run: PatchRun, name: str) -> None:
        super().__init__()
        self.run, self.name = run, name
        self.level: Level | None = None  # of the call that is running, if its keys and values are of all parts
        # what entered the layer of keys or that of values last, as it was and with the tokens of other parts
        self._tokens: tuple[torch.Tensor, torch.Tensor] | None = None

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
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

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        run, level = self.run, self.attention.level
        if run.split is None or level is None or run.mode != "partial":
            return args, kwargs
        named = bind_forward(module, args, kwargs)
        first = next(iter(named))
        return (), {**named, first: self.attention.with_neighbours(named[first], level)}

    def post_forward(self, module: nn.Module, output: torch.Tensor) -> torch.Tensor:
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

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
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
