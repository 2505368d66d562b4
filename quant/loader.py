"""diffusers' way to our checkpoints: `from_pretrained` and `save_pretrained` of quantized models."""

from __future__ import annotations

import enum
import json
from typing import Any

import torch
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin

from diffusion_accel.errors import ConfigurationError, ModelLoadError

from .layers import QuantizedLayer
from .model import digest, install, set_runtime
from .register import METHOD
from .spec import ModelSpec


class Method(str, enum.Enum):  # noqa: UP042, diffusers compares it as a text and reads `.value`
    """Our name among diffusers' quantization methods."""

    LOW_BIT = METHOD


class LowBitConfig(QuantizationConfigMixin):
    """The `quantization_config` of a quantized model: a `ModelSpec` in diffusers' clothes."""

    def __init__(self, spec: ModelSpec | None = None, **values: Any) -> None:
        values.pop("quant_method", None)
        self.quant_method = Method.LOW_BIT
        self.spec = ModelSpec.from_dict(values) if spec is None else spec

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": self.quant_method.value, **self.spec.to_dict()}

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()

    def to_json_string(self, use_diff: bool = True) -> str:
        return json.dumps(self.to_dict()) + "\n"


class LowBitQuantizer(DiffusersQuantizer):
    """Loads and saves models whose layers are quantized; see docs/checkpoint-format.md."""

    requires_calibration = True
    use_keep_in_fp32_modules = True

    def check_if_quantized_param(
        self, model: Any, param_value: torch.Tensor, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        module, _, key = param_name.rpartition(".")
        return key.endswith(("_scale", "_zero_point", "_codes")) and (
            key == "softmax_scale" or isinstance(model.get_submodule(module), QuantizedLayer)
        )

    def check_quantized_param_shape(
        self, param_name: str, current: torch.Tensor, loaded: torch.Tensor, **kwargs: Any
    ) -> bool:
        if current.shape != loaded.shape:
            raise ModelLoadError(
                f"the checkpoint is damaged: {param_name} has shape {tuple(loaded.shape)} instead of "
                f"{tuple(current.shape)}"
            )
        return True

    def create_quantized_param(
        self,
        model: Any,
        param_value: torch.Tensor,
        param_name: str,
        target_device: Any,
        state_dict: dict[str, Any],
        unexpected_keys: Any = None,
        **kwargs: Any,
    ) -> None:
        """Put a tensor in as it is stored: scales stay float32 whatever type the rest of the model gets."""
        module, _, key = param_name.rpartition(".")
        expected = model.get_submodule(module)._buffers[key]
        stored = state_dict[param_name]
        if stored.dtype != expected.dtype:
            raise ModelLoadError(
                f"the checkpoint is damaged: {param_name} is {stored.dtype} instead of {expected.dtype}"
            )
        model.get_submodule(module)._buffers[key] = stored.to(target_device)  # on a CPU, the mapped file itself

    def update_missing_keys(self, model: Any, missing_keys: list[str], prefix: str) -> list[str]:
        if missing_keys:
            more = f" and {len(missing_keys) - 1} more" if len(missing_keys) > 1 else ""
            raise ModelLoadError(f"the checkpoint is damaged: it has no {sorted(missing_keys)[0]}{more}")
        return missing_keys

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        install(model, self.quantization_config.spec)
        model.config["quantization_config"] = self.quantization_config.to_dict()

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        expected = self.quantization_config.spec.digest
        if expected is not None and digest(model) != expected:
            raise ModelLoadError("the checkpoint is damaged: its weights are not the ones it was saved with")
        set_runtime(model)

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    def _dequantize(self, model: Any) -> Any:
        raise ConfigurationError("a quantized checkpoint is not turned back; load the model it was made from")
