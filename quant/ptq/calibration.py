"""The calibration set: what the denoiser is given, and answers, along its own sampling trajectories; kept on disk."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from diffusion_accel.denoisers import find_denoiser, prediction
from diffusion_accel.errors import ConfigurationError, DamagedStateError, UnsupportedPipelineError
from diffusion_accel.hooks import bind_forward, map_tensors
from diffusion_accel.io import replacing
from diffusion_accel.measure.sampler import Sampler
from diffusion_accel.progress import Progress, silent

from .folder import load, read, write
from .stage import Job, Part, RunState, Stage, Values

_OUTPUT, _INDEX = "output", "index.json"
# arguments that have no row for each row of the batch, whatever their length
_SHARED = frozenset({"txt_ids", "img_ids"})


@dataclass
class Rows:
    """Some rows of one bucket: nested arguments of the denoiser, and what it answered in full precision."""

    arguments: dict[str, Any]
    output: torch.Tensor

    def __len__(self) -> int:
        return len(self.output)

    def pick(self, index: torch.Tensor) -> Rows:
        """The rows `index`."""
        count = len(self)

        def some(value: Any) -> Any:
            if isinstance(value, dict):
                return {k: some(v) for k, v in value.items()}
            if isinstance(value, list):
                return [some(v) for v in value]
            if isinstance(value, torch.Tensor) and value.dim() and len(value) == count:
                return value[index]
            return value

        picked = {k: v if k in _SHARED else some(v) for k, v in self.arguments.items()}
        return Rows(picked, self.output[index])

    def run(self, model: nn.Module) -> torch.Tensor:
        """What `model`, on any device, answers to these arguments; where `output` is."""
        device = next(model.parameters()).device
        given = map_tensors(lambda tensor: tensor.to(device), self.arguments)
        return prediction(model(**given)).to(self.output.device)


class CalibrationSet:
    """A folder with one safetensors file for every recorded bucket and chunk of prompts; read a bucket at a time.

    Attributes:
        timesteps: the recorded timesteps, one a bucket, noisiest first.
        rows: recorded rows of the first bucket (both branches of guidance count); `counts` has those of each.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = read(folder / _INDEX)
        try:
            self.timesteps = tuple(float(t) for t in index["timesteps"])
            self.counts: list[int] = [int(count) for count in index["counts"]]
            self.chunks: list[str] = [str(name) for name in index["chunks"]]
            self.plain: dict[str, Any] = dict(index["plain"])
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedStateError(f"{folder} is damaged; forget the run (restart)") from error
        self.rows = self.counts[0]

    def bucket(self, number: int) -> Rows:
        """Everything recorded at one timestep. Raises `ConfigurationError` if not all of it is there."""
        parts = [load(self.folder / f"b{number:03d}-{chunk}.safetensors") for chunk in self.chunks]
        if sum(len(part[_OUTPUT]) for part in parts) != self.counts[number]:
            raise ConfigurationError(f"{self.folder} has lost rows of its timestep {number}; forget the run (restart)")
        flat = {key: _joined(key, parts) for key in parts[0]}
        output = flat.pop(_OUTPUT)
        arguments: dict[str, Any] = dict(self.plain)
        for key, tensor in flat.items():
            *path, last = key.split("/")
            place = arguments
            for name in path:
                place = place.setdefault(name, {})
            place[last] = tensor
        return Rows(_lists(arguments), output)

    def sample(self, number: int, count: int, seed: int) -> Rows:
        """`count` rows of a bucket (or all it has), the same ones for the same seed."""
        rows = self.bucket(number)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
        return rows.pick(order[:count].sort().values)


def record(sampler: Sampler, buckets: int, folder: Path, progress: Progress = silent) -> CalibrationSet:
    """Draw the sampler's images and keep what its denoiser saw at `buckets` evenly spaced steps.

    Files that an interrupted recording left are used again; a recording counts once its index is written.

    Args:
        sampler: pipeline, prompts, steps and seeds.
        buckets: how many timesteps to keep, at most the number of steps; taken by stride from the trajectory.
        folder: where to.
        progress: told how many of the prompts are done.

    Raises:
        UnsupportedPipelineError: the pipeline has no denoiser.
        ConfigurationError: calls differ in their timesteps, answers are no finite numbers, or the folder is damaged.
    """
    write(folder / _INDEX, _draw(sampler, buckets, folder, progress))
    return CalibrationSet(folder)


