"""`inspect`: what a quantized checkpoint, a file of tuned plans or a learned solver holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE
from rich.table import Column, Table

from diffusion_accel.errors import ModelLoadError
from diffusion_accel.io import is_there
from diffusion_accel.pipelines.quantizers import checkpoint_folder
from diffusion_accel.quant.spec import LayerSpec
from diffusion_accel.quant.stored import Tensor, read_config, verify
from diffusion_accel.reuse.plan_names import is_tuned
from diffusion_accel.schedulers.solver import FILE

from .common_options import AsJson
from .plan_table import show_plans, show_solver
from .terminal import console, note, say

PARTS = (  # of a layer in the file
    "weight_codes weight_scale weight_zero_point weight_left weight_right bias input_scale "
    "input_zero_point output_scale output_zero_point"
).split()


def inspect(
    folder: Annotated[
        str,
        typer.Argument(
            metavar="FOLDER|FILE",
            help="A folder that `quantize` wrote, or its unet or transformer; what `tune` wrote; tuned:NAME.",
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """Show the layers of a quantized checkpoint: bits, sizes, rounding error, sensitivity; or what was measured of
    tuned plans or of a learned solver."""
    if is_tuned(folder) and not Path(folder).is_dir():
        show_plans(folder, as_json)
        return
    if is_there(Path(folder) / FILE, "file"):
        show_solver(Path(folder), as_json)
        return
    if not Path(folder).is_dir():
        raise ModelLoadError(f"no such folder: {folder}")
    place = checkpoint_folder(folder)
    spec, tensors = verify(place, sorted(place.glob("*.safetensors")), note)
    layers = {name: describe(name, layer, tensors) for name, layer in spec.layers.items()}
    size = sum(t.size for t in tensors.values())
    packed = sum(layer["bytes"] for layer in layers.values())
    weights = sum(layer["weights"] for layer in layers.values())
    total = {
        "model": read_config(place).get("_class_name"),
        "bytes": size,
        "quantized_layers": len(layers),
        "bytes_of_quantized_layers": packed,
        "average_bits": round(sum(v["weights"] * v["weight_bits"] for v in layers.values()) / max(1, weights), 3),
        "timesteps": list(spec.timesteps),
        "recipe": spec.recipe,
    }
    if as_json:
        typer.echo(json.dumps({**total, "layers": layers}, indent=1))
        return
    terminal = console()
    table = Table(Column("layer", overflow="fold"), "W bits", "A bits", "KB", "SQNR dB", "sensitivity", box=SIMPLE)
    for name, row in layers.items():
        inputs = "–" if row["activation_bits"] is None else f"{row['activation_bits']}{row['grids']}"
        kilobytes = f"{row['bytes'] / 1e3:.1f}"
        weights = f"{row['weight_bits']}" + (f" by {row['weight_group']}" if row["weight_group"] else "")
        weights += f" + rank {row['rank']}" if row["rank"] else ""
        cells = (weights, inputs, kilobytes, row["sqnr"], row["sensitivity"])
        table.add_row(name, *("–" if c is None else str(c) for c in cells))
    terminal.print(table)
    say(
        f"{total['model']}: {size / 1e6:.2f} MB, {len(layers)} quantized layers with {total['average_bits']:.2f} bits "
        f"a weight, {len(spec.timesteps)} buckets of timesteps"
    )
    for key, value in (spec.recipe or {}).items():
        say(f"  {key}: {value}")


def _grids(layer: LayerSpec) -> str:
    """What an input has grids for."""
    before = " rotated" if layer.rotate else ""
    if layer.dynamic:
        return before + " dynamic" + (f" by {layer.input_group}" if layer.input_group else "")
    return before + (" by channel" if layer.per_channel else " split" if layer.split else "")


def describe(name: str, layer: LayerSpec, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """One layer, from its spec and the headers of the files. Raises `ModelLoadError` if it has no weights there."""
    codes = tensors.get(f"{name}.weight_codes")
    if codes is None or len(codes.shape) != 2:
        raise ModelLoadError(f"the checkpoint is damaged: it has no {name}.weight_codes")
    own = (tensors.get(f"{name}.{part}") for part in PARTS)
    rows, width = codes.shape
    return {
        "weights": rows * (width * 8 // layer.weight_bits),
        "weight_bits": layer.weight_bits,
        "activation_bits": layer.activation_bits,
        "weight_group": layer.weight_group,
        "rank": layer.rank,
        "grids": _grids(layer),
        "bytes": sum(t.size for t in own if t is not None),
        "sqnr": layer.sqnr,
        "sensitivity": layer.sensitivity,
    }
