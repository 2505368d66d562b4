"""The page of all numbers, and the README's table from the numbers it is made of."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

from snippets import ROOT

report = importlib.import_module("report")  # of scripts/, which pytest's settings put on the path


def test_the_readme_has_the_numbers_of_its_file() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    data = json.loads((ROOT / "docs/data/readme.json").read_text(encoding="utf-8"))
    assert report.with_table(readme, data) == readme
    data["rows"][0]["time_ratio"] = 7.77
    assert report.with_table(readme, data) != readme


def test_the_page(tmp_path: Path) -> None:
    """Lists of rows are tables, the rest is said above them, text is text, and what is no file of numbers is left."""
    rows = [{"name": "<b>a</b>", "psnr": [40.04, 39.0], "each": [1.0] * 24, "ssim": {"median": 0.98765}}, {"name": "b"}]
    (tmp_path / "a.json").write_text(json.dumps({"torch": "2.13", "rows": rows}))
    (tmp_path / "nested.json").write_text(json.dumps({"one": {"two": 3.0}}))
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "empty.json").write_text("[]")
    done = subprocess.run(
        [sys.executable, report.__file__, tmp_path, "-o", tmp_path / "page.html"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "2 tables of 2 files" in done.stdout, done.stderr
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;a&lt;/b&gt;" in page and "<b>a</b>" not in page
    assert "<td>40.04 / 39.00</td>" in page and "<td>0.988</td>" in page and "torch: 2.13" in page
    assert "one two" in page and "each" not in page and "broken" not in page


def test_what_was_measured_for_the_docs_is_on_it() -> None:
    names = {file.name for file in report.files([ROOT / "docs/data"])}
    assert names == {f"docs/data/{path.name}" for path in (ROOT / "docs/data").glob("*.json")}
