"""Loading pipelines, ControlNets and LoRAs, with one clear line where something does not fit."""

from __future__ import annotations

import inspect
import types
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, ModelMixin

from diffusion_accel.conditioning import keep_class_names
from diffusion_accel.denoisers import DENOISERS
from diffusion_accel.diffusers_compat import set_origin
from diffusion_accel.errors import AccelerationError, ConfigurationError, ModelLoadError
from diffusion_accel.io import at_home, is_there, read_json, shown
from diffusion_accel.model_files.folders import check_component, check_config, check_folder
from diffusion_accel.model_files.headers import lora_file
from diffusion_accel.model_files.hub import hub_reason
from diffusion_accel.model_files.index_notes import INDEX, KEY, RECIPE, notes_of
from diffusion_accel.model_files.names import HUB_ID, ModelSource, find_model, pipeline_name, safetensors_header
from diffusion_accel.quant.model import set_runtime

from .components import bounded, check_components, check_keys
from .controlnets import check_before, check_own
from .keywords import check_options
from .loaded import check_loaded, check_lora, check_tokenizers, reason_of
from .quantizers import check_quantize, foreign_config, load_quantized

TASKS = ("text-to-image", "image-to-image", "inpainting")
_CONTROLNET_TENSORS = 5000  # more than any ControlNet has; SDXL's has 800


def load_pipeline(
    model: str | ModelSource,
    *,
    task: str | None = None,
    controlnet: str | Path | ModelMixin | Sequence[str | Path] | Sequence[ModelMixin] | None = None,
    dtype: torch.dtype = torch.float32,
    allow_pickle: bool = False,
    pipeline_class: type[DiffusionPipeline] | None = None,
    quantize: str | None = None,
    runtime: str | None = None,
    low_memory: bool = False,
    **options: Any,
) -> Any:
    """Load a pipeline: an embedded name, a folder, a single `.safetensors` file, or a hub id.

    Args:
        model: what to load; see `find_model`.
        task: one of `TASKS`, to convert the pipeline to that task; None keeps the model's own.
        controlnet: folder or hub id of a ControlNet to run beside the U-Net, or a list of several; or loaded ones,
            which are a component like `vae=` or `scheduler=` of a pipeline class that has it.
        dtype: of the weights in memory.
        allow_pickle: also load weights that are pickles.
        pipeline_class: the diffusers class to load as; by default the model's own.
        quantize: a checkpoint of `diffusion-accel quantize` to take the denoiser from, or a quantizer that diffusers
            drives, such as `torchao:int8wo`.
        runtime: how a quantized denoiser computes; see `quant.model.set_runtime`.
        low_memory: keep its weights packed in memory.
        options: passed on to diffusers' `from_pretrained` or `from_single_file`; others are refused.

    Returns:
        The pipeline, on the CPU, without features; `accelerate` switches them on.

    Raises:
        ConfigurationError, ModelLoadError: with one line that says what was wrong.
    """
    dtype = options.pop("torch_dtype", None) or dtype
    _check_values(task=task, controlnet=controlnet, dtype=dtype, pipeline_class=pipeline_class, quantize=quantize)
    for name, value in (("allow_pickle", allow_pickle), ("low_memory", low_memory)):
        if not isinstance(value, bool):
            raise ConfigurationError(f"{name} must be True or False, got {shown(value)}")
    source = model if isinstance(model, ModelSource) else find_model(model, allow_pickle)
    kind = check_quantize(quantize) if quantize else None
    names = _names(controlnet)
    if controlnet is not None and not names:
        options["controlnet"] = _together(controlnet)
    _load(source.location, lambda: check_options(source, pipeline_class, options))
    nets = [load_controlnet(name, dtype, allow_pickle) for name in names]
    named = dict(zip(names, nets, strict=True))
    _load(source.location, lambda: check_before(source, pipeline_class or class_of(source), named))
    net = nets if len(nets) > 1 else nets[0] if nets else None
    options = {"dtype": dtype, **options}
    if quantize and kind != "checkpoint":
        if source.kind == "file":
            raise ConfigurationError(f"quantize {quantize} needs a pipeline folder or a hub id, not a single file")
        parts = _load(source.location, lambda: _denoiser_parts(source))
        options["quantization_config"] = foreign_config(quantize, parts)
    pipe = _load(source.location, lambda: _plain(source, pipeline_class, allow_pickle, options))
    if quantize and kind == "checkpoint":
        _load(quantize, lambda: load_quantized(pipe, quantize, dtype))
    if runtime is not None or low_memory:
        set_runtime(pipe, runtime or "auto", low_memory)
    if net is not None or (task is not None and task != "text-to-image"):
        pipe = as_task(pipe, task or "text-to-image", net)
    check_own(pipe, ", ".join(names) or source.location)
    keep_class_names(pipe)
    return pipe


