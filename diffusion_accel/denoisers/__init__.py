"""Denoiser families and their stages. Nothing else in this toolkit knows how diffusers names the blocks of a model."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from diffusion_accel.hooks import compiled_in_place, forward_parameters, is_compiled, model_of

# Components that denoise. Wan 2.2 has a second transformer for the steps with less noise, Ideogram 4 one for the branch
# without a prompt.
DENOISERS = ("unet", "transformer", "transformer_2", "unconditional_transformer")
_UNET_PARTS = ("conv_in", "down_blocks", "mid_block", "up_blocks")

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
# Arguments of a U-Net through which ControlNets and T2I-Adapters reach its encoder.
RESIDUAL_ARGUMENTS = (
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
)
# Attention processors that treat every row of the batch by itself. Others (cross-frame attention, perturbed-attention
# guidance) read meaning into row numbers, so rows of several steps must not be stacked.
_ROW_INDEPENDENT_PROCESSORS = frozenset(
    {
        "AttnProcessor",
        "AttnProcessor2_0",
        "AttnAddedKVProcessor",
        "AttnAddedKVProcessor2_0",
        "FusedAttnProcessor2_0",
        "XFormersAttnProcessor",
        "XFormersAttnAddedKVProcessor",
        "SlicedAttnProcessor",
        "SlicedAttnAddedKVProcessor",
        "IPAdapterAttnProcessor",
        "IPAdapterAttnProcessor2_0",
        "IPAdapterXFormersAttnProcessor",
        "CustomDiffusionAttnProcessor",
        "CustomDiffusionAttnProcessor2_0",
    }
)


# Residual blocks of U-Nets (the branch begins with `norm1`), and transformer blocks whose branches can be told apart.
_RESIDUAL_BLOCKS = frozenset({"ResnetBlock2D", "ResnetBlockCondNorm2D"})
_STREAM_BLOCKS = frozenset(
    {"BasicTransformerBlock", "JointTransformerBlock", "FluxTransformerBlock", "FluxSingleTransformerBlock"}
)
# Transformers whose blocks add to streams: where the blocks are, in the order in which `forward` runs them; "a|b": a
# block of each list in turn. What lies between two blocks only moves values or adds what does not come from the stream.
_STREAM_LISTS: dict[str, tuple[str, ...]] = {
    "AllegroTransformer3DModel": ("transformer_blocks",),
    "AuraFlowTransformer2DModel": ("joint_transformer_blocks", "single_transformer_blocks"),
    "ChromaTransformer2DModel": ("transformer_blocks", "single_transformer_blocks"),
    "CogVideoXTransformer3DModel": ("transformer_blocks",),
    "CogView3PlusTransformer2DModel": ("transformer_blocks",),
    "CogView4Transformer2DModel": ("transformer_blocks",),
    "DiTTransformer2DModel": ("transformer_blocks",),
    "Flux2Transformer2DModel": ("transformer_blocks", "single_transformer_blocks"),
    "FluxTransformer2DModel": ("transformer_blocks", "single_transformer_blocks"),
    "HunyuanDiT2DModel": ("blocks",),
    "HunyuanVideoTransformer3DModel": ("transformer_blocks", "single_transformer_blocks"),
    "LTXVideoTransformer3DModel": ("transformer_blocks",),
    "LatteTransformer3DModel": ("transformer_blocks|temporal_transformer_blocks",),
    "Lumina2Transformer2DModel": ("layers",),
    "MochiTransformer3DModel": ("transformer_blocks",),
    "PixArtTransformer2DModel": ("transformer_blocks",),
    "QwenImageTransformer2DModel": ("transformer_blocks",),
    "SD3Transformer2DModel": ("transformer_blocks",),
    "SanaTransformer2DModel": ("transformer_blocks",),
    "StableAudioDiTModel": ("transformer_blocks",),
    "Transformer2DModel": ("transformer_blocks",),
    "WanTransformer3DModel": ("blocks",),
}
# What their blocks take and return, in the order in which they return it; one stream comes as a tensor.
_TEXT_FIRST, _TEXT_LAST = ("encoder_hidden_states", "hidden_states"), ("hidden_states", "encoder_hidden_states")
_STREAMS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        (
            "AllegroTransformerBlock",
            "AuraFlowSingleTransformerBlock",
            "BasicTransformerBlock",
            "ChromaSingleTransformerBlock",
            "Flux2SingleTransformerBlock",
            "HunyuanDiTBlock",
            "LTXVideoTransformerBlock",
            "Lumina2TransformerBlock",
            "SanaTransformerBlock",
            "StableAudioDiTBlock",
            "WanTransformerBlock",
        ),
        ("hidden_states",),
    ),
    **dict.fromkeys(
        (
            "AuraFlowJointTransformerBlock",
            "ChromaTransformerBlock",
            "Flux2TransformerBlock",
            "FluxSingleTransformerBlock",
            "FluxTransformerBlock",
            "JointTransformerBlock",
            "QwenImageTransformerBlock",
        ),
        _TEXT_FIRST,
    ),
    **dict.fromkeys(
        (
            "CogVideoXBlock",
            "CogView3PlusTransformerBlock",
            "CogView4TransformerBlock",
            "HunyuanVideoSingleTransformerBlock",
            "HunyuanVideoTransformerBlock",
            "MochiTransformerBlock",
        ),
        _TEXT_LAST,
    ),
}
# Transformers that are told the noise level as a fraction, not in thousandths.
_UNIT_TIME = frozenset({"FluxTransformer2DModel"})


# Pipelines that read attention maps or gradients from parts of the U-Net that reuse would skip.
_READS_ENCODER = {
    "StableDiffusionSAGPipeline": "self-attention guidance reads the mid block's attention maps at every step",
    "StableDiffusionAttendAndExcitePipeline": "attend-and-excite optimises the latents through the encoder",
    "StableDiffusionDiffEditPipeline": "the mask is computed from differences between single predictions",
    "LEditsPPPipelineStableDiffusion": "the edit masks are computed from attention maps of every step",
    "LEditsPPPipelineStableDiffusionXL": "the edit masks are computed from attention maps of every step",
}


# U-Nets whose layers look beyond one position only by convolutions, group normalisation and self-attention.
_SPLITTABLE = frozenset(
    {
        "UNet2DModel",
        "UNet2DConditionModel",
        "UNet3DConditionModel",
        "UNetMotionModel",
        "UNetSpatioTemporalConditionModel",
        "AutoencoderKL",
        "AutoencoderKLTemporalDecoder",
        "ControlNetModel",
    }
)
# Layers of such models that look further in other ways.
_LOOKS_FURTHER = frozenset(
    {
        "AdaGroupNorm",
        "BatchNorm2d",
        "ConvTranspose2d",
        "FirDownsample2D",
        "FirUpsample2D",
        "GatedSelfAttentionDense",
        "ImageHintTimeEmbedding",
        "InstanceNorm2d",
        "KDownsample2D",
        "KUpsample2D",
        "SpatialNorm",
    }
)
# Transformers over the frames of a video: every position by itself.
_TEMPORAL = frozenset({"TransformerTemporalModel", "AnimateDiffTransformer3D", "TemporalBasicTransformerBlock"})


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
        return (*self.head, *self.down, *((self.mid,) if self.mid is not None else ()))


def denoiser_names(pipeline: Any) -> tuple[str, ...]:
    """The components that the pipeline calls to denoise: "unet", else its transformers; most have one, some two."""
    there = [name for name in DENOISERS if isinstance(getattr(pipeline, name, None), nn.Module)]
    return tuple(there[:1] if there[:1] == ["unet"] else there)


def called_denoisers(pipeline: Any) -> list[nn.Module]:
    """The denoisers as the pipeline calls them, compiled or wrapped as they may be: hooks around calls go here."""
    return [getattr(pipeline, name) for name in denoiser_names(pipeline)]


def find_denoisers(pipeline: Any) -> list[nn.Module]:
    """The models that the pipeline calls to denoise: one, or two that share the steps or the branches of guidance."""
    return [model_of(module) for module in called_denoisers(pipeline)]


def denoiser_name(pipeline: Any) -> str | None:
    """The first of `denoiser_names`, or None."""
    return next(iter(denoiser_names(pipeline)), None)


def find_denoiser(pipeline: Any) -> nn.Module | None:
    """The first of `find_denoisers`, or None."""
    return next(iter(find_denoisers(pipeline)), None)


def fingerprint(*modules: nn.Module) -> str:
    """A short hash of the weights and shapes of models: 16 numbers of every parameter, rounded to bfloat16.

    The same for a model in float32 and in half precision, except where rounding twice differs from rounding once.
    """
    digest = hashlib.sha256()
    named = [pair for module in modules for pair in sorted(model_of(module).named_parameters())]
    taken = [_sampled(parameter.detach()) for _, parameter in named]
    together = torch.cat([part.to(taken[0].device) for part in taken]).cpu() if taken else torch.empty(0)
    parts = together.split([part.numel() for part in taken])
    for (name, parameter), part in zip(named, parts, strict=True):
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(part.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def _sampled(tensor: torch.Tensor) -> torch.Tensor:
    """At most 16 numbers of a tensor, evenly spaced in the order of its elements, in bfloat16."""
    step = max(1, tensor.numel() // 16)
    if tensor.is_contiguous():
        return tensor.flatten()[::step][:16].to(torch.bfloat16)
    places = torch.arange(0, tensor.numel(), step, device=tensor.device)[:16]
    return tensor[torch.unravel_index(places, tensor.shape)].to(torch.bfloat16)


def find_controlnet(pipeline: Any) -> nn.Module | None:
    """The ControlNet (or the wrapper around several) that the pipeline runs before its denoiser, as it is called; or
    None."""
    module = getattr(pipeline, "controlnet", None)
    return module if isinstance(module, nn.Module) else None


def models_of_a_call(pipeline: Any) -> list[nn.Module]:
    """The models that one call at a time may use: the denoisers and the ControlNets, without what is around them."""
    controlnet = find_controlnet(pipeline)
    beside = [] if controlnet is None else [model_of(controlnet)]
    beside += [model_of(net) for found in beside for net in getattr(found, "nets", ())]
    return [*find_denoisers(pipeline), *beside]


def closed_inside(pipeline: Any) -> str | None:
    """Why hooks cannot reach the inside of the pipeline's denoisers; None if they can."""
    for name, module in zip(denoiser_names(pipeline), called_denoisers(pipeline), strict=True):
        model = model_of(module)
        if hasattr(module, "_orig_mod"):
            how, first = "torch.compile", f"pipe.{name} = pipe.{name}._orig_mod; "
        elif compiled_in_place(model):
            how, first = f"{name}.compile()", "load it anew and call "
        elif is_compiled(vars(model).get("forward")):
            how, first = "its forward, torch.compile", f"del pipe.{name}.forward; "
        else:
            continue
        blocks = ", ".join(getattr(model, "_repeated_blocks", None) or ())
        instead = f"compile its blocks instead ({blocks}): {first}pipe.{name}.compile_repeated_blocks()"
        return (
            f"its {name} is compiled as a whole ({how}), and this works inside of it; "
            f"{instead if blocks else 'use it uncompiled'}"
        )
    return None


