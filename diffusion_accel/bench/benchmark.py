"""`benchmark`: the public way to compare settings, fewer steps and other accelerators on one model."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from diffusion_accel.arguments import public
from diffusion_accel.changes import Changes
from diffusion_accel.diffusers_compat import origin_of
from diffusion_accel.errors import ConfigurationError
from diffusion_accel.evaluation.prompts import embedded_prompts
from diffusion_accel.io import shown
from diffusion_accel.measure.request import MAX_SEED, MOST_STEPS, listed, options_of, texts_of, usual_steps, whole
from diffusion_accel.model_files.names import find_model
from diffusion_accel.pipelines.loading import class_of
from diffusion_accel.pipelines.schedulers import check_scheduler, check_steps
from diffusion_accel.progress import Progress, silent

from .entries import USUAL, Entry, check_entries, read_entries
from .result import Benchmark
from .run import bench
from .runner import Job, Runner, check_asked

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

UNSEEN = 200  # of the embedded model's prompts: those that `tune` begins with are left to it
USUAL_STEPS = 50
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@public
def benchmark(
    pipe: DiffusionPipeline | str | Path,
    prompts: str | Sequence[str] | None = None,
    *,
    entries: Sequence[str | Entry] = USUAL,
    steps: int | None = None,
    seed: int = 0,
    guidance_scale: float | None = None,
    height: int | None = None,
    width: int | None = None,
    scheduler: str | None = None,
    count: int = 16,
    batch: int = 8,
    rounds: int = 5,
    converged: bool = True,
    device: str | None = None,
    dtype: str = "float32",
    allow_pickle: bool = False,
    progress: Progress = silent,
) -> Benchmark:
    """Measure speed and fidelity of any set of settings against the plain model, times in turn.

        found = benchmark("sticker", entries=["reuse:hold:2", "deepcache:3", "fewer-steps:12"])
        print(bench.report.markdown(found))

    One step fewer, fewer steps at the time of each entry, and another seed come with them, as anchors: what a given
    PSNR means on this model.

    Args:
        pipe: embedded name, hub id, folder or `.safetensors` file; or a loaded pipeline without features, which is
            afterwards as it was. Other accelerators are compared by name only: they run in processes of their own.
        prompts: one an image; None: captions of the embedded model's training images, classes evenly over all there
            are, or nothing where nothing is asked.
        entries: `KIND` or `KIND:SETTINGS`: a feature with its settings ("reuse:tuned:fast", "encoder-reuse"), every
            plan of a tuned family ("family:tuned:ddim", "family:FILE"), fewer steps
            ("fewer-steps:STEPS[,SCHEDULER[,SPACING]]"), another method's forecasts in the place of steps
            (`forecast:NAME[@ORDER][,EVERY][,SPACE]`, see `forecasting.Rule.parse`), or another accelerator with its
            settings ("deepcache:3", "taylorseer:interval=3,order=2"; see `peers.PEERS`).
        steps: of the baseline; None: what the embedded model recommends, as for the next three, else 50.
        seed: image k starts from the noise of seed + k.
        guidance_scale: 0 to 1000; 1 switches classifier-free guidance off.
        height, width: pixels.
        scheduler: of the baseline, such as "ddim" or "dpm++,lu"; None: the recommended one, else the model's own.
        count: how many prompts or images where no prompts are given.
        batch: images in a call, except for times.
        rounds: timed rounds, in each of which every entry has its turn.
        converged: also measure the distance to many steps of a good solver.
        device: for a name, what to compute on; None: the CPU.
        dtype: for a name, "float32", "float16" or "bfloat16".
        allow_pickle: for a name, also load weights that are pickles, which can run code.
        progress: told what is being done.

    Returns:
        Rows of the baseline, the entries and the anchors, with what they were measured on. An entry that fails while it
        runs is a row that says why.

    Raises:
        ConfigurationError: an entry that cannot work here, prompts that are missing, a number that is not allowed.
        ModelLoadError: the model cannot be loaded.
        RuntimeError: the baseline itself fails.
    """
    parsed = read_entries(entries)
    whole("count", count), whole("batch", batch), whole("rounds", rounds), whole("seed", seed, 0, MAX_SEED)
    if scheduler is not None:
        check_scheduler(scheduler)
    if dtype not in _DTYPES:
        raise ConfigurationError(f"dtype must be one of {', '.join(_DTYPES)}, got {shown(dtype)}")
    try:
        torch.device(device or "cpu")
    except RuntimeError as error:
        raise ConfigurationError(f"device {shown(device)} is none that torch knows; use cpu, cuda, mps, …") from error
    call = {"guidance_scale": guidance_scale, "height": height, "width": width}
    common: dict[str, Any] = {"scheduler": scheduler, "seed": seed, "batch": batch, "threads": torch.get_num_threads()}
    if not isinstance(pipe, (str, os.PathLike)):
        return _of_pipeline(pipe, prompts, parsed, steps, count, rounds, converged, call, common, progress)
    source = find_model(os.fspath(pipe), allow_pickle)
    recommended = source.defaults
    call = {name: recommended.get(name) if value is None else value for name, value in call.items()}
    steps = steps or recommended.get("steps") or USUAL_STEPS
    named = scheduler or recommended.get("scheduler", "")
    check_entries(parsed, whole("steps", steps, 1, MOST_STEPS), named, source)
    check_steps(named or None, source, steps)
    if prompts is None:
        prompts = embedded_prompts(count, UNSEEN) if source.kind == "embedded" else [""] * count
    texts = tuple(listed(prompts))
    check_asked(texts, class_of(source, ask_hub=not any(texts)))
    job = Job(
        model=os.fspath(pipe),
        prompts=texts,
        steps=steps,
        device=device or "cpu",
        dtype=dtype,
        allow_pickle=allow_pickle,
        options=call,
        **common,
    )
    return bench(job, parsed, rounds, converged, progress)


def _of_pipeline(
    pipe: DiffusionPipeline,
    prompts: str | Sequence[str] | None,
    entries: list[Entry],
    steps: int | None,
    count: int,
    rounds: int,
    converged: bool,
    call: dict[str, Any],
    common: dict[str, Any],
    progress: Progress,
) -> Benchmark:
    """The benchmark of a loaded pipeline, which is afterwards as it was."""
    if getattr(pipe, "acceleration", None) is not None:
        raise ConfigurationError(
            "the pipeline has features, and the baseline has none: pipe.acceleration.remove() first"
        )
    for entry in entries:
        if entry.is_peer:
            raise ConfigurationError(
                f"the entry {entry.name} runs in a process of its own: give the model's name or folder, not a pipeline"
            )
    options_of(pipe, steps=steps, **call)
    steps = steps or usual_steps(pipe) or USUAL_STEPS
    job = Job(
        model=Path(origin_of(pipe) or type(pipe).__name__).name,
        prompts=tuple([""] * count if prompts is None else texts_of(pipe, prompts)),
        steps=steps,
        device=str(pipe.device),
        dtype=str(pipe.dtype).removeprefix("torch."),
        options=call,
        **common,
    )
    with Changes() as changes:
        changes.add(functools.partial(setattr, pipe, "scheduler", pipe.scheduler))
        return bench(job, entries, rounds, converged, progress, Runner(job, pipe))
