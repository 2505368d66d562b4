"""Quantized models as graphs: 8-bit products of an engine, at each timestep's own grids."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from graph_tools import close
from hypothesis import given
from hypothesis import strategies as st
from quantized import TINY, made
from quantized_layers import LAYERS, TIMES, conv, inputs, on_grid
from quantized_layers import made as made_layer

from diffusion_accel import Compiled
from diffusion_accel.compiled.digest import digest
from diffusion_accel.compiled.graphs import COUNTERS, Graphs
from diffusion_accel.inside import making_a_graph
from diffusion_accel.pipelines.loading import load_pipeline
from diffusion_accel.quant.kernels import in_graph, window_sums
from diffusion_accel.quant.layers import Simulated
from diffusion_accel.quant.model import set_runtime


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(("bits", "split"), [(4, 0), (8, 5)])
def test_what_is_traced_computes_what_the_simulation_computes(kind: str, bits: int, split: int) -> None:
    layer = made_layer(LAYERS[kind](), weight_bits=bits, split=split)
    for times in (*TIMES, torch.tensor([900.0, 100.0])):
        layer.buckets.select(times)
        x = on_grid(layer, inputs(layer))
        expected = Simulated()(layer, x)
        with making_a_graph():
            layer.buckets.select(times)
            assert layer.buckets.number is None
            found = in_graph(layer, x)
        assert torch.allclose(found, expected, atol=2e-5 * float(expected.abs().max()))


SIZES = st.tuples(st.integers(1, 3), st.integers(1, 3))


@given(kernel=SIZES, stride=SIZES, dilation=SIZES, padding=st.tuples(st.integers(0, 2), st.integers(0, 2)))
def test_sums_over_windows_are_those_of_an_image_of_ones(**shape: Any) -> None:
    layer = conv(kernel_size=shape.pop("kernel"), **shape, bias=False)
    with torch.no_grad():
        expected = layer(torch.ones(1, 12, 9, 8))
        found = torch.from_numpy(window_sums(layer, layer.weight.numpy(), (9, 8)))
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: Any) -> Any:
    return load_pipeline(str(made(Path(tmp_path_factory.mktemp("quantized")), TINY))).unet


@pytest.mark.sampled(2)
@pytest.mark.parametrize("runtime", ["integer", "dequantize"])
def test_openvino_follows_the_timestep_and_notices_other_codes(tiny: Any, runtime: str) -> None:
    pytest.importorskip("openvino")
    model = copy.deepcopy(tiny)
    set_runtime(model, runtime)
    found, bound = Graphs(Compiled(cache=False)), 1e-4 if runtime == "dequantize" else 0.05
    first = digest(model)
    assert first is not None
    changes = (None, lambda: model.conv_out.weight_scale.mul_(2))
    for number, change in enumerate(changes if runtime == "dequantize" else changes[:1]):
        counters = dict.fromkeys(COUNTERS, 0.0)
        if change is not None:
            change()
        for seed, time in enumerate((950, 500, 500, 10)):
            x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
            with torch.no_grad():
                expected = model(x, time).sample
                given = found.run(model, model.forward, (x, time), {}, counters).sample
            close(given, expected, bound)
        assert counters["graph_calls"] == 4 and counters["graphs_compiled"] == 1, "compiled again"
        assert (digest(model) == first) == (number == 0), "what is computed is taken for what the model is"
