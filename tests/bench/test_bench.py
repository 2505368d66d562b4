"""The benchmark: what can be compared, peers in their own process, and the reports."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from zoo import ZOO

from diffusion_accel import Compiled, ConfigurationError, PlanFamily, Reuse
from diffusion_accel.bench import run
from diffusion_accel.bench.entries import Entry, read_entries
from diffusion_accel.bench.peers import PEERS
from diffusion_accel.bench.report import legend, markdown, page, pareto, plot
from diffusion_accel.bench.result import Benchmark, Row
from diffusion_accel.bench.run import bench
from diffusion_accel.bench.runner import Job, Runner
from diffusion_accel.cli.main import main
from diffusion_accel.cli.terminal import Bar, console
from diffusion_accel.errors import ModelLoadError

CALL = {"guidance_scale": 3.0, "height": 96, "width": 96}
JOB = Job("sticker", ("red apple, 3d style", "panda, noto style"), 4, "ddim", threads=1, options=CALL)


@pytest.mark.parametrize(
    "text", ["reuse:hold:3", "encoder-reuse", "fewer-steps:5,dpm++", "deepcache:3,1", "tomesd", "pab:4", "sea:skips=1"]
)
def test_entries_are_read(text: str) -> None:
    entry = Entry.parse(text)
    assert entry.kind == text.partition(":")[0]
    assert entry.is_peer == (entry.kind in PEERS)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nothing", "the kinds are"),
        ("hold:2", "did you mean 'reuse:hold:2'?"),
        ("tuned:fast", "did you mean 'reuse:tuned:fast'?"),
        ("resue:hold:2", "the kinds are: .*; did you mean 'reuse'?"),
        ("fewer-steps", "STEPS"),
        ("deepcache:3+reuse:hold:2", "only features and fewer-steps can be joined by .*, got 'deepcache'"),
        ("reuse:hold:2+reuse:hold:3", "one kind twice"),
        ("compiled:engine=cuda+reuse:hold:3", "engine='cuda' is not allowed"),
        ("fewer-steps:5,nothing", "unknown scheduler"),
        ("deepcache:a", "interval of deepcache must be a whole number"),
        ("tomesd:0.5,1", "at most 1 settings"),
        ("reuse:hold:0", "hold:n"),
        ("family", "takes the file of a tuned family"),
        ("family:tuned:fast", "is no family of tuned plans; reuse:tuned:fast compares one"),
        ("family:tuned:ddim,speedup=3", "reuse:tuned:ddim,speedup=3 compares the one"),
    ],
)
def test_bad_entries_are_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        Entry.parse(text)


def test_what_is_joined_is_switched_on_together() -> None:
    """A "+" within settings joins nothing."""
    text = "compiled:eager,parts=denoiser+vae+reuse:hold:2+fewer-steps:8,dpm++"
    entry = Entry.parse(text)
    assert [str(part.kind) for part in entry.parts] == ["compiled", "reuse", "fewer-steps"] and not entry.is_peer
    assert entry.name == "compiled eager,parts=denoiser+vae + reuse hold:2 + fewer-steps 8,dpm++"
    assert Entry.parse("encoder-reuse:schedule=0+1+5").kind == "encoder-reuse"
    assert Entry.parse("compiled+reuse").features == [Compiled(), Reuse()]
    assert Entry.parse("reuse:tuned:balanced+fewer-steps:8").refusal(20, "dpm++").startswith("the plan")
    assert Entry.parse("fewer-steps:20+reuse:tuned:balanced").refusal(50, "dpm++") is None
    runner = Runner(JOB)
    together, apart = Entry.parse("compiled:eager+reuse:hold:2"), Entry.parse("reuse:hold:2")
    runner.check(together)
    assert torch.equal(runner.images(together), runner.images(apart))
    assert runner.facts(together)["flops"] == runner.facts(apart)["flops"]
    steps = runner.images(Entry.parse("compiled:eager+fewer-steps:3"))
    assert torch.equal(steps, runner.images(Entry.parse("fewer-steps:3")))


def test_a_family_stands_for_a_row_of_each_of_its_plans(tmp_path: Path) -> None:
    entries = read_entries(["family:tuned:dpm", "family:tuned:ddim,stretch=true", "fewer-steps:5"])
    dpm, ddim = (PlanFamily.load(f"tuned:{name}").members for name in ("dpm", "ddim"))
    names = [f"reuse {plan.origin}" for plan in dpm] + [f"reuse {plan.origin},stretch=True" for plan in ddim]
    assert [entry.name for entry in entries] == [*names, "fewer-steps 5"]
    assert {"reuse tuned:quality", "reuse tuned:ddim-fast,stretch=True"} < {*names}
    assert entries[0] == Entry.parse("reuse:tuned:quality") and entries[0].family == "tuned:dpm"
    assert entries[len(dpm)].feature.stretch and not entries[-1].family
    with pytest.raises(ConfigurationError, match="given twice"):
        read_entries(["family:tuned:dpm", "reuse:tuned:fast"])
    with pytest.raises(ConfigurationError, match="cannot be read"):
        read_entries([f"family:{tmp_path / 'no.json'}"])


@pytest.mark.parametrize("entries", ["reuse", 5, [5]])
def test_entries_are_a_list_of_texts(entries: Any) -> None:
    with pytest.raises(ConfigurationError, match="^entries must be "):
        read_entries(entries)


def test_pickles_need_permission(tmp_path: Path) -> None:
    ZOO["unet2d"]()[0].save_pretrained(tmp_path, safe_serialization=False)
    job = replace(JOB, model=str(tmp_path), scheduler=None)
    with pytest.raises(ModelLoadError, match="pickle"):
        Runner(job)
    assert len(list(Runner(replace(job, allow_pickle=True)).pipe.unet.parameters())) > 0


def test_what_cannot_work_is_refused_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(*args: Any) -> None:
        raise AssertionError("something was measured")

    monkeypatch.setattr(run, "measure", measure)
    for text, words in (
        ("reuse:shallow:2,99", "4 skip connections|skip connections: the depth"),
        ("reuse:tuned:fast", "is for 20 steps"),
        ("reuse:first-block", "none of diffusers' caches"),
        ("fewer-steps:2,FlowMatchEulerDiscreteScheduler", "does not fit this model"),
    ):
        with pytest.raises(ConfigurationError, match=words):
            bench(JOB, [Entry.parse("reuse:full"), Entry.parse(text)])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert Entry.parse("deepcache:3").refusal(20, "ddim") == (
        "the package DeepCache is not installed (pip install DeepCache)"
    )


@pytest.fixture(scope="module")
def result() -> Benchmark:
    texts = ("reuse:full", "reuse:deepcache:2", "deepcache:2", "fewer-steps:2", "forecast:hold,2")
    entries = [*map(Entry.parse, texts), Entry("deepcache", "7,7,7")]  # the last one fails
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "CONVERGED_STEPS", 8)
        return bench(JOB, entries, rounds=1)


def test_a_benchmark_measures_what_it_says(result: Benchmark) -> None:
    rows = {row.name: row for row in result.rows}
    assert rows["baseline"].psnr == [200.0, 200.0] and rows["baseline"].time_ratio == 1
    assert rows["reuse full"].psnr == [200.0, 200.0], "the same image in the same process"
    assert rows["reuse full"].flop_ratio == 1
    pytest.importorskip("DeepCache")
    ours, theirs = rows["reuse deepcache:2"], rows["deepcache 2"]
    assert theirs.failed is None
    assert torch.allclose(ours.images, theirs.images, atol=1e-4), "the package, in its own process"
    assert ours.flop_ratio == theirs.flop_ratio and ours.flop_ratio > 1.2
    assert rows["forecast hold,2"].failed is None
    half = rows["fewer-steps 2"].flop_ratio  # as many calls of the denoiser
    assert rows["forecast hold,2"].flop_ratio == pytest.approx(half, rel=0.01)
    assert rows["fewer-steps 2"].flop_ratio > 1.2 and rows["fewer-steps 2"].psnr[0] < 60
    assert rows["another seed"].psnr[0] < 60
    assert all(row.psnr_converged for row in result.rows if row.failed is None)


def test_a_peer_that_fails_is_a_row_that_says_why(result: Benchmark) -> None:
    failed = next(row for row in result.rows if row.name == "deepcache 7,7,7")
    assert "at most 2" in str(failed.failed)
    assert "failed:" in markdown(result) and "deepcache 7,7,7" in page(result)


def test_reports_hold_everything_and_need_no_other_file(result: Benchmark) -> None:
    table = markdown(result)
    assert table.count("\n") == len(result.rows) + 6 and legend(result) in table
    text = page(result)
    assert "2.00 is twice as fast, half of the work" in text
    assert "https://" not in text and set(re.findall(r"http://[^\"]*", text)) == {"http://www.w3.org/2000/svg"}
    assert text.count("data:image/webp") >= 8
    for key in ("psnr", "psnr_converged"):
        ET.fromstring(plot(result, key, "label"))
    json.dumps(result.to_dict())


def test_the_plans_of_a_family_are_one_line(result: Benchmark) -> None:
    """Through the points of its rows, by speed, and of no other row; a row that failed has none."""
    plan = replace(result.rows[0], kind="reuse", family="f")
    rows = [replace(plan, name=f"plan {n}", psnr=[60.0 - 9 * n, 1.0], time_ratio=1.5 + n) for n in (2, 0, 1)]
    rows += [Row("plan 3", "reuse", family="f", failed="x"), *result.rows]
    drawing = ET.fromstring(plot(replace(result, rows=rows), "psnr", "label"))
    svg = "{http://www.w3.org/2000/svg}"
    (line,) = [found for found in drawing.iter(f"{svg}polyline") if found.get("class") == "family"]
    places = {found.findtext(f"{svg}title").partition(":")[0]: f"{found.get('cx')},{found.get('cy')}"
              for found in drawing.iter(f"{svg}circle")}  # fmt: skip
    spots = [tuple(map(float, corner.split(","))) for corner in line.get("points").split()]
    assert spots == [tuple(map(float, places[f"plan {n}"].split(","))) for n in range(3)]
    assert "joins the plans" in page(replace(result, rows=rows)) and "joins the plans" not in page(result)


def test_names_from_outside_are_text_in_reports(result: Benchmark) -> None:
    name = "reuse \x1b[2J<script>|x[/bold]\udcff"
    named = replace(
        result, rows=[replace(row, name=name, psnr=[40.0, 40.0], time_ratio=2.0) for row in result.rows[:1]]
    )
    assert "| reuse \\x1b[2J<script>\\|x[/bold]\\udcff | 2.00 |" in markdown(named)
    text = page(named)
    assert "<script>" not in text and "&lt;script&gt;" in text
    assert "\x1b" not in text and text.encode()
    ET.fromstring(plot(named, "psnr", "label"))


def test_markup_in_names_is_no_markup(capsys: Any) -> None:
    status = Bar(quiet=False)
    status("images: reuse x[/bold]y/\x1b]0;title\x07")
    console().print("[red]x[/bold] \x1b[2J :smiley:")
    assert capsys.readouterr().out == "[red]x[/bold] \\x1b[2J :smiley:\n"


def test_the_pareto_front() -> None:
    points = {"a": (1.0, 60.0), "b": (2.0, 50.0), "c": (2.0, 40.0), "d": (3.0, 55.0), "e": (4.0, 20.0)}
    rows = [Row(name, "x", time_ratio=t, psnr=[p, p]) for name, (t, p) in points.items()]
    assert [row.name for row in pareto(rows)] == ["a", "d", "e"]


def test_the_command(tmp_path: Path, capsys: Any) -> None:
    files = {name: tmp_path / f"bench.{name}" for name in ("html", "json", "markdown")}
    arguments = ["bench", "reuse:hold:2", "--steps", "4", "--count", "2", "--rounds", "1", "--device", "cpu", "-q"]
    arguments += ["--no-converged", *(part for name, file in files.items() for part in (f"--{name}", str(file)))]
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert not stop.value.code
    assert files["markdown"].read_text().strip() in capsys.readouterr().out
    assert json.loads(files["json"].read_text())["rows"][1]["name"] == "reuse hold:2"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench.html", "bench.json", "bench.markdown"]
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 1 and "exists" in capsys.readouterr().err
