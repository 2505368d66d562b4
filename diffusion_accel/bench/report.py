"""A benchmark as text: Markdown, and one HTML page with images and a plot, that needs no other file."""

from __future__ import annotations

import json
import math
from pathlib import Path

from markupsafe import Markup

from diffusion_accel.io import printable, replacing
from diffusion_accel.measure import html
from diffusion_accel.measure.fidelity import EQUAL, decibels
from diffusion_accel.measure.grids import data_url

from .result import Benchmark, Row

COLUMNS = ("entry", "time ratio", "FLOP ratio", "peak MiB", "PSNR dB", "worst decile", "SSIM", "to converged dB")
COLOURS = {"fewer-steps": "#8a8a8a", "anchor": "#bbbbbb", "baseline": "#000000"}
PALETTE = ("#0b6fb8", "#d1495b", "#2a9d5c", "#8e5bb5", "#e08a1e", "#3aa7a3", "#9c6b3f")


def cells(row: Row) -> list[str]:
    """A row of the table, a text for each of `COLUMNS`."""

    def number(value: float | None, form: str = ".2f") -> str:
        return "–" if value is None else format(value, form)

    def psnr(value: float | None) -> str:
        return "–" if value is None else decibels(value, "")

    if row.failed:
        return [row.name, f"failed: {row.failed}", *[""] * (len(COLUMNS) - 2)]
    median, worst = row.psnr or (None, None)
    return [
        row.name,
        number(row.time_ratio),
        number(row.flop_ratio),
        number(row.peak_mib, ".0f"),
        psnr(median),
        psnr(worst),
        number(row.ssim[0] if row.ssim else None, ".4f"),
        psnr(row.psnr_converged),
    ]


def heading(result: Benchmark) -> str:
    """What was measured, on what, in a sentence."""
    job, machine = result.job, result.machine
    what = [f"{job.model}, {job.steps} steps", job.scheduler or "the model's scheduler"]
    what += [f"{k.replace('_', ' ')} {v:g}" for k, v in job.options.items() if v is not None]
    return (
        f"{printable(', '.join(what))}; {len(job.prompts)} prompts; times of one image, {result.rounds} interleaved "
        f"rounds; "
        f"{machine['cpu']}, {machine['device']}, {machine['threads']} threads, torch {machine['torch']}."
    )


def legend(result: Benchmark) -> str:
    """What the columns mean, in two sentences."""
    goal = any(row.psnr_converged is not None for row in result.rows)
    more = "; to converged: PSNR to what many steps of a good solver draw" if goal else ""
    return (
        "Ratios are the baseline's time and work (FLOPs) over the entry's: 2.00 is twice as fast, half of the work. "
        "PSNR (median and worst decile, dB) and SSIM compare with the images of the baseline: more is nearer, equal is "
        f"the same image{more}."
    )


def markdown(result: Benchmark) -> str:
    """The table, between its heading and what its columns mean."""
    lines = [heading(result), "", f"| {' | '.join(COLUMNS)} |", f"|{' --- |' * len(COLUMNS)}"]
    shown = [[printable(cell).replace("|", "\\|") for cell in cells(row)] for row in result.rows]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in shown), "", legend(result)]) + "\n"


def pareto(rows: list[Row]) -> list[Row]:
    """The rows than which none is both faster and nearer, fastest last."""
    shown = [row for row in rows if row.psnr and row.time_ratio and row.psnr[0] < EQUAL]
    front, best = [], -math.inf
    for row in sorted(shown, key=lambda r: (-(r.time_ratio or 0), -(r.psnr or [0])[0])):
        assert row.psnr is not None
        if row.psnr[0] > best:
            front.append(row)
            best = row.psnr[0]
    return front[::-1]


def write(result: Benchmark, kind: str, path: str | Path) -> None:
    """Write a benchmark as "html", "plot" (SVG), "json" or "markdown"; the file is complete or not there."""
    texts = {
        "html": lambda: page(result),
        "plot": lambda: plot(result, "psnr", "PSNR to the baseline, dB"),
        "json": lambda: json.dumps(result.to_dict(), indent=1) + "\n",
        "markdown": lambda: markdown(result),
    }
    with replacing(Path(path)) as temporary:
        temporary.write_text(texts[kind](), encoding="utf-8")


# ---------------------------------------------------------------------- HTML
def page(result: Benchmark) -> str:
    """The whole benchmark as one HTML page."""
    plots = [plot(result, "psnr", "PSNR to the baseline, dB")]
    if any(row.psnr_converged is not None for row in result.rows):
        plots.append(plot(result, "psnr_converged", "PSNR to many steps of a good solver, dB"))
    shown = [(row.name, row.images[:SHOWN]) for row in result.rows if row.images is not None]
    return html.page(
        f"diffusion-accel: {result.job.model}",
        PAGE,
        heading=heading(result),
        legend=legend(result),
        families=families_of(result.rows),
        plots=[Markup(svg) for svg in plots if svg],
        columns=COLUMNS,
        rows=[(colour_of(row, result), cells(row)) for row in result.rows],
        images=html.image_table([(name, [data_url(image) for image in images]) for name, images in shown]),
    )


def colour_of(row: Row, result: Benchmark) -> str:
    """The colour of a row's kind in the plots and the table."""
    if row.kind in COLOURS:
        return COLOURS[row.kind]
    kinds = list(dict.fromkeys(r.kind for r in result.rows if r.kind not in COLOURS))
    return PALETTE[kinds.index(row.kind) % len(PALETTE)]