def class_of(source: ModelSource, *, ask_hub: bool = False) -> type[DiffusionPipeline] | None:
    """The class of a pipeline before it is loaded; None where its files do not tell, or only code of their own does.

    Args:
        source: the model.
        ask_hub: of a hub id, read the index, which is downloaded if it is not here; otherwise the answer is None.

    Raises:
        ModelLoadError: the hub does not give the index.
    """
    if source.kind == "file":
        return _class_of_file(source)
    if source.kind == "hub":
        name = _load(source.location, lambda: _hub_index(source)).get("_class_name") if ask_hub else None
    else:
        name = pipeline_name(source)
    try:
        found = getattr(diffusers, name, None) if isinstance(name, str) else None
    except (ImportError, RuntimeError):  # a package that the class needs is missing, or broken; loading says which
        return None
    return found if isinstance(found, type) and issubclass(found, DiffusionPipeline) else None


def _names(controlnet: object) -> list[str]:
    """The folders and hub ids of ControlNets to load; of loaded ones none."""
    named = controlnet if isinstance(controlnet, (list, tuple)) else [controlnet]
    return [str(one) for one in named if isinstance(one, (str, Path)) and str(one)]


def _together(controlnet: Any) -> Any:
    """Loaded ControlNets as one component: diffusers takes a list of them only for a folder that has none."""
    several = controlnet if isinstance(controlnet, (list, tuple)) else [None]
    if any(type(one).__name__ != "ControlNetModel" for one in several):
        return controlnet
    from diffusers import MultiControlNetModel  # with models that nothing else needs

    return MultiControlNetModel(list(controlnet)) if len(controlnet) > 1 else controlnet[0]


def _check_values(task: object, controlnet: object, dtype: object, pipeline_class: object, quantize: object) -> None:
    """Raise `ConfigurationError` for a value that no pipeline could be loaded with: what is allowed, what was given."""
    if task is not None and task not in TASKS:
        raise ConfigurationError(f"unknown task {task!r}; allowed: {', '.join(TASKS)}")
    if not isinstance(controlnet, (str, Path, torch.nn.Module, list, tuple, types.NoneType)):
        raise ConfigurationError(f"controlnet must be a folder, a hub id or loaded ones, got {shown(controlnet)}")
    if isinstance(controlnet, (list, tuple)):
        named, loaded = (sum(isinstance(one, kind) for one in controlnet) for kind in ((str, Path), torch.nn.Module))
        if not controlnet or len(controlnet) not in (named, loaded) or "" in controlnet:
            raise ConfigurationError(
                f"controlnet must be a list of folders and hub ids, or of loaded ones, got {shown(controlnet)}"
            )
    kinds = list(dtype.values()) if isinstance(dtype, dict) else [dtype]  # diffusers takes one for each component
    if not all(isinstance(one, torch.dtype) and one.is_floating_point for one in kinds):
        raise ConfigurationError(f"dtype must be a floating-point type such as torch.float16, got {shown(dtype)}")
    is_class = isinstance(pipeline_class, type) and issubclass(pipeline_class, DiffusionPipeline)
    if pipeline_class is not None and not is_class:
        raise ConfigurationError(f"pipeline_class must be a pipeline class of diffusers, got {shown(pipeline_class)}")
    if not isinstance(quantize, (str, types.NoneType)):
        raise ConfigurationError(f"quantize must be a folder or package:kind, as a text, got {shown(quantize)}")


