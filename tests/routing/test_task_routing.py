"""Task routing: published mask numbers, blocks written out by hand, and what happens to trained and other models."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from diffusers import (
    DiTPipeline,
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from zoo import ddim, rand, run, sd, seeded, svd, unet, vae

from diffusion_accel import ConfigurationError, EncoderReuse, TaskRouting, UnsupportedPipelineError, accelerate
from diffusion_accel.routing import Recipe, route
from diffusion_accel.routing.hooks import CONFIG_KEY, trained_recipe
from diffusion_accel.routing.masks import active_channels, channel_mask, offsets, positions, window

EVERY = torch.arange(1000)


def masks(channels: int, recipe: Recipe = Recipe(), timesteps: torch.Tensor = EVERY) -> torch.Tensor:  # noqa: B008
    return channel_mask(positions(timesteps, recipe), channels, recipe)


def tiny_dit(layers: int = 2) -> Any:
    return seeded(
        lambda: DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=4,
            num_layers=layers,
            sample_size=8,
            num_embeds_ada_norm=1000,  # DiTPipeline's empty class
        )
    )


# ------------------------------------------------------------------------------------------- masks
def test_published_numbers() -> None:
    recipe = Recipe()
    first = offsets(positions(EVERY, recipe), 1024, recipe)
    assert active_channels(1024, 0.8) == 819
    assert [int(first[t]) for t in (0, 250, 500, 750, 999)] == [0, 1, 13, 65, 205]
    table = masks(1024)
    assert len(torch.unique(table, dim=0)) == 206
    assert all(torch.equal(table[0], row) for row in table[:223]) and not torch.equal(table[0], table[223])
    wide = offsets(positions(EVERY, recipe), 1152, recipe)
    assert active_channels(1152, 0.8) == 921 and int(wide[999]) == 231
    assert int((wide > 0).nonzero()[0]) == 216


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.floats(0.05, 1), st.floats(0.1, 8), st.sampled_from(["index", "flow", "unit"]))
def test_windows_are_whole_and_move_up(channels: int, beta: float, alpha: float, time: str) -> None:
    recipe = Recipe(beta=beta, alpha=alpha, time=time)
    top = {"index": 999, "flow": 1000, "unit": 1}[time]
    timesteps = torch.linspace(0, top, 101, dtype=torch.float64)
    first, active = offsets(positions(timesteps, recipe), channels, recipe), active_channels(channels, beta)
    assert first[0] == 0 and first[-1] == channels - active and (first.diff() >= 0).all()
    table = masks(channels, recipe, timesteps)
    assert (table.sum(1) == active).all()
    starts = table.float().argmax(1)
    assert torch.equal(starts.double(), first), "the window is one piece"
    assert table[0, 0] and table[-1, -1]
    if alpha >= 1 and active >= 2:
        assert table.any(0).all() or first.diff().max() > active


@pytest.mark.parametrize("recipe", [Recipe(), Recipe(beta=0.37, alpha=1.3), Recipe(beta=1.0)])
def test_one_position_on_the_host_gives_the_same_windows(recipe: Recipe) -> None:
    for channels in (1, 7, 64, 320, 1152):
        first = offsets(positions(EVERY, recipe), channels, recipe).long().tolist()
        got = [window(float(p), channels, recipe) for p in positions(EVERY, recipe)]
        assert got == [(s, s + active_channels(channels, recipe.beta)) for s in first]


def test_all_channels_are_used_and_high_noise_moves_fast() -> None:
    recipe = Recipe()
    assert masks(64).any(0).all()
    moved = offsets(positions(EVERY, recipe), 1024, recipe).diff()
    assert moved[750:].sum() > moved[500:750].sum() > moved[250:500].sum() > moved[:250].sum()


def test_random_baseline() -> None:
    recipe = Recipe(kind="random")
    table = masks(64, recipe)
    assert (table.sum(1) == active_channels(64, 0.8)).all()
    assert torch.equal(table, masks(64, recipe)), "not stored, and yet always the same"
    assert len(torch.unique(table, dim=0)) == 1000
    assert not torch.equal(table, channel_mask(positions(EVERY, recipe), 64, recipe, block=1))
    assert not torch.equal(table, masks(64, Recipe(kind="random", seed=1)))
    share = table.float().mean(0)
    assert share.min() > 0.7 and share.max() < 0.9
    agree = (table[1:] == table[:-1]).float().mean()
    assert abs(agree - (0.797**2 + 0.203**2)) < 0.02, "neighbouring timesteps are independent"


@pytest.mark.parametrize(
    "values", [{"beta": 0.0}, {"beta": 1.1}, {"beta": float("nan")}, {"alpha": 0.0}, {"alpha": float("inf")}]
)
def test_impossible_values_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError, match="task.routing.* must be"):
        TaskRouting(**values)
    with pytest.raises(ConfigurationError, match="one of window, random"):
        TaskRouting(kind="other")
    with pytest.raises(ConfigurationError, match="not a recipe"):
        Recipe.from_dict({"gamma": 1})


# ------------------------------------------------------------------------------------------- blocks
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


# ------------------------------------------------------------------------------------------- pipelines
def routed_sd(**recipe: Any) -> tuple[Any, dict[str, Any]]:
    pipe, call = sd()
    pipe.unet.register_to_config(**{CONFIG_KEY: Recipe(**recipe).to_dict()})
    return pipe, call


def test_a_trained_model_switches_itself_on(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    pipe, call = routed_sd(beta=0.5)
    plain = run(pipe, call)
    pipe.unet.save_pretrained(tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path)
    assert trained_recipe(loaded) == Recipe(beta=0.5)
    pipe.unet = loaded
    with caplog.at_level(logging.INFO, "diffusion_accel"):
        accelerate(pipe)
    assert "task_routing is on: the model was trained with it" in caplog.text
    assert list(pipe.acceleration.features) == ["task_routing"]
    routed = run(pipe, call)
    assert not torch.equal(routed, plain)
    assert pipe.acceleration.report().counters["task_routing"]["active_share"] == 0.5
    hooks = route(pipe.unet, Recipe(beta=0.5))
    pipe.acceleration.disable()
    assert torch.equal(run(pipe, call), routed), "the feature equals routing the bare model"
    hooks.remove()
    assert torch.equal(run(pipe, call), plain)


def test_untrained_and_otherwise_trained_models(caplog: pytest.LogCaptureFixture) -> None:
    pipe, _ = sd()
    with pytest.raises(UnsupportedPipelineError, match="trained without task routing.*untrained=true"):
        accelerate(pipe, TaskRouting())
    accelerate(pipe, TaskRouting(untrained=True))
    assert "trained without task routing" in caplog.text
    caplog.clear()
    pipe, _ = routed_sd(beta=0.5, alpha=2.0)
    with pytest.raises(UnsupportedPipelineError, match="was trained with beta=0.5"):
        accelerate(pipe, TaskRouting(beta=0.8))
    accelerate(pipe, TaskRouting(beta=0.5))
    assert not caplog.text
    accelerate(pipe, TaskRouting(beta=0.9, untrained=True))
    assert "trained with another task routing" in caplog.text
    pipe.unet.register_to_config(**{CONFIG_KEY: {"beta": 7}})
    with pytest.raises(ConfigurationError, match="task_routing cannot be used.*beta"):
        run(pipe, {})


def test_dit_pipeline() -> None:
    transformer = tiny_dit()
    transformer.register_to_config(**{CONFIG_KEY: Recipe(beta=0.5).to_dict()})
    pipe = DiTPipeline(transformer=transformer, vae=vae(), scheduler=ddim(), id2label={})
    pipe.set_progress_bar_config(disable=True)

    def draw() -> Any:
        call = {"generator": torch.Generator().manual_seed(0), "num_inference_steps": 3, "output_type": "np"}
        return torch.from_numpy(pipe([1, 2], guidance_scale=3.0, **call).images)

    plain = draw()
    accelerate(pipe)
    routed = draw()
    assert not torch.equal(routed, plain) and torch.equal(routed, draw())
    accelerate(pipe, TaskRouting(beta=1.0, untrained=True))
    assert torch.equal(draw(), plain)


@pytest.mark.parametrize("make", [sd, svd])
def test_encoder_reuse_on_a_routed_model(make: Any) -> None:
    """Neutral reuse is exact; one decoder call for several timesteps equals one by one."""
    pipe, call = make()
    pipe.unet.register_to_config(**{CONFIG_KEY: Recipe(beta=0.5, alpha=1.0).to_dict()})
    accelerate(pipe)
    routed = run(pipe, call)
    accelerate(pipe, EncoderReuse.neutral())
    assert set(pipe.acceleration.features) == {"task_routing", "encoder_reuse"}
    assert torch.equal(run(pipe, call), routed)
    made = []
    for batched in (False, True):
        accelerate(pipe, EncoderReuse(schedule="uniform:3", batch_decoder=batched))
        made.append(run(pipe, call))
    assert pipe.acceleration.report().counters["encoder_reuse"]["decoder_runs"] < 9
    torch.testing.assert_close(made[0], made[1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(made[0], routed, atol=1e-3)