def value_of(row: Row, key: str) -> float | None:
    """The median of a row's fidelity; None where there is none, or where the images are equal."""
    value = getattr(row, key)
    value = value[0] if isinstance(value, list) else value
    return None if value is None or value >= EQUAL else value


def families_of(rows: list[Row]) -> dict[str, list[Row]]:
    """The rows of each tuned family, the slowest first."""
    found: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.time_ratio or 0.0):
        if row.family is not None:
            found.setdefault(row.family, []).append(row)
    return found


def plot(result: Benchmark, key: str, label: str) -> str:
    """Speed against fidelity as SVG, with the Pareto front of the fidelity to the baseline and a line through the plans
    of each tuned family; "" if nothing is to show.

    Args:
        key: "psnr" or "psnr_converged".
        label: of the vertical axis.
    """
    points = [(row, row.time_ratio, value_of(row, key)) for row in result.rows]
    shown = [(row, x, y) for row, x, y in points if x and y is not None]
    if not shown:
        return ""
    places = {row.name: (x, y) for row, x, y in shown}
    axes = Axes([x for _, x, _ in shown], [y for *_, y in shown], label)
    if key == "psnr":
        front = [axes.at(row.time_ratio or 1, (row.psnr or [0])[0]) for row in pareto(result.rows)]
        axes.svg.add("polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in front), class_="front")
    for line in families_of([row for row, *_ in shown]).values():
        corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in (axes.at(*places[row.name]) for row in line))
        axes.svg.add("polyline", points=corners, class_="family", stroke=colour_of(line[0], result))
    for row, x, y in shown:
        across, down = axes.at(x, y)
        tip = f"{row.name}: {x:.2f}x, {y:.1f} dB"
        axes.svg.add("circle", cx=across, cy=down, r="5", fill=colour_of(row, result), tip=tip)
        if row.kind not in ("anchor", "baseline"):
            side, anchor = (8, "start") if across < axes.svg.width * 0.75 else (-8, "end")
            name = row.name.replace("fewer-steps", "steps")
            axes.svg.text(across + side, down + 4, name, anchor, class_="name")
    return str(axes.svg)


TIMES, FASTER = "times as fast", (1, 1.5, 2, 3, 4, 5, 6, 8, 10, 15, 20)


class Axes:
    """The frame of a plot: times as fast, or whatever `across` says, on a logarithmic scale, against decibels.

    Args:
        xs: of the points, above 0.
        ys: of the points.
        label: of the upright axis.
        across: what is on the other one.
        ticks: of it; with "x" behind them where they are times.
    """

    edge, margin = 56, 20

    def __init__(
        self, xs: list[float], ys: list[float], label: str, across: str = TIMES, ticks: tuple[float, ...] = FASTER
    ) -> None:
        self.svg = html.Svg(640, 400, label, SVG_STYLE)
        logs = [math.log(x) for x in xs]
        self.x = min(*([0.0] if across == TIMES else []), *logs, max(logs)), max(logs) + 0.05
        self.y = min(ys) - 1, max(ys) + 1
        left, right = self.edge, self.svg.width - self.margin
        top, bottom = self.margin, self.svg.height - self.edge
        for tick in ticks:
            if self.x[0] <= math.log(tick) <= self.x[1]:
                x, _ = self.at(tick, self.y[0])
                self.svg.add("line", x1=x, y1=top, x2=x, y2=bottom, class_="grid")
                self.svg.text(x, bottom + 16, f"{tick:g}x" if across == TIMES else f"{tick:g}", "middle")
        step = 5 if self.y[1] - self.y[0] > 12 else 1
        for tick in range(math.ceil(self.y[0] / step) * step, math.floor(self.y[1]) + 1, step):
            _, y = self.at(1, tick)
            self.svg.add("line", x1=left, y1=y, x2=right, y2=y, class_="grid")
            self.svg.text(left - 6, y + 4, str(tick), "end")
        middle = self.svg.height / 2
        self.svg.text(self.svg.width / 2, self.svg.height - 12, across, "middle")
        self.svg.text(14, middle, label, "middle", transform=f"rotate(-90 14 {middle:g})")

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where a point is drawn."""
        (x0, x1), (y0, y1) = self.x, self.y
        across = (math.log(x) - x0) / max(1e-9, x1 - x0)
        width, height = self.svg.width - self.edge - self.margin, self.svg.height - self.edge - self.margin
        return self.edge + across * width, self.svg.height - self.edge - (y - y0) / (y1 - y0) * height


SHOWN = 6  # images of each row
SVG_STYLE = (
    "text { font: 12px sans-serif; fill: #333 } .name { font-size: 10px } .grid { stroke: #e5e5e5 } "
    ".front { fill: none; stroke: #999; stroke-dasharray: 4 } .family { fill: none; stroke-width: 1.5 }"
)
PAGE = """<p>{{ heading }}</p>
{% for plot in plots %}<figure>{{ plot }}</figure>{% endfor %}
<p>The dashed line is the Pareto front: nothing measured is both faster and nearer.
{%- if families %} A solid line joins the plans of one tuned family.{% endif %}</p>
<table><thead><tr>{% for name in columns %}<th>{{ name }}</th>{% endfor %}</tr></thead><tbody>
{% for colour, cells in rows %}
<tr><td><span style="color:{{ colour }}">&#9632;</span> {{ cells[0] }}</td>
{%- for cell in cells[1:] %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table>
<p>{{ legend }}</p>
{{ images }}
"""
