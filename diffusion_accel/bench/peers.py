"""Other accelerators, as their authors tell people to use them. Each is an optional dependency.

A new one is a function and an entry of `PEERS` here. Importing this imports no torch: the command line asks what there
is before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Call = Callable[..., Any]


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
    from diffusers import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast  # heavy: torch
    from diffusers.hooks import HookRegistry  # heavy: torch

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


@dataclass(frozen=True)
class Peer:
    """Another accelerator.

    Attributes:
        usual: its recommended numbers.
        apply: is given numbers, a pipeline and the steps of a call; switches it on for good and returns what is called
            instead of the pipeline.
        package: what has to be installed, by the name that is imported; "": it is diffusers' own.
        share: the first number is a share, above 0 and at most 1; otherwise it is at least 1.
    """

    usual: tuple[float, ...]
    apply: Callable[[tuple[float, ...], DiffusionPipeline, int], Call]
    package: str = ""
    share: bool = False


#: by the kind of their entries
PEERS: dict[str, Peer] = {
    "deepcache": Peer((3, 0), _deepcache, "DeepCache"),
    "tomesd": Peer((0.5,), _tomesd, "tomesd", share=True),
    "tgate": Peer((10,), _tgate, "tgate"),
    "pab": Peer((2,), _pab),
}