def _plain(
    source: ModelSource, pipeline_class: type[DiffusionPipeline] | None, allow_pickle: bool, options: dict[str, Any]
) -> Any:
    """The pipeline as diffusers loads it, its weights and tokenizers checked."""
    if source.kind == "file":
        pipe = _single_file(source, pipeline_class, options)
    else:
        if not allow_pickle:
            options.setdefault("use_safetensors", True)
        pipe = _folder(source, pipeline_class or DiffusionPipeline, allow_pickle, options)
    if source.kind != "embedded":
        check_loaded(getattr(pipe, "components", {}), source.location)
        check_tokenizers(getattr(pipe, "components", {}), source.location)
    return pipe


def _folder(source: ModelSource, cls: type[DiffusionPipeline], allow_pickle: bool, options: dict[str, Any]) -> Any:
    """A pipeline from a folder, or from the hub's: first everything is downloaded and checked, then loaded."""
    if source.kind == "embedded":
        pipe = cls.from_pretrained(source.location, **{"local_files_only": True, **options})
        return _noted(pipe, source.location)
    folder = source.location
    if source.kind == "hub":
        folder = str(DiffusionPipeline.download(source.location, **options))
        check_folder(Path(folder), allow_pickle, bool(options.get("trust_remote_code")))
    variant = options.get("variant")
    check_components(Path(folder), variant if isinstance(variant, str) else None, options, allow_pickle)
    pipe = cls.from_pretrained(folder, **{"local_files_only": source.kind != "hub", **options})
    set_origin(pipe, source.location)
    return _noted(pipe, folder)


def _noted(pipe: Any, folder: str) -> Any:
    """The pipeline with the recommended settings of its folder in its configuration, so that they are saved with it."""
    notes = {key: value for key, value in notes_of(folder).items() if key != RECIPE}
    if notes:
        pipe.register_to_config(**{KEY: notes})
    return pipe


def _single_file(source: ModelSource, cls: type[DiffusionPipeline] | None, options: dict[str, Any]) -> Any:
    cls = _class_of_file(source) if cls is None else cls
    with bounded(len(_header(source)) or 5000, source.location):
        return cls.from_single_file(source.location, **options)


def _class_of_file(source: ModelSource) -> type[DiffusionPipeline]:
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline  # of models of authors only

    is_xl = any(key.startswith("conditioner.") for key in _header(source))
    return StableDiffusionXLPipeline if is_xl else StableDiffusionPipeline


def _header(source: ModelSource) -> dict[str, Any]:
    """What a single file has of tensors; nothing of a pickle, which only loading reads."""
    return safetensors_header(Path(source.location)) if source.location.endswith(".safetensors") else {}


def _hub_index(source: ModelSource) -> dict[str, Any]:
    """The model_index.json of a hub id, downloaded if it is not here."""
    from huggingface_hub import hf_hub_download  # of models of the hub only

    values = read_json(Path(hf_hub_download(source.location, INDEX)), error=ModelLoadError, nonfinite=True)
    return values if isinstance(values, dict) else {}


def _denoiser_parts(source: ModelSource) -> list[str]:
    """The components that denoise: those of a local pipeline folder, or of a hub id's index."""
    if source.kind == "hub":
        index = _hub_index(source)
        there = [name for name in DENOISERS if any(index.get(name) or ())]
    else:
        there = [name for name in DENOISERS if (Path(source.location) / name).is_dir()]
    return ["unet"] if "unet" in there or not there else there


