"""Parts of the page by themselves, without Gradio: settings from images, files, layers, the slider's plans."""

from __future__ import annotations

import base64
from io import BytesIO
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffusion_accel.errors import ConfigurationError
from diffusion_accel.generation.request import Request
from diffusion_accel.image_metadata import save_options
from diffusion_accel.serving.http.asked import Asked
from diffusion_accel.serving.http.page.choices import Choices
from diffusion_accel.serving.http.page.fields import Fields
from diffusion_accel.serving.http.page.files import Files
from diffusion_accel.serving.http.page.memory import fields_of
from diffusion_accel.serving.http.page.painter import Painter
from diffusion_accel.serving.http.plans import Plans

PLANS = Plans(mock.Mock(scheduler=type("DPMSolverMultistepScheduler", (), {})()), embedded=True)
OWN = "DPMSolverMultistepScheduler"
OTHERS = """a cat, <b>bold</b>
Negative prompt: dogs
Steps: 30, Sampler: Euler a, CFG scale: 7.5, Seed: 9007199254740993, Size: 512x768, Model: other"""


def test_the_same_wish_reads_its_plan_once() -> None:
    first = PLANS.feature("medium", None, None, None, None)
    assert first is not None and PLANS.feature("medium", None, None, None, None) is first
    assert PLANS.feature("high", None, None, None, None) not in (None, first)
    assert PLANS.feature(None, "hold:2", None, None, None) is PLANS.feature(None, "hold:2", None, None, None)
    for _ in range(2):  # and a refusal is one each time
        with pytest.raises(ConfigurationError, match="no such|knows by name"):
            PLANS.feature(None, "tuned:nothing", None, None, None)


def image(text: str, data: dict[str, Any] | None = None, kind: str = "PNG") -> str:
    """An image with settings, as base64."""
    options = save_options(kind, text, data or {})
    if data is None and kind == "PNG":
        options["pnginfo"].chunks = [chunk for chunk in options["pnginfo"].chunks if b"parameters" in chunk[1]]
    file = BytesIO()
    Image.new("RGB", (8, 8)).save(file, kind, **options)
    return base64.b64encode(file.getvalue()).decode()


def read(text: str, **more: Any) -> Fields:
    return fields_of(text, PLANS, OWN, **more)


def test_settings_of_other_tools() -> None:
    """A seed above 2^53 stays what it is."""
    assert read(image(OTHERS)) == Fields(
        prompt="a cat, <b>bold</b>",
        negative_prompt="dogs",
        steps=30,
        scheduler="euler-a",
        guidance_scale=7.5,
        seed="9007199254740993",
        width=512,
        height=768,
    )


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_our_own_settings(kind: str) -> None:
    ours = {
        "prompt": "panda",
        "seed": 2**62 + 1,
        "scheduler": "DDIMScheduler",
        "settings": {"steps": 50, "guidance_scale": 3.0, "width": 96, "height": 96, "negative_prompt": "blue"},
        "features": {"transparent": {}, "reuse": {"plan": "tuned:ddim-balanced"}},
    }
    found = read(image("", ours, kind))
    assert (found.prompt, found.negative_prompt, found.seed) == ("panda", "blue", str(2**62 + 1))
    assert (found.scheduler, found.transparent, found.steps, found.width) == ("ddim", True, 50, 96)
    chosen = Choices.of(PLANS, "ddim").plans[found.position - 1]
    assert chosen.name == "balanced"
    del ours["features"]["reuse"]
    assert read(image("", ours, kind)).position == 0


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(-1e9, 1e9) | st.text(),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)
NAMES = ("prompt", "seed", "scheduler", "steps", "guidance_scale", "width", "negative_prompt", "plan", "reuse")


@settings(max_examples=25)
@given(st.dictionaries(st.sampled_from(NAMES), JSON), st.dictionaries(st.sampled_from(NAMES), JSON))
def test_whatever_an_image_says_the_fields_hold_what_they_may(values: dict[str, Any], inner: dict[str, Any]) -> None:
    found = read(image("", values | {"settings": inner, "features": inner}))
    assert isinstance(found.prompt, str) and found.seed.isascii() and (found.seed.isdigit() or not found.seed)
    assert found.steps is None or 1 <= found.steps <= 10_000
    assert 0 <= found.position <= len(Choices.of(PLANS, found.scheduler or None).plans)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not an image"),
        ("!", "no image"),
        (base64.b64encode(b"hello").decode(), "not an image"),
        (image("", {"prompt": "x"})[:-400], "not an image"),
    ],
)
def test_no_image(text: str, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        read(text)


def test_an_image_without_settings_and_a_large_one() -> None:
    file = BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    plain = base64.b64encode(file.getvalue()).decode()
    with pytest.raises(ConfigurationError, match="holds no settings"):
        read(plain)
    with pytest.raises(ConfigurationError, match="has more than the 0 MiB"):
        read(plain, largest=10)


def test_the_oldest_files_go_first() -> None:
    files = Files(most=400)
    try:
        kept = [Path(files.keep(Image.effect_noise((10, 10), 50), "image")) for _ in range(5)]
        there = [file.exists() for file in kept]
        assert there == sorted(there) and there[-1] and not there[0]
        assert files.folder.stat().st_mode & 0o077 == 0
    finally:
        files.close()
    assert not files.folder.exists()


def test_layers_are_shown_one_by_one() -> None:
    """Of the two that a comparison draws, the first layer is compared."""
    files, colours = Files(), ("red", "green", "blue")
    painter = Painter(mock.Mock(), files)
    asked = Asked(
        request=Request(prompt="x", seed=1),
        features=(),
        layers=("fg", "bg", "blend"),
        wanted=("fg", "blend"),
    )
    images = [Image.new("RGBA" if colour == "red" else "RGB", (16, 16), colour) for colour in colours]
    served: Any = mock.Mock(images=images, report=mock.Mock(steps=2, seconds=1.0, counters={}))
    try:
        with mock.patch.object(painter, "_settings", lambda *_: ("x", {})):
            shown = painter._drawn(Fields(), [asked, asked], [mock.Mock()] * 2, [served, served])
        assert [name for _, name in shown.layers] == ["foreground", "both"] and shown.pair is not None
        opened = [Image.open(file).getpixel((0, 0)) for file in (shown.image, shown.layers[1][0], *shown.pair)]
        assert opened == [(255, 0, 0, 255), (0, 0, 255), (255, 0, 0), (255, 0, 0)]
        assert "equals the image of every step" in shown.words
    finally:
        files.close()


def test_the_slider_offers_each_plan_once_and_asks_for_it() -> None:
    for scheduler in (None, "ddim"):
        choices = Choices.of(PLANS, scheduler)
        assert 1 <= choices.usual <= len(choices.plans) and choices.asked(0) == {"quality": "max"}
        speeds = [plan.speedup for plan in choices.plans]
        assert speeds == sorted(set(speeds))
        for position, plan in enumerate(choices.plans, 1):
            asked = {"text": None, "min_psnr": None, "quality": None, "scheduler": scheduler}
            feature = PLANS.feature(**(asked | choices.asked(position)))
            assert feature is not None and feature.source is plan
            promised = float(choices.promise(position)[1].partition(" times as fast")[0])
            assert promised <= plan.speedup < promised + 0.1, "what it says can be asked for"
    assert Choices.of(PLANS, "euler") == Choices() and Choices().asked(0) == {}
