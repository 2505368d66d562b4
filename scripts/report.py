#!/usr/bin/env python3
"""Everything that was measured, on one page; and the README's table, from the same files.

    make report                          # runs/report.html
    python scripts/report.py --readme    # writes the README's table anew

What `diffusion-accel bench --json` and the programs `scripts/measure_*.py --json` write is read from the folders (no
deeper): docs/data, the numbers of the docs, and runs, those of this machine.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusion_accel.io import replacing
from diffusion_accel.measure.html import page

HERE = Path(__file__).resolve().parent.parent
MOST = 2**22  # bytes of a file that is read
TEMPLATE = """
<p>Ratios above 1 are faster or less work; PSNR in dB. The commands are in docs/benchmarks.md.</p>
<ul>{% for file in files %}<li><a href="#{{ file.anchor }}">{{ file.name }}</a></li>{% endfor %}</ul>
{% for file in files %}
<h2 id="{{ file.anchor }}">{{ file.name }}</h2>
<p>{% for name, value in file.settings.items() %}{{ name }}: {{ value }}{{ "" if loop.last else "; " }}{% endfor %}</p>
{% for name, rows in file.tables.items() %}
{% if name %}<h3>{{ name }}</h3>{% endif %}
<table><tr>{% for column in rows[0] %}<th>{{ column }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for value in row.values() %}<td>{{ value }}</td>{% endfor %}</tr>
{% endfor %}</table>
{% endfor %}
{% endfor %}
"""
LEARNED = "fewer-steps 5,learned"
# of the README's table: what a user gets, how, and the row of docs/data/readme.json
PROMISES = (
    ("what most people run: 20 steps of DPM-Solver++", "", "baseline"),
    ("nearer to the true image than those", "`--scheduler learned --steps 5`", LEARNED),
    ("much nearer", "`--scheduler learned --steps 8`", "fewer-steps 8,learned"),
    ("the very image of those 20 steps", "`--reuse tuned:balanced`", "reuse tuned:balanced"),
    ("the same, compiled", "`--reuse tuned:balanced --compiled openvino`", "compiled + reuse tuned:balanced"),
    ("5 learned steps, compiled", "`--scheduler learned --steps 5 --compiled openvino`", f"compiled + {LEARNED}"),
    ("for comparison: plain steps", "`--steps 8`", "fewer-steps 8"),
    ("for comparison: DeepCache", "interval 2", "deepcache 2"),
)
BEGIN, END = "<!-- from docs/data/readme.json by scripts/report.py -->\n", "<!-- end -->\n"


@dataclass
class File:
    """One file of numbers.

    Attributes:
        name: where it is.
        settings: what was measured, and where.
        tables: rows of cells by name.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    @property
    def anchor(self) -> str:
        """In the page."""
        return re.sub(r"\W+", "-", self.name)


def files(folders: list[Path]) -> Iterator[File]:
    """The files of numbers in some folders; what is none is passed over."""
    for path in sorted(path for folder in folders for path in folder.glob("*.json")):
        if path.stat().st_size > MOST:
            continue
        try:
            read = File(path.relative_to(HERE).as_posix() if path.is_relative_to(HERE) else path.name)
            note(read, json.loads(path.read_text(encoding="utf-8")))
        except ValueError:
            continue
        if read.settings and not read.tables:
            read.tables[""], read.settings = [{"what": n, "value": shown(v)} for n, v in read.settings.items()], {}
        if read.tables:
            yield read


def note(file: File, value: Any, name: str = "") -> None:
    """Put what is in a file where it is shown: lists of rows are tables, everything else is a setting."""
    if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
        cells = [dict(flat(row)) for row in value]
        columns = list(dict.fromkeys(column for row in cells for column in row))
        file.tables[name] = [{column: row.get(column, "") for column in columns} for row in cells]
    elif isinstance(value, dict):
        for key, inner in value.items():
            note(file, inner, f"{name} {key}".strip() if name or key not in ("rows", "runs") else "")
    elif not isinstance(value, list):
        file.settings[name] = value


def flat(row: dict[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """The cells of a row: what is nested has a name of two words; long lists (values of each image) are left out."""
    for name, value in row.items():
        if isinstance(value, dict):
            yield from flat(value, f"{before}{name} ")
        elif isinstance(value, list):
            if len(value) <= 3:
                yield before + name, " / ".join(map(shown, value))
        else:
            yield before + name, shown(value)


def shown(value: Any) -> str:
    """A cell."""
    if isinstance(value, float):
        return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3g}"
    return "" if value is None else str(value)


def table(data: dict[str, Any]) -> str:
    """The README's, in Markdown."""
    rows = {row["name"]: row for row in data["rows"]}
    lines = [
        "| what you get | how | times as fast | dB to the true image | dB to those 20 steps |",
        "| --- | --- | --- | --- | --- |",
    ]
    for what, how, name in PROMISES:
        row = rows[name]
        near = "" if name == "baseline" else f"{row['psnr'][0]:.1f}"
        lines.append(f"| {what} | {how} | {row['time_ratio']:.1f} | {row['psnr_converged']:.1f} | {near} |")
    return "\n".join(lines) + "\n"


def with_table(readme: str, data: dict[str, Any]) -> str:
    """The README with its table made anew."""
    before, rest = readme.split(BEGIN)
    return before + BEGIN + table(data) + END + rest.split(END)[1]


def main() -> None:
    """Write the page, or the README's table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, default=[HERE / "docs/data", HERE / "runs"])
    parser.add_argument("-o", "--output", type=Path, default=HERE / "runs/report.html")
    parser.add_argument("--readme", action="store_true", help="write the README's table")
    options = parser.parse_args()
    if options.readme:
        data = json.loads((HERE / "docs/data/readme.json").read_text(encoding="utf-8"))
        readme = HERE / "README.md"
        readme.write_text(with_table(readme.read_text(encoding="utf-8"), data), encoding="utf-8")
        return
    found = list(files(options.folders))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(options.output) as path:
        path.write_text(page("What was measured", TEMPLATE, files=found), encoding="utf-8")
    print(f"{options.output}: {sum(len(file.tables) for file in found)} tables of {len(found)} files")


if __name__ == "__main__":
    main()