def reads_every_step(pipeline: Any) -> str | None:
    """Why no step of this pipeline's denoiser may be skipped; None if any may."""
    return next((_READS_ENCODER[c.__name__] for c in type(pipeline).__mro__ if c.__name__ in _READS_ENCODER), None)


def layers_per_block(pipeline: Any) -> int:
    """Residual blocks in a down block of the pipeline's U-Net; 2, the usual number, for other denoisers."""
    denoiser = find_denoiser(pipeline)
    if denoiser is None or not_a_unet(denoiser):
        return 2
    return len(_list(unet_stages(denoiser).down[0], "resnets")) or 2


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


# What the blocks of a U-Net may consist of for its skip connections to be told apart.
_BLOCK_PARTS = frozenset(
    {"resnets", "attentions", "temp_convs", "temp_attentions", "motion_modules", "downsamplers", "upsamplers"}
)


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


@dataclass(frozen=True)
class StreamBlock:
    """A block of a transformer that adds to its streams.

    Attributes:
        group: of blocks whose streams have the same form, so that what they add can be summed up.
        streams: the arguments that it adds to, in the order in which it returns them.
    """

    module: nn.Module
    group: str
    streams: tuple[str, ...]


def stream_blocks(module: nn.Module) -> list[StreamBlock]:
    """The blocks of a transformer that add to its streams, in the order in which its `forward` runs them.

    Raises:
        ValueError: with the reason if they are not known.
    """
    known: Any = next((c for c in type(module).__mro__ if c.__name__ in _STREAM_LISTS), None)
    if known is None or known.forward is not type(module).forward:
        raise ValueError(f"the blocks of {type(module).__name__} are not known to this toolkit")
    blocks: list[StreamBlock] = []
    for names in _STREAM_LISTS[known.__name__]:
        lists = [[(name, block) for block in getattr(module, name, None) or ()] for name in names.split("|")]
        for turn in zip(*lists, strict=True):
            for name, block in turn:
                streams = _STREAMS.get(type(block).__name__)
                if streams is None:
                    raise ValueError(f"{type(block).__name__} is not a block that is known to this toolkit")
                blocks.append(StreamBlock(block, name if "|" in names else "+".join(streams), streams))
    return blocks


