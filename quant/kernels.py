"""Integer arithmetic for quantized layers: 8-bit products through oneDNN on CPUs, 8-bit matrix products elsewhere.

Codes x of the input (scale a, zero point z) and signed weights w = code - zero_point (scale s of each output channel)
give the exact sum  y = a s (Σ x w - z Σ w) + bias,  where Σ runs in 32-bit integers; only the last step rounds.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from contextlib import nullcontext
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from diffusion_accel.flops import uncounted
from diffusion_accel.inside import is_traced

from .affine import quantize, top
from .layers import Dequantize, QuantizedConv2d, QuantizedLayer, Runtime, Simulated, lasting

# Weights of a layer from which on a way is the faster one on a CPU, measured with inputs of 2 to 8,000 rows by
# scripts/measure_quantization.py. Integers against float32: with products in 32 bits; with those in 16 bits; of dynamic
# inputs of linear layers, whose grids are found by row, and of convolutions as well where the other way is bfloat16
_ENOUGH, _ENOUGH_16_BITS, _ENOUGH_BY_ROW = 2**15, 2**17, 2**18
# where bfloat16 is multiplied as well, it against float32; beside AMX integers against the runtime `bfloat16`, and
# against a model in bfloat16, or with dynamic inputs of convolutions
_ENOUGH_BFLOAT16, _ENOUGH_BESIDE_BFLOAT16, _ENOUGH_BESIDE_AMX = 2**15, 3 * 2**15, 2**19
AMX, VNNI_BFLOAT16 = "AMX", "32 bits, bfloat16"
# dB: what bfloat16 rounds (weights, input, output) is kept to 51, so where the weights of a layer keep at most this, it
# adds at most half of the error that they have
_BFLOAT16_UP_TO = 48.0


def make_runtime(name: str, layer: QuantizedLayer) -> Runtime:
    """The runtime `name` for one layer; see `model.set_runtime`."""
    if name == "dequantize":
        return Dequantize()
    if name == "simulated":
        return Simulated()
    if name == "bfloat16":
        return Bfloat16()
    if name == "auto":
        return Auto()
    return Integer() if why_not_integer(layer) is None else Simulated()


def why_not_integer(layer: QuantizedLayer) -> str | None:
    """Why a layer cannot be computed with 8-bit integers, or None if it can."""
    spec = layer.spec
    if spec.activation_bits is None:
        return "its input is not quantized"
    if spec.activation_bits > 8:
        return "its input has more than 8 bits"
    if spec.per_channel:
        return "its input has a grid for each channel, which a product cannot sum over"
    if spec.weight_group or spec.input_group:
        return "it has a grid for each group of channels, which a product cannot sum over"
    if spec.weight_bits == 8 and bool((layer.weight_zero_point != 128).any()):
        return "its 8-bit weights are not symmetric, so they do not fit signed bytes"
    if isinstance(layer, QuantizedConv2d) and (layer.padding_mode != "zeros" or isinstance(layer.padding, str)):
        return "its padding is not with zeros"
    return None


def signed_weights(layer: QuantizedLayer) -> list[torch.Tensor]:
    """code - zero_point as int8, a tensor for each part of the input channels."""
    sizes = layer.spec.part_sizes(layer.weight_shape[1])
    ones = [1] * (len(layer.weight_shape) - 1)
    parts = layer.codes().short().split(sizes, 1)
    zeros = layer.weight_zero_point.short()
    return [(part - zero.view(-1, *ones)).to(torch.int8) for part, zero in zip(parts, zeros, strict=True)]


def to_bytes(x: torch.Tensor, scale: float, zero_point: int, bits: int) -> torch.Tensor:
    """Codes of `x` as uint8, in one pass over memory where torch still has the operator for it."""
    if bits == 8 and hasattr(torch, "quantize_per_tensor"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.quantize_per_tensor(x.float(), scale, zero_point, torch.quint8).int_repr()
    return (x.float() / scale).round_().add_(zero_point).clamp_(0, (1 << bits) - 1).to(torch.uint8)


@functools.cache
def saturates() -> bool:
    """Whether oneDNN's 8-bit products are wrong on this CPU where weights are large.

    Without VNNI it adds pairs of products in 16 bits, which hold 32767, and cuts off what is larger.
    """
    if not hasattr(torch.ops.onednn, "qlinear_prepack"):
        return False
    with torch.device("cpu"), lasting():
        x, w = torch.full((8, 64), 255, dtype=torch.uint8), torch.full((16, 64), 127, dtype=torch.int8)
        one, zero = torch.ones(16, dtype=torch.float32), torch.zeros(16, dtype=torch.int64)
        packed = torch.ops.onednn.qlinear_prepack(w, None)
        rest: tuple[Any, ...] = (None, 1.0, 0, torch.float32, "none", [], "")
        y = torch.ops.onednn.qlinear_pointwise(x, 1.0, 0, packed, one, zero, *rest)
    return bool((y != 255 * 127 * 64).any())


def unsaturated(weight: torch.Tensor, bits: int) -> list[torch.Tensor]:
    """int8 weights as terms that sum to them, so small that two products with codes of `bits` fit 16 bits."""
    largest = min(127, 32767 // (2 * ((1 << bits) - 1)))
    first = weight.clamp(-largest, largest)
    rest = weight - first
    return [first] if not rest.any() else [first, *unsaturated(rest, bits)]


class OneDnn:
    """8-bit products of oneDNN (VNNI, AMX) on a CPU, with weights packed once.

    Where the CPU has none of these, 8-bit weights are split into two terms: exact, but twice the work.
    """

    __slots__ = ("made_of", "no_zeros", "sums", "tables", "weights")

    def __init__(self) -> None:
        self.weights: list[list[torch.Tensor]] | None = None
        self.made_of: tuple[Any, ...] = ()

    @staticmethod
    def usable(x: torch.Tensor, layer: QuantizedLayer) -> bool:
        """Whether this machine and this torch have it, for an input at one timestep."""
        one = layer.spec.dynamic or layer.buckets.number is not None
        return x.device.type == "cpu" and one and hasattr(torch.ops.onednn, "qlinear_prepack")

    def __call__(self, layer: QuantizedLayer, x: torch.Tensor) -> torch.Tensor:
        """The output of the layer, not rounded."""
        if self.weights is None or self.made_of != layer.state():
            with lasting():
                self.weights = self._prepare(layer)
        if not layer.spec.dynamic:
            assert layer.buckets.number is not None
            return self._sum(layer, x, *(table[layer.buckets.number] for table in self.tables)).to(x.dtype)
        grid = layer.input_grid(x)
        if not isinstance(layer, nn.Conv2d):
            return self._sum_of_rows(layer, x, *grid).to(x.dtype)
        begins = [0, layer.spec.split][: layer.spec.parts]
        ends = [g[:, begins].flatten(1).tolist() for g in (g[..., :1, :1] for g in grid)]
        each = [self._sum(layer, x[i : i + 1], ends[0][i], [int(z) for z in ends[1][i]]) for i in range(len(x))]
        return torch.cat(each).to(x.dtype)

    def _sum(self, layer: QuantizedLayer, x: torch.Tensor, scales: list[float], zeros: list[int]) -> torch.Tensor:
        """Of an input with a grid for each part of its channels."""
        assert self.weights is not None and layer.spec.activation_bits is not None
        dim, total = layer.channel_dim, None
        parts = x.split(layer.spec.part_sizes(x.shape[dim]), dim)
        alone = len(parts) == 1 and len(self.weights[0]) == 1  # nothing is added to the product: it is rounded at once
        at_once = alone and x.dtype == torch.bfloat16 and products("cpu") in (AMX, VNNI_BFLOAT16)
        kind = torch.bfloat16 if at_once else torch.float32
        for part, terms, scale, zero, weight_scale in zip(
            parts, self.weights, scales, zeros, layer.weight_scale, strict=True
        ):
            codes = to_bytes(part, scale, zero, layer.spec.activation_bits)
            for weight in terms:
                bias = layer.bias.float() if layer.bias is not None and total is None else None
                with uncounted() if weight is not terms[0] else nullcontext():
                    y = self._product(layer, codes, scale, zero, weight, weight_scale, bias, kind=kind)
                total = y if total is None else total.add_(y)
        assert total is not None
        return total

    def _sum_of_rows(
        self, layer: QuantizedLayer, x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor
    ) -> torch.Tensor:
        """Of an input (…, C) whose rows have grids of their own, (…, 1), or (…, C) of the parts."""
        assert self.weights is not None and layer.spec.activation_bits is not None
        total = torch.zeros(()) if layer.bias is None else layer.bias.float()
        begin = 0
        parts = x.split(layer.spec.part_sizes(x.shape[-1]), -1)
        for part, terms, sums, weight_scale in zip(parts, self.weights, self.sums, layer.weight_scale, strict=True):
            s, z = (g if g.shape[-1] == 1 else g.narrow(-1, begin, 1) for g in (scale, zero))
            begin += part.shape[-1]
            codes = quantize(part.float(), s, z, layer.spec.activation_bits).to(torch.uint8)
            y = self._product(layer, codes, 1.0, 0, terms[0], weight_scale, None)
            for weight in terms[1:]:
                with uncounted():
                    y = y.add_(self._product(layer, codes, 1.0, 0, weight, weight_scale, None))
            y.addcmul_(z, sums, value=-1.0)  # in place: fresh memory takes as long as the product
            total = torch.addcmul(total, y, s, out=y)
        return total

    def _prepare(self, layer: QuantizedLayer) -> list[list[torch.Tensor]]:
        bits = layer.spec.activation_bits
        assert bits is not None
        self.made_of = layer.state()
        self.no_zeros = torch.zeros(len(layer.weight_codes), dtype=torch.int64)
        signed = signed_weights(layer)
        if layer.spec.dynamic:
            self.sums = [w.flatten(1).sum(1).float() * s for w, s in zip(signed, layer.weight_scale, strict=True)]
        else:
            self.tables = layer.input_scale.tolist(), layer.input_zero_point.long().tolist()
        terms = [unsaturated(w, bits) if saturates() else [w] for w in signed]
        return [[self._pack(layer, term) for term in each] for each in terms]

    def _pack(self, layer: QuantizedLayer, weight: torch.Tensor) -> torch.Tensor:
        if isinstance(layer, nn.Conv2d):
            # a zero point other than 0 makes oneDNN keep the sums that any zero point needs
            return torch.ops.onednn.qconv_prepack(
                weight, layer.weight_scale[0], 1.0, 1, layer.stride, layer.padding, layer.dilation, 1, None
            )
        return torch.ops.onednn.qlinear_prepack(weight, None)

    def _product(
        self, layer: Any, codes: torch.Tensor, scale: float, zero: int, *more: Any, kind: torch.dtype = torch.float32
    ) -> torch.Tensor:
        weight, weight_scale, bias = more
        head = (scale, zero, weight, weight_scale, self.no_zeros, bias)
        tail: tuple[Any, ...] = (1.0, 0, kind, "none", [], "")
        if isinstance(layer, nn.Conv2d):
            codes = codes.contiguous(memory_format=torch.channels_last)
            shape = (layer.stride, layer.padding, layer.dilation, 1)
            return torch.ops.onednn.qconv2d_pointwise(codes, *head, *shape, *tail)
        flat = codes.reshape(-1, codes.shape[-1])
        return torch.ops.onednn.qlinear_pointwise(flat, *head, *tail).view(*codes.shape[:-1], -1)


class IntMatmul:
    """`torch._int_mm`, for CUDA and everything else; a convolution becomes a product with its windows side by side."""

    __slots__ = ("made_of", "sums", "weights")

    def __init__(self) -> None:
        self.weights: list[torch.Tensor] | None = None
        self.made_of: tuple[Any, ...] = ()

    def __call__(self, layer: QuantizedLayer, x: torch.Tensor) -> torch.Tensor:
        """The output of the layer, not rounded."""
        bits = layer.spec.activation_bits
        assert bits is not None
        if self.weights is None or self.weights[0].device != x.device or self.made_of != layer.state():
            with lasting():
                self.weights = [w.flatten(1).t().contiguous() for w in signed_weights(layer)]
                self.sums = [w.sum(0, dtype=torch.int32) for w in self.weights]
            self.made_of = layer.state()
        scale, zero = layer.input_grid(x)
        codes = quantize(x.float(), scale, zero, bits)
        shifted = (codes - 128).to(torch.int8)  # _int_mm multiplies signed bytes
        padding = (zero - 128).to(torch.int8)
        dim, total, begin = layer.channel_dim, None, 0
        sizes = layer.spec.part_sizes(x.shape[dim])
        for size, weight, sums, weight_scale in zip(sizes, self.weights, self.sums, layer.weight_scale, strict=True):
            piece = shifted.narrow(dim, begin, size)
            each = [p if p.shape[dim] == 1 else p.narrow(dim, begin, 1) for p in (scale, zero, padding)]
            begin += size
            y = self._part(layer, piece, each, weight, sums)
            y = y * weight_scale.view([-1 if d == dim % y.dim() else 1 for d in range(y.dim())])
            total = y if total is None else total + y
        assert total is not None
        if layer.bias is not None:
            total = total + layer.bias.float().view([-1 if d == dim % total.dim() else 1 for d in range(total.dim())])
        return total.to(x.dtype)

    def _part(
        self, layer: Any, x: torch.Tensor, grid: list[torch.Tensor], weight: torch.Tensor, sums: torch.Tensor
    ) -> torch.Tensor:
        scale, zero, padding = grid
        if not isinstance(layer, nn.Conv2d):
            y = int_mm(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], -1)
            return (y + (128 - zero) * sums) * scale
        top, left = cast(tuple[int, int], layer.padding)  # by name ("same") it is not computed here
        n, c, h, w = x.shape
        padded = padding.expand(n, c, 1, 1).repeat(1, 1, h + 2 * top, w + 2 * left)
        padded[:, :, top : top + h, left : left + w] = x
        (kh, kw), (sh, sw), (dh, dw) = layer.kernel_size, layer.stride, layer.dilation
        rows = (padded.shape[2] - dh * (kh - 1) - 1) // sh + 1
        columns = (padded.shape[3] - dw * (kw - 1) - 1) // sw + 1
        a, b, p, q = padded.stride()
        windows = padded.as_strided((n, rows, columns, c, kh, kw), (a, p * sh, q * sw, b, p * dh, q * dw))
        y = int_mm(windows.reshape(n * rows * columns, -1), weight).view(n, rows, columns, -1)
        return ((y + (128 - zero.permute(0, 2, 3, 1)) * sums) * scale.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def int_mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Product (M, K) x (K, N) of int8 as int32; CUDA wants more than 16 rows and multiples of 8, so zeros fill up.

    Where a CPU adds products in 16 bits, `torch._int_mm` cuts off sums as oneDNN does, for it is the same code.
    """
    rows, inner, columns = a.shape[0], a.shape[1], b.shape[1]
    more = (max(0, 17 - rows), -inner % 8, -columns % 8)
    if any(more):
        a = nn.functional.pad(a, (0, more[1], 0, more[0]))
        b = nn.functional.pad(b, (0, more[2], 0, more[1]))
    terms = unsaturated(b, 8) if a.device.type == "cpu" and saturates() else [b]
    found = torch._int_mm(a, terms[0])
    for term in terms[1:]:
        found = found + torch._int_mm(a, term)
    return found[:rows, :columns]


