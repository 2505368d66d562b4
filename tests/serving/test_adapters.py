"""LoRAs by name: requests with the same ones share batches, others take turns; each image is the one drawn alone."""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from serving_tools import FOREVER, LATENTS, TIMEOUT, held, request, same, sharing, sticker

from diffusion_accel import Compiled, EncoderReuse, accelerate
from diffusion_accel.errors import AccelerationError, ConfigurationError, EngineClosedError, ModelLoadError
from diffusion_accel.generation.drawing import prepare
from diffusion_accel.mixin import plain_twin
from diffusion_accel.pipelines.loading import load_lora
from diffusion_accel.serving import adapters
from diffusion_accel.serving.engine import Engine
from diffusion_accel.serving.handle import Standing

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


@pytest.mark.slow
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


class Reader:
    """In the place of what reads the files: it is held until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free, self.read = threading.Event(), list[str]()
        self._real = adapters.read_lora
        monkeypatch.setattr(adapters, "read_lora", self)

    def __call__(self, file: Path) -> None:
        self.read.append(file.stem)
        assert self.free.wait(TIMEOUT)
        self._real(file)


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> Reader:
    return Reader(monkeypatch)


@functools.cache
def with_lora(folder: Path) -> Any:
    pipe = sticker()
    load_lora(pipe, str(folder / "a.safetensors"), "a")
    return pipe


def late(folder: Path, first: int, seed: int = 1, steps: int = 4) -> Any:
    """What is drawn when LoRA a acts from a step on, made by hand."""
    pipe = with_lora(folder)
    pipe.set_adapters(["a"], [1.0 if first == 0 else 0.0])

    def ended(pipe: Any, step: int, _time: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step + 1 == first:
            pipe.set_adapters(["a"], [1.0])
        return values

    return prepare(pipe, request(seed, steps=steps)).images(callback_on_step_end=ended, **LATENTS)


def until_waiting(engine: Engine, handle: Any, step: int) -> None:
    """Wait until a request waits for its LoRAs at a step."""
    collector = engine._collector
    with collector._changed:
        assert collector._changed.wait_for(
            lambda: handle.step == step and handle.ticket not in collector._live, TIMEOUT
        )
    assert not handle.future.done()


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("arrives", "deadline", "acts"), [(0, 2, 0), (1, 3, 2), (3, 2, 2), (9, 3, 3), (9, 9, None)])
def test_a_lora_that_comes_late(
    pipe: Any, folder: Path, reader: Reader, arrives: int, deadline: int, acts: int | None
) -> None:
    """It acts from the step after that in which its file was read; at the deadline the request waits for it."""

    def progress(standing: Standing) -> None:
        if standing.step == arrives:
            reader.free.set()
            handle.reading[0].result(TIMEOUT)

    with Engine(pipe, running=1, wait=FOREVER, loras=folder) as engine:
        with held(engine, 1):
            engine.submit(request(0))  # it is drawn first
            handle = engine.submit(
                request(1, steps=4), loras={"a": 1.0}, lora_deadline=deadline, arguments=LATENTS, on_progress=progress
            )
            if arrives == 0:
                reader.free.set()
                handle.reading[0].result(TIMEOUT)
        if acts is not None and arrives > deadline:
            until_waiting(engine, handle, deadline)
            reader.free.set()
        found = handle.result(TIMEOUT)
        reader.free.set()
        assert found.lora_step == acts and reader.read == ["a"]
    same(found.images, late(folder, 99 if acts is None else acts))


def test_it_moves_to_those_that_have_the_lora(pipe: Any, folder: Path, reader: Reader) -> None:
    """First it shares batches with a bare request, then with one that had waited for the LoRA."""
    handles: list[Any] = []

    def progress(standing: Standing) -> None:
        if standing.step == 2:
            reader.free.set()
            handles[0].reading[0].result(TIMEOUT)

    with Engine(pipe, running=3, wait=FOREVER, loras=folder) as engine:
        with held(engine, 0):
            asked = [({"a": 1.0}, 3), ({}, 0), ({"a": 1.0}, 0)]
            for seed, (loras, deadline) in enumerate(asked):
                more = {"on_progress": progress} if deadline else {}
                handles.append(
                    engine.submit(
                        request(seed, steps=4), loras=loras, lora_deadline=deadline, arguments=LATENTS, **more
                    )
                )
        found = [handle.result(TIMEOUT) for handle in handles]
        assert [one.lora_step for one in found] == [3, None, 0]
        assert reader.read == ["a"]  # once for both
        assert "unet" in sharing(engine)
    for seed, first in enumerate((3, 99, 0)):
        same(found[seed].images, late(folder, first, seed))


def test_one_that_cannot_be_read_or_is_not_waited_for(pipe: Any, folder: Path, tmp_path: Path, reader: Reader) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"nothing")
    with Engine(pipe, running=2, loras={"broken": broken, "a": folder / "a.safetensors"}) as engine:
        waits = engine.submit(request(1), loras={"a": 1.0})
        failing = engine.submit(request(1), loras={"broken": 1.0}, lora_deadline=2)
        until_waiting(engine, failing, 2)
        assert waits.step == 0 and waits.cancel()
        reader.free.set()
        with pytest.raises(ModelLoadError, match="broken"):
            failing.result(TIMEOUT)
    with pytest.raises(EngineClosedError):
        engine.submit(request(1), loras={"a": 1.0})


def test_a_deadline_is_refused(pipe: Any, folder: Path) -> None:
    with Engine(pipe, running=1, loras=folder) as engine:
        for deadline in (-1, True, 1.0, 10_001, None):
            with pytest.raises(ConfigurationError, match="lora_deadline must be"):
                engine.submit(request(1), loras={"a": 1.0}, lora_deadline=deadline)
        with pytest.raises(ConfigurationError, match="lora_deadline is not possible without loras"):
            engine.submit(request(1), lora_deadline=1)
        with pytest.raises(ConfigurationError, match="not possible with encoder_reuse, which works inside"):
            engine.submit(request(1), loras={"a": 1.0}, lora_deadline=1, features=[EncoderReuse()])


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
