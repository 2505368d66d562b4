"""U-Nets: their stages, their skip connections, and the layers that look beyond one position or one sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from diffusion_accel.hooks import forward_parameters, model_of

from .families import model_family
from .find import find_denoiser

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

# Arguments of a U-Net through which ControlNets and T2I-Adapters reach its encoder.
RESIDUAL_ARGUMENTS = (
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
)

# Arguments of an encoder block that have one row for each sample (or sample and frame) of the batch.
BATCH_ARGUMENTS = frozenset(
    {
        "temb",
        "encoder_hidden_states",
        "encoder_hidden_states_1",
        "attention_mask",
        "encoder_attention_mask",
        "encoder_attention_mask_1",
        "image_only_indicator",
        "skip_sample",
    }
)

_UNET_PARTS = ("conv_in", "down_blocks", "mid_block", "up_blocks")

# What the blocks of a U-Net may consist of for its skip connections to be told apart.
_BLOCK_PARTS = frozenset(
    {"resnets", "attentions", "temp_convs", "temp_attentions", "motion_modules", "downsamplers", "upsamplers"}
)

# Residual blocks of U-Nets (the branch begins with `norm1`), and transformer blocks whose branches can be told apart.
_RESIDUAL_BLOCKS = frozenset({"ResnetBlock2D", "ResnetBlockCondNorm2D"})


@dataclass(frozen=True)
class UNetStages:
    """The stages of a U-Net in the order in which a step runs them.

    `head` (conv_in and, in video models, transformer_in), `down` and `mid` form the encoder; `up` is the decoder.
    """

    head: tuple[nn.Module, ...]
    down: tuple[nn.Module, ...]
    mid: nn.Module | None
    up: tuple[nn.Module, ...]

    @property
    def encoder(self) -> tuple[nn.Module, ...]:
        """The stages before the decoder, in order."""
        return (*self.head, *self.down, *((self.mid,) if self.mid is not None else ()))


def unet_stages(module: nn.Module) -> UNetStages:
    """The stages of a U-Net. Raises `ValueError` with the reason if `module` is not one (see `not_a_unet`)."""
    reason = not_a_unet(module)
    if reason:
        raise ValueError(reason)
    parts: Any = model_of(module)
    return UNetStages(
        head=tuple(m for n in ("conv_in", "transformer_in") if isinstance(m := getattr(parts, n, None), nn.Module)),
        down=tuple(parts.down_blocks),
        mid=parts.mid_block,
        up=tuple(parts.up_blocks),
    )


def not_a_unet(module: nn.Module) -> str | None:
    """Why `module` is not a U-Net with conv_in, down_blocks, mid_block and up_blocks; None if it is one."""
    module = model_of(module)
    name = type(module).__name__
    missing = [p for p in _UNET_PARTS if not hasattr(module, p)]
    if missing:
        return f"{name} has no {', '.join(missing)}: it is not a U-Net with an encoder and a decoder"
    parameters = forward_parameters(module)
    if "sample" not in parameters or "timestep" not in parameters:
        return f"{name}.forward takes no sample and timestep"
    up_blocks: Any = module.up_blocks
    if not len(up_blocks) or "res_hidden_states_tuple" not in forward_parameters(up_blocks[0]):
        return f"the up blocks of {name} do not take the skip connections as res_hidden_states_tuple"
    return None


def layers_per_block(pipeline: DiffusionPipeline) -> int | None:
    """Residual blocks in a down block of the pipeline's U-Net; None if its denoiser is something else."""
    denoiser = find_denoiser(pipeline)
    if denoiser is None or not_a_unet(denoiser):
        return None
    return len(_list(unet_stages(denoiser).down[0], "resnets")) or 2


@dataclass(frozen=True)
class UNetLayers:
    """The skip connections of a U-Net, from the outside in: 0 is conv_in's output.

    Attributes:
        down: for each block, the modules by the skip connection that they produce, [(skip, modules), …]; the modules of
            one skip connection run in this order.
        up: the same by the skip connection that they take in, its residual block first.
        count: how many skip connections there are.
    """

    down: tuple[tuple[tuple[int, tuple[nn.Module, ...]], ...], ...]
    up: tuple[tuple[tuple[int, tuple[nn.Module, ...]], ...], ...]
    count: int


