"""Loading for real: the embedded model, folders, conversions, ControlNets, LoRAs, and what does not fit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from model_folder import edit_json, write_folder
from safetensors.torch import save_file
from zoo import controlnet_model, rand

import diffusion_accel
from diffusion_accel import (
    AcceleratedPipeline,
    ConfigurationError,
    EncoderReuse,
    ModelLoadError,
    UnsupportedPipelineError,
)
from diffusion_accel.model_files.headers import lora_file
from diffusion_accel.model_files.hub import hub_reason
from diffusion_accel.model_files.names import EMBEDDED, find_model
from diffusion_accel.pipelines.loading import class_of, load_lora, load_pipeline
from diffusion_accel.pipelines.schedulers import SCHEDULERS, check_scheduler, set_scheduler

STICKER = EMBEDDED["sticker"].path


@pytest.fixture(scope="module")
def sticker() -> Any:
    pipe = load_pipeline("sticker")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, **changes: Any) -> torch.Tensor:
    settings = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "pt", **changes}
    return pipe("red apple, 3d style", generator=torch.Generator().manual_seed(0), **settings).images


def test_plain_diffusers_loads_the_embedded_model(sticker: Any) -> None:
    plain = StableDiffusionPipeline.from_pretrained(STICKER)
    plain.set_progress_bar_config(disable=True)
    assert {c.dtype for c in (plain.unet, plain.vae, plain.text_encoder)} == {torch.float32}
    assert torch.equal(draw(plain), draw(sticker))
    assert draw(plain).shape == (1, 3, 96, 96)


def test_the_drop_in_is_an_accelerated_diffusers_pipeline(sticker: Any) -> None:
    for value in (True, EncoderReuse(schedule="all"), {"schedule": "all"}, "schedule=all"):
        pipe = AcceleratedPipeline.from_pretrained("sticker", encoder_reuse=value)
        assert isinstance(pipe, StableDiffusionPipeline)
        assert pipe.acceleration.features["encoder_reuse"].schedule == ("uniform:4" if value is True else "all")
    pipe.set_progress_bar_config(disable=True)
    assert torch.equal(draw(pipe), draw(sticker))
    for off in (False, None):
        assert not AcceleratedPipeline.from_pretrained("sticker", encoder_reuse=off).acceleration.features
    tuned = AcceleratedPipeline.from_pretrained("sticker", reuse="tuned:balanced")
    assert "DPMSolver" in type(tuned.scheduler).__name__, "the plan is tuned for the recommended scheduler"
    with pytest.raises(ConfigurationError, match="encoder_reuse must be"):
        AcceleratedPipeline.from_pretrained("sticker", encoder_reuse=3)
    with pytest.raises(TypeError, match="from_pretrained"):
        AcceleratedPipeline()


def test_named_drop_ins(sticker: Any) -> None:
    from diffusion_accel.pipelines import AcceleratedStableDiffusionImg2ImgPipeline

    pipe = AcceleratedStableDiffusionImg2ImgPipeline.from_pretrained("sticker", encoder_reuse=True)
    assert isinstance(pipe, StableDiffusionImg2ImgPipeline)
    again = AcceleratedStableDiffusionImg2ImgPipeline.from_pipe(sticker, encoder_reuse=True)
    assert isinstance(again, StableDiffusionImg2ImgPipeline) and again.unet is sticker.unet
    assert not hasattr(sticker, "acceleration")
    with pytest.raises(ImportError):
        from diffusion_accel.pipelines import AcceleratedNonsensePipeline  # noqa: F401
    with pytest.raises(AttributeError):
        _ = diffusion_accel.pipelines.AcceleratedTorchDevice


def test_tasks(sticker: Any) -> None:
    assert type(load_pipeline("sticker", task="image-to-image")) is StableDiffusionImg2ImgPipeline
    with pytest.raises(ModelLoadError, match="4 latent channels"):
        load_pipeline("sticker", task="inpainting")
    with pytest.raises(ConfigurationError, match="unknown task 'img2img'; allowed: text-to-image, image-to-image"):
        load_pipeline("sticker", task="img2img")
    with pytest.raises(ConfigurationError, match="unknown ControlNet 'nowhere'; a folder or a hub id"):
        load_pipeline("sticker", controlnet="nowhere")  # nothing asks the hub for it


def test_a_folder_loads_and_features_survive_saving(sticker: Any, tmp_path: Path) -> None:
    pipe = AcceleratedPipeline.from_pretrained("sticker", encoder_reuse=True)
    pipe.save_pretrained(tmp_path)
    assert "StableDiffusionPipeline" in (tmp_path / "model_index.json").read_text()
    loaded = load_pipeline(str(tmp_path))
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is StableDiffusionPipeline
    assert torch.equal(draw(loaded), draw(sticker))


def test_a_single_file_goes_through_from_single_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Converting a real checkpoint needs its reference configuration; here: the right class gets the right file."""
    from diffusers import StableDiffusionXLPipeline

    seen: list[Any] = []
    for cls in (StableDiffusionPipeline, StableDiffusionXLPipeline):
        monkeypatch.setattr(
            cls, "from_single_file", classmethod(lambda c, path, **options: seen.append((c, path, options)) or "loaded")
        )
    for name, key in (("sd", "model.diffusion_model.x"), ("xl", "conditioner.embedders.0.x")):
        save_file({key: torch.zeros(1)}, tmp_path / f"{name}.safetensors")
        assert load_pipeline(str(tmp_path / f"{name}.safetensors")) == "loaded"
    assert [c for c, _, _ in seen] == [StableDiffusionPipeline, StableDiffusionXLPipeline]
    assert all(options["dtype"] is torch.float32 for _, _, options in seen)


