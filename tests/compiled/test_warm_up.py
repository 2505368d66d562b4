"""Graphs of expected batches and sizes, made before the first request."""

from __future__ import annotations

import pytest
import torch
from graph_tools import of
from zoo import run, sd

from diffusion_accel import Compiled, ConfigurationError, accelerate
from diffusion_accel.compiled import warm_up


@pytest.mark.slow
def test_no_call_of_what_was_warmed_up_compiles() -> None:
    pytest.importorskip("openvino")
    pipe, call = sd()
    two = {**call, "num_images_per_prompt": 2, "height": 16, "width": 16}
    plain = run(pipe, two, 2)
    accelerate(pipe, Compiled(cache=False, parts="denoiser"))
    pipe.set_progress_bar_config(disable=True)
    made = warm_up(pipe, batches=(1, 2), sizes=[(16, 16), (32, 16)], num_inference_steps=1, **call)
    assert made["graphs_compiled"] == 4 and made["graphs_loaded"] == 0 and made["compile_seconds"] > 0
    for height in (16, 32):
        for batch in (1, 2):
            found = run(pipe, {**call, "num_images_per_prompt": batch, "height": height, "width": 16}, 2)
            assert of(pipe)["graphs_compiled"] == 0 and of(pipe)["graph_calls"] == 2
            assert found.shape[0] == batch
    torch.testing.assert_close(run(pipe, two, 2), plain, rtol=1e-3, atol=1e-3)
    assert warm_up(pipe, batches=(2,), sizes=[(16, 16)], num_inference_steps=1, **call)["graphs_compiled"] == 0


def test_what_cannot_be_warmed_up_is_refused() -> None:
    pipe, call = sd()
    with pytest.raises(ConfigurationError, match=r"accelerate\(pipe, Compiled\(\)\) first"):
        warm_up(pipe, **call)
    accelerate(pipe, Compiled(engine="eager"))
    with pytest.raises(ConfigurationError, match="batches must be a whole number of at least 1, got 0"):
        warm_up(pipe, batches=(0,), **call)
