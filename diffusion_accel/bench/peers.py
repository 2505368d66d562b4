"""Other accelerators, as their authors tell people to use them. Each is an optional dependency."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers import DiffusionPipeline, PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast
from diffusers.hooks import HookRegistry

Call = Callable[..., Any]


def apply_peer(kind: str, numbers: tuple[float, ...], pipe: DiffusionPipeline, steps: int) -> Call:
    """Switch a peer on for good and return what to call instead of the pipeline."""
    return {"deepcache": _deepcache, "tomesd": _tomesd, "tgate": _tgate, "pab": _pab}[kind](numbers, pipe, steps)


def _deepcache(numbers: tuple[float, ...], pipe: DiffusionPipeline, _steps: int) -> Call:
    from DeepCache import DeepCacheSDHelper  # optional package

    helper = DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=int(numbers[0]), cache_branch_id=int(numbers[1]))
    helper.enable()

    def call(**arguments: Any) -> Any:
        helper.start_timestep = None  # it keeps the first timestep of its first call otherwise
        return pipe(**arguments)

    return call


def _tomesd(numbers: tuple[float, ...], pipe: DiffusionPipeline, _steps: int) -> Call:
    import tomesd  # optional package

    tomesd.apply_patch(pipe, ratio=numbers[0])
    return pipe


def _tgate(numbers: tuple[float, ...], pipe: DiffusionPipeline, steps: int) -> Call:
    import tgate  # optional package

    xl = type(pipe).__name__.startswith("StableDiffusionXL")
    (tgate.TgateSDXLLoader if xl else tgate.TgateSDLoader)(pipe)

    def call(**arguments: Any) -> Any:
        return pipe.tgate(**arguments, gate_step=min(int(numbers[0]), steps - 1))

    return call


def _pab(numbers: tuple[float, ...], pipe: DiffusionPipeline, _steps: int) -> Call:
    now = {"timestep": 0}

    def note(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        now["timestep"] = int(timestep if isinstance(timestep, (int, float)) else timestep.flatten()[0])

    pipe.unet.register_forward_pre_hook(note, with_kwargs=True)
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=int(numbers[0]),
        cross_attention_block_skip_range=int(numbers[0]),
        spatial_attention_block_identifiers=("attentions",),
        cross_attention_block_identifiers=("attentions",),
        current_timestep_callback=lambda: now["timestep"],
    )
    apply_pyramid_attention_broadcast(pipe.unet, config)

    def call(**arguments: Any) -> Any:
        HookRegistry.check_if_exists_or_initialize(pipe.unet).reset_stateful_hooks()
        return pipe(**arguments)

    return call
