"""Many prompts, drawn by processes that know nothing of each other but a folder: each takes what nobody has taken.

    share = Share(folder, lambda seed: plan_outputs(…, resuming=True), {"model": "sticker"})
    for number, plan in share.turns():
        for file in plan.write(draw(pipe, plan.request)): ...
        share.drawn(number)
    print(share.summary())

A prompt is done when all of its files are there: they get their names when they are complete. So the same call goes on
after whatever ended the processes. What they have to know of each other is in the folder `.diffusion-accel`, beside
the images:

- `job.json`: what is drawn, and the seed of all seeds that nobody gave. Whoever comes first writes it.
- `claims`: who draws prompt k holds a lock on its byte k (`Claims`).
- `….jsonl`: for each process what it drew, and what failed (`Events`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import secrets
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion_accel.errors import ConfigurationError, OutputError
from diffusion_accel.io import is_there, read_json, replacing, writing
from diffusion_accel.outputs import check_free

from .claims import Claims, Events
from .outputs import OutputPlan

STATE = ".diffusion-accel"
_JOB = 0  # the claim of `job.json`; that of prompt k is k


@dataclass(frozen=True)
class Summary:
    """What became of the prompts.

    Attributes:
        prompts: how many there are.
        before: how many were done before this process began.
        drawn: by the name of a process, how many it has drawn since then.
        failed: number of a prompt, from 1 -> why it is not there.
    """

    prompts: int
    before: int
    drawn: dict[str, int]
    failed: dict[int, str]

    def __str__(self) -> str:
        drawn = sum(self.drawn.values())
        by = ", ".join(f"{name}: {count}" for name, count in sorted(self.drawn.items()))
        whom = f" ({by})" if len(self.drawn) > 1 else ""
        rest = f", {len(self.failed)} failed" if self.failed else ""
        return f"{drawn} of {self.prompts} prompts were drawn{whom}, {self.before} were there before{rest}"


def seed_of(seed: int, number: int) -> int:
    """The seed of prompt `number`, 0 to 2^32 - 1, where nobody has given one: the same in every process."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{number}".encode()).digest()[:4])


