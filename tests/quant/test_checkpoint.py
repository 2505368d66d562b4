"""Checkpoints: loaded and written by diffusers, bit for bit; refused in one line when they are damaged."""

from __future__ import annotations

import copy
import filecmp
import gc
import json
import pickle
import shutil
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from diffusers import DiffusionPipeline, UNet2DConditionModel, UNet2DModel
from safetensors.torch import load_file, save_file

from diffusion_accel import ModelLoadError, accelerate
from diffusion_accel.denoisers import find_denoiser
from diffusion_accel.errors import ConfigurationError
from diffusion_accel.measure.sampler import Sampler
from diffusion_accel.quant.layers import QuantizedLayer, quantized_layers
from diffusion_accel.quant.model import RUNTIMES, digest_of_version_1, runtime_report, set_runtime
from diffusion_accel.quant.ptq import assemble
from diffusion_accel.quant.ptq.run import quantize_denoiser
from diffusion_accel.quant.ptq.settings import QuantizeSettings
from diffusion_accel.quant.spec import VERSION
from diffusion_accel.reuse import Reuse

TINY = QuantizeSettings(weight_bits=4, buckets=3, rounding=None, finetune=None)


def tiny_pipeline() -> Any:
    pipe, _ = zoo.unet2d()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def made(folder: Path, settings: QuantizeSettings) -> Path:
    """A quantized DDPM pipeline folder in `folder`."""
    pipe = tiny_pipeline()
    quantize_denoiser(Sampler(pipe, ("",) * 4, 4, batch=2), settings, folder / "work")
    pipe.save_pretrained(folder / "pipe")
    return folder / "pipe"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One with 8-bit inputs."""
    return made(tmp_path_factory.mktemp("quantized"), TINY)


@pytest.fixture(scope="module")
def compact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One with 4-bit inputs, whose grids are compact."""
    return made(tmp_path_factory.mktemp("compact"), replace(TINY, activation_bits=4))


