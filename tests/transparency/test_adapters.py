"""What changes the base model: merged and hooked alike, every published format, attention sharing by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transparency_weights import PUBLISHED, sharing_tensors, tiny_changes
from zoo import DIM, TOKENS, rand, seeded, unet

import diffusion_accel.transparency.adapter as adapter_module
from diffusion_accel import ConfigurationError, ModelLoadError
from diffusion_accel.denoisers import ordered_attentions
from diffusion_accel.hooks import HookSet
from diffusion_accel.transparency.adapter import Adapter, check_changes, read_changes
from diffusion_accel.transparency.attention_sharing import Sharing
from diffusion_accel.transparency.conditions import Concatenated
from diffusion_accel.transparency.ldm_keys import from_ldm
from diffusion_accel.transparency.weights import read_weights


def predict(model: Any, sample: torch.Tensor | None = None, batch: int = 2) -> torch.Tensor:
    sample = rand(batch, 4, 8, 8) if sample is None else sample
    with torch.no_grad():
        return model(sample, 500, rand(len(sample), TOKENS, DIM, seed=1)).sample


def written(folder: Path, tensors: dict[str, torch.Tensor], name: str = "adapter.safetensors") -> Path:
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / name)
    return folder / name


def changes_of(file: Path) -> Any:
    return read_changes(file, read_weights(file))


def sharing_of(file: Path, model: Any, frames: int) -> Sharing:
    return Sharing(file, read_weights(file), model, frames)


# ------------------------------------------------------------------------------------------- changes
def test_changes_are_what_they_say_and_leave_no_trace(tmp_path: Path) -> None:
    model, reference = unet(), unet()
    tensors = tiny_changes(model)
    base, before = predict(model), dict(model.named_parameters())
    weights = reference.state_dict()
    low = next(key for key in tensors if key.endswith("lora_A.weight"))
    name = low.removesuffix(".lora_A.weight")
    for key in ("conv_in.weight", "conv_in.bias", "conv_norm_out.weight"):
        weights[key] += 0.5 * tensors[key]
    weights[f"{name}.weight"] += 0.5 * tensors[f"{name}.lora_B.weight"] @ tensors[low]
    adapter = Adapter(changes_of(written(tmp_path, tensors)))
    adapter.apply(model, 0.5)
    assert adapter.active
    assert torch.allclose(predict(model), predict(reference), atol=1e-6)
    adapter.restore()
    assert not adapter.active and torch.equal(predict(model), base)
    assert all(value is before[key] for key, value in model.named_parameters()), "other parameter objects"


def test_hooks_add_what_merging_adds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantized and offloaded layers cannot be merged: their output is corrected instead."""
    model = unet()
    tensors = tiny_changes(model)
    del tensors["conv_norm_out.weight"]
    conv = model.down_blocks[0].resnets[0].conv1
    tensors["down_blocks.0.resnets.0.conv1.lora_A.weight"] = rand(2, *conv.weight.shape[1:]) * 0.1
    tensors["down_blocks.0.resnets.0.conv1.lora_B.weight"] = rand(conv.out_channels, 2, 1, 1, seed=3) * 0.1
    tensors["down_blocks.0.downsamplers.0.conv.weight"] = (
        rand(*model.down_blocks[0].downsamplers[0].conv.weight.shape) * 0.05
    )
    tensors["down_blocks.0.downsamplers.0.conv.bias"] = rand(16) * 0.1
    tensors["time_embedding.linear_1.bias"] = rand(*model.time_embedding.linear_1.bias.shape) * 0.1
    adapter = Adapter(changes_of(written(tmp_path, tensors)))
    base = predict(model)
    adapter.apply(model, 0.7)
    merged = predict(model)
    adapter.restore()
    monkeypatch.setattr(adapter_module, "_is_plain", lambda module, parameter: False)
    adapter.apply(model, 0.7)
    assert (predict(model) - merged).abs().max() < 1e-5 < (base - merged).abs().max()
    adapter.restore()
    assert torch.equal(predict(model), base)
    tensors = tiny_changes(model)
    adapter = Adapter(changes_of(written(tmp_path, tensors)))
    with pytest.raises(ConfigurationError, match="conv_norm_out.weight cannot be changed where it is"):
        adapter.apply(model)
    assert torch.equal(predict(model), base), "a refusal leaves nothing behind"


def test_a_peft_lora_stays_beside_the_changes(tmp_path: Path) -> None:
    from peft import LoraConfig

    model, reference = unet(), unet()
    changes = changes_of(written(tmp_path, tiny_changes(model)))
    state = reference.state_dict()
    for key, change in changes.items():
        state[key] += change.difference(torch.device("cpu"))
    for one in (model, reference):
        torch.manual_seed(0)
        one.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    check_changes(((key, change.shape) for key, change in changes.items()), model, Path("x"))
    adapter = Adapter(changes)
    adapter.apply(model)
    assert torch.allclose(predict(model), predict(reference), atol=1e-6)
    adapter.restore()


def test_one_change_reads_alike_from_every_format(tmp_path: Path) -> None:
    up, down = rand(8, 2), rand(2, 6, seed=1)
    name, ldm = "down_blocks.1.attentions.0.proj_in", "input_blocks.4.1.proj_in"
    formats = [
        {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up},
        {f"unet.{name}.lora.down.weight": down, f"unet.{name}.lora.up.weight": up},
        {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up * 2, f"{name}.alpha": torch.tensor(1.0)},
        {f"diffusion_model.{ldm}.weight::lora::0": up, f"diffusion_model.{ldm}.weight::lora::1": down},
        {f"diffusion_model.{ldm}.weight::diff::0": up @ down},
        {f"{name}.weight": up @ down},
    ]
    for k, tensors in enumerate(formats):
        changes = changes_of(written(tmp_path, tensors, f"{k}.safetensors"))
        assert list(changes) == [f"{name}.weight"]
        change = changes[f"{name}.weight"]
        assert change.shape == (8, 6)
        assert torch.allclose(change.difference(torch.device("cpu")), up @ down, atol=1e-5)
    with pytest.raises(ModelLoadError, match="only one of its two low-rank factors"):
        changes_of(written(tmp_path, {f"{name}.lora_A.weight": down}))
    with pytest.raises(ModelLoadError, match="nothing an adapter"):
        changes_of(written(tmp_path, {f"{ldm}.weight::lora::2": down}))


