"""`make_fast`: quantize a pipeline, tune what is left, check both together, write the folder with its recipe.

Nothing is searched here. Each stage is a public function, and what it made lies in `<output>.work`, so that an
interrupted run goes on behind the last stage that was done, and within it where that can go on.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers

from diffusion_accel import interrupts, schedulers
from diffusion_accel._version import __version__
from diffusion_accel.arguments import public
from diffusion_accel.denoisers import denoiser_names
from diffusion_accel.errors import AccelerationError, ConfigurationError, DamagedStateError, OutputError
from diffusion_accel.io import writing
from diffusion_accel.measure.request import MAX_SEED, options_of, texts_of, usual_steps, whole
from diffusion_accel.measure.sampler import Sampler
from diffusion_accel.mixin import plain_twin
from diffusion_accel.model_files.folders import LIBRARY
from diffusion_accel.model_files.index_notes import INDEX, KEY, RECIPE
from diffusion_accel.model_files.names import ModelSource
from diffusion_accel.outputs import check_free_folder, work_folder
from diffusion_accel.pipelines.loading import load_pipeline
from diffusion_accel.progress import Progress, silent
from diffusion_accel.quant.ptq.export import put, quantize, save
from diffusion_accel.quant.ptq.folder import agree, clear, held, read, write
from diffusion_accel.quant.ptq.settings import settings_of
from diffusion_accel.recipes.saving import save_recipe, weights_of
from diffusion_accel.reuse.plan_family import called, load_tuned
from diffusion_accel.reuse.plan_file import TunedPlan
from diffusion_accel.schedulers.learned import LearnedMultistepScheduler
from diffusion_accel.switchboard import accelerate
from diffusion_accel.tuning.solver import tune_solver
from diffusion_accel.tuning.tuner import USUAL_STEPS, tune

from .candidates import Candidate, Judge, in_order, left_for_plans
from .report import ALONE, FastReport
from .wish import BITS, LEAST_PROMPTS, check_wish

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_STOPPING = (OutputError, DamagedStateError)  # of a search: nothing that says of the model what it cannot be
Load = Callable[[ModelSource], Any]
MOST_TO_JUDGE = 16  # prompts that choose, and as many that check
TUNED_ON = 24  # prompts; more make searches longer, not better
SHARES = {"quantize": 0.5, "plans": 0.35, "solver": 0.15}  # of the budget
SOLVER_FROM = 600.0  # seconds of budget from which a solver is learnt as well
ROUNDS = 5  # of timing
_SEEDS = {"choose": 300_000, "check": 400_000}  # beyond those that fitted


@public
def make_fast(
    pipe: DiffusionPipeline,
    prompts: str | Sequence[str],
    output: str | Path,
    *,
    min_psnr: float = 40.0,
    max_size: float | None = None,
    seconds: float = 1200.0,
    steps: int | None = None,
    seed: int = 0,
    guidance_scale: float | None = None,
    height: int | None = None,
    width: int | None = None,
    batch: int = 8,
    overwrite: bool = False,
    restart: bool = False,
    progress: Progress = silent,
    source: ModelSource | None = None,
    load: Load = load_pipeline,
) -> FastReport:
    """Make a model fast, and small if that is asked for, as near to what it was as is asked for.

        report = make_fast(pipe, prompts, "fast", min_psnr=45, max_size=0.2)
        pipe = AcceleratedPipeline.from_pretrained("fast")

    The denoiser is quantized to the size (`quantize`), plans for every speed are tuned on what is left (`tune`) and,
    with a budget of 10 minutes or more, solvers of a half and a third of the steps (`tune_solver`). Each is drawn
    together with the quantized denoiser and compared with the pipeline as it was, on prompts that nothing was fitted
    to; the one of least work that keeps `min_psnr` is taken, if it does so on others, too. What lies between is kept in
    `<output>.work`: an interrupted call goes on when it is made again with the same arguments, and one with another
    `min_psnr` needs nothing anew but the choice.

    Args:
        pipe: a loaded pipeline without features that accelerate, with the scheduler that will be used.
        prompts: what the model is usually asked for, at least 12, 96 recommended. A sixth, at most 16, chooses, as many
            check, the others calibrate.
        output: the pipeline folder to write, with acceleration.json, report.html and plans.json.
        min_psnr: the median PSNR to the pipeline as it was, 5 to 80 dB.
        max_size: the most that the denoiser's weights may take on disk, as a share of float32; None: not quantized.
        seconds: time budget of the searches, without drawing what is compared.
        steps: of the calls that all of this is for, at least 4; None: the pipeline's own default.
        seed: of everything random.
        guidance_scale, height, width: of those calls; None: the pipeline's own default.
        batch: images in a call.
        overwrite: replace an existing pipeline folder.
        restart: forget what an interrupted call left.
        progress: told what is being done.
        source: what the pipeline was loaded from, if nothing of it has changed since; see `quantize`.
        load: loads the quantized folder.

    Returns:
        What was tried, what was taken, and what that keeps and gains.

    Raises:
        ConfigurationError: an argument is not allowed or not what the interrupted call began with; nothing keeps
            `min_psnr` at this size, with what is kept.
        UnsupportedPipelineError: there is nothing that can be quantized or tuned.
        OutputError: the folder exists, is in use by another run, or cannot be written.
    """
    check_wish(min_psnr, max_size, seconds, steps)
    texts = tuple(texts_of(pipe, prompts, LEAST_PROMPTS))
    options = options_of(pipe, steps=steps, guidance_scale=guidance_scale, height=height, width=width)
    count = options.pop("num_inference_steps", None) or usual_steps(pipe) or USUAL_STEPS
    whole("seed", seed, 0, MAX_SEED - 2 * max(_SEEDS.values()))
    folder = Path(output)
    check_free_folder(folder, overwrite)
    work = work_folder(folder)
    run = _Run(
        Sampler(pipe, texts, count, seed, whole("batch", batch), options),
        work, min_psnr, max_size, seconds, source, load, progress,
        FastReport(str(folder), {"min_psnr": min_psnr, "max_size": max_size}),
    )  # fmt: skip
    with held(work, "run"), writing(folder):
        if restart:
            clear(work)
        agree(work, run.asked())
        made = run.everything()
        with interrupts.unfinished(made), interrupts.undivided():
            put(made, folder, overwrite)
        with interrupts.unfinished(work):  # not needed any more
            return run.report


@dataclass
class _Run:
    """One call of `make_fast`, stage by stage."""

    sampler: Sampler
    work: Path
    min_psnr: float
    max_size: float | None
    seconds: float
    source: ModelSource | None
    load: Load
    progress: Progress
    report: FastReport
    pipe: Any = None  # of the model that is kept
    _done: float = 0.0

    def asked(self) -> dict[str, Any]:
        """All that must be the same for a run to go on; the wish for a fidelity only chooses."""
        s = self.sampler
        return {
            "max size": self.max_size,
            "budget": self.seconds,
            "prompts": list(s.prompts),
            "steps": s.steps,
            "seed": s.seed,
            "batch": s.batch,
            "options": {key: str(value) for key, value in s.options.items()},
            "scheduler": {key: str(v) for key, v in s.pipe.scheduler.config.items() if key[0] != "_"},
            "pipeline": type(s.pipe).__name__,
            "weights": {name: weights_of(getattr(s.pipe, name)) for name in denoiser_names(s.pipe)},
            "version": __version__,
        }

    # ------------------------------------------------------------------ prompts and time
    def prompts(self, what: str) -> tuple[str, ...]:
        """Those that fit ("fit"), "choose" or "check"."""
        texts = self.sampler.prompts
        judge = min(MOST_TO_JUDGE, len(texts) // 6)
        parts = {"check": texts[:judge], "choose": texts[judge : 2 * judge], "fit": texts[2 * judge :]}
        self.report.prompts = {f"to {name}": len(part) for name, part in parts.items()}
        return parts[what]

    def share(self, stage: str) -> float:
        """Seconds of the budget for a stage, among those that there are."""
        shares = {k: v for k, v in SHARES.items() if self._is_wanted(k)}
        return self.seconds * shares[stage] / sum(shares.values())

    def _is_wanted(self, stage: str) -> bool:
        return {"quantize": self.max_size is not None, "solver": self.seconds >= SOLVER_FROM}.get(stage, True)

    @contextmanager
    def stage(self, name: str, part: float) -> Iterator[Progress]:
        """A stage that is `part` of everything: the progress to give to it. Notes what it takes."""
        began, before = time.monotonic(), self._done

        def told(what: str, share: float = 0.0, left: float | None = None) -> None:
            self.progress(f"{name}: {what}", before + part * share, left)

        yield told
        self._done = before + part
        self.report.seconds[name] = round(time.monotonic() - began, 1)

    # ------------------------------------------------------------------ stages
    def everything(self) -> Path:
        """All stages; returns the finished folder, which has not its name yet."""
        with self.stage("quantize", 0.45) as told:
            self.pipe = self.quantized(told)
        choosing = self.judge("choose")
        with self.stage("check what is quantized", 0.05):
            self.tried(choosing, [Candidate(ALONE, self.sampler.steps)])
        kept = self.report.tried[ALONE]["psnr_median"]
        if kept < self.min_psnr:
            raise ConfigurationError(
                f"min_psnr {self.min_psnr:g} dB cannot be kept at max_size {self.max_size:g}: quantized to that, and "
                f"nothing else, it keeps {kept:.1f} dB; ask for less, or for a larger size"
            )
        with self.stage("plans", 0.25) as told:
            candidates = self.plans(told, kept)
        with self.stage("solvers", 0.1) as told:
            candidates += self.solvers(told)
        with self.stage("choose", 0.1):
            self.tried(choosing, candidates)
        with self.stage("check", 0.05):
            chosen = self.checked([Candidate(ALONE, self.sampler.steps), *candidates])
        return self.written(chosen)

    def checked(self, candidates: Sequence[Candidate]) -> Candidate:
        """The one of least work that keeps the fidelity on the prompts that choose and on those that check; every step
        where none does on the latter."""
        judge, named = self.judge("check"), {one.name: one for one in candidates}
        for name in in_order(self.report.tried, self.min_psnr):
            self.report.taken = name
            self.report.measured, drawn = judge.of(named[name], ROUNDS)
            self.report.images = (judge.images, drawn)
            kept, seen = self.report.measured["psnr_median"], self.report.tried[name]["psnr_median"]
            if kept >= self.min_psnr or name == ALONE:
                break
            self.report.notes.append(
                f"not taken: {name} kept {seen:.1f} dB where it was chosen, {kept:.1f} dB elsewhere"
            )
        return named[self.report.taken]

    def quantized(self, told: Progress) -> Any:
        """The pipeline with the denoiser that is kept, in memory beside the one as it was if it is another."""
        if self.max_size is None:
            return self.sampler.pipe
        folder, s = self.work / "quantized", self.sampler
        if not folder.is_dir():
            quantize(
                s.pipe, self.prompts("fit"), settings=settings_of(BITS, size_ratio=self.max_size, seed=s.seed),
                output=folder, minutes=self.share("quantize") / 60, steps=s.steps, batch=s.batch, images=0,
                source=self.source, load=self.load, progress=told, **s.options,
            )  # fmt: skip
        size = read(folder / "report.json")["bytes"]
        self.report.size = round(size["checkpoint"] / size["float32"], 4)
        twin = accelerate(self.load(ModelSource("folder", folder.name, str(folder))))
        twin.set_progress_bar_config(disable=True)
        twin.scheduler = s.pipe.scheduler
        twin.to(s.pipe.device)
        return twin

    def judge(self, what: str) -> Judge:
        """What measures on the prompts of a part."""
        s = self.sampler
        full = Sampler(s.pipe, self.prompts(what), s.steps, s.seed + _SEEDS[what], s.batch, s.options)
        return Judge(full, self.pipe)

    def tried(self, judge: Judge, candidates: Sequence[Candidate]) -> None:
        """Measure candidates, each once, whatever interrupts it."""
        file = self.work / "tried.json"
        known = read(file) if file.is_file() else {}
        for number, one in enumerate(candidates):
            if one.name not in known:
                self.progress(f"together: {one.name}", self._done + 0.1 * number / len(candidates), None)
                known[one.name], _ = judge.of(one, 0)
                write(file, known)
            self.report.tried[one.name] = known[one.name]

    def plans(self, told: Progress, kept: float) -> list[Candidate]:
        """Plans for every speed; where they cannot be searched at once, the one for what quantizing leaves."""
        s = self.sampler
        every, one = self.work / "plans.json", self.work / f"plan-{self.min_psnr:g}.json"
        call = {
            "steps": s.steps, "seed": s.seed, "batch": s.batch, "seconds": self.share("plans"), "images": math.inf,
            "progress": told, "state": self.work / "plans.search", **s.options,
        }  # fmt: skip
        try:
            if not every.is_file() and not one.is_file():
                self.tune(every, **call)
            if not every.is_file() and not one.is_file():
                self.tune(one, min_psnr=min(80.0, left_for_plans(self.min_psnr, kept)), **call)
        except _STOPPING:
            raise
        except AccelerationError as error:
            self.report.notes.append(f"no plan: {error}")
            return []
        found = load_tuned(str(every if every.is_file() else one))
        if isinstance(found, TunedPlan):
            return [Candidate("plan for what is left", s.steps, plan=found)]
        return [Candidate(f"plan {called(plan)}", s.steps, plan=plan) for plan in found.members]

    def tune(self, file: Path, **call: Any) -> None:
        """One search, written to a file; a family that is not to be had leaves none."""
        try:
            tune(self.pipe, self.prompts("fit")[:TUNED_ON], **call).save(file)
        except ConfigurationError as error:
            if "min_psnr" in call or isinstance(error, _STOPPING):
                raise
            self.report.notes.append(f"no family of plans: {error}")

    def solvers(self, told: Progress) -> list[Candidate]:
        """Learned solvers of a half and a third of the steps, towards what the pipeline draws as it is."""
        if not self._is_wanted("solver"):
            return []
        s, folder = self.sampler, self.work / "solver"
        sizes = sorted({max(2, s.steps // 2), max(2, s.steps // 3)})
        if not folder.is_dir():
            try:
                solver = tune_solver(
                    self.pipe, self.prompts("fit")[:TUNED_ON], sizes, towards="baseline", steps=s.steps,
                    seed=s.seed, batch=s.batch, seconds=self.share("solver"), progress=told,
                    state=self.work / "solver.search", **s.options,
                )  # fmt: skip
            except _STOPPING:
                raise
            except AccelerationError as error:
                self.report.notes.append(f"no solver: {error}")
                return []
            made = self.work / ".solver"
            solver.save_pretrained(made)
            made.replace(folder)
        solver = LearnedMultistepScheduler.from_pretrained(folder)
        return [Candidate(f"solver of {size} evaluations", size, scheduler=solver) for size in sizes]

    def written(self, chosen: Candidate) -> Path:
        """The pipeline folder with its recipe and report, beside the place of the output."""
        made = self.work / "made"
        shutil.rmtree(made, ignore_errors=True)
        s, pipe = self.sampler, self.pipe
        sides: dict[str, Any] = {
            key: s.options[key] for key in ("guidance_scale", "height", "width") if key in s.options
        }
        self.report.call = {"steps": chosen.steps, **sides}
        if self.max_size is None:
            save(plain_twin(pipe), self.source, made)
        else:
            shutil.copytree(self.work / "quantized", made, ignore=shutil.ignore_patterns("report.*", "log.jsonl"))
        with chosen.applied(pipe):
            _put_scheduler(pipe.scheduler, made)
            handle = getattr(pipe, "acceleration", None)
            save_recipe(
                pipe,
                {} if handle is None else handle.features,
                set(),
                made,
                overwrite=True,
                with_model=True,
                call=self.report.call,
                measured={**self.report.measured, "size": self.report.size},
            )
        index = read(made / INDEX)
        write(made / INDEX, {**index, KEY: {**index.get(KEY, {}), RECIPE: True}})
        if (self.work / "plans.json").is_file():
            shutil.copy(self.work / "plans.json", made)
        write(made / "report.json", self.report.to_dict())
        (made / "report.html").write_text(self.report.page(), encoding="utf-8")
        return made


def _put_scheduler(scheduler: Any, folder: Path) -> None:
    """Make a scheduler that of a pipeline folder, if it is one that such a folder can name."""
    name = type(scheduler).__name__
    for library, names in (("diffusers", diffusers), (LIBRARY, schedulers)):
        if getattr(names, name, None) is type(scheduler):
            shutil.rmtree(folder / "scheduler", ignore_errors=True)
            scheduler.save_pretrained(folder / "scheduler")
            write(folder / INDEX, {**read(folder / INDEX), "scheduler": [library, name]})
            return
