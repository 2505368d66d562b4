"""U-Nets with more in a layer than a residual block and an attention, and those that are not understood."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from zoo import ZOO, run, seeded

from diffusion_accel import AccelerationError, Reuse, accelerate
from diffusion_accel.denoisers import unet_layers


def test_free_noise_that_splits_its_batch_gives_the_same() -> None:
    pipe, call = ZOO["animatediff"]()
    accelerate(pipe, Reuse(plan="deepcache:2"))
    want = run(pipe, call)
    pipe.enable_free_noise_split_inference(spatial_split_size=4, temporal_split_size=4)
    assert torch.allclose(run(pipe, call), want, atol=1e-3)
    assert pipe.acceleration.report().counters["reuse"]["shallow_steps"] == 3


def test_layers_with_several_attentions_are_left_out_whole() -> None:
    from diffusers import AudioLDM2UNet2DConditionModel

    model = seeded(
        lambda: AudioLDM2UNet2DConditionModel(
            sample_size=8, block_out_channels=(16, 32), layers_per_block=2, norm_num_groups=8, attention_head_dim=4,
            cross_attention_dim=((16, 16), (16, 16)), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        )
    )  # fmt: skip
    layers = dict(pair for block in unet_layers(model).up for pair in block)
    attentions = list(model.up_blocks[0].attentions)
    assert len(attentions) == 2 * len(model.up_blocks[0].resnets)
    for i, number in enumerate(range(5, 2, -1)):
        assert [m for m in layers[number] if m in attentions] == attentions[2 * i : 2 * i + 2]


def test_blocks_that_are_not_understood_are_refused_by_accelerate() -> None:
    pipe, _ = ZOO["sd"]()
    pipe.unet = seeded(
        lambda: UNet2DConditionModel(
            sample_size=8, block_out_channels=(32, 32), layers_per_block=1, norm_num_groups=None, norm_eps=1e-5,
            down_block_types=("KDownBlock2D", "KCrossAttnDownBlock2D"), mid_block_type=None,
            up_block_types=("KCrossAttnUpBlock2D", "KUpBlock2D"), cross_attention_dim=16, attention_head_dim=8,
            act_fn="gelu", resnet_time_scale_shift="scale_shift", time_cond_proj_dim=16, conv_in_kernel=1,
        )
    )  # fmt: skip
    with pytest.raises(AccelerationError, match="the skip connections of KDownBlock2D are not known.*use hold:n"):
        accelerate(pipe, Reuse(plan="deepcache:2"))
    accelerate(pipe, Reuse(plan="hold:2"))
