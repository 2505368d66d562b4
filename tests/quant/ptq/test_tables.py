"""What is quantized besides weights and inputs of layers: attention probabilities, embedding tables."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import zoo
from quantized import TINY, Prompted

from diffusion_accel.quant.model import set_runtime, tables
from diffusion_accel.quant.ptq.run import quantize_denoiser


@pytest.mark.slow
def test_softmax_and_attention_grids(tmp_path: Path) -> None:
    answers: dict[int | None, torch.Tensor] = {}
    for bits in (None, 16, 4):
        pipe, call = zoo.sd()
        settings = replace(TINY, weight_bits=8, activation_bits=16, attention_bits=None, softmax_bits=bits)
        run = quantize_denoiser(Prompted(pipe, call), settings, tmp_path / str(bits))
        set_runtime(pipe, "simulated")
        rows = run.heldout.bucket(0)
        answers[bits] = rows.run(pipe.unet)
        if bits is not None:
            assert len(run.spec.softmax or {}) == sum(n.endswith("to_q") for n in run.layers())
            pipe.unet.save_pretrained(tmp_path / f"saved{bits}")
            again = type(pipe.unet).from_pretrained(tmp_path / f"saved{bits}")
            set_runtime(again, "simulated")
            assert torch.equal(rows.run(again), answers[bits])
    assert (answers[4] - answers[None]).norm() > 20 * (answers[16] - answers[None]).norm()
    assert (answers[4] - answers[None]).norm() < 0.1 * answers[None].norm()


def test_embedding_tables_that_matter_are_quantized_by_row(tmp_path: Path) -> None:
    pipe, call = zoo.dit()
    model = pipe.transformer
    plain = {n: m.weight.detach().clone() for n, m in model.named_modules() if type(m) is torch.nn.Embedding}
    whole = sum(p.numel() for p in model.parameters())
    assert sum(t.numel() for t in plain.values()) > 0.5 * whole
    run = quantize_denoiser(Prompted(pipe, call), replace(TINY, weight_bits=8), tmp_path / "work")
    layers = run.layers()
    for name, weight in plain.items():
        table = layers[name]
        assert isinstance(table, torch.nn.Embedding) and table.spec.sqnr is not None and table.spec.sqnr > 35
        assert ((table.weight - weight).abs() <= 0.5001 * table.weight_scale.T + 0.2 * weight.abs()).all()
        labels = torch.tensor([[3, 1000], [0, 3]])
        assert torch.equal(table(labels), table.weight[labels].clone()) and table(labels).shape == (2, 2, 16)
    model.save_pretrained(tmp_path / "saved")
    size = (tmp_path / "saved" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert size < 0.5 * 4 * whole  # of rows of 16 values, with 5 bytes for each grid
    again = type(model).from_pretrained(tmp_path / "saved")
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    for one in (model, again):
        set_runtime(one, "simulated")
    rows = run.heldout.bucket(0)
    assert torch.equal(rows.run(model), rows.run(again))
    run.restore()
    assert all(torch.equal(model.get_submodule(n).weight, w) for n, w in plain.items())
    small, _ = zoo.sd()
    small.unet.class_embedding = torch.nn.Embedding(2, 8)
    assert not tables(small.unet)  # less than a hundredth