def _draw(sampler: Sampler, buckets: int, folder: Path, progress: Progress) -> Values:
    """Write the files of a recording; returns its index."""
    folder.mkdir(parents=True, exist_ok=True)
    model = find_denoiser(sampler.pipe)
    if model is None:
        raise UnsupportedPipelineError(f"{type(sampler.pipe).__name__} has no unet or transformer to quantize")
    device = next(model.parameters()).device
    calls: list[tuple[float, dict[str, torch.Tensor]]] = []
    plain: dict[str, Any] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        named = bind_forward(module, args, kwargs)
        found = prediction(output)
        flat: dict[str, torch.Tensor] = {_OUTPUT: found.detach().cpu()}
        for key, value in named.items():
            if key == "timestep":
                value = torch.as_tensor(value).float()
                value = value.expand(len(found)) if value.dim() == 0 or len(value) == 1 else value
            if isinstance(value, (bool, int, float, str)) and key != "return_dict":
                plain[key] = value
            _flatten(key, value, flat)
        calls.append((float(flat["timestep"][0]), flat))

    handle = model.register_forward_hook(note, with_kwargs=True)
    times: list[float] = []
    counts: list[int] = []
    names = {chunk: f"{chunk[0]:05d}-{chunk[1]:05d}" for chunk in sampler.chunks()}
    try:
        for (start, end), name in names.items():
            stored = [folder / f"b{bucket:03d}-{name}.safetensors" for bucket in range(len(times))]
            if not stored or not all(file.is_file() for file in stored):
                calls.clear()
                sampler.call(start, end)
                times = times or _spread([t for t, _ in calls], buckets)
                for bucket, time in enumerate(times):
                    _store(folder / f"b{bucket:03d}-{name}.safetensors", [flat for t, flat in calls if t == time], time)
            found = [_rows(folder / f"b{bucket:03d}-{name}.safetensors") for bucket in range(len(times))]
            counts = [a + b for a, b in zip(counts or [0] * len(times), found, strict=True)]
            progress(f"{folder.name}: {end} of {len(sampler.prompts)} prompts")
    finally:
        handle.remove()
    return {
        "timesteps": times,
        "counts": counts,
        "chunks": list(names.values()),
        "plain": plain,
        "device": str(device),
    }


def _spread(found: list[float], buckets: int) -> list[float]:
    """At most `buckets` of the timesteps of a trajectory, evenly spaced, each once, in the order of their noise."""
    each = list(dict.fromkeys(found))
    each.sort(reverse=each[0] >= each[-1])
    count = min(buckets, len(each))
    return [each[round(i * (len(each) - 1) / max(1, count - 1))] for i in range(count)]


def _store(file: Path, same: list[dict[str, torch.Tensor]], time: float) -> None:
    if not same:
        raise ConfigurationError(f"a call of the pipeline did not come to timestep {time:g}, as the first one did")
    tensors = {key: _joined(key, same).contiguous() for key in same[0]}
    if not bool(torch.isfinite(tensors[_OUTPUT]).all()):
        raise ConfigurationError(
            f"the model's answers at timestep {time:g} are no finite numbers, so nothing can be measured on them"
        )
    with replacing(file) as temporary:
        save_file(tensors, temporary)


def _rows(file: Path) -> int:
    """The rows that a file holds."""
    try:
        with safe_open(str(file), framework="pt") as stored:
            return stored.get_slice(_OUTPUT).get_shape()[0]
    except (SafetensorError, OSError) as error:
        raise DamagedStateError(f"{file} is damaged; forget the run (restart)") from error


def _joined(key: str, parts: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """A tensor of several calls, rows behind each other; what is not by row is the same in all of them."""
    first = parts[0][key]
    by_row = first.dim() > 0 and key not in _SHARED and len(first) == len(parts[0][_OUTPUT])
    return torch.cat([part[key] for part in parts]) if by_row else first


def _flatten(name: str, value: Any, into: dict[str, torch.Tensor]) -> None:
    """Tensors of a nested argument by path."""
    if isinstance(value, torch.Tensor):
        into[name] = value.detach().cpu()
    elif isinstance(value, dict):
        for key, part in value.items():
            _flatten(f"{name}/{key}", part, into)
    elif isinstance(value, (list, tuple)):
        for number, part in enumerate(value):
            _flatten(f"{name}/[{number}]", part, into)


def _lists(value: Any) -> Any:
    """Tables whose keys are all [0], [1], … as lists again."""
    if not isinstance(value, dict):
        return value
    made = {key: _lists(part) for key, part in value.items()}
    if made and all(key == f"[{number}]" for number, key in enumerate(sorted(made, key=lambda k: (len(k), k)))):
        return [made[f"[{number}]"] for number in range(len(made))]
    return made


@torch.no_grad()
def relative_error(model: nn.Module, parts: Iterable[Rows]) -> float:
    """Squared error of the model's answers over the squared answers of full precision, over all rows."""
    wrong = size = 0.0
    for rows in parts:
        wrong += float((rows.run(model) - rows.output).square().sum())
        size += float(rows.output.square().sum())
    return wrong / max(size, 1e-30)


# ---------------------------------------------------------------------- the stage
@torch.no_grad()  # what a pipeline keeps of it must be good for training as well
def _record(state: RunState, job: Job) -> Values:
    count, kept = len(state.sampler.prompts), state.kept_for_validation
    ends = {"calibration": (0, count - kept), "validation": (count - kept, count)}[str(job.part.key)]
    part = state.sampler.part(*ends)
    return _draw(part, state.settings.bucket_count, state.work / str(job.part.key), lambda what, *_: state.tell(what))


def _take(state: RunState, part: Part, _values: Values) -> None:
    found = CalibrationSet(state.work / str(part.key))
    if part.key == "calibration":
        state.calibration = found
    else:
        state.heldout = found


RECORDING = Stage(
    "calibration", _record, _take, "{}/index.json", parts=lambda _: (Part("calibration"), Part("validation"))
)
