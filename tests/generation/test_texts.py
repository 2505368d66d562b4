"""What a model does not read of a prompt is said; with weights of words it reads all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import model_folder
import numpy as np
import pytest
import zoo
from command import call
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from diffusion_accel import ConfigurationError, UnsupportedPipelineError, accelerate
from diffusion_accel.generation.drawing import check_requests, draw
from diffusion_accel.generation.request import Request
from diffusion_accel.generation.texts import cut_text

LONG = "red apple red a e l p r d apple red red"


@pytest.fixture
def pipe() -> Any:
    made = StableDiffusionPipeline(
        vae=zoo.vae(),
        text_encoder=model_folder.text_encoder(),
        tokenizer=model_folder.tokenizer(),
        unet=zoo.unet(),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    made.set_progress_bar_config(disable=True)
    return accelerate(made)


def encoder(kind: Any, size: int) -> Any:
    config = CLIPTextConfig(
        vocab_size=len(model_folder.WORDS),
        hidden_size=size,
        intermediate_size=size,
        projection_dim=zoo.DIM,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=model_folder.TOKENS,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return zoo.seeded(lambda: kind(config))


@pytest.fixture
def xl() -> Any:
    parts = dict(zoo.sdxl()[0].components)
    parts |= {
        "text_encoder": encoder(CLIPTextModel, zoo.DIM // 2),
        "text_encoder_2": encoder(CLIPTextModelWithProjection, zoo.DIM // 2),
        "tokenizer": model_folder.tokenizer(),
        "tokenizer_2": model_folder.tokenizer(),
        "scheduler": DDIMScheduler(clip_sample=False, steps_offset=1),
    }
    made = StableDiffusionXLPipeline(**parts, add_watermarker=False)
    made.set_progress_bar_config(disable=True)
    return accelerate(made)


def drawn(pipe: Any, prompt: str, **changes: Any) -> np.ndarray[Any, Any]:
    request = Request(prompt=prompt, seed=1, steps=2, width=16, height=16, guidance_scale=3.0, **changes)
    check_requests(pipe, [request])
    return np.asarray(draw(pipe, request).images[0])


def test_what_is_cut(pipe: Any) -> None:
    assert cut_text(pipe, "red a") is None
    said = cut_text(pipe, LONG)
    ids = pipe.tokenizer(LONG).input_ids
    assert said is not None and said.startswith(
        f"the prompt has {len(ids)} tokens; the model reads the first 8, without"
    )
    rest = said.split('"')[1]
    kept = LONG[: LONG.index(rest)]
    assert LONG.endswith(rest) and len(pipe.tokenizer(kept).input_ids) == 8, "an independent count"
    assert "--prompt-weights reads all" in said
    quoted = cut_text(pipe, LONG + " \x1b[31m" + "red " * 100, "negative prompt")
    assert quoted is not None and "\x1b" not in quoted and "…" in quoted and quoted.startswith("the negative prompt")


def test_where_one_of_several_encoders_reads_all() -> None:
    other = model_folder.tokenizer()
    other.model_max_length = 100

    class Both(StableDiffusionPipeline):
        components = {"tokenizer": model_folder.tokenizer(), "tokenizer_2": other}  # noqa: RUF012

    both = object.__new__(Both)
    assert cut_text(both, LONG) is None
    other.model_max_length = 9
    assert "reads the first 9" in str(cut_text(both, LONG))


@pytest.mark.parametrize("kind", ["pipe", "xl"])
def test_weights(kind: str, request: pytest.FixtureRequest) -> None:
    pipe = request.getfixturevalue(kind)
    plain = drawn(pipe, "red")
    assert np.array_equal(drawn(pipe, "red", prompt_weights=True), plain), "a text without weights is that text"
    heavy = drawn(pipe, "(red)1.8", prompt_weights=True)
    assert not np.array_equal(heavy, plain)
    assert np.array_equal(drawn(pipe, "(red)1.8", prompt_weights=True), heavy)
    one, other = (drawn(pipe, f"{LONG} {end}", prompt_weights=True) for end in ("red", "apple"))
    assert not np.array_equal(one, other), "the end of a long prompt counts"
    assert np.array_equal(drawn(pipe, f"{LONG} red"), drawn(pipe, f"{LONG} apple")), "without them it does not"
    assert not np.array_equal(drawn(pipe, "red", prompt_weights=True, negative_prompt="(apple)1.5"), plain)


def test_models_without_clip_are_refused() -> None:
    flux, _ = zoo.flux()
    accelerate(flux)
    with pytest.raises(UnsupportedPipelineError, match="prompt_weights cannot be used on FluxPipeline: weights"):
        drawn(flux, "red", prompt_weights=True)


def test_without_the_package(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "compel", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'diffusion-accel\[prompts\]'"):
        drawn(pipe, "red", prompt_weights=True)


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = model_folder.write_folder(tmp_path / "model")
    capsys.readouterr()
    small = ("-m", folder, "--steps", 2, "--width", 16, "--height", 16, "--seed", 1)
    code, _, err = call(capsys, "generate", LONG, *small, "-o", tmp_path / "a.png")
    assert code == 0 and err.count("\n") == 1 and "the model reads the first 8, without" in err
    code, _, err = call(capsys, "generate", f"({LONG})1.2", *small, "--prompt-weights", "-o", tmp_path / "b.png")
    assert (code, err) == (0, "")
    code, _, err = call(capsys, "generate", "--from", tmp_path / "b.png", "-m", folder, "-o", tmp_path / "c.png")
    assert (code, err) == (0, "")
    with Image.open(tmp_path / "b.png") as one, Image.open(tmp_path / "c.png") as other:
        assert one.tobytes() == other.tobytes()
