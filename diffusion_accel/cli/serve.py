"""`serve`: a model behind HTTP."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any

import typer

from diffusion_accel import interrupts
from diffusion_accel.errors import ConfigurationError
from diffusion_accel.generation.request import Bounds, at_least
from diffusion_accel.io import at_home, is_there
from diffusion_accel.serving.http.settings import BOUNDS, Limits, ServerSettings

from .common_options import (
    AllowPickle,
    Device,
    Dtype,
    GuidanceScale,
    Model,
    Pixels,
    RecipeOption,
    Scheduler,
    Steps,
    in_panels,
    number,
    one_of,
    time_option,
)
from .feature_flags import with_feature_flags
from .settings import ATTENTION, RUNTIMES, Settings, check_features, merge, own_controlnets
from .terminal import note, say

TOKEN = "DIFFUSION_ACCEL_TOKEN"  # environment variable
_DEFAULTS = ("steps", "guidance_scale", "width", "height", "negative_prompt")
_SETTINGS = (  # of `Settings`
    *("model", "scheduler", *_DEFAULTS, "allow_pickle", "device", "dtype", "attention", "quantize", "runtime"),
    *("low_memory", "recipe"),
)
_NEEDED = ("fastapi", "uvicorn", "prometheus_client", "python_multipart")
_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_LEAST_TOKEN = 8  # characters
_PORTS = at_least(0, 65_535)
_QUEUE = at_least(0, 100_000)
_RUNNING = at_least(1, 256)
_ROWS = at_least(1, 1024)
_DRAIN = Bounds(0, 86_400, "at least 0 and at most 86400")
_REPLICAS = at_least(1, 1000)
_GPUS = Bounds(0, 64, "at least 0 and at most 64")
_PANELS = {
    "What is drawn with": "model recipe controlnet lora_folder lora_changes",
    "Where it listens": "host port token page",
    "Starting and ending": "warm_up drain log_format debug",
    "Several devices or machines": "ray min_replicas max_replicas replica_gpus",
    "Limits of requests": "max_queue max_running max_rows max_pixels max_steps max_images max_body_mb",
    "Where a request says nothing": "steps guidance_scale scheduler width height negative_prompt",
    "Machine": "allow_pickle device dtype attention quantize runtime low_memory",
}
_LIMITS = Limits()


@with_feature_flags
@in_panels(_PANELS)
def serve(
    model: Model = None,
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Where to listen; 0.0.0.0: everywhere.")] = "127.0.0.1",
    port: Annotated[int, number("Where to listen; 0: any that is free.", _PORTS)] = 8000,
    token: Annotated[
        str | None,
        typer.Option(envvar=TOKEN, show_envvar=True, show_default=False, help="What clients have to send."),
    ] = None,
    max_queue: Annotated[int, number("Requests that may wait.", _QUEUE)] = 64,
    max_running: Annotated[int, number("Requests that are drawn at the same time.", _RUNNING)] = 8,
    max_rows: Annotated[int, number("Rows of a batch; guidance makes two of an image.", _ROWS)] = 16,
    max_pixels: Annotated[int, number("Pixels of an image.", BOUNDS["pixels"])] = _LIMITS.pixels,
    max_steps: Annotated[int, number("Denoising steps.", BOUNDS["steps"])] = _LIMITS.steps,
    max_images: Annotated[int, number("Images of a request.", BOUNDS["images"])] = _LIMITS.images,
    max_body_mb: Annotated[int, number("MiB of a request, its images included.", BOUNDS["body_mb"])] = _LIMITS.body_mb,
    controlnet: Annotated[
        list[str] | None, typer.Option(help="Folder or hub id of one ControlNet, for requests with a control_image.")
    ] = None,
    lora_folder: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="LoRAs that requests may name: its .safetensors files, by their names."),
    ] = None,
    lora_changes: Annotated[
        bool, typer.Option("--lora-changes", help="Let clients load files that are put into that folder later.")
    ] = False,
    page: Annotated[
        bool, typer.Option("--page/--no-page", help="A page for browsers at /; it needs diffusion-accel\\[ui].")
    ] = True,
    warm_up: Annotated[
        bool, typer.Option("--warm-up", help="Measure first what batches cost, which says how many rows are worth it.")
    ] = False,
    drain: Annotated[float, time_option("At the end, time for requests that were accepted", _DRAIN)] = 120,
    log_format: Annotated[str, one_of("text or json.", ("text", "json"))] = "text",
    ray: Annotated[
        bool, typer.Option("--ray", help="Replicas on Ray Serve: on the cluster of RAY_ADDRESS, else on this machine.")
    ] = False,
    min_replicas: Annotated[int | None, number("At least so many.", _REPLICAS, show_default="1")] = None,
    max_replicas: Annotated[
        int | None, number("At most so many, while requests wait.", _REPLICAS, show_default="as --min-replicas")
    ] = None,
    replica_gpus: Annotated[
        float | None, number("GPUs of each, or a part of one.", _GPUS, show_default="1 where there are any")
    ] = None,
    steps: Steps = None,
    guidance_scale: GuidanceScale = None,
    scheduler: Scheduler = None,
    width: Pixels = None,
    height: Pixels = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What no image should show.")] = None,
    allow_pickle: AllowPickle = None,
    device: Device = None,
    dtype: Dtype = None,
    attention: Annotated[
        str | None, typer.Option(help=", ".join(ATTENTION) + ".", show_default=Settings.attention)
    ] = None,
    quantize: Annotated[
        str | None, typer.Option(metavar="DIR|PACKAGE:KIND", help="A quantized checkpoint, or torchao:int8wo, …")
    ] = None,
    runtime: Annotated[
        str | None,
        typer.Option(help="How a quantized model computes: " + ", ".join(RUNTIMES) + ".", show_default="auto"),
    ] = None,
    low_memory: Annotated[
        bool | None, typer.Option("--low-memory", help="Keep quantized weights packed in memory.")
    ] = None,
    recipe: RecipeOption = None,
    **features: str | None,
) -> None:
    """Draw images for others, over HTTP: OpenAI's images API, jobs, and clients of AUTOMATIC1111's web UI."""
    flags = {key: value for key, value in locals().items() if key in _SETTINGS}
    check_installed("serve", _NEEDED)
    check_token(token)
    given = {"--min-replicas": min_replicas, "--max-replicas": max_replicas, "--replica-gpus": replica_gpus}
    check_ray(ray, given, port, lora_changes)
    settings, source = merge({**flags, **features}, {}, restoring=True)
    if "patch_parallel" in settings.features:
        raise ConfigurationError("--patch-parallel is for one image on several devices; run a server on each of them")
    if refused := [feature.flag() for feature in settings.features.values() if not feature.served]:
        raise ConfigurationError(f"{refused[0]} is not for a server, which orders all computing; leave it out")
    nets = controlnet or []
    if len(nets) > 1:
        raise ConfigurationError(f"--controlnet must be given once for a server, which has one, got {len(nets)}")
    if "" in nets:
        raise ConfigurationError("--controlnet is empty")
    settings = dataclasses.replace(settings, controlnet=nets[0] if nets else None)  # requests bring the image for it
    if len(own := own_controlnets(settings, source)) > 1:
        raise ConfigurationError(f"{source.name} has {len(own)} ControlNets, and a server has one: give --controlnet")
    if lora_folder is not None and not is_there(lora_folder, "dir"):
        raise ConfigurationError(f"--lora-folder {lora_folder}: there is no such folder")
    check_features(settings, settings.steps, source)
    limits = Limits(pixels=max_pixels, steps=max_steps, images=max_images, body_mb=max_body_mb)
    asked = ServerSettings(
        model=source.name,
        embedded=source.kind == "embedded",
        defaults={key: getattr(settings, key) for key in _DEFAULTS if getattr(settings, key) is not None},
        limits=limits,
        token=token,
        lora_folder=None if lora_folder is None else at_home(lora_folder),
        lora_changes=lora_changes,
        page=page and not ray,  # what a visitor has drawn lies on one replica only
        hosts=frozenset({*_LOOPBACK, "[::1]"}) if host in _LOOPBACK else None,
    )

    engine_options: dict[str, Any] = {
        "running": max_running,
        "queue": max_queue,
        "most_rows": max_rows,
        "loras": asked.lora_folder,
    }
    if token is None and host not in _LOOPBACK:
        note(f"whoever can reach {host} may draw; --token, or {TOKEN}, asks for a token")

    def ready(address: str) -> None:
        interrupts.explain(lambda: "requests that were accepted are lost")
        say(f"listening at {address}")

    if ray:
        from diffusion_accel.serving import ray_app  # heavy, and an extra: ray

        from . import session  # heavy: torch, diffusers

        session.check_serves(source)
        least = min_replicas or 1
        replicas = ray_app.Replicas(least=least, most=max_replicas or least, gpus=replica_gpus, drain_seconds=drain)
        opening = session.opening(settings, source)
        make = partial(ray_app.app, opening, engine_options, asked, replicas, warm_up, log_format)
        return ray_app.run(make, host, port, ready=ready)

    from diffusion_accel.serving.engine import Engine  # heavy: torch, diffusers
    from diffusion_accel.serving.http import log, run  # heavy, and an extra: fastapi, uvicorn

    from . import session  # heavy: torch, diffusers

    listening = run.bound(host, port)  # first: loading takes a while
    session.check_serves(source)
    pipe = session.open_for(settings, source, session.check_machine(settings))
    log.set_up(log_format)
    with Engine(pipe, **engine_options) as engine:
        if warm_up:
            engine.warm_up()
        run.serve(engine, asked, listening, drain_seconds=drain, ready=ready)


def check_token(token: str | None) -> None:
    """Refuse a token that cannot be sent, or is guessed easily; without showing it."""
    if token is None:
        return
    if not re.fullmatch(r"[\x21-\x7e]+", token):
        raise ConfigurationError("--token must be of letters, digits and signs of ASCII, without spaces")
    if len(token) < _LEAST_TOKEN:
        raise ConfigurationError(
            f"--token must have at least {_LEAST_TOKEN} characters; openssl rand -hex 32 makes one"
        )


def check_installed(command: str, modules: Sequence[str], extra: str = "serve") -> None:
    """Refuse to go on without the modules of an extra."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigurationError(
            f"{command} needs {', '.join(missing)}, which is not installed; pip install 'diffusion-accel[{extra}]'"
        )


def check_ray(ray: bool, replicas: Mapping[str, float | None], port: int, lora_changes: bool) -> None:
    """Refuse what needs `--ray`, and what does not go with it.

    Args:
        replicas: flags -> what was given, of which the first two are the least and the greatest number of replicas.
    """
    flags = {flag: value for flag, value in replicas.items() if value is not None}
    if not ray:
        if flags:
            raise ConfigurationError(f"{next(iter(flags))} needs --ray")
        return
    check_installed("serve --ray", ("ray",), "ray")
    least, most = flags.get("--min-replicas", 1), flags.get("--max-replicas")
    if most is not None and most < least:
        raise ConfigurationError(f"--max-replicas {most} must be at least --min-replicas, {least}")
    if port == 0:
        raise ConfigurationError("--port 0 cannot be combined with --ray: every machine listens at the same port")
    if lora_changes:
        raise ConfigurationError("--lora-changes cannot be combined with --ray: it would change one replica only")
