"""diffusers' way to our checkpoints: `from_pretrained` and `save_pretrained` of quantized models."""

from __future__ import annotations

import copy
import enum
import json
import logging
import weakref
from pathlib import Path
from typing import Any

import torch
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin

from diffusion_accel.diffusers_compat import set_config_entry
from diffusion_accel.errors import ConfigurationError, ModelLoadError
from diffusion_accel.model_files.quantized import METHOD

from .layers import QuantizedLayer
from .model import digest, digest_of_version_1, install, set_runtime
from .spec import ModelSpec
from .stored import Tensor, find_tensors, verify

logger = logging.getLogger(__name__)


class Method(str, enum.Enum):  # noqa: UP042, diffusers compares it as a text and reads `.value`
    """Our name among diffusers' quantization methods."""

    LOW_BIT = METHOD


class LowBitConfig(QuantizationConfigMixin):
    """The `quantization_config` of a quantized model: a `ModelSpec` in diffusers' clothes.

    One that belongs to a model is written with the digest of what the model is at that moment.
    """

    def __init__(self, spec: ModelSpec, model: Any = None) -> None:
        self.quant_method = Method.LOW_BIT
        self.spec = spec
        self._model = None if model is None else weakref.ref(model)

    @classmethod
    def from_dict(cls, config_dict: Any, return_unused_kwargs: bool = False, **kwargs: object) -> Any:
        """What diffusers makes of the entry of a `config.json`. Raises `ModelLoadError` if it makes no sense."""
        made = cls(ModelSpec.from_dict(config_dict))
        return (made, kwargs) if return_unused_kwargs else made

    def of(self, model: Any) -> LowBitConfig:
        """The same for `model`."""
        return LowBitConfig(self.spec, model)

    def to_dict(self) -> dict[str, Any]:
        """As it is written; of a model, with the digest of what that is now. Adapters: `ConfigurationError`."""
        values = self.spec.to_dict()
        model = self._model() if self._model is not None else None
        if model is not None:
            if any(hasattr(part, "base_layer") for part in model.modules()):
                raise ConfigurationError(
                    f"the {type(model).__name__} has adapters (LoRA), no part of a quantized checkpoint: save "
                    "them with save_lora_weights, and unload_lora_weights() before the model is saved"
                )
            values.pop("digest", None)
            values["digest"] = digest(model, values)
        return {"quant_method": self.quant_method.value, **values}

    def to_diff_dict(self) -> dict[str, Any]:
        """The same: what is default is left out of it anyway."""
        return self.to_dict()

    def to_json_string(self, use_diff: bool = True) -> str:
        """The same as JSON."""
        return json.dumps(self.to_dict()) + "\n"

    def __repr__(self) -> str:
        return f"LowBitConfig({len(self.spec.layers)} layers, {len(self.spec.timesteps)} timesteps)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LowBitConfig) and other.spec == self.spec

    __hash__ = None  # type: ignore[assignment]

    def __deepcopy__(self, memo: dict[int, Any]) -> LowBitConfig:
        model = self._model() if self._model is not None else None
        return LowBitConfig(copy.deepcopy(self.spec, memo), memo.get(id(model)))

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_model": None}


class LowBitQuantizer(DiffusersQuantizer):
    """Loads and saves models whose layers are quantized; see docs/checkpoint-format.md."""

    requires_calibration = True
    use_keep_in_fp32_modules = True
    quantization_config: LowBitConfig
    _files: tuple[Path, ...] = ()

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: Any) -> list[str]:
        """Remember the files, which are checked at the end."""
        self._files = tuple(Path(file) for file in checkpoint_files)
        return loaded_keys

    def check_if_quantized_param(
        self, model: Any, param_value: torch.Tensor, param_name: str, state_dict: dict[str, Any], **kwargs: object
    ) -> bool:
        """Whether a tensor is part of a quantized layer, by its name."""
        module, _, key = param_name.rpartition(".")
        return key.endswith(("_scale", "_zero_point", "_codes", "_left", "_right")) and (
            key == "softmax_scale" or isinstance(model.get_submodule(module), QuantizedLayer)
        )

    def check_quantized_param_shape(
        self, param_name: str, current: torch.Tensor, loaded: torch.Tensor, **kwargs: object
    ) -> bool:
        """True. Raises `ModelLoadError` if a tensor has not the shape that the layer needs."""
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
        **kwargs: object,
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
        """Raises `ModelLoadError`: a checkpoint is whole, or damaged."""
        if missing_keys:
            more = f" and {len(missing_keys) - 1} more" if len(missing_keys) > 1 else ""
            raise ModelLoadError(f"the checkpoint is damaged: it has no {sorted(missing_keys)[0]}{more}")
        return missing_keys

    def _process_model_before_weight_loading(self, model: Any, **kwargs: object) -> None:
        install(model, self.quantization_config.spec)
        set_config_entry(model.config, "quantization_config", self.quantization_config)
        _check_shapes(model, find_tensors(self._files))

    def _process_model_after_weight_loading(self, model: Any, **kwargs: object) -> None:
        spec = self.quantization_config.spec
        if self._files:
            verify(self._files[0].parent, self._files, logger.warning)
        if spec.version == 1 and spec.digest is not None and digest_of_version_1(model) != spec.digest:
            raise ModelLoadError("the checkpoint is damaged: its weights are not the ones it was saved with")
        self.quantization_config = self.quantization_config.of(model)
        set_config_entry(model.config, "quantization_config", self.quantization_config)
        set_runtime(model)

    @property
    def is_serializable(self) -> bool:
        """Always."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Never; a LoRA beside it is."""
        return False

    def _dequantize(self, model: Any) -> Any:
        raise ConfigurationError("a quantized checkpoint is not turned back; load the model it was made from")


def _check_shapes(model: Any, stored: dict[str, Tensor]) -> None:
    """What is stored must fit the model, before anything is allocated for it."""
    for name, tensor in model.state_dict().items():
        found = stored.get(name)
        if found is not None and found.shape != tuple(tensor.shape):
            raise ModelLoadError(
                f"the checkpoint is damaged: {name} has shape {found.shape} instead of {tuple(tensor.shape)}"
            )
