"""Hooks on whole models: what goes in is cut to the part of this process, what comes out is put together again."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.hooks import ModelHook
from torch import nn

from diffusion_accel.denoisers import (
    RESIDUAL_ARGUMENTS,
    asymmetric_convolutions,
    condition_halvings,
    doublings,
    entry_layer,
    halvings,
    prediction,
    spatial_attentions,
    text_norms,
    unwrapped,
    usual_attention,
    with_prediction,
)
from diffusion_accel.errors import ConfigurationError
from diffusion_accel.hooks import HookSet, bind_forward, forward_parameters, map_tensors

from .attention_hooks import AttentionHook, KeyValueHook, WholeAttentionHook
from .geometry import Split, plan_split
from .layer_hooks import HaloHook, NormHook, conv_window
from .run import PatchRun


def install_layers(hooks: HookSet, run: PatchRun, module: nn.Module, prefix: str, entry: nn.Module | None) -> None:
    """Put the hooks on every layer of a model that looks beyond one position.

    Args:
        prefix: goes before the layers' names.
        entry: the first layer, if its input comes with the rows that it needs.
    """
    asymmetric = asymmetric_convolutions(module)
    texts = text_norms(module)  # these see all of the text
    entries = set() if entry is None else {id(layer) for layer in entry.modules()}
    for name, layer in module.named_modules():
        where = f"{prefix}.{name}"
        if isinstance(layer, (nn.Conv2d, nn.Conv3d)):
            if max(layer.kernel_size[-2:]) > 1 or max(layer.stride[-2:]) > 1:
                hooks.add(layer, HaloHook(run, where, id(layer) in entries, id(layer) in asymmetric))
        elif isinstance(layer, nn.GroupNorm) and id(layer) not in texts:
            hooks.add(layer, NormHook(run, where))
    for name, attention in spatial_attentions(module).items():
        parts: Any = attention
        where = f"{prefix}.{name}"
        if not usual_attention(parts.processor):
            hooks.add(attention, WholeAttentionHook(run, where))
        elif parts.to_k is not None:
            hook = AttentionHook(run, where)
            hooks.add(attention, hook)
            hooks.add(parts.to_k, KeyValueHook(run, hook, f"{where}.to_k"))
            hooks.add(parts.to_v, KeyValueHook(run, hook, f"{where}.to_v"))


def gathered(run: PatchRun, own: torch.Tensor, dim: int, extents: list[int], name: str) -> list[torch.Tensor]:
    """The tensors of all ranks, fresh at every step; `extents` says how long each is along `dim`."""
    shapes = {}
    for rank, extent in enumerate(extents):
        shape = list(own.shape)
        shape[dim] = extent
        shapes[rank] = tuple(shape)
    del shapes[run.world.rank]
    got = run.communicator.swap(("output", name), dict.fromkeys(shapes, own.contiguous()), shapes, own)
    return [got.get(rank, own) for rank in range(len(extents))]


# ---------------------------------------------------------------------- the denoiser
class DenoiserHook(ModelHook):
    """On the U-Net: this process computes its rows of the prediction, and gets those of the others.

    With `cfg_parallel` the first half of the ranks takes the first half of the batch (guidance's unconditional
    predictions), the second half the other, and each half splits the image among its ranks.

    Args:
        check: called with the arguments of the call, before anything is exchanged.
    """

    def __init__(self, run: PatchRun, cfg_parallel: bool, check: Any) -> None:
        super().__init__()
        self.run, self.cfg_parallel, self.check = run, cfg_parallel, check
        self._rows: dict[int, int] = {}  # of one step's batch, by the number of the call within a step

    def new_forward(self, module: Any, *args: object, **kwargs: object) -> Any:
        """Cut the arguments to this process's part, run the U-Net, and return the whole prediction."""
        run = self.run
        named = bind_forward(module, args, kwargs)
        self.check(named)
        rows, world = named["sample"].shape[0], run.world
        steps = self._steps(rows) if self.cfg_parallel else 1
        halves = 2 if self.cfg_parallel and rows // steps % 2 == 0 else 1
        parts = world.size // halves
        half, part = divmod(world.rank, parts)
        if halves == 2:
            named = batch_half(named, rows, steps, half)
        sample = named["sample"]
        split = self._split(module, sample, parts, part) if parts > 1 else None
        if split is not None:
            if not isinstance(named.get("mid_block_additional_residual", 0), (torch.Tensor, int, type(None))):
                raise ConfigurationError("patch_parallel: the ControlNet's residuals are not tensors")
            named["sample"] = entry_slice(unwrapped(entry_layer(module)), sample, split)
            for key in RESIDUAL_ARGUMENTS:
                if named.get(key) is not None:
                    named[key] = map_tensors(lambda t: own_rows(run, split, t, module), named[key])
        peers = tuple(range(half * parts, (half + 1) * parts))
        with run.counted() as stale:
            with run.running("denoiser", split, peers, exact=not stale, keeps=run.mode in ("displaced", "partial")):
                output = self.fn_ref.original_forward(**named)
            run.communicator.flush(sample.device)
            own = prediction(output)
            dim = 0 if split is None else split.dim
            lengths = [len(own)] * parts if split is None else [split.levels[0].rows(p) for p in range(parts)]
            got = gathered(run, own, dim, lengths * halves, "prediction")
        whole = [torch.cat(got[h * parts : (h + 1) * parts], dim) for h in range(halves)] if split is not None else got
        if halves == 1:
            return with_prediction(output, whole[0])
        return with_prediction(output, torch.cat([t.unflatten(0, (steps, -1)) for t in whole], 1).flatten(0, 1))

    def _steps(self, rows: int) -> int:
        """How many steps' batches are stacked in a batch of `rows` (decoder steps of encoder reuse)."""
        one = self._rows.setdefault(self.run.clock.call, rows)
        if rows % one:
            raise ConfigurationError(
                "patch_parallel: cfg_parallel=true cannot be combined with steps that leave out a branch of guidance; "
                "use guidance=both, or cfg_parallel=false"
            )
        return rows // one

    def _split(self, module: Any, sample: torch.Tensor, parts: int, part: int) -> Split:
        height, width = sample.shape[-2:]
        depth = halvings(module)
        split = plan_split(height, width, parts, part, depth)
        if split is None:
            raise ConfigurationError(
                f"latents of {height}x{width} are too small for {parts} processes: {type(module).__name__} halves them "
                f"{depth} times, so {parts} processes need more than {2**depth * (parts - 1)} rows or columns; use "
                f"{max(-(-height // 2**depth), -(-width // 2**depth))} processes at most, or a larger image"
            )
        return split


