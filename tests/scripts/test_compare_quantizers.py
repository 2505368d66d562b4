"""The parts of the comparison of quantizers that need no model: sizes, GGUF's weights, the figure."""

from __future__ import annotations

import importlib
from xml.etree import ElementTree

import pytest
import torch

compare = importlib.import_module("compare_quantizers")  # of scripts/, which pytest's settings put on the path


def test_sizes() -> None:
    model = torch.nn.Linear(8, 4)
    assert compare.size_of_model(model) == 4 * (32 + 4)
    assert compare.size_of_model(model.half()) == 2 * (32 + 4)


def test_gguf() -> None:
    """What its own routines read back of each row of weights; what is no multiple of 32 stays as it is."""
    quants = pytest.importorskip("gguf.quants")
    from gguf import GGMLQuantizationType

    model = torch.nn.Sequential(torch.nn.Conv2d(32, 4, 3), torch.nn.Linear(16, 4))
    conv, linear = (layer.weight.detach().clone() for layer in model)
    with torch.no_grad():
        changed, size = compare.gguf("Q8_0")(model)
    kind = GGMLQuantizationType.Q8_0
    wanted = quants.dequantize(quants.quantize(conv.flatten(1).numpy(), kind), kind)
    assert torch.equal(changed[0].weight.flatten(1), torch.from_numpy(wanted)) and torch.equal(
        changed[1].weight, linear
    )
    assert size == 4 * 288 * 34 // 32 + 4 * (4 + 64 + 4)


def test_the_figure() -> None:
    """The dashed line joins what nothing smaller is nearer than."""
    points = [("ours: a", 0.14, 44.0), ("b", 0.19, 31.0), ("ours: c", 0.26, 53.0), ("d", 0.3, 53.0)]
    drawing = ElementTree.fromstring(compare.plot([{"name": n, "size": x, "psnr": y} for n, x, y in points]))
    kinds = {kind: [e for e in drawing.iter() if e.tag.endswith(kind)] for kind in ("circle", "polyline", "text")}
    assert len(kinds["circle"]) == 4 and {e.get("fill") for e in kinds["circle"]} == {"#c33", "#47c"}
    assert len((kinds["polyline"][0].get("points") or "").split()) == 2
    assert {"of float32", "0.2", *(n for n, *_ in points)} <= {e.text for e in kinds["text"]}
