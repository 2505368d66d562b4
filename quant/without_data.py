"""Quantizing from files to files, a layer at a time: no data, no calls of the model, little memory."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from diffusion_accel.denoisers import DENOISERS
from diffusion_accel.errors import ConfigurationError, ModelLoadError
from diffusion_accel.io import at_home, plain, printable, read_json, writing
from diffusion_accel.model_files.folders import check_folder
from diffusion_accel.model_files.headers import check_weights
from diffusion_accel.model_files.index_notes import INDEX
from diffusion_accel.model_files.quantized import METHOD
from diffusion_accel.outputs import check_free_folder, replacing_folder
from diffusion_accel.progress import Progress, silent

from .affine import codes_of, stored_grid, values_of, weight_grid
from .low_rank import low_rank
from .model import DTYPES, install
from .packing import pack
from .ptq.bits import layer_specs
from .ptq.settings import QuantizeSettings
from .rotation import rotated
from .single_file import FLOATS, Made, config_folder, denoiser_tensors, read, write_others
from .spec import LayerSpec, ModelSpec, in_groups
from .stored import Tensor, TensorWriter, find_tensors, settings_digest, tensors_digest

__all__ = ["FilesReport", "quantize_files"]

WEIGHTS = "diffusion_pytorch_model.safetensors"
_ROWS = 1 << 22  # weights that are rounded at a time
_SHRINK = tuple(1 - 0.04 * j for j in range(10))  # of ranges that are tried, below 8 bits


@dataclass(frozen=True)
class FilesReport:
    """What was written.

    Attributes:
        output: the pipeline folder.
        layers: how many are quantized.
        parameters: of the model.
        bytes: of its weights on disk: "checkpoint" and what they were, "source".
        sqnr: of each layer's weights, 10 log10(signal / rounding error), dB.
    """

    output: str
    layers: int
    parameters: int
    bytes: dict[str, int]
    sqnr: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return dict(vars(self))

    def text(self) -> str:
        """A line for people."""
        before, now = self.bytes["source"], self.bytes["checkpoint"]
        return (
            f"{self.output}: {self.layers} layers, {now / 1e6:.1f} MB instead of {before / 1e6:.1f} "
            f"({now / (4 * self.parameters):.3f} of float32); the worst layer keeps {min(self.sqnr.values()):.1f} dB"
        )


def quantize_files(
    model: str | Path,
    output: str | Path,
    *,
    weight_bits: int = 8,
    activation_bits: int | None = None,
    group: int = 64,
    rank: int = 0,
    rotate: bool = False,
    input_group: int = 0,
    config: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> FilesReport:
    """Quantize the U-Net or transformer of a pipeline folder, or of a single file, without data, a layer at a time.

    The weights are read from the safetensors files and written as they are made, so that memory is needed for one layer
    only. Rounding is to nearest on grids by range search; inputs have grids that are found at every call, or none.

        quantize_files("my-sdxl", "my-sdxl-w4", weight_bits=4)
        quantize_files("my-sdxl.safetensors", "my-sdxl-w4", weight_bits=4, config="any-sdxl-folder")

    Args:
        model: a pipeline folder with safetensors weights; or a single safetensors file in the layout of the model's
            authors, as diffusers' `from_single_file` takes it, or of a denoiser alone.
        output: the pipeline folder to write: other parts are copied as they are, or those of the file.
        weight_bits: 2 to 8; the first and the last layer have 8.
        activation_bits: of inputs, 2 to 16; None: they are not rounded.
        group: weights that share a grid, 16 to 256, or 0: all of an output channel.
        rank: of a branch in float16 beside the codes of each layer, see `low_rank`; 0: none. A layer is then in memory
            as a whole.
        rotate: mix every 32 channels of inputs by a Hadamard matrix before they are rounded.
        input_group: channels of a position that share a grid of the input, 16 to 256, or 0: all of a row of a linear
            layer, all of an image of a convolution. 16 or 32 for inputs of 4 bits.
        config: of a single file, a pipeline folder or a hub id with the configurations of its parts, as
            `from_single_file` takes it; and with the other parts, where the file has a denoiser alone. None: the
            repository that diffusers takes such a file to be of.
        overwrite: replace an existing pipeline folder.
        progress: told which layer is at work.

    Returns:
        What was written: layers, sizes, and how much of each layer's weights is kept.

    Raises:
        ConfigurationError: a value is not allowed.
        ModelLoadError: the folder is damaged, has no denoiser or two of them, or weights that are no safetensors; the
            file is in no layout that diffusers knows, or its configuration is not at hand.
        OutputError: `output` exists, or cannot be written.
    """
    root, folder = at_home(model), Path(output)
    asked = QuantizeSettings(
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        groups=(in_groups(group, "group"),),
        rank=rank,
        rotate=rotate,
        inputs="static" if activation_bits is None else "dynamic",
        input_group=in_groups(input_group, "input_group") if activation_bits else 0,
        attention_bits=None,
        split=False,
    )
    check_free_folder(folder, overwrite)
    if not root.is_file():
        if config is not None:
            raise ConfigurationError(f"config is for a single file, and {root} is a folder; leave it out")
        check_folder(root)
        source = _part(root, root)
        with writing(folder), replacing_folder(folder) as made:
            for entry in sorted(root.iterdir()):
                if entry.is_dir() and entry.name != source.name:
                    shutil.copytree(entry, made / entry.name)
                elif entry.is_file():
                    shutil.copy(entry, made)
            return _quantize_part(source, made, folder, asked, progress)
    check_weights(root)
    held = find_tensors([root])
    configs = config_folder(root, held, config)
    source = _part(configs, root, held)
    with writing(folder), replacing_folder(folder) as made:
        write_others(root, held, configs, source.name, made)
        return _quantize_part(source, made, folder, asked, progress)


@dataclass(frozen=True)
class _Part:
    """A denoiser: its name in the pipeline, its config, the model without weights, and where they are stored."""

    name: str
    config: dict[str, Any]
    model: nn.Module
    stored: Mapping[str, Tensor | Made]


def _part(configs: Path, root: Path, held: Mapping[str, Tensor] | None = None) -> _Part:
    """The denoiser that a folder's configurations describe, with the weights in the folder or file `root`."""
    name = _denoiser_of(configs)
    config = read_json(configs / name / "config.json", error=ModelLoadError, nonfinite=True)
    model = _empty(configs / name, config)
    stored = find_tensors(_files(root / name)) if held is None else denoiser_tensors(root, held, model)
    _check_fit(model, stored, root / name if held is None else root, configs / name)
    return _Part(name, config, model, stored)


