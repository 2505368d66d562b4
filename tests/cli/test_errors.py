"""What the command line makes of the library's errors."""

from __future__ import annotations

import pytest

from diffusion_accel import errors
from diffusion_accel.cli.app import flags_of
from diffusion_accel.cli.errors import exit_code, in_flags
from diffusion_accel.parallel.group import NoDeviceError, PeerError
from diffusion_accel.parallel.launch import ProcessFailedError


def test_every_error_has_an_exit_code() -> None:
    codes = {
        errors.ConfigurationError: 2,
        errors.UnsupportedPipelineError: 2,
        errors.FeatureConflictError: 2,
        errors.CallStateError: 1,
        errors.OutputError: 1,
        errors.ModelLoadError: 1,
        NoDeviceError: 1,
        PeerError: 1,
    }
    assert {kind: exit_code(kind("x")) for kind in codes} == codes
    assert exit_code(ProcessFailedError("x", 3)) == 3, "of another process: the code with which it ended"


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ("count must be at least 1, got 0", "--count must be at least 1, got 0"),
        ("the count must be at least 1", "the count must be at least 1"),
        ("guidance_scale must be finite", "--guidance-scale must be finite"),
        ("prompts_file is needed", "--prompts-file is needed"),
        ("image: no such file: x", "--image: no such file: x"),
        ("mask_image x.png is too small: 4x4 pixels", "--mask-image x.png is too small: 4x4 pixels"),
        (
            "a.png exists; choose another name or pass overwrite=True",
            "a.png exists; choose another name or pass --overwrite",
        ),
        (
            "strength 0.01 of 20 steps leaves no step; use strength 0.05 or more, or steps 100 or more",
            "--strength 0.01 of 20 steps leaves no step; use --strength 0.05 or more, or --steps 100 or more",
        ),
        ("seed 9 with count 2 goes beyond 10", "--seed 9 with --count 2 goes beyond 10"),
        ("XPipeline does not take negative_prompt, width", "XPipeline does not take --negative-prompt, --width"),
        ("InpaintPipeline needs image, mask_image", "InpaintPipeline needs --image, --mask-image"),
        ("the entry needs image, sound", "the entry needs image, sound"),
        ("model.safetensors cannot be loaded: steps", "model.safetensors cannot be loaded: steps"),
        ("reuse: unknown key 'plam'", "reuse: unknown key 'plam'"),
        ("the plan is for 20 steps, this call has 12; use 20", "the plan is for 20 steps, this call has 12; use 20"),
    ],
)
def test_names_of_arguments_become_flags(message: str, says: str) -> None:
    assert in_flags(message, flags_of(["generate", "x"])) == says


def test_a_word_in_brackets_that_says_what_to_do() -> None:
    message = "a.work is damaged; forget the run (restart)"
    assert in_flags(message, flags_of(["accelerate"])) == "a.work is damaged; forget the run (--restart)"
    assert in_flags(message, flags_of(["generate"])) == message


def test_only_a_command_has_flags() -> None:
    assert flags_of([]) == flags_of(["nonsense"]) == {}
    assert in_flags("count must be 1", {}) == "count must be 1"
    assert flags_of(["plan"]) == flags_of(["estimate"]) and flags_of(["plan"])["devices"] == "--devices"
