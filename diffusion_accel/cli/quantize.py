"""`quantize`: a pipeline with a low-bit denoiser, as a folder that diffusers loads."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer

import diffusion_accel as api
from diffusion_accel import interrupts
from diffusion_accel.conditioning import usual_texts
from diffusion_accel.errors import ConfigurationError
from diffusion_accel.generation.request import LIMITS, Bounds, at_least
from diffusion_accel.model_files.names import find_model
from diffusion_accel.outputs import check_free_folder, output_path, work_folder
from diffusion_accel.quant.ptq.settings import ALLOCATIONS, INPUTS, FinetuneSettings, RoundingSettings, parse_bits
from diffusion_accel.quant.ptq.settings import settings_of as quantize_settings

from .common_options import (
    AllowPickle,
    AsJson,
    Batch,
    Device,
    GuidanceScale,
    Model,
    Overwrite,
    Pixels,
    PromptsFile,
    Quiet,
    Restart,
    Scheduler,
    StepsOr50,
    bounded,
    count_option,
    in_panels,
    number,
    one_of,
    settings_of,
    time_option,
)
from .prompts import texts_of
from .terminal import Bar, say

BUCKETS, IMAGES, REPEATED = at_least(1, 1000), at_least(0, 10_000), at_least(0, 1_000_000)
BUDGET = Bounds(math.ulp(0), 60_000_000, "a time above 0 and at most 60000000 seconds")
RATE = Bounds(math.ulp(0), 1, "a number above 0 and at most 1")
CALIBRATIONS = ("prompts", "none")
_METHOD = "the method's"  # or what a budget allows
LEAST_PROMPTS = 2  # one to calibrate, one to validate
_PANELS = {
    "Output": "output report overwrite restart as_json quiet",
    "Machine": "device allow_pickle",
    "Method": "bits_budget size_ratio min_psnr allocation group rank rotate inputs input_group finetune "
    "rounding layers sensitive rate scale_rate layer_loss epochs time_epochs iterations softmax_bits attention_bits "
    "split",
    "Calibration": "calibration model_config prompts_file count buckets steps guidance_scale scheduler width height "
    "seed batch",
}


@in_panels(_PANELS)
def quantize(
    context: typer.Context,
    output: Annotated[str, typer.Option("--output", "-o", metavar="DIR", help="The pipeline folder to write.")],
    model: Model = None,
    bits: Annotated[str, typer.Option(help="w8a8, w4a8, w4a4, … or w8, w4 for weights only.")] = "w8a8",
    bits_budget: Annotated[
        float | None, typer.Option(help="Average bits a weight: sensitive layers get more, others fewer.")
    ] = None,
    size_ratio: Annotated[
        float | None,
        typer.Option(help="The most that the weights may take on disk, as a share of float32; layers get what fits."),
    ] = None,
    min_psnr: Annotated[
        float | None,
        typer.Option(help="Search the smallest checkpoint whose images keep this median PSNR (dB) to full precision."),
    ] = None,
    allocation: Annotated[
        str, one_of("By what bits are spread: sensitivity (measured); lim or zd, to compare with.", ALLOCATIONS)
    ] = "sensitivity",
    group: Annotated[
        list[int] | None,
        typer.Option(
            help="Weights that share a grid: 16, 32, 64, 128 or 256; 0: a whole row. Repeat it with --bits-budget, "
            "--size-ratio or --min-psnr, which then choose for each layer.",
            show_default="0, or with --size-ratio and --min-psnr 0, 32, 64 and 128",
        ),
    ] = None,
    rank: Annotated[
        int, typer.Option(help="Of a float16 branch beside the codes of each layer, for inputs of few bits; 0: none.")
    ] = 0,
    rotate: Annotated[
        bool, typer.Option("--rotate", help="Mix channels of inputs by Hadamard matrices, for inputs of 4 bits.")
    ] = False,
    inputs: Annotated[
        str, one_of("static: a grid for each timestep; or dynamic: found anew at every call.", INPUTS)
    ] = "static",
    input_group: Annotated[
        int | None,
        typer.Option(
            help="Channels of a dynamic input that share a grid, as --group.", show_default="0, or 32 below 6 bits"
        ),
    ] = None,
    finetune: Annotated[str, one_of("quest or none.", ("quest", "none"))] = "quest",
    rounding: Annotated[str, one_of("adaround or nearest.", ("adaround", "nearest"))] = "adaround",
    budget: Annotated[
        float | None,
        time_option("About how long it may take", BUDGET, show_default="none: the published numbers of steps"),
    ] = None,
    layers: Annotated[
        str, typer.Option(help="What is finetuned: preset, sd, sdxl, lsun, dit, measured or all.")
    ] = "preset",
    sensitive: Annotated[
        float, typer.Option(help="Share of the layers, the most sensitive ones, finetuned as well.")
    ] = 0.25,
    rate: Annotated[
        float | None, bounded(RATE, help="Learning rate of weights in finetuning.", show_default=_METHOD)
    ] = None,
    scale_rate: Annotated[
        float | None, bounded(RATE, help="Of activation scales in stage 2.", show_default=_METHOD)
    ] = None,
    layer_loss: Annotated[
        bool | None,
        typer.Option(
            "--layer-loss/--output-loss", help="Finetune on layers' outputs, too (SD), or not.", show_default=_METHOD
        ),
    ] = None,
    epochs: Annotated[int | None, number("Epochs of finetuning's stage 2.", REPEATED, show_default=_METHOD)] = None,
    time_epochs: Annotated[
        int | None, number("Epochs of stage 1 at the first timestep, 200 published.", REPEATED, show_default=_METHOD)
    ] = None,
    iterations: Annotated[int | None, number("Steps of AdaRound a block.", REPEATED, show_default=_METHOD)] = None,
    softmax_bits: Annotated[int | None, typer.Option(help="Also round attention probabilities.")] = None,
    attention_bits: Annotated[int, typer.Option(help="Of queries, keys and values; 0: as they are.")] = 8,
    split: Annotated[bool, typer.Option("--split/--no-split", help="Own grids for skip connections.")] = True,
    calibration: Annotated[
        str,
        one_of(
            "prompts: what the model sees decides; or none: rounding to nearest, from files to files a layer at a "
            "time, in little memory.",
            CALIBRATIONS,
        ),
    ] = "prompts",
    model_config: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="With --calibration none, of a single file: a pipeline folder or a hub id with the configurations of "
            "its parts, and with the other parts where the file has a denoiser alone.",
            show_default="what diffusers takes the file to be, from the hub",
        ),
    ] = None,
    prompts_file: PromptsFile = None,
    count: Annotated[int, count_option(LEAST_PROMPTS)] = 64,
    buckets: Annotated[
        int | None,
        number("Timesteps with grids of their own.", BUCKETS, show_default="25, or 16 with inputs below 6 bits"),
    ] = None,
    steps: StepsOr50 = None,
    guidance_scale: GuidanceScale = None,
    scheduler: Scheduler = None,
    width: Pixels = None,
    height: Pixels = None,
    seed: Annotated[int, bounded(LIMITS["seed"], help="Of everything random.")] = 0,
    batch: Batch = 8,
    report: Annotated[int, number("Images that the report compares; 0: no images.", IMAGES)] = 16,
    overwrite: Overwrite = False,
    restart: Restart = False,
    device: Device = None,
    allow_pickle: AllowPickle = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Quantize a pipeline's U-Net or transformer: fewer bits, calibrated and finetuned (QuEST).

    Writes a pipeline folder that `generate --model DIR` and, once diffusion_accel is imported, diffusers'
    from_pretrained load, with report.html in it. An
    interrupted run goes on from where it was when it is called again; what lies between is kept in DIR.work. With
    --calibration none no image is drawn, and a model of any size is quantized in minutes, from a folder or from a
    single file.
    """
    options = locals()
    if calibration == "none":
        say(_without_data(context, model, output, bits, group, model_config, overwrite, as_json, Bar(quiet)))
        return
    if model_config is not None:
        raise ConfigurationError("--model-config needs --calibration none")
    choice = quantize_settings(
        bits,
        seed=seed,
        bits_budget=bits_budget,
        size_ratio=size_ratio,
        min_psnr=min_psnr,
        allocation=allocation,
        groups=tuple(group) if group else None,
        rank=rank,
        rotate=rotate,
        inputs=inputs,
        input_group=input_group,
        attention_bits=attention_bits or None,
        softmax_bits=softmax_bits,
        split=split,
        buckets=buckets,
        layers=layers,
        sensitive=sensitive,
        rounding=_rounding(iterations) if rounding == "adaround" else None,
        finetune=_finetuning(rate, scale_rate, epochs, time_epochs, layer_loss) if finetune == "quest" else None,
    )
    folder = output_path(output)
    check_free_folder(folder, overwrite)
    _say_how_to_go_on(folder)
    settings, source = settings_of(options)
    texts = texts_of(prompts_file, count, source, LEAST_PROMPTS)

    from diffusion_accel.pipelines.loading import load_pipeline  # heavy: torch

    from .session import check_machine, check_texts, open_for  # heavy: torch

    check_texts(source, texts, "grids are measured on the kind of prompts the model is used with", LEAST_PROMPTS)
    pipe = open_for(settings, source, check_machine(settings), promptless=True)
    bar = Bar(quiet)
    try:
        found = api.quantize(
            pipe, texts or usual_texts(pipe, count), settings=choice, output=folder,
            minutes=None if budget is None else budget / 60, steps=settings.steps or 50,
            guidance_scale=settings.guidance_scale, height=settings.height, width=settings.width, batch=batch,
            images=report, overwrite=overwrite, restart=restart, progress=bar, source=source, load=load_pipeline,
        )  # fmt: skip
    finally:
        bar.close()
    if as_json:
        typer.echo(json.dumps(found.to_dict()))
    else:
        say(found.text(), lines=True)


