"""LoRAs beside quantized layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import zoo
from diffusers import UNet2DConditionModel
from quantized import TINY, Prompted

from diffusion_accel import quantize_files
from diffusion_accel.errors import ConfigurationError
from diffusion_accel.quant.layers import QuantizedLayer
from diffusion_accel.quant.model import set_runtime
from diffusion_accel.quant.ptq.run import quantize_denoiser


def test_lora_stays_in_full_precision_beside_a_quantized_base(tmp_path: Path) -> None:
    from peft import LoraConfig

    pipe, call = zoo.sd()
    quantize_denoiser(Prompted(pipe, call), TINY, tmp_path / "work")
    set_runtime(pipe, "simulated")
    before = zoo.run(pipe, call)
    model: UNet2DConditionModel = pipe.unet
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False), "one")
    name, lora = next((n, m) for n, m in model.named_modules() if n.endswith("attn1.to_q"))
    assert isinstance(lora.base_layer, QuantizedLayer)
    x = torch.randn(1, 4, lora.base_layer.in_features)
    added = lora.lora_B["one"](lora.lora_A["one"](x)) * lora.scaling["one"]
    assert torch.allclose(lora(x), lora.base_layer(x) + added, atol=1e-6)
    assert lora.lora_A["one"].weight.dtype == torch.float32
    assert not torch.equal(zoo.run(pipe, call), before)
    model.disable_adapters()
    assert torch.equal(zoo.run(pipe, call), before)
    model.enable_adapters()
    model.delete_adapters("one")
    assert torch.equal(zoo.run(pipe, call), before)


def test_loras_on_convolutions_work_beside_and_are_not_fused(tmp_path: Path) -> None:
    from peft import LoraConfig

    pipe, call = zoo.sd()
    quantize_denoiser(Prompted(pipe, call), TINY, tmp_path / "work")
    model: UNet2DConditionModel = pipe.unet
    sample, text = torch.randn(1, 4, 8, 8), torch.randn(1, zoo.TOKENS, zoo.DIM)

    def answer() -> torch.Tensor:
        with torch.no_grad():
            return model(sample, 10, text).sample

    for runtime, dora in (("dequantize", False), ("integer", False), ("integer", True)):
        set_runtime(model, runtime)
        before = answer()
        model.add_adapter(LoraConfig(r=2, target_modules=["conv1", "conv_shortcut", "to_q"], use_dora=dora), "one")
        layers = {n: m for n, m in model.named_modules() if hasattr(m, "lora_A")}
        kinds = {type(m.base_layer).__name__: type(m.lora_A["one"]) for m in layers.values()}
        assert kinds == {"QuantizedConv2d": torch.nn.Conv2d, "QuantizedLinear": torch.nn.Linear}
        assert torch.allclose(answer(), before, atol=1e-5)  # it begins with zeros
        for layer in layers.values():
            torch.nn.init.ones_(layer.lora_B["one"].weight)
        lora = next(m for n, m in layers.items() if n.endswith("conv1"))
        z = torch.randn(1, lora.base_layer.in_channels, 8, 8)
        if not dora:
            added = lora.lora_B["one"](lora.lora_A["one"](z)) * lora.scaling["one"]
            assert torch.allclose(lora(z), lora.base_layer(z) + added, atol=1e-5)
        changed = answer()
        assert not torch.allclose(changed, before, atol=1e-3)
        for safe in (False, True):
            with pytest.raises(ConfigurationError, match="without fusing"):
                pipe.fuse_lora(safe_fusing=safe)
        assert torch.equal(answer(), changed)
        with pytest.raises(ConfigurationError, match="unload_lora_weights"):
            model.save_pretrained(tmp_path / "saved")
        assert not list(tmp_path.glob("saved/*.safetensors"))
        model.delete_adapters("one")
        assert torch.equal(answer(), before)


def test_a_model_with_adapters_is_not_quantized(tmp_path: Path) -> None:
    from peft import LoraConfig

    from diffusion_accel import UnsupportedPipelineError

    pipe, call = zoo.sd()
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(UnsupportedPipelineError, match="has adapters"):
        quantize_denoiser(Prompted(pipe, call), TINY, tmp_path / "work")
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_flux_loads_loras_beside_quantized_layers(tmp_path: Path) -> None:
    """Its loader looks for the shapes of weights among the tensors of the model, where a quantized layer has codes."""
    pipe, call = zoo.flux()
    pipe.save_pretrained(tmp_path / "plain")
    quantize_files(tmp_path / "plain", tmp_path / "made", weight_bits=8, group=0)
    pipe.transformer = model = type(pipe.transformer).from_pretrained(tmp_path / "made" / "transformer")
    before, tensors = zoo.run(pipe, call), {name: value.clone() for name, value in model.state_dict().items()}
    assert not any(name.endswith("to_v.weight") for name in tensors)
    weights = {}
    for layer in ("transformer_blocks.0.attn.to_v", "single_transformer_blocks.1.attn.to_q"):
        weights[f"transformer.{layer}.lora_A.weight"] = zoo.rand(2, 32, seed=1)
        weights[f"transformer.{layer}.lora_B.weight"] = zoo.rand(32, 2, seed=2)
    images = []
    for names in (["one"], ["one", "two"]):
        pipe.load_lora_weights(dict(weights), adapter_name=names[-1])
        pipe.set_adapters(names)
        images.append(zoo.run(pipe, call))
    assert not torch.equal(images[0], before) and not torch.equal(*images)
    attention, x = model.transformer_blocks[0].attn, torch.randn(3, 32)
    added = 2 * torch.nn.functional.linear(x, zoo.rand(32, 2, seed=2) @ zoo.rand(2, 32, seed=1))
    assert torch.allclose(attention.to_v(x), attention.to_v.base_layer(x) + added, atol=1e-4)
    pipe.unload_lora_weights()
    assert torch.equal(zoo.run(pipe, call), before)
    assert model.state_dict().keys() == tensors.keys()
    assert all(torch.equal(value, tensors[name]) for name, value in model.state_dict().items())
    with pytest.raises(KeyError):
        model.state_dict()["transformer_blocks.9.attn.to_v.weight"]
    model.save_pretrained(tmp_path / "again")
    pipe.transformer = type(model).from_pretrained(tmp_path / "again")
    assert torch.equal(zoo.run(pipe, call), before)
