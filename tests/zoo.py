"""Tiny pipelines with random weights: one for each kind of U-Net and of conditioning that diffusers has.

Each builder returns a pipeline and the arguments of a call that ends in latents or a small tensor. Random weights prove
exactness and skipped work; they say nothing about quality.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    AutoencoderKLTemporalDecoder,
    ControlNetModel,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    EulerDiscreteScheduler,
    IFPipeline,
    MotionAdapter,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionUpscalePipeline,
    StableDiffusionXLPipeline,
    StableVideoDiffusionPipeline,
    T2IAdapter,
    TextToVideoSDPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    UNet3DConditionModel,
    UNetMotionModel,
    UNetSpatioTemporalConditionModel,
)
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel

Built = tuple[Any, dict[str, Any]]
DIM = 16  # width of text embeddings
TOKENS = 6
SIZE = 8  # latent height and width


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seeded(build: Callable[[], Any], seed: int = 0) -> Any:
    """Build a model with reproducible random weights; zero-initialised layers are filled, so that nothing is inert."""
    torch.manual_seed(seed)
    model = build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and not parameter.any():
                parameter.normal_(std=0.1)
    return model


def ddim(**changes: Any) -> DDIMScheduler:
    return DDIMScheduler(num_train_timesteps=1000, clip_sample=False, steps_offset=1, **changes)


def vae(channels: int = 4, image_channels: int = 3) -> AutoencoderKL:
    return seeded(
        lambda: AutoencoderKL(
            in_channels=image_channels,
            out_channels=image_channels,
            latent_channels=channels,
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            sample_size=16,
        )
    )


UNET = {
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "sample_size": SIZE,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": DIM,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}


def unet(**changes: Any) -> UNet2DConditionModel:
    return seeded(lambda: UNet2DConditionModel(**{**UNET, "in_channels": 4, "out_channels": 4, **changes}))


def text(batch: int = 1) -> dict[str, Any]:
    return {
        "prompt_embeds": rand(batch, TOKENS, DIM, seed=1),
        "negative_prompt_embeds": rand(batch, TOKENS, DIM, seed=2),
        "guidance_scale": 5.0,
    }


def _sd(cls: type, model: Any, **components: Any) -> Any:
    return cls(
        vae=vae(),
        text_encoder=None,
        tokenizer=None,
        unet=model,
        scheduler=ddim(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **components,
    )


def sd() -> Built:
    return _sd(StableDiffusionPipeline, unet()), {**text(), "output_type": "latent"}


def sd_batch() -> Built:
    return _sd(StableDiffusionPipeline, unet()), {**text(2), "num_images_per_prompt": 2, "output_type": "latent"}


def sd_without_guidance() -> Built:
    call = {"prompt_embeds": text()["prompt_embeds"], "guidance_scale": 1.0, "output_type": "latent"}
    return _sd(StableDiffusionPipeline, unet()), call


def sd_odd_size() -> Built:
    return _sd(StableDiffusionPipeline, unet()), {**text(), "height": 24, "width": 40, "output_type": "latent"}


def img2img() -> Built:
    call = {**text(), "image": (rand(1, 3, 16, 16).clamp(-1, 1) + 1) / 2, "strength": 0.7, "output_type": "latent"}
    return _sd(StableDiffusionImg2ImgPipeline, unet()), call


def inpaint() -> Built:
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 8:] = 1
    call = {**text(), "image": (rand(1, 3, 16, 16).clamp(-1, 1) + 1) / 2, "mask_image": mask, "height": 16, "width": 16}
    return _sd(StableDiffusionInpaintPipeline, unet(in_channels=9)), {**call, "output_type": "latent"}


def upscale() -> Built:
    pipe = StableDiffusionUpscalePipeline(
        vae=vae(),
        text_encoder=None,
        tokenizer=None,
        unet=unet(in_channels=7, num_class_embeds=1000),
        low_res_scheduler=DDPMScheduler(),
        scheduler=ddim(),
        max_noise_level=350,
    )
    image = (rand(1, 3, 8, 8).clamp(-1, 1) + 1) / 2
    return pipe, {**text(), "image": image, "noise_level": 20, "output_type": "latent"}


def sdxl() -> Built:
    model = unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=8 * 6 + DIM,
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
    )
    pipe = StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=model,
        scheduler=EulerDiscreteScheduler(),
        add_watermarker=False,
    )
    pooled = {"pooled_prompt_embeds": rand(1, DIM, seed=3), "negative_pooled_prompt_embeds": rand(1, DIM, seed=4)}
    return pipe, {**text(), **pooled, "height": 16, "width": 16, "output_type": "latent"}


def deepfloyd_if() -> Built:
    model = unet(
        in_channels=3,
        out_channels=6,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        encoder_hid_dim=DIM,
        encoder_hid_dim_type="text_proj",
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
        cross_attention_norm="group_norm",
        cross_attention_dim=32,  # a multiple of that normalisation's groups
        resnet_time_scale_shift="scale_shift",
        act_fn="gelu",
        class_embed_type=None,
    )
    pipe = IFPipeline(
        tokenizer=None,
        text_encoder=None,
        unet=model,
        scheduler=DDPMScheduler(variance_type="learned_range"),
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
    )
    return pipe, {**text(), "height": 8, "width": 8, "output_type": "pt"}


def controlnet_model(seed: int = 0) -> ControlNetModel:
    keys = ("block_out_channels", "layers_per_block", "down_block_types", "cross_attention_dim", "norm_num_groups")
    return seeded(
        lambda: ControlNetModel(
            **{k: UNET[k] for k in keys},
            in_channels=4,
            attention_head_dim=4,
            conditioning_embedding_out_channels=(8, 16),
        ),
        seed,
    )


def controlnet() -> Built:
    pipe = _sd(StableDiffusionControlNetPipeline, unet(), controlnet=controlnet_model())
    return pipe, {**text(), "image": rand(1, 3, 16, 16), "height": 16, "width": 16, "output_type": "latent"}


def controlnets() -> Built:
    nets = MultiControlNetModel([controlnet_model(0), controlnet_model(1)])
    pipe = _sd(StableDiffusionControlNetPipeline, unet(), controlnet=nets)
    images = [rand(1, 3, 16, 16), rand(1, 3, 16, 16, seed=1)]
    call = {"image": images, "controlnet_conditioning_scale": [1.0, 0.5], "height": 16, "width": 16}
    return pipe, {**text(), **call, "output_type": "latent"}


def controlnet_guess_mode() -> Built:
    pipe, call = controlnet()
    return pipe, {**call, "guess_mode": True}


def t2i_adapter() -> Built:
    adapter = seeded(
        lambda: T2IAdapter(channels=[16, 32], num_res_blocks=1, downscale_factor=2, adapter_type="full_adapter")
    )
    blocks = {"down_block_types": UNET["down_block_types"][::-1], "up_block_types": UNET["up_block_types"][::-1]}
    pipe = _sd(StableDiffusionAdapterPipeline, unet(**blocks), adapter=adapter)
    return pipe, {**text(), "image": rand(1, 3, 16, 16), "height": 16, "width": 16, "output_type": "latent"}


def ip_adapter() -> Built:
    pipe, call = sd()
    heads: dict[str, torch.Tensor] = {}
    for number, (name, _) in enumerate(
        n for n in pipe.unet.attn_processors.items() if n[0].endswith("attn2.processor")
    ):
        width = pipe.unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
        for key in ("to_k_ip", "to_v_ip"):
            heads[f"{2 * number + 1}.{key}.weight"] = rand(width, DIM, seed=number)
    projection = {
        "proj.weight": rand(4 * DIM, 12, seed=5),
        "proj.bias": rand(4 * DIM, seed=6),
        "norm.weight": torch.ones(DIM),
        "norm.bias": torch.zeros(DIM),
    }
    pipe.unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": heads}])
    return pipe, {**call, "ip_adapter_image_embeds": [rand(2, 1, 12, seed=7)]}


def _ddpm(widths: tuple[int, int], **blocks: tuple[str, str]) -> Built:
    shape = {"sample_size": SIZE, "layers_per_block": 1, "norm_num_groups": 8, "attention_head_dim": 8}
    model = seeded(lambda: UNet2DModel(block_out_channels=widths, **shape, **blocks))
    return DDPMPipeline(unet=model, scheduler=DDPMScheduler()), {"batch_size": 2, "output_type": "np"}


def dit() -> Built:
    """DiT, whose pipeline has its two guidance branches the other way round; returns latents through a VAE."""
    from diffusers import DiTPipeline, DiTTransformer2DModel

    transformer = seeded(
        lambda: DiTTransformer2DModel(
            num_layers=4, num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8,
            sample_size=8, norm_num_groups=4, num_embeds_ada_norm=1000,
        )
    )  # fmt: skip
    pipe = DiTPipeline(transformer=transformer, vae=vae(), scheduler=ddim())
    return pipe, {"class_labels": [3], "guidance_scale": 4.0, "output_type": "np"}


def flux() -> Built:
    """Flux: a transformer with diffusers' own caches; returns packed latents."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    transformer = seeded(
        lambda: FluxTransformer2DModel(
            in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=DIM, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8),
        )
    )  # fmt: skip
    pipe = FluxPipeline(
        transformer=transformer, vae=vae(4), scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
    )  # fmt: skip
    embeds = {"prompt_embeds": rand(1, TOKENS, DIM, seed=1), "pooled_prompt_embeds": rand(1, 8, seed=2)}
    return pipe, {**embeds, "height": 16, "width": 16, "output_type": "latent"}