_DATA_FREE = frozenset(
    "output model bits group rank rotate inputs input_group calibration model_config overwrite as_json quiet "
    "debug".split()
)


def _without_data(
    context: typer.Context,
    model: str | None,
    output: str,
    bits: str,
    group: list[int] | None,
    model_config: str | None,
    overwrite: bool,
    as_json: bool,
    bar: Bar,
) -> str:
    """Quantize from files to files; what is to be said of it."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    given = [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    other = sorted("--" + name.replace("_", "-") for name in set(given) - _DATA_FREE)
    if other or (context.params["inputs"] == "static" and "inputs" in given):
        raise ConfigurationError(f"{other[0] if other else '--inputs static'} needs data: leave out --calibration none")
    if len(group or ()) > 1:
        raise ConfigurationError("--group takes one size with --calibration none")
    weight_bits, activation_bits = parse_bits(bits)
    folder = output_path(output)
    check_free_folder(folder, overwrite)
    source = find_model(model or "sticker")
    if source.kind == "hub":
        raise ConfigurationError(
            f"--calibration none takes a pipeline folder or a single file, got the hub id {source.name}; load it once "
            "and save it: pipe.save_pretrained(DIR)"
        )

    import diffusers  # heavy: torch
    import transformers  # heavy: torch

    from diffusion_accel.quant.without_data import quantize_files  # heavy: torch

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    try:
        found = quantize_files(
            source.location, folder, weight_bits=weight_bits, activation_bits=activation_bits,
            group=group[0] if group else 64, rank=context.params["rank"], rotate=context.params["rotate"],
            input_group=context.params["input_group"] or 0, config=model_config, overwrite=overwrite, progress=bar,
        )  # fmt: skip
    finally:
        bar.close()
    return json.dumps(found.to_dict()) if as_json else found.text()


def _say_how_to_go_on(folder: Path) -> None:
    """What an interrupt says from now on."""
    work = work_folder(folder)
    interrupts.explain(lambda: interrupts.how_to_go_on(work, work.is_dir() and folder not in interrupts.finished()))


def _rounding(iterations: int | None) -> RoundingSettings:
    return RoundingSettings() if iterations is None else RoundingSettings(iterations=iterations)


def _finetuning(
    rate: float | None, scale_rate: float | None, epochs: int | None, time_epochs: int | None, layer_loss: bool | None
) -> FinetuneSettings:
    given: dict[str, Any] = {"rate": rate, "scale_rate": scale_rate, "epochs": epochs, "layer_loss": layer_loss}
    if time_epochs is not None:  # the later ones in proportion
        first = FinetuneSettings().time_epochs
        given["time_epochs"] = tuple(round(n * time_epochs / first[0]) for n in first)
    return FinetuneSettings(**{k: v for k, v in given.items() if v is not None})