def residual_stream_blocks(module: nn.Module) -> list[nn.Module]:
    """The blocks of a transformer whose branches can be told apart, in order; empty if it is not one we know."""
    module = model_of(module)
    if hasattr(module, "up_blocks"):
        return []
    lists = [getattr(module, name, ()) for name in ("transformer_blocks", "single_transformer_blocks")]
    blocks = [block for part in lists for block in part]
    return blocks if blocks and all(type(block).__name__ in _STREAM_BLOCKS for block in blocks) else []


def not_splittable(module: nn.Module) -> str | None:
    """Why the layers of a model cannot work on slices of the image that exchange their borders; None if they can."""
    module = model_of(module)
    name = type(module).__name__
    if name not in _SPLITTABLE:
        return f"{name} is not a model whose layers are known to work on a part of the image"
    strange = sorted({type(m).__name__ for m in module.modules()} & _LOOKS_FURTHER)
    if strange:
        return f"{name} has layers that need the whole image: {', '.join(strange)}"
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.Conv3d)) and (
            layer.padding_mode != "zeros" or isinstance(layer.padding, str)
        ):
            return f"{name} has a convolution that pads in another way than with zeros"
    return None


def halvings(part: Any) -> int:
    """How many times a U-Net, ControlNet or encoder halves the size of its input."""
    return sum(bool(_list(block, "downsamplers")) for block in part.down_blocks)


