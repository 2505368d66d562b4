"""`generate` with an IP-Adapter: the bits of diffusers, drawn again from the image, what cannot take one refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ip_adapters
import numpy as np
import pytest
import torch
from command import call
from diffusers import StableDiffusionControlNetPipeline, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from model_folder import write_folder
from PIL import Image
from zoo import controlnet_model

from diffusion_accel.pipelines.loading import load_pipeline

SMALL = ("--steps", 3, "--seed", 1, "--device", "cpu", "-q")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, adapters with an image encoder beside them, and images."""
    place = tmp_path_factory.mktemp("model")
    write_folder(place / "model")
    unet = load_pipeline(str(place / "model")).unet
    ip_adapters.write(place / "plain", unet)
    ip_adapters.write(place / "plus", unet, plus=True)
    ip_adapters.write(place / "bare", unet, encoder=False)
    controlnet_model().save_pretrained(place / "net")
    for number, name in enumerate("ab"):
        pixels = np.random.default_rng(number).integers(0, 256, (40 - 24 * number, 50 - 34 * number, 3), np.uint8)
        Image.fromarray(pixels).save(place / f"{name}.png")
    return place


def shown(folder: Path, kind: str = "plain", *more: Any) -> tuple[Any, ...]:
    adapter = ("--ip-adapter", folder / kind / "ip.safetensors", "--ip-adapter-image", folder / "a.png")
    return ("generate", "red", "-m", folder / "model", *adapter, *SMALL, *more)


def by_hand(
    folder: Path, kind: str = "plain", scale: float = 1, cls: Any = StableDiffusionPipeline, **arguments: Any
) -> Any:
    """What diffusers draws with its own classes."""
    parts = load_pipeline(str(folder / "model")).components
    own = {"controlnet": arguments.pop("controlnet")} if "controlnet" in arguments else {}
    pipe = cls(**parts, **own, requires_safety_checker=False)
    pipe.load_ip_adapter(str(folder / kind), subfolder="", weight_name="ip.safetensors")
    pipe.set_ip_adapter_scale(scale)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    called = {"num_inference_steps": 3, "generator": generator, **arguments}
    return np.asarray(pipe("red", ip_adapter_image=Image.open(folder / "a.png"), **called).images[0])


def pixels(file: Path) -> Any:
    with Image.open(file) as image:
        return np.asarray(image)


