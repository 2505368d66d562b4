"""The prompts of a command, of its arguments and of a file: read, as requests, and the files that they become."""

from __future__ import annotations

import dataclasses
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusion_accel.errors import ConfigurationError
from diffusion_accel.generation.layers import drawn_layers
from diffusion_accel.generation.outputs import OutputPlan, plan_outputs
from diffusion_accel.generation.request import EACH, MAX_IMAGES, Request, check_numbers, check_text
from diffusion_accel.io import first_line, parse_json, read_text, shown, split_lines
from diffusion_accel.model_files.names import ModelSource

from .settings import OLD_KEYS, Settings, check_controlled, check_features, check_images, renamed, typed


@dataclass(frozen=True)
class Job:
    """One prompt, the file it is written to, and what a line of a prompts file overrides of the common settings."""

    prompt: str
    output: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)


def read_jobs(prompts: list[str], file: str | None, flag: str = "--prompts-file") -> list[Job]:
    """The prompts of the command line, then those of a prompts file (a prompt a line, or JSON objects a line)."""
    jobs = [Job(prompt=p) for p in prompts]
    if file is not None:
        text = read_text(file, flag)
        jsonl = Path(file).suffix.lower() in (".jsonl", ".json", ".ndjson")
        for number, line in enumerate(split_lines(text), 1):
            if line.strip():
                jobs.append(_json_job(line, f"{file}, line {number}") if jsonl else Job(prompt=line.strip()))
    if not jobs:
        raise ConfigurationError(
            f"there is no prompt in {flag} {file}"
            if file is not None
            else "there is no prompt; give one, --class, or --prompts-file"
        )
    for job in jobs:
        if not job.prompt.strip():
            raise ConfigurationError("a prompt is empty")
        check_text(job.prompt, "prompt")
        check_text(job.overrides.get("negative_prompt"), "negative prompt")
    return jobs


def texts_of(file: str | None, count: int, source: ModelSource, least: int) -> list[str]:
    """The first prompts of a file; without one, of those that the embedded model was trained with; else none.

    Raises:
        ConfigurationError: the file cannot be read, or has less than `least` of them.
    """
    if file is not None:
        texts = [job.prompt for job in read_jobs([], file)][:count]
        if len(texts) < least:
            raise ConfigurationError(f"--prompts-file must have at least {least} prompts, got {len(texts)}")
        return texts
    if source.kind != "embedded":
        return []
    from diffusion_accel.evaluation.prompts import embedded_prompts  # heavy: torch

    return embedded_prompts(count)


def prompts_needed(why: str, least: int) -> ConfigurationError:
    """That a model which is not embedded needs a file of prompts, and what that is."""
    return ConfigurationError(
        f"--prompts-file is needed, a text file with a prompt a line, at least {least} of them: {why}"
    )


def _json_job(line: str, where: str) -> Job:
    try:
        values = parse_json(line, where, nonfinite=True)
    except ConfigurationError as error:
        raise ConfigurationError(f"{where}: not valid JSON: {first_line(error.__cause__ or error)}") from error
    known = {"prompt", "output", "seed", *EACH}
    if not isinstance(values, dict) or "prompt" not in values:
        raise ConfigurationError(f'{where}: expected an object with a "prompt"')
    for key in values:
        if key not in known and key not in OLD_KEYS:
            raise ConfigurationError(f"{where}: unknown key {shown(key)}; the keys are: {', '.join(sorted(known))}")
    values = renamed(values, where)
    values = {k: typed(k, v, f"{where}: ") for k, v in values.items()}
    check_numbers(values, f"{where}: ", "-")
    return Job(values.pop("prompt"), values.pop("output", None), values)


def request_of(settings: Settings, job: Job) -> Request:
    """One prompt with the common settings; without a seed anywhere, a random one is drawn (and printed and stored)."""
    keys = [f.name for f in dataclasses.fields(Request)]
    values = {key: getattr(settings, key) for key in keys if hasattr(settings, key)}
    values |= {"prompt": job.prompt, **job.overrides}
    if values["seed"] is None:
        values["seed"] = secrets.randbelow(2**32)
    return Request(**values)


def plan_jobs(
    settings: Settings,
    source: ModelSource,
    requests: list[Request],
    jobs: list[Job],
    *,
    most: int = MAX_IMAGES,
    resuming: bool = False,
) -> list[OutputPlan]:
    """The files of all prompts; whatever can be refused without a model is.

    Args:
        settings, source: of the command.
        requests, jobs: of each prompt.
        most: images that one command may draw.
        resuming: see `plan_outputs`.
    """
    for request in requests:
        check_features(settings, request.steps, source)
    if (total := sum(request.count for request in requests)) > most:
        raise ConfigurationError(f"{total} images are asked for; one command draws at most {most}")
    plans = plan_outputs(
        settings.output,
        requests,
        [job.output for job in jobs],
        overwrite=settings.overwrite,
        resuming=resuming,
        comparing=settings.compare,
        what="-o",
        layers=drawn_layers(settings.features),
        wanted=settings.wanted_layers,
        preview=settings.preview,
        shown=settings.preview_steps is not None,
        multiplied=settings.premultiplied,
    )
    check_controlled(settings, source)
    check_images(settings)
    return plans