def in_graph(layer: QuantizedLayer, x: torch.Tensor) -> torch.Tensor:
    """The same as floating-point operations on codes, which an engine turns into 8-bit products: inputs and weights go
    through fake quantization with scale 1 at a place of its own for each, and what belongs to a timestep (scale, zero
    point) is outside of that. The output of the layer, not rounded.
    """
    bits, dim = layer.spec.activation_bits, layer.channel_dim
    assert bits is not None
    scale, zero = layer.input_grid(x)
    total, begin = None, 0
    sizes = layer.spec.part_sizes(x.shape[dim])
    for size, signed, weight_scale in zip(sizes, signed_weights(layer), layer.weight_scale, strict=True):
        weight = torch.from_numpy(signed.float().numpy())  # through numpy: a constant, how it is unpacked is not traced
        a, z = (g if g.shape[dim] == 1 else g.narrow(dim, begin, 1) for g in (scale, zero))
        codes = torch.fake_quantize_per_tensor_affine(x.narrow(dim, begin, size).float() / a + z, 1.0, 0, 0, top(bits))
        begin += size
        ones, zeros = torch.ones(len(weight)), torch.zeros(len(weight), dtype=torch.int32)
        w = torch.fake_quantize_per_channel_affine(weight, ones, zeros, 0, -128, 127)
        shape = [-1 if d == dim % x.dim() else 1 for d in range(x.dim())]
        if isinstance(layer, nn.Conv2d):
            y = nn.functional.conv2d(codes, w, None, layer.stride, layer.padding, layer.dilation)
            sums = torch.from_numpy(window_sums(layer, weight.numpy(), x.shape[-2:]))
        else:
            y, sums = nn.functional.linear(codes, w), torch.from_numpy(weight.numpy().sum(1)).view(shape)
        y = (y - z * sums) * (a * weight_scale.view(shape))
        total = y if total is None else total + y
    assert total is not None
    return (total if layer.bias is None else total + layer.bias.float().view(shape)).to(x.dtype)