def _denoiser_of(root: Path) -> str:
    """The component that denoises."""
    index = read_json(root / INDEX, error=ModelLoadError)
    found = [name for name in DENOISERS if isinstance(index, dict) and index.get(name) and (root / name).is_dir()]
    if len(found) != 1:
        what = f"{len(found)} denoisers ({', '.join(found)})" if found else "no U-Net or transformer"
        raise ModelLoadError(f"{root} has {what}; a pipeline folder with one is needed")
    return found[0]


def _quantize_part(source: _Part, root: Path, output: Path, asked: QuantizeSettings, progress: Progress) -> FilesReport:
    """Write the model into its folder in `root`."""
    model, stored, made = source.model, source.stored, root / source.name
    made.mkdir()
    specs = layer_specs(model, asked, {})
    parameters = sum(p.numel() for p in model.parameters())
    install(model, ModelSpec(specs))
    wanted = model.state_dict()
    sqnr: dict[str, float] = {}
    with TensorWriter(made / WEIGHTS, _header(wanted, stored)) as file:
        for number, (name, spec) in enumerate(specs.items()):
            progress(name, number / len(specs), None)
            sqnr[name] = _write_layer(file, name, stored[f"{name}.weight"], spec)
        for name in wanted:
            if name in stored:
                file.put(name, stored[name].chunks())
    progress("writing", 1.0, 0.0)
    kept_of = {name: round(value, 2) for name, value in sqnr.items() if math.isfinite(value)}
    specs = {name: replace(spec, sqnr=kept_of.get(name)) for name, spec in specs.items()}
    recipe = {"bits": asked.name, "rounding": "nearest", "finetune": "none", "calibration": "none"}
    values = ModelSpec(specs, recipe=recipe).to_dict()
    tensors = find_tensors([made / WEIGHTS])
    hashed = tensors_digest((n, t.dtype, t.shape, t.chunks()) for n, t in tensors.items())
    kept = {k: v for k, v in source.config.items() if k != "quantization_config"}
    values["digest"] = settings_digest(kept, values) + hashed
    written = kept | {"quantization_config": {"quant_method": METHOD, **values}}
    (made / "config.json").write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    sizes = {"checkpoint": sum(t.size for t in tensors.values()), "source": sum(t.size for t in stored.values())}
    return FilesReport(str(output), len(specs), parameters, sizes, sqnr)


# ---------------------------------------------------------------------- the model
def _empty(source: Path, config: Any) -> nn.Module:
    """The model without weights."""
    if not isinstance(config, dict) or "quantization_config" in config:
        what = "is quantized already" if isinstance(config, dict) else "holds no table"
        raise ModelLoadError(f"{source / 'config.json'} {what}")
    cls = getattr(diffusers, str(config.get("_class_name")), None)
    if not (isinstance(cls, type) and issubclass(cls, diffusers.ModelMixin)):
        raise ModelLoadError(
            f"{source / 'config.json'} names no model of diffusers: {plain(config.get('_class_name'))}"
        )
    with torch.device("meta"):
        made: Any = cls.from_config(config)  # type: ignore[attr-defined]
    return made


