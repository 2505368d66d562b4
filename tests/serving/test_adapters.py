"""LoRAs by name: requests with the same ones share batches, others take turns; each image is the one drawn alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from serving_tools import FOREVER, LATENTS, TIMEOUT, held, request, same, sharing, sticker

from diffusion_accel import Compiled, EncoderReuse, accelerate
from diffusion_accel.errors import AccelerationError, ConfigurationError, ModelLoadError
from diffusion_accel.generation.drawing import prepare
from diffusion_accel.mixin import plain_twin
from diffusion_accel.pipelines.loading import load_lora
from diffusion_accel.serving.engine import Engine

WIDTH, KEY = 128, "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("loras")
    for seed, name in enumerate(("a", "b", "c")):
        values = torch.Generator().manual_seed(seed)
        halves = {"A": torch.randn(4, WIDTH, generator=values), "B": torch.randn(WIDTH, 4, generator=values)}
        save_file(
            {f"{KEY}.lora_{half}.weight": value * 2 for half, value in halves.items()}, made / f"{name}.safetensors"
        )
    return made


@pytest.fixture(scope="module")
def wanted(folder: Path) -> Any:
    """What a pipeline of its own draws with LoRAs."""
    pipe = sticker()
    for name in ("a", "b"):
        load_lora(pipe, str(folder / f"{name}.safetensors"), name)

    def draw(seed: int, loras: Mapping[str, float], features: Any = ()) -> Any:
        pipe.set_adapters(["a", "b"], [loras.get("a", 0.0), loras.get("b", 0.0)])
        return prepare(accelerate(plain_twin(pipe), *features), request(seed)).images(**LATENTS)

    return draw


@pytest.fixture(scope="module")
def pipe() -> Any:
    """It is what it was after each engine: LoRAs leave nothing that acts."""
    return sticker()


def test_each_with_its_own(pipe: Any, folder: Path, wanted: Any) -> None:
    chosen: list[dict[str, float]] = [{"a": 1.0}, {}, {"a": 1.0}, {"b": 0.5, "a": -1.0}]
    with Engine(pipe, running=4, wait=FOREVER, loras=folder) as engine:
        with held(engine, 4):
            handles = [
                engine.submit(request(seed), loras=loras, arguments=LATENTS) for seed, loras in enumerate(chosen)
            ]
        found = [handle.result(TIMEOUT).images for handle in handles]
        assert "unet" in sharing(engine)
    exact = [wanted(seed, loras) for seed, loras in enumerate(chosen)]
    for one, other in zip(found, exact, strict=True):
        same(one, other)
    assert (exact[0] - wanted(0, {})).abs().max() > 0.1  # it does something


def test_a_few_are_kept(pipe: Any, folder: Path, wanted: Any) -> None:
    pipe = sticker()
    with Engine(
        pipe, running=1, loras={"one": folder / "a.safetensors", "two": folder / "b.safetensors"}, loras_kept=1
    ) as engine:
        for seed, name in enumerate(("one", "two", "one")):
            asked = engine.submit(request(seed), loras={name: 1.0}, arguments=LATENTS)
            same(asked.result(TIMEOUT).images, wanted(seed, {"a" if name == "one" else "b": 1.0}))
            assert pipe.get_list_adapters()["unet"] == [name]
    assert not any(pipe.get_list_adapters().values())
    same(prepare(pipe, request(0)).images(**LATENTS), wanted(0, {}))


def test_with_features_inside(pipe: Any, folder: Path, wanted: Any) -> None:
    """They run alone on a twin, which has the LoRA as well."""
    with Engine(pipe, running=1, loras=folder) as engine:
        for loras in ({"a": 1.0}, {}):
            asked = engine.submit(request(1), loras=loras, features=[EncoderReuse()], arguments=LATENTS)
            same(asked.result(TIMEOUT).images, wanted(1, loras, [EncoderReuse()]))


@pytest.mark.parametrize(
    ("loras", "message"),
    [
        ({"aa": 1.0}, "no LoRA 'aa'; did you mean 'a'"),
        ({"a": float("nan")}, "scale of a LoRA must be a number"),
        ({"a": 11}, "scale of a LoRA must be a number"),
    ],
)
def test_refused(pipe: Any, folder: Path, loras: dict[str, float], message: str) -> None:
    with Engine(pipe, running=1, loras=folder) as engine, pytest.raises(ConfigurationError, match=message):
        engine.submit(request(1), loras=loras)


def test_what_an_engine_refuses(folder: Path, tmp_path: Path) -> None:
    pipe = sticker()
    for loras, message in ((tmp_path / "none", "no folder"), ({"x": tmp_path / "x"}, "there is no LoRA")):
        with pytest.raises(ConfigurationError, match=message):
            Engine(pipe, loras=loras)
    load_lora(pipe, str(folder / "a.safetensors"), "own")
    with pytest.raises(ConfigurationError, match="has LoRAs already"):
        Engine(pipe, loras=folder)
    with pytest.raises(AccelerationError, match="compiled model takes no LoRAs"):
        Engine(sticker(features=[Compiled(engine="eager")]), loras=folder)


def test_a_broken_one_harms_no_other(pipe: Any, folder: Path, tmp_path: Path, wanted: Any) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    loras = {"broken": tmp_path / "broken.safetensors", "a": folder / "a.safetensors"}
    with Engine(pipe, running=2, loras=loras) as engine:
        broken = engine.submit(request(1), loras={"broken": 1.0})
        fine = engine.submit(request(1), loras={"a": 1.0}, arguments=LATENTS)
        with pytest.raises(ModelLoadError, match="broken"):
            broken.result(TIMEOUT)
        same(fine.result(TIMEOUT).images, wanted(1, {"a": 1.0}))
