"""A request is checked when it is made."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest

from diffusion_accel.errors import ConfigurationError
from diffusion_accel.generation.request import MAX_SEED, Request


def test_seeds() -> None:
    assert Request(prompt="x", seed=3, count=3).seeds == [3, 4, 5]
    assert Request(prompt="x").seed != Request(prompt="x").seed, "random, and known"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": "3"}, "steps must be at least 1 and at most 10000, got '3'"),
        ({"count": True}, "count must be at least 1 and at most 10000, got True"),
        ({"width": 100}, "width must be a positive multiple of 8 and at most 32768, got 100"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a finite number"),
        ({"seed": MAX_SEED, "count": 2}, f"seed {MAX_SEED} with count 2 goes beyond"),
        ({"steps": 2.5}, "steps must be a whole number, got 2.5"),
        ({"seed": None}, "seed must be between 0 and 9223372036854775807, got None"),
        ({"count": None}, "count must be at least 1 and at most 10000, got None"),
        ({"control_guidance_start": 1.5}, "control_guidance_start must be at least 0 and at most 1, got 1.5"),
        (
            {"control_guidance_start": 0.5, "control_guidance_end": 0.5},
            "must be below control_guidance_end, got 0.5 and",
        ),
        ({"control_guidance_end": 0}, "control_guidance_start must be below control_guidance_end, got 0 and 0"),
        (
            {"control_guidance_start": [0.1, 0.5], "control_guidance_end": 0.5, "control_image": ["a.png", "b.png"]},
            "control_guidance_start must be below control_guidance_end, got 0.5 and 0.5",
        ),
        (
            {"controlnet_conditioning_scale": [1, 1], "control_image": ["a.png", "b.png", "c.png"]},
            "scale has 2 values, and there are 3 ControlNets; give one for all, or one for each",
        ),
        ({"controlnet_conditioning_scale": [1, 11], "control_image": ["a.png", "b.png"]}, "at most 10, got 11"),
        ({"control_image": []}, r"control_image must be one, or one for each ControlNet, got \[\]"),
        ({"control_image": ["a.png", 5]}, "control_image must be the path of a file or an image, got 5"),
        ({"image": ["a.png", "b.png"]}, r"image must be the path of a file or an image, got \["),
        ({"steps": (3, 4)}, "steps must be"),
        ({"prompt": 5}, "the prompt must be a text, got 5"),
        ({"negative_prompt": 5}, "the negative prompt must be a text, got 5"),
        ({"image": 5}, "image must be the path of a file or an image, got 5"),
        ({"guidance": 3}, "Request: unknown argument guidance; did you mean guidance_scale?"),
        ({"prompt": "\udce9"}, "the prompt '.*' is not valid UTF-8 at character 1"),
        ({"negative_prompt": "x" * 1_000_001}, "the negative prompt has 1000001 characters"),
        ({"image": "x.png", "strength": 0.01, "steps": 20}, "strength 0.01 of 20 steps leaves no step to run; use "),
    ],
)
def test_what_no_pipeline_can_draw_is_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        Request(**{"prompt": "x", **values})


def test_a_request_needs_a_prompt_and_names() -> None:
    with pytest.raises(ConfigurationError, match="Request: prompt is missing"):
        Request()  # type: ignore[call-arg]
    with pytest.raises(ConfigurationError, match="Request is made by name"):
        Request("x")  # type: ignore[misc]
    request = Request(prompt="x", seed=1)
    assert dataclasses.replace(request, steps=3) == Request(prompt="x", seed=1, steps=3)
    assert copy.deepcopy(request) == request == pickle.loads(pickle.dumps(request))


def test_a_strength_is_checked_with_what_the_pipeline_takes() -> None:
    Request(prompt="x", image="x.png", strength=0.3).check_strength(steps=50, strength=0.8)
    with pytest.raises(ConfigurationError, match="strength 0.3 of 2 steps leaves no step to run; use strength 0.5"):
        Request(prompt="x", image="x.png", strength=0.3).check_strength(steps=2)


def test_several_of_one_are_that_one() -> None:
    one = Request(prompt="x", seed=1, control_image=["a.png"], controlnet_conditioning_scale=[0.5])
    assert one == Request(prompt="x", seed=1, control_image="a.png", controlnet_conditioning_scale=0.5)
    two = Request(prompt="x", seed=1, control_image=["a.png", "b.png"], control_guidance_end=[0.5, 1])
    assert two.control_image == ("a.png", "b.png") and two.control_guidance_end == (0.5, 1)
    whole = Request(prompt="x", control_image=["a.png", "b.png"], controlnet_conditioning_scale=[1, 0])
    assert str(whole.controlnet_conditioning_scale) == "(1.0, 0.0)", "pipelines ask for floats"
    with pytest.raises(ConfigurationError, match="at most 10, got a number of about 401 digits"):
        Request(prompt="x", control_image="a.png", controlnet_conditioning_scale=10**400)
    assert copy.deepcopy(two) == two == pickle.loads(pickle.dumps(two))
