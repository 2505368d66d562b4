"""Transformers: diffusers' own context parallelism, switched on for one call and off again.

Every process has its share of the sequence; attention gives every process all positions for its share of the heads
(DeepSpeed Ulysses; Jacobs et al. 2023). `enable_parallelism` of a model cannot be undone, and in diffusers 0.42 fails
without an accelerator; these are its parts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from diffusers import ContextParallelConfig
from diffusers.hooks import ModelHook, apply_context_parallel
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from diffusion_accel.denoisers import denoiser_names, find_denoisers
from diffusion_accel.diffusers_compat import (
    context_parallel_plan,
    make_parallel_config,
    set_parallel_config,
    unshareable_backend,
)
from diffusion_accel.hooks import bind_forward, remove_hooks

from .group import World, lost_peer
from .run import PatchRun

_HOOKS = "cp_"  # how the names of diffusers' hooks for it begin
_meshes: dict[str, tuple[Any, Any]] = {}  # by type of device: the world's group, and the mesh on it


def transformers_of(pipeline: Any) -> list[Any]:
    """The models that share a sequence: all denoisers of a pipeline without a U-Net."""
    return find_denoisers(pipeline) if "unet" not in denoiser_names(pipeline) else []


def why_not_shared(model: Any, ranks: int) -> str | None:
    """Why diffusers cannot share a transformer, as it is now, among so many processes; None if it can."""
    name = type(model).__name__
    if context_parallel_plan(type(model)) is None:
        return f"diffusers has no context-parallel plan for {name}"
    heads = getattr(model.config, "num_attention_heads", None)
    if heads is not None:
        share = -(-heads // ranks)
        if share * ranks - heads >= share:
            return f"the {heads} attention heads of {name} cannot be shared by {ranks} processes; use fewer"
    if (unable := unshareable_backend(model)) is not None:
        backend, able = unable
        return f"attention backend {backend} cannot be shared; call set_attention_backend with one of {', '.join(able)}"
    return None


def share(model: Any, world: World) -> None:
    """Share the sequence of a transformer among all processes; `unshare` undoes it, also where this has failed."""
    device = next(model.parameters()).device
    config = ContextParallelConfig(ulysses_degree=world.size, ulysses_anything=True)
    if _meshes.get(device.type, (None,))[0] is not world.group:  # a mesh makes groups, which live as long as the job
        mesh = init_device_mesh(device.type, config.mesh_shape, mesh_dim_names=config.mesh_dim_names)
        _meshes[device.type] = world.group, mesh
    mesh = _meshes[device.type][1]
    set_parallel_config(model, make_parallel_config(config, world.rank, world.size, device, mesh))
    apply_context_parallel(model, config, context_parallel_plan(type(model)))


def unshare(model: Any) -> None:
    """Give a transformer its whole sequence back."""
    remove_hooks(model, _HOOKS)
    set_parallel_config(model, None)


class SharedHook(ModelHook):
    """On a whole transformer: compares what the processes were asked for before the first step, and counts steps."""

    def __init__(self, check: Callable[[dict[str, Any]], None], run: PatchRun) -> None:
        super().__init__()
        self.check, self.run = check, run

    def new_forward(self, module: nn.Module, *args: object, **kwargs: object) -> Any:
        """Run the transformer; a message that fails becomes a `PeerError`."""
        self.check(bind_forward(module, args, kwargs))
        try:
            with self.run.counted():
                return self.fn_ref.original_forward(*args, **kwargs)
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and "gloo" not in str(error):  # gloo has no type of its own
                raise
            with lost_peer():
                raise
