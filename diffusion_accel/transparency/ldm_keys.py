"""The names of U-Net parameters in the original (LDM) layout, which the web UI uses, in diffusers' words."""

from __future__ import annotations

import re

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_OTHERS = {
    "input_blocks.0.0": "conv_in",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}


def from_ldm(name: str, layers_per_block: int = 2) -> str | None:
    """A parameter's name in diffusers' layout, for example "input_blocks.4.1.proj_in.weight"; None if it has none."""
    stem, _, leaf = name.rpartition(".")
    if stem in _OTHERS:
        return f"{_OTHERS[stem]}.{leaf}"
    found = re.fullmatch(r"(input_blocks|output_blocks)\.(\d+)\.(\d+)\.(.+)", stem)
    if found:
        side, number, place, rest = found[1], int(found[2]), int(found[3]), found[4]
        each = layers_per_block + 1
        if side == "input_blocks":
            block, layer = divmod(number - 1, each)
            if rest == "op":
                return f"down_blocks.{block}.downsamplers.0.conv.{leaf}"
            where = f"down_blocks.{block}"
        else:
            block, layer = divmod(number, each)
            if rest == "conv" and place:  # the last of a block, behind its residual block and attention
                return f"up_blocks.{block}.upsamplers.0.conv.{leaf}"
            where = f"up_blocks.{block}"
        return _inside(where, "attentions" if place else "resnets", layer, rest, leaf)
    found = re.fullmatch(r"middle_block\.([012])\.(.+)", stem)
    if found:
        place, rest = int(found[1]), found[2]
        kind, layer = ("attentions", 0) if place == 1 else ("resnets", place // 2)
        return _inside("mid_block", kind, layer, rest, leaf)
    return None


def _inside(where: str, kind: str, layer: int, rest: str, leaf: str) -> str | None:
    if kind == "resnets":
        if rest not in _RESNET:
            return None
        rest = _RESNET[rest]
    return f"{where}.{kind}.{layer}.{rest}.{leaf}"