def _files(source: Path) -> list[Path]:
    files = sorted(source.glob("*.safetensors"))
    index = source / f"{WEIGHTS}.index.json"
    if index.is_file():
        table = read_json(index, error=ModelLoadError)
        names = {str(name) for name in table.get("weight_map", {}).values()} if isinstance(table, dict) else set()
        files = [source / name for name in sorted(names) if Path(name).name == name]
    elif (source / WEIGHTS).is_file():
        files = [source / WEIGHTS]  # beside variants
    elif len(files) > 1:
        raise ModelLoadError(f"{source} has several variants of weights ({', '.join(f.name for f in files)}); keep one")
    if not files:
        raise ModelLoadError(f"{source} has no safetensors weights")
    return files


def _check_fit(model: nn.Module, stored: Mapping[str, Tensor | Made], source: Path, configs: Path) -> None:
    """The files must hold what the model has, in a type that weights can have."""
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    its = "its config.json" if source == configs else f"the config.json in {configs}"
    for name in sorted({*wanted, *stored}):
        if name not in stored or name not in wanted or stored[name].shape != wanted[name]:
            what = "lack" if name not in stored else "have" if name not in wanted else "have another shape of"
            raise ModelLoadError(f"the weights in {source} do not fit {its}: they {what} {printable(name)}")
        if name.endswith(".weight") and stored[name].dtype not in FLOATS:
            raise ModelLoadError(
                f"{printable(name)} in {source} is {stored[name].dtype}, not floating point ({', '.join(FLOATS)})"
            )


# ---------------------------------------------------------------------- weights
def _write_layer(file: TensorWriter, name: str, stored: Tensor | Made, spec: LayerSpec) -> float:
    """Round one layer's weights a slice of rows at a time, write them, and say how much of them is kept, dB."""
    count, columns = stored.shape[0], math.prod(stored.shape[1:])
    rows_from = _reader(stored, columns, name)
    each = max(1, _ROWS // columns)
    left = right = torch.zeros(0)
    if spec.rank:
        left, right = low_rank(rows_from(0, count).view(stored.shape), spec)
        file.put(f"{name}.weight_left", left.half().numpy().tobytes())
        file.put(f"{name}.weight_right", right.half().numpy().tobytes())
    signal = noise = 0.0
    scales, zeros = [], []
    shrink = (1.0,) if spec.weight_bits == 8 else _SHRINK
    for begin in range(0, count, each):
        rows = rows_from(begin, min(count, begin + each))
        signal += float(rows.square().sum())
        if spec.rank:
            rows = rows - left[begin : begin + each] @ right
        rows = rotated(rows.view(-1, *stored.shape[1:]), 1, spec.rotate).flatten(1)
        scale, zero = weight_grid(rows, spec, shrink, norm=2.0)
        codes = codes_of(rows, scale, zero, spec)
        noise += float((values_of(codes, scale, zero, spec) - rows).square().sum())
        packed = pack(codes, spec.weight_bits)
        file.put(f"{name}.weight_codes", packed.numpy().tobytes(), begin * packed.shape[1])
        scales.append(scale)
        zeros.append(zero)
    scale, zero = stored_grid(torch.cat(scales, 1), torch.cat(zeros, 1), spec)
    file.put(f"{name}.weight_scale", scale.contiguous().numpy().tobytes())
    file.put(f"{name}.weight_zero_point", zero.contiguous().numpy().tobytes())
    return 10 * math.log10(signal / max(noise, 1e-30)) if signal else math.inf


def _reader(stored: Tensor | Made, columns: int, name: str) -> Callable[[int, int], torch.Tensor]:
    """What reads rows of a weight, from one to before another, as float32: of a stored one these alone."""
    whole = read(stored).reshape(-1, columns) if isinstance(stored, Made) else None
    width = columns * (stored.size // math.prod(stored.shape))

    def rows(begin: int, end: int) -> torch.Tensor:
        if isinstance(stored, Made):
            assert whole is not None
            found = whole[begin:end].float()
        else:
            place = (stored.file, stored.start + begin * width, (end - begin) * width)
            found = read(Tensor(stored.dtype, (end - begin, columns), *place)).float()
        if not bool(torch.isfinite(found).all()):
            raise ModelLoadError(f"{printable(name)}.weight has values that are no finite numbers")
        return found

    return rows


def _header(
    wanted: Mapping[str, torch.Tensor], stored: Mapping[str, Tensor | Made]
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of every tensor of the checkpoint; what is not quantized keeps the type that it has."""
    return {
        name: (stored[name].dtype if name in stored else DTYPES[tensor.dtype], tuple(tensor.shape))
        for name, tensor in sorted(wanted.items())
    }
