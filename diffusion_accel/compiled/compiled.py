"""The feature: models compiled for another engine."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from diffusion_accel.arguments import nearest
from diffusion_accel.errors import ConfigurationError
from diffusion_accel.feature import Feature, option
from diffusion_accel.io import shown

from .engine import Engine
from .engines import ENGINES

PRECISIONS = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16"}
_SHORT = {"fp32": "float32", "f32": "float32", "bf16": "bfloat16", "fp16": "float16", "f16": "float16"}
PARTS = ("denoiser", "vae", "text", "controlnet")
NEW_SHAPES = ("compile", "eager")
#: engines that are none here: refused by name, and no prompts
_OTHER_ENGINES = ("tensorrt", "trt", "onnxruntime", "onnx", "ort", "tvm", "coreml", "aot_inductor", "cudagraphs", "xla")


def _one_of(what: str, value: Any, allowed: tuple[str, ...]) -> ConfigurationError:
    near = nearest(str(value)[:100], allowed)
    hint = f"; did you mean {near!r}?" if near else ""
    return ConfigurationError(f"compiled: {what}={shown(value)} is not allowed; use {', '.join(allowed)}{hint}")


def _read_engine(value: Any) -> tuple[str, Engine]:
    if value not in ENGINES:
        raise _one_of("engine", value, tuple(ENGINES))
    return value, ENGINES[value]


def _read_precision(value: Any) -> tuple[str, str]:
    name = _SHORT.get(value, value)
    if name not in PRECISIONS:
        raise _one_of("precision", value, (*PRECISIONS, "bf16", "fp16"))
    return name, name


def _read_parts(value: Any) -> tuple[str, frozenset[str]]:
    named = frozenset(part.strip() for part in str(value).split("+"))
    for part in sorted(named):
        if part not in PARTS:
            raise _one_of("parts", value, PARTS)
    return "+".join(part for part in PARTS if part in named), named


@dataclass(frozen=True, kw_only=True)
class Compiled(Feature):
    """Run the denoiser and the VAE as graphs that an engine compiled.

    A call is one graph for its signature: shapes, types, names of arguments, and values that are no tensors. It is
    compiled when it is first needed and stands in the place of the module's own forward, below everything else, so
    whatever holds or forecasts predictions, solvers and schedulers act as before. Weights and settings of the model
    that change are noticed before each call and lead to another graph. The first calls of a graph are compared with the
    module itself; a graph that does not agree is not used.

    Attributes:
        engine: "openvino" (CPU, Intel GPU and NPU; needs the extra `openvino`), "inductor" (torch.compile), or "eager":
            no engine, for comparison.
        precision: "float32", "bfloat16" or "float16" (also bf16, fp16): in what an engine may compute what the model
            has in float32.
        parts: what is compiled, joined by "+": denoiser, vae (decoder and encoder; the
            networks of transparent images, too), text (text encoders), controlnet.
        device: OpenVINO's name of a device: CPU, GPU, GPU.1, NPU; empty: CPU.
        mode: of torch.compile: default, reduce-overhead (CUDA graphs), max-autotune, max-autotune-no-cudagraphs.
        blocks: compile the denoiser's repeated blocks one by one instead of whole models, with inductor and in the
            model's own precision. What works inside of the denoiser goes with it, and a new shape costs less.
        on_new_shape: a signature after a part's first one is compiled too ("compile"), or runs uncompiled ("eager").
        cache: keep OpenVINO's graphs on disk, in the user's cache folder, for the next start.
        max_cache_mb: what the graphs there may take in MiB, 1 to 1,048,576; the oldest go first.

    Counters: `graph_calls`, `eager_calls` (of compiled parts: run by torch all the same), `graphs_compiled`,
    `graphs_loaded`, `compile_seconds`.
    """

    name: ClassVar[str] = "compiled"
    summary: ClassVar[str] = "denoiser and VAE as graphs of OpenVINO or torch.compile"
    paper: ClassVar[str] = "OpenVINO; TorchInductor (Ansel et al., PyTorch 2, ASPLOS 2024)"
    order: ClassVar[int] = 5  # below all others: what is called first lies innermost
    shorthand: ClassVar[str | None] = "engine"
    of_the_model: ClassVar[bool] = True
    runtime: ClassVar[str] = "diffusion_accel.compiled.attachment"

    engine: str = option("openvino", ", ".join(ENGINES), read=_read_engine)
    precision: str = option("float32", "float32, bfloat16 (bf16) or float16 (fp16)", read=_read_precision)
    parts: str = option("denoiser+vae", "what is compiled: " + ", ".join(PARTS), read=_read_parts)
    device: str = option("", "OpenVINO's: CPU, GPU, NPU (default: CPU)")
    mode: str = option("", "of torch.compile: " + ", ".join(filter(None, ENGINES["inductor"].modes)))
    blocks: bool = option(False, "inductor: the denoiser's repeated blocks one by one, not whole models")
    on_new_shape: str = option("compile", "compile, or eager: only the first shape of each part is compiled")
    cache: bool = option(True, "keep OpenVINO's graphs on disk for the next start")
    max_cache_mb: int = option(8192, "what they may take there in MiB", (1, 2**20))

    def __post_init__(self) -> None:
        super().__post_init__()
        engine = self.compiler
        if self.precision not in engine.precisions:
            raise _one_of(f"engine={engine.name}, precision", self.precision, engine.precisions)
        if self.mode not in engine.modes:
            raise _one_of(f"engine={engine.name}, mode", self.mode, engine.modes)
        if self.device and not (engine.takes_device and re.fullmatch(r"[A-Z]{2,8}(\.[0-9]{1,2})?", self.device)):
            known = "CPU, GPU, GPU.1 or NPU" if engine.takes_device else f"none: {engine.name} runs where the model is"
            raise ConfigurationError(f"compiled: device={shown(self.device)} is not allowed; use {known}")
        if self.blocks and (engine.compile_block is None or self.precision != "float32"):
            able = ", ".join(name for name, row in ENGINES.items() if row.compile_block is not None)
            raise ConfigurationError(
                f"compiled: blocks=true is for engine={able} in the model's own precision (precision=float32), "
                f"got engine={self.engine}, precision={self.precision}"
            )
        if self.on_new_shape not in NEW_SHAPES:
            raise _one_of("on_new_shape", self.on_new_shape, NEW_SHAPES)

    @classmethod
    def neutral(cls) -> Self:
        """The model itself in the place of a graph."""
        return cls(engine="eager")

    @classmethod
    def accepts_bare(cls, text: str) -> bool:
        """Whether `text` begins with the name of an engine, or with what can only be meant as one."""
        word = text.partition(",")[0].lower()
        return word in ENGINES or word in _OTHER_ENGINES

    @property
    def compiler(self) -> Engine:
        """The row of the table that `engine` names."""
        engine: Engine = self.object_of("engine")
        return engine

    def learns(self) -> bool:
        """That a first call compiles; one whose operations are counted does not, torch computes there."""
        return self.engine != "eager"

    def closes_inside(self) -> bool:
        """Whether whole models are graphs of an engine: hooks cannot reach into them."""
        return self.engine != "eager" and not self.blocks