def window_sums(layer: Any, weight: Any, size: Any) -> Any:
    """What a convolution with these weights makes of an image of ones, (1, O, H', W'); arrays of numpy."""
    height, width = map(int, size)
    inside = np.pad(np.ones((height, width), np.float32), [(p, p) for p in layer.padding])
    w = weight.sum(1)
    (kh, kw), (sh, sw), (dh, dw) = w.shape[1:], layer.stride, layer.dilation
    rows, columns = ((inside.shape[i] - d * (k - 1) - 1) // s + 1 for i, d, k, s in ((0, dh, kh, sh), (1, dw, kw, sw)))
    found = np.zeros((len(w), rows, columns), np.float32)
    for i, j in itertools.product(range(kh), range(kw)):
        seen = inside[i * dh : i * dh + (rows - 1) * sh + 1 : sh, j * dw : j * dw + (columns - 1) * sw + 1 : sw]
        found += w[:, i, j, None, None] * seen
    return found[None]


class Integer:
    """8-bit integer products, with what this machine has for them."""

    __slots__ = ("matmul", "onednn")
    name = "integer"

    def __init__(self) -> None:
        self.onednn, self.matmul = OneDnn(), IntMatmul()

    def __call__(self, layer: QuantizedLayer, x: torch.Tensor) -> torch.Tensor:
        """The output of the layer, rounded if it is to be."""
        if is_traced() and saturates() and layer.spec.weight_bits == 8:  # an engine cuts off sums as oneDNN does
            return Simulated()(layer, x)
        way = in_graph if is_traced() else self.onednn if self.onednn.usable(x, layer) else self.matmul
        y = way(layer, layer.to_inner(x))
        return layer.round_output(y + layer.branch(x) if layer.spec.rank else y)


class Bfloat16:
    """Weights and input as bfloat16, added up in float32, for a model in float32; others as `Dequantize`."""

    name = "bfloat16"

    def __call__(self, layer: QuantizedLayer, x: torch.Tensor) -> torch.Tensor:
        """The output of the layer."""
        if x.dtype != torch.float32 or is_traced():  # an engine chooses its types itself
            return Dequantize()(layer, x)
        return layer.compute(x.bfloat16(), layer.floats(torch.bfloat16)).float()


class Auto:
    """The fastest of `Integer`, `Bfloat16` and `Dequantize`, by a rule.

    The rule knows the layer, the type of numbers and the kind of machine; no clock and no batch. So a machine draws the
    same image every time, and the processes of a job on machines of one kind choose alike.
    """

    __slots__ = ("picked", "ways")

    def __init__(self) -> None:
        self.ways: dict[str, Runtime] = {way.name: way for way in (Integer(), Bfloat16(), Dequantize())}
        self.picked: dict[tuple[Any, ...], Runtime] = {}

    @property
    def name(self) -> str:
        """What was picked so far; "auto" before the first call."""
        names = {way.name for way in self.picked.values()}
        return "auto" if not names else "+".join(sorted(names))

    def __call__(self, layer: QuantizedLayer, x: torch.Tensor) -> torch.Tensor:
        """The output of the layer, by the way that was picked for this type of numbers and device."""
        kind = (x.dtype, x.device.type)
        if kind not in self.picked:
            self.picked[kind] = self.ways[fastest(layer, *kind)]
        return self.picked[kind](layer, x)


def fastest(layer: QuantizedLayer, dtype: torch.dtype, device: str) -> str:
    """The runtime in which a layer takes the least time, by its size and the machine: "integer", "bfloat16" or
    "dequantize".

    Args:
        layer: the layer. Bits of the input and `sqnr` of the weights say whether bfloat16 is within the error that
            it has.
        dtype: of its input.
        device: the type of it.
    """
    spec, machine, size = layer.spec, products(device), layer.weight_shape.numel()
    by_row = spec.dynamic and not isinstance(layer, nn.Conv2d)
    coarser = (spec.activation_bits or 16) <= 8 or (spec.sqnr is not None and spec.sqnr <= _BFLOAT16_UP_TO)
    half = machine in (AMX, VNNI_BFLOAT16) and coarser and size >= _ENOUGH_BFLOAT16 and dtype == torch.float32
    if why_not_integer(layer) is not None or machine == "none" or (machine == "16 bits" and spec.weight_bits == 8):
        integers = False  # 8-bit weights are split where products are added in 16 bits: twice the work
    elif machine == AMX and (half or dtype != torch.float32):
        enough = _ENOUGH_BESIDE_BFLOAT16 if half and not spec.dynamic else _ENOUGH_BESIDE_AMX
        integers = size >= enough and not by_row
    elif by_row or (half and spec.dynamic):
        integers = size >= _ENOUGH_BY_ROW
    else:
        integers = size >= (_ENOUGH_16_BITS if machine == "16 bits" else _ENOUGH)
    return "integer" if integers else "bfloat16" if half else "dequantize"


@functools.cache
def products(device: str) -> str:
    """What a machine has for 8-bit products: on a CPU "AMX", "32 bits" (to add them in), the same with products of
    bfloat16, or "16 bits"; else "none"."""
    if device != "cpu" or not hasattr(torch.ops.onednn, "qlinear_prepack"):
        return "none"
    if saturates():
        return "16 bits"
    for kind, asked in ((AMX, "_is_amx_tile_supported"), (VNNI_BFLOAT16, "_is_avx512_bf16_supported")):
        if getattr(torch.cpu, asked, bool)():
            return kind
    return "32 bits"
