"""What the processes of a job must have in common: compared before a call, or taken from the first of them."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from diffusion_accel.denoisers import RESIDUAL_ARGUMENTS, find_denoisers, latents_argument
from diffusion_accel.diffusers_compat import guidance_scale_of
from diffusion_accel.errors import ConfigurationError
from diffusion_accel.hooks import tensors_in
from diffusion_accel.steps import StepClock

from .group import World, lost_peer

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_DIGEST = 8  # bytes of a hash
_PROMPTS = ("encoder_hidden_states", "cap_feats")


class DisagreementError(ConfigurationError):
    """The processes of a job were asked for different images."""


class Agreement:
    """Compares what the processes were asked for when a model is first called, before anything else is exchanged.

    The denoiser's latents are compared at its second pass as well: noise that a scheduler drew at the first step from
    generators that differ.
    """

    def __init__(self, pipeline: DiffusionPipeline, clock: StepClock, world: World) -> None:
        self.pipeline, self.clock, self.world = pipeline, clock, world
        self._passes: Counter[str] = Counter()

    def __call__(self, named: dict[str, Any], name: str = "denoiser") -> None:
        """Compare the arguments of a call of the model `name`."""
        self._passes[name] += 1
        first = self._passes[name] == 1
        if name != "denoiser":
            if first:
                conditions = {k: v for k, v in named.items() if k != "timestep"}
                agree(self.world, {f"what goes into the {name}": conditions}, tensors_in(named)[0].device)
            return
        attention = named.get("cross_attention_kwargs") or {}
        for key in ("ip_adapter_masks", "gligen"):
            if attention.get(key) is not None:
                raise ConfigurationError(f"patch_parallel does not support {key}: it refers to the whole image")
        if first:
            agree(self.world, self._asked(named), tensors_in(named)[0].device)
        elif self._passes[name] == 2:
            agree(self.world, {"the latents after one step": latents_given(named)}, tensors_in(named)[0].device)

    def _asked(self, named: dict[str, Any]) -> dict[str, Any]:
        handle = self.pipeline.acceleration
        models: list[Any] = find_denoisers(self.pipeline)
        scheduler = self.pipeline.scheduler
        apart = {latents_argument(named), *_PROMPTS, "timestep", "t", "return_dict"}
        if any(name.startswith("controlnet") for name in self._passes):  # its own arguments were compared
            apart |= set(RESIDUAL_ARGUMENTS)
        return {
            "the size or number of images": [[*latents.shape] for latents in tensors_in(latents_given(named))],
            "the number of steps": len(self.clock.timesteps),
            "the timesteps": self.clock.timesteps,
            "the scheduler": [type(scheduler).__name__, _settings(scheduler)],
            "the model": [[type(model).__name__, _settings(model), sampled_weights(model)] for model in models],
            "the way quantized layers compute": [getattr(model, "low_bit_runtime", None) for model in models],
            "the guidance scale": guidance_scale_of(self.pipeline),
            "the features": {name: f.to_dict() for name, f in handle.features.items() if handle.enabled(name)},
            "the prompt": [named.get(name) for name in _PROMPTS],
            "the conditions": {k: v for k, v in named.items() if k not in apart},
            "the latents": latents_given(named),
        }


def latents_given(named: dict[str, Any]) -> Any:
    """The latents among the arguments of a denoiser: a tensor, or a list with one for each image."""
    return named[latents_argument(named) or ""]


@torch.no_grad()
def sampled_weights(model: nn.Module) -> list[Any]:
    """One number of every parameter, with the strength of every adapter: tells fine-tuned models and LoRAs apart.

    Parameters that another package has packed are left out: they have no single numbers.
    """
    plain = [p for p in model.parameters() if type(p) is nn.Parameter and p.numel()]
    found = [p[tuple(extent // 2 for extent in p.shape)].double() for p in plain]
    scalings: list[Any] = [getattr(m, "scaling", None) for m in model.modules()]
    adapters = [sorted(scaling.items()) for scaling in scalings if isinstance(scaling, dict)]
    return [torch.stack(found) if found else None, adapters]


def _settings(component: Any) -> dict[str, Any]:
    """The configuration of a model or scheduler, without what diffusers notes beside it in no particular order."""
    return {k: v for k, v in getattr(component, "config", {}).items() if not k.startswith("_")}


# ---------------------------------------------------------------------- messages
def agree(world: World, asked: dict[str, Any], device: torch.device) -> None:
    """Check that all processes were asked for the same.

    Args:
        asked: what to compare, by the name that an error gives it; tensors are compared by value.

    Raises:
        DisagreementError: on every process, naming what differs and where.
    """
    mine = torch.tensor([list(digest(value)) for value in asked.values()], dtype=torch.uint8)
    on_device = dist.get_backend(world.group) == "nccl"
    mine = mine.to(device) if on_device else mine
    theirs = [torch.empty_like(mine) for _ in range(world.size)]
    with lost_peer():
        dist.all_gather(theirs, mine, group=world.group)
    different = {
        name: [rank for rank in range(1, world.size) if not torch.equal(theirs[rank][i], theirs[0][i])]
        for i, name in enumerate(asked)
    }
    found = [
        f"{name} ({'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))})"
        for name, ranks in different.items()
        if ranks
    ]
    if found:
        raise DisagreementError(
            f"the processes of this job must be asked for the same image, but these differ from rank 0: "
            f"{'; '.join(found)}; give all the same arguments and a generator with the same seed"
        )


def digest(value: Any) -> bytes:
    """A hash of a nested value: of the bytes of its tensors, and of everything else as text."""
    found = hashlib.blake2b(digest_size=_DIGEST)
    for tensor in tensors_in(value):
        found.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    if not isinstance(value, torch.Tensor):
        found.update(json.dumps(value, sort_keys=True, default=_plain).encode())
    return found.digest()


def _plain(value: Any) -> str:
    return "" if isinstance(value, torch.Tensor) else type(value).__name__


def share_random_state(world: World, device: torch.device) -> None:
    """Give torch's own generators at every process the state that they have at rank 0."""
    state = torch.get_rng_state()
    if device.type == "cuda":
        state = torch.cat([state, torch.cuda.get_rng_state(device)])
    on_device = dist.get_backend(world.group) == "nccl"
    state = state.to(device) if on_device else state
    with lost_peer():
        dist.broadcast(state, 0, group=world.group)
    if world.rank == 0:
        return
    state = state.cpu()
    length = len(torch.get_rng_state())
    torch.set_rng_state(state[:length].clone())
    if len(state) > length:
        torch.cuda.set_rng_state(state[length:].clone(), device)


def same_numbers(numbers: list[int]) -> list[int]:
    """The whole numbers of rank 0, at every process of the job; as many at each."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return numbers
    sent = torch.tensor(numbers, dtype=torch.int64)
    if dist.get_backend() == "nccl":
        sent = sent.cuda()
    with lost_peer():
        dist.broadcast(sent, 0)
    return [int(number) for number in sent.tolist()]
