"""Runs a benchmark: every entry against the baseline, times in turn, fidelity on the same prompts and seeds."""

from __future__ import annotations

import functools
import logging
import math
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from diffusion_accel.measure.fidelity import EQUAL, fidelity, spread
from diffusion_accel.measure.timing import in_turn, ratios
from diffusion_accel.pipelines.sizes import far_from_trained

from .entries import Entry
from .runner import Isolated, Job, Runner

logger = logging.getLogger(__name__)

BASELINE = Entry("baseline")
CONVERGED_STEPS = 200
MS_SSIM_FROM = 176  # pixels; smaller images do not have five scales
Progress = Callable[[str], None]


@dataclass
class Row:
    """What one entry gained and lost.

    Fidelity is [median, worst decile], and `psnr_each` that of every image; `failed` says why there is none.
    """

    name: str
    kind: str
    time_ratio: float | None = None
    flop_ratio: float | None = None
    peak_mib: float | None = None
    psnr: list[float] | None = None
    psnr_each: list[float] | None = None
    ssim: list[float] | None = None
    ms_ssim: list[float] | None = None
    psnr_converged: float | None = None
    failed: str | None = None
    images: Any = field(default=None, repr=False)

    def to_dict(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k != "images" and v is not None}


@dataclass
class Result:
    """A benchmark: the rows (the baseline first), and how they were measured."""

    job: Job
    rounds: int
    machine: dict[str, Any]
    rows: list[Row]

    def to_dict(self) -> dict[str, Any]:
        job = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self.job).items()}
        return {"job": job, "rounds": self.rounds, "machine": self.machine, "rows": [r.to_dict() for r in self.rows]}


