"""AdaRound block reconstruction: whether each weight is rounded up or down, learnt a block at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from diffusion_accel.denoisers import is_block
from diffusion_accel.hooks import map_tensors, tensors_in

from .settings import RoundingSettings
from .stage import Job, Part, RunState, Stage, Values
from .trainable_layer import TrainableLayer, set_quantization_state, trainable_layers_in

if TYPE_CHECKING:
    from .calibration import Rows


class _ReachedError(Exception):
    pass


@dataclass
class Captured:
    """Calls of one module: positional and named arguments and the answers of another precision, row by row."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: torch.Tensor

    def pick(self, index: torch.Tensor) -> Captured:
        """The rows `index`."""
        count = len(self.target)

        def some(t: torch.Tensor) -> torch.Tensor:
            return t[index] if t.dim() and len(t) == count else t

        return Captured(map_tensors(some, self.args), map_tensors(some, self.kwargs), self.target[index])


def units(model: nn.Module, rows: Rows) -> dict[str, nn.Module]:
    """The modules that are reconstructed one after the other, by name in the order in which the model runs them:
    residual and transformer blocks, and layers outside of them."""
    found: dict[str, nn.Module] = {}

    def walk(name: str, module: nn.Module) -> None:
        if isinstance(module, TrainableLayer):
            found[name] = module
        elif is_block(module):  # reconstructed as a whole; everything else goes layer by layer
            if trainable_layers_in(module):
                found[name] = module
        else:
            for child, part in module.named_children():
                walk(f"{name}.{child}" if name else child, part)

    walk("", model)
    order: list[str] = []
    handles = [m.register_forward_hook(lambda *_, name=name: order.append(name)) for name, m in found.items()]
    try:
        with torch.no_grad():
            rows.run(model)
    finally:
        for handle in handles:
            handle.remove()
    return {name: found[name] for name in dict.fromkeys(order)}


