"""A stage of quantizing, and what a run knows and has made when it comes to it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import nn

    from diffusion_accel.measure.sampler import Sampler
    from diffusion_accel.progress import Progress
    from diffusion_accel.quant.layers import QuantizedLayer
    from diffusion_accel.quant.spec import ModelSpec

    from .calibration import CalibrationSet
    from .settings import QuantizeSettings
    from .trainable_layer import TrainableLayers

SAVE_EVERY = 30.0  # seconds of a long stage that an interruption may cost

Values = dict[str, Any]  # a table of JSON values, or tensors by name


@dataclass
class RunState:
    """What a run is asked for, what its stages have made, and what they have told.

    Attributes:
        sampler: the pipeline with prompts, steps and guidance; with fewer prompts where the time does not do for all.
        settings: how to quantize.
        work: the folder in which the stages keep what they make.
        progress: told what is being done.
        denoiser: the model that is quantized, in place.
        minutes: about how long the run may take; None: as long as what is asked for takes.
        began: on the monotonic clock.
        calibration, heldout: what the denoiser was given and answered, to fit on and to judge by.
        probe: rows and timesteps on which sensitivities are measured.
        needs: the sensitivity of each layer, where somebody wants it.
        scores: of each layer, for the allocations by ranks.
        search: the sizes that were tried for `min_psnr`, and the one that was found.
        trainable: the layers while they are quantized.
        plain_tables, tables: embedding tables as they were, and quantized.
        plan: how much every stage does, and the seconds that this is expected to take.
        peaks: the largest probability of each attention that is quantized, by timestep.
        spec: how the model is quantized, at the end.
        losses: by stage, what the log has: loss with rounding to nearest and learnt by block, and so on.
        seconds: by stage.
        validation: relative squared error of predictions on `heldout` after each stage.
        undo: what takes the model back to what it was, last first.
    """

    sampler: Sampler
    settings: QuantizeSettings
    work: Path
    progress: Progress
    denoiser: nn.Module
    minutes: float | None = None
    began: float = field(default_factory=time.monotonic)
    calibration: CalibrationSet = field(init=False)
    heldout: CalibrationSet = field(init=False)
    probe: dict[str, int] = field(default_factory=dict)
    needs: dict[str, float] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    search: dict[str, Any] = field(default_factory=dict)
    trainable: TrainableLayers = field(init=False)
    plain_tables: dict[str, nn.Embedding] = field(default_factory=dict)
    tables: dict[str, QuantizedLayer] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)
    peaks: dict[str, torch.Tensor] = field(default_factory=dict)
    spec: ModelSpec = field(init=False)
    losses: dict[str, list[Any]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=lambda: {"calibration": 0.0, "sensitivity": 0.0})
    validation: dict[str, float] = field(default_factory=dict)
    undo: ExitStack = field(default_factory=ExitStack)

    @property
    def kept_for_validation(self) -> int:
        """How many of the prompts are not calibrated on."""
        return self.settings.validation or max(1, len(self.sampler.prompts) // 8)

    @property
    def allocated(self) -> QuantizeSettings:
        """The settings, with the size that a search has found in place of the PSNR that was asked for."""
        if not self.search:
            return self.settings
        return replace(self.settings, min_psnr=None, size_ratio=self.search["size_ratio"])

    def left(self) -> float | None:
        """Seconds of the budget that are left; None without one."""
        return None if self.minutes is None else self.minutes * 60 - (time.monotonic() - self.began)

    def log(self, stage: str, **values: Any) -> None:
        """Note what a stage has come to, in `losses` and in the folder's log."""
        self.losses.setdefault(stage, []).append(values)
        with (self.work / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": stage, **values}) + "\n")

    def tell(self, what: str, stage: str = "", within: float = 0.0) -> None:
        """Say what is being done; with a planned stage, of which the share `within` is done, also how far all is."""
        self.progress(what, *(progress_of(self.plan, stage, within) if stage else (0.0, None)))


def progress_of(plan: dict[str, Any], stage: str, within: float) -> tuple[float, float]:
    """Share of everything done and seconds left when `within` (0 … 1) of a stage is done."""
    planned = plan["seconds"]
    length = {"rounding": planned["rounding"], "ranges": planned["fixed"], "finetuning": planned["finetuning"]}
    before = dict(zip(length, (0.0, planned["rounding"], planned["rounding"] + planned["fixed"]), strict=True))
    total = max(1e-9, sum(length.values()))
    done = before[stage] + within * length[stage]
    return min(1.0, done / total), max(0.0, total - done)


@dataclass(frozen=True)
class Part:
    """A part of a stage.

    Attributes:
        key: stands in the name of its file.
        given: what the stage's own functions need to know of it.
    """

    key: int | str = ""
    given: Any = None


@dataclass
class Job:
    """One part of a stage that is to be run.

    Attributes:
        part: which one.
        kept: values that an interrupted run has left of it, not complete; or None.
        keep: writes values to the part's file.
    """

    part: Part
    kept: Values | None
    keep: Callable[[Values], None]
    saved: float = field(default_factory=time.monotonic)

    def save(self, values: Callable[[], Values]) -> None:
        """Keep the values so far, unless they were kept within the last `SAVE_EVERY` seconds."""
        if time.monotonic() - self.saved > SAVE_EVERY:
            self.keep(values())
            self.saved = time.monotonic()


def _nothing(_state: RunState, _part: Part, _values: Values) -> None:
    """What a stage loads whose `run` leaves all it makes in the model."""


@dataclass(frozen=True)
class Stage:
    """One stage: what it makes, and the file that holds this, so that an interrupted run goes on behind it.

    Attributes:
        name: what its seconds are counted as; empty: they are not.
        run: makes the values of a part; they are written to its file.
        load: puts values into the state, whether they were made now or by an earlier run.
        file: where in the folder of the run the values are, as JSON or safetensors, `{}` standing for the key of the
            part; empty: nowhere, the stage is run each time.
        parts: what it consists of, each with a file of its own.
        wanted: whether the run has this stage.
        complete: whether values that an earlier run has left are all of them; if not, `run` goes on from there.
        error: the name of the error of predictions that is measured behind it; empty: none is.
        inputs: whether inputs are rounded for that, beside weights.
    """

    name: str
    run: Callable[[RunState, Job], Values]
    load: Callable[[RunState, Part, Values], None] = _nothing
    file: str = ""
    parts: Callable[[RunState], Iterable[Part]] = lambda _: (Part(),)
    wanted: Callable[[RunState], bool] = lambda _: True
    complete: Callable[[RunState, Values], bool] = lambda _state, _values: True
    error: str = ""
    inputs: bool = False
