"""OpenVINO's graphs: the images of torch, restored from disk, never those of other weights."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from graph_tools import agrees_after_changes, close, of
from laws import Stop, stop_at, traces
from zoo import ZOO, run, sd

from diffusion_accel import Compiled, Reuse, UnsupportedPipelineError, accelerate
from diffusion_accel.compiled import openvino_engine, store
from diffusion_accel.compiled.graphs import COUNTERS, Graphs

pytest.importorskip("openvino")

FLOAT32 = Compiled(cache=False, parts="denoiser+vae+controlnet")


def capabilities() -> list[str]:
    import openvino

    return openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@pytest.mark.sampled(4)
@pytest.mark.parametrize("kind", ["sd_batch", "img2img", "sdxl", "deepfloyd_if", "controlnets", "unet2d_skip", "svd"])
def test_the_images_are_those_of_torch(kind: str) -> None:
    """Each kind of conditioning, of outputs and of VAE; twice the same bits; off, and removed, as before."""
    pipe, call = ZOO[kind]()
    base = run(pipe, call, 4)
    accelerate(pipe, FLOAT32)
    first = run(pipe, call, 4)
    close(first, base)
    assert of(pipe)["graph_calls"] and not of(pipe)["eager_calls"]
    assert torch.equal(run(pipe, call, 4), first) and not traces(pipe)
    pipe.acceleration.disable()
    assert torch.equal(run(pipe, call, 4), base)
    pipe.acceleration.remove()
    assert torch.equal(run(pipe, call, 4), base) and not traces(pipe)


def test_text_encoders_return_what_they_returned() -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = CLIPTextModel(CLIPTextConfig(vocab_size=50, max_position_embeddings=6, **sizes)).eval()
    graphs, counters = Graphs(FLOAT32), dict.fromkeys(COUNTERS, 0.0)
    with torch.no_grad():
        for seed in range(3):
            tokens = torch.randint(0, 50, (2, 6), generator=torch.Generator().manual_seed(seed))
            options = {"attention_mask": None}
            expected = model(tokens, **options)
            found = graphs.run(model, model.forward, (tokens,), options, counters)
            assert type(found) is type(expected) and found.keys() == expected.keys()
            close(found.last_hidden_state, expected.last_hidden_state)
            close(found.pooler_output, expected.pooler_output)
    assert counters["graph_calls"] == 3 and counters["graphs_compiled"] == 1


def test_an_interrupted_call_leaves_nothing_behind() -> None:
    pipe, call = sd()
    accelerate(pipe, FLOAT32)
    first = run(pipe, call, 4)
    with pytest.raises(Stop):
        run(pipe, call, 4, callback_on_step_end=stop_at(1, Stop))
    assert not traces(pipe) and torch.equal(run(pipe, call, 4), first)


def test_bfloat16_is_near() -> None:
    pipe, call = sd()
    base = run(pipe, call, 4)
    if "BF16" not in capabilities():
        with pytest.raises(UnsupportedPipelineError, match="CPU does not compute in bfloat16 here; it can float32"):
            accelerate(pipe, Compiled(precision="bf16", cache=False))
        return
    accelerate(pipe, Compiled(precision="bf16", cache=False))
    near = run(pipe, call, 4)
    close(near, base, 0.05)
    assert not torch.equal(near, base) and of(pipe)["graph_calls"] == 4


def test_models_in_half_precision_keep_their_type() -> None:
    pipe, call = sd()
    pipe.to(torch.bfloat16)
    half = {k: v.bfloat16() if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    base = run(pipe, half, 3)
    accelerate(pipe, FLOAT32)
    close(run(pipe, half, 3), base, 0.05)
    assert of(pipe)["graph_calls"] == 3  # in float32 where the CPU has no bfloat16


def test_with_held_steps_the_images_are_those_of_the_plan() -> None:
    pipe, call = sd()
    held = run(accelerate(pipe, Reuse(plan="hold:2")), call, 6)
    accelerate(pipe, FLOAT32)
    close(run(pipe, call, 6), held)
    assert of(pipe)["graph_calls"] == 3


@pytest.mark.slow
def test_no_graph_is_stale() -> None:
    shape = ((1, 8), torch.float32)
    changes = ("in place", "lora", "scale", "no lora", "state")
    agrees_after_changes(FLOAT32, [(change, *shape) for change in changes], 1e-4)


@pytest.mark.slow
def test_a_stored_graph_is_used_by_the_next_start(tmp_path: Any, monkeypatch: Any) -> None:
    """Of the same weights and settings only; what is damaged is compiled again."""
    monkeypatch.setenv(store.VARIABLE, str(tmp_path))
    feature = Compiled(parts="denoiser")

    def counted(change: float = 1.0) -> tuple[torch.Tensor, dict[str, float]]:
        pipe, call = sd()
        pipe.unet.conv_in.weight.data.mul_(change)
        return run(accelerate(pipe, feature), call, 3), of(pipe)

    first, counts = counted()
    assert counts["graphs_compiled"] == 1 and not counts["graphs_loaded"] and len([*tmp_path.iterdir()]) == 1
    again, counts = counted()
    assert counts["graphs_loaded"] == 1 and not counts["graphs_compiled"] and torch.equal(first, again)
    other, counts = counted(1.0 + 2**-10)
    assert counts["graphs_compiled"] == 1 and not torch.equal(first, other)
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes()[:-1000])
    again, counts = counted()
    assert counts["graphs_compiled"] == 1 and torch.equal(first, again)


def test_what_is_not_there_is_refused_in_one_line(monkeypatch: Any) -> None:
    pipe, _ = sd()
    with pytest.raises(UnsupportedPipelineError, match="openvino has no device NPU here; it has .*CPU"):
        accelerate(pipe, Compiled(device="NPU"))
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    with pytest.raises(UnsupportedPipelineError, match="its unet is compiled or wrapped already"):
        accelerate(pipe, Compiled())
    pipe, _ = sd()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UnsupportedPipelineError, match=r"openvino is not installed \(pip install 'diffusion-accel\["):
        accelerate(pipe, Compiled())


def test_nothing_is_reported_over_the_network() -> None:
    """`openvino.convert_model` reports its use; the reader of traces below it does not."""
    source = openvino_engine.__file__
    with open(source, encoding="utf-8") as file:
        assert "convert_model(" not in file.read()


def test_compiling_is_said(caplog: Any) -> None:
    pipe, call = sd()
    accelerate(pipe, FLOAT32)
    with caplog.at_level(logging.INFO, logger="diffusion_accel"):
        run(pipe, call, 2)
    assert "compiling UNet2DConditionModel for 2×4×8×8, 1, 2×6×16 (openvino)" in caplog.text
