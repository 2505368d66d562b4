"""Layers of denoisers by what they do."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from diffusion_accel.hooks import model_of
from diffusion_accel.module_tree import parts_of

from .families import model_family
from .find import getattr_path
from .unet import not_a_unet

# Names of layers by what they do, as patterns for the whole name.
TIME_LAYERS = r".*(time_emb_proj|time_embedding\.linear_[12]|timestep_embedder\.linear_[12]|norm1(_context)?\.linear)"
FEED_FORWARD = r".*ff(_context)?\.net\..*"
QUERIES = r".*\.(to_q|add_q_proj)"
KEYS_VALUES = r".*\.(to_k|to_v|add_k_proj|add_v_proj)"
SAMPLE_KEYS_VALUES = r".*\.(to_k|to_v)"  # without those that joint attention has for the text
SELF_KEYS_VALUES = r".*attn1?\.(to_k|to_v)"

# Classes of blocks with one way through them: residual and transformer blocks.
_BLOCK = re.compile(r"(\w*Res(net)?Block\w*|\w*TransformerBlock)")
_NOT_A_BLOCK = re.compile(r"\w*(Downsample|Upsample)Block\w*")

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


def not_splittable(module: nn.Module) -> str | None:
    """Why the layers of a model cannot work on slices of the image that exchange their borders; None if they can."""
    module = model_of(module)
    name = type(module).__name__
    family = model_family(type(module))
    if family is None or not family.splittable:
        return f"{name} is not a model whose layers are known to work on a part of the image"
    strange = sorted({type(m).__name__ for m in module.modules()} & _LOOKS_FURTHER)
    if strange:
        return f"{name} has layers that need the whole image: {', '.join(strange)}"
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.Conv3d)) and (
            layer.padding_mode != "zeros" or isinstance(layer.padding, str)
        ):
            return f"{name} has a convolution that pads in another way than with zeros"
        if getattr(layer, "reads_whole_input", False):
            return (
                f"{name} has quantized convolutions that find the grid of their input over the whole image; quantize "
                "with static inputs or weights alone, or use the runtime dequantize, which leaves inputs as they are"
            )
    return None


def halvings(part: Any) -> int:
    """How many times a U-Net, ControlNet or encoder halves the size of its input."""
    return sum(bool(len(getattr(block, "downsamplers", None) or ())) for block in part.down_blocks)


def doublings(part: Any) -> int:
    """How many times a decoder doubles the size of its input."""
    return sum(bool(len(getattr(block, "upsamplers", None) or ())) for block in part.up_blocks)


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


def rows_are_independent(module: nn.Module) -> bool:
    """Whether every attention layer of a U-Net treats each row of the batch by itself (see above)."""
    return all(map(usual_attention, _processors(module)))


def mixes_rows(module: nn.Module) -> bool:
    """Whether an attention processor of a U-Net is neither one that treats each row by itself nor made from one."""
    return any(not {c.__name__ for c in type(p).__mro__} & _ROW_INDEPENDENT_PROCESSORS for p in _processors(module))


def _processors(module: nn.Module) -> list[object]:
    """What computes attention in a U-Net; asked in every call, for which its own `attn_processors` is slow."""
    places = (vars(part).get("processor") or part._modules.get("processor") for part in parts_of(module))
    return [processor for processor in places if processor is not None]


def usual_attention(processor: object) -> bool:
    """Whether an attention processor computes attention as usual: each row by itself, on the keys and values it gets
    from `to_k` and `to_v`."""
    return type(processor).__name__ in _ROW_INDEPENDENT_PROCESSORS


def edge_layers(module: nn.Module) -> list[str]:
    """The names of the first and the last layer of a denoiser, which see its input and make its output."""
    known = ("conv_in", "conv_out", "pos_embed.proj", "x_embedder", "proj_out", "proj_out_2", "proj_in")
    return [name for name in known if isinstance(getattr_path(module, name), (nn.Linear, nn.Conv2d))]


def entry_layer(unet: Any) -> nn.Module:
    """The first layer that sees a U-Net's sample."""
    return unet.conv_in


def is_block(module: nn.Module) -> bool:
    """Whether a module is a residual or transformer block, with one way through it."""
    name = type(module).__name__
    return _BLOCK.fullmatch(name) is not None and _NOT_A_BLOCK.fullmatch(name) is None


def ordered_attentions(unet: Any) -> list[Any]:
    """The attention layers of a U-Net's transformer blocks: down, up, middle; self-attention before the text's."""
    found = []
    for block in (*unet.down_blocks, *unet.up_blocks, unet.mid_block):
        for attention in getattr(block, "attentions", None) or ():
            for transformer in attention.transformer_blocks:
                found += [transformer.attn1, transformer.attn2]
    return found


def attentions(module: nn.Module) -> list[nn.Module]:
    """All attention layers of a model, whatever they attend to."""
    return [part for part in module.modules() if type(part).__name__.endswith("Attention")]


def class_tables(module: nn.Module) -> list[nn.Module]:
    """The embeddings of class labels, which drop some of them while they are trained."""
    return [part for part in module.modules() if type(part).__name__ == "LabelEmbedding"]


def text_norms(module: nn.Module) -> set[int]:
    """The ids of normalisations that see the text, not positions of the image."""
    norms = [getattr(part, "norm_cross", None) for part in module.modules()]
    return {id(norm) for norm in norms if norm is not None}


def condition_halvings(controlnet: Any) -> int:
    """How many times a ControlNet halves the size of its condition, to that of the latents."""
    return sum(max(layer.stride) > 1 for layer in controlnet.controlnet_cond_embedding.blocks)


def quantization_preset(model: nn.Module) -> str:
    """Which layers of a model post-training quantization finetunes, by the name of a published choice ("sd", "sdxl",
    "lsun", "dit"): as its family says, else by what it is made of."""
    family = model_family(type(model))
    if family is not None and family.preset:
        return family.preset
    if not_a_unet(model) is not None:
        return "dit"
    return "sdxl" if getattr(getattr(model, "config", None), "addition_embed_type", None) == "text_time" else "sd"
