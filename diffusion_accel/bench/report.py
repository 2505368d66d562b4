"""A benchmark as text: Markdown, and one HTML page with images and a plot, that needs no other file."""

from __future__ import annotations

import html
import math

from diffusion_accel.io import printable
from diffusion_accel.measure.grids import data_url

from .run import Result, Row

COLUMNS = ("entry", "time ratio", "FLOP ratio", "peak MiB", "PSNR dB", "worst decile", "SSIM", "to converged dB")
COLOURS = {"fewer-steps": "#8a8a8a", "anchor": "#bbbbbb", "baseline": "#000000"}
PALETTE = ("#0b6fb8", "#d1495b", "#2a9d5c", "#8e5bb5", "#e08a1e", "#3aa7a3", "#9c6b3f")


def cells(row: Row) -> list[str]:
    """A row of the table."""

    def number(value: float | None, form: str = ".2f") -> str:
        return "–" if value is None else format(value, form)

    def decibels(value: float | None) -> str:
        return "–" if value is None else "equal" if value >= 200 else f"{value:.1f}"

    if row.failed:
        return [row.name, f"failed: {row.failed}", *[""] * (len(COLUMNS) - 2)]
    median, worst = row.psnr or (None, None)
    return [
        row.name,
        number(row.time_ratio),
        number(row.flop_ratio),
        number(row.peak_mib, ".0f"),
        decibels(median),
        decibels(worst),
        number(row.ssim[0] if row.ssim else None, ".4f"),
        decibels(row.psnr_converged),
    ]


def heading(result: Result) -> str:
    job, machine = result.job, result.machine
    what = [f"{job.model}, {job.steps} steps", job.scheduler or "the model's scheduler"]
    what += [f"{k.replace('_', ' ')} {v:g}" for k, v in job.options.items() if v is not None]
    return (
        f"{printable(', '.join(what))}; {len(job.prompts)} prompts; times of one image, {result.rounds} interleaved "
        f"rounds; "
        f"{machine['cpu']}, {machine['device']}, {machine['threads']} threads, torch {machine['torch']}."
    )


def markdown(result: Result) -> str:
    lines = [heading(result), "", f"| {' | '.join(COLUMNS)} |", f"|{' --- |' * len(COLUMNS)}"]
    shown = [[printable(cell).replace("|", "\\|") for cell in cells(row)] for row in result.rows]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in shown]) + "\n"


def pareto(rows: list[Row]) -> list[Row]:
    """The rows than which none is both faster and nearer, fastest last."""
    shown = [row for row in rows if row.psnr and row.time_ratio and row.psnr[0] < 200]
    front, best = [], -math.inf
    for row in sorted(shown, key=lambda r: (-(r.time_ratio or 0), -(r.psnr or [0])[0])):
        assert row.psnr is not None
        if row.psnr[0] > best:
            front.append(row)
            best = row.psnr[0]
    return front[::-1]


# ---------------------------------------------------------------------- HTML
def escape(text: str) -> str:
    """Text for HTML and SVG, which may hold no control characters either."""
    return html.escape(printable(text))


def page(result: Result) -> str:
    """The whole benchmark as one HTML page."""
    head = "".join(f"<th>{escape(name)}</th>" for name in COLUMNS)
    body = []
    for row in result.rows:
        first, *rest = cells(row)
        colour = colour_of(row, result)
        body.append(
            f'<tr><td><span style="color:{colour}">&#9632;</span> {escape(first)}</td>'
            + "".join(f"<td>{escape(cell)}</td>" for cell in rest)
            + "</tr>"
        )
    plots = [plot(result, "psnr", "PSNR to the baseline, dB")]
    if any(row.psnr_converged is not None for row in result.rows):
        plots.append(plot(result, "psnr_converged", "PSNR to many steps of a good solver, dB"))
    return PAGE.format(
        title=escape(f"diffusion-accel: {result.job.model}"),
        heading=escape(heading(result)),
        plots="".join(f"<figure>{svg}</figure>" for svg in plots),
        head=head,
        body="".join(body),
        images=images(result),
    )


def colour_of(row: Row, result: Result) -> str:
    if row.kind in COLOURS:
        return COLOURS[row.kind]
    kinds = list(dict.fromkeys(r.kind for r in result.rows if r.kind not in COLOURS))
    return PALETTE[kinds.index(row.kind) % len(PALETTE)]


def value_of(row: Row, key: str) -> float | None:
    value = getattr(row, key)
    value = value[0] if isinstance(value, list) else value
    return None if value is None or value >= 200 else value


