"""A tiny model of every transformer that is known, with the arguments of a call."""

from __future__ import annotations

from typing import Any

import torch
from zoo import rand

TEXT = rand(2, 6, 16, seed=1)
POOLED = rand(2, 8, seed=2)
MASK = torch.ones(2, 6, dtype=torch.long)
SMALL = {"num_attention_heads": 2, "attention_head_dim": 16}
TINY = {"num_attention_heads": 2, "attention_head_dim": 8}
IMAGE = rand(2, 4, 8, 8)
CLIP = rand(2, 4, 2, 8, 8)  # channels, frames
SIZES = {name: torch.tensor([[8.0, 8.0]] * 2) for name in ("original_size", "target_size", "crop_coords")}
SD3 = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 4, "joint_attention_dim": 16, **TINY}
SD3 |= {"caption_projection_dim": 16, "pooled_projection_dim": 8, "pos_embed_max_size": 8}
SANA = {"num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "cross_attention_dim": 16, **TINY}
FLUX = {"num_layers": 2, "num_single_layers": 2, "axes_dims_rope": (4, 4, 8), "joint_attention_dim": 16, **SMALL}
FLUX |= {"in_channels": 16}
TOKENS = {"hidden_states": rand(2, 4, 16), "img_ids": rand(4, 3).abs(), "txt_ids": torch.zeros(6, 3)}
PIXART = {"sample_size": 8, "num_layers": 4, "norm_num_groups": 4, "out_channels": 8, **TINY}
LATTE = {"in_channels": 4, "out_channels": 8, "num_layers": 3, "sample_size": 8, "patch_size": 2, "video_length": 2}
LATTE |= {"cross_attention_dim": 16, "caption_channels": 16, "norm_type": "ada_norm_single", "attention_bias": True}
LATTE |= {"activation_fn": "gelu-approximate", "num_embeds_ada_norm": 1000, "norm_elementwise_affine": False, **TINY}


# name of a case -> (class, configuration, arguments of a call)
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "dit": ("DiTTransformer2DModel", {**PIXART, "in_channels": 4, "num_embeds_ada_norm": 1000},
            {"class_labels": torch.tensor([3, 4])}),
    "transformer2d": ("Transformer2DModel", {**PIXART, "in_channels": 4, "num_embeds_ada_norm": 1000, "patch_size": 2,
                      "norm_type": "ada_norm_zero"}, {"class_labels": torch.tensor([3, 4])}),
    "pixart": ("PixArtTransformer2DModel", {**PIXART, "cross_attention_dim": 16, "caption_channels": 16,
               "use_additional_conditions": False}, {"encoder_hidden_states": TEXT}),
    "latte": ("LatteTransformer3DModel", LATTE, {"hidden_states": CLIP, "encoder_hidden_states": TEXT}),
    "sd3": ("SD3Transformer2DModel", SD3, {"encoder_hidden_states": TEXT, "pooled_projections": POOLED}),
    "sd35": ("SD3Transformer2DModel", {**SD3, "dual_attention_layers": (0, 1), "qk_norm": "rms_norm"},
             {"encoder_hidden_states": TEXT, "pooled_projections": POOLED}),
    "sd3_controlled": ("SD3Transformer2DModel", SD3, {"encoder_hidden_states": TEXT, "pooled_projections": POOLED,
                       "block_controlnet_hidden_states": [rand(2, 16, 16, seed=8), rand(2, 16, 16, seed=9)]}),
    "auraflow": ("AuraFlowTransformer2DModel", {"sample_size": 8, "in_channels": 4, "num_mmdit_layers": 2,
                 "num_single_dit_layers": 2, "joint_attention_dim": 16, "caption_projection_dim": 16,
                 "pos_embed_max_size": 64, **TINY}, {"encoder_hidden_states": TEXT}),
    "flux": ("FluxTransformer2DModel", {**FLUX, "pooled_projection_dim": 8},
             {**TOKENS, "encoder_hidden_states": TEXT, "pooled_projections": POOLED}),
    "flux_controlled": ("FluxTransformer2DModel", {**FLUX, "pooled_projection_dim": 8},
                        {**TOKENS, "encoder_hidden_states": TEXT, "pooled_projections": POOLED,
                         "controlnet_block_samples": [rand(2, 4, 32, seed=8)],
                         "controlnet_single_block_samples": [rand(2, 4, 32, seed=9)]}),
    "flux2": ("Flux2Transformer2DModel", {**FLUX, "axes_dims_rope": (4, 4, 4, 4), "timestep_guidance_channels": 16},
              {**TOKENS, "encoder_hidden_states": TEXT, "img_ids": rand(2, 4, 4).abs(), "txt_ids": torch.zeros(2, 6, 4),
               "guidance": torch.ones(2)}),
    "chroma": ("ChromaTransformer2DModel", {**FLUX, "approximator_num_channels": 8, "approximator_hidden_dim": 16,
               "approximator_layers": 1}, {**TOKENS, "encoder_hidden_states": TEXT}),
    "qwen": ("QwenImageTransformer2DModel", {"in_channels": 16, "out_channels": 4, "num_layers": 3,
             "joint_attention_dim": 16, "axes_dims_rope": (4, 4, 8), **SMALL},
             {"hidden_states": rand(2, 16, 16), "encoder_hidden_states": TEXT, "encoder_hidden_states_mask": MASK,
              "img_shapes": [[(1, 4, 4)]] * 2}),
    "wan": ("WanTransformer3DModel", {"patch_size": (1, 2, 2), "in_channels": 4, "out_channels": 4, "text_dim": 16,
            "freq_dim": 16, "ffn_dim": 32, "num_layers": 3, "rope_max_seq_len": 32, "num_attention_heads": 2,
            "attention_head_dim": 12}, {"hidden_states": CLIP, "encoder_hidden_states": TEXT}),
    "ltx": ("LTXVideoTransformer3DModel", {"in_channels": 4, "out_channels": 4, "cross_attention_dim": 16,
            "num_layers": 3, "caption_channels": 16, **TINY},
            {"hidden_states": rand(2, 8, 4), "encoder_hidden_states": TEXT, "encoder_attention_mask": MASK.bool(),
             "num_frames": 2, "height": 2, "width": 2}),
    "cogvideox": ("CogVideoXTransformer3DModel", {"in_channels": 4, "out_channels": 4, "time_embed_dim": 2,
                  "text_embed_dim": 16, "num_layers": 3, "sample_width": 8, "sample_height": 8, "sample_frames": 5,
                  "max_text_seq_length": 6, **TINY},
                  {"hidden_states": CLIP.permute(0, 2, 1, 3, 4), "encoder_hidden_states": TEXT}),
    "cogview3": ("CogView3PlusTransformer2DModel", {"in_channels": 4, "out_channels": 4, "num_layers": 3,
                 "text_embed_dim": 16, "time_embed_dim": 16, "condition_dim": 4, "pos_embed_max_size": 8,
                 "sample_size": 8, **TINY}, {"encoder_hidden_states": TEXT, **SIZES}),
    "cogview4": ("CogView4Transformer2DModel", {"in_channels": 4, "out_channels": 4, "num_layers": 3,
                 "text_embed_dim": 16, "time_embed_dim": 16, "condition_dim": 4, "sample_size": 8,
                 "rope_axes_dim": (8, 8), **SMALL}, {"encoder_hidden_states": TEXT, **SIZES}),
    "mochi": ("MochiTransformer3DModel", {"in_channels": 4, "num_layers": 3, "pooled_projection_dim": 16,
              "text_embed_dim": 16, "time_embed_dim": 4, "max_sequence_length": 6, **TINY},
              {"hidden_states": CLIP, "encoder_hidden_states": TEXT, "encoder_attention_mask": MASK.bool()}),
    "allegro": ("AllegroTransformer3DModel", {"num_layers": 3, "cross_attention_dim": 48, "sample_height": 8,
                "sample_width": 8, "sample_frames": 2, "caption_channels": 16, "num_attention_heads": 2,
                "attention_head_dim": 24}, {"hidden_states": CLIP, "encoder_hidden_states": TEXT}),
    "hunyuan_video": ("HunyuanVideoTransformer3DModel", {"in_channels": 4, "out_channels": 4, "num_layers": 2,
                      "num_single_layers": 2, "num_refiner_layers": 1, "text_embed_dim": 16,
                      "pooled_projection_dim": 8, "rope_axes_dim": (2, 2, 4), "guidance_embeds": False, **TINY},
                      {"hidden_states": CLIP, "encoder_hidden_states": TEXT, "encoder_attention_mask": MASK,
                       "pooled_projections": POOLED}),
    "hunyuan_dit": ("HunyuanDiT2DModel", {"in_channels": 4, "patch_size": 2, "sample_size": 8, "hidden_size": 16,
                    "num_layers": 4, "cross_attention_dim": 16, "cross_attention_dim_t5": 16, "text_len": 3,
                    "pooled_projection_dim": 16, "text_len_t5": 3, "use_style_cond_and_image_meta_size": False, **TINY},
                    {"encoder_hidden_states": rand(2, 3, 16, seed=3), "encoder_hidden_states_t5": rand(2, 3, 16),
                     "text_embedding_mask": torch.ones(2, 3), "text_embedding_mask_t5": torch.ones(2, 3)}),
    "sana": ("SanaTransformer2DModel", {"in_channels": 4, "out_channels": 4, "num_layers": 3, "caption_channels": 16,
             "sample_size": 8, **SANA}, {"encoder_hidden_states": TEXT}),
    "sana_controlled": ("SanaTransformer2DModel", {"in_channels": 4, "out_channels": 4, "num_layers": 3,
                        "caption_channels": 16, "sample_size": 8, **SANA},
                        {"encoder_hidden_states": TEXT, "controlnet_block_samples": [rand(2, 64, 16, seed=8)]}),
    "lumina2": ("Lumina2Transformer2DModel", {"sample_size": 8, "in_channels": 4, "hidden_size": 24, "num_layers": 3,
                "num_refiner_layers": 1, "num_attention_heads": 1, "num_kv_heads": 1, "multiple_of": 2,
                "axes_dim_rope": (8, 8, 8), "axes_lens": (32, 32, 32), "cap_feat_dim": 16},
                {"encoder_hidden_states": TEXT, "encoder_attention_mask": MASK.bool()}),
    "stable_audio": ("StableAudioDiTModel", {"sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 3,
                     "num_key_value_attention_heads": 1, "cross_attention_dim": 16, "time_proj_dim": 8,
                     "global_states_input_dim": 8, "cross_attention_input_dim": 16, **SMALL},
                     {"hidden_states": rand(2, 4, 8), "encoder_hidden_states": TEXT,
                      "global_hidden_states": POOLED[:, None],
                      "rotary_embedding": (rand(9, 8), rand(9, 8, seed=1))}),
}  # fmt: skip
