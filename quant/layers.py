"""Quantized linear layers and convolutions: packed weights, grids for each bucket of timesteps, a runtime that
computes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import nn

from diffusion_accel.errors import ConfigurationError
from diffusion_accel.hooks import version_of

from .affine import dequantize, dynamic_grid, fake_quantize, half_scale, stored_grid, values_of
from .buckets import Buckets, grid_at
from .packing import pack, packed_bytes, unpack
from .rotation import rotated
from .sealed import REASON, sealed
from .spec import LayerSpec


class Runtime(Protocol):
    """How a quantized layer computes."""

    @property
    def name(self) -> str:
        """As `set_runtime` takes it."""

    def __call__(self, layer: QuantizedLayer, x: torch.Tensor) -> torch.Tensor:
        """The output of the layer for an input."""


class Dequantize:
    """Weights as floating-point numbers, inputs as they are."""

    name = "dequantize"

    def __call__(self, layer: QuantizedLayer, x: torch.Tensor) -> torch.Tensor:
        """The output of the layer, not rounded."""
        return layer.compute(x, layer.floats(x.dtype))


class Simulated(Dequantize):
    """Weights, inputs and outputs rounded to their grids, computed in floating point; the branch of low rank takes the
    input as it is."""

    name = "simulated"

    def __call__(self, layer: QuantizedLayer, x: torch.Tensor) -> torch.Tensor:
        """The output of the layer, everything rounded."""
        if not (layer.spec.has_inner_weights and layer.spec.activation_bits):
            return layer.round_output(super().__call__(layer, layer.round_input(x)))
        y = layer.compute(layer.round_input(layer.to_inner(x)), layer.floats(x.dtype, inner=True))
        return layer.round_output(y + layer.branch(x) if layer.spec.rank else y)


class _StraightThrough(torch.autograd.Function):
    """The value of one tensor with the gradient of another: rounding has none of its own."""

    @staticmethod
    def forward(_ctx: Any, _smooth: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """The value."""
        return value

    @staticmethod
    def backward(_ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        """The gradient, to the smooth one."""
        return gradients[0], None


def lasting() -> AbstractContextManager[Any]:
    """Within it tensors are made that may be kept: not those of inference mode, through which no gradient flows."""
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():  # compilers cannot ask for the mode
        return nullcontext()
    return torch.inference_mode(False)


class Kept:
    """Weights as numbers, and of what they were made. Slots: nothing that a model is, only what is made of it."""

    __slots__ = ("floats", "made_of")

    def __init__(self) -> None:
        self.floats: torch.Tensor | None = None
        self.made_of: tuple[Any, ...] = ()


class QuantizedLayer(nn.Module):
    """What quantized linear layers, convolutions and embedding tables have in common.

    Buffers: `weight_codes` (O, bytes) packed codes, `weight_scale` and `weight_zero_point` (parts, O), or with groups
    float16 (groups, O) and packed (O, bytes); where the spec asks for them `weight_left` (O, rank) and `weight_right`
    (rank, N), float16, of a branch of low rank; `input_scale`, `input_zero_point`
    (buckets, 1 | parts | C) and `output_scale`, `output_zero_point` (buckets, 1). With `compact_grids` input scales are
    float16 and zero points packed, (buckets, bytes); computing turns those of the running call into float32 and whole
    numbers.
    """

    weight_codes: torch.Tensor
    weight_scale: torch.Tensor
    weight_zero_point: torch.Tensor
    weight_left: torch.Tensor
    weight_right: torch.Tensor
    input_scale: torch.Tensor
    input_zero_point: torch.Tensor
    output_scale: torch.Tensor
    output_zero_point: torch.Tensor
    bias: nn.Parameter | None
    plain: ClassVar[type[nn.Module]]
    channel_dim: ClassVar[int]
    weight_shape: torch.Size
    _like: torch.Tensor

    def __new__(cls, *args: object, **kwargs: object) -> Any:
        """Called as the plain layer's class is called, this makes a plain layer: so does `type(layer)(…)` in peft."""
        return cls.plain(*args, **kwargs) if args or kwargs else super().__new__(cls)

    def _prepare(self, layer: nn.Module, spec: LayerSpec, buckets: Buckets) -> None:
        weight: torch.Tensor = layer.weight  # type: ignore[assignment]
        bias: torch.Tensor | None = getattr(layer, "bias", None)
        self.spec, self.buckets, self.weight_shape = spec, buckets, weight.shape
        self.runtime: Runtime = Simulated()
        self.keep_floats = True
        rows, device = len(weight), weight.device
        columns = weight.numel() // rows
        steps = len(buckets.timesteps)

        def buffer(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
            self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=device))

        buffer("weight_codes", (rows, packed_bytes(columns, spec.weight_bits)), torch.uint8)
        count = spec.weight_grids(columns)
        buffer("weight_scale", (count, rows), torch.float16 if spec.weight_group else torch.float32)
        zeros = (rows, packed_bytes(count, spec.weight_bits)) if spec.weight_group else (count, rows)
        buffer("weight_zero_point", zeros, torch.uint8)
        if spec.rank:
            buffer("weight_left", (rows, spec.rank), torch.float16)
            buffer("weight_right", (spec.rank, columns), torch.float16)
        if spec.activation_bits and not spec.dynamic:
            grids = (steps, weight.shape[1] if spec.per_channel else spec.parts)
            packed = (steps, packed_bytes(grids[1], spec.packed_zero_points)) if spec.packed_zero_points else grids
            buffer("input_scale", grids, torch.float16 if spec.compact_grids else torch.float32)
            buffer("input_zero_point", packed, torch.uint8 if spec.zero_point_bits <= 8 else torch.int32)
        if spec.output_bits:
            buffer("output_scale", (steps, 1), torch.float32)
            buffer("output_zero_point", (steps, 1), torch.uint8 if spec.output_bits <= 8 else torch.int32)
        # has the type of the rest of the model; never on the meta device, for nothing is loaded into it
        like = torch.empty(0, dtype=weight.dtype, device="cpu" if device.type == "meta" else device)
        self.register_buffer("_like", like, persistent=False)
        self._kept = Kept()
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    # ------------------------------------------------------------------ weights
    def store(self, codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> None:
        """Take weights: codes of the shape of the weight, scale and zero point (parts or groups, O)."""
        self.weight_codes.copy_(pack(codes.flatten(1), self.spec.weight_bits))
        scale, zero_point = stored_grid(scale, zero_point, self.spec)
        self.weight_scale.copy_(scale)
        self.weight_zero_point.copy_(zero_point)
        self.forget()

    def store_branch(self, left: torch.Tensor, right: torch.Tensor) -> None:
        """Take the branch of low rank: (O, rank) and (rank, N)."""
        self.weight_left.copy_(left)
        self.weight_right.copy_(right)
        self.forget()

    def forget(self) -> None:
        """Free the weights that are kept as numbers; they are made again when they are needed."""
        self._kept.floats = None

    def codes(self) -> torch.Tensor:
        """The codes of the weights, uint8 in the shape of the weight."""
        count = self.weight_shape[1:].numel()
        return unpack(self.weight_codes, self.spec.weight_bits, count).reshape(self.weight_shape)

    def floats(self, dtype: torch.dtype = torch.float32, inner: bool = False) -> torch.Tensor:
        """The weights as numbers: the layer's own, or (`inner`) those that the codes stand for, of rotated inputs
        and beside the branch of low rank. Kept for the next call unless memory matters more (`keep_floats`)."""
        state, kept = (inner, self.state()), self._kept
        if kept.floats is not None:
            known = (kept.floats.dtype, kept.floats.device, kept.made_of)
            if known == (dtype, self.weight_codes.device, state):
                return kept.floats
        with lasting(), torch.no_grad():
            floats = self._as_floats(self.codes(), self.weight_scale, self.weight_zero_point)
            if not inner:
                floats = rotated(floats, 1, self.spec.rotate)
            if self.spec.rank and not inner:
                floats = floats + (self.weight_left.float() @ self.weight_right.float()).view_as(floats)
            floats = floats.to(dtype)
        if self.keep_floats:
            kept.floats, kept.made_of = floats, state
        return floats

    def _as_floats(self, codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
        if self.spec.weight_group:
            zeros = unpack(zero_point, self.spec.weight_bits, len(scale)).T.float()
            return values_of(codes.flatten(1).float(), scale.float(), zeros, self.spec).reshape(codes.shape)
        sizes = self.spec.part_sizes(self.weight_shape[1])
        ones = [1] * (codes.dim() - 1)
        parts = [
            dequantize(part, s.view(-1, *ones), z.float().view(-1, *ones))
            for part, s, z in zip(codes.float().split(sizes, 1), scale, zero_point, strict=True)
        ]
        return torch.cat(parts, 1) if self.spec.split else parts[0]

    def state(self) -> tuple[Any, ...]:
        """What is made of the stored tensors is good for as long as this stays equal."""
        if torch.compiler.is_compiling():
            return ()
        stored = [t for name, t in self._buffers.items() if t is not None and name[0] != "_"]
        return tuple((id(t), version_of(t)) for t in stored)

    @property
    def weight(self) -> torch.Tensor:
        """The weights as numbers, for code that looks at them; writing to them is refused."""
        return sealed(self.floats((self._like if self.bias is None else self.bias).dtype))

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise ConfigurationError(REASON)
        super().__setattr__(name, value)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: object, **kwargs: object) -> None:
        if f"{prefix}weight" in state_dict:
            raise ConfigurationError(f"{prefix}weight: {REASON}")
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.forget()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Grids keep their type, whatever type the rest of the model is given."""
        before = {name: t for name, t in self._buffers.items() if t is not None and name[0] != "_"}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self

    # ------------------------------------------------------------------ inputs
    @property
    def reads_whole_input(self) -> bool:
        """Whether what it computes at one position hangs on all of the image: on the grid that a convolution finds over
        it at every call."""
        per_image = self.spec.dynamic and not self.spec.input_group and self.channel_dim == 1
        return per_image and self.runtime.name not in ("dequantize", "bfloat16")

    def store_grids(self, what: str, scale: torch.Tensor, zero_point: torch.Tensor) -> None:
        """Take the grids of the "input" or the "output": scales and zero points, (buckets, K), whole numbers."""
        if what == "input" and self.spec.compact_grids:
            scale = half_scale(scale)
        if what == "input":
            zero_point = zero_point + self.spec.zero_margin
            if self.spec.packed_zero_points:
                zero_point = pack(zero_point, self.spec.packed_zero_points)
        getattr(self, f"{what}_scale").copy_(scale)
        getattr(self, f"{what}_zero_point").copy_(zero_point)

    def grid_at(self, table: torch.Tensor, x: torch.Tensor, packed: int = 0) -> torch.Tensor:
        """`grid_at` for this layer."""
        return grid_at(self, table, x, packed)

    def input_grid(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point of an input, float32, shaped to broadcast over it."""
        if self.spec.dynamic:
            return dynamic_grid(x, self.spec, self.channel_dim)
        zero = self.grid_at(self.input_zero_point, x, self.spec.packed_zero_points).float()
        return self.grid_at(self.input_scale, x), zero - self.spec.zero_margin

    def to_inner(self, x: torch.Tensor) -> torch.Tensor:
        """The input as it is rounded: rotated where the spec asks for it."""
        return rotated(x, self.channel_dim, self.spec.rotate)

    def round_input(self, x: torch.Tensor) -> torch.Tensor:
        """The input (see `to_inner`) rounded to its grid."""
        if self.spec.activation_bits is None:
            return x
        return fake_quantize(x, *self.input_grid(x), self.spec.activation_bits)

    def round_output(self, y: torch.Tensor) -> torch.Tensor:
        """The output rounded to its grid."""
        if self.spec.output_bits is None:
            return y
        scale, zero = self.grid_at(self.output_scale, y), self.grid_at(self.output_zero_point, y)
        return fake_quantize(y, scale, zero, self.spec.output_bits)

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        """What the branch of low rank makes of an input, without the bias."""
        raise NotImplementedError

    # ------------------------------------------------------------------ computing
    def bias_as(self, dtype: torch.dtype) -> torch.Tensor | None:
        """The bias in the type that is computed in."""
        return None if self.bias is None else self.bias.to(dtype)

    def compute(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The layer's own arithmetic with other weights."""
        raise NotImplementedError

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """What the runtime computes; a gradient goes through the weights as numbers (straight through)."""
        x = input  # torch's name for it, by which AnimateDiff gives it
        if not (x.requires_grad and torch.is_grad_enabled()) or self.runtime.name == Dequantize.name:
            return self.runtime(self, x)
        with torch.no_grad():
            value = self.runtime(self, x)
        return _StraightThrough.apply(Dequantize()(self, x), value)

    def extra_repr(self) -> str:
        """Shape, bits and runtime."""
        a = self.spec.activation_bits
        return f"{tuple(self.weight_shape)}, W{self.spec.weight_bits}{f'A{a}' if a else ''}, {self.runtime.name}"


class QuantizedLinear(QuantizedLayer, nn.Linear):  # type: ignore[misc,override]  # the weight is made of codes
    """A quantized `nn.Linear`; it stays an instance of it, so that LoRA finds it."""

    plain = nn.Linear
    channel_dim = -1

    @classmethod
    def like(cls, layer: nn.Linear, spec: LayerSpec, buckets: Buckets) -> Self:
        """An empty quantized layer of the shape of `layer`."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made.in_features, made.out_features = layer.in_features, layer.out_features
        made._prepare(layer, spec, buckets)
        return made

    def compute(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """x W' + b, (…, in) to (…, out)."""
        return nn.functional.linear(x, weight, self.bias_as(weight.dtype))

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        """x R' L', (…, in) to (…, out)."""
        inner = nn.functional.linear(x, self.weight_right.to(x.dtype))
        return nn.functional.linear(inner, self.weight_left.to(x.dtype))


class QuantizedConv2d(QuantizedLayer, nn.Conv2d):  # type: ignore[misc,override]  # the weight is made of codes
    """A quantized `nn.Conv2d`."""

    plain = nn.Conv2d
    channel_dim = 1
    _KEPT = (
        "in_channels out_channels kernel_size stride padding dilation transposed output_padding groups padding_mode "
        "_reversed_padding_repeated_twice"
    ).split()

    @classmethod
    def like(cls, layer: nn.Conv2d, spec: LayerSpec, buckets: Buckets) -> Self:
        """An empty quantized convolution of the shape of `layer`."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        for name in cls._KEPT:
            setattr(made, name, getattr(layer, name))
        made._prepare(layer, spec, buckets)
        return made

    def compute(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The convolution with these weights, (N, C, H, W)."""
        return self._conv_forward(x, weight, self.bias_as(weight.dtype))

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        """A convolution to as many channels as its rank, and one of single positions behind it."""
        right = self.weight_right.to(x.dtype).view(-1, *self.weight_shape[1:])
        return nn.functional.conv2d(self._conv_forward(x, right, None), self.weight_left.to(x.dtype)[..., None, None])


class QuantizedEmbedding(QuantizedLayer, nn.Embedding):  # type: ignore[override]  # the weight is made of codes
    """A quantized `nn.Embedding`: a grid for each of its rows, which are unpacked when they are looked up."""

    plain = nn.Embedding
    channel_dim = -1

    @classmethod
    def like(cls, layer: nn.Embedding, spec: LayerSpec, buckets: Buckets) -> Self:
        """An empty quantized table of the shape of `layer`."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        for name in ("num_embeddings", "embedding_dim", "padding_idx", "scale_grad_by_freq", "sparse"):
            setattr(made, name, getattr(layer, name))
        made.max_norm, made.norm_type = None, layer.norm_type
        made._prepare(layer, spec, buckets)
        return made

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Rows of the table, (…) numbers to (…, dim)."""
        rows = input.reshape(-1)
        codes = unpack(self.weight_codes[rows], self.spec.weight_bits, self.embedding_dim)
        found = self._as_floats(codes, self.weight_scale[:, rows], self.weight_zero_point[:, rows])
        return found.to(self._like.dtype).view(*input.shape, -1)


def quantizable(module: nn.Module) -> bool:
    """Whether a module can be replaced by a quantized layer: a plain `nn.Linear`, or an `nn.Conv2d` without groups."""
    if type(module).__name__ == "LoRACompatibleLinear":
        return False
    return type(module) is nn.Linear or (type(module) is nn.Conv2d and module.groups == 1)


def quantizable_table(module: nn.Module) -> bool:
    """Whether a module can be replaced by a quantized table: a plain `nn.Embedding` that does not rescale its rows."""
    return type(module) is nn.Embedding and module.max_norm is None


def quantized_like(layer: nn.Module, spec: LayerSpec, buckets: Buckets) -> QuantizedLayer:
    """An empty quantized layer of the kind and shape of `layer`."""
    if isinstance(layer, nn.Conv2d):
        return QuantizedConv2d.like(layer, spec, buckets)
    if isinstance(layer, nn.Embedding):
        return QuantizedEmbedding.like(layer, spec, buckets)
    assert isinstance(layer, nn.Linear)
    return QuantizedLinear.like(layer, spec, buckets)


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """The quantized layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}
