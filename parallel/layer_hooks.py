"""Hooks on convolutions and group normalisation, which look beyond one position; those on attention are beside it.

They act on what goes into a layer and comes out of it, so that quantized layers, LoRA and attention processors keep
working: a convolution gets the rows around its own, a group normalisation the statistics of the whole image, and the
keys and values of self-attention (`attention_hooks.py`) are those of all parts. All other layers treat every position
by itself.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.hooks import ModelHook

from diffusion_accel.hooks import bind_forward

from .geometry import Halo, Level, Window, plan_halo
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

    def new_forward(self, module: Any, *args: object, **kwargs: object) -> Any:
        """Run the convolution on this part's rows and those that it needs of the neighbours."""
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
        changed = list(padding)
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
    and takes its own where that gives no variance; "stale" puts its fresh ones together with the others' old ones. A
    run that forecasts takes the mean of the corrected ones and of what continues the others' last change.
    """

    def __init__(self, run: PatchRun, name: str) -> None:
        super().__init__()
        self.run, self.name = run, name

    def new_forward(self, module: Any, *args: object, **kwargs: object) -> Any:
        """Normalise this part with mean and variance of the whole image, put together in double precision."""
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
        found = {part: moments(t.to(wide)) for part, t in got.items()}
        own = found[run.split.part] = moments(fresh.to(wide))
        if run.group_norm == "corrected":
            found |= self._corrected(found, own, None if before is None else moments(before.to(wide)))
        mean, square = sum(m * (level.rows(part) / level.size) for part, m in found.items()).unbind(-1)  # type: ignore[union-attr]
        variance = square - mean * mean
        if before is not None:
            variance = torch.where(variance < 0, fresh[1].to(wide), variance)
        return mean, variance.clamp(min=0)

    def _corrected(
        self, found: dict[int, torch.Tensor], own: torch.Tensor, before: torch.Tensor | None
    ) -> dict[int, torch.Tensor]:
        """The moments of the other parts at this step; `before`: this part's own when `found` was, None: found now."""
        run = self.run
        others, key = {part: m for part, m in found.items() if m is not own}, ("moments", run.visited)
        if before is None:
            if run.forecaster is not None:
                run.forecaster.note(key, others, {0: own})
            return others
        alike = {part: m + (own - before) for part, m in others.items()}
        if run.forecaster is None:
            return alike
        trend = run.forecaster.forecast(key, others, {0: own})
        return {part: (trend[part] + m) / 2 for part, m in alike.items()}


def statistics_of(x: torch.Tensor, groups: int, eps: float) -> torch.Tensor:
    """Mean and biased variance (2, batch, groups) of a contiguous tensor (batch, channels, ...).

    From torch's kernel for group normalisation, whose output is not used: on CPUs it is several times as fast as its
    kernel for variances.
    """
    batch, channels = x.shape[:2]
    size = x[0, 0].numel()
    _, mean, scale = torch.native_group_norm(x, None, None, batch, channels, size, groups, eps)
    return torch.stack([mean, (scale**-2 - eps).clamp(min=0)])


def moments(statistics: torch.Tensor) -> torch.Tensor:
    """Mean and mean of squares (batch, groups, 2) from mean and variance (2, batch, groups)."""
    mean, variance = statistics
    return torch.stack([mean, variance + mean * mean], -1)