def test_failures_are_one_line(tmp_path: Path) -> None:
    shutil.copytree(STICKER, tmp_path / "copy")
    (tmp_path / "copy" / "unet" / "config.json").unlink()
    save_file({"x": torch.zeros(1)}, tmp_path / "odd.safetensors")
    for name in (str(tmp_path / "copy"), "nobody/there-is-no-such-model", str(tmp_path / "odd.safetensors")):
        with pytest.raises(ModelLoadError) as error:
            load_pipeline(name)
        assert "\n" not in str(error.value) and "cannot be loaded" in str(error.value)
    with pytest.raises(ModelLoadError, match="no such ControlNet"):
        load_pipeline("sticker", controlnet="./missing")


def test_a_controlnet_from_a_folder(sticker: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ControlNetModel.from_unet(sticker.unet, conditioning_channels=3).save_pretrained(tmp_path / "net")
    pipe = load_pipeline("sticker", controlnet=str(tmp_path / "net"))
    assert type(pipe) is StableDiffusionControlNetPipeline
    monkeypatch.setenv("HOME", str(tmp_path))
    assert type(load_pipeline("sticker", controlnet="~/net").controlnet) is ControlNetModel


def test_several_controlnets_from_folders_saved_and_loaded(tmp_path: Path) -> None:
    model = str(write_folder(tmp_path / "model"))
    nets = [controlnet_model(number) for number in range(2)]
    for number, net in enumerate(nets):
        net.save_pretrained(tmp_path / f"net{number}")
    pipe: Any = AcceleratedPipeline.from_pretrained(model, controlnet=[tmp_path / "net0", str(tmp_path / "net1")])
    parts = load_pipeline(model).components
    plain = StableDiffusionControlNetPipeline(**parts, controlnet=nets, requires_safety_checker=False)
    pipe.save_pretrained(tmp_path / "both")
    call = {"image": [rand(1, 3, 16, 16), rand(1, 3, 16, 16, seed=1)], "controlnet_conditioning_scale": [1.0, 0.5]}
    wanted = draw(plain, **call)
    assert torch.equal(draw(pipe, **call), wanted)
    assert torch.equal(draw(AcceleratedPipeline.from_pretrained(str(tmp_path / "both")), **call), wanted)
    for place in ("both", "single"):  # loaded ones take the place of those in the folder
        if place == "single":
            load_pipeline(model, controlnet=tmp_path / "net0").save_pretrained(tmp_path / place)
        assert torch.equal(draw(load_pipeline(str(tmp_path / place), controlnet=nets), **call), wanted)
        assert load_pipeline(str(tmp_path / place), controlnet=nets[:1]).controlnet is nets[0]
    one = load_pipeline(model, controlnet=[tmp_path / "net0"])
    assert type(one.controlnet) is ControlNetModel, "as without a list"
    with pytest.raises(ModelLoadError, match="no such ControlNet folder: ./missing"):
        load_pipeline(model, controlnet=[tmp_path / "net0", "./missing"])


def made_lora(folder: Path, width: int = 128, prefix: str = "unet.down_blocks.1.attentions.0") -> Path:
    key = f"{prefix}.transformer_blocks.0.attn1.to_q"
    path = folder / "lora.safetensors"
    save_file({f"{key}.lora_A.weight": torch.randn(4, width), f"{key}.lora_B.weight": torch.randn(width, 4)}, path)
    return path


def test_lora(tmp_path: Path, sticker: Any) -> None:
    pipe = load_pipeline("sticker")
    pipe.set_progress_bar_config(disable=True)
    load_lora(pipe, str(made_lora(tmp_path)), "one")
    pipe.set_adapters(["one"], [1.0])
    assert not torch.equal(draw(pipe), draw(sticker))
    pipe.set_adapters(["one"], [0.0])
    assert torch.allclose(draw(pipe), draw(sticker), atol=1e-5)


def test_a_folder_with_a_lora(tmp_path: Path) -> None:
    """What `save_lora_weights` writes is a folder; diffusers takes it as well."""
    with pytest.raises(ModelLoadError, match="a folder with no .safetensors files.*name the file"):
        lora_file(tmp_path)
    only = made_lora(tmp_path)
    assert lora_file(tmp_path) == lora_file(only) == only
    other = only.rename(tmp_path / "a.safetensors")
    only = made_lora(tmp_path)
    with pytest.raises(ModelLoadError, match="a folder with 2 .safetensors files.*name the file"):
        lora_file(tmp_path)
    saved = other.rename(tmp_path / "pytorch_lora_weights.safetensors")
    assert lora_file(tmp_path) == saved
    pipe = load_pipeline("sticker")
    load_lora(pipe, str(tmp_path), "one")
    assert "one" in pipe.get_list_adapters()["unet"]


@pytest.mark.parametrize("case", ["width", "names", "empty", "pickle", "broken"])
def test_a_lora_that_does_not_fit(tmp_path: Path, case: str) -> None:
    pipe = load_pipeline("sticker")
    path = tmp_path / "lora.safetensors"
    if case == "width":
        path = made_lora(tmp_path, width=96)
    elif case == "names":
        path = made_lora(tmp_path, prefix="unet.down_blocks.9.attentions.7")
    elif case == "empty":
        save_file({"something.else": torch.zeros(2)}, path)
    elif case == "pickle":
        path = tmp_path / "lora.bin"
        path.write_bytes(b"\x80\x04.")
    else:
        path.write_bytes(b"12345")
    with pytest.raises(ModelLoadError) as error:
        load_lora(pipe, str(path), "one")
    assert "\n" not in str(error.value)


def test_schedulers(sticker: Any) -> None:
    original = sticker.scheduler
    try:
        for name in SCHEDULERS:
            set_scheduler(sticker, name)
            assert type(sticker.scheduler).__name__ == SCHEDULERS[name][0]
            assert sticker.scheduler.config.prediction_type == "v_prediction"
            sticker.scheduler = original
        set_scheduler(sticker, "EulerDiscreteScheduler")
        with pytest.raises(ConfigurationError, match="does not fit"):
            set_scheduler(sticker, "FlowMatchEulerDiscreteScheduler")
        with pytest.raises(ConfigurationError, match="did you mean 'euler'"):
            check_scheduler("eulr")
    finally:
        sticker.scheduler = original


def test_a_transformer_pipeline_is_refused_with_the_reason() -> None:
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
    from zoo import vae

    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=4, num_layers=1, sample_size=4
    )
    pipe = DiTPipeline(transformer=model, vae=vae(), scheduler=DDIMScheduler())
    with pytest.raises(UnsupportedPipelineError, match="encoder and a decoder"):
        AcceleratedPipeline.from_pipe(pipe, encoder_reuse=True)


