"""Which layers suffer most from few bits."""

from __future__ import annotations

from torch import nn

from diffusion_accel.quant.model import candidates
from diffusion_accel.quant.spec import LayerSpec

from .bits import PROBE_BITS
from .budget import PROBE_ROWS, plan_probe
from .calibration import Rows, relative_error
from .layer_ranks import layer_input_modification, z_score_shares
from .stage import Job, Part, RunState, Stage, Values
from .trainable_layer import TrainableLayer, TrainableLayers, set_quantization_state


def sensitivity(model: nn.Module, layer: TrainableLayer, rows: list[Rows]) -> float:
    """The relative squared error of the model's output when the weights of `layer` alone are rounded (to nearest)."""
    set_quantization_state({"": layer}, weights=True, inputs=False)
    error = relative_error(model, rows)
    set_quantization_state({"": layer}, weights=False, inputs=False)
    return error


def _wanted(state: RunState) -> bool:
    by_need = state.settings.allocated and state.settings.allocation == "sensitivity"
    return by_need or state.settings.finetune is not None


def _plan_probe(state: RunState, _job: Job) -> Values:
    return dict(plan_probe(state.denoiser, state.heldout, len(candidates(state.denoiser)), state.left()))


def _take_probe(state: RunState, _part: Part, values: Values) -> None:
    state.probe = values


def _measure(state: RunState, job: Job) -> Values:
    """The sensitivity of every layer that an earlier run has not measured."""
    layers = candidates(state.denoiser)
    found = dict(job.kept or {})
    trainable = TrainableLayers(state.denoiser, {name: LayerSpec(weight_bits=PROBE_BITS) for name in layers}, ())
    try:
        rows = _probe_rows(state)
        for name in [n for n in trainable if n not in found]:
            found[name] = sensitivity(state.denoiser, trainable[name], rows)
            state.tell(f"sensitivity: {len(found)} of {len(layers)} layers")
            job.save(lambda: found)
    finally:
        trainable.restore()
    return found


def _probe_rows(state: RunState) -> list[Rows]:
    """Rows on which sensitivities are measured; how many is written down, so that a resumed run repeats it."""
    count = len(state.heldout.timesteps)
    numbers = range(0, count, max(1, count // 5))
    numbers = numbers[:: -(-len(numbers) // state.probe["timesteps"])]
    return [state.heldout.sample(b, state.probe["rows"], state.settings.seed) for b in numbers]


def _score(state: RunState, _job: Job) -> Values:
    """What orders the layers for an allocation by ranks."""
    if state.settings.allocation == "zd":
        return z_score_shares(state.denoiser)
    count = len(state.calibration.timesteps)
    rows = (state.calibration.sample(b, PROBE_ROWS, state.settings.seed) for b in range(0, count, max(1, count // 5)))
    return layer_input_modification(state.denoiser, rows)


def _take_scores(state: RunState, _part: Part, values: Values) -> None:
    state.scores = values


def _take_needs(state: RunState, _part: Part, values: Values) -> None:
    state.needs = values


SCORES = Stage(
    "sensitivity", _score, _take_scores, "scores.json", wanted=lambda s: s.settings.allocation != "sensitivity"
)
PROBE = Stage("sensitivity", _plan_probe, _take_probe, "probe.json", wanted=_wanted)
SENSITIVITY = Stage(
    "sensitivity",
    _measure,
    _take_needs,
    "sensitivity.json",
    wanted=_wanted,
    complete=lambda state, values: len(values) == len(candidates(state.denoiser)),
)
