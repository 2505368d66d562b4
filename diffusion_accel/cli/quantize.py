"""`quantize`: a pipeline with a low-bit denoiser, as a folder that diffusers loads."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer

from diffusion_accel import interrupts
from diffusion_accel.conditioning import PROMPT, condition_of, usual_texts
from diffusion_accel.errors import ConfigurationError
from diffusion_accel.generation.request import LIMITS, Bounds, at_least
from diffusion_accel.outputs import check_free_folder, output_path

from .common_options import BATCH, AllowPickle, AsJson, Debug, Device, Model, Quiet, check_range, number, recommended
from .prompts import read_jobs
from .settings import merge
from .terminal import say
from .tune import Bar, embedded_prompts

COUNT, BUCKETS, IMAGES, REPEATED = (
    at_least(2, 100_000),
    at_least(1, 1000),
    at_least(0, 10_000),
    at_least(0, 1_000_000),
)
MINUTES = Bounds(math.ulp(0), 1_000_000, "a number above 0 and at most 1000000")
RATE = Bounds(math.ulp(0), 1, "a number above 0 and at most 1")
_METHOD = {"rich_help_panel": "Method"}
_SAMPLING = {"rich_help_panel": "Calibration"}


def quantize(
    output: Annotated[str, typer.Option("--output", "-o", metavar="DIR", help="The pipeline folder to write.")],
    model: Model = None,
    bits: Annotated[str, typer.Option(help="w8a8, w4a8, w4a4, … or w8, w4 for weights only.")] = "w8a8",
    bits_budget: Annotated[
        float | None, typer.Option(help="Average bits a weight: sensitive layers get more, others fewer.", **_METHOD)
    ] = None,
    finetune: Annotated[str, typer.Option(help="quest or none.", **_METHOD)] = "quest",
    rounding: Annotated[str, typer.Option(help="adaround or nearest.", **_METHOD)] = "adaround",
    budget_minutes: Annotated[
        float | None, typer.Option(help="About how long it may take; without it, the published numbers of steps.")
    ] = None,
    layers: Annotated[
        str, typer.Option(help="What is finetuned: preset, sd, sdxl, lsun, dit, measured or all.", **_METHOD)
    ] = "preset",
    sensitive: Annotated[
        float, typer.Option(help="Share of the layers, the most sensitive ones, finetuned as well.", **_METHOD)
    ] = 0.25,
    rate: Annotated[float | None, typer.Option(help="Learning rate of weights in finetuning.", **_METHOD)] = None,
    scale_rate: Annotated[float | None, typer.Option(help="Of activation scales in stage 2.", **_METHOD)] = None,
    layer_loss: Annotated[
        bool | None,
        typer.Option("--layer-loss/--output-loss", help="Finetune on layers' outputs, too (SD), or not.", **_METHOD),
    ] = None,
    epochs: Annotated[int | None, number("Epochs of finetuning's stage 2.", REPEATED, **_METHOD)] = None,
    time_epochs: Annotated[
        int | None, number("Epochs of stage 1 at the first timestep, 200 published.", REPEATED, **_METHOD)
    ] = None,
    iterations: Annotated[int | None, number("Steps of AdaRound a block.", REPEATED, **_METHOD)] = None,
    softmax_bits: Annotated[int | None, typer.Option(help="Also round attention probabilities.", **_METHOD)] = None,
    attention_bits: Annotated[int, typer.Option(help="Of queries, keys and values; 0: as they are.", **_METHOD)] = 8,
    split: Annotated[
        bool, typer.Option("--split/--no-split", help="Own grids for skip connections.", **_METHOD)
    ] = True,
    calibration_prompts: Annotated[
        str | None, typer.Option(metavar="FILE", help="A prompt a line; the embedded model needs none.", **_SAMPLING)
    ] = None,
    count: Annotated[int, number("How many prompts to use, or images to draw.", COUNT, **_SAMPLING)] = 64,
    buckets: Annotated[
        int | None,
        number(
            "Timesteps with grids of their own.",
            BUCKETS,
            show_default="25, or 16 with inputs below 6 bits",
            **_SAMPLING,
        ),
    ] = None,
    steps: Annotated[
        int | None,
        number(
            "Denoising steps of the trajectories.",
            LIMITS["steps"],
            show_default="20 with sticker, else 50",
            **_SAMPLING,
        ),
    ] = None,
    guidance_scale: Annotated[
        float | None,
        number(
            "Classifier-free guidance; 1 switches it off.",
            LIMITS["guidance_scale"],
            show_default=recommended("guidance_scale"),
            **_SAMPLING,
        ),
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(help="ddim, dpm++, euler, unipc, …", show_default=recommended("scheduler"), **_SAMPLING),
    ] = None,
    width: Annotated[
        int | None, number("Pixels.", LIMITS["width"], show_default=recommended("width"), **_SAMPLING)
    ] = None,
    height: Annotated[
        int | None, number("Pixels.", LIMITS["height"], show_default=recommended("height"), **_SAMPLING)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of everything random.", **_SAMPLING)] = 0,
    batch: Annotated[int, number("Images in a call.", BATCH, **_SAMPLING)] = 8,
    report: Annotated[int, number("Images that the report compares; 0: no images.", IMAGES)] = 16,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing folder.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Forget what an interrupted run left.")] = False,
    device: Device = None,
    allow_pickle: AllowPickle = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Quantize a pipeline's U-Net or transformer: fewer bits, calibrated and finetuned (QuEST).

    Writes a pipeline folder that `generate --model DIR` and diffusers' from_pretrained load, with report.html in it. An
    interrupted run goes on from where it was when it is called again; what lies between is kept in DIR.work.
    """
    from diffusion_accel.quant.ptq.settings import QuantizeSettings, parse_bits

    for name, value, allowed in (
        ("finetune", finetune, ("quest", "none")),
        ("rounding", rounding, ("adaround", "nearest")),
    ):
        if value not in allowed:
            raise ConfigurationError(f"--{name} must be {' or '.join(allowed)}, got {value!r}")
    for flag, amount, bounds in (
        ("--count", count, COUNT),
        ("--batch", batch, BATCH),
        ("--report", report, IMAGES),
        ("--buckets", buckets, BUCKETS),
        ("--epochs", epochs, REPEATED),
        ("--time-epochs", time_epochs, REPEATED),
        ("--iterations", iterations, REPEATED),
    ):
        check_range(flag, amount, bounds)
    for name, real, bounds in (
        ("budget-minutes", budget_minutes, MINUTES),
        ("rate", rate, RATE),
        ("scale-rate", scale_rate, RATE),
    ):
        check_range(f"--{name}", real, bounds)
    weights, inputs = parse_bits(bits)
    folder = output_path(output)
    check_free_folder(folder, overwrite)
    work = Path(f"{folder}.work")

    def how_to_go_on() -> str:
        kept = work.is_dir() and folder not in interrupts.finished()
        return f"call it again to go on from here ({work})" if kept else interrupts.names()

    interrupts.explain(how_to_go_on)
    given = {"model": model, "steps": steps, "guidance_scale": guidance_scale, "scheduler": scheduler, "seed": seed}
    given |= {"width": width, "height": height, "device": device, "allow_pickle": allow_pickle}
    settings, source = merge(given, {})
    choice = QuantizeSettings(
        weight_bits=weights,
        activation_bits=inputs,
        bits_budget=bits_budget,
        attention_bits=attention_bits or None,
        softmax_bits=softmax_bits,
        split=split,
        buckets=buckets,
        layers=layers,
        sensitive=sensitive,
        seed=seed,
        rounding=rounding_settings(iterations) if rounding == "adaround" else None,
        finetune=finetune_settings(rate, scale_rate, epochs, time_epochs, layer_loss) if finetune == "quest" else None,
    )
    if calibration_prompts is not None:
        texts = [job.prompt for job in read_jobs([], calibration_prompts, "--calibration-prompts")][:count]
    else:
        texts = embedded_prompts(count) if source.kind == "embedded" else []

    from diffusion_accel.pipelines.loading import load_pipeline
    from diffusion_accel.quant.ptq.export import run

    from .session import check_machine, open_for

    pipe: Any = open_for(settings, source, check_machine(settings), promptless=True)
    if not texts:
        if condition_of(pipe) == PROMPT:
            raise ConfigurationError(
                "--calibration-prompts is needed: grids are measured on the kind of prompts the model is used with"
            )
        texts = usual_texts(pipe, count)
    bar = Bar(quiet)

    def tell(what: str, share: float = 0.0, left: float | None = None) -> None:
        bar(what if left is None else f"{what}, {_clock(left)} left", share)

    try:
        result = run(
            pipe, source, texts, choice, folder, tell, load=load_pipeline, overwrite=overwrite, restart=restart,
            minutes=budget_minutes, images=report, batch=batch, steps=settings.steps or 50,
            options={k: getattr(settings, k) for k in ("guidance_scale", "height", "width")},
        )  # fmt: skip
    finally:
        bar.close()
    if as_json:
        typer.echo(json.dumps(result.to_dict()))
    else:
        say(result.text(), lines=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


def rounding_settings(iterations: int | None) -> Any:
    from diffusion_accel.quant.ptq.reconstruct import RoundingSettings

    return RoundingSettings() if iterations is None else RoundingSettings(iterations=iterations)


def finetune_settings(
    rate: float | None, scale_rate: float | None, epochs: int | None, time_epochs: int | None, layer_loss: bool | None
) -> Any:
    from diffusion_accel.quant.ptq.finetune import FinetuneSettings

    given: dict[str, Any] = {"rate": rate, "scale_rate": scale_rate, "epochs": epochs, "layer_loss": layer_loss}
    if time_epochs is not None:  # the later ones in proportion
        first = FinetuneSettings().time_epochs
        given["time_epochs"] = tuple(round(n * time_epochs / first[0]) for n in first)
    return FinetuneSettings(**{k: v for k, v in given.items() if v is not None})
