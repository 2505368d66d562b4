"""The report as text."""

from __future__ import annotations

from diffusion_accel.quant.ptq.report import QuantizationReport


def test_a_report_says_what_each_error_is_an_error_of() -> None:
    errors = {"nearest, weights only": 0.00146, "quantized": 0.00373}
    report = QuantizationReport("w4a8", "x", {}, bytes={"checkpoint": 1, "float32": 4}, validation=errors, budget=60.0)
    text = report.text()
    assert "0.00146  weights rounded to nearest, inputs as they are" in text
    assert "0.00373  weights and inputs rounded" in text and "of a budget of 60 s" in text
