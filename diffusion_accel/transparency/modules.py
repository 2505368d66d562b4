"""The two networks of latent transparency, with the state dicts of the published LayerDiffuse weights.

Defaults are the published sizes (4 latent channels, 1.18 M and 104.1 M parameters); every width can be scaled down.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2D, get_down_block, get_up_block
from torch import nn


def zeroed(module: nn.Module) -> nn.Module:
    """`module` with all its parameters at zero."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class LatentTransparencyEncoder(ModelMixin, ConfigMixin):
    """Alpha and padded colours -> what is added to the latents of the frozen VAE, in units of their deviation.

    Zhang and Agrawala 2024, section 3.1. The last convolution begins at zero, so an untrained encoder changes nothing.

    Args:
        latent_channels: channels of the VAE's latents.
        block_out_channels: widths at full, 1/2, 1/4 and 1/8 resolution; the VAE's factor is 2^(widths - 1).
        offset_scale: what the output is multiplied by: 300 for the weights published for diffusers, 1 for those
            published for the web UI.
        recommended_refinement: steps by which the latents of a given image are refined, see `codec.refine_latents`.
    """

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 4,
        block_out_channels: tuple[int, ...] = (32, 64, 128, 256),
        offset_scale: float = 1.0,
        recommended_refinement: int = 0,
    ) -> None:
        super().__init__()
        del offset_scale, recommended_refinement  # read from the config
        first, *deeper = block_out_channels
        layers: list[nn.Module] = [nn.Conv2d(4, first, 3, padding=1), nn.SiLU()]
        layers += [nn.Conv2d(first, first, 3, padding=1), nn.SiLU()]
        width = first
        for wider in deeper:
            layers += [nn.Conv2d(width, wider, 3, stride=2, padding=1), nn.SiLU()]
            layers += [nn.Conv2d(wider, wider, 3, padding=1), nn.SiLU()]
            width = wider
        layers.append(zeroed(nn.Conv2d(width, latent_channels, 3, padding=1)))
        self.blocks = nn.Sequential(*layers)

    @property
    def factor(self) -> int:
        """Pixels on a side of one latent."""
        return 1 << (len(self.config.block_out_channels) - 1)

    def forward(self, alpha_rgb: torch.Tensor) -> torch.Tensor:
        """[alpha, padded colours] (N, 4, H, W) in 0..1 -> offset (N, C, H/8, W/8), multiplied by `offset_scale`."""
        return self.blocks(alpha_rgb) * self.config.offset_scale


class LatentTransparencyDecoder(ModelMixin, ConfigMixin):
    """A decoded image and its latents -> alpha and straight colours: a U-Net without timesteps.

    Zhang and Agrawala 2024, section 3.1 and appendix A ("UNet1024" in the published code). The latents enter through a
    1x1 convolution that begins at zero, before the down block at 1/8 of the resolution.

    Args:
        latent_channels: channels of the VAE's latents.
        block_out_channels: widths from full resolution down; there are as many blocks, all but the last halve the
            sides, which must be multiples of 2^(blocks - 1).
        latent_level: the down block before which the latents enter; the VAE's factor is 2^latent_level.
        attention_levels: how many of the deepest blocks on each side have self-attention, beside the middle.
        layers_per_block: residual blocks in a down block; an up block has one more.
        attention_head_dim, norm_num_groups, norm_eps: of attention and GroupNorm.
        recommended_views: from how many sides to decode: 1 for a decoder that has seen upright images only.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 4,
        latent_channels: int = 4,
        block_out_channels: tuple[int, ...] = (32, 32, 64, 128, 256, 512, 512),
        latent_level: int = 3,
        attention_levels: int = 3,
        layers_per_block: int = 2,
        attention_head_dim: int = 8,
        norm_num_groups: int = 4,
        norm_eps: float = 1e-5,
        recommended_views: int = 8,
    ) -> None:
        super().__init__()
        del recommended_views  # read from the config
        widths, levels = block_out_channels, len(block_out_channels)
        if not (0 <= attention_levels <= levels and 0 < latent_level < levels):
            raise ValueError(f"{levels} blocks, attention in {attention_levels}, latents at {latent_level}: impossible")
        shared = {
            "temb_channels": None,
            "resnet_eps": norm_eps,
            "resnet_act_fn": "silu",
            "resnet_groups": norm_num_groups,
            "attention_head_dim": attention_head_dim,
        }
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.latent_conv_in = zeroed(nn.Conv2d(latent_channels, widths[latent_level - 1], 1))

        self.down_blocks = nn.ModuleList()
        for level, width in enumerate(widths):
            self.down_blocks.append(
                get_down_block(
                    "AttnDownBlock2D" if level >= levels - attention_levels else "DownBlock2D",
                    num_layers=layers_per_block,
                    in_channels=widths[max(0, level - 1)],
                    out_channels=width,
                    add_downsample=level < levels - 1,
                    downsample_padding=1,
                    **shared,
                )
            )
        self.mid_block = UNetMidBlock2D(in_channels=widths[-1], **shared)
        self.up_blocks = nn.ModuleList()
        for level in reversed(range(levels)):
            self.up_blocks.append(
                get_up_block(
                    "AttnUpBlock2D" if level >= levels - attention_levels else "UpBlock2D",
                    num_layers=layers_per_block + 1,
                    in_channels=widths[max(0, level - 1)],
                    out_channels=widths[level],
                    prev_output_channel=widths[min(levels - 1, level + 1)],
                    add_upsample=level > 0,
                    **shared,
                )
            )
        self.conv_norm_out = nn.GroupNorm(norm_num_groups, widths[0], eps=norm_eps)
        self.conv_act = nn.SiLU()
        self.conv_out = nn.Conv2d(widths[0], out_channels, 3, padding=1)

    @property
    def multiple(self) -> int:
        """What both sides of an image must be a multiple of, in pixels."""
        return 1 << (len(self.down_blocks) - 1)

    @property
    def factor(self) -> int:
        """Pixels on a side of one latent."""
        return 1 << self.config.latent_level

    def forward(self, pixels: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """Images (N, 3, H, W) in 0..1 and unscaled latents (N, C, H/8, W/8) -> [alpha, colours] (N, 4, H, W)."""
        sample = self.conv_in(pixels)
        skips = [sample]
        for level, block in enumerate(self.down_blocks):
            if level == self.config.latent_level:
                sample = sample + self.latent_conv_in(latents)
            sample, kept = block(sample)
            skips += kept
        sample = self.mid_block(sample)
        up: Any
        for up in self.up_blocks:
            count = len(up.resnets)
            sample = up(sample, tuple(skips[-count:]))
            del skips[-count:]
        return self.conv_out(self.conv_act(self.conv_norm_out(sample)))
