"""What changes the base model: merged and hooked alike, every published format, attention sharing by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import changes_of, predict, written
from transparency_weights import tiny_changes
from zoo import rand, unet

import diffusion_accel.transparency.adapter as adapter_module
from diffusion_accel import ConfigurationError, ModelLoadError
from diffusion_accel.hooks import HookSet
from diffusion_accel.transparency.adapter import Adapter, check_changes
from diffusion_accel.transparency.conditions import Concatenated
from diffusion_accel.transparency.ldm_keys import from_ldm


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


def test_changed_copies_are_those_of_the_model_as_it_is(tmp_path: Path) -> None:
    """They stay for the next time: the same objects as long as nothing changes, never those of other weights."""
    model = unet()
    adapter = Adapter(changes_of(written(tmp_path, tiny_changes(model))))
    seen = []
    for change in (None, lambda: model.conv_in.weight.data.mul_(2), lambda: model.load_state_dict(unet().state_dict())):
        if change is not None:
            change()
        fresh = Adapter(adapter.changes)
        fresh.apply(model)
        expected = predict(model)
        fresh.restore()
        for _ in range(2):
            adapter.apply(model)
            assert torch.equal(predict(model), expected)
            seen.append(model.conv_in.weight)
            adapter.restore()
    assert seen[0] is seen[1] and seen[2] is seen[3] and len(set(map(id, seen))) == 3
    adapter.apply(model, 0.5)
    assert not torch.equal(predict(model), expected)
    adapter.restore()


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
