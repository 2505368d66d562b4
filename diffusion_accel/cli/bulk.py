"""`generate --distribute prompts`: many prompts, shared by processes, in a folder that says what is left to do."""

from __future__ import annotations

import dataclasses
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_accel import interrupts
from diffusion_accel.errors import AccelerationError, ConfigurationError, OutputError
from diffusion_accel.generation.bulk import Share, seed_of
from diffusion_accel.image_files import is_image_file
from diffusion_accel.io import first_line, shown
from diffusion_accel.model_files.names import ModelSource
from diffusion_accel.parallel.place import place

from . import processes
from .heavy import large_imports
from .prompts import Job, plan_jobs, request_of
from .settings import Settings
from .terminal import say

if TYPE_CHECKING:
    from diffusion_accel.generation.outputs import OutputPlan

MOST = 100_000  # images of one command
_TOGETHER = 600.0  # seconds in which the processes of a launcher have begun
_NAMED = 10  # prompts that failed and are named in the last line
#: settings, beside those of each prompt, on which images depend
_DECIDING = (
    *("scheduler", "controlnet", "lora", "ip_adapter", "ip_adapter_scale", "dtype", "quantize", "runtime"),
    *("premultiplied", "preview", "layers"),
)


class PromptsFailedError(AccelerationError):
    """Some prompts could not be drawn; all others were."""


def draw(
    settings: Settings, source: ModelSource, jobs: list[Job], classes: list[str], *, quiet: bool, json_lines: bool
) -> None:
    """Draw this process's share of the prompts; of several that a launcher started, the first one says how it ended.

    Args:
        settings, source: of the command.
        jobs: the prompts.
        classes: those that were given by `--class`.
        quiet: print nothing but JSON lines.
        json_lines: print a JSON line for each image.

    Raises:
        PromptsFailedError: in the first process, when all the rest is drawn.
    """
    check(settings)
    here = place()

    def plans_of(seed: int) -> list[OutputPlan]:
        seeds = [{} if settings.seed is not None else {"seed": seed_of(seed, k)} for k in range(1, len(jobs) + 1)]
        each = [dataclasses.replace(job, overrides=own | job.overrides) for own, job in zip(seeds, jobs, strict=True)]
        return plan_jobs(settings, source, [request_of(settings, job) for job in each], each, most=MOST, resuming=True)

    name = f"process {here.rank}" if here.size > 1 else f"{socket.gethostname()}:{os.getpid()}"
    share = Share(Path(settings.output), plans_of, _decides(settings, source), name)
    interrupts.explain(
        lambda: f"{share.done()} of {len(share.plans)} prompts are there; the same command draws the others"
    )

    with large_imports():
        from . import session  # heavy: torch, diffusers

    session.check_takes(source, classes, [path for plan in share.plans for path in plan.paths])
    settings = processes.share(settings, _TOGETHER)  # from here on all know what each of them does
    device = session.check_machine(settings)
    drawing = None
    for number, one in share.turns():
        drawing = drawing or session.open_drawing(settings, source, device, share.plans, quiet=quiet or here.size > 1)
        try:
            for part in drawing.parts(one):
                with part.showing():
                    drawing.write(part, drawing.draw(part), quiet=quiet, json_lines=json_lines)
        except OutputError:  # a full disk is full for all of them
            raise
        except Exception as error:
            why = first_line(error)
            share.failed(number, why)
            say(f"prompt {number} failed ({shown(one.request.prompt)}): {why}", err=True)
        else:
            share.drawn(number)
    if here.rank == 0:
        _conclude(share, quiet=quiet or json_lines)


def check(settings: Settings) -> None:
    """Refuse what cannot be combined with `--distribute`."""
    if settings.distribute != "prompts":
        raise ConfigurationError(f"--distribute must be prompts, got {shown(settings.distribute)}")
    reuse: Any = settings.features.get("reuse")
    refused = {
        "--patch-parallel": ("patch_parallel" in settings.features, "shares one image among all processes"),
        "--overwrite": (settings.overwrite, "would draw all images again each time; use another folder"),
        "--compare": (settings.compare, "measures times, which others that draw change; compare some prompts without"),
        "--reuse auto": (
            reuse is not None and reuse.plan == "auto",
            "learns from what a process draws first, so images would depend on which one draws them; use a plan that "
            "diffusion-accel tune made",
        ),
    }
    for flag, (given, reason) in refused.items():
        if given:
            raise ConfigurationError(f"--distribute cannot be combined with {flag}, which {reason}")
    if is_image_file(settings.output, "-o"):
        raise ConfigurationError(f"--distribute needs -o to be a folder, and -o {settings.output} is an image file")


def _decides(settings: Settings, source: ModelSource) -> dict[str, Any]:
    values = {key: getattr(settings, key) for key in _DECIDING}
    if settings.restored is not None:
        values["recipe"] = settings.restored.scheduler
    return {"model": source.name, "features": {n: f.to_dict() for n, f in settings.features.items()}, **values}


def _conclude(share: Share, *, quiet: bool) -> None:
    found = share.summary()
    if not quiet:
        say(found)
    if failed := list(found.failed):
        names = ", ".join(map(str, failed[:_NAMED])) + (", …" if len(failed) > _NAMED else "")
        raise PromptsFailedError(
            f"{len(failed)} of {found.prompts} prompts failed ({names}); all others are there, and the same command "
            "tries these again"
        )
