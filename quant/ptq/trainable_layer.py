"""A layer while it is being quantized: floating-point weights with grids and rounding that can still be learnt."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from diffusion_accel.quant.affine import dynamic_grid, fake_quantize, half_scale, top, weight_grid
from diffusion_accel.quant.buckets import Buckets, SelectBucket, grid_at
from diffusion_accel.quant.layers import QuantizedLayer, quantized_like
from diffusion_accel.quant.low_rank import low_rank
from diffusion_accel.quant.model import candidates
from diffusion_accel.quant.rotation import rotated
from diffusion_accel.quant.spec import LayerSpec

GAMMA, ZETA = -0.1, 1.1  # ends of the stretched sigmoid (AdaRound, section 3.3)


class _AsStored(torch.autograd.Function):
    """A scale as a compact checkpoint stores it, in float32; gradients pass unchanged (straight through)."""

    @staticmethod
    def forward(_ctx: Any, scale: torch.Tensor) -> torch.Tensor:
        return half_scale(scale).float()

    @staticmethod
    def backward(_ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0]


class TrainableLayer(nn.Module):
    """Stands in for a linear layer or convolution and rounds what it is told to round.

    Attributes:
        layer: the original, whose weight is not changed.
        spec: how it will be quantized.
        plain: compute with the original weights and round nothing.
        round_weights, round_inputs: what the running forward rounds otherwise.
        weight: the weights, trainable in finetuning.
        scale, zero_point: grid of the weights, (parts, O) or (groups, O); where there is a branch, of what it leaves.
        left, right: the branch of low rank, (O, rank) and (rank, N); it learns nothing.
        up: whether each weight is rounded up from the floor; while it is learnt, `logits` decides.
        logits: AdaRound's variable, None but during reconstruction.
        input_scale, input_zero_point, output_scale, output_zero_point: (buckets, 1 | parts | C); scales are trainable,
            and used with the precision in which the checkpoint will store them.
    """

    up: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor
    low: torch.Tensor
    input_zero_point: torch.Tensor
    output_zero_point: torch.Tensor

    def __init__(
        self,
        layer: nn.Module,
        spec: LayerSpec,
        buckets: Buckets,
        search: bool = True,
    ) -> None:
        super().__init__()
        weight: torch.Tensor = layer.weight.detach()  # type: ignore[assignment,operator]
        self.spec, self.buckets = spec, buckets
        self.plain = True
        self.round_weights = self.round_inputs = False
        self.layer = layer
        self.weight = nn.Parameter(weight.float(), requires_grad=False)  # the original's memory, until `own` is called
        bias: Any = layer.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach().float(), requires_grad=False)
        self.logits: nn.Parameter | None = None
        self._kept: tuple[Any, torch.Tensor] | None = None
        self.channel_dim = 1 if isinstance(layer, nn.Conv2d) else -1
        steps = len(buckets.timesteps)
        for name, bits, width in (
            (
                "input",
                None if spec.dynamic else spec.activation_bits,
                weight.shape[1] if spec.per_channel else spec.parts,
            ),
            ("output", spec.output_bits, 1),
        ):
            if bits:
                scale = torch.ones(steps, width, device=weight.device)
                self.register_parameter(f"{name}_scale", nn.Parameter(scale, requires_grad=False))
                self.register_buffer(f"{name}_zero_point", torch.zeros(steps, width, device=weight.device))
        self.find_grid(search)

    # ------------------------------------------------------------------ weights
    def find_grid(self, search: bool = True) -> None:
        """Grids of the weights by range search (or over their whole range), and rounding to nearest; before that the
        branch of low rank, where there is one."""
        if self.spec.rank:
            left, right = low_rank(self.weight, self.spec)
            self.register_buffer("left", left)
            self.register_buffer("right", right)
            self.register_buffer("low", (left @ right).view_as(self.weight))
        scale, zero = weight_grid(self._gridded().detach(), self.spec, () if search else (1.0,))
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero)
        ratio = self._gridded().detach() / self._spread(self.scale)
        self.register_buffer("up", ratio - ratio.floor() >= 0.5)

    def _gridded(self) -> torch.Tensor:
        """What codes stand for: the weights, or what the branch of low rank leaves of them, rotated as inputs are."""
        return rotated(self.weight - self.low if self.spec.rank else self.weight, 1, self.spec.rotate)

    def own(self) -> list[nn.Parameter]:
        """Weight and bias as tensors of its own, which may be changed without changing the original's."""
        for p in (self.weight, self.bias):
            if p is not None and not getattr(p, "own", False):
                p.data = p.data.clone()
                p.own = True  # type: ignore[attr-defined]
        return [p for p in (self.weight, self.bias) if p is not None]

    def _spread(self, grid: torch.Tensor) -> torch.Tensor:
        """(parts or groups, O) to the shape of the weight, broadcastable."""
        if self.spec.weight_group:
            each = grid.T.repeat_interleave(self.spec.weight_group, 1)
            return each[:, : self.weight[0].numel()].reshape(self.weight.shape)
        ones = [1] * (self.weight.dim() - 2)
        columns = [
            g.view(-1, 1, *ones).expand(-1, size, *ones)
            for g, size in zip(grid, self.spec.part_sizes(self.weight.shape[1]), strict=True)
        ]
        return columns[0][:, :1] if len(columns) == 1 else torch.cat(columns, 1)

    def start_rounding(self) -> nn.Parameter:
        """Make the rounding learnable, beginning at the weights themselves; returns AdaRound's variable."""
        ratio = self._gridded().detach() / self._spread(self.scale)
        rest = (ratio - ratio.floor()).clamp(1e-4, 1 - 1e-4)
        self.logits = nn.Parameter(-torch.log((ZETA - GAMMA) / (rest - GAMMA) - 1))
        return self.logits

    def softness(self) -> torch.Tensor:
        """How far every weight is rounded up, 0 … 1 (AdaRound, equation 23)."""
        assert self.logits is not None
        return (torch.sigmoid(self.logits) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    def end_rounding(self) -> None:
        """Fix the rounding where the variable has brought it."""
        assert self.logits is not None
        self.up = self.logits.detach() >= 0
        self.logits = None

    def codes(self) -> torch.Tensor:
        """The codes of the weights as whole numbers; gradients pass the floor unchanged (straight through)."""
        scale, zero = self._spread(self.scale), self._spread(self.zero_point)
        ratio = self._gridded() / scale
        whole = ratio + (ratio.floor() - ratio).detach()
        return (whole + (self.up if self.logits is None else self.softness()) + zero).clamp(
            0, top(self.spec.weight_bits)
        )

    def rounded(self, inner: bool = False) -> torch.Tensor:
        """The weights, rounded, or (`inner`) those that codes stand for, on their grid; kept for the next call while
        nothing learns and nothing has changed."""
        fixed = not torch.is_grad_enabled() and self.logits is None
        state = (inner, self.weight._version, id(self.up), self.up._version, self.scale._version)
        if fixed and self._kept is not None and self._kept[0] == state:
            return self._kept[1]
        values = (self.codes() - self._spread(self.zero_point)) * self._spread(self.scale)
        if not inner:
            values = rotated(values, 1, self.spec.rotate)
            values = values + self.low if self.spec.rank else values
        self._kept = (state, values) if fixed else None
        return values

    def sqnr(self) -> float:
        """Signal to quantization noise of the weights, dB, against the original layer's."""
        original: torch.Tensor = self.layer.weight.detach().float()  # type: ignore[operator,union-attr]
        noise = (self.rounded().detach() - original).square().sum()
        return float(10 * torch.log10(original.square().sum() / noise.clamp(min=1e-30)))

    # ------------------------------------------------------------------ inputs
    def _learned(self, x: torch.Tensor, name: str, bits: int) -> torch.Tensor:
        """`x` on its grid; gradients reach `x` and the scale (straight through the rounding)."""
        scale = grid_at(self, getattr(self, f"{name}_scale"), x)
        if name == "input" and self.spec.compact_grids:
            scale = _AsStored.apply(scale)
        zero = grid_at(self, getattr(self, f"{name}_zero_point"), x)
        ratio = x / scale
        whole = ratio + (ratio.round() - ratio).detach()
        return ((whole + zero).clamp(0, top(bits)) - zero) * scale

    def to_inner(self, x: torch.Tensor) -> torch.Tensor:
        """The input as it is rounded, see `QuantizedLayer.to_inner`."""
        return rotated(x, self.channel_dim, self.spec.rotate)

    def grids(self) -> list[str]:
        """The names of the grids of inputs and outputs, as far as these are rounded."""
        ends = [end for end in ("input", "output") if hasattr(self, f"{end}_scale")]
        return [f"{end}_{part}" for end in ends for part in ("scale", "zero_point")]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's output, with what `plain`, `round_weights` and `round_inputs` say rounded."""
        if self.plain:
            return self.layer(x)
        outer, inner = x, bool(self.round_inputs and self.spec.activation_bits and self.spec.has_inner_weights)
        if inner:
            x = self.to_inner(x)
        if self.round_inputs and self.spec.activation_bits:
            if self.spec.dynamic:
                grid = dynamic_grid(x, self.spec, self.channel_dim)
                x = x + (fake_quantize(x.detach(), *grid, self.spec.activation_bits) - x.detach())
            else:
                x = self._learned(x, "input", self.spec.activation_bits)
        full = self._gridded() if inner else self.weight
        y = self._compute(x, self.rounded(inner) if self.round_weights else full, self.bias)
        if inner and self.spec.rank:
            y = y + self._compute(outer, self.low, None)
        if self.round_inputs and self.spec.output_bits:
            y = self._learned(y, "output", self.spec.output_bits)
        return y

    def _compute(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if isinstance(self.layer, nn.Conv2d):
            return self.layer._conv_forward(x, weight, bias)
        return nn.functional.linear(x, weight, bias)

    # ------------------------------------------------------------------ result
    def finished(self, buckets: Buckets) -> QuantizedLayer:
        """The quantized layer that this has become."""
        sqnr = round(self.sqnr(), 2)
        made = quantized_like(self.layer, dataclasses.replace(self.spec, sqnr=sqnr), buckets)
        made.store(self.codes().detach(), self.scale, self.zero_point)
        if self.spec.rank:
            made.store_branch(self.left, self.right)
        if made.bias is not None and self.bias is not None:
            made.bias.data = self.bias.detach().clone()
        for name in ("input", "output"):
            if hasattr(self, f"{name}_scale"):
                made.store_grids(name, getattr(self, f"{name}_scale").detach(), getattr(self, f"{name}_zero_point"))
        return made


class TrainableLayers(dict[str, TrainableLayer]):
    """The layers in a model by name, and the way back."""

    def __init__(
        self,
        model: nn.Module,
        specs: dict[str, LayerSpec],
        timesteps: tuple[float, ...],
        search: bool = True,
    ) -> None:
        """Put layers in place of the layers `specs` names; they round nothing yet."""
        self.model, self.buckets = model, Buckets(timesteps)
        layers = candidates(model)
        self.originals = {name: layers[name] for name in specs}
        # torch takes other kernels for weights that learn (`matmul` folds batches), so this is a part of the way back
        self._learning = [(p, p.requires_grad) for p in model.parameters()]
        super().__init__(
            {name: TrainableLayer(layers[name], spec, self.buckets, search) for name, spec in specs.items()}
        )
        try:
            for name, made in self.items():
                model.set_submodule(name, made)
            model.requires_grad_(False)
            if timesteps:
                SelectBucket.install(model, self.buckets)
        except BaseException:
            self.restore()
            raise

    def restore(self) -> None:
        """Put the original layers back; the model is then as it was."""
        for name, layer in self.originals.items():
            self.model.set_submodule(name, layer)
        for parameter, learns in self._learning:
            parameter.requires_grad_(learns)
        SelectBucket.uninstall(self.model)


def trainable_layers_in(module: nn.Module) -> dict[str, TrainableLayer]:
    """The layers within a module by name."""
    return {name: part for name, part in module.named_modules() if isinstance(part, TrainableLayer)}


def set_quantization_state(layers: dict[str, TrainableLayer], weights: bool, inputs: bool) -> None:
    """What all of `layers` round from now on; neither is the original model."""
    for one in layers.values():
        one.plain = not (weights or inputs)
        one.round_weights, one.round_inputs = weights, inputs