def draw(pipe: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return Sampler(pipe, ("",) * 2, 4).images()


@pytest.mark.parametrize("which", ["checkpoint", "compact"])
def test_loads_with_plain_from_pretrained_and_writes_the_same_bytes(
    which: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    checkpoint: Path = request.getfixturevalue(which)
    pipe = DiffusionPipeline.from_pretrained(checkpoint)
    assert len(quantized_layers(pipe.unet)) > 10
    pipe.save_pretrained(tmp_path / "again")
    name = "diffusion_pytorch_model.safetensors"
    assert filecmp.cmp(checkpoint / "unet" / name, tmp_path / "again" / "unet" / name, shallow=False)
    configs = [json.loads((p / "unet" / "config.json").read_text()) for p in (checkpoint, tmp_path / "again")]
    for config in configs:  # diffusers itself notes where a model was loaded from, whatever it is
        config.pop("_name_or_path", None)
    assert json.dumps(configs[0]) == json.dumps(configs[1])
    again = DiffusionPipeline.from_pretrained(tmp_path / "again")
    for one in (pipe, again):
        set_runtime(one, "simulated")
    assert torch.equal(draw(pipe), draw(again))


def test_compact_grids_and_those_of_older_checkpoints(
    compact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint without the option has float32 scales and a byte for each zero point, and loads as it did."""
    specs = assemble.layer_specs
    monkeypatch.setattr(
        assemble,
        "layer_specs",
        lambda *a: {n: replace(s, compact_grids=False, zero_margin=0) for n, s in specs(*a).items()},
    )
    older = made(tmp_path, replace(TINY, activation_bits=4))
    assert "zero_margin" not in (older / "unet" / "config.json").read_text()
    assert "compact_grids" not in (older / "unet" / "config.json").read_text()
    name = "mid_block.resnets.0.conv1"
    shapes = {}
    for folder in (older, compact):
        tensors = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
        found = [tensors[f"{name}.input_{k}"] for k in ("scale", "zero_point")]
        shapes[folder] = [(t.dtype, t.nbytes) for t in found]
        pipe = DiffusionPipeline.from_pretrained(folder)
        layer = quantized_layers(pipe.unet)[name]
        assert layer.spec.compact_grids == (folder == compact) and torch.equal(layer.input_scale, found[0])
        set_runtime(pipe, "simulated")
        assert torch.isfinite(draw(pipe)).all()
    count = 3 * layer.weight_shape[1]
    assert shapes[older] == [(torch.float32, 4 * count), (torch.uint8, count)]
    assert shapes[compact] == [(torch.float16, 2 * count), (torch.uint8, count * 5 // 8)]


def test_a_new_process_needs_one_import(checkpoint: Path) -> None:
    code = (
        "import sys, diffusion_accel\n"
        "assert 'torch' not in sys.modules and 'diffusers' not in sys.modules\n"
        "from diffusers import UNet2DModel\n"
        "model = UNet2DModel.from_pretrained(sys.argv[1])\n"
        "print(type(model.conv_in).__name__)"
    )
    for order in (code, "import diffusers, diffusers.quantizers.auto\n" + code.replace("assert", "assert True or")):
        run = subprocess.run([sys.executable, "-c", order, str(checkpoint / "unet")], capture_output=True, text=True)
        assert run.stdout.strip() == "QuantizedConv2d", run.stderr


@pytest.mark.parametrize("which", ["checkpoint", "compact"])
def test_another_dtype_leaves_grids_alone(which: str, request: pytest.FixtureRequest) -> None:
    model = DiffusionPipeline.from_pretrained(request.getfixturevalue(which), torch_dtype=torch.bfloat16).unet
    assert model.dtype == torch.bfloat16
    for layer in quantized_layers(model).values():
        stored = torch.float16 if layer.spec.compact_grids else torch.float32
        assert layer.weight_scale.dtype == torch.float32 and layer.input_scale.dtype == stored
    x = torch.randn(1, 3, 8, 8).bfloat16()
    for runtime in RUNTIMES:
        set_runtime(model, runtime)
        assert model(x, 10).sample.dtype == torch.bfloat16


def damaged(checkpoint: Path, tmp_path: Path) -> Path:
    shutil.copytree(checkpoint, tmp_path / "pipe")
    return tmp_path / "pipe" / "unet"


def change_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= values
    (folder / "config.json").write_text(json.dumps(config))


def change_weights(folder: Path, change: Any) -> None:
    file = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def flip(tensors: dict[str, torch.Tensor]) -> None:
    tensors["conv_in.weight_codes"][0, 0] ^= 1


def test_a_newer_version_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    folder = damaged(checkpoint, tmp_path)
    change_config(folder, version=VERSION + 1)
    with pytest.raises(ModelLoadError, match=f"layout version {VERSION + 1}, this package reads up to {VERSION}"):
        DiffusionPipeline.from_pretrained(folder.parent)


def swap(tensors: dict[str, torch.Tensor]) -> None:
    one, two = "down_blocks.0.resnets.0.norm1.weight", "down_blocks.0.resnets.0.norm2.weight"
    tensors[one], tensors[two] = tensors[two] + 0.5, tensors[one].clone()


def put(name: str, value: float) -> Any:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[0] = value

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (flip, "its weights are not the ones it was saved with"),
        (swap, "its weights are not the ones it was saved with"),
        (put("conv_out.bias", 3.0), "its weights are not the ones it was saved with"),
        (put("conv_norm_out.bias", float("nan")), "conv_norm_out.bias has values that are no finite numbers"),
        (put("conv_in.weight_scale", float("inf")), "conv_in.weight_scale has values that are no finite numbers"),
        (put("conv_in.input_scale", 0.0), "conv_in.input_scale has values that are no finite numbers above 0"),
        (lambda t: t.pop("conv_in.weight_scale"), "it has no conv_in.weight_scale"),
        (lambda t: t.pop("conv_norm_out.weight"), "it has no conv_norm_out.weight"),
        (lambda t: t.update({"conv_in.weight_codes": t["conv_in.weight_codes"][:, :-1].clone()}), "has shape"),
        (lambda t: t.update({"conv_norm_out.weight": t["conv_norm_out.weight"][:-1].clone()}), "has shape"),
        (lambda t: t.update({"conv_in.weight_scale": t["conv_in.weight_scale"].half()}), "is torch.float16 instead"),
    ],
)
def test_damaged_weights_are_refused(checkpoint: Path, tmp_path: Path, change: Any, says: str) -> None:
    folder = damaged(checkpoint, tmp_path)
    change_weights(folder, change)
    with pytest.raises(ModelLoadError, match=says):
        UNet2DModel.from_pretrained(folder)


def test_the_digest_covers_the_config_and_cannot_be_left_out(checkpoint: Path, tmp_path: Path) -> None:
    folder = damaged(checkpoint, tmp_path)
    file = folder / "config.json"
    whole = json.loads(file.read_text())
    quantization = whole["quantization_config"]
    for changed, says in (
        ({**whole, "norm_eps": 0.1}, "its config.json is not the one it was saved with"),
        (whole | {"quantization_config": quantization | {"timesteps": quantization["timesteps"][::-1]}}, "config.json"),
        (whole | {"quantization_config": quantization | {"recipe": {"bits": "w2"}}}, "config.json is not"),
        (whole | {"quantization_config": {k: v for k, v in quantization.items() if k != "digest"}}, "has no digest"),
    ):
        file.write_text(json.dumps(changed))
        with pytest.raises(ModelLoadError, match=says):
            UNet2DModel.from_pretrained(folder)
    file.write_text(json.dumps({**whole, "_diffusers_version": "0.1"}))  # a note about how it was saved
    UNet2DModel.from_pretrained(folder)


def test_the_first_layout_is_read_with_a_warning_and_saved_in_the_current_one(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = damaged(checkpoint, tmp_path)
    digest = digest_of_version_1(UNet2DModel.from_pretrained(folder))
    change_config(folder, version=1, digest=digest)
    model = UNet2DModel.from_pretrained(folder)
    assert "layout version 1, whose digest covers the quantized layers alone" in caplog.text
    change_config(folder, digest=None)
    with pytest.raises(ModelLoadError, match="no digest"):
        UNet2DModel.from_pretrained(folder)
    change_config(folder, digest=digest)
    model.save_pretrained(tmp_path / "again")
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        saved, first = ((f / name).read_bytes() for f in (tmp_path / "again", checkpoint / "unet"))
        if name == "config.json":
            saved, first = ({**json.loads(text), "_name_or_path": ""} for text in (saved, first))
        assert saved == first
    change_weights(folder, flip)
    with pytest.raises(ModelLoadError, match="its weights are not the ones it was saved with"):
        UNet2DModel.from_pretrained(folder)


def test_a_model_that_nobody_needs_is_freed_at_once(checkpoint: Path) -> None:
    model = UNet2DModel.from_pretrained(checkpoint / "unet")
    sample = torch.randn(1, 3, 8, 8)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    expected = model(sample, 750).sample
    for twin in twins:
        assert twin.forward.module is twin and torch.equal(twin(sample, 750).sample, expected)
    left = [weakref.ref(one) for one in (model, *twins)]
    gc.collect()
    gc.disable()
    try:
        del model, twin, twins
        assert [reference() for reference in left] == [None] * 3
    finally:
        gc.enable()


def test_what_was_changed_on_purpose_is_saved_whole(checkpoint: Path, tmp_path: Path) -> None:
    """Biases, norms and types belong to the user; the digest is of what is saved, also by a copy."""
    model = UNet2DModel.from_pretrained(checkpoint / "unet", torch_dtype=torch.bfloat16)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.conv_out.bias.add_(1)
    for number, one in enumerate((model, twin)):
        one.save_pretrained(tmp_path / str(number))
        again = UNet2DModel.from_pretrained(tmp_path / str(number), torch_dtype=torch.bfloat16)
        assert all(torch.equal(v, again.state_dict()[k]) for k, v in one.state_dict().items())
    assert not torch.equal(model.conv_out.bias, again.conv_out.bias)


def test_a_truncated_file_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    folder = damaged(checkpoint, tmp_path)
    file = folder / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    from diffusion_accel.pipelines.loading import load_pipeline

    with pytest.raises(ModelLoadError, match="cut off"):
        load_pipeline(str(folder.parent))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"layers": {}}, "names no layers"),
        ({"layers": {"conv_in": {"weight_bits": 40}}}, "weight_bits must be 2 to 8, got 40"),
        ({"layers": {"conv_in": {"weight_bits": 4, "colour": 3}}}, "unknown colour"),
        ({"layers": {"nowhere": {"weight_bits": 4}}}, "has no layer nowhere"),
        ({"layers": {"conv_act": {"weight_bits": 4}}}, "not a quantizable layer"),
        ({"layers": {"conv_in": {"weight_bits": 4, "compact_grids": True}}}, "compact_grids needs"),
        ({"timesteps": "often"}, "timesteps must be a list"),
        ({"timesteps": [750.0, float("nan"), 0.0]}, "nan is no timestep"),
        ({"timesteps": [float("inf"), 250.0, 0.0]}, "inf is no timestep"),
        ({"timesteps": [10**39, 250, 0]}, "is no timestep"),
        ({"timesteps": [0.0, 0.0, 0.0]}, "not in order"),
        ({"timesteps": [True, 250.0, 0.0]}, "timesteps must be a list of numbers"),
        ({"timesteps": list(range(5000))}, "5000 timesteps, at most 4096"),
        ({"layers": []}, "names no layers"),
        ({"layers": {"conv_in": [4]}}, "unknown not a table"),
        ({"layers": {"conv_in": {"weight_bits": 10**39}}}, "weight_bits must be 2 to 8, got 10000"),
        ({"layers": {"conv_in": {"weight_bits": 4, "per_channel": "yes"}}}, "per_channel must be true or false"),
        ({"layers": {"conv_in": {"weight_bits": 4, "sqnr": float("inf")}}}, "sqnr must be a finite number"),
        ({"layers": {"conv_in": {"weight_bits": 4, "split": 10**20}}}, "split must be a number of channels"),
        ({"layers": {"conv_in": {"weight_bits": 4, "split": 3}}}, "has no 3 channels to split"),
        ({"softmax": 8}, "softmax must be a table"),
        ({"softmax": {"mid_block.attentions.0": 99}}, "must be 2 to 16, got 99"),
        ({"recipe": "none"}, "recipe must be a table"),
        ({"digest": 5}, "digest must be a hash"),
        ({"version": [1]}, "no version this package knows"),
        ({"timesteps": []}, "activation bits but no timesteps"),
        ({"version": None}, "no version"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(
    checkpoint: Path, tmp_path: Path, values: dict[str, Any], says: str
) -> None:
    folder = damaged(checkpoint, tmp_path)
    change_config(folder, **values)
    with pytest.raises((ModelLoadError, ConfigurationError), match=says):
        UNet2DModel.from_pretrained(folder)


def test_no_pickle_is_written(checkpoint: Path) -> None:
    assert {f.suffix for f in checkpoint.rglob("*") if f.is_file()} <= {".json", ".safetensors"}


def test_reuse_works_on_a_quantized_model(checkpoint: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(checkpoint)
    set_runtime(pipe, "integer")
    plain = draw(pipe)
    accelerate(pipe, Reuse(plan="full"))
    assert torch.equal(draw(pipe), plain)
    accelerate(pipe, Reuse(plan="deepcache:2"))
    assert not torch.equal(draw(pipe), plain)
    pipe.acceleration.remove()
    assert torch.equal(draw(pipe), plain)
    assert set(runtime_report(pipe.unet).values()) == {"integer"}


def test_encoder_reuse_with_batched_steps_uses_the_grids_of_each_step(tmp_path: Path) -> None:
    pipe, call = zoo.sd()
    # 16 bits: with fewer, what is equal but for float rounding lands on other levels
    quantize_denoiser(Prompted(pipe, call), replace(TINY, activation_bits=16, attention_bits=16), tmp_path / "work")
    set_runtime(pipe, "simulated")
    from diffusion_accel import EncoderReuse

    images = []
    for batched in (False, True):
        accelerate(pipe, EncoderReuse(schedule="uniform:3", batch_decoder=batched))
        images.append(zoo.run(pipe, call))
    assert (images[0] - images[1]).norm() < 1e-3 * images[0].norm()


class Prompted(Sampler):
    """A sampler for pipelines of the zoo, which have embeddings instead of prompts."""

    def __init__(self, pipe: Any, call: dict[str, Any]) -> None:
        super().__init__(pipe, ("",) * 4, 4, batch=1)
        object.__setattr__(self, "given", call)
        pipe.set_progress_bar_config(disable=True)

    def call(self, start: int, end: int, **changes: Any) -> torch.Tensor:
        return torch.stack([zoo.run(self.pipe, self.given, self.steps, seed) for seed in range(start, end)])  # type: ignore[attr-defined]

    def part(self, start: int, end: int) -> Prompted:
        made = Prompted(self.pipe, self.given)  # type: ignore[attr-defined]
        object.__setattr__(made, "prompts", self.prompts[start:end])
        return made


def traces(model: Any) -> list[Any]:
    """What quantizing changes on a model besides its results: learning, training, attributes, and that it copies."""
    twin = copy.deepcopy(model)
    config = {k: v for k, v in twin.config.items() if k[0] != "_"}  # saving adds notes of diffusers
    modules = [(type(m), m.training, sorted(vars(m))) for m in twin.modules()]
    return [config, modules, [(n, p.requires_grad, p.stride()) for n, p in twin.named_parameters()]]


KINDS = ("sd", "sdxl", "deepfloyd_if", "controlnet", "ip_adapter", "unet2d_skip", "unet3d", "svd", "dit", "flux")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_denoiser(kind: str, tmp_path: Path) -> None:
    pipe, call = getattr(zoo, kind)()
    plain, before = zoo.run(pipe, call, 4), traces(find_denoiser(pipe))
    run = quantize_denoiser(Prompted(pipe, call), replace(TINY, weight_bits=8, softmax_bits=8), tmp_path / "work")
    assert len(run.layers()) > 5 and run.validation["quantized"] < 0.2
    set_runtime(pipe, "simulated")
    ours = zoo.run(pipe, call, 4)
    assert torch.isfinite(ours).all() and not torch.equal(ours, plain)
    run.model.save_pretrained(tmp_path / "model")
    run.restore()
    assert torch.equal(zoo.run(pipe, call, 4), plain)
    assert traces(run.denoiser) == before
    part = "unet" if getattr(pipe, "unet", None) is not None else "transformer"
    again = type(getattr(pipe, part)).from_pretrained(tmp_path / "model")
    set_runtime(again, "simulated")
    setattr(pipe, part, again)
    if kind != "ip_adapter":  # its own weights are part of no model folder
        assert torch.equal(zoo.run(pipe, call, 4), ours)


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


def test_a_quantized_model_is_not_quantized_again(checkpoint: Path, tmp_path: Path) -> None:
    from diffusion_accel import UnsupportedPipelineError

    pipe = DiffusionPipeline.from_pretrained(checkpoint)
    with pytest.raises(UnsupportedPipelineError, match="quantized already"):
        quantize_denoiser(Sampler(pipe, ("",) * 4, 4), TINY, tmp_path)
    with pytest.raises(ConfigurationError, match="runtime must be one of"):
        set_runtime(pipe, "fast")
    with pytest.raises(ConfigurationError, match="no quantized layers"):
        set_runtime(tiny_pipeline(), "integer")


def test_every_runtime_counts_the_same_work(checkpoint: Path) -> None:
    from diffusion_accel.flops import count_flops

    model = DiffusionPipeline.from_pretrained(checkpoint).unet
    x = torch.randn(2, 3, 8, 8)
    counts = {}
    for runtime in RUNTIMES:  # auto first: what it tries out is not counted
        set_runtime(model, runtime)
        with torch.no_grad(), count_flops() as count:
            model(x, 10)
        counts[runtime] = count.total
    assert len(set(counts.values())) == 1 and counts["integer"] > 1e5


def test_a_model_with_adapters_is_not_quantized(tmp_path: Path) -> None:
    from peft import LoraConfig

    from diffusion_accel import UnsupportedPipelineError

    pipe, call = zoo.sd()
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(UnsupportedPipelineError, match="has adapters"):
        quantize_denoiser(Prompted(pipe, call), TINY, tmp_path / "work")
    assert not list(tmp_path.iterdir())
