"""The settings of the feature, and the calls that graphs are found by."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from zoo import sd, unet, wan

from diffusion_accel import Compiled, ConfigurationError, accelerate
from diffusion_accel.compiled.attachment import modules_of
from diffusion_accel.compiled.calls import Call, Flat, OpaqueError
from diffusion_accel.compiled.digest import digest
from diffusion_accel.compiled.engines import ENGINES


def test_texts_and_their_short_forms() -> None:
    assert Compiled.parse("openvino,precision=bf16") == Compiled(precision="bfloat16")
    assert Compiled.parse("inductor,mode=reduce-overhead").engine == "inductor"
    assert Compiled(parts="vae+denoiser").parts == "denoiser+vae"
    assert Compiled.parse("precision=fp16,cache=off") == Compiled(precision="float16", cache=False)
    for text in ("inductor,mode=x", "tensorrt", "ONNXRuntime,precision=fp16"):
        assert Compiled.accepts_bare(text), text
    for text in ("a cat", "eagle", "conductor", "red, inductor"):
        assert not Compiled.accepts_bare(text), text


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"engine": "openvno"}, "did you mean 'openvino'"),
        ({"precision": "int8"}, "use float32, bfloat16, float16, bf16, fp16"),
        ({"parts": "unet"}, "use denoiser, vae, text, controlnet"),
        ({"parts": ""}, "use denoiser, vae, text, controlnet"),
        ({"mode": "reduce-overhead"}, "engine=openvino, mode"),
        ({"engine": "inductor", "device": "GPU"}, "inductor runs where the model is"),
        ({"device": "cpu; rm"}, "use CPU, GPU, GPU.1 or NPU"),
        ({"on_new_shape": "never"}, "use compile, eager"),
        ({"engine": "eager", "precision": "bf16"}, "engine=eager, precision"),
        ({"max_cache_mb": 0}, "between 1 and 1048576"),
    ],
)
def test_what_is_not_allowed(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match="compiled: .*" + said):
        Compiled(**settings)


def test_the_table_needs_no_torch() -> None:
    code = (
        "import sys; from diffusion_accel.compiled.compiled import Compiled; Compiled(); print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
    assert all(engine.name == name for name, engine in ENGINES.items())


def test_parts() -> None:
    pipe = accelerate(sd()[0], Compiled(engine="eager"))
    assert modules_of(pipe, frozenset({"denoiser", "vae"})) == [pipe.unet, pipe.vae.encoder, pipe.vae.decoder]
    assert modules_of(pipe, frozenset({"text", "controlnet"})) == []


def test_a_decoder_that_writes_into_its_cache_runs_uncompiled() -> None:
    """Wan's keeps features of each frame for the next one in a list that it is given."""
    pipe, call = wan(two=False)
    call = {**call, "num_frames": 9, "num_inference_steps": 2, "output_type": "pt"}
    plain = pipe(**call, generator=torch.manual_seed(0)).frames
    accelerate(pipe, Compiled(engine="eager"))
    compiled = pipe(**call, generator=torch.manual_seed(0)).frames
    assert plain.shape[1] == 9 and torch.equal(plain, compiled)


def test_signatures_tell_calls_apart() -> None:
    def signature(**named: Any) -> str:
        return Call.of({"sample": torch.zeros(2, 4), **named}).signature

    calls = [
        {}, {"sample": torch.zeros(2, 5)}, {"sample": torch.zeros(2, 4).double()}, {"scale": 1.0}, {"scale": 1},
        {"scale": True}, {"scale": None}, {"extra": (torch.zeros(1), None)}, {"extra": [torch.zeros(1), None]},
        {"extra": (None, torch.zeros(1))}, {"extra": {"a": torch.zeros(1)}}, {"extra": {"b": torch.zeros(1)}},
        {"timestep": 5}, {"timestep": 5.0}, {"other": 5},
    ]  # fmt: skip
    assert len({signature(**call) for call in calls}) == len(calls)
    assert signature(timestep=5) == signature(timestep=6), "a graph for each timestep"
    assert signature(scale=float("nan")) == signature(scale=float("nan"))
    for odd in (object(), torch.zeros(2).to_sparse(), lambda: 0):
        with pytest.raises(OpaqueError):
            signature(odd=odd)
    with pytest.raises(OpaqueError):
        Call.of({"scale": 1.0})


@pytest.mark.parametrize("as_tuple", [True, False])
def test_what_is_returned_has_its_type(as_tuple: bool) -> None:
    model = unet()
    named = {"sample": torch.ones(1, 4, 8, 8), "timestep": 3, "encoder_hidden_states": torch.ones(1, 6, 16)}
    call = Call.of({**named, "return_dict": not as_tuple})
    with torch.no_grad():
        flat = Flat(model, call.template, [tensor.dtype for tensor in call.tensors])
        returned, _ = call.template.output(list(flat(*call.tensors)))
        expected = model(**named).sample
    assert type(returned) is (tuple if as_tuple else UNet2DConditionOutput)
    assert torch.equal(returned[0], expected)


def test_digests_follow_everything_that_is_computed() -> None:
    model = unet()
    first = digest(model)
    assert first == digest(model) == digest(unet()) and first is not None
    seen = {first}
    for change in (
        lambda: model.conv_in.weight.data.view(-1)[5].add_(1e-6),
        lambda: model.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4),
        lambda: model.train(),
        lambda: setattr(model.mid_block.resnets[0], "output_scale_factor", 2.0),
        lambda: setattr(model.mid_block.resnets[0], "nonlinearity", torch.nn.ReLU()),
        lambda: model.half(),
    ):
        change()
        seen.add(digest(model))
    assert len(seen) == 7
    model.mid_block.resnets[0].time_of_day = lambda: 0
    assert digest(model) is None
