"""The parts of the sticker pipeline: configurations of the VAE, the UNet, the text encoder and the scheduler."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from diffusion_accel.training.denoising import Process
from diffusion_accel.training.files import UsageError, read_json, require
from diffusion_accel.training.sampling import scheduler_for

from .latents import PATCH

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of the models; the defaults are those of `sticker` (14.8 M parameters, 30 MB in fp16).

    Attributes:
        size: image side in pixels, a multiple of 8.
        patch: pixels on a side of one latent, 8 or 4.
        latent_channels: channels of the latents, which have a side of size / patch.
        vocabulary: entries of a tokenizer, at most.
        max_length: tokens of the longest text, with the begin and end marks.
        vae_channels: of the levels of the VAE: four of them for 8x8 patches, three for 4x4 ones.
        unet_channels: of the UNet's levels; all but the first have cross-attention.
        unet_groups: groups of its GroupNorms.
        unet_dropout: of its residual blocks, in training only.
        text_width, text_layers: of the text encoder; its heads are 32 wide.
        transformer_blocks: double and single blocks of a Flux transformer, whose tokens are 2x2 latents; none: a UNet.
        transformer_heads: of its attention, 32 wide each.
        text_from: pipeline folder or embedded model whose text encoder the first one begins as; same tokenizer.
        states_layers: of its second text encoder, a T5 encoder, which is as wide as the first.
        training: settings of the loop by stage, beside the tuned ones of `settings`.
    """

    size: int = 96
    patch: int = PATCH
    latent_channels: int = 12
    vocabulary: int = 2048
    max_length: int = 24
    vae_channels: tuple[int, ...] = (24, 48, 96, 96)
    unet_channels: tuple[int, ...] = (64, 128, 192)
    unet_groups: int = 16
    unet_dropout: float = 0.0
    text_width: int = 192
    text_layers: int = 3
    transformer_blocks: tuple[int, ...] = ()
    transformer_heads: int = 7
    text_from: str | None = None
    states_layers: int = 2
    training: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def latent_size(self) -> int:
        """Latents on a side of an image."""
        return self.size // self.patch

    @property
    def process(self) -> Process:
        """What the denoiser predicts: the velocity of a flow for a transformer, v for a UNet."""
        return Process("flow" if self.transformer_blocks else "v_prediction")

    def to_dict(self) -> dict[str, Any]:
        """The sizes as plain JSON values."""
        return asdict(self)

    @classmethod
    def load(cls, path: Path) -> Shape:
        """Sizes from a JSON file; those it does not name are the defaults."""
        values: Any = read_json(path)
        if not isinstance(values, dict) or set(values) - {one.name for one in fields(cls)}:
            raise UsageError(f"{path} must hold a JSON object with names among {[one.name for one in fields(cls)]}")
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        return cls(**values)

    @classmethod
    def of_work(cls, work: Path) -> Shape:
        """The sizes that the work folder was made for."""
        return cls.load(require(work / "shape.json", "cache"))


def build_vae(shape: Shape) -> AutoencoderKL:
    """AutoencoderKL with latents of unit RMS (scaling factor 1, no shift)."""
    from diffusers import AutoencoderKL

    levels = len(shape.vae_channels)
    return AutoencoderKL(
        latent_channels=shape.latent_channels,
        block_out_channels=shape.vae_channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=shape.size,
        scaling_factor=1.0,
        shift_factor=0.0 if shape.transformer_blocks else None,  # Flux's pipelines add it
        mid_block_add_attention=False,
    )


def build_unet(shape: Shape) -> UNet2DConditionModel:
    """UNet2DConditionModel with cross-attention at every level but the first."""
    from diffusers import UNet2DConditionModel

    deeper = len(shape.unet_channels) - 1
    return UNet2DConditionModel(
        sample_size=shape.latent_size,
        in_channels=shape.latent_channels,
        out_channels=shape.latent_channels,
        block_out_channels=shape.unet_channels,
        layers_per_block=1,
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * deeper,
        up_block_types=("CrossAttnUpBlock2D",) * deeper + ("UpBlock2D",),
        cross_attention_dim=shape.text_width,
        attention_head_dim=4,
        norm_num_groups=shape.unet_groups,
        dropout=shape.unet_dropout,
        use_linear_projection=True,
    )


def build_text_encoder(shape: Shape, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """CLIPTextModel with heads of 32 channels, for the vocabulary of a tokenizer."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.text_width,
        intermediate_size=shape.text_width * 3,
        num_hidden_layers=shape.text_layers,
        num_attention_heads=shape.text_width // 32,
        max_position_embeddings=shape.max_length,
        projection_dim=shape.text_width,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="sdpa",
    )
    return CLIPTextModel(config)


def build_pipeline(
    vae: AutoencoderKL, text: CLIPTextModel, tokenizer: CLIPTokenizer, unet: UNet2DConditionModel
) -> StableDiffusionPipeline:
    """StableDiffusionPipeline of the parts, with the scheduler of v-prediction and no safety checker."""
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler_for(Process()),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


class LatentHead(nn.Module):
    """Text states -> latents, through one cross-attention layer with a learned query per 2x2 block of latents.

    Only the pre-training of the text encoder uses it.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.side, self.channels = shape.latent_size // 2, shape.latent_channels
        self.queries = nn.Parameter(torch.randn(1, self.side**2, shape.text_width) * 0.5)
        self.attention = nn.MultiheadAttention(shape.text_width, shape.text_width // 32, batch_first=True)
        self.output = nn.Sequential(
            nn.LayerNorm(shape.text_width),
            nn.Linear(shape.text_width, 2 * shape.text_width),
            nn.GELU(),
            nn.Linear(2 * shape.text_width, 4 * self.channels),
        )

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """(N, tokens, width) -> (N, C, 2 side, 2 side)."""
        queries = self.queries.expand(len(states), -1, -1)
        hidden = self.attention(queries, states, states, need_weights=False)[0] + self.queries
        blocks = self.output(hidden).view(-1, self.side, self.side, 2, 2, self.channels)
        return blocks.permute(0, 5, 1, 3, 2, 4).reshape(len(states), self.channels, 2 * self.side, 2 * self.side)


class TextToLatents(nn.Module):
    """A text encoder with a head that predicts the mean latents of a caption."""

    def __init__(self, text: CLIPTextModel | T5EncoderModel, shape: Shape) -> None:
        super().__init__()
        self.text, self.head = text, LatentHead(shape)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids (N, tokens) -> latents (N, C, h, w)."""
        return self.head(self.text(input_ids=ids).last_hidden_state)
