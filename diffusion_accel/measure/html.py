"""Reports that need no other file: HTML from templates, plots as SVG.

Whatever text goes in, names of files and prompts from outside among it, is text in what comes out: no markup, and no
character that HTML and SVG may not hold.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from typing import Any

import jinja2
from markupsafe import Markup

from diffusion_accel.io import printable

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1320px; padding: 0 1em; color: #222; }
figure { display: inline-block; width: min(640px, 100%); margin: 0; }
svg { width: 100%; }
table { border-collapse: collapse; margin: 1em 0; } td, th { padding: .25em .7em; text-align: right; }
td:first-child, th:first-child { text-align: left; } tr:nth-child(even) { background: #f6f6f6; }
img { height: 96px; margin: 1px; } .images td { text-align: left; }
"""
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title><style>{{ style }}</style></head><body>
<h1>{{ title }}</h1>
{{ body }}
</body></html>
"""
_IMAGES = """<table class="images">
{%- for name, urls in rows %}
<tr><td>{{ name }}</td><td>{% for url in urls %}<img src="{{ url }}" alt="">{% endfor %}</td></tr>
{%- endfor %}
</table>"""


def _finalize(value: Any) -> Any:
    return value if isinstance(value, (int, float)) or hasattr(value, "__html__") else printable(value)


_templates = jinja2.Environment(
    autoescape=True, finalize=_finalize, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
)


def rendered(template: str, **values: Any) -> Markup:
    """A jinja template with values; every text in it is escaped, what another template gave is not."""
    return Markup(_templates.from_string(template).render(**values))


def page(title: str, template: str, **values: Any) -> str:
    """A whole HTML page of one look.

    Args:
        title: of the page, and its first heading.
        template: jinja template of what follows.
        values: what it uses; texts are escaped.
    """
    return str(rendered(_PAGE, title=title, style=Markup(_STYLE), body=rendered(template, **values)))


def image_table(rows: list[tuple[str, list[str]]]) -> Markup:
    """Images in rows behind their names; each image is a URL (`grids.data_url`)."""
    return rendered(_IMAGES, rows=rows)


class Svg:
    """A drawing, element by element."""

    def __init__(self, width: int, height: int, label: str, style: str = "") -> None:
        self.width, self.height = width, height
        given = {"xmlns": "http://www.w3.org/2000/svg", "viewBox": f"0 0 {width} {height}", "role": "img"}
        self._root = ET.Element("svg", given | {"aria-label": printable(label)})
        if style:
            self.add("style", style)

    def add(self, kind: str, text: str | None = None, *, tip: str | None = None, **attributes: Any) -> None:
        """One element.

        Args:
            kind: "line", "rect", "circle", "polyline", "text", …
            text: what it says.
            tip: what is shown when the mouse is over it.
            attributes: of the element; `text_anchor` is text-anchor, `class_` is class; numbers get one digit.
        """
        element = ET.SubElement(self._root, kind)
        for name, value in attributes.items():
            shown = printable(value) if isinstance(value, str) else f"{value:.1f}".removesuffix(".0")
            element.set(name.rstrip("_").replace("_", "-"), shown)
        if text is not None:
            element.text = printable(text)
        if tip is not None:
            ET.SubElement(element, "title").text = printable(tip)

    def text(self, x: float, y: float, text: str, anchor: str = "start", **attributes: Any) -> None:
        """A text, whose "start", "middle" or "end" is at x; y is its base line."""
        self.add("text", text, x=x, y=y, text_anchor=anchor, **attributes)

    def __str__(self) -> str:
        return ET.tostring(self._root, encoding="unicode")

    def __html__(self) -> str:
        return str(self)


def bars(values: dict[str, float], label: str) -> Svg | None:
    """A bar for each value, under its name; None if there are none."""
    if not values:
        return None
    svg, top = Svg(640, 220, label), max(values.values()) or 1.0
    each = (svg.width - 60) / len(values)
    for i, (name, value) in enumerate(values.items()):
        tall = value / top * (svg.height - 70)
        x, y = 50 + i * each, svg.height - 40 - tall
        svg.add("rect", x=x, y=y, width=each * 0.8, height=tall, fill="#47c", tip=f"{name}: {value:.5f}")
        if i % max(1, len(values) // 8) == 0:
            svg.text(x, svg.height - 24, name, font_size="11")
    svg.text(4, 24, f"{top:.4f}", font_size="11")
    svg.text(svg.width / 2, svg.height - 6, label, "middle", font_size="12")
    return svg
