"""A whole run: every stage brings the model nearer, and what stops it leaves the model as it was."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized import SHORT, WHOLE, Killed, sampler, traces

from diffusion_accel.errors import ConfigurationError
from diffusion_accel.quant.layers import quantized_layers
from diffusion_accel.quant.model import set_runtime
from diffusion_accel.quant.ptq.budget import PROBE_ROWS
from diffusion_accel.quant.ptq.calibration import relative_error
from diffusion_accel.quant.ptq.run import quantize_denoiser


def test_every_stage_brings_the_model_nearer(tmp_path: Path) -> None:
    run = quantize_denoiser(sampler(16), WHOLE, tmp_path)
    error = run.validation
    assert error["learnt rounding, weights only"] < error["nearest, weights only"]
    assert error["finetuned"] < error["quantized"]
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert {entry["stage"] for entry in log} == {"validation", "rounding", "time embedding", "finetuning"}
    model = run.model
    rows = run.heldout.bucket(0)
    quantized = rows.run(model)
    run.restore()
    assert torch.allclose(rows.run(run.denoiser), rows.output, atol=1e-5)
    assert not quantized_layers(model) and "quantization_config" not in model.config
    assert not torch.allclose(quantized, rows.output, atol=1e-3)


def test_what_is_measured_is_what_the_checkpoint_computes(tmp_path: Path) -> None:
    """Grids by channel are stored with fewer digits than they are learnt with; the last error is with those."""
    for stages in (replace(SHORT, activation_bits=4), replace(SHORT, activation_bits=4, rounding=None, finetune=None)):
        name = "finetuned" if stages.finetune else "quantized"
        run = quantize_denoiser(sampler(), stages, tmp_path / name)
        assert {m.spec.compact_grids for n, m in run.layers().items() if n not in ("conv_in", "conv_out")} == {True}

        def error(model: Any, run: Any = run) -> float:
            count = len(run.heldout.timesteps)
            return relative_error(model, [run.heldout.sample(b, PROBE_ROWS, 0) for b in range(count)])

        assert error(run.model) == run.validation[name]
        run.model.save_pretrained(tmp_path / "saved")
        again = type(run.model).from_pretrained(tmp_path / "saved")
        set_runtime(again, "simulated")
        assert error(again) == run.validation[name]


@pytest.mark.slow
def test_a_run_that_is_stopped_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    s = sampler(4)
    s.pipe.unet.train()
    before, plain = traces(s.pipe.unet), s.pipe.unet.state_dict()
    for where in ("validation", "sensitivity", "rounding", "ranges", "finetuning"):

        def stop(what: str, *rest: float, where: str = where) -> None:
            if what.startswith(where):
                raise Killed

        with pytest.raises(Killed):
            quantize_denoiser(s, SHORT, tmp_path, progress=stop)
        assert traces(s.pipe.unet) == before
        assert all(torch.equal(v, plain[k]) for k, v in s.pipe.unet.state_dict().items())


def test_a_run_that_fails_before_any_work_leaves_nothing(tmp_path: Path) -> None:
    broken = sampler(4)
    broken.pipe.unet.register_forward_pre_hook(lambda *a: 1 / 0)
    not_finite = sampler(4)
    not_finite.pipe.unet.conv_norm_out.bias.data[0] = float("nan")
    for s, settings, error, says in (
        (sampler(1), SHORT, ConfigurationError, "too few"),
        (sampler(4), replace(SHORT, bits_budget=2.0), ConfigurationError, "not enough"),
        (not_finite, SHORT, ConfigurationError, "conv_norm_out.bias of the UNet2DModel has values"),
        (broken, SHORT, ZeroDivisionError, "division"),
    ):
        with pytest.raises(error, match=says):
            quantize_denoiser(s, settings, tmp_path / "work")
        assert not list(tmp_path.iterdir())