def entry_slice(layer: Any, x: torch.Tensor, split: Split) -> torch.Tensor:
    """The rows of the input from which a model's first convolution makes this part."""
    level = split.by_other[x.shape[-1 if split.dim == -2 else -2]]
    low, high = conv_window(layer, split.dim).needed(level, split.part)
    low, high = max(low, 0), min(high, level.size)
    return x.narrow(split.dim, low, high - low)


def own_rows(run: PatchRun, split: Split, x: torch.Tensor, module: nn.Module) -> torch.Tensor:
    """This part of a tensor (..., H, W) at any resolution; what already is this part stays."""
    with run.running("residual", split, (), True):
        level = run.level(x, f"a residual of {type(module).__name__}")
    low, high = level.slice(split.part)
    if x.shape[split.dim] != level.size:
        return x
    return x.narrow(split.dim, low, high - low)


def batch_half(named: dict[str, Any], rows: int, steps: int, half: int) -> dict[str, Any]:
    """The arguments of a denoiser for one half of each step's batch: of every tensor with a multiple of all `rows`."""

    def cut(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.dim() or tensor.shape[0] % rows:
            return tensor
        return tensor.unflatten(0, (steps, -1)).chunk(2, 1)[half].flatten(0, 1)

    return {k: v if k == "cross_attention_kwargs" else map_tensors(cut, v) for k, v in named.items()}


# ---------------------------------------------------------------------- models that run at every step, or once
class PartHook(ModelHook):
    """On an encoder, a decoder or a ControlNet: exact at every call.

    Args:
        images: names of the arguments that are cut.
        halves, doubles: how many times it halves, or doubles, the size of the first argument.
        gathers: put the output together; a ControlNet's goes to the denoiser in parts.
        check: called with the arguments of the call, before anything is exchanged.
    """

    def __init__(
        self,
        run: PatchRun,
        name: str,
        halves: int,
        doubles: int,
        images: tuple[str, ...],
        gathers: bool,
        check: Any,
    ) -> None:
        super().__init__()
        self.run, self.name, self.check = run, name, check
        self.halves, self.doubles, self.images, self.gathers = halves, doubles, images, gathers

    def new_forward(self, module: nn.Module, *args: object, **kwargs: object) -> Any:
        """Cut the arguments, run the model, and put its output together where that is wanted."""
        run, world = self.run, self.run.world
        named = bind_forward(module, args, kwargs)
        self.check(named, self.name)
        first = named[self.images[0]]
        height, width = first.shape[-2:]
        split = plan_split(height, width, world.size, world.rank, self.halves, self.doubles)
        if split is None:  # too small to share: every process computes it
            return self.fn_ref.original_forward(*args, **kwargs)
        for name in self.images:
            named[name] = own_rows(run, split, named[name], module)
        with run.running(self.name, split, tuple(range(world.size)), exact=True):
            output = self.fn_ref.original_forward(**named)
            if not self.gathers:
                return output
            level = run.level(output, self.name)
        lengths = [level.rows(rank) for rank in range(world.size)]
        return torch.cat(gathered(run, output, split.dim, lengths, self.name), split.dim)


def install_vae(hooks: HookSet, run: PatchRun, vae: Any, check: Any) -> None:
    """Decode and encode in parts: each process has its rows, the result is the whole image everywhere."""
    for name, halves, doubles in (("decoder", 0, doublings(vae.decoder)), ("encoder", halvings(vae.encoder), 0)):
        part = getattr(vae, name)
        install_layers(hooks, run, part, f"vae.{name}", None)
        first = next(n for n in ("sample", "x", "z") if n in forward_parameters(part))
        hooks.add(part, PartHook(run, f"vae.{name}", halves, doubles, (first,), True, check))


def install_controlnet(hooks: HookSet, run: PatchRun, net: Any, name: str, check: Any) -> None:
    """A ControlNet in parts; its residuals go to the denoiser as they are."""
    doubles = condition_halvings(net)
    install_layers(hooks, run, net, name, None)
    hooks.add(net, PartHook(run, name, halvings(net), doubles, ("sample", "controlnet_cond"), False, check))