def plot(result: Result, key: str, label: str) -> str:
    """Speed against fidelity as SVG, with the Pareto front of the fidelity to the baseline."""
    points = [(row, row.time_ratio, value_of(row, key)) for row in result.rows if row.time_ratio]
    shown = [(row, x, y) for row, x, y in points if y is not None]
    if not shown:
        return ""
    width, height, edge = 640, 400, 56
    xs, ys = [math.log(x) for _, x, _ in shown], [y for *_, y in shown]
    x0, x1 = min(0.0, *xs), max(xs) + 0.05
    y0, y1 = min(ys) - 1, max(ys) + 1

    def at(x: float, y: float) -> tuple[float, float]:
        across = (math.log(x) - x0) / max(1e-9, x1 - x0)
        return edge + across * (width - edge - 20), height - edge - (y - y0) / (y1 - y0) * (height - edge - 20)

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="{label}">']
    parts.append(f"<style>{SVG_STYLE}</style>")
    for tick in (1, 1.5, 2, 3, 4, 5, 6, 8, 10, 15, 20):
        if x0 <= math.log(tick) <= x1:
            x, _ = at(tick, y0)
            parts.append(f'<line x1="{x:.1f}" y1="20" x2="{x:.1f}" y2="{height - edge}" class="grid"/>')
            parts.append(f'<text x="{x:.1f}" y="{height - edge + 16}" text-anchor="middle">{tick:g}x</text>')
    step = 5 if y1 - y0 > 12 else 1
    for tick in range(math.ceil(y0 / step) * step, math.floor(y1) + 1, step):
        _, y = at(1, tick)
        parts.append(f'<line x1="{edge}" y1="{y:.1f}" x2="{width - 20}" y2="{y:.1f}" class="grid"/>')
        parts.append(f'<text x="{edge - 6}" y="{y + 4:.1f}" text-anchor="end">{tick}</text>')
    if key == "psnr":
        way = " ".join("{:.1f},{:.1f}".format(*at(r.time_ratio or 1, (r.psnr or [0])[0])) for r in pareto(result.rows))
        parts.append(f'<polyline points="{way}" class="front"/>')
    for row, x, y in shown:
        px, py = at(x or 1, y)
        tip = escape(f"{row.name}: {x:.2f}x, {y:.1f} dB")
        parts.append(
            f'<circle cx="{px:.1f}" cy="{py:.1f}" r="5" fill="{colour_of(row, result)}"><title>{tip}</title></circle>'
        )
        if row.kind not in ("anchor", "baseline"):
            side, anchor = (8, "start") if px < width * 0.75 else (-8, "end")
            name = escape(row.name.replace("fewer-steps", "steps"))
            parts.append(
                f'<text x="{px + side:.1f}" y="{py + 4:.1f}" text-anchor="{anchor}" class="name">{name}</text>'
            )
    parts.append(f'<text x="{width / 2}" y="{height - 12}" text-anchor="middle">times as fast</text>')
    parts.append(
        f'<text x="14" y="{height / 2}" transform="rotate(-90 14 {height / 2})" text-anchor="middle">{label}</text>'
    )
    return f"{''.join(parts)}</svg>"


def images(result: Result, count: int = 6) -> str:
    """The first images of every row."""
    rows = []
    for row in result.rows:
        if row.images is not None:
            shown = "".join(f'<img src="{data_url(image)}" alt="">' for image in row.images[:count])
            rows.append(f"<tr><td>{escape(row.name)}</td><td>{shown}</td></tr>")
    return "".join(rows)


SVG_STYLE = (
    "text { font: 12px sans-serif; fill: #333 } .name { font-size: 10px } .grid { stroke: #e5e5e5 } "
    ".front { fill: none; stroke: #999; stroke-dasharray: 4 }"
)
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1320px; padding: 0 1em; color: #222; }}
figure {{ display: inline-block; width: min(640px, 100%); margin: 0; }}
svg {{ width: 100%; }}
table {{ border-collapse: collapse; margin: 1em 0; }} td, th {{ padding: .25em .7em; text-align: right; }}
td:first-child, th:first-child {{ text-align: left; }} tr:nth-child(even) {{ background: #f6f6f6; }}
img {{ height: 96px; margin: 1px; }} .images td {{ text-align: left; }}
</style></head><body>
<h1>{title}</h1><p>{heading}</p>{plots}
<p>The dashed line is the Pareto front: nothing measured is both faster and nearer.</p>
<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>
<table class="images">{images}</table>
</body></html>
"""