@pytest.mark.parametrize("kind", ["plain", "plus"])
def test_as_diffusers_draws_and_again(
    kind: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = {}
    for name, scale, given in (("one", 1.0, ()), ("half", 0.5, ("--ip-adapter-scale", 0.5)), ("none", 0.0, None)):
        given = ("--ip-adapter-scale", 0) if given is None else given
        file = folder / kind / f"{name}.png"
        code, _, err = call(capsys, *shown(folder, kind, *given, "--paths", "-o", file))
        assert (code, err) == (0, "")
        drawn[name] = pixels(file)
        assert np.array_equal(drawn[name], by_hand(folder, kind, scale))
    assert call(capsys, "generate", "red", "-m", folder / "model", *SMALL, "-o", tmp_path / "x.png")[0] == 0
    assert np.array_equal(drawn["none"], pixels(tmp_path / "x.png")), "as without an adapter"
    assert not np.array_equal(drawn["one"], drawn["half"]) and not np.array_equal(drawn["none"], drawn["half"])
    with Image.open(folder / kind / "half.png") as image:
        kept = json.loads(image.text["diffusion_accel"])["settings"]
    assert kept["ip_adapter"] == str(folder / kind / "ip.safetensors")
    assert kept["ip_adapter_image"] == str(folder / "a.png") and kept["ip_adapter_scale"] == 0.5
    again = ("generate", "--from", folder / kind / "half.png", "--paths", "-q")
    code, _, err = call(capsys, *again, "-o", tmp_path / "again.png")
    assert (code, err) == (0, "") and np.array_equal(pixels(tmp_path / "again.png"), drawn["half"])
    code, _, err = call(capsys, *again, "--ip-adapter-image", folder / "b.png", "-o", tmp_path / "other.png")
    assert (code, err) == (0, "") and not np.array_equal(pixels(tmp_path / "other.png"), drawn["half"])


def test_names_lie_beside_the_image(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.png").write_bytes((folder / "a.png").read_bytes())
    ip_adapters.write(tmp_path, load_pipeline(str(folder / "model")).unet)
    first, again = tmp_path / "first.png", tmp_path / "again.png"
    assert call(capsys, *shown(folder, "plain", "-o", first))[0] == 0
    code, _, err = call(capsys, "generate", "--from", first, "-m", folder / "model", "-q", "-o", again)
    assert (code, err) == (0, "") and np.array_equal(pixels(first), pixels(again))
    (tmp_path / "ip.safetensors").unlink()
    code, _, err = call(capsys, "generate", "--from", first, "-m", folder / "model", "-q", "-o", tmp_path / "x.png")
    assert code == 2 and "there is no 'ip.safetensors' beside it; give --ip-adapter\n" in err


def test_the_models_own_image_encoder_comes_first(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = load_pipeline(str(folder / "model"))
    pipe.register_modules(image_encoder=ip_adapters.image_encoder())
    pipe.save_pretrained(tmp_path / "model")
    given = ("--ip-adapter", folder / "bare" / "ip.safetensors", "--ip-adapter-image", folder / "a.png")
    code, _, err = call(capsys, "generate", "red", "-m", tmp_path / "model", *given, *SMALL, "-o", tmp_path / "a.png")
    assert (code, err) == (0, "") and np.array_equal(pixels(tmp_path / "a.png"), by_hand(folder))


def test_with_a_controlnet_and_from_an_image(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    control = ("--controlnet", folder / "net", "--control-image", folder / "b.png")
    code, _, err = call(capsys, *shown(folder, "plain", *control, "-o", tmp_path / "a.png"))
    assert (code, err) == (0, "")
    own = {"controlnet": controlnet_model(), "image": Image.open(folder / "b.png")}
    assert np.array_equal(pixels(tmp_path / "a.png"), by_hand(folder, cls=StableDiffusionControlNetPipeline, **own))
    start = ("--image", folder / "b.png", "--strength", 0.8)
    code, _, err = call(capsys, *shown(folder, "plain", *start, "-o", tmp_path / "b.png"))
    assert (code, err) == (0, "")
    own = {"image": Image.open(folder / "b.png"), "strength": 0.8}
    assert np.array_equal(pixels(tmp_path / "b.png"), by_hand(folder, cls=StableDiffusionImg2ImgPipeline, **own))


@pytest.mark.parametrize("scale", [1, 0.5])
def test_with_reuse_and_compiled(
    scale: float, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted, drawn = by_hand(folder, scale=scale).astype(int), {}
    settings = {
        "exact": ("--reuse", "steps:full full full"),
        "reuse": ("--reuse", "hold:2"),
        "compiled": ("--compiled",),
        "both": ("--reuse", "hold:2", "--compiled"),
    }
    for name, given in settings.items():
        file = tmp_path / f"{name}.png"
        code, _, err = call(capsys, *shown(folder, "plain", "--ip-adapter-scale", scale, *given, "-o", file))
        assert code == 0, err
        drawn[name] = pixels(file).astype(int)
    assert np.array_equal(drawn["exact"], wanted)
    assert abs(drawn["compiled"] - wanted).max() <= 2 and abs(drawn["both"] - drawn["reuse"]).max() <= 2
    assert not np.array_equal(drawn["reuse"], wanted)


def test_with_a_quantized_model(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quantized = tmp_path / "w8"
    given = ("-m", folder / "model", "--calibration", "none", "--bits", "w8", "-q", "-o", quantized)
    assert call(capsys, "quantize", *given)[0] == 0
    quantize, drawn = ("--quantize", quantized), {}
    for name, more in {"one": (), "none": ("--ip-adapter-scale", 0), "compiled": ("--compiled",)}.items():
        code, _, err = call(capsys, *shown(folder, "plain", *quantize, *more, "-o", tmp_path / f"{name}.png"))
        assert code == 0, err
        drawn[name] = pixels(tmp_path / f"{name}.png").astype(int)
    plain = ("generate", "red", "-m", folder / "model", *quantize, *SMALL, "-o", tmp_path / "plain.png")
    assert call(capsys, *plain)[0] == 0
    assert np.array_equal(drawn["none"], pixels(tmp_path / "plain.png"))
    assert abs(drawn["one"] - by_hand(folder).astype(int)).max() <= 8 < abs(drawn["one"] - drawn["none"]).max()
    assert abs(drawn["compiled"] - drawn["one"]).max() <= 2


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("--ip-adapter", "plain/ip.safetensors"), "--ip-adapter needs --ip-adapter-image"),
        (("--ip-adapter-image", "a.png"), "--ip-adapter-image needs --ip-adapter"),
        (("--ip-adapter-scale", 1), "--ip-adapter-scale needs --ip-adapter"),
        (("OK", "--ip-adapter-scale", 2.5), "--ip-adapter-scale must be at least 0 and at most 2, got 2.5"),
        (("OK", "--ip-adapter-scale", "nan"), "--ip-adapter-scale must be at least 0 and at most 2, got nan"),
        (("--ip-adapter", "x.safetensors", "--ip-adapter-image", "a.png"), "--ip-adapter: no such file: x.safetensors"),
        (("--ip-adapter", "plain", "--ip-adapter-image", "a.png"), "--ip-adapter: no such file: plain"),
        (("--ip-adapter", "ip.bin", "--ip-adapter-image", "a.png"), "ip.bin is a pickle, which can run code"),
        (("--ip-adapter", "", "--ip-adapter-image", "a.png"), "ip-adapter is empty"),
        (("--ip-adapter", "plain/ip.safetensors", "--ip-adapter-image", "b.gif"), "no such file: b.gif"),
        (
            ("--ip-adapter", "plain/ip.safetensors", "--ip-adapter-image", "model/model_index.json"),
            "--ip-adapter-image model/model_index.json is not an image",
        ),
    ],
)
def test_refused_before_a_model_is_loaded(
    given: tuple[Any, ...],
    words: str,
    folder: Path,
    no_model: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    (folder / "ip.bin").write_bytes(b"x")
    more = ("--ip-adapter", "plain/ip.safetensors", "--ip-adapter-image", "a.png", *given[1:])
    code, out, err = call(capsys, "generate", "red", *(more if given[0] == "OK" else given), "-o", tmp_path / "x.png")
    assert code in (1, 2) and words in err and err.count("\n") == 1 and not out, err


def test_models_that_cannot_take_one(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("--ip-adapter", folder / "bare" / "ip.safetensors", "--ip-adapter-image", folder / "a.png", *SMALL)
    for model, words in (
        ("sticker", "needs an image encoder: the model has none, and there is no folder image_encoder beside it"),
        (folder / "model", "needs an image encoder: the model has none, and there is no folder image_encoder beside"),
        ("sticker-dit", "FluxPipeline takes no IP-Adapter; pipelines with a U-Net and an image encoder do"),
    ):
        code, out, err = call(capsys, "generate", "red apple", "-m", model, *given, "-o", tmp_path / "x.png")
        assert code == 1 and words in err and err.count("\n") == 1 and not out, err
