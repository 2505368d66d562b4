"""What `quantize` is asked for; without torch, so that it is checked before anything is loaded."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from diffusion_accel.arguments import by_name
from diffusion_accel.errors import ConfigurationError
from diffusion_accel.io import plain
from diffusion_accel.quant.spec import (
    ACTIVATION_BITS,
    PERCENTILES,
    RANKS,
    ROWS_LIMIT,
    STEPS_LIMIT,
    WEIGHT_BITS,
    checked,
    in_groups,
    within,
)

_BITS = re.compile(r"w(\d+)(?:a(\d+))?", re.IGNORECASE)
MOMENTS = ("visit", "timestep", "shared")
PRESETS = ("sd", "sdxl", "lsun", "dit")  # which layers they name: `finetune.PRESETS`
INPUTS = ("static", "dynamic")
ALLOCATIONS = ("sensitivity", "lim", "zd")
ALLOCATED_GROUPS = (0, 32, 64, 128)  # that an allocation by size or PSNR chooses from unless it is told
SMALLEST_RATIO = 0.01
INPUT_GROUP = 32  # of dynamic inputs of few bits
LAYERS = ("preset", "measured", "all")
BUCKETS = 25  # of timesteps, where an input has one grid or two
BUCKETS_BY_CHANNEL = 16  # where each channel of an input has one, so that grids stay small beside 4-bit weights


@by_name
@dataclass(frozen=True)
class RoundingSettings:
    """AdaRound as Q-Diffusion and QuEST run it.

    Attributes:
        iterations: steps of Adam a block.
        rows: rows of the calibration set that a block sees, spread over all timesteps.
        batch: rows in a step.
        rate: learning rate of the rounding variables, for the published number of iterations; it is raised, up to
            tenfold, where a run has less than a tenth of them.
        weight: of the regularizer that drives every weight to up or down.
        beta: its exponent, from … to.
        warmup: share of the steps without the regularizer.
    """

    iterations: int = 20_000
    rows: int = 512
    batch: int = 32
    rate: float = 1e-3
    weight: float = 0.01
    beta: tuple[float, float] = (20.0, 2.0)
    warmup: float = 0.2

    def __post_init__(self) -> None:
        within(self.iterations, 0, STEPS_LIMIT, "iterations of rounding")
        for name in ("rows", "batch"):
            within(getattr(self, name), 1, ROWS_LIMIT, f"{name} of rounding")
        within(self.rate, math.ulp(0), 1.0, "rate of rounding")
        within(self.weight, 0.0, 1e6, "weight of rounding")
        within(self.beta, 1.0, 1000.0, "beta of rounding")
        within(self.warmup, 0.0, 1.0, "warmup of rounding")


@by_name
@dataclass(frozen=True)
class RangeSettings:
    """How ranges are chosen.

    Attributes:
        percentiles: candidates of which the least squared error decides; (100,) is minimum and maximum.
        momentum: of the running mean over chunks; None: the first chunk decides (QuEST advises so for 4-bit inputs).
        rows: rows of a bucket that are looked at.
        chunk: rows in a forward pass.
    """

    percentiles: tuple[float, ...] = PERCENTILES
    momentum: float | None = 0.95
    rows: int = 64
    chunk: int = 32

    def __post_init__(self) -> None:
        within(self.percentiles, 50.0, 100.0, "percentiles of ranges")
        if self.momentum is not None:
            within(self.momentum, 0.0, 1.0, "momentum of ranges")
        for name in ("rows", "chunk"):
            within(getattr(self, name), 1, ROWS_LIMIT, f"{name} of ranges")


@by_name
@dataclass(frozen=True)
class FinetuneSettings:
    """QuEST's two stages; the defaults are those of its published code for Stable Diffusion.

    Attributes:
        time_epochs: stage 1, epochs over the rows of each timestep; the first timestep, those above 300, the others.
        time_rows: stage 1, rows of each timestep in an epoch.
        epochs: stage 2, epochs over all timesteps.
        rows: stage 2, rows of each timestep in an epoch.
        batch: rows in a step; the published code takes one every 4 rows.
        moments: Adam's moments of the scales: "visit", begun anew whenever a timestep is visited, as published;
            "timestep", kept for each; "shared", one of all timesteps, which goes on moving the scales of those that
            have no rows in a step.
        rate: learning rate of weights and biases.
        scale_rate: of the scales of activations, as a share of their size (published: 1e-4 absolute in stage 2,
            which is this share for scales around 0.1).
        layer_loss: also compare the outputs of the finetuned layers.
    """

    time_epochs: tuple[int, int, int] = (200, 50, 400)
    time_rows: int = 8
    epochs: int = 20
    rows: int = 64
    batch: int = 4
    moments: str = "visit"
    rate: float = 1e-5
    scale_rate: float = 1e-3
    layer_loss: bool = True

    def __post_init__(self) -> None:
        if self.moments not in MOMENTS:
            raise ConfigurationError(f"moments must be one of {', '.join(MOMENTS)}, got {self.moments!r}")
        _switches(self, "layer_loss")
        for name in ("time_epochs", "epochs"):
            within(getattr(self, name), 0, STEPS_LIMIT, name.replace("_", " "))
        for name in ("time_rows", "rows", "batch"):
            within(getattr(self, name), 1, ROWS_LIMIT, name.replace("_", " "))
        for name in ("rate", "scale_rate"):
            within(getattr(self, name), math.ulp(0), 1.0, name.replace("_", " "))


@by_name
@dataclass(frozen=True)
class QuantizeSettings:
    """How a model is quantized; the defaults follow QuEST.

    Attributes:
        weight_bits: of the weights, 2 … 8.
        activation_bits: of the inputs of layers, 2 … 16; None: weights only.
        bits_budget: average bits a weight; layers then get 2 to 8 bits each by how much they suffer, instead of
            `weight_bits`.
        size_ratio: the most that the denoiser's weights may take on disk, as a share of float32; layers get the bits
            and groups with the least error within it, instead of `weight_bits`. Everything counts: codes, grids,
            biases, layers that are not quantized, the header of the file.
        min_psnr: dB; the smallest checkpoint whose images keep this median PSNR to full precision, on prompts that
            nothing is fitted to, is searched, instead of `weight_bits`. Its images are measured with everything rounded
            to nearest and nothing learnt.
        allocation: by what `bits_budget` and `size_ratio` spread bits over layers: "sensitivity", the measured error of
            the prediction; "lim" or "zd", ranks of layers (`layer_ranks`), to compare with.
        groups: how many weights of an output channel share a grid, 16 to 256, or 0 for all of them; with a budget,
            what each layer chooses from; None: 0, or 0, 32, 64 and 128 with `size_ratio` or `min_psnr`.
        rank: of a branch in float16 beside the codes of each layer, which takes its input as it is (SVDQuant); at most
            half of what a layer can have, none in the first and the last; 0: none. 8 to 32 for inputs of 4 bits.
        rotate: mix every 32 channels of inputs by a Hadamard matrix before they are rounded, for inputs of 4 bits; not
            in the first and the last layer.
        inputs: "static", a grid for each timestep, or "dynamic", grids that are found anew at every call: for each row
            of a linear layer and each image of a convolution.
        input_group: channels of a position that share a grid, of dynamic inputs; None: 32 below 6 bits, else 0, see
            `inputs`. Layers whose channels are no multiple of it go without.
        edge_bits: of weights and inputs of the first and the last layer.
        per_channel: a grid for each input channel; None: where inputs have fewer than 6 bits.
        attention_bits: of queries, keys and values; None: not rounded. Only with `activation_bits`.
        softmax_bits: of attention probabilities; None: not rounded.
        split: skip connections that enter by concatenation get grids of their own.
        buckets: timesteps of the trajectory with grids of their own; None: 25, or 16 where inputs have a grid for each
            channel.
        search: look for the range of each weight grid with the least error; else from minimum to maximum.
        rounding: AdaRound's settings; None: to nearest.
        finetune: QuEST's finetuning; None: none.
        layers: which layers stage 2 finetunes besides the sensitive ones: a preset's name, "preset" (the one that
            fits the model), "measured" (none) or "all".
        sensitive: share of the layers, the most sensitive ones, that stage 2 finetunes as well.
        ranges: how grids of inputs are found.
        validation: prompts of the calibration set that are kept for validation, 1/8 of it if 0.
        seed: of everything random.
    """

    weight_bits: int = 8
    activation_bits: int | None = 8
    bits_budget: float | None = None
    size_ratio: float | None = None
    min_psnr: float | None = None
    allocation: str = "sensitivity"
    groups: tuple[int, ...] | None = None
    rank: int = 0
    rotate: bool = False
    inputs: str = "static"
    input_group: int | None = None
    edge_bits: int = 8
    per_channel: bool | None = None
    attention_bits: int | None = 8
    softmax_bits: int | None = None
    split: bool = True
    buckets: int | None = None
    search: bool = True
    rounding: RoundingSettings | None = field(default_factory=RoundingSettings)
    finetune: FinetuneSettings | None = field(default_factory=FinetuneSettings)
    layers: str = "preset"
    sensitive: float = 0.25
    ranges: RangeSettings | None = None
    validation: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        checked(self.weight_bits, WEIGHT_BITS, "weight_bits")
        checked(self.edge_bits, WEIGHT_BITS, "edge_bits")
        checked(self.rank, RANKS, "rank")
        self._check_grids()
        for name in ("activation_bits", "attention_bits", "softmax_bits"):
            if getattr(self, name) is not None:
                checked(getattr(self, name), ACTIVATION_BITS, name.replace("_", " "))
        within(self.validation, 0, ROWS_LIMIT, "validation")
        within(self.seed, 0, 2**63 - 1, "seed")
        for name, kind in (("rounding", RoundingSettings), ("finetune", FinetuneSettings), ("ranges", RangeSettings)):
            if not isinstance(value := getattr(self, name), kind | None):
                raise ConfigurationError(f"{name} must be {kind.__name__} or None, got {plain(value)}")
        _switches(self, "split", "search", "rotate")
        if self.per_channel is not None:
            _switches(self, "per_channel")
        self._check_wishes()
        if self.layers not in (*LAYERS, *PRESETS):
            raise ConfigurationError(f"layers must be one of {', '.join((*LAYERS, *PRESETS))}, got {self.layers!r}")
        if not _is_number(self.sensitive, 0, 1):
            raise ConfigurationError(f"sensitive must be a share between 0 and 1, got {plain(self.sensitive)}")
        if self.buckets is not None and (type(self.buckets) is not int or self.buckets < 1):
            raise ConfigurationError(f"buckets must be at least 1, got {plain(self.buckets)}")

    def _check_wishes(self) -> None:
        """Raise `ConfigurationError` unless size and fidelity that are asked for are allowed, and at most one of
        them is."""
        if self.bits_budget is not None and not _is_number(self.bits_budget, 2, 8):
            raise ConfigurationError(
                f"bits_budget must be between 2 and 8 bits a weight, got {plain(self.bits_budget)}"
            )
        if self.size_ratio is not None:
            within(self.size_ratio, SMALLEST_RATIO, 1.0, "size_ratio")
        if self.min_psnr is not None:
            within(self.min_psnr, 1.0, 100.0, "min_psnr")
        given = [n for n in ("bits_budget", "size_ratio", "min_psnr") if getattr(self, n) is not None]
        if len(given) > 1:
            raise ConfigurationError(f"{given[0]} and {given[1]} both choose the bits of each layer: give one")
        if self.min_psnr is not None and self.softmax_bits is not None:
            raise ConfigurationError(
                "min_psnr is searched without rounded attention probabilities: leave softmax_bits out, or give a "
                "size_ratio"
            )
        if self.allocation not in ALLOCATIONS:
            raise ConfigurationError(
                f"allocation must be one of {', '.join(ALLOCATIONS)}, got {plain(self.allocation)}"
            )
        if self.allocation != "sensitivity" and not given:
            raise ConfigurationError(f"allocation {self.allocation} needs a bits_budget, size_ratio or min_psnr")

    def _check_grids(self) -> None:
        """Raise `ConfigurationError` unless groups, inputs and budget go together."""
        if self.groups is not None and (not isinstance(self.groups, tuple) or not self.groups):
            raise ConfigurationError(f"groups must be a tuple of sizes, got {plain(self.groups)}")
        for size in self.groups or ():
            in_groups(size, "groups")
        if len(self.groups or ()) > 1:
            if not self.allocated:
                raise ConfigurationError(
                    "several sizes of groups need a bits_budget, size_ratio or min_psnr, by which each layer chooses"
                )
            if self.allocation != "sensitivity":
                raise ConfigurationError(f"allocation {self.allocation} ranks layers and chooses bits: give one group")
        if self.inputs not in INPUTS:
            raise ConfigurationError(f"inputs must be one of {', '.join(INPUTS)}, got {plain(self.inputs)}")
        if self.inputs == "dynamic" and (self.activation_bits is None or self.per_channel):
            raise ConfigurationError("dynamic inputs need activation_bits, and have no grids by channel (per_channel)")
        if self.input_group is not None and in_groups(self.input_group, "input_group") and self.inputs != "dynamic":
            raise ConfigurationError("input_group needs dynamic inputs")

    @property
    def allocated(self) -> bool:
        """Whether each layer gets its own bits."""
        return any(wish is not None for wish in (self.bits_budget, self.size_ratio, self.min_psnr))

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """The sizes of groups that a layer may have; the first is that of layers for which nothing is chosen."""
        if self.groups is not None:
            return self.groups
        wished = self.size_ratio is not None or self.min_psnr is not None
        return ALLOCATED_GROUPS if wished and self.allocation == "sensitivity" else (0,)

    @property
    def input_groups(self) -> int:
        """The size of the groups of dynamic inputs, as asked for or as few bits need it."""
        if self.inputs != "dynamic" or self.input_group is not None:
            return self.input_group or 0
        return INPUT_GROUP if self.activation_bits is not None and self.activation_bits < 6 else 0

    @property
    def by_channel(self) -> bool:
        """Whether inputs have a grid for each channel."""
        if self.inputs == "dynamic":
            return False
        if self.per_channel is not None:
            return self.per_channel
        return self.activation_bits is not None and self.activation_bits < 6

    @property
    def bucket_count(self) -> int:
        """The number of buckets asked for, or the one that fits the grids."""
        if self.buckets is not None:
            return self.buckets
        return BUCKETS_BY_CHANNEL if self.by_channel else BUCKETS

    @property
    def observation(self) -> RangeSettings:
        """Running statistics, except for few bits (QuEST's advice)."""
        if self.ranges is not None:
            return self.ranges
        few = self.activation_bits is not None and self.activation_bits < 6
        return RangeSettings(momentum=None if few else RangeSettings.momentum)

    @property
    def name(self) -> str:
        """Such as w4a8."""
        if self.size_ratio is not None:
            weights = f"at most {self.size_ratio:g} of float32"
        elif self.min_psnr is not None:
            weights = f"at least {self.min_psnr:g} dB"
        else:
            weights = f"w{self.weight_bits}" if self.bits_budget is None else f"w{self.bits_budget:g}"
        branch = f" rank {self.rank}" if self.rank else ""
        branch += " rotated" if self.rotate else ""
        inputs = f"a{self.activation_bits}" if self.activation_bits else ""
        return weights + (", " if inputs and " " in weights else "") + inputs + branch

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, with the number of buckets that is used."""
        return asdict(self) | {"buckets": self.bucket_count}


def _is_number(value: object, low: float, high: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def _switches(settings: object, *names: str) -> None:
    for name in names:
        if not isinstance(value := getattr(settings, name), bool):
            raise ConfigurationError(f"{name} must be true or false, got {plain(value)}")


def parse_bits(text: str) -> tuple[int, int | None]:
    """`w4a8` as (4, 8), `w4` as (4, None). Raises `ConfigurationError`."""
    match = _BITS.fullmatch(text.strip()) if isinstance(text, str) else None
    if match is None:
        raise ConfigurationError(f"bits must look like w8a8, w4a8, w4a4, w8 or w4, got {plain(text)}")
    weights, inputs = int(match[1]), None if match[2] is None else int(match[2])
    checked(weights, WEIGHT_BITS, "bits: the bits of weights")
    if inputs is not None and inputs != 16:
        checked(inputs, ACTIVATION_BITS, "bits: the bits of activations")
    return weights, None if inputs == 16 else inputs


def settings_of(
    bits: str | None = None, settings: QuantizeSettings | None = None, seed: int | None = None, **changes: Any
) -> QuantizeSettings:
    """Settings with some fields changed.

    Args:
        bits: of weights and inputs, see `parse_bits`; None: as they are.
        settings: what is changed; None: the recommended settings.
        seed: of everything random; None: as it is.
        changes: other fields of `QuantizeSettings`.

    Raises:
        ConfigurationError: a value is not allowed.
    """
    if settings is not None and not isinstance(settings, QuantizeSettings):
        raise ConfigurationError(f"settings must be QuantizeSettings, got {plain(settings)}")
    if bits is not None:
        changes["weight_bits"], changes["activation_bits"] = parse_bits(bits)
    if seed is not None:
        changes["seed"] = seed
    return replace(settings or QuantizeSettings(), **changes)
