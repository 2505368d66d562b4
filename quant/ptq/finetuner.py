"""One stage of finetuning: Adam over the weights of some layers and the grids of inputs of others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .trainable_layer import TrainableLayer, set_quantization_state

if TYPE_CHECKING:
    from .calibration import CalibrationSet, Rows


class Finetuner:
    """Finetunes some layers of a model of layers; one instance for each stage, so that Adam's moments are kept.

    A timestep is one bucket of the activation grids. Only its own scales learn from its rows.

    Args:
        chosen: the layers whose weights and biases learn.
        scales: the layers whose activation scales learn.
        moments: of the scales, see `FinetuneSettings`.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: dict[str, TrainableLayer],
        chosen: list[str],
        scales: list[str],
        rate: float,
        scale_rate: float,
        layer_loss: bool,
        moments: str = "visit",
    ) -> None:
        self.model, self.layers, self.chosen, self.layer_loss = model, layers, chosen, layer_loss
        self.moments = moments
        self.weights = [p for n in chosen for p in layers[n].own()]
        self.scales = [p for n in scales for p in _scales(layers[n])]
        self.floors = [float(p.detach().min()) / 4 for p in self.scales]  # a scale stays positive
        self.rates = [scale_rate * float(p.detach().mean()) for p in self.scales]
        self.rate, self.share = rate, 1.0
        for p in (*self.weights, *self.scales):
            p.requires_grad_(True)
        self._weights = torch.optim.Adam([{"params": self.weights, "lr": rate}]) if self.weights else None
        self._scales: dict[int, torch.optim.Adam] = {}
        self._number = 0

    def visit(self, number: int) -> None:
        """Learn from rows of bucket `number` from now on."""
        self._number = number
        if self.moments == "visit":
            self._scales.clear()

    def step(self, rows: Rows) -> float:
        """One step of Adam on some rows of the bucket; returns the loss."""
        heard: dict[str, torch.Tensor] = {}
        wanted: dict[str, torch.Tensor] = {}
        if self.layer_loss:
            with torch.no_grad(), self._listening(wanted):
                set_quantization_state(self.layers, weights=False, inputs=False)
                rows.run(self.model)
        set_quantization_state(self.layers, weights=True, inputs=True)
        for p in (*self.weights, *self.scales):
            p.grad = None
        with torch.enable_grad(), self._listening(heard):
            loss = (rows.run(self.model) - rows.output).square().mean() * max(1, len(wanted))
            for name, target in wanted.items():
                loss = loss + (heard[name] - target).square().mean()
            loss.backward()
        if self._weights is not None:
            self._weights.param_groups[0]["lr"] = self.share * self.rate
            self._weights.step()
        self._step_scales()
        return float(loss.detach())

    def _step_scales(self) -> None:
        if not self.scales:  # weights alone are quantized
            return
        optimizer = self._scale_optimizer()
        for group, scale, rate in zip(optimizer.param_groups, self.scales, self.rates, strict=True):
            group["lr"] = self.share * rate
            (own,) = group["params"]
            own.grad = scale.grad if self.moments == "shared" or scale.grad is None else scale.grad[self._number]
        optimizer.step()
        with torch.no_grad():
            for scale, floor in zip(self.scales, self.floors, strict=True):
                scale.clamp_(min=floor)

    def _scale_optimizer(self) -> torch.optim.Adam:
        """Adam over the scales of the bucket, which are rows of the layers' own tensors; shared: over all of them."""
        key = 0 if self.moments == "shared" else self._number
        if key not in self._scales:
            own = self.scales if self.moments == "shared" else [nn.Parameter(p.data[key]) for p in self.scales]
            self._scales[key] = torch.optim.Adam([{"params": [p]} for p in own])
        return self._scales[key]

    def pace(self, share: float) -> None:
        """Learn at this share of the rates from now on."""
        self.share = share

    def close(self) -> None:
        """Nothing learns any more."""
        for p in (*self.weights, *self.scales):
            p.requires_grad_(False)
            p.grad = None

    def state(self) -> dict[str, torch.Tensor]:
        """What a stage that goes on between two buckets needs, besides the layers."""
        found = {
            "rates": torch.tensor(self.rates, dtype=torch.float64),
            "floors": torch.tensor(self.floors, dtype=torch.float64),
        }
        kept = {} if self.moments == "visit" else self._scales
        for name, optimizer in (("weights", self._weights), *((f"scales{k}", v) for k, v in kept.items())):
            for i, values in enumerate(_states(optimizer)):
                found |= {f"{name}/{i}/{k}": torch.as_tensor(v).contiguous() for k, v in values.items()}
        return found

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from `state`. Rates and floors are those of the beginning of the stage."""
        self.rates, self.floors = state["rates"].tolist(), state["floors"].tolist()
        numbers = {int(key.partition("/")[0][6:]) for key in state if key.startswith("scales")}
        for number in numbers:
            self._number = number
            _set_states(self._scale_optimizer(), f"scales{number}", state)
        if self._weights is not None:
            _set_states(self._weights, "weights", state)

    @contextmanager
    def _listening(self, into: dict[str, torch.Tensor]) -> Iterator[None]:
        """Collect the outputs of the chosen layers, where the loss wants them."""

        def note(name: str) -> Callable[..., None]:
            return lambda _module, _args, output: into.__setitem__(name, output)

        names = self.chosen if self.layer_loss else []
        handles = [self.layers[n].register_forward_hook(note(n)) for n in names]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _states(optimizer: torch.optim.Optimizer | None) -> list[dict[str, Any]]:
    groups = optimizer.param_groups if optimizer is not None else []
    return [optimizer.state.get(p, {}) for group in groups for p in group["params"]]  # type: ignore[union-attr]


def _set_states(optimizer: torch.optim.Optimizer, name: str, state: dict[str, torch.Tensor]) -> None:
    for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        own = {k.rpartition("/")[2]: v for k, v in state.items() if k.startswith(f"{name}/{i}/")}
        if own:
            optimizer.state[p] = own


def _scales(layer: TrainableLayer) -> list[nn.Parameter]:
    return [getattr(layer, f"{n}_scale") for n in ("input", "output") if hasattr(layer, f"{n}_scale")]


def batches(calibration: CalibrationSet, number: int, rows: int, size: int, seed: int) -> Iterable[Rows]:
    """`rows` rows of a bucket, `size` at a time; `seed` decides which ones and their order."""
    picked = calibration.sample(number, rows, seed)
    order = torch.randperm(len(picked), generator=torch.Generator().manual_seed(seed))
    for start in range(0, len(order), size):
        yield picked.pick(order[start : start + size])