def flux_guided(**changes: Any) -> Built:
    """Flux with true guidance: its transformer is called for one branch after the other."""
    pipe, call = flux()
    others = {
        "negative_prompt_embeds": rand(1, TOKENS, DIM, seed=3),
        "negative_pooled_prompt_embeds": rand(1, 8, seed=4),
    }
    return pipe, {**call, **others, "true_cfg_scale": 3.0, **changes}


def wan(two: bool = True) -> Built:
    """Wan 2.2: a transformer for the noisier steps and one for the others, each called twice a step for guidance."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

    def transformer(seed: int) -> Any:
        return seeded(
            lambda: WanTransformer3DModel(
                patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16,
                text_dim=DIM, freq_dim=16, ffn_dim=32, num_layers=2, cross_attn_norm=True, rope_max_seq_len=32,
            ),
            seed,
        )  # fmt: skip

    decoder = seeded(
        lambda: AutoencoderKLWan(
            base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
        )
    )
    pipe = WanPipeline(
        tokenizer=None, text_encoder=None, vae=decoder, transformer=transformer(0),
        transformer_2=transformer(1) if two else None, boundary_ratio=0.875 if two else None,
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    )  # fmt: skip
    return pipe, {**text(), "height": 16, "width": 16, "num_frames": 5, "output_type": "latent"}


def unet2d() -> Built:
    return _ddpm(
        (16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


def unet2d_skip() -> Built:
    """NCSN++-like: skip_conv blocks that carry an image-space skip sample beside the features."""
    return _ddpm(
        (32, 32),
        down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        up_block_types=("AttnSkipUpBlock2D", "SkipUpBlock2D"),
    )


def unet3d() -> Built:
    model = seeded(
        lambda: UNet3DConditionModel(
            sample_size=SIZE,
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=8,
            cross_attention_dim=DIM,
            attention_head_dim=4,
            down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        )
    )
    pipe = TextToVideoSDPipeline(vae=vae(), text_encoder=None, tokenizer=None, unet=model, scheduler=ddim())
    call = {"num_frames": 2, "height": 16, "width": 16, "output_type": "latent"}
    return pipe, {**text(), **call}


def animatediff() -> Built:
    motion = seeded(
        lambda: MotionAdapter(
            block_out_channels=(16, 32),
            motion_layers_per_block=1,
            motion_num_attention_heads=2,
            motion_norm_num_groups=8,
            use_motion_mid_block=True,
        )
    )
    model = seeded(lambda: UNetMotionModel.from_unet2d(unet(), motion)).eval()
    pipe = AnimateDiffPipeline(
        vae=vae(), text_encoder=None, tokenizer=None, unet=model, motion_adapter=motion, scheduler=ddim()
    )
    call = {"num_frames": 3, "height": 16, "width": 16, "output_type": "latent"}
    return pipe, {**text(), **call}


def svd() -> Built:
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    model = seeded(
        lambda: UNetSpatioTemporalConditionModel(
            sample_size=SIZE,
            in_channels=8,
            out_channels=4,
            block_out_channels=(32, 64),
            layers_per_block=1,
            num_attention_heads=(2, 4),
            cross_attention_dim=DIM,
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=24,
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            num_frames=3,
        )
    )
    temporal_vae = seeded(
        lambda: AutoencoderKLTemporalDecoder(
            block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4
        )
    )
    vision = seeded(
        lambda: CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                hidden_size=DIM,
                projection_dim=DIM,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=16,
                image_size=16,
                patch_size=8,
            )
        )
    )
    pipe = StableVideoDiffusionPipeline(
        vae=temporal_vae,
        image_encoder=vision,
        unet=model,
        scheduler=EulerDiscreteScheduler(
            prediction_type="v_prediction", timestep_type="continuous", use_karras_sigmas=True, sigma_max=700.0
        ),
        feature_extractor=CLIPImageProcessor(crop_size=16, size=16),
    )
    call = {"image": rand(1, 3, 16, 16).sigmoid(), "num_frames": 3, "height": 16, "width": 16, "output_type": "latent"}
    return pipe, call


# ---------------------------------------------------------------------- pipelines beside the ones that every law is for
def panorama() -> Built:
    """Three views of an image, each through denoiser and scheduler at every step; its guidance is interleaved."""
    from diffusers import StableDiffusionPanoramaPipeline

    pipe = _sd(StableDiffusionPanoramaPipeline, unet())
    pipe.vae_scale_factor = 8  # what its views assume
    pipe.get_views = functools.partial(pipe.get_views, window_size=8, stride=2)  # instead of 64 and 8
    return pipe, {**text(), "height": 64, "width": 96, "output_type": "latent"}


def sd3() -> Built:
    """Stable Diffusion 3: its last block has no stream of text; flow matching."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    transformer = seeded(
        lambda: SD3Transformer2DModel(
            sample_size=8, patch_size=1, in_channels=4, num_layers=4, attention_head_dim=8, num_attention_heads=4,
            caption_projection_dim=32, joint_attention_dim=DIM, pooled_projection_dim=DIM, out_channels=4,
        )
    )  # fmt: skip
    encoders = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    pipe = StableDiffusion3Pipeline(
        transformer=transformer, vae=vae(4), scheduler=FlowMatchEulerDiscreteScheduler(), **dict.fromkeys(encoders)
    )
    pooled = {"pooled_prompt_embeds": rand(1, DIM, seed=3), "negative_pooled_prompt_embeds": rand(1, DIM, seed=4)}
    return pipe, {**text(), **pooled, "height": 16, "width": 16, "output_type": "latent"}


