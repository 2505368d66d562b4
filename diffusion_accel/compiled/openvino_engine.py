"""OpenVINO: traced by torch, converted by OpenVINO's own reader of traces, compiled for a CPU, Intel GPU or NPU.

The reader is used without `openvino.convert_model`, which takes four times as long and reports usage over the network.
"""

from __future__ import annotations

import functools
import warnings
from importlib import metadata
from typing import TYPE_CHECKING, Any

from .engine import Engine, Graph, Target

if TYPE_CHECKING:
    import torch
    from torch import nn

    from .calls import Flat

_HINTS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
_CAPABILITIES = {"float32": "FP32", "bfloat16": "BF16", "float16": "FP16"}


class _Compiled:
    """A compiled model with its one request for inference; what it returns is copied out of the request's memory."""

    def __init__(self, model: Any, storable: bool = True) -> None:
        self.model, self.storable = model, storable
        self.request = model.create_infer_request()

    def __call__(self, _module: nn.Module, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        import torch  # heavy: torch

        from .calls import widened  # heavy: torch

        arrays = [widened(tensor).detach().contiguous().numpy() for tensor in tensors]
        found = self.request.infer(arrays, share_inputs=True)
        return [torch.from_numpy(found[i]) for i in range(len(self.model.outputs))]


@functools.cache
def _core() -> Any:
    import openvino  # optional package

    return openvino.Core()


def _settings(target: Target) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": _HINTS[target.precision],
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
    }
    if _device(target).startswith("CPU"):
        settings["INFERENCE_NUM_THREADS"] = target.threads
    return settings


def _device(target: Target) -> str:
    return target.device or "CPU"


def _compile(flat: Flat, tensors: list[torch.Tensor], target: Target) -> Graph:
    import torch  # heavy: torch
    from openvino.frontend import FrontEndManager  # optional package
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder  # optional package
    from openvino.passes import ConstantFolding, Manager  # optional package

    from .calls import widened  # heavy: torch

    example = tuple(map(widened, tensors))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # every shape that becomes a constant is one
        traced = torch.jit.trace(flat, example, strict=False, check_trace=False)
        reader = FrontEndManager().load_by_framework("pytorch")
        graph = TorchScriptPythonDecoder(traced, example_input=example)  # the reader does not keep it alive
        model = reader.convert(reader.load(graph))
        folding = Manager()
        folding.register_pass(ConstantFolding())
        folding.run_passes(model)  # grids become constants, without which no 8-bit products are made
    if len(model.inputs) != len(example):
        raise ValueError(f"the traced graph takes {len(model.inputs)} of {len(example)} tensors")
    model.reshape({i: list(tensor.shape) for i, tensor in enumerate(example)})
    settings, plain = _settings(target), not _crashes(flat.module)
    if not plain:
        settings["SNIPPETS_MODE"] = "DISABLE"
    try:
        return _Compiled(_core().compile_model(model, _device(target), settings), plain)
    except RuntimeError as error:
        raise ValueError(_reason(error)) from error


def _reason(error: RuntimeError) -> str:
    """What an error of OpenVINO says behind the places in its sources through which it came."""
    lines = [line.strip() for line in str(error).splitlines()]
    told = [line for line in lines if line and not line.startswith(("Exception from", "Check '"))]
    return (told or lines)[0]


def _crashes(module: nn.Module) -> bool:
    """Whether OpenVINO 2026.4 ends the process when it makes code for chains of small operations: it does where the
    time embedding scales and shifts a normalised feature map (DeepFloyd IF, ADM)."""
    return any(getattr(part, "time_embedding_norm", "") == "scale_shift" for part in module.modules())


def _store(graph: Graph) -> bytes:
    assert isinstance(graph, _Compiled)
    if not graph.storable:
        return b""
    data = graph.model.export_model()
    return bytes(data if isinstance(data, bytes) else data.getbuffer())


def _restore(data: bytes, target: Target) -> Graph:
    return _Compiled(_core().import_model(data, _device(target), _settings(target)))


def _refusal(target: Target) -> str | None:
    found, device = _available(), _device(target)
    if not any(name == device or name.split(".")[0] == device for name in found):
        return f"openvino has no device {device} here; it has {', '.join(found) or 'none'}"
    if target.precision not in (able := _able(device)):
        return f"{device} does not compute in {target.precision} here; it can {', '.join(able)}"
    return None


@functools.cache  # asking takes 4 ms, and a call of a pipeline asks
def _available() -> list[str]:
    found: list[str] = _core().available_devices
    return found


@functools.cache
def _able(device: str) -> list[str]:
    """The precisions in which a device computes."""
    able = _core().get_property(device, "OPTIMIZATION_CAPABILITIES")
    return [name for name, capability in _CAPABILITIES.items() if capability in able]


def _devices() -> list[str]:
    return [f"{name} ({', '.join(_able(name))})" for name in _available()]


def _identity(target: Target) -> dict[str, str]:
    return {
        "openvino": metadata.version("openvino"),
        "device": _core().get_property(_device(target), "FULL_DEVICE_NAME"),
    }


OPENVINO = Engine(
    "openvino",
    _compile,
    package="openvino",
    extra="openvino",
    machines=("cpu",),
    precisions=("float32", "bfloat16", "float16"),
    takes_device=True,
    keeps_weights=True,
    fuses_grids=True,
    follows_model=True,
    refusal=_refusal,
    devices=_devices,
    identity=_identity,
    store=_store,
    restore=_restore,
)
