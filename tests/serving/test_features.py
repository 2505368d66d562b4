"""What a pipeline is drawn with: features, learned solvers, quantized and transparent models, images, conditions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from PIL import Image
from quantized import TINY, made
from rgba_cases import transparent
from serving_tools import (
    FOREVER,
    LATENTS,
    TIMEOUT,
    alone,
    generator,
    held,
    mean_rows,
    request,
    same,
    served,
    sharing,
    sticker,
)

from diffusion_accel import Compiled, DiffusersCache, EncoderReuse, LatentTransparency, Reuse, TaskRouting, accelerate
from diffusion_accel.generation.drawing import prepare
from diffusion_accel.pipelines.loading import load_pipeline
from diffusion_accel.serving.engine import Engine


def test_a_learned_solver() -> None:
    """Its steps are the scheduler's own affair; a plan for it as well."""
    pipe = sticker(scheduler="learned")
    steps = min(pipe.scheduler.evaluations)
    with Engine(pipe, running=3, wait=FOREVER) as engine:
        asked = [
            (request(1, steps=steps), {}),
            (request(2, steps=4), {"scheduler": "ddim"}),
            (request(3, steps=steps), {}),
        ]
        found = served(engine, asked)
        assert mean_rows(engine) > 2
    for one, (wanted, more) in zip(found, asked, strict=True):
        same(one.images, alone(pipe, wanted, **more))


def test_transparent_images() -> None:
    features = [Reuse(plan="hold:2")]
    pipe = sticker(features=[LatentTransparency(views=1), *features])
    asked = [request(seed) for seed in (1, 2)]
    with Engine(pipe, running=2, wait=FOREVER) as engine:
        with held(engine, 2):
            handles = [engine.submit(one, arguments={"output_type": "np"}) for one in asked]
        found = [handle.result(TIMEOUT) for handle in handles]
        opaque = engine.submit(asked[0], features=features).result(TIMEOUT)
        assert sharing(engine) == {"text_encoder", "unet", "vae.decode"} and found[0].alone == ()
    for one, wanted in zip(found, asked, strict=True):
        exact = prepare(pipe, wanted).images(output_type="np")
        assert one.images.shape[-1] == 4
        assert -10 * np.log10(np.mean((one.images - exact) ** 2)) >= 60
    assert opaque.images[0].mode == "RGB"


def calls(build: Callable[[], Any]) -> tuple[Any, Callable[[int], dict[str, Any]]]:
    pipe, call = build()
    pipe.set_progress_bar_config(disable=True)
    return pipe, lambda seed: {**call, "num_inference_steps": 3, "generator": generator(seed)}


CASES: dict[str, tuple[Callable[[], Any], list[Any], bool]] = {
    "held on a transformer": (zoo.flux, [Reuse(plan="hold:2@1")], False),
    "guidance of two calls": (zoo.cogview4, [Reuse(plan="full", guidance="reuse:2")], False),
    "fits on a transformer": (zoo.sd3, [Reuse(plan="steps:full full hold:sample=1.5,-0.5")], False),
    "diffusers' cache": (zoo.flux, [Reuse(plan=DiffusersCache.parse("first-block:0.2"))], True),
    "task routing": (zoo.sd, [TaskRouting(untrained=True)], False),
    "decoder and ControlNet": (zoo.controlnet, [EncoderReuse()], True),
    "held with a ControlNet": (zoo.controlnet, [Reuse(plan="hold:2")], False),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("case", CASES)
def test_features(case: str) -> None:
    build, features, inside = CASES[case]
    pipe, call = calls(build)
    accelerate(pipe, *features)
    wanted = [pipe(**call(seed)) for seed in range(2)]
    report = pipe.acceleration.report()
    with Engine(pipe, running=2, wait=FOREVER) as engine:
        with held(engine, 2):
            handles = [engine.submit(call(seed)) for seed in range(2)]
        found = [handle.result(TIMEOUT) for handle in handles]
    for one, other in zip(found, wanted, strict=True):
        images = other.images if hasattr(other, "images") else other
        same(torch.as_tensor(one.images), torch.as_tensor(images))
        assert one.alone == (tuple(f.name for f in features) if inside else ())
        assert one.report.counters == report.counters


def test_an_adapter_of_transparency(tmp_path: Path) -> None:
    """It changes the weights of the denoiser: of a twin that its requests share, no other request sees it."""
    pipe, call = calls(zoo.sd)
    plain = pipe(**call(1)).images
    transparent(pipe, tmp_path)
    adapted = pipe(**call(1)).images
    with Engine(pipe, running=3, wait=FOREVER) as engine:
        with held(engine, 3):
            handles = [engine.submit(call(1), features=features) for features in (None, None, [])]
        one, another, other = (handle.result(TIMEOUT) for handle in handles)
        assert one.alone == () and engine.stats()["batches"]["unet"] == {4: 3, 2: 3}
    same(one.images, adapted)
    same(another.images, adapted)
    same(other.images, plain)
    assert not torch.equal(adapted, plain)


def test_a_quantized_model(tmp_path: Path) -> None:
    """Each row has the grids of its own timestep."""
    pipe = load_pipeline(str(made(tmp_path, TINY)))
    pipe.set_progress_bar_config(disable=True)
    asked = [{"num_inference_steps": steps, "batch_size": 1, "output_type": "np"} for steps in (4, 3, 4)]
    wanted = [pipe(**one, generator=generator(seed)).images for seed, one in enumerate(asked)]
    with Engine(pipe, running=3, wait=FOREVER) as engine:
        with held(engine, 3):
            handles = [engine.submit({**one, "generator": generator(seed)}) for seed, one in enumerate(asked)]
        for handle, one in zip(handles, wanted, strict=True):
            assert np.abs(handle.result(TIMEOUT).images - one).max() <= 1e-4
        assert mean_rows(engine) > 2


def test_a_compiled_model() -> None:
    """Graphs stand below the meeting point, for every number of rows; afterwards they are the pipeline's again."""
    pipe = sticker(features=[Compiled(engine="eager"), Reuse(plan="hold:2")])
    wanted = [prepare(pipe, request(seed)).images(**LATENTS) for seed in (1, 2)]
    with Engine(pipe, running=2, wait=FOREVER) as engine:
        found = served(engine, [(request(seed), {}) for seed in (1, 2)])
        assert sharing(engine) == {"text_encoder", "unet"}
        graphs = pipe.acceleration._attachments["compiled"].counters()
        assert graphs["graph_calls"] > 0
        assert set(found[0].report.features) == {"reuse"}
    for one, other in zip(found, wanted, strict=True):
        same(one.images, other)
    assert prepare(pipe, request(1)).images(**LATENTS).equal(wanted[0])


def test_requests_with_images(tmp_path: Path) -> None:
    pipe, picture = sticker(task="image-to-image"), tmp_path / "image.png"
    Image.fromarray(np.arange(48 * 48 * 3).reshape(48, 48, 3).astype("uint8")).save(picture)
    base = {"image": picture, "width": None, "height": None}
    asked = [(request(seed, **base, strength=share, steps=5), {}) for seed, share in ((1, 0.5), (2, 0.9), (3, 0.7))]
    with Engine(pipe, running=3, wait=FOREVER) as engine:
        found = served(engine, asked)
        assert mean_rows(engine) > 2
    for one, (wanted, _) in zip(found, asked, strict=True):
        same(one.images, alone(pipe, wanted))