def cogview4() -> Built:
    """CogView 4, which calls its transformer once for each branch of guidance, conditional first; flow matching."""
    from diffusers import CogView4Pipeline, CogView4Transformer2DModel, FlowMatchEulerDiscreteScheduler

    transformer = seeded(
        lambda: CogView4Transformer2DModel(
            patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, out_channels=4,
            text_embed_dim=DIM, time_embed_dim=8, condition_dim=4,
        )
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(base_shift=0.25, max_shift=0.75, use_dynamic_shifting=True)
    pipe = CogView4Pipeline(transformer=transformer, vae=vae(4), scheduler=scheduler, text_encoder=None, tokenizer=None)
    return pipe, {**text(), "height": 16, "width": 16, "output_type": "latent"}


def aura_flow(shift: float = 1.0) -> Built:
    """AuraFlow, whose transformer is told t / 1000: with a shift of 1 that is at first what the last timestep is."""
    from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler

    transformer = seeded(
        lambda: AuraFlowTransformer2DModel(
            sample_size=8, patch_size=1, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1,
            attention_head_dim=8, num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=DIM,
            out_channels=4, pos_embed_max_size=256,
        )
    )  # fmt: skip
    pipe = AuraFlowPipeline(
        transformer=transformer, vae=vae(4), scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        text_encoder=None, tokenizer=None,
    )  # fmt: skip
    mask = torch.ones(1, TOKENS, dtype=torch.long)
    masks = {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask}
    return pipe, {**text(), **masks, "height": 16, "width": 16, "output_type": "latent"}


def pixart() -> Built:
    from diffusers import PixArtAlphaPipeline, PixArtTransformer2DModel

    transformer = seeded(
        lambda: PixArtTransformer2DModel(
            num_layers=2, num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, sample_size=8,
            cross_attention_dim=DIM, caption_channels=DIM, norm_num_groups=4, use_additional_conditions=False,
        )
    )  # fmt: skip
    pipe = PixArtAlphaPipeline(transformer=transformer, vae=vae(), scheduler=ddim(), tokenizer=None, text_encoder=None)
    mask = torch.ones(1, TOKENS, dtype=torch.long)
    masks = {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask, "negative_prompt": None}
    call = {**text(), **masks, "height": 16, "width": 16, "use_resolution_binning": False}
    return pipe, {**call, "output_type": "latent"}


def z_image() -> Built:
    """Z-Image: its transformer takes and returns a list, with one latent for each image and branch of guidance."""
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

    transformer = seeded(
        lambda: ZImageTransformer2DModel(
            in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=DIM,
            axes_dims=[4, 6, 6], axes_lens=[128, 16, 16],
        )
    )  # fmt: skip
    pipe = ZImagePipeline(
        transformer=transformer, vae=vae(4), scheduler=FlowMatchEulerDiscreteScheduler(), text_encoder=None,
        tokenizer=None,
    )  # fmt: skip
    embeds = {"prompt_embeds": [rand(40, DIM, seed=1)], "negative_prompt_embeds": [rand(5, DIM, seed=2)]}
    return pipe, {**embeds, "height": 16, "width": 24, "output_type": "latent"}


def for_images(call: dict[str, Any], images: range) -> dict[str, Any]:
    """The arguments of a call for several images, each with embeddings of its own, made of those for one."""
    given, count = dict(call), len(images)
    for name, value in call.items():
        if name == "class_labels":
            given[name] = [(3 * i) % 10 for i in images]
        elif isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
            given[name] = [value[0].roll(i, -1) for i in images]
        elif not isinstance(value, torch.Tensor):
            continue
        elif "mask" in name or name == "image":
            given[name] = value.repeat(count, *[1] * (value.dim() - 1))
        else:
            given[name] = torch.cat([value.roll(i, -1) for i in images])
    if "batch_size" in call:
        given["batch_size"] = count
    return given


ZOO: dict[str, Callable[[], Built]] = {
    f.__name__: f
    for f in (
        sd,
        sd_batch,
        sd_without_guidance,
        sd_odd_size,
        img2img,
        inpaint,
        upscale,
        sdxl,
        deepfloyd_if,
        controlnet,
        controlnets,
        controlnet_guess_mode,
        t2i_adapter,
        ip_adapter,
        unet2d,
        unet2d_skip,
        unet3d,
        animatediff,
        svd,
    )
}


def run(pipe: Any, call: dict[str, Any], steps: int = 6, seed: int = 0, **changes: Any) -> torch.Tensor:
    """Call the pipeline with a fresh generator; the result as one float tensor."""
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    output = pipe(num_inference_steps=steps, generator=generator, **{**call, **changes})
    result = next(iter(output.values())) if hasattr(output, "values") else output[0]
    if isinstance(result, list):
        result = result[0]
    tensor = torch.as_tensor(result)
    return tensor if tensor.dtype == torch.float64 else tensor.float()