@torch.no_grad()
def capture(model: nn.Module, unit: nn.Module, rows: Iterable[Rows], switch: Callable[[bool], None]) -> Captured:
    """What reaches `unit` when the model is quantized as far as it is, and what it answers in full precision.

    `switch(True)` makes the model full precision, `switch(False)` quantized.
    """
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    answers: list[torch.Tensor] = []

    def take_arguments(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args, kwargs))
        raise _ReachedError

    def take_answer(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        answers.append(tensors_in(output)[0])
        raise _ReachedError

    for batch in rows:
        for full in (True, False):
            switch(full)
            handle = (
                unit.register_forward_hook(take_answer)
                if full
                else unit.register_forward_pre_hook(take_arguments, with_kwargs=True)
            )
            try:
                batch.run(model)
            except _ReachedError:
                pass
            finally:
                handle.remove()
    sizes = [len(a) for a in answers]
    return Captured(
        _join([args for args, _ in seen], sizes), _join([kwargs for _, kwargs in seen], sizes), torch.cat(answers)
    )


def _join(values: Sequence[Any], sizes: list[int]) -> Any:
    """Nested arguments of several calls as one, tensors with a row for each row of the batch one after the other."""
    first = values[0]
    if isinstance(first, torch.Tensor):
        if first.dim() and all(len(v) == n for v, n in zip(values, sizes, strict=True)):
            return torch.cat(list(values))
        return first
    if isinstance(first, dict):
        return {k: _join([v[k] for v in values], sizes) for k in first}
    if type(first) in (list, tuple):
        return type(first)(_join(list(part), sizes) for part in zip(*values, strict=True))
    return first


def reconstruct(unit: nn.Module, data: Captured, settings: RoundingSettings, seed: int) -> tuple[float, float]:
    """Learn the rounding of all weights in `unit`; returns the loss with rounding to nearest and with the learnt one.

    Minimises |unit(inputs of the quantized model) - answers in full precision|², summed over channels, plus
    weight · Σ (1 - |2h - 1|^β), where h is how far a weight is rounded up.

    Source: Nagel et al., "Up or Down? Adaptive Rounding" (ICML 2020), in the setting of Q-Diffusion and QuEST.
    """
    layers = trainable_layers_in(unit) if not isinstance(unit, TrainableLayer) else {"": unit}
    for layer in layers.values():
        layer.plain, layer.round_weights, layer.round_inputs = False, True, False
    before = _loss(unit, data, settings.batch)
    kept = {name: layer.up.clone() for name, layer in layers.items()}
    variables = [layer.start_rounding() for layer in layers.values()]
    optimizer = torch.optim.Adam(variables, settings.rate)
    generator = torch.Generator().manual_seed(seed)
    quiet = round(settings.iterations * settings.warmup)
    with torch.enable_grad():
        for step in range(settings.iterations):
            index = torch.randint(len(data.target), (min(settings.batch, len(data.target)),), generator=generator)
            batch = data.pick(index)
            loss = _error(tensors_in(unit(*batch.args, **batch.kwargs))[0], batch.target)
            if step >= quiet:
                along = (step - quiet) / max(1, settings.iterations - quiet)
                beta = settings.beta[1] + (settings.beta[0] - settings.beta[1]) * (1 - along)
                for layer in layers.values():
                    loss = loss + settings.weight * (1 - (2 * layer.softness() - 1).abs().pow(beta)).sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    for layer in layers.values():
        layer.end_rounding()
    after = _loss(unit, data, settings.batch)
    if after > before:  # too few steps to arrive
        for name, layer in layers.items():
            layer.up = kept[name]
        after = before
    return before, after


def _error(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    channels = target.shape[1] if target.dim() == 4 else target.shape[-1]
    return (output - target).square().mean() * channels


@torch.no_grad()
def _loss(unit: nn.Module, data: Captured, batch: int) -> float:
    total = 0.0
    for start in range(0, len(data.target), batch):
        part = data.pick(torch.arange(start, min(start + batch, len(data.target))))
        total += float(_error(tensors_in(unit(*part.args, **part.kwargs))[0], part.target)) * len(part.target)
    return total / len(data.target)


# ---------------------------------------------------------------------- the stage
@dataclass
class _Blocks:
    """The blocks of a run: their modules by name in the order in which they are learnt, the rows that all of them learn
    from, and the layers of those that are done."""

    units: dict[str, nn.Module]
    rows: list[Rows] = field(default_factory=list)
    done: dict[str, TrainableLayer] = field(default_factory=dict)


@dataclass
class _Block:
    """One of them."""

    name: str
    unit: nn.Module
    share: float  # of the blocks that come before it
    blocks: _Blocks

    def layers(self) -> dict[str, TrainableLayer]:
        """The layers in it by name."""
        if isinstance(self.unit, TrainableLayer):
            return {self.name: self.unit}
        return {f"{self.name}.{key}": layer for key, layer in trainable_layers_in(self.unit).items()}


def _parts(state: RunState) -> Iterator[Part]:
    blocks = _Blocks(units(state.denoiser, state.calibration.sample(0, 1, 0)))
    for number, (name, unit) in enumerate(blocks.units.items()):
        yield Part(number, _Block(name, unit, number / len(blocks.units), blocks))


def _learn(state: RunState, job: Job) -> Values:
    """Learn the rounding of a block, the ones before it quantized."""
    block: _Block = job.part.given
    asked, seed, buckets = state.settings.rounding, state.settings.seed, len(state.calibration.timesteps)
    assert asked is not None
    settings = replace(asked, iterations=state.plan["iterations"], rate=state.plan["rate"])
    state.tell(f"rounding: {block.name}", "rounding", block.share)
    rows, done = block.blocks.rows, block.blocks.done
    if not rows:
        each = max(1, state.plan["rounding_rows"] // buckets)
        rows += [state.calibration.sample(b, each, seed + 1) for b in range(buckets)]

    def switch(full: bool) -> None:
        set_quantization_state(state.trainable, weights=False, inputs=False)
        if not full:
            set_quantization_state(done, weights=True, inputs=False)

    data = capture(state.denoiser, block.unit, rows, switch)
    set_quantization_state(state.trainable, weights=False, inputs=False)
    before, after = reconstruct(block.unit, data, settings, seed + int(job.part.key))
    state.log("rounding", block=block.name, nearest=round(before, 6), learnt=round(after, 6))
    return {name: layer.up.to(torch.uint8) for name, layer in block.layers().items()}


def _take(_state: RunState, part: Part, values: Values) -> None:
    layers = part.given.layers()
    for name, layer in layers.items():
        layer.up = values[name].bool()
    part.given.blocks.done |= layers


ROUNDING = Stage(
    "rounding",
    _learn,
    _take,
    "rounding-{:04d}.safetensors",
    parts=_parts,
    wanted=lambda state: bool(state.plan["iterations"]),
    error="learnt rounding, weights only",
)