def as_task(
    pipe: DiffusionPipeline,
    task: str,
    net: ModelMixin | Sequence[ModelMixin] | None = None,
    *,
    without_controlnet: bool = False,
) -> Any:
    """A pipeline for a task with the parts of another one.

    Args:
        pipe: with what the task needs, too.
        task: one of `TASKS`.
        net: a ControlNet, or several, that it is to have as well.
        without_controlnet: leave out that which `pipe` has.

    Raises:
        ModelLoadError: diffusers has no such pipeline for this model.
    """
    channels = getattr(getattr(getattr(pipe, "unet", None), "config", None), "in_channels", 4)
    if task == "inpainting" and channels not in (4, 9):
        raise ModelLoadError(
            f"this model cannot do inpainting: diffusers inpaints with 4 latent channels (or a 9-channel inpainting "
            f"U-Net), and its U-Net takes {channels}"
        )
    latents = getattr(getattr(getattr(pipe, "vae", None), "config", None), "latent_channels", None)
    if task != "inpainting" and latents is not None and channels == 2 * latents + 1:
        raise ModelLoadError(
            "this model only inpaints: its U-Net takes an image and a mask beside the latents; give both"
        )
    from diffusers import (  # 300 modules of other pipelines, for other tasks only
        AutoPipelineForImage2Image,
        AutoPipelineForInpainting,
        AutoPipelineForText2Image,
    )

    auto: Any = {
        "text-to-image": AutoPipelineForText2Image,
        "image-to-image": AutoPipelineForImage2Image,
        "inpainting": AutoPipelineForInpainting,
    }
    more = {} if net is None and not without_controlnet else {"controlnet": net}
    try:
        return auto[task].from_pipe(pipe, **more)
    except ValueError as error:
        if task == "image-to-image" and net is None and "image" in inspect.signature(type(pipe).__call__).parameters:
            return pipe  # it starts from an image by itself
        what = task if net is None else f"{task} with a ControlNet"
        raise ModelLoadError(f"{type(pipe).__name__} cannot do {what}") from error


def load_controlnet(name: str, dtype: torch.dtype, allow_pickle: bool = False) -> Any:
    """Load a `ControlNetModel` from a folder or a hub id."""
    from diffusers import ControlNetModel  # with models that nothing else needs

    path = at_home(name)
    if is_there(path, "dir"):
        check_component(path, allow_pickle)
        check_keys(path, ControlNetModel, allow_pickle=allow_pickle)
    elif path.suffix or name.startswith((".", "/", "~")):
        raise ModelLoadError(f"no such ControlNet folder: {name}")
    elif not HUB_ID.fullmatch(name):
        raise ConfigurationError(f"unknown ControlNet {name!r}; a folder or a hub id (owner/name) works")
    options: dict[str, Any] = {} if allow_pickle else {"use_safetensors": True}

    def load() -> Any:
        if not path.is_dir():
            check_config(ControlNetModel.load_config(name), name)
        with bounded(_CONTROLNET_TENSORS, name):
            return ControlNetModel.from_pretrained(str(path) if path.is_dir() else name, dtype=dtype, **options)

    net = _load(name, load)
    check_loaded({"ControlNet": net}, name)
    return net


def load_lora(pipe: DiffusionPipeline, file: str, name: str) -> None:
    """Load one LoRA beside those already loaded; call `pipe.set_adapters` with all names and scales afterwards.

    Args:
        pipe: the pipeline.
        file: safetensors, or a folder with it.
        name: of the adapter.

    Raises:
        ModelLoadError: the file is broken, a pickle, or does not fit the model.
    """
    weights = lora_file(file)
    check_lora(weights)
    loader = getattr(pipe, "load_lora_weights", None)
    if loader is None:
        raise ModelLoadError(f"{type(pipe).__name__} takes no LoRA")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loader(str(weights), adapter_name=name, use_safetensors=True)
    except ImportError as error:
        raise ModelLoadError("loading a LoRA needs peft: pip install 'diffusion-accel[lora]'") from error
    except Exception as error:  # peft and diffusers raise many kinds for weights that do not fit
        raise ModelLoadError(f"the LoRA {file} does not fit this model: {reason_of(error)}") from error
    if not any(name in adapters for adapters in pipe.get_list_adapters().values()):
        raise ModelLoadError(f"the LoRA {file} does not fit this model: none of its layers has a counterpart there")


def _load(name: str, loader: Callable[[], Any]) -> Any:
    try:
        return loader()
    except (KeyboardInterrupt, AccelerationError):
        raise
    except Exception as error:  # diffusers, transformers and the hub raise many kinds
        raise ModelLoadError(f"{name} cannot be loaded: {hub_reason(name, error) or reason_of(error)}") from error
