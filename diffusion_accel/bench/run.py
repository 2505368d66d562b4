"""Runs a benchmark: every entry against the baseline, times in turn, fidelity on the same prompts and seeds."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import platform
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from diffusion_accel.measure.fidelity import EQUAL, fidelity, spread
from diffusion_accel.measure.timing import in_turn, ratios
from diffusion_accel.pipelines.schedulers import not_learnt_here
from diffusion_accel.progress import Progress, silent
from diffusion_accel.sizes import far_from_trained

from .entries import Entry
from .result import Benchmark, Row
from .runner import Facts, Job, Runner
from .worker import Isolated

logger = logging.getLogger(__name__)

BASELINE = Entry("baseline")
CONVERGED_STEPS = 200
MS_SSIM_FROM = 176  # pixels; smaller images do not have five scales
MEASURED, ANCHORED = 0.75, 0.9  # shares of the work that are done after the entries, and after the anchors


def bench(
    job: Job,
    entries: Sequence[Entry],
    rounds: int = 5,
    converged: bool = True,
    progress: Progress = silent,
    local: Runner | None = None,
) -> Benchmark:
    """Compare entries with the baseline on one model; what `benchmark` does once it is clear what is meant.

    One step fewer, fewer steps at the time of each of our entries, and another seed come with them, as anchors: what a
    given PSNR means on this model. What cannot work is refused before anything is measured; an entry that fails all the
    same is a row that says why.

    Args:
        job: model, prompts, steps and scheduler of the baseline.
        entries: what to compare.
        rounds: timed rounds, in each of which every entry has its turn, after a first one to warm up.
        converged: also measure the distance to many steps of a good solver.
        progress: told what is being done.
        local: the loaded pipeline; None: it is loaded as the job says.

    Raises:
        ConfigurationError: an entry cannot work on this pipeline.
        RuntimeError: the baseline itself fails.
    """
    progress("loading the model")
    local = Runner(job) if local is None else local
    for entry in entries:
        local.check(entry)
    words = far_from_trained(local.pipe, job.options.get("width"), job.options.get("height"))
    if words:
        logger.warning("%s", words)
    rows = measure(local, job, entries, rounds, progress)
    rows += anchors(local, job, rows, progress)
    goal = None
    if converged:
        progress("many steps", ANCHORED)
        goal = converged_images(local)
    for row in rows:
        _compare(row, rows[0].images, goal)
    machine = {
        "cpu": _processor(),
        "device": job.device,
        "threads": job.threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    return Benchmark(job, rounds, machine, rows)


def measure(local: Runner, job: Job, entries: Sequence[Entry], rounds: int, progress: Progress) -> list[Row]:
    """Images, FLOPs, memory and interleaved times of the baseline and of the entries."""
    rows = {entry: Row(entry.name, entry.kind, family=entry.family or None) for entry in (BASELINE, *entries)}
    work = MEASURED / (len(rows) + rounds + 1)  # of the whole, for one entry's images or one round
    with contextlib.ExitStack() as opened:
        places = _Places(local, job, rows, opened)
        for number, entry in enumerate(rows):
            progress(f"images: {entry.name}", number * work)
            places.attempt(entry, functools.partial(places.prepare, entry))
        if rows[BASELINE].failed:
            raise RuntimeError(f"the baseline itself fails: {rows[BASELINE].failed}")

        def told(turn: int) -> None:
            progress(f"times: round {turn} of {rounds}", (len(rows) + turn) * work)

        seconds = in_turn({entry: functools.partial(places.seconds, entry) for entry in rows}, rounds, told=told)
    for entry, row in rows.items():
        if row.failed is None:
            facts = places.facts[entry]
            row.time_ratio = round(statistics.median(ratios(seconds[BASELINE], seconds[entry])), 3)
            row.flop_ratio = _flop_ratio(places.facts[BASELINE], facts)
            row.peak_mib = None if facts["peak_mib"] is None else round(facts["peak_mib"], 1)
    return list(rows.values())


class _Places:
    """Where each entry runs: here, or in a process of its own. What fails is said in its row, and never tried again."""

    def __init__(self, local: Runner, job: Job, rows: dict[Entry, Row], opened: contextlib.ExitStack) -> None:
        self.local, self.job, self.rows, self.opened = local, job, rows, opened
        self.places: dict[Entry, Runner | Isolated] = {}
        self.facts: dict[Entry, Facts] = {}

    def prepare(self, entry: Entry) -> None:
        """Start it, and draw its images."""
        if entry.is_peer:
            isolated = Isolated(self.job, entry, self.local.pipe)
            self.opened.callback(isolated.close)
            self.places[entry] = isolated
        else:
            self.places[entry] = self.local
        self.rows[entry].images = self.places[entry].images(entry)
        self.facts[entry] = self.places[entry].facts(entry)

    def seconds(self, entry: Entry) -> float:
        """Of one image; not a number for what has failed."""
        took = [math.nan]
        if self.rows[entry].failed is None:
            self.attempt(entry, lambda: took.append(self.places[entry].seconds(entry)))
        return took[-1]

    def attempt(self, entry: Entry, what: Callable[[], object]) -> None:
        """Do something with an entry that may fail."""
        try:
            what()
        except Exception as error:
            text = str(error).strip().splitlines()
            self.rows[entry].failed = f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
            if isinstance(place := self.places.get(entry), Isolated):
                place.close()


def anchors(local: Runner, job: Job, rows: list[Row], progress: Progress) -> list[Row]:
    """What a PSNR means here: one step fewer, another seed, and fewer steps at the time of each of our entries."""
    found = []

    def median(entry: Entry) -> float:
        return statistics.median(local.seconds(entry) for _ in range(4))

    possible = [n for n in range(1, job.steps) if not_learnt_here(local.pipe, n) is None]
    counts: dict[int, str] = {}
    if possible:
        whole, least = median(BASELINE), possible[:2][-1]
        each = (whole - median(Entry("fewer-steps", str(least)))) / max(1, job.steps - least)
        counts[possible[-1]] = "one step fewer" if possible[-1] == job.steps - 1 else "the next that was learnt"
        for row in rows[1:]:
            if row.time_ratio and row.kind != "fewer-steps":
                wanted = job.steps - (whole - whole / row.time_ratio) / max(1e-9, each)
                counts.setdefault(min(possible, key=lambda n: abs(n - wanted)), f"time of {row.name}")
    base = local.facts(BASELINE)
    for number, (count, what) in enumerate(counts.items()):
        if 1 <= count < job.steps:
            progress(f"anchors: {count} steps", MEASURED + (ANCHORED - MEASURED) * number / len(counts))
            entry = Entry("fewer-steps", str(count))
            row = Row(f"{count} steps ({what})", "anchor", images=local.images(entry))
            row.flop_ratio = _flop_ratio(base, local.facts(entry))
            row.time_ratio = round(
                statistics.median(local.seconds(BASELINE) / local.seconds(entry) for _ in range(3)), 3
            )
            found.append(row)
    progress("anchors: another seed", ANCHORED)
    found.append(Row("another seed", "anchor", images=local.images(BASELINE, seed=job.seed + 1000)))
    return found


def _flop_ratio(base: Facts, own: Facts) -> float | None:
    """How many times fewer operations; None where nobody knows."""
    if base["flops"] is None or own["flops"] is None:
        return None
    return round(base["flops"] / own["flops"], 3)


def _compare(row: Row, base: torch.Tensor | None, converged: torch.Tensor | None) -> None:
    """The fidelity of a row's images, into the row."""
    if row.failed is not None or row.images is None or base is None:
        return
    found = fidelity(base, row.images)
    row.psnr, row.psnr_each = _spread(found.psnr), [round(min(v, EQUAL), 2) for v in found.psnr]
    if found.ssim:
        row.ssim = _spread(found.ssim, 4)
    if min(base.shape[-2:]) >= MS_SSIM_FROM:
        try:
            from torchmetrics.functional.image import (  # optional package
                multiscale_structural_similarity_index_measure as ms_ssim,
            )
        except ImportError:
            pass
        else:
            values = [float(ms_ssim(a[None], b[None], data_range=1.0)) for a, b in zip(row.images, base, strict=True)]
            row.ms_ssim = _spread(values, 4)
    if converged is not None:
        row.psnr_converged = _spread(fidelity(converged, row.images).psnr)[0]


def _spread(values: Sequence[float], digits: int = 2) -> list[float]:
    return [round(value, digits) for value in spread(values)]


def converged_images(local: Runner) -> torch.Tensor | None:
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