def doublings(part: Any) -> int:
    """How many times a decoder doubles the size of its input."""
    return sum(bool(_list(block, "upsamplers")) for block in part.up_blocks)


def spatial_attentions(module: nn.Module) -> dict[str, nn.Module]:
    """The attention layers over positions (not over frames) of a model, by name."""
    temporal = [name for name, part in module.named_modules() if type(part).__name__ in _TEMPORAL]
    return {
        name: part
        for name, part in module.named_modules()
        if all(hasattr(part, key) for key in ("to_q", "to_k", "to_v", "processor"))
        and not any(name.startswith(f"{above}.") for above in temporal)
    }


def asymmetric_convolutions(module: nn.Module) -> set[int]:
    """The ids of convolutions whose input diffusers pads by one row and one column at the end."""
    downsamplers: list[Any] = [m for m in module.modules() if type(m).__name__ == "Downsample2D"]
    layers = [m.conv for m in downsamplers if m.use_conv and m.padding == 0]
    return {id(part) for layer in layers for part in layer.modules()}  # with a LoRA's, if it has one


def unwrapped(layer: nn.Module) -> nn.Module:
    """A layer without the LoRA around it (peft keeps the layer itself as `base_layer`)."""
    base = getattr(layer, "base_layer", None)
    return base if isinstance(base, nn.Module) else layer


def uses_freeu(module: nn.Module) -> bool:
    """Whether FreeU is on, which filters whole feature maps."""
    blocks: list[Any] = list(getattr(module, "up_blocks", ()))
    return any(all(getattr(b, k, None) is not None for k in ("s1", "s2", "b1", "b2")) for b in blocks)


def frames_of(module: nn.Module, sample: torch.Tensor) -> int:
    """How many rows of a U-Net's residual blocks belong to one sample: its frames, 1 for images."""
    if sample.dim() != 5:
        return 1
    return sample.shape[1] if type(model_of(module)).__name__ == "UNetSpatioTemporalConditionModel" else sample.shape[2]


def timestep_kind(module: nn.Module, scheduler: Any) -> str:
    """What the denoiser is told: "index" (0 ... 999), "flow" (0 ... 1000) or "unit" (0 ... 1)."""
    if type(model_of(module)).__name__ in _UNIT_TIME:
        return "unit"
    return "flow" if type(scheduler).__name__.startswith("FlowMatch") else "index"


def rows_are_independent(module: nn.Module) -> bool:
    """Whether every attention layer of a U-Net treats each row of the batch by itself (see above)."""
    processors = getattr(module, "attn_processors", {})
    return all(usual_attention(p) for p in processors.values())


def mixes_rows(module: nn.Module) -> bool:
    """Whether an attention processor of a U-Net is neither one that treats each row by itself nor made from one."""
    processors = getattr(module, "attn_processors", {}).values()
    return any(not {c.__name__ for c in type(p).__mro__} & _ROW_INDEPENDENT_PROCESSORS for p in processors)


def usual_attention(processor: Any) -> bool:
    """Whether an attention processor computes attention as usual: each row by itself, on the keys and values it gets
    from `to_k` and `to_v`."""
    return type(processor).__name__ in _ROW_INDEPENDENT_PROCESSORS


def prediction(output: Any) -> torch.Tensor:
    """The prediction tensor in what a denoiser returned (a tuple or an output dataclass)."""
    return output[0] if isinstance(output, tuple) else output.sample


def with_prediction(output: Any, sample: torch.Tensor) -> Any:
    """The same kind of output around another prediction."""
    return (sample, *output[1:]) if isinstance(output, tuple) else type(output)(sample=sample)


def edge_layers(module: nn.Module) -> list[str]:
    """The names of the first and the last layer of a denoiser, which see its input and make its output."""
    known = ("conv_in", "conv_out", "pos_embed.proj", "x_embedder", "proj_out", "proj_out_2", "proj_in")
    return [name for name in known if isinstance(getattr_path(module, name), (nn.Linear, nn.Conv2d))]


def getattr_path(module: nn.Module, name: str) -> Any:
    """The submodule or attribute at a dotted name, or None."""
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


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
