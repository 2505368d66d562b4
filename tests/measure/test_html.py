"""Reports: what goes in as text comes out as text, and drawings are well-formed."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import jinja2
import pytest

from diffusion_accel.measure.html import Svg, bars, image_table, page, rendered

NAMES = "<script>&x</script> \x1b[2J \udcff"


def test_texts_are_no_markup() -> None:
    text = page(NAMES, "<p>{{ name }}</p>{{ images }}", name=NAMES, images=image_table([(NAMES, ["data:x"])]))
    assert text.count("&lt;script&gt;&amp;x&lt;/script&gt;") == 4 and "<script>" not in text
    assert "\x1b" not in text and text.encode() and '<img src="data:x" alt="">' in text
    assert rendered("{{ a }}", a=rendered("<b>{{ b }}</b>", b="<")) == "<b>&lt;</b>"
    with pytest.raises(jinja2.UndefinedError):
        rendered("{{ nothing }}")


def test_drawings() -> None:
    svg = Svg(10, 20, NAMES)
    svg.add("line", x1=0, y1=1.25, class_="grid", tip=NAMES)
    svg.text(5, 6, NAMES, "middle")
    root = ET.fromstring(str(svg))
    line, text = list(root)
    assert line.attrib == {"x1": "0", "y1": "1.2", "class": "grid"} and text.attrib["text-anchor"] == "middle"
    assert rendered("{{ svg }}", svg=svg) == str(svg)


def test_bars() -> None:
    assert bars({}, "nothing") is None
    values = {f"{n}": n / 20 for n in range(20)}
    root = ET.fromstring(str(bars(values, "label")))
    tall = [float(e.attrib["height"]) for e in root if e.tag.endswith("rect")]
    assert tall == sorted(tall) and tall[-1] == 150 and len(tall) == 20
    assert ET.fromstring(str(bars({"a": 0.0}, "zero"))) is not None
