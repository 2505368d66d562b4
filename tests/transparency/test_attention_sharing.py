"""SD 1.5's attention sharing: numbering, identities, units by hand, frames that change places."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from adapter_files import predict, sharing_of, written
from transparency_weights import PUBLISHED, sharing_tensors
from zoo import DIM, TOKENS, rand, seeded, unet

from diffusion_accel import ConfigurationError, ModelLoadError
from diffusion_accel.denoisers import ordered_attentions
from diffusion_accel.hooks import HookSet


def test_attention_layers_are_numbered_as_published() -> None:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        model = UNet2DConditionModel(cross_attention_dim=768)
    layers = ordered_attentions(model)
    assert len(layers) == 32 and layers[30] is model.mid_block.attentions[0].transformer_blocks[0].attn1
    for number, layer in enumerate(layers):
        keys = PUBLISHED["sharing_1"]
        for name in ("to_q", "to_k", "to_v"):
            down = keys[f"hookers.layers.{number}.{name}_lora.0.down.weight"]
            up = keys[f"hookers.layers.{number}.{name}_lora.0.up.weight"]
            linear = getattr(layer, name)
            assert (down[1], up[0]) == (linear.in_features, linear.out_features), (number, name)


@pytest.mark.parametrize("frames", [1, 3])
def test_sharing_without_low_rank_and_frame_attention_is_the_base(frames: int, tmp_path: Path) -> None:
    model = unet()
    base = predict(model, batch=2 * frames)
    tensors = sharing_tensors(model, frames)
    for name in tensors:
        if ("_lora." in name and ".up." in name) or "temporal_o" in name:
            tensors[name] = torch.zeros_like(tensors[name])
    hooks = HookSet("test")
    sharing = sharing_of(written(tmp_path, tensors), model, frames)
    sharing.install(model, hooks)
    assert torch.allclose(predict(model, batch=2 * frames), base, atol=1e-5)
    hooks.remove()
    sharing = sharing_of(written(tmp_path, sharing_tensors(model, frames)), model, frames)
    sharing.install(model, hooks)
    assert not torch.allclose(predict(model, batch=2 * frames), base, atol=1e-2)
    sharing.pause()
    assert torch.equal(predict(model, batch=2 * frames), base)
    hooks.remove()
    assert torch.equal(predict(model, batch=2 * frames), base)


def by_hand(layer: Any, tensors: dict[str, torch.Tensor], number: int, frames: int, h: Any, context: Any) -> Any:
    """The published unit, frame by frame."""
    t = {k.removeprefix(f"hookers.layers.{number}."): v for k, v in tensors.items()}

    def attend(q: Any, k: Any, v: Any) -> Any:
        q, k, v = (x.unflatten(-1, (layer.heads, -1)).transpose(1, 2) for x in (q, k, v))
        weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        return (weights @ v).transpose(1, 2).flatten(2)

    outs = []
    for f in range(frames):
        x = h[f::frames]
        seen = x if context is None else context[f::frames]

        def projected(name: str, value: Any, linear: Any, f: int = f) -> Any:
            weight = linear.weight + t[f"{name}_lora.{f}.up.weight"] @ t[f"{name}_lora.{f}.down.weight"]
            return F.linear(value, weight, linear.bias)

        q, k, v = (
            projected(name, value, getattr(layer, name))
            for name, value in (("to_q", x), ("to_k", seen), ("to_v", seen))
        )
        outs.append(x + projected("to_out", attend(q, k, v), layer.to_out[0]))
    x = torch.stack(outs, 1).flatten(0, 1)
    n = F.layer_norm(x, x.shape[-1:], t["temporal_n.weight"], t["temporal_n.bias"], 1e-6)
    i = F.linear(n, t["temporal_i.weight"], t["temporal_i.bias"])
    across = i.unflatten(0, (-1, frames)).permute(0, 2, 1, 3).flatten(0, 1)
    q, k, v = (F.linear(across, t[f"temporal_{p}.weight"], t[f"temporal_{p}.bias"]) for p in "qkv")
    o = F.linear(attend(q, k, v), t["temporal_o.weight"], t["temporal_o.bias"])
    o = o.unflatten(0, (-1, h.shape[1])).permute(0, 2, 1, 3).flatten(0, 1)
    return x + o - h


@pytest.mark.parametrize("frames", [1, 2, 3])
@pytest.mark.parametrize("number", [0, 1])
def test_a_sharing_unit_by_hand(frames: int, number: int, tmp_path: Path) -> None:
    model, hooks = unet(), HookSet("test")
    tensors = sharing_tensors(model, frames)
    layer = ordered_attentions(model)[number]
    sharing = sharing_of(written(tmp_path, tensors), model, frames)
    sharing.install(model, hooks)
    h = rand(2 * frames, 16, layer.to_q.in_features)
    context = None if number == 0 else rand(2 * frames, TOKENS, DIM, seed=1)
    with torch.no_grad():
        made = layer(h, encoder_hidden_states=context)
        assert torch.allclose(made, by_hand(layer, tensors, number, frames, h, context), atol=1e-4)
    hooks.remove()


def test_frames_may_change_places(tmp_path: Path) -> None:
    """With the same low-rank updates for every frame, exchanging frames exchanges results."""
    model, hooks = unet(), HookSet("test")
    tensors = sharing_tensors(model, 3)
    for name in tensors:
        if "_lora." in name:
            tensors[name] = tensors[name.replace("_lora.1.", "_lora.0.").replace("_lora.2.", "_lora.0.")].clone()
    sharing_of(written(tmp_path, tensors), model, 3).install(model, hooks)
    sample, order = rand(3, 4, 8, 8), [2, 0, 1]
    text = rand(1, TOKENS, DIM, seed=1).expand(3, -1, -1)
    with torch.no_grad():
        one, other = (model(x, 500, text).sample for x in (sample, sample[order]))
    assert torch.allclose(other, one[order], atol=1e-5)
    hooks.remove()


def test_a_given_layer_reaches_every_frame(tmp_path: Path) -> None:
    model, hooks = unet(), HookSet("test")
    sharing = sharing_of(written(tmp_path, sharing_tensors(model, 2, control=True)), model, 2)
    assert sharing.needs_control
    made = []
    for k in range(2):
        sharing.install(model, hooks, control=rand(1, 4, 64, 64, seed=k).sigmoid())
        made.append(predict(model))
        hooks.remove()
    assert all((a - b).abs().max() > 1e-4 for a, b in zip(*made, strict=True))
    assert set(sharing.signals) == {64, 16, 4, 1}, "features at 1/8, 1/16, 1/32 and 1/64"
    sharing.install(model, hooks, control=rand(1, 4, 64, 64).sigmoid())
    assert predict(model, rand(2, 4, 10, 14)).shape == (2, 4, 10, 14), "sides that are no multiples of 64"
    hooks.remove()


def test_the_strength_of_sharing_leads_to_the_base(tmp_path: Path) -> None:
    """It scales all that is added, also the attention across frames and the given layer: no jump at 0, none at 1."""
    model, hooks = unet(), HookSet("test")
    base, made = predict(model), {}
    sharing = sharing_of(written(tmp_path, sharing_tensors(model, 2, control=True)), model, 2)
    for strength in (1e-6, 1e-3, 0.999, 1.0):
        sharing.install(model, hooks, strength, control=rand(1, 4, 64, 64).sigmoid())
        made[strength] = predict(model)
        hooks.remove()
    distance = {strength: float((value - base).norm() / base.norm()) for strength, value in made.items()}
    assert distance[1e-6] < 1e-5 and distance[1e-3] < 0.01 < 0.1 < distance[1.0]
    assert (made[0.999] - made[1.0]).norm() / base.norm() < 0.01


def test_sharing_refuses_what_does_not_fit(tmp_path: Path) -> None:
    model, hooks = unet(), HookSet("test")
    file = written(tmp_path, sharing_tensors(model, 3))
    with pytest.raises(ModelLoadError, match="draws 3 layers together, the variant draws 2"):
        sharing_of(file, model, 2)
    other = seeded(lambda: type(model).from_config({**model.config, "cross_attention_dim": 24}))
    with pytest.raises(ModelLoadError, match="takes 16 features, this UNet2DConditionModel's takes 24"):
        sharing_of(file, other, 3)
    deeper = seeded(lambda: type(model).from_config({**model.config, "layers_per_block": 2}))
    with pytest.raises(ModelLoadError, match="it is for SD 1.5"):
        sharing_of(file, deeper, 3)
    sharing_of(file, model, 3).install(model, hooks)
    with pytest.raises(ConfigurationError, match="multiple of 3, got 4 rows"):
        predict(model, batch=4)
    hooks.remove()
