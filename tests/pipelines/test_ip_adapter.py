"""IP-Adapters on a pipeline: damaged and unfitting files in one line, and what requests need."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ip_adapters
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from model_folder import draw as draw_plain
from model_folder import edit_json, edit_tensors, write_folder
from PIL import Image

from diffusion_accel.errors import ConfigurationError, ModelLoadError
from diffusion_accel.generation.drawing import check_requests, draw
from diffusion_accel.generation.loading import open_pipeline
from diffusion_accel.generation.request import Request
from diffusion_accel.pipelines.ip_adapter import has_ip_adapter, load_ip_adapter
from diffusion_accel.pipelines.loading import load_pipeline
from diffusion_accel.serving.engine import Engine

FIRST = "ip_adapter.1.to_k_ip.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_folder(tmp_path_factory.mktemp("model")))


def test_requests_are_shown_an_image(model: str, tmp_path: Path) -> None:
    bare = open_pipeline(model, device="cpu")
    file = ip_adapters.write(tmp_path, bare.unet)
    pipe = open_pipeline(model, device="cpu", ip_adapter=file, ip_adapter_scale=0.7, dtype=torch.bfloat16)
    assert has_ip_adapter(pipe) and not has_ip_adapter(bare)
    assert pipe.image_encoder.dtype == next(pipe.unet.encoder_hid_proj.parameters()).dtype == torch.bfloat16
    pipe = open_pipeline(model, device="cpu", ip_adapter=file)
    pipe.set_progress_bar_config(disable=True)
    images = [Image.new("RGB", (40, 20), colour) for colour in ("red", "blue")]
    asked = [Request(prompt="red", seed=1, steps=2, count=2, ip_adapter_image=image) for image in images]
    drawn = [[np.asarray(one, int) for one in draw(pipe, request).images] for request in asked]
    assert not np.array_equal(drawn[0][0], drawn[1][0]) and len(drawn[0]) == 2
    with Engine(pipe) as engine:
        served = [handle.result(60).images for handle in [engine.submit(request) for request in asked]]
    for one, other in zip([*served[0], *served[1]], [*drawn[0], *drawn[1]], strict=True):
        assert abs(np.asarray(one, int) - other).max() <= 1
    without = Request(prompt="red", seed=1, steps=2)
    for made, request, words in (
        (pipe, without, "ip_adapter_image is missing: the pipeline has an IP-Adapter"),
        (bare, asked[0], "ip_adapter_image is for an IP-Adapter, and this .*StableDiffusionPipeline has none"),
    ):
        for check in (lambda: check_requests(made, [request]), lambda: draw(made, request)):  # noqa: B023
            with pytest.raises(ConfigurationError, match=words):
                check()


def test_several_are_left_to_the_pipelines_own_call(model: str, tmp_path: Path) -> None:
    pipe = open_pipeline(model, device="cpu")
    file = ip_adapters.write(tmp_path, pipe.unet)
    load_ip_adapter(pipe, file)
    pipe.load_ip_adapter([str(tmp_path)] * 2, subfolder=["", ""], weight_name=[file.name] * 2)
    request = Request(prompt="red", steps=2, ip_adapter_image=Image.new("RGB", (8, 8)))
    with pytest.raises(ConfigurationError, match="is for one IP-Adapter, and the pipeline has 2: call it itself"):
        draw(pipe, request)


def test_scales(model: str) -> None:
    for options, words in (
        ({"ip_adapter_scale": 1}, "ip_adapter_scale needs ip_adapter"),
        ({"ip_adapter": "x", "ip_adapter_scale": 3}, "ip_adapter_scale must be at least 0 and at most 2, got 3"),
        ({"ip_adapter": "x", "ip_adapter_scale": "1"}, "ip_adapter_scale must be at least 0 and at most 2, got '1'"),
    ):
        with pytest.raises(ConfigurationError, match=words):
            open_pipeline(model, device="cpu", **options)
    with pytest.raises(ConfigurationError, match="ip_adapter_image must be the path of a file or an image, got 5"):
        Request(prompt="x", ip_adapter_image=5)  # type: ignore[arg-type]


def _without(*names: str) -> Callable[[dict[str, Any]], None]:
    def change(tensors: dict[str, Any]) -> None:
        for name in names:
            del tensors[name]

    return change


def _all_without(part: str) -> Callable[[dict[str, Any]], None]:
    return lambda tensors: _without(*[name for name in tensors if name.startswith(part)])(tensors)


def _face(tensors: dict[str, Any]) -> None:
    _all_without("image_proj.")(tensors)
    tensors |= {"image_proj.proj.0.weight": torch.zeros(24, 12), "image_proj.norm.weight": torch.ones(8)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_all_without("image_proj."), "is no IP-Adapter: it has no image_proj and ip_adapter"),
        (_all_without("ip_adapter."), "is no IP-Adapter: it has no image_proj and ip_adapter"),
        (lambda tensors: tensors[FIRST].fill_(torch.nan), f"is damaged: {FIRST} holds numbers that are not finite"),
        (_without(FIRST), "does not fit this model: it has no 1.to_k_ip.weight"),
        (lambda tensors: tensors.update({FIRST: torch.zeros(3, 5)}), "does not fit this model: "),
        (
            _without("image_proj.norm.weight"),
            "it has nothing for encoder_hid_proj.image_projection_layers.0.norm.w",
        ),
        (
            lambda tensors: tensors.update({f"ip_adapter.99.to_{k}_ip.weight": torch.zeros(8, 8) for k in "kv"}),
            r"does not fit this model: it is for \d layers, not \d",
        ),
        (
            lambda tensors: tensors.update({"image_proj.proj.weight": torch.zeros(32, 7)}),
            "does not fit the image encoder: it reads 7 numbers, and gets 12",
        ),
        (
            lambda tensors: tensors.update({"image_proj.proj.weight": torch.zeros(())}),
            r"is damaged: image_proj.proj.weight is F32 of the shape \[\], which weights are not",
        ),
        (
            lambda tensors: tensors.update({FIRST: torch.zeros(16, 8, dtype=torch.int8)}),
            r"is damaged: ip_adapter.1.to_k_ip.weight is I8 of the shape \[16, 8\], which weights are not",
        ),
        (
            lambda tensors: tensors.update({"ip_adapter.1.to_k_ip.bias": torch.zeros(3)}),
            "it has ip_adapter.1.to_k_ip.bi",
        ),
        (lambda tensors: tensors.update({"other": torch.zeros(3)}), "is no IP-Adapter that is known: it has other"),
        (
            lambda tensors: tensors.update({"image_proj.layers.9.0.to_q.weight": torch.zeros(8, 8)}),
            r"is of a kind that diffusers does not know: its image_proj has \d+ numbers, of which \d+ would be used",
        ),
        (
            lambda tensors: tensors.update({"image_proj.norm.weight": torch.zeros(99)}),
            r"norm.weight expected shape torch.Size\(\[\d+\]\), but got torch.Size\(\[99\]\)$",
        ),
        (_face, "reads features of faces; only those that read an image are taken"),
        (_without("image_proj.proj.weight", "image_proj.norm.weight"), "its image_proj has no proj and no proj_in"),
    ],
)
def test_files_that_do_not_fit(change: Callable[[Any], Any], words: str, model: str, tmp_path: Path) -> None:
    pipe = load_pipeline(model)
    file = ip_adapters.write(tmp_path, pipe.unet)
    edit_tensors(file, change)
    before = draw_plain(pipe)
    with pytest.raises(ModelLoadError, match=words) as error:
        load_ip_adapter(pipe, str(file))
    assert "\n" not in str(error.value)
    assert pipe.image_encoder is None and not has_ip_adapter(pipe), "it stays as it was"
    assert torch.equal(draw_plain(pipe), before)


def test_one_that_fails_leaves_the_one_before(model: str, tmp_path: Path) -> None:
    pipe = load_pipeline(model)
    load_ip_adapter(pipe, ip_adapters.write(tmp_path / "whole", pipe.unet), 0.5)
    image = Image.new("RGB", (16, 16), "red")
    before = draw_plain(pipe, ip_adapter_image=image)
    file = ip_adapters.write(tmp_path / "broken", pipe.unet)
    edit_tensors(file, _without(FIRST))
    with pytest.raises(ModelLoadError, match="it has no 1.to_k_ip.weight"):
        load_ip_adapter(pipe, file)
    assert torch.equal(draw_plain(pipe, ip_adapter_image=image), before)


def test_refused_before_the_model_is_loaded(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unet = load_pipeline(model).unet
    bare, full = (ip_adapters.write(tmp_path / name, unet, encoder=name == "full") for name in ("bare", "full"))
    face = ip_adapters.write(tmp_path / "face", unet)
    edit_tensors(face, _face)
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", lambda *_, **__: pytest.fail("the model is loaded"))
    for name, file, error, words in (
        (model, bare, ModelLoadError, "needs an image encoder: the model has none, and there is no folder image_en"),
        ("sticker", bare, ModelLoadError, "needs an image encoder: the model has none"),
        ("sticker-dit", full, ModelLoadError, "FluxPipeline takes no IP-Adapter; pipelines with a U-Net"),
        (model, face, ModelLoadError, "reads features of faces"),
        (model, tmp_path / "none.safetensors", ModelLoadError, "cannot be read: No such file"),
        (model, 5, ConfigurationError, "ip_adapter must be the path of a file, got 5"),
        (model, "", ConfigurationError, "ip_adapter must be the path of a file, got ''"),
        (model, [full, full], ConfigurationError, r"ip_adapter must be the path of a file, got \["),
    ):
        with pytest.raises(error, match=words):
            open_pipeline(name, device="cpu", ip_adapter=file)  # type: ignore[arg-type]


@pytest.mark.parametrize("scale", [True, "1", None, float("nan"), -1, 3])
def test_scales_of_a_loaded_pipeline(scale: Any, model: str, tmp_path: Path) -> None:
    pipe = load_pipeline(model)
    file = ip_adapters.write(tmp_path, pipe.unet)
    with pytest.raises(ConfigurationError, match=f"scale must be at least 0 and at most 2, got {scale!r}"):
        load_ip_adapter(pipe, file, scale)


def test_image_encoders_are_checked(model: str, tmp_path: Path) -> None:
    pipe = load_pipeline(model)
    file = ip_adapters.write(tmp_path, pipe.unet)
    weights = tmp_path / "image_encoder" / "model.safetensors"
    whole = weights.read_bytes()
    key = "visual_projection.weight"
    edit_tensors(weights, _without(key))
    with pytest.raises(ModelLoadError, match=f"its weights have no {key}"):
        load_ip_adapter(pipe, str(file))
    weights.write_bytes(whole)
    edit_tensors(weights, lambda tensors: tensors[key].fill_(torch.inf))
    with pytest.raises(ModelLoadError, match=f"{key} of its image_encoder holds numbers that are not finite"):
        load_ip_adapter(pipe, str(file))
    weights.rename(weights.with_name("pytorch_model.bin"))
    with pytest.raises(ModelLoadError, match="pickle") as error:
        load_ip_adapter(pipe, str(file))
    assert "\n" not in str(error.value)
    weights.with_name("pytorch_model.bin").unlink()
    weights.write_bytes(whole)
    edit_json(tmp_path / "image_encoder" / "config.json", hidden_size=10**9)
    with pytest.raises(ModelLoadError):
        load_ip_adapter(pipe, str(file))
