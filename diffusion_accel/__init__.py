"""diffusion-accel: make any diffusers pipeline faster, smaller and transparent, and see what that costs.

    from diffusion_accel import EncoderReuse, accelerate, compare

    accelerate(pipe, EncoderReuse())
    image = pipe("red apple, 3d style").images[0]
    print(pipe.acceleration.report())
    print(compare(pipe, ["red apple, 3d style"]).fidelity.psnr_median)

Importing this package imports neither torch nor diffusers; names are loaded when they are first used. diffusers then
loads quantized checkpoints (docs/quantization.md) with its own `from_pretrained`.
"""

from __future__ import annotations

import importlib

from . import schedulers as _schedulers  # noqa: F401, diffusers finds it when a folder names one
from ._version import __version__
from .errors import (
    AccelerationError,
    CallStateError,
    ConfigurationError,
    FeatureConflictError,
    ModelLoadError,
    OutputError,
    UnsupportedPipelineError,
)
from .quant.register import register as _register_checkpoints

TYPE_CHECKING = False  # without importing `typing`: an interrupt is heard only after this file
if TYPE_CHECKING:
    from typing import Any

    from .bench.benchmark import benchmark
    from .bench.entries import Entry
    from .bench.result import Benchmark
    from .compiled import Compiled
    from .controlnet import ControlNetParallel
    from .evaluation.evaluate import Evaluation, evaluate
    from .feature import Attachment, Feature
    from .making.make_fast import make_fast
    from .making.report import FastReport
    from .measure.comparison import Comparison, compare
    from .measure.fidelity import Fidelity, fidelity
    from .parallel import PatchParallel
    from .parallel.planner.estimate import Estimate, estimate
    from .pipelines import AcceleratedPipeline
    from .pipelines.loading import load_pipeline
    from .progress import Progress
    from .quant import QuantizeSettings
    from .quant.ptq.export import quantize
    from .quant.ptq.report import QuantizationReport
    from .quant.without_data import quantize_files
    from .report import Report
    from .reuse import DiffusersCache, EncoderReuse, Plan, PlanFamily, Preset, Reuse, Step, TunedPlan
    from .routing import TaskRouting
    from .schedulers.learned import LearnedMultistepScheduler
    from .switchboard import Acceleration, accelerate
    from .transparency import LatentTransparency
    from .tuning.solver import tune_solver
    from .tuning.tuner import tune

_register_checkpoints()  # from now on diffusers loads quantized checkpoints

#: public name -> the module that has it, imported when the name is first used
_LAZY = {
    # a verb for each command
    "accelerate": ".switchboard",
    "benchmark": ".bench.benchmark",
    "compare": ".measure.comparison",
    "estimate": ".parallel.planner.estimate",
    "evaluate": ".evaluation.evaluate",
    "fidelity": ".measure.fidelity",
    "load_pipeline": ".pipelines.loading",
    "make_fast": ".making.make_fast",
    "quantize": ".quant.ptq.export",
    "quantize_files": ".quant.without_data",
    "tune": ".tuning.tuner",
    "tune_solver": ".tuning.solver",
    # features, and what they are given
    "Compiled": ".compiled",
    "ControlNetParallel": ".controlnet",
    "DiffusersCache": ".reuse",
    "EncoderReuse": ".reuse",
    "LatentTransparency": ".transparency",
    "PatchParallel": ".parallel",
    "Plan": ".reuse",
    "PlanFamily": ".reuse",
    "Preset": ".reuse",
    "Reuse": ".reuse",
    "Step": ".reuse",
    "TaskRouting": ".routing",
    "TunedPlan": ".reuse",
    # pipelines, and what is switched on them or put into them
    "Acceleration": ".switchboard",
    "AcceleratedPipeline": ".pipelines",
    "Attachment": ".feature",
    "Feature": ".feature",
    "LearnedMultistepScheduler": ".schedulers",
    # settings and results
    "Benchmark": ".bench.result",
    "Comparison": ".measure.comparison",
    "Entry": ".bench.entries",
    "Estimate": ".parallel.planner.estimate",
    "Evaluation": ".evaluation.evaluate",
    "FastReport": ".making.report",
    "Fidelity": ".measure.fidelity",
    "Progress": ".progress",
    "QuantizationReport": ".quant.ptq.report",
    "QuantizeSettings": ".quant",
    "Report": ".report",
}

__all__ = [
    "AcceleratedPipeline",
    "Acceleration",
    "AccelerationError",
    "Attachment",
    "Benchmark",
    "CallStateError",
    "Comparison",
    "Compiled",
    "ConfigurationError",
    "ControlNetParallel",
    "DiffusersCache",
    "EncoderReuse",
    "Entry",
    "Estimate",
    "Evaluation",
    "FastReport",
    "Feature",
    "FeatureConflictError",
    "Fidelity",
    "LatentTransparency",
    "LearnedMultistepScheduler",
    "ModelLoadError",
    "OutputError",
    "PatchParallel",
    "Plan",
    "PlanFamily",
    "Preset",
    "Progress",
    "QuantizationReport",
    "QuantizeSettings",
    "Report",
    "Reuse",
    "Step",
    "TaskRouting",
    "TunedPlan",
    "UnsupportedPipelineError",
    "__version__",
    "accelerate",
    "benchmark",
    "compare",
    "estimate",
    "evaluate",
    "fidelity",
    "load_pipeline",
    "make_fast",
    "quantize",
    "quantize_files",
    "tune",
    "tune_solver",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
