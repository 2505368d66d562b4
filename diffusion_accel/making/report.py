"""What `make_fast` tried and took: as JSON, as text, as one HTML page."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from diffusion_accel.measure import html
from diffusion_accel.measure.fidelity import decibels
from diffusion_accel.measure.grids import data_url

SHOWN = 16  # images of each row
LEAST = 0.5  # seconds of a stage that is worth a word
ALONE = "every step"  # what is taken where nothing that is faster keeps enough


@dataclass
class FastReport:
    """What was made.

    Attributes:
        folder: the pipeline folder.
        asked: what was asked for: min_psnr (dB), max_size (share of float32).
        tried: by name, what each candidate was measured to do on the prompts by which one was chosen.
        taken: the name of the one that was.
        measured: the same numbers on other prompts, with times; nothing was chosen by them, but that what keeps less
            than was asked for is passed by.
        size: of the denoiser's weights on disk, as a share of float32.
        call: arguments of a call for which all of this holds.
        prompts: how many fitted, chose and checked.
        seconds: by stage.
        notes: what could not be tried, and why.
        images: as they were and as they are, for the page.
    """

    folder: str
    asked: dict[str, float | None]
    tried: dict[str, dict[str, Any]] = field(default_factory=dict)
    taken: str = ""
    measured: dict[str, Any] = field(default_factory=dict)
    size: float = 1.0
    call: dict[str, Any] = field(default_factory=dict)
    prompts: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    images: Any = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {key: value for key, value in vars(self).items() if key != "images"}

    def text(self) -> str:
        """A few lines for the terminal."""
        found = self.measured
        lines = [
            f"{self.folder}: {self.taken}; the denoiser takes {self.size:.3f} of its size in float32",
            f"on {found['images']} other prompts: {found['time_ratio']:.2f} times as fast, {found['flop_ratio']:.2f} "
            f"times less work (FLOPs); PSNR to the model as it was {decibels(found['psnr_median'])} (median), "
            f"{decibels(found['psnr_worst_decile'])} (worst decile)",
        ]
        if found["psnr_median"] < (self.asked["min_psnr"] or 0.0):
            lines.append(f"that is less than the {self.asked['min_psnr']:g} dB that it kept where it was chosen")
        faster = {name: seen["psnr_median"] for name, seen in self.tried.items() if name != ALONE}
        if self.taken == ALONE and faster:
            near = max(faster, key=lambda name: faster[name])
            lines.append(
                f"nothing faster was near enough: the nearest, {near}, kept {faster[near]:.1f} dB; a longer budget, "
                "more prompts or a lower min_psnr may help"
            )
        took = ", ".join(f"{stage} {spent:.0f} s" for stage, spent in self.seconds.items() if spent >= LEAST)
        return "\n".join([*lines, *self.notes, *([f"took {took}"] if took else [])])

    def page(self) -> str:
        """The whole report as one HTML page."""
        columns = ("flop_ratio", "psnr_median", "psnr_worst_decile", "ssim_median")
        rows = [(name, *(_cell(key, numbers.get(key)) for key in columns)) for name, numbers in self.tried.items()]
        images = [
            (label, [data_url(image) for image in batch[:SHOWN]])
            for label, batch in zip(("as it was", self.taken), self.images or ((), ()), strict=True)
            if len(batch)
        ]
        asked = ", ".join(
            f"{key.replace('_', ' ')} {value:g}" for key, value in self.asked.items() if value is not None
        )
        return html.page(
            f"made fast: {self.folder}",
            _PAGE,
            summary=self.text().splitlines(),
            asked=asked,
            call=", ".join(f"{key.replace('_', ' ')} {value:g}" for key, value in self.call.items()),
            prompts=", ".join(f"{count} {what}" for what, count in self.prompts.items()),
            images=html.image_table(images),
            rows=sorted(rows, key=lambda row: -row[1]),  # by work
            taken=self.taken,
        )


def _cell(key: str, value: float | None) -> Any:
    """A number as the page has it."""
    return "–" if value is None else decibels(value, "") if key.startswith("psnr") else value


_PAGE = """<p>{% for line in summary %}{{ line }}<br>{% endfor %}</p>
<p>asked for: {{ asked }}; calls with {{ call }}; prompts: {{ prompts }}</p>
{{ images }}
<table><thead><tr><th>tried (on the prompts that choose)</th><th>times less work</th><th>PSNR dB</th>
<th>worst decile</th><th>SSIM</th></tr></thead>
{% for row in rows %}
<tr>{% for cell in row %}<td>{% if loop.first and cell == taken %}<b>{{ cell }}</b>{% else %}{{ cell }}{% endif %}</td>
{% endfor %}</tr>
{% endfor %}
</table>
"""
