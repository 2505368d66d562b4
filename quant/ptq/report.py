"""What quantizing a pipeline cost and brought: measured, as JSON, text and one HTML page."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from diffusion_accel.denoisers import find_denoiser
from diffusion_accel.measure import html
from diffusion_accel.measure.fidelity import EQUAL, decibels, fidelity
from diffusion_accel.measure.grids import data_url
from diffusion_accel.measure.sampler import Sampler
from diffusion_accel.measure.timing import interleaved, ratios
from diffusion_accel.quant.layers import quantized_layers
from diffusion_accel.quant.model import RUNTIMES, runtime_report, set_runtime

from .calibration import CalibrationSet

# what the errors after each stage are errors of
_ERRORS = {
    "nearest, weights only": "weights rounded to nearest, inputs as they are",
    "learnt rounding, weights only": "weights rounded as learnt, inputs as they are",
    "quantized": "weights and inputs rounded",
    "finetuned": "weights and inputs rounded, finetuned",
}
_ROWS = 16  # of each timestep, for the error over time


@dataclass
class QuantizationReport:
    """Everything measured about one quantized pipeline.

    Attributes:
        name: such as w4a8.
        folder: the checkpoint.
        layers: bits, size and SQNR (dB) of every quantized layer.
        steps: relative squared error of the prediction at each calibrated timestep, on prompts not calibrated on.
        psnr, ssim: of each image against full precision with the same seed, simulated runtime.
        bytes: of the denoiser's file, and what its parameters take as float32.
        ratio: full-precision time / quantized time of one image, by runtime, interleaved.
        picked: what "auto" picked, by number of layers.
        validation: relative squared error of predictions after each stage.
        search: for a PSNR that was asked for, the median PSNR of each size that was tried ("tried", dB by share of
            float32), the size that was taken ("size_ratio"), and of how many images; else empty.
        seconds: by stage of quantizing.
        peak: most memory the process held, bytes.
        buckets: timesteps with grids of their own; 0: inputs are not quantized.
        budget: seconds that were asked for, or None.
        prompts: how many were calibrated on and kept for validation, of how many.
    """

    name: str
    folder: str
    layers: dict[str, dict[str, Any]]
    steps: dict[str, float] = field(default_factory=dict)
    psnr: list[float] = field(default_factory=list)
    ssim: list[float] = field(default_factory=list)
    bytes: dict[str, int] = field(default_factory=dict)
    ratio: dict[str, float] = field(default_factory=dict)
    picked: dict[str, int] = field(default_factory=dict)
    validation: dict[str, float] = field(default_factory=dict)
    search: dict[str, Any] = field(default_factory=dict)
    losses: dict[str, list[Any]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    peak: int = 0
    buckets: int = 0
    prompts: tuple[int, int] = (0, 0)
    budget: float | None = None
    images: Any = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {k: v for k, v in vars(self).items() if k != "images"}

    def text(self) -> str:
        """A few lines for the terminal."""
        size, full = self.bytes["checkpoint"], self.bytes["float32"]
        grids = f", {self.buckets} buckets of timesteps" if self.buckets else ""
        lines = [f"{self.folder or 'in place'}: {self.name}, {size / 1e6:.2f} MB, {size / full:.3f} of float32{grids}"]
        if self.psnr:
            middle = statistics.median(self.psnr), statistics.median(self.ssim or [0.0])
            lines.append(
                f"PSNR to full precision {decibels(middle[0])}, SSIM {middle[1]:.3f} "
                f"(medians of {len(self.psnr)} images, held-out prompts)"
            )
        if self.search:
            tried = ", ".join(f"{size} {psnr:g} dB" for size, psnr in sorted(self.search["tried"].items()))
            lines.append(f"sizes tried, of float32, medians of {self.search['images']} other images: {tried}")
        if self.validation:
            lines.append(
                "squared error of predictions over their squares, held-out prompts; each line rounds what it says:"
            )
            lines += [f"  {error:.5f}  {_ERRORS.get(what, what)}" for what, error in self.validation.items()]
        if self.ratio:
            times = ", ".join(f"{k} {v:.2f}x" for k, v in self.ratio.items())
            picked = ", ".join(f"{n} layers {what}" for what, n in self.picked.items())
            lines.append(f"speed of one image against float32: {times}; auto picked {picked}")
        took = ", ".join(f"{k} {v:.0f} s" for k, v in self.seconds.items())
        if self.budget is not None:
            took += f", of a budget of {self.budget:.0f} s (loading, grids of weights and writing are not cut)"
            if self.prompts[0] < self.prompts[1]:
                lines.append(f"calibrated on {self.prompts[0]} of {self.prompts[1]} prompts, for the budget")
        lines.append(f"took {took}; peak memory {self.peak / 2**20:.0f} MiB")
        return "\n".join(lines)


def measure(
    full: Sampler, quantized: Sampler, heldout: CalibrationSet, report: QuantizationReport, rounds: int = 5
) -> None:
    """Images, errors over time and interleaved times (`rounds` of them) of a pipeline and its quantized twin, into
    `report`."""
    model = find_denoiser(quantized.pipe)
    assert model is not None
    layers = quantized_layers(model)
    set_runtime(model, "simulated")
    with torch.no_grad():
        for number, timestep in enumerate(heldout.timesteps):
            rows = heldout.sample(number, _ROWS, 0)
            wrong = (rows.run(model).float() - rows.output).square().sum() / rows.output.square().sum()
            report.steps[f"{timestep:g}"] = float(wrong)
        if full.prompts:
            base, ours = full.images(), quantized.images()
            found = fidelity(base, ours)
            report.psnr = [round(min(v, EQUAL), 2) for v in found.psnr]
            report.ssim = [round(v, 4) for v in found.ssim]
            report.images = (base, ours)
            report.ratio, report.picked = _times(full.part(0, 1), quantized.part(0, 1), model, rounds)
    report.layers = {
        name: {
            "shape": list(layer.weight_shape),
            **dict(layer.spec.to_dict().items()),
            "bytes": sum(b.numel() * b.element_size() for n, b in layer.named_buffers(recurse=False) if n[0] != "_"),
        }
        for name, layer in layers.items()
    }


def _times(full: Sampler, quantized: Sampler, model: Any, rounds: int) -> tuple[dict[str, float], dict[str, int]]:
    names = [r for r in RUNTIMES if r != "auto"] + ["auto"]
    picked: dict[str, int] = {}
    keep: dict[str, list[Any]] = {}
    layers = list(quantized_layers(model).values())
    for name in names:  # each runtime keeps its packed weights while the others have their turns
        set_runtime(model, name)
        keep[name] = [layer.runtime for layer in layers]

    @contextmanager
    def runtime_of(name: str) -> Iterator[None]:
        if name in keep:
            for layer, runtime in zip(layers, keep[name], strict=True):
                layer.runtime = runtime
        yield
        if name == "auto":
            picked.clear()
            picked.update(Counter(runtime_report(model).values()))

    calls = {"float32": full.images, **dict.fromkeys(names, quantized.images)}
    seconds = interleaved(calls, rounds, around=runtime_of)
    set_runtime(model)
    base = seconds.pop("float32")
    return {name: round(statistics.median(ratios(base, took)), 3) for name, took in seconds.items()}, picked


# ---------------------------------------------------------------------- HTML
def page(report: QuantizationReport) -> str:
    """The whole report as one HTML page."""
    columns = ("weight_bits", "activation_bits", "sqnr", "sensitivity")
    rows = [
        (name, "x".join(map(str, layer["shape"])), *(layer.get(key, "–") for key in columns))
        for name, layer in sorted(report.layers.items(), key=lambda item: -(item[1].get("sensitivity") or 0))
    ]
    images = [
        (label, [data_url(image) for image in batch[:SHOWN]])
        for label, batch in zip(("float32", report.name), report.images or ((), ()), strict=True)
        if len(batch)
    ]
    return html.page(
        f"quantized: {report.name}",
        PAGE,
        summary=report.text().splitlines(),
        images=html.image_table(images),
        errors=html.bars(report.steps, "relative squared error of the prediction, by timestep") or "",
        rows=rows,
    )


def write(report: QuantizationReport, folder: Path) -> None:
    """report.json and report.html into a folder."""
    (folder / "report.json").write_text(json.dumps(report.to_dict(), indent=1) + "\n", encoding="utf-8")
    (folder / "report.html").write_text(page(report), encoding="utf-8")


SHOWN = 16  # images of each row
PAGE = """<p>{% for line in summary %}{{ line }}<br>{% endfor %}</p>
{{ images }}
<figure>{{ errors }}</figure>
<table><thead><tr><th>layer (most sensitive first)</th><th>shape</th><th>W bits</th><th>A bits</th><th>SQNR dB</th>
<th>sensitivity</th></tr></thead><tbody>
{% for row in rows %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table>
"""