def bench(
    job: Job, entries: list[Entry], rounds: int = 5, converged: bool = True, progress: Progress = lambda text: None
) -> Result:
    """Compare entries with the baseline on one model.

    One step fewer, fewer steps at the time of each of our entries, and another seed come with them, as anchors: what a
    given PSNR means on this model. What cannot work is refused before anything is measured; an entry that fails all the
    same is a row that says why.

    Args:
        job: model, prompts, steps and scheduler of the baseline.
        entries: what to compare.
        rounds: timed rounds, in each of which every entry has its turn, after a first one to warm up.
        converged: also measure the distance to many steps of a good solver.
        progress: called with what is being done.
    """
    progress("loading the model")
    local = Runner(job)
    for entry in entries:
        local.check(entry)
    words = far_from_trained(local.pipe, job.options.get("width"), job.options.get("height"))
    if words:
        logger.warning("%s", words)
    rows = measure(local, job, entries, rounds, progress)
    rows += anchors(local, job, rows, progress)
    goal = None
    if converged:
        progress("many steps")
        goal = _converged(local, job)
    for row in rows:
        compare(row, rows[0].images, goal)
    machine = {
        "cpu": _processor(),
        "device": job.device,
        "threads": job.threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    return Result(job, rounds, machine, rows)


def measure(local: Runner, job: Job, entries: list[Entry], rounds: int, progress: Progress) -> list[Row]:
    """Images, FLOPs, memory and interleaved times of the baseline and of the entries."""
    rows = {entry: Row(entry.name, entry.kind) for entry in (BASELINE, *entries)}
    places: dict[Entry, Runner | Isolated] = {}
    facts: dict[Entry, dict[str, float]] = {}
    seconds: dict[Entry, list[float]] = {}

    def attempt(entry: Entry, what: Callable[[], None]) -> None:
        try:
            what()
        except Exception as error:
            text = str(error).strip().splitlines()
            rows[entry].failed = f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
            if isinstance(place := places.get(entry), Isolated):
                place.close()

    try:
        for entry in rows:
            progress(f"images: {entry.name}")

            def prepare(entry: Entry = entry) -> None:
                places[entry] = Isolated(job, entry) if entry.is_peer else local
                rows[entry].images = places[entry].images(entry)
                facts[entry] = places[entry].facts(entry)

            attempt(entry, prepare)
        if rows[BASELINE].failed:
            raise RuntimeError(f"the baseline itself fails: {rows[BASELINE].failed}")

        def once(entry: Entry) -> float:
            took = [math.nan]  # of an entry that has failed
            if rows[entry].failed is None:
                attempt(entry, lambda: took.append(places[entry].seconds(entry)))
            return took[-1]

        turns = {entry: functools.partial(once, entry) for entry in rows}
        seconds = in_turn(turns, rounds, told=lambda turn: progress(f"times: round {turn} of {rounds}"))
    finally:
        for place in places.values():
            if isinstance(place, Isolated):
                place.close()
    for entry, row in rows.items():
        if row.failed is None:
            row.time_ratio = round(statistics.median(ratios(seconds[BASELINE], seconds[entry])), 3)
            row.flop_ratio = round(facts[BASELINE]["flops"] / facts[entry]["flops"], 3)
            row.peak_mib = round(facts[entry]["peak_mib"], 1)
    return list(rows.values())


def anchors(local: Runner, job: Job, rows: list[Row], progress: Progress) -> list[Row]:
    """What a PSNR means here: one step fewer, another seed, and fewer steps at the time of each of our entries."""
    found = []

    def median(entry: Entry) -> float:
        return statistics.median(local.seconds(entry) for _ in range(4))

    whole, least = median(BASELINE), min(2, job.steps - 1)
    each = (whole - median(Entry("fewer-steps", str(least)))) / max(1, job.steps - least)
    counts = {job.steps - 1: "one step fewer"}
    for row in rows[1:]:
        if row.time_ratio and row.kind != "fewer-steps":
            saved = (whole - whole / row.time_ratio) / max(1e-9, each)
            counts.setdefault(max(1, round(job.steps - saved)), f"time of {row.name}")
    base = local.facts(BASELINE)["flops"]
    for count, what in counts.items():
        if 1 <= count < job.steps:
            progress(f"anchors: {count} steps")
            entry = Entry("fewer-steps", str(count))
            row = Row(f"{count} steps ({what})", "anchor", images=local.images(entry))
            row.flop_ratio = round(base / local.facts(entry)["flops"], 3)
            row.time_ratio = round(
                statistics.median(local.seconds(BASELINE) / local.seconds(entry) for _ in range(3)), 3
            )
            found.append(row)
    progress("anchors: another seed")
    found.append(Row("another seed", "anchor", images=local.images(BASELINE, seed=job.seed + 1000)))
    return found


def compare(row: Row, base: Any, converged: Any) -> None:
    """The fidelity of a row's images."""
    if row.failed is not None or row.images is None:
        return
    found = fidelity(base, row.images)
    row.psnr, row.psnr_each = _spread(found.psnr), [round(min(v, EQUAL), 2) for v in found.psnr]
    if found.ssim:
        row.ssim = _spread(found.ssim, 4)
    if min(base.shape[-2:]) >= MS_SSIM_FROM:
        try:
            from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as ms_ssim
        except ImportError:
            pass
        else:
            values = [float(ms_ssim(a[None], b[None], data_range=1.0)) for a, b in zip(row.images, base, strict=True)]
            row.ms_ssim = _spread(values, 4)
    if converged is not None:
        row.psnr_converged = _spread(fidelity(converged, row.images).psnr)[0]


def _spread(values: Sequence[float], digits: int = 2) -> list[float]:
    return [round(value, digits) for value in spread(values)]


def _converged(local: Runner, job: Job) -> Any:
    """The same noise and prompts with many steps of a solver that converges fast; None where it does not fit."""
    for solver in (",dpm++", ""):
        try:
            return local.images(Entry("fewer-steps", f"{CONVERGED_STEPS}{solver}"))
        except Exception:
            continue
    return None


def _processor() -> str:
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