def unet_layers(module: nn.Module) -> UNetLayers:
    """The skip connections of a U-Net. Raises `ValueError` with the reason if they cannot be told apart."""
    stages = unet_stages(module)
    for block in (*stages.down, *stages.up):
        strange = {name for name, _ in block.named_children()} - _BLOCK_PARTS
        if strange or not hasattr(block, "resnets") or type(block).__name__.startswith("K"):
            raise ValueError(f"the skip connections of {type(block).__name__} are not known to this toolkit")
    down, skip = [], 1
    for block in stages.down:
        units = []
        for i in range(len(_list(block, "resnets"))):
            units.append((skip, _of_layer(block, i)))
            skip += 1
        if len(ends := _list(block, "downsamplers")):
            units.append((skip, tuple(ends)))
            skip += 1
        down.append(tuple(units))
    up, taken = [], skip
    for block in stages.up:
        units = []
        for i in range(len(_list(block, "resnets"))):
            taken -= 1
            units.append((taken, _of_layer(block, i)))
        if len(ends := _list(block, "upsamplers")):
            units[-1] = (taken, (*units[-1][1], *ends))
        up.append(tuple(units))
    if taken != 0:
        raise ValueError(f"the up blocks of {type(module).__name__} take {skip - taken} of its {skip} skip connections")
    return UNetLayers(tuple(down), tuple(up), skip)


def _list(block: nn.Module, name: str) -> Any:
    return getattr(block, name, None) or ()


def _of_layer(block: nn.Module, i: int) -> tuple[nn.Module, ...]:
    """The modules of layer `i` of a block, its residual block first; a list with several for each layer (AudioLDM 2)
    holds them in order."""
    lists: dict[str, Any] = dict(block.named_children())
    resnets = lists.pop("resnets")
    found = [resnets[i]]
    for name, part in lists.items():
        if name in ("downsamplers", "upsamplers") or not isinstance(part, nn.ModuleList) or not len(part):
            continue
        each, rest = divmod(len(part), len(resnets))
        if rest:
            raise ValueError(f"{type(block).__name__} has {len(part)} {name} for {len(resnets)} layers")
        found += [m for m in part[i * each : (i + 1) * each] if m is not None]
    return tuple(found)


def residual_branches(module: nn.Module) -> list[nn.Module]:
    """The first layer of the branch of every residual block of a U-Net, in order; empty if it is not one."""
    if not_a_unet(module):
        return []
    blocks: list[Any] = [m for m in module.modules() if type(m).__name__ in _RESIDUAL_BLOCKS]
    return [block.norm1 for block in blocks]


def uses_freeu(module: nn.Module) -> bool:
    """Whether FreeU is on, which filters whole feature maps."""
    blocks: list[Any] = list(getattr(module, "up_blocks", ()))
    return any(all(getattr(b, k, None) is not None for k in ("s1", "s2", "b1", "b2")) for b in blocks)


def frames_of(module: nn.Module, sample: torch.Tensor) -> int:
    """How many rows of a U-Net's residual blocks belong to one sample: its frames, 1 for images."""
    if sample.dim() != 5:
        return 1
    family = model_family(type(model_of(module)))
    return sample.shape[2 if family is None else family.frames_dim]


def concatenated_inputs(module: nn.Module) -> dict[str, int]:
    """Layers of a U-Net whose input is [what comes from below, skip connection], with the channels of the first
    part."""
    if not_a_unet(module) is not None:
        return {}
    found: dict[str, int] = {}
    stages = unet_stages(module)
    below = _output_channels(stages.mid) if stages.mid is not None else None
    for number, block in enumerate(stages.up):
        for i, resnet in enumerate(getattr(block, "resnets", ())):
            for name in ("conv1", "conv_shortcut"):
                layer = getattr(resnet, name, None)
                if isinstance(layer, nn.Conv2d) and below is not None and below < layer.in_channels:
                    found[f"up_blocks.{number}.resnets.{i}.{name}"] = below
            below = _output_channels(resnet)
    return found


def _output_channels(block: nn.Module) -> int | None:
    """The channels that the last convolution of a block makes."""
    resnets = getattr(block, "resnets", None)
    last = resnets[-1] if resnets is not None and len(resnets) else block
    return getattr(getattr(last, "conv2", None), "out_channels", None)