def test_why_a_model_of_the_hub_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """One short line that says what to do, whatever way diffusers wraps the hub's error."""
    from huggingface_hub import errors

    with pytest.raises(ModelLoadError, match="cannot be loaded: it is not on this machine, and offline mode") as found:
        load_pipeline("nobody/nothing")
    assert len(str(found.value)) < 190

    def caused(kind: type[Exception]) -> OSError:
        error = OSError("a long text")
        error.__context__ = kind.__new__(kind)
        return error

    for kind, says in (
        (errors.GatedRepoError, "needs a login"),
        (errors.RepositoryNotFoundError, "has no such model, or it is private"),
        (errors.RemoteEntryNotFoundError, "may be no diffusers pipeline"),
        (ConnectionError, "cannot be reached"),
        (TimeoutError, "cannot be reached"),
    ):
        assert says in (hub_reason("a/b", caused(kind)) or "")
    assert hub_reason("a/b", ValueError("shapes")) is None and hub_reason("./a/b", caused(ConnectionError)) is None


def test_the_class_of_a_model_before_it_is_loaded(tmp_path: Path) -> None:
    assert class_of(find_model("sticker")) is StableDiffusionPipeline and class_of(find_model("nobody/nothing")) is None
    with pytest.raises(ModelLoadError, match="it is not on this machine"):
        class_of(find_model("nobody/nothing"), ask_hub=True)
    folder = write_folder(tmp_path / "m")
    for name in ("utils", "UNet2DModel", "NoPipeline", "DiffusionPipeline.x", ["pipeline", "Mine"]):
        edit_json(folder / "model_index.json", _class_name=name)
        assert class_of(find_model(str(folder))) is None, name
    edit_json(folder / "model_index.json", _class_name="FluxPipeline")
    assert getattr(class_of(find_model(str(folder))), "__name__", "") == "FluxPipeline"
    for key, kind in (("conditioner.a", "StableDiffusionXLPipeline"), ("cond.a", "StableDiffusionPipeline")):
        save_file({key: torch.zeros(1)}, tmp_path / "one.safetensors")
        assert getattr(class_of(find_model(str(tmp_path / "one.safetensors"))), "__name__", "") == kind
