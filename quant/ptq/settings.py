"""What `quantize` is asked for."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from typing import Any

from diffusion_accel.errors import ConfigurationError
from diffusion_accel.quant.spec import ACTIVATION_BITS, ROWS_LIMIT, WEIGHT_BITS, checked, within

from .finetune import PRESETS, FinetuneSettings
from .ranges import RangeSettings
from .reconstruct import RoundingSettings

_BITS = re.compile(r"w(\d+)(?:a(\d+))?", re.IGNORECASE)
LAYERS = ("preset", "measured", "all")
BUCKETS = 25  # of timesteps, where an input has one grid or two
BUCKETS_BY_CHANNEL = 16  # where each channel of an input has one, so that grids stay small beside 4-bit weights


@dataclass(frozen=True)
class QuantizeSettings:
    """How a model is quantized; the defaults follow QuEST.

    Attributes:
        weight_bits: of the weights, 2 … 8.
        activation_bits: of the inputs of layers, 2 … 16; None: weights only.
        bits_budget: average bits a weight; layers then get 2 to 8 bits each by how much they suffer, instead of
            `weight_bits`.
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
        checked(self.weight_bits, WEIGHT_BITS, "weight bits")
        checked(self.edge_bits, WEIGHT_BITS, "edge bits")
        for name in ("activation_bits", "attention_bits", "softmax_bits"):
            if getattr(self, name) is not None:
                checked(getattr(self, name), ACTIVATION_BITS, name.replace("_", " "))
        within(self.validation, 0, ROWS_LIMIT, "validation")
        within(self.seed, 0, 2**63 - 1, "seed")
        if self.bits_budget is not None and not 2 <= self.bits_budget <= 8:
            raise ConfigurationError(f"--bits-budget must be between 2 and 8 bits a weight, got {self.bits_budget:g}")
        if self.layers not in (*LAYERS, *PRESETS):
            raise ConfigurationError(f"layers must be one of {', '.join((*LAYERS, *PRESETS))}, got {self.layers!r}")
        if not 0 <= self.sensitive <= 1:
            raise ConfigurationError(f"sensitive must be a share between 0 and 1, got {self.sensitive:g}")
        if self.buckets is not None and self.buckets < 1:
            raise ConfigurationError(f"buckets must be at least 1, got {self.buckets}")

    @property
    def by_channel(self) -> bool:
        """Whether inputs have a grid for each channel."""
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
        weights = f"w{self.weight_bits}" if self.bits_budget is None else f"w{self.bits_budget:g}"
        return f"{weights}a{self.activation_bits}" if self.activation_bits else weights

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, with the number of buckets that is used."""
        return asdict(self) | {"buckets": self.bucket_count}


def parse_bits(text: str) -> tuple[int, int | None]:
    """`w4a8` as (4, 8), `w4` as (4, None). Raises `ConfigurationError`."""
    match = _BITS.fullmatch(text.strip())
    if match is None:
        raise ConfigurationError(f"--bits must look like w8a8, w4a8, w4a4, w8 or w4, got {text!r}")
    weights, inputs = int(match[1]), None if match[2] is None else int(match[2])
    checked(weights, WEIGHT_BITS, "--bits: the bits of weights")
    if inputs is not None and inputs != 16:
        checked(inputs, ACTIVATION_BITS, "--bits: the bits of activations")
    return weights, None if inputs == 16 else inputs