class Share:
    """What one process draws of many prompts.

    Args:
        folder: of the images; made if it is not there.
        plan: makes the files of every prompt (`plan_outputs(…, resuming=True)`), given the seed for `seed_of`. May be
            called twice.
        settings: what else the images depend on, as JSON values: the model, its scheduler, features, …
        name: of this process, for `Summary`.

    Raises:
        ConfigurationError: the folder was begun with other prompts or settings, or this system has no file locks.
        OutputError: an image is there already and the folder was not begun by such a call, or it cannot be written to.
    """

    def __init__(
        self,
        folder: Path,
        plan: Callable[[int], Sequence[OutputPlan]],
        settings: Mapping[str, Any],
        name: str = "process 0",
    ) -> None:
        self.folder, self._state = folder, folder / STATE
        job = self._job()
        seed = secrets.randbelow(2**32) if job is None else job["seed"]
        self.plans = list(plan(seed))
        if job is None:
            self._check_free()
        with writing(self._state):
            self._state.mkdir(parents=True, exist_ok=True)
        self._claims = Claims(self._state / "claims")
        self._claims.take(_JOB, wait=True)
        try:
            job = self._job()
            if job is not None and job["seed"] != seed:  # another process was first
                self.plans = list(plan(job["seed"]))
            self._agree(job, seed, json.loads(json.dumps(settings, default=str)))
        finally:
            self._claims.give_back(_JOB)
        self._events = Events(self._state, name)
        self._drawn: Counter[str] = Counter()
        self._failed: dict[int, str] = {}
        self._left = self._half_written()
        self._before = self.done()

    # ------------------------------------------------------------------ drawing
    def turns(self) -> Iterator[tuple[int, OutputPlan]]:
        """The prompts that are to be drawn here, one after the other, by number from 1; tell `drawn` or `failed`.

        First whatever nobody else draws. Then those that others were drawing are awaited, and drawn here if their
        process has ended without. So at the end every prompt is there, or was told to have failed.
        """
        taken = []
        for number in range(1, len(self.plans) + 1):
            if not self._is_done(number):
                if self._claims.take(number):
                    yield from self._turn(number)
                else:
                    taken.append(number)
        for number in taken:
            self._claims.take(number, wait=True)
            yield from self._turn(number)

    def _turn(self, number: int) -> Iterator[tuple[int, OutputPlan]]:
        """A prompt that is claimed, if it is still to be drawn."""
        try:
            self._listen()
            if not self._is_done(number) and number not in self._failed:
                plan = self.plans[number - 1]
                for file in plan.files():
                    for half in self._left.pop(file.name, ()):
                        half.unlink(missing_ok=True)
                yield number, plan
        finally:
            self._claims.give_back(number)

    def drawn(self, number: int) -> None:
        """All files of this prompt are written."""
        self._events.add(prompt=number, drawn=True)

    def failed(self, number: int, why: str) -> None:
        """This prompt cannot be drawn; the next call tries it again."""
        self._events.add(prompt=number, failed=why)

    def done(self) -> int:
        """How many prompts are there."""
        return sum(self._is_done(number) for number in range(1, len(self.plans) + 1))

    def summary(self) -> Summary:
        """What became of the prompts since this process began, whoever drew them."""
        self._listen()
        failed = {number: why for number, why in sorted(self._failed.items()) if not self._is_done(number)}
        return Summary(len(self.plans), self._before, dict(self._drawn), failed)

    def close(self) -> None:
        """Give back what is claimed."""
        self._claims.close()

    # ------------------------------------------------------------------ what is known
    def _is_done(self, number: int) -> bool:
        return all(is_there(file) for file in self.plans[number - 1].files())

    def _listen(self) -> None:
        """Read what the processes have told."""
        for event in self._events.news():
            number, why = event.get("prompt"), event.get("failed")
            if not isinstance(number, int) or not 1 <= number <= len(self.plans):
                continue
            if isinstance(why, str):
                self._failed[number] = why
            else:
                self._drawn[str(event.get("process"))] += 1

    def _half_written(self) -> dict[str, list[Path]]:
        """By the name of a file, what processes that were killed have left of it."""
        found: dict[str, list[Path]] = {}
        for half in self.folder.glob(".*.tmp.*"):
            stem = half.name[1:].removesuffix(f".tmp{half.suffix}").rpartition(".")[0]
            found.setdefault(f"{stem}{half.suffix}", []).append(half)
        return found

    # ------------------------------------------------------------------ what is drawn
    def _job(self) -> dict[str, Any] | None:
        """What the folder was begun with; None: it was not."""
        file = self._state / "job.json"
        if not is_there(file):
            return None
        job = read_json(file)
        kinds = {"seed": int, "settings": dict, "prompts": list}
        if not isinstance(job, dict) or any(not isinstance(job.get(key), kind) for key, kind in kinds.items()):
            raise ConfigurationError(f"{file} is damaged; use another folder")
        return job

    def _check_free(self) -> None:
        """Refuse files that are there before anything was begun here."""
        try:
            check_free([file for plan in self.plans for file in plan.files()], overwrite=False)
        except OutputError as error:
            if self._job() is None:  # else another process began it meanwhile
                raise OutputError(f"{str(error).partition(';')[0]}; use another folder") from error

    def _agree(self, job: dict[str, Any] | None, seed: int, settings: dict[str, Any]) -> None:
        """Write what is drawn, or refuse other prompts and settings than the folder was begun with."""
        prompts = [_digest(plan) for plan in self.plans]
        if job is None:
            job = {"seed": seed, "settings": settings, "prompts": []}
        known = job["settings"]
        others = sorted(key for key in {*known, *settings} if known.get(key) != settings.get(key))
        if others:
            raise ConfigurationError(
                f"{self.folder} was begun with other settings ({', '.join(others)}); go on with the same ones, or use "
                "another folder"
            )
        for number, (before, now) in enumerate(zip(job["prompts"], prompts, strict=False), 1):
            if before != now:
                raise ConfigurationError(
                    f"{self.folder} was begun with another prompt {number}, or other settings of it; go on with the "
                    "same ones (more may follow), or use another folder"
                )
        if len(prompts) > len(job["prompts"]):
            with writing(self._state), replacing(self._state / "job.json") as temporary:
                temporary.write_text(json.dumps(job | {"prompts": prompts}), encoding="utf-8")


def _digest(plan: OutputPlan) -> str:
    """What tells a prompt from others: everything it is drawn with, and the names of its files."""
    values = [dataclasses.asdict(plan.request), [path.name for path in plan.paths]]
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]
