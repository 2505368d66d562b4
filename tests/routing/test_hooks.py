"""Routed blocks, written out by hand; mixed timesteps; channels that pass by."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    FluxTransformer2DModel,
    SD3Transformer2DModel,
)
from routing_cases import masks, tiny_dit
from zoo import rand, seeded, unet

from diffusion_accel.routing import Recipe, route


def watch(block: Any, seen: dict[str, Any]) -> Any:
    """Note what enters a block (before routing) and what leaves it; returns the handle."""

    def hook(module: Any, args: Any, output: Any) -> None:
        seen.update(args=args, out=output)

    return block.register_forward_hook(hook)


@torch.no_grad()
def test_dit_block_by_hand() -> None:
    """r = x m; r += gate A(LN(r)); r += gate M(LN(r)); out = r + x (1 - m), part by part."""
    model, recipe, seen = tiny_dit(layers=1), Recipe(beta=0.5, alpha=2.0), dict[str, Any]()
    block, labels, timesteps = model.transformer_blocks[0], torch.tensor([1, 2, 3]), torch.tensor([0, 700, 999])
    handle, hooks = watch(block, seen), route(model, recipe)
    model(rand(3, 4, 8, 8), timesteps, class_labels=labels)
    hooks.remove(), handle.remove()
    x, mask = seen["args"][0], masks(16, recipe, timesteps)[:, None].float()
    r = x * mask
    normed, gate_a, shift, scale, gate_m = block.norm1(r, timesteps, labels, hidden_dtype=r.dtype)
    r = r + gate_a[:, None] * block.attn1(normed)
    r = r + gate_m[:, None] * block.ff(block.norm3(r) * (1 + scale[:, None]) + shift[:, None])
    torch.testing.assert_close(seen["out"], r + x * (1 - mask), rtol=1e-5, atol=1e-5)


def test_residual_block_by_hand() -> None:
    """x + f(x m): the branch sees active channels only, the shortcut all of them."""
    model, recipe, seen = unet(), Recipe(beta=0.5), dict[str, Any]()
    block, timesteps = model.up_blocks[0].resnets[0], torch.tensor([999, 10])
    assert block.conv_shortcut is not None
    handle, hooks = watch(block, seen), route(model, recipe)
    with torch.no_grad():
        model(rand(2, 4, 8, 8), timesteps, encoder_hidden_states=rand(2, 6, 16))
        hooks.remove(), handle.remove()
        x, embedding = seen["args"]
        mask = masks(x.shape[1], recipe, timesteps)[..., None, None].float()
        branch = block.conv1(block.nonlinearity(block.norm1(x * mask)))
        branch = branch + block.time_emb_proj(block.nonlinearity(embedding))[:, :, None, None]
        branch = block.conv2(block.nonlinearity(block.norm2(branch)))
        expected = block.conv_shortcut(x) + branch
    torch.testing.assert_close(seen["out"], expected, rtol=1e-5, atol=1e-5)


def flux() -> tuple[Any, dict[str, Any]]:
    model = seeded(
        lambda: FluxTransformer2DModel(
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=8,
            pooled_projection_dim=8,
            axes_dims_rope=(4, 4, 8),
        )
    )
    call = {"hidden_states": rand(2, 16, 4), "encoder_hidden_states": rand(2, 5, 8), "pooled_projections": rand(2, 8)}
    return model, call | {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(5, 3)}


def sd3() -> tuple[Any, dict[str, Any]]:
    model = seeded(
        lambda: SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            caption_projection_dim=16,
            pooled_projection_dim=8,
            out_channels=4,
        )
    )
    return model, {"hidden_states": rand(2, 4, 8, 8), "encoder_hidden_states": rand(2, 5, 16)} | {
        "pooled_projections": rand(2, 8)
    }


def dit() -> tuple[Any, dict[str, Any]]:
    return tiny_dit(), {"hidden_states": rand(2, 4, 8, 8), "class_labels": torch.tensor([1, 2])}


def sd_unet() -> tuple[Any, dict[str, Any]]:
    return unet(), {"sample": rand(2, 4, 8, 8), "encoder_hidden_states": rand(2, 6, 16)}


@pytest.mark.parametrize(("make", "time"), [(dit, "index"), (sd_unet, "index"), (sd3, "flow"), (flux, "unit")])
@torch.no_grad()
def test_mixed_timesteps_equal_single_samples_and_beta_one_is_exact(make: Any, time: str) -> None:
    model, call = make()
    timesteps = torch.tensor([990.0, 700.0]) / (1000 if time == "unit" else 1)
    parameters, keys = sum(p.numel() for p in model.parameters()), list(model.state_dict())

    def predict(rows: slice) -> torch.Tensor:
        part = {k: v if k.endswith("_ids") else v[rows] for k, v in call.items()}
        return model(**part, timestep=timesteps[rows], return_dict=False)[0]

    plain = predict(slice(None))
    hooks = route(model, Recipe(beta=1.0, time=time))
    assert torch.equal(predict(slice(None)), plain)
    hooks.remove()
    hooks = route(model, Recipe(beta=0.6, time=time))
    assert sum(p.numel() for p in model.parameters()) == parameters and list(model.state_dict()) == keys
    mixed = predict(slice(None))
    single = torch.cat([predict(slice(0, 1)), predict(slice(1, 2))])
    assert not torch.allclose(mixed, plain, atol=1e-4)
    torch.testing.assert_close(mixed, single, rtol=1e-4, atol=1e-5)
    hooks.remove()
    assert torch.equal(predict(slice(None)), plain)


def test_masked_channels_pass_unchanged() -> None:
    """The gradient of a block's output with respect to an inactive channel is that of the identity."""
    model, entered, seen = tiny_dit(layers=1), dict[str, Any](), dict[str, Any]()
    block = model.transformer_blocks[0]

    def begin(module: Any, args: Any) -> Any:
        entered["x"] = args[0].detach().requires_grad_()
        return (entered["x"], *args[1:])

    handles, hooks = [block.register_forward_pre_hook(begin), watch(block, seen)], route(model, Recipe(beta=0.5))
    model(rand(1, 4, 8, 8), torch.tensor([0]), class_labels=torch.tensor([1]))
    hooks.remove()
    for handle in handles:
        handle.remove()
    weights = rand(*seen["out"].shape, seed=4)
    (gradient,) = torch.autograd.grad((seen["out"] * weights).sum(), entered["x"])
    assert torch.equal(gradient[..., 8:], weights[..., 8:]), "t = 0: the upper half is inactive"
    assert not torch.allclose(gradient[..., :8], weights[..., :8])