def test_an_adapter_for_another_model_is_named(tmp_path: Path) -> None:
    model = unet()
    file = tmp_path / "layer.safetensors"
    for changes, words in (
        ({"conv_in.weight": (99, 4, 3, 3)}, r"conv_in.weight of shape \(99, 4, 3, 3\).*has \(16, 4, 3, 3\)"),
        ({"down_blocks.9.x.weight": (1,)}, "which this UNet2DConditionModel does not have"),
    ):
        with pytest.raises(ModelLoadError, match=words) as caught:
            check_changes(changes.items(), model, file)
        assert "layer.safetensors" in str(caught.value) and "another family of models" in str(caught.value)
    check_changes({"conv_in.weight": (16, 12, 3, 3)}.items(), model, file)


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_ldm_names_are_those_of_diffusers_own_conversion(kind: str) -> None:
    """Every name that diffusers' converter knows, through both."""
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    shape: dict[str, Any] = {"cross_attention_dim": 8, "attention_head_dim": 4, "norm_num_groups": 4}
    if kind == "sdxl":
        shape |= {
            "block_out_channels": (8, 8, 8),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 3),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 32,
        }
    else:
        shape |= {"block_out_channels": (8, 8, 8, 8)}
    with torch.device("meta"):
        model = UNet2DConditionModel(**shape)
    wanted = set(model.state_dict())
    blocks, each = len(shape["block_out_channels"]), 3
    inner = [f"in_layers.{k}" for k in (0, 2)] + ["emb_layers.1", "out_layers.0", "out_layers.3", "skip_connection"]
    attention = {name.split(".attentions.0.")[1] for name in wanted if name.startswith("mid_block.attentions.0.")}
    deepest = {name.split(".", 4)[4] for name in wanted if ".attentions." in name and name.startswith(("down", "up"))}
    leaves = [f"{stem}.{leaf}" for stem in inner for leaf in ("weight", "bias")]
    names = [
        f"{stem}.{leaf}"
        for stem in ("input_blocks.0.0", "out.0", "out.2", "time_embed.0", "time_embed.2")
        for leaf in ("weight", "bias")
    ]
    names += [f"label_emb.0.{k}.{leaf}" for k in (0, 2) for leaf in ("weight", "bias")]
    for number in range(1, blocks * each):
        names += [f"input_blocks.{number}.0.{leaf}" for leaf in (*leaves, "op.weight", "op.bias")]
        names += [f"input_blocks.{number}.1.{rest}" for rest in attention | deepest]
    for number in range(blocks * each):
        names += [f"output_blocks.{number}.0.{leaf}" for leaf in leaves]
        names += [f"output_blocks.{number}.1.{rest}" for rest in attention | deepest]
        names += [f"output_blocks.{number}.{place}.conv.{leaf}" for place in (1, 2) for leaf in ("weight", "bias")]
    for place in (0, 2):
        names += [f"middle_block.{place}.{leaf}" for leaf in leaves]
    names += [f"middle_block.1.{rest}" for rest in attention]
    known = {name: plain for name in names if (plain := from_ldm(name)) in wanted}
    assert set(known.values()) == wanted, "a parameter has no name in the original layout"
    checkpoint = {f"model.diffusion_model.{name}": torch.tensor(float(k)) for k, name in enumerate(known)}
    config = dict(model.config) | {"num_class_embeds": None, "class_embed_type": None}
    converted = convert_ldm_unet_checkpoint(checkpoint, config)
    assert {name: float(value) for name, value in converted.items()} == {
        plain: float(k) for k, plain in enumerate(known.values())
    }
    assert from_ldm("something.else.weight") is None and from_ldm("middle_block.0.unknown.weight") is None


# ------------------------------------------------------------------------------------------- given layers
def test_a_widened_first_convolution_with_nothing_given_equals_the_base(tmp_path: Path) -> None:
    model = unet()
    base, wide = predict(model), torch.zeros(16, 12, 3, 3)
    hooks, adapter = HookSet("test"), Adapter(changes_of(written(tmp_path, {"conv_in.weight": wide})))
    adapter.apply(model)
    hooks.add(model.conv_in, Concatenated(rand(1, 8, 8, 8)))
    assert torch.equal(predict(model), base), "zero change"
    adapter.restore()
    hooks.remove()
    wide[:, 4:] = rand(16, 8, 3, 3) * 0.1
    adapter = Adapter(changes_of(written(tmp_path, {"conv_in.weight": wide})))
    adapter.apply(model)
    hooks.add(model.conv_in, Concatenated(torch.zeros(1, 8, 4, 4)))
    assert torch.allclose(predict(model), base, atol=1e-6), "zero condition"
    hooks.remove()
    hooks.add(model.conv_in, Concatenated(rand(1, 8, 8, 8)))
    assert not torch.allclose(predict(model), base, atol=1e-3)
    hooks.remove()
    adapter.restore()
    assert torch.equal(predict(model), base)


# ------------------------------------------------------------------------------------------- attention sharing
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
