"""How the layers of a model are quantized, as plain values: what `config.json` holds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from diffusion_accel.errors import ConfigurationError, ModelLoadError
from diffusion_accel.io import plain

VERSION = 4  # of the checkpoint layout
_PLAIN_VERSION = 3  # the version of what needs nothing that came later
WEIGHT_BITS = range(2, 9)
ACTIVATION_BITS = range(2, 17)
GROUPS = (0, 16, 32, 64, 128, 256)  # weights or inputs that share a grid; 0: all of a row
MAX_MARGIN = 64
PERCENTILES = (99.9, 99.99, 99.999)  # of values, between which a grid of inputs may lie
LAYERS_LIMIT = 100_000  # of a model
TIMESTEPS_LIMIT = 4096
STEPS_LIMIT = 1_000_000_000  # iterations or epochs of a stage
ROWS_LIMIT = 1_000_000_000  # rows that a stage looks at
NUMBER_LIMIT = 1e9  # of timesteps and channels
RANKS = range(513)
ROTATIONS = (0, 2, 4, 8, 16, 32, 64, 128, 256)  # channels that are mixed with each other; 0: none are


@dataclass(frozen=True)
class LayerSpec:
    """How one linear layer or convolution is quantized.

    Attributes:
        weight_bits: of its weights, 2 … 8; one grid for each output channel (and part of the input channels, see
            `split`), or for each group.
        weight_group: every so many weights of an output channel, in the order of their memory, share a grid; 0: all.
        rank: of a branch in float16 beside the codes, which takes the input as it is: weight = codes on their grid +
            left · right; 0: none.
        rotate: every so many input channels, of each part, are mixed by a Hadamard matrix before inputs and weights are
            rounded; 0: they are not.
        activation_bits: of its input, 2 … 16, with a grid for each bucket of timesteps unless it is `dynamic`; None
            leaves it as it is.
        dynamic: the grid of the input is found when it is there, from minimum to maximum: of each row of a linear
            layer, of each image of a convolution.
        input_group: every so many channels of a position share a grid, of a `dynamic` input; 0: as above.
        per_channel: a grid for each input channel instead of one for the whole input.
        split: the first `split` input channels have grids of their own, because the input is a concatenation with a
            skip connection; 0: not split.
        compact_grids: the grids of a `per_channel` input take 2 bytes and `zero_point_bits` bits for each bucket and
            channel: float16 scales, and zero points of up to 8 bits packed as weights are; else 5 bytes.
        zero_margin: how many codes the zero points of the input may lie outside of the grid, which then need not hold
            zero; they are stored with this added. Only with `per_channel`.
        output_bits: of its output (queries, keys and values of attention); None leaves it as it is.
        sqnr: of the weights, 10 log10(signal / rounding error), dB.
        sensitivity: relative squared error of the model's output when this layer's weights alone are quantized.
    """

    weight_bits: int
    weight_group: int = 0
    rank: int = 0
    rotate: int = 0
    activation_bits: int | None = None
    dynamic: bool = False
    input_group: int = 0
    per_channel: bool = False
    compact_grids: bool = False
    split: int = 0
    zero_margin: int = 0
    output_bits: int | None = None
    sqnr: float | None = None
    sensitivity: float | None = None

    def __post_init__(self) -> None:
        checked(self.weight_bits, WEIGHT_BITS, "weight_bits")
        for name in ("activation_bits", "output_bits"):
            if getattr(self, name) is not None:
                checked(getattr(self, name), ACTIVATION_BITS, name)
        if type(self.split) is not int or not 0 <= self.split <= NUMBER_LIMIT:
            raise ConfigurationError(f"split must be a number of channels, got {plain(self.split)}")
        for name in ("weight_group", "input_group"):
            in_groups(getattr(self, name), name)
        checked(self.rank, RANKS, "rank")
        if type(self.rotate) is not int or self.rotate not in ROTATIONS:
            raise ConfigurationError(
                f"rotate must be one of {', '.join(map(str, ROTATIONS))}, got {plain(self.rotate)}"
            )
        for name in ("per_channel", "compact_grids", "dynamic"):
            if type(getattr(self, name)) is not bool:
                raise ConfigurationError(f"{name} must be true or false, got {plain(getattr(self, name))}")
        for name in ("sqnr", "sensitivity"):
            if getattr(self, name) is not None and not finite(getattr(self, name)):
                raise ConfigurationError(f"{name} must be a finite number, got {plain(getattr(self, name))}")
        if self.dynamic and (self.per_channel or not self.activation_bits):
            raise ConfigurationError("dynamic needs activation_bits, and excludes per_channel")
        if self.input_group and not self.dynamic:
            raise ConfigurationError("input_group needs dynamic")
        if self.compact_grids and not (self.per_channel and self.activation_bits):
            raise ConfigurationError("compact_grids needs activation_bits and per_channel")
        if type(self.zero_margin) is not int or not 0 <= self.zero_margin <= MAX_MARGIN:
            raise ConfigurationError(f"zero_margin must be 0 to {MAX_MARGIN}, got {plain(self.zero_margin)}")
        if self.zero_margin and not (self.per_channel and self.activation_bits):
            raise ConfigurationError("zero_margin needs activation_bits and per_channel")

    @property
    def has_tables(self) -> bool:
        """Whether it has grids for each bucket of timesteps."""
        return bool(self.output_bits or (self.activation_bits and not self.dynamic))

    @property
    def has_inner_weights(self) -> bool:
        """Whether codes stand for other weights than the layer's own: for rotated ones, or beside a branch."""
        return bool(self.rank or self.rotate)

    @property
    def zero_point_bits(self) -> int:
        """Bits that hold every zero point of the input, with the margin added."""
        return ((1 << (self.activation_bits or 0)) - 1 + 2 * self.zero_margin).bit_length()

    @property
    def packed_zero_points(self) -> int:
        """Bits that each zero point of the input takes in packed rows; 0: they are not packed."""
        bits = self.zero_point_bits
        return bits if self.compact_grids and bits <= 8 else 0

    @property
    def parts(self) -> int:
        """Parts of the input channels with grids of their own: of the input, and of the weights without groups."""
        return 2 if self.split else 1

    def weight_grids(self, columns: int) -> int:
        """Grids of each output channel, which has `columns` weights."""
        return -(-columns // self.weight_group) if self.weight_group else self.parts

    def part_sizes(self, channels: int) -> list[int]:
        """How many of `channels` input channels each part has."""
        return [self.split, channels - self.split] if self.split else [channels]

    def to_dict(self) -> dict[str, Any]:
        """What differs from the defaults, as JSON values."""
        defaults = {f.name: f.default for f in fields(self)}
        return {k: v for k, v in asdict(self).items() if v != defaults[k]}


@dataclass(frozen=True)
class ModelSpec:
    """How a model is quantized.

    Attributes:
        layers: by module name.
        timesteps: the calibrated timesteps, one a bucket, noisiest first; empty: activations are not quantized.
        softmax: bits of the attention probabilities by name of the attention module.
        recipe: how it was made, for the reader: settings and versions.
        digest: of config and tensors, see docs/checkpoint-format.md; None until it is saved.
        version: of the layout that it was read from.
    """

    layers: dict[str, LayerSpec]
    timesteps: tuple[float, ...] = ()
    softmax: dict[str, int] | None = None
    recipe: dict[str, Any] | None = None
    digest: str | None = None
    version: int = VERSION

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, in the order in which they are written."""
        later = any(spec.has_inner_weights for spec in self.layers.values())
        version = VERSION if later else _PLAIN_VERSION
        values: dict[str, Any] = {"version": version, "timesteps": list(self.timesteps)}
        values["layers"] = {name: spec.to_dict() for name, spec in sorted(self.layers.items())}
        for name in ("softmax", "recipe", "digest"):
            if getattr(self, name) is not None:
                values[name] = getattr(self, name)
        return values

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """The inverse of `to_dict`. Raises `ModelLoadError` for another version or values that are not allowed."""
        if not isinstance(values, Mapping):
            raise ModelLoadError(f"quantization_config must be a table, got {plain(values)}")
        version = values.get("version")
        if type(version) is not int or version < 1:
            raise ModelLoadError(f"quantization_config has no version this package knows (got {plain(version)})")
        if version > VERSION:
            raise ModelLoadError(
                f"the checkpoint has layout version {plain(version)}, this package reads up to {VERSION}; "
                "upgrade it: pip install -U diffusion-accel"
            )
        layers = _layers(values.get("layers"))
        steps = _timesteps(values.get("timesteps", ()))
        if not steps and any(s.has_tables for s in layers.values()):
            raise ModelLoadError("quantization_config has activation bits but no timesteps")
        softmax, recipe, digest = (values.get(key) for key in ("softmax", "recipe", "digest"))
        if softmax is not None:
            if not isinstance(softmax, Mapping) or len(softmax) > LAYERS_LIMIT:
                raise ModelLoadError(f"quantization_config: softmax must be a table, got {plain(softmax)}")
            for name, bits in softmax.items():
                if type(bits) is not int or bits not in ACTIVATION_BITS:
                    raise ModelLoadError(
                        f"quantization_config: the softmax bits of {plain(name)} must be 2 to 16, got {plain(bits)}"
                    )
            if not steps:
                raise ModelLoadError("quantization_config has softmax bits but no timesteps")
        if recipe is not None and not isinstance(recipe, Mapping):
            raise ModelLoadError(f"quantization_config: recipe must be a table, got {plain(recipe)}")
        if digest is not None and not (isinstance(digest, str) and len(digest) <= 128):
            raise ModelLoadError(f"quantization_config: digest must be a hash, got {plain(digest)}")
        return cls(
            layers,
            steps,
            None if softmax is None else dict(softmax),
            None if recipe is None else dict(recipe),
            digest,
            version,
        )


def _layers(values: Any) -> dict[str, LayerSpec]:
    if not isinstance(values, Mapping) or not values:
        raise ModelLoadError("quantization_config names no layers")
    if len(values) > LAYERS_LIMIT:
        raise ModelLoadError(f"quantization_config names {len(values)} layers, at most {LAYERS_LIMIT} are allowed")
    known = {f.name for f in fields(LayerSpec)}
    found = {}
    for name, spec in values.items():
        extra = set(spec) - known if isinstance(spec, Mapping) else {"not a table"}
        if extra:
            raise ModelLoadError(f"quantization_config, layer {plain(name)}: unknown {plain(min(map(str, extra)))}")
        try:
            found[str(name)] = LayerSpec(**spec)
        except (ConfigurationError, TypeError) as error:
            raise ModelLoadError(f"quantization_config, layer {plain(name)}: {error}") from error
    return found


def _timesteps(values: Any) -> tuple[float, ...]:
    if not isinstance(values, (list, tuple)) or not all(type(t) in (int, float) for t in values):
        raise ModelLoadError("quantization_config: timesteps must be a list of numbers")
    if len(values) > TIMESTEPS_LIMIT:
        raise ModelLoadError(f"quantization_config has {len(values)} timesteps, at most {TIMESTEPS_LIMIT} are allowed")
    wrong = next((t for t in values if not finite(t) or abs(t) > NUMBER_LIMIT), None)
    if wrong is not None:
        raise ModelLoadError(f"quantization_config: {plain(wrong)} is no timestep")
    pairs = list(itertools.pairwise(values))
    if not (all(a > b for a, b in pairs) or all(a < b for a, b in pairs)):
        raise ModelLoadError("quantization_config: the timesteps are not in order")
    return tuple(values)


def finite(value: Any) -> bool:
    """Whether a value is a finite number, and no boolean."""
    return (type(value) is int and abs(value) < 10**300) or (type(value) is float and math.isfinite(value))


def within(values: Any, low: float, high: float, name: str) -> None:
    """Raise `ConfigurationError` unless a number, or each of a tuple, is from `low` to `high`; whole numbers where the
    two are."""
    kinds = (int,) if type(low) is int and type(high) is int else (int, float)
    for value in values if isinstance(values, tuple) else (values,):
        if type(value) not in kinds or not low <= value <= high:
            what = "a whole number" if kinds == (int,) else "a number"
            raise ConfigurationError(
                f"{name} must be {what} from {_shortly(low)} to {_shortly(high)}, got {plain(value)}"
            )


def _shortly(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"


def in_groups(size: Any, name: str) -> int:
    """`size`, or a `ConfigurationError` unless groups may have it."""
    if type(size) is not int or size not in GROUPS:
        raise ConfigurationError(f"{name} must be one of {', '.join(map(str, GROUPS))}, got {plain(size)}")
    return size


def checked(bits: Any, allowed: range, name: str) -> int:
    """`bits`, or a `ConfigurationError` that says what is allowed."""
    if type(bits) is not int or bits not in allowed:
        raise ConfigurationError(f"{name} must be {allowed.start} to {allowed.stop - 1}, got {plain(bits)}")
    return bits
