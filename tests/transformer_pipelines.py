"""Tiny pipelines of diffusers' families of transformers, with random weights, their own schedulers and guidance.

As in `zoo`: each builder returns a pipeline and the arguments of a call that ends in latents or a small tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
import zoo
from diffusers import FlowMatchEulerDiscreteScheduler
from zoo import DIM, TOKENS, Built, rand, seeded, text, vae

HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
FLUX = {"in_channels": 16, "num_layers": 2, "num_single_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16}
FLUX |= {"joint_attention_dim": DIM}
ENCODERS = ("text_encoder", "tokenizer")
SQUARE = {"height": 16, "width": 16, "output_type": "latent"}
CLIP = {**SQUARE, "num_frames": 5}


def _pipeline(name: str, transformer: dict[str, Any], scheduler: Any, model: str = "", **components: Any) -> Any:
    """A pipeline of diffusers with a random transformer, an autoencoder and no encoders of text."""
    kind = getattr(diffusers, model or f"{name}Transformer2DModel")
    parts = {"vae": None, **dict.fromkeys(ENCODERS), **components}
    whole = getattr(diffusers, f"{name}Pipeline")
    return whole(transformer=seeded(lambda: kind(**transformer)), scheduler=scheduler, **parts)


def _masks(dtype: torch.dtype = torch.long) -> dict[str, torch.Tensor]:
    names = ("prompt_attention_mask", "negative_prompt_attention_mask")
    return dict.fromkeys(names, torch.ones(1, TOKENS, dtype=dtype))


def flow(**changes: Any) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**changes)


def flux() -> Built:
    """Flux with true guidance: a second call of the transformer at every step."""
    pipe, call = zoo.flux()
    against = {"negative_prompt_embeds": rand(1, TOKENS, DIM, seed=3)}
    against |= {"negative_pooled_prompt_embeds": rand(1, 8, seed=4)}
    return pipe, {**call, **against, "true_cfg_scale": 3.0}


def flux_distilled() -> Built:
    """Flux dev: its guidance is an input of the transformer."""
    shape = {**FLUX, "pooled_projection_dim": 8, "axes_dims_rope": (4, 4, 8), "guidance_embeds": True}
    encoders = {"text_encoder_2": None, "tokenizer_2": None, "vae": vae(4)}
    pipe = _pipeline("Flux", shape, flow(), **encoders)
    return pipe, {k: v for k, v in flux()[1].items() if "negative" not in k and k != "true_cfg_scale"}


def _flux2(name: str, **more: Any) -> Any:
    decoder = seeded(
        lambda: diffusers.AutoencoderKLFlux2(
            block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4,
            up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, sample_size=16,
        )
    )  # fmt: skip
    shape = {**FLUX, "axes_dims_rope": (4, 4, 4, 4), "timestep_guidance_channels": 16, **more}
    return _pipeline(name, shape, flow(use_dynamic_shifting=True), "Flux2Transformer2DModel", vae=decoder)


def flux2() -> Built:
    """Flux 2: distilled guidance."""
    return _flux2("Flux2"), {"prompt_embeds": rand(1, TOKENS, DIM, seed=1), "guidance_scale": 4.0, **SQUARE}


def flux2_klein() -> Built:
    """Flux 2 Klein: a call for each branch."""
    return _flux2("Flux2Klein", guidance_embeds=False), {**text(), **SQUARE}


def qwen_image() -> Built:
    """Qwen-Image: a call for each branch, whose guided prediction has the length of the conditional one."""
    decoder = seeded(
        lambda: diffusers.AutoencoderKLQwenImage(
            base_dim=4, z_dim=4, dim_mult=[1, 2, 4], num_res_blocks=1, temperal_downsample=[False, True],
            latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
        )
    )  # fmt: skip
    shape = {"in_channels": 16, "out_channels": 4, "num_layers": 3, "attention_head_dim": 16, "num_attention_heads": 2}
    shape |= {"joint_attention_dim": DIM, "axes_dims_rope": (4, 4, 8)}
    pipe = _pipeline("QwenImage", shape, flow(use_dynamic_shifting=True), vae=decoder)
    call = {k: v for k, v in text().items() if k != "guidance_scale"}
    mask = torch.ones(1, TOKENS, dtype=torch.long)
    masks = {"prompt_embeds_mask": mask, "negative_prompt_embeds_mask": mask}
    return pipe, {**call, **masks, "true_cfg_scale": 3.0, **SQUARE}


def chroma() -> Built:
    """Chroma: a call for each branch."""
    shape = {**FLUX, "axes_dims_rope": (4, 4, 8), "approximator_num_channels": 8, "approximator_hidden_dim": 16}
    pipe = _pipeline("Chroma", {**shape, "approximator_layers": 1}, flow(), vae=vae(4))
    return pipe, {**text(), **_masks(dtype=torch.bool), **SQUARE}


def sana() -> Built:
    """Sana: flow matching with DPM-Solver++."""
    shape = {"in_channels": 4, "out_channels": 4, "num_layers": 3, "caption_channels": DIM, "sample_size": 8, **HEADS}
    shape |= {"num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "cross_attention_dim": 16}
    decoder = seeded(
        lambda: diffusers.AutoencoderDC(
            in_channels=3, latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock", "ResBlock"),
            decoder_block_types=("ResBlock", "ResBlock"), encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8), encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()),
            encoder_layers_per_block=(1, 1), decoder_layers_per_block=[1, 1], downsample_block_type="conv",
            upsample_block_type="interpolate", decoder_norm_types="rms_norm", decoder_act_fns="silu",
        )
    )  # fmt: skip
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    pipe = _pipeline("Sana", shape, scheduler, vae=decoder)
    call = {**text(), **_masks(), **SQUARE, "height": 32, "width": 32}
    return pipe, {**call, "use_resolution_binning": False, "negative_prompt": None}


def hunyuan_dit() -> Built:
    """HunyuanDiT: two encoders of text; predicts a variance as well."""
    shape = {"in_channels": 4, "patch_size": 2, "sample_size": 8, "hidden_size": 16, "num_layers": 4, "text_len": 3}
    shape |= {"cross_attention_dim": DIM, "cross_attention_dim_t5": DIM, "pooled_projection_dim": 16, "text_len_t5": 3}
    shape |= {"use_style_cond_and_image_meta_size": False, **HEADS}
    scheduler = diffusers.DDPMScheduler(prediction_type="v_prediction", clip_sample=False)
    parts = {"text_encoder_2": None, "tokenizer_2": None, "safety_checker": None, "feature_extractor": None}
    pipe = _pipeline(
        "HunyuanDiT", shape, scheduler, "HunyuanDiT2DModel", vae=vae(4), requires_safety_checker=False, **parts
    )
    call: dict[str, Any] = {"guidance_scale": 5.0, "use_resolution_binning": False, **SQUARE}
    for n, suffix in enumerate(("", "_2")):
        for k, kind in enumerate(("", "negative_")):
            call[f"{kind}prompt_embeds{suffix}"] = rand(1, 3, DIM, seed=2 * n + k)
            call[f"{kind}prompt_attention_mask{suffix}"] = torch.ones(1, 3)
    return pipe, call


def ltx() -> Built:
    """LTX: video as tokens."""
    shape = {"in_channels": 8, "out_channels": 8, "num_layers": 3, "caption_channels": DIM, "cross_attention_dim": 16}
    shape |= HEADS
    decoder = seeded(
        lambda: diffusers.AutoencoderKLLTXVideo(
            latent_channels=8, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
            layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1, 1),
            spatio_temporal_scaling=(True, True, False, False),
            decoder_spatio_temporal_scaling=(True, True, False, False),
            decoder_inject_noise=(False,) * 5, upsample_residual=(False,) * 4, upsample_factor=(1,) * 4,
            timestep_conditioning=False, patch_size=1, patch_size_t=1, encoder_causal=True, decoder_causal=False,
        )
    )  # fmt: skip
    pipe = _pipeline("LTX", shape, flow(), "LTXVideoTransformer3DModel", vae=decoder)
    return pipe, {**text(), **_masks(dtype=torch.bool), **CLIP, "height": 32, "width": 32}


def cogvideox() -> Built:
    """CogVideoX: frames before channels; predicts v."""
    shape = {"in_channels": 4, "out_channels": 4, "time_embed_dim": 2, "text_embed_dim": DIM, "num_layers": 3, **HEADS}
    shape |= {"sample_width": 2, "sample_height": 2, "sample_frames": 5, "max_text_seq_length": TOKENS}
    decoder = seeded(
        lambda: diffusers.AutoencoderKLCogVideoX(
            block_out_channels=(8, 8, 8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=2,
            temporal_compression_ratio=4, down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4,
        )
    )  # fmt: skip
    scheduler = diffusers.CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=3.0, clip_sample=False,
        timestep_spacing="trailing",
    )  # fmt: skip
    pipe = _pipeline("CogVideoX", shape, scheduler, "CogVideoXTransformer3DModel", vae=decoder)
    return pipe, {**text(), **CLIP}


def hunyuan_video() -> Built:
    """HunyuanVideo with true guidance: a second call of the transformer at every step."""
    shape = {"in_channels": 4, "out_channels": 4, "num_layers": 2, "num_single_layers": 2, "num_refiner_layers": 1}
    shape |= {"text_embed_dim": DIM, "pooled_projection_dim": 8, "rope_axes_dim": (2, 2, 4), "guidance_embeds": True}
    decoder = seeded(
        lambda: diffusers.AutoencoderKLHunyuanVideo(
            latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4,
            down_block_types=("HunyuanVideoDownBlock3D",) * 4, up_block_types=("HunyuanVideoUpBlock3D",) * 4,
            mid_block_add_attention=False,
        )
    )  # fmt: skip
    encoders = {"text_encoder_2": None, "tokenizer_2": None, "vae": decoder}
    shape |= HEADS
    pipe = _pipeline("HunyuanVideo", shape, flow(shift=7.0), "HunyuanVideoTransformer3DModel", **encoders)
    pooled = {"pooled_prompt_embeds": rand(1, 8, seed=3), "negative_pooled_prompt_embeds": rand(1, 8, seed=4)}
    call = {**text(), **_masks(), **pooled, **CLIP, "true_cfg_scale": 3.0, "guidance_scale": 6.0}
    return pipe, call


def lumina2() -> Built:
    """Lumina 2: a call for each branch, and predicts the opposite of the velocity."""
    shape = {"sample_size": 8, "in_channels": 4, "hidden_size": 24, "num_layers": 3, "num_refiner_layers": 1}
    shape |= {"num_attention_heads": 1, "num_kv_heads": 1, "multiple_of": 2, "axes_dim_rope": (8, 8, 8)}
    shape |= {"axes_lens": (32, 32, 32), "cap_feat_dim": DIM}
    pipe = _pipeline("Lumina2", shape, flow(), vae=vae(4))
    return pipe, {**text(), **_masks(), **SQUARE}


FAMILIES: dict[str, Callable[[], Built]] = {
    "flux": flux,
    "flux distilled": flux_distilled,
    "flux 2": flux2,
    "flux 2 klein": flux2_klein,
    "stable diffusion 3": zoo.sd3,
    "qwen-image": qwen_image,
    "z-image": zoo.z_image,
    "chroma": chroma,
    "pixart": zoo.pixart,
    "sana": sana,
    "dit": zoo.dit,
    "hunyuan dit": hunyuan_dit,
    "wan 2.1": lambda: zoo.wan(two=False),
    "wan 2.2": zoo.wan,
    "ltx": ltx,
    "cogvideox": cogvideox,
    "hunyuan video": hunyuan_video,
    "cogview 4": zoo.cogview4,
    "aura flow": zoo.aura_flow,
    "lumina 2": lumina2,
}
