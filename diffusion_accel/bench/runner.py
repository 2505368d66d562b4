"""Runs entries on one loaded pipeline."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypedDict

import diffusers
import torch
import transformers

from diffusion_accel.conditioning import check_prompts_do, takes_prompt, usual_texts
from diffusion_accel.errors import ConfigurationError
from diffusion_accel.flops import count_flops
from diffusion_accel.measure.memory import peak_mib, reset_peak
from diffusion_accel.measure.sampler import Sampler
from diffusion_accel.measure.timing import seconds_of
from diffusion_accel.model_files.names import find_model
from diffusion_accel.pipelines.loading import load_pipeline
from diffusion_accel.pipelines.schedulers import not_learnt_here, set_scheduler
from diffusion_accel.switchboard import accelerate, why_not

from . import peers
from .entries import Entry

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class Facts(TypedDict):
    """What one image's call takes: operations, and the highest memory use in MiB; None where nobody knows."""

    flops: float | None
    peak_mib: float | None


@dataclass(frozen=True)
class Job:
    """What every entry does: the images of these prompts.

    Attributes:
        model: embedded name, folder, file or hub id.
        steps, scheduler: of the baseline; None: the scheduler that an embedded model recommends, else the model's own.
        options: further arguments of the pipeline.
        allow_pickle: also load weights that are pickles.
        threads: CPU threads.
    """

    model: str
    prompts: tuple[str, ...]
    steps: int
    scheduler: str | None = None
    seed: int = 0
    batch: int = 8
    device: str = "cpu"
    dtype: str = "float32"
    allow_pickle: bool = False
    threads: int = 1
    options: dict[str, Any] = field(default_factory=dict)


def check_asked(prompts: Sequence[str], cls: type[DiffusionPipeline] | None) -> None:
    """Raise `ConfigurationError` for no prompts, and `UnsupportedPipelineError` for nothing but prompts, where a class
    of pipelines needs them, or more; None: it is not known yet."""
    if cls is None:
        return
    check_prompts_do(cls, ("height", "width", "guidance_scale"))
    if takes_prompt(cls) and not any(prompt.strip() for prompt in prompts):
        raise ConfigurationError(
            "prompts must be given (one a line in a prompts file): fidelity depends on what is drawn"
        )


class Runner:
    """One pipeline, loaded as the job says, or one that is there already."""

    def __init__(self, job: Job, pipe: DiffusionPipeline | None = None) -> None:
        if pipe is None:
            for library in (diffusers, transformers):
                library.utils.logging.disable_progress_bar()
            torch.set_num_threads(job.threads)
            pipe = load_pipeline(job.model, dtype=getattr(torch, job.dtype), allow_pickle=job.allow_pickle)
            pipe = pipe.to(job.device)
            pipe.set_progress_bar_config(disable=True)
            self.scheduler = job.scheduler or find_model(job.model, job.allow_pickle).defaults.get("scheduler", "")
        else:
            self.scheduler = job.scheduler or ""
        self.pipe = pipe
        check_asked(job.prompts, type(self.pipe))
        if not any(job.prompts):
            job = replace(job, prompts=tuple(usual_texts(self.pipe, len(job.prompts))))
        if self.scheduler:
            set_scheduler(self.pipe, self.scheduler)
        self.job = job
        self._taught: set[str] = set()  # entries whose first call only taught the next ones
        self.sampler = Sampler(self.pipe, job.prompts, job.steps, job.seed, job.batch, job.options)
        self._turns = itertools.count()

    def check(self, entry: Entry) -> None:
        """Refuse what cannot work on this pipeline, before anything is measured. What a peer's package needs
        only its own process knows.

        Raises:
            ConfigurationError: the entry cannot work.
        """
        reason = entry.refusal(self.job.steps, self.scheduler)
        before = self.pipe.scheduler
        for part in entry.parts:
            if part.kind == "fewer-steps":
                steps, name = part.fewer_steps()
                if name:
                    set_scheduler(self.pipe, name)
                reason = reason or not_learnt_here(self.pipe, steps)
        if entry.is_peer:
            reason = reason or peers.unfit(entry.kind, self.pipe)
        for feature in entry.features:
            reason = reason or why_not(feature, self.pipe)
        self.pipe.scheduler = before
        if reason:
            raise ConfigurationError(f"the entry {entry.name} cannot work on {type(self.pipe).__name__}: {reason}")

    @contextlib.contextmanager
    def active(self, entry: Entry, seed: int | None = None, sampler: Sampler | None = None) -> Iterator[Sampler]:
        """A sampler with the entry switched on."""
        sampler = self.sampler if sampler is None else sampler
        if seed is not None:
            sampler = replace(sampler, seed=seed)
        if entry.by_image:
            sampler = replace(sampler, batch=1)
        scheduler, handle = self.pipe.scheduler, getattr(self.pipe, "acceleration", None)
        try:
            for part in entry.parts:
                if part.kind == "fewer-steps":
                    steps, name = part.fewer_steps()
                    sampler = replace(sampler, steps=steps)
                    if name:
                        set_scheduler(self.pipe, name)
            if features := entry.features:
                accelerate(self.pipe, *features)
                if any(feature.learns() for feature in features) and entry.name not in self._taught:
                    self._taught.add(entry.name)
                    sampler.part(0, 1).images()
            with torch.inference_mode():
                yield sampler
        finally:
            self.pipe.scheduler = scheduler
            if handle is None and getattr(self.pipe, "acceleration", None) is not None:
                self.pipe.acceleration.remove()

    def switch_on(self, peer: Entry) -> None:
        """Switch another accelerator on for good: every call is its own from now on."""
        caller = peers.switch_on(peer.kind, peer.peer_settings, self)
        self.sampler = replace(self.sampler, caller=caller)

    def images(self, entry: Entry, seed: int | None = None) -> torch.Tensor:
        """All images, (N, 3, H, W) in 0..1."""
        with self.active(entry, seed) as sampler:
            return sampler.images()

    def seconds(self, entry: Entry) -> float:
        """Of one image; of one after the other where they take different numbers of steps."""
        first = next(self._turns) % len(self.sampler.prompts) if entry.by_image else 0
        with self.active(entry, sampler=self.sampler.part(first, first + 1)) as sampler:
            return seconds_of(sampler.images, self.job.device)

    def facts(self, entry: Entry) -> Facts:
        """FLOPs of one image's call, and the peak memory in MiB while it runs (None where it cannot be measured).

        The mean FLOPs of all images where they take different numbers of steps.
        """
        counted = len(self.sampler.prompts) if entry.by_image else 1
        with self.active(entry, sampler=self.sampler.part(0, counted)) as sampler:
            with count_flops() as count:
                sampler.images()
            reset_peak(self.job.device)
            sampler.part(0, 1).images()
            return {"flops": count.total / counted, "peak_mib": peak_mib(self.job.device)}
