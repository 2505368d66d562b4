"""Shallow steps on every transformer whose blocks are known: in their order, each once, whatever lies between them."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.hooks import HookRegistry, ModelHook
from zoo import ddim, rand, seeded

from diffusion_accel import AccelerationError, Reuse, accelerate
from diffusion_accel.denoisers import stream_blocks
from diffusion_accel.denoisers.families import _MODELS

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


TOKENS = {"hidden_states": rand(2, 4, 16), "img_ids": torch.rand(4, 3).round(), "txt_ids": torch.zeros(6, 3)}


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
              {**TOKENS, "encoder_hidden_states": TEXT, "img_ids": torch.rand(2, 4, 4), "txt_ids": torch.zeros(2, 6, 4),
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
                      "rotary_embedding": (torch.rand(9, 8), torch.rand(9, 8))}),
}  # fmt: skip


class Still(DiffusionPipeline):
    """Gives its transformer the same at every step, so that whatever is kept is exact."""

    def __init__(self, transformer: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, steps: int, call: dict[str, Any]) -> list[torch.Tensor]:
        self.scheduler.set_timesteps(steps)
        drawn = []
        for t in self.scheduler.timesteps:
            given = {"hidden_states": IMAGE, **call, "timestep": t.expand(2).float()}
            drawn.append(self.transformer(**given, return_dict=False)[0])
            self.scheduler.step(drawn[0], t, drawn[0])
        return drawn


class Note(ModelHook):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return args, kwargs


def standing_still() -> Any:
    scheduler = ddim()
    set_timesteps = scheduler.set_timesteps

    def stand(steps: int) -> None:
        set_timesteps(steps)
        scheduler.timesteps = torch.full_like(scheduler.timesteps, 500)

    scheduler.set_timesteps = stand
    return scheduler


@pytest.mark.parametrize("case", CASES)
def test_shallow_steps_are_exact_where_nothing_moves(case: str) -> None:
    """What the inner blocks added at the full step is added once, and they are not computed again."""
    name, config, call = CASES[case]
    transformer = seeded(lambda: getattr(diffusers, name)(**config))
    pipe = Still(transformer, standing_still())
    blocks = stream_blocks(transformer)
    want = pipe(1, call)[0]
    for depth in range(1, len(blocks)):
        accelerate(pipe, Reuse(plan=f"steps:full shallow:{depth}@1 full shallow:{depth}"))
        first, *others = pipe(4, call)
        assert torch.equal(first, want)
        for other in others:
            assert (other - want).abs().max() <= 2e-5 * want.abs().max(), depth
    notes = []
    for block in blocks:
        notes.append(Note())
        HookRegistry.check_if_exists_or_initialize(block.module).register_hook(notes[-1], "note")
    pipe(4, call)
    assert sorted(note.calls for note in notes) == [2] + [4] * (len(blocks) - 1)


def test_every_known_transformer_is_tried() -> None:
    assert {name for name, _, _ in CASES.values()} == {name for name, family in _MODELS.items() if family.stream_lists}


class Unknown(diffusers.SD3Transformer2DModel):
    """A transformer with a forward of its own, of which nothing is known."""

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor, **more: Any) -> Any:
        return super().forward(hidden_states, timestep=timestep, **more)


class Named(diffusers.SD3Transformer2DModel):
    def forward(self, x: torch.Tensor, t: torch.Tensor) -> Any:
        return super().forward(x, timestep=t)


@pytest.mark.parametrize(
    ("model", "plan", "words"),
    [
        (diffusers.SD3Transformer2DModel, "uniform:3", "is not a U-Net: it has no decoder"),
        (diffusers.SD3Transformer2DModel, "faster-diffusion", "use hold:n or shallow:n,depth"),
        (diffusers.SD3Transformer2DModel, "steps:full decoder", "no decoder"),
        (diffusers.SD3Transformer2DModel, "shallow:2,4", "has 4 blocks: the depth of a shallow step must be 1 to 3"),
        (diffusers.SD3Transformer2DModel, "hold:2,epsilon", "cannot be turned into noise"),
        (Unknown, "shallow:2,1", "the blocks of Unknown are not known to this toolkit; use hold:n"),
        (Unknown, "deepcache:2", "the blocks of Unknown are not known"),
        (Named, "hold:2", "Named does not take latents and a timestep"),
    ],
)
def test_what_cannot_work_is_refused_by_accelerate(model: Any, plan: str, words: str) -> None:
    scheduler = ddim(prediction_type="epsilon")
    if "epsilon" in plan:
        scheduler.register_to_config(prediction_type="unknown")
    pipe = Still(seeded(lambda: model(**SD3)), scheduler)
    with pytest.raises(AccelerationError, match=words):
        accelerate(pipe, Reuse(plan=plan))
    assert type(pipe) is Still and not hasattr(pipe, "acceleration")


def test_one_block_is_said_to_be_one() -> None:
    pipe = Still(seeded(lambda: diffusers.SD3Transformer2DModel(**{**SD3, "num_layers": 1})), ddim())
    with pytest.raises(AccelerationError, match="has 1 block: a shallow step would leave out nothing or all; use hold"):
        accelerate(pipe, Reuse(plan="deepcache:2"))
