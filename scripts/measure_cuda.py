#!/usr/bin/env python3
"""What compiled models and all features do on one GPU, checked and timed within a time limit.

    python scripts/measure_cuda.py --out cuda.jsonl --seconds 90
    python scripts/measure_cuda.py --out cpu.jsonl --device cpu --quick --seconds 600

Every check is a process of its own, so that none hides another. They prepare (compile, draw, compare) side by side;
when all have, or after two thirds of the time, those that compile are timed one at a time, each in turn with the
uncompiled pipeline. What is not there when the time is up is a line that says so. Runs from a checkout, installed or
not.

Lines of the result: {"check", "case", "ok", …}. `psnr` is in dB against the uncompiled pipeline in the same type, 200
for equal images; `seconds` are medians of whole images; `compile_seconds` is what the first call took more than the
second one, while others compiled, too.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import json
import logging
import os
import queue
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", DIFFUSERS_VERBOSITY="error")
os.environ.update(DIFFUSION_ACCEL_AUTO="off", DIFFUSION_ACCEL_GRAPHS="off")

if importlib.util.find_spec("diffusion_accel") is None:  # not installed: its folders of the checkout as one package
    places = [str(ROOT / "diffusion_accel"), str(ROOT)]
    spec = importlib.util.spec_from_file_location(
        "diffusion_accel", ROOT / "diffusion_accel" / "__init__.py", submodule_search_locations=places
    )
    assert spec is not None and spec.loader is not None
    sys.modules["diffusion_accel"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["diffusion_accel"])

PROMPT = "red apple, 3d style"
LAST = 3.0  # seconds that are left for writing
#: name -> type of the pipeline, settings of `Compiled`
COMPILED: dict[str, tuple[str, dict[str, Any]]] = {
    "whole float32": ("float32", {}),
    "whole bfloat16": ("bfloat16", {}),
    "graphs float32": ("float32", {"mode": "reduce-overhead"}),
    "graphs bfloat16": ("bfloat16", {"mode": "reduce-overhead"}),
    "graphs float16": ("float16", {"mode": "reduce-overhead"}),
    "inside graphs float32": ("float32", {"mode": "reduce-overhead"}),  # with DeepCache
    "blocks float32": ("float32", {"blocks": True}),
    "blocks bfloat16": ("bfloat16", {"blocks": True}),
    "autocast bfloat16": ("float32", {"precision": "bfloat16", "mode": "reduce-overhead"}),
}


# ---------------------------------------------------------------------- what the checks share
class Warnings(logging.Handler):
    """Keeps what the toolkit warns of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one."""
        self.found.append(record.getMessage()[:300])


WARNED = Warnings()


def tell(check: str, case: str, **facts: Any) -> None:
    """One line of the result, with the warnings since the last one."""
    warned, WARNED.found = WARNED.found, []
    print(json.dumps({"check": check, "case": case} | facts | ({"warned": warned} if warned else {})), flush=True)


@contextlib.contextmanager
def case(check: str, name: str) -> Iterator[dict[str, Any]]:
    """What is filled in becomes a line, also if it fails."""
    facts: dict[str, Any] = {}
    try:
        yield facts
    except Exception as error:
        facts |= {"ok": False, "error": f"{type(error).__name__}: {error}"[:600]}
    tell(check, name, **facts)


def loaded(options: argparse.Namespace, dtype: str = "float32", **more: Any) -> Any:
    """The embedded pipeline with DPM++ on the device."""
    import diffusers
    import torch
    import transformers

    from diffusion_accel.pipelines.loading import load_pipeline
    from diffusion_accel.pipelines.schedulers import set_scheduler

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    torch.set_grad_enabled(False)
    logging.getLogger("diffusion_accel").addHandler(WARNED)
    pipe = load_pipeline("sticker", dtype=getattr(torch, dtype), **more).to(options.device)
    set_scheduler(pipe, "dpm++")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, steps: int, **more: Any) -> Any:
    """One image (1, C, H, W), float32 in 0 … 1, on the CPU."""
    import torch

    given = {"guidance_scale": 3.0, "height": 96, "width": 96, "num_inference_steps": steps, "output_type": "pt"}
    generator = torch.Generator("cpu").manual_seed(0)
    images = pipe(PROMPT, generator=generator, **given | more).images
    return torch.as_tensor(images).detach().float().cpu()


def near(expected: Any, images: Any) -> dict[str, Any]:
    """Whether images are the same bits, and how near they are."""
    import torch

    from diffusion_accel.measure.fidelity import psnr

    value = float(psnr(expected, images.nan_to_num()).clamp(max=200).min())
    return {"equal": torch.equal(expected, images), "psnr": round(value, 1), "finite": bool(images.isfinite().all())}


# ---------------------------------------------------------------------- compiled models
def compiled(name: str, options: argparse.Namespace) -> Callable[[float], None]:
    """Compile, compare with the uncompiled pipeline, and return what times it."""
    from diffusion_accel import Compiled, Reuse, accelerate
    from diffusion_accel.measure.timing import synchronise, timed
    from diffusion_accel.pipelines.schedulers import scheduler_for

    dtype, settings = COMPILED[name]
    pipe, steps = loaded(options, dtype), options.steps
    plan = "deepcache:3" if name.startswith("inside") else "tuned:balanced"
    solvers = {"plain": pipe.scheduler, "learned": scheduler_for(pipe, "learned")}
    features = {
        "compiled": Compiled(engine="inductor", **settings),
        "reuse": Reuse(plan=plan, stretch=True),
    }
    cases = {
        "eager": ("plain", ()),
        "reuse": ("plain", ("reuse",)),
        "compiled": ("plain", ("compiled",)),
        "compiled+reuse": ("plain", ("compiled", "reuse")),
        "learned": ("learned", ()),
        "compiled+learned": ("learned", ("compiled",)),
    }
    accelerate(pipe, *features.values())

    def image(key: str) -> Any:
        solver, active = cases[key]
        pipe.scheduler = solvers[solver]
        pipe.acceleration.disable()
        if active:
            pipe.acceleration.enable(*active)
        return draw(pipe, 8 if solver == "learned" else steps)

    expected = {}
    for key in ("eager", "reuse", "learned"):
        with case(name, key) as facts:
            expected[key] = image(key)
            facts |= near(expected["eager"], expected[key]) | {"same again": near(expected[key], image(key))["equal"]}
    for key, base in (("compiled", "eager"), ("compiled+reuse", "reuse"), ("compiled+learned", "learned")):
        with case(name, key) as facts:
            first, seconds = timed(functools.partial(image, key))
            second, again = timed(functools.partial(image, key))
            counters = pipe.acceleration.report().counters["compiled"]
            facts |= near(expected[base], first)
            facts |= {"same again": near(first, second)["equal"], "compile_seconds": round(seconds - again, 2)}
            facts |= {"counters": counters, "ok": facts["psnr"] > 35 and not counters["eager_calls"]}
    with case(name, "switched off") as facts:
        facts |= {"ok": near(expected["eager"], image("eager"))["equal"]}

    def times(budget: float) -> None:
        seconds: dict[str, list[float]] = {key: [] for key in cases}
        synchronise()
        ends = time.monotonic() + budget
        with case(name, "times") as facts:
            while time.monotonic() < ends and len(seconds["eager"]) < 30:
                for key in cases:
                    seconds[key].append(timed(functools.partial(image, key))[1])
            facts |= {"rounds": len(seconds["eager"]), "ok": True}
            facts["seconds"] = {key: round(statistics.median(values), 5) for key, values in seconds.items()}
            ratios = {k: [b / o for b, o in zip(seconds["eager"], v, strict=True)] for k, v in seconds.items()}
            facts["ratio"] = {key: round(statistics.median(values), 3) for key, values in ratios.items()}

    return times


# ---------------------------------------------------------------------- laws of the features
def laws(check: str, pipe: Any, feature: Any, steps: int, exact: bool = False, **more: Any) -> None:
    """Off is the plain image, a second call the first, detached the plain one; with `exact` on is, too."""
    import torch

    from diffusion_accel import accelerate

    with case(check, str(feature)[:120]) as facts:
        plain = draw(pipe, steps, **more)
        try:
            accelerate(pipe, feature)
            first, second = draw(pipe, steps, **more), draw(pipe, steps, **more)
            facts["counters"] = pipe.acceleration.report().counters[feature.name]
            pipe.acceleration.disable(feature.name)
            off = draw(pipe, steps, **more)
        finally:
            pipe.acceleration.remove()
        found = {"off": torch.equal(off, plain), "second": torch.equal(first, second)}
        found["detached"] = torch.equal(draw(pipe, steps, **more), plain)
        if first.shape == plain.shape:
            facts |= near(plain, first)
        facts |= {"shape": list(first.shape), "laws": found}
        facts["ok"] = all(found.values()) and (not exact or facts["equal"]) and bool(first.isfinite().all())


def plain(check: str, options: argparse.Namespace) -> None:
    """The machine, and whether the uncompiled pipeline itself repeats its images."""
    import diffusers
    import torch

    with case(check, "machine") as facts:
        facts |= {"torch": torch.__version__, "diffusers": diffusers.__version__, "python": sys.version.split()[0]}
        if options.device == "cuda":
            facts |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
            facts |= {"tf32 convolutions": torch.backends.cudnn.allow_tf32}
        facts["ok"] = True
    for dtype in ("float32", "bfloat16", "float16"):
        with case(check, f"plain twice {dtype}") as facts:
            pipe = loaded(options, dtype)
            first = draw(pipe, options.steps)
            facts |= near(first, draw(pipe, options.steps))
            facts["ok"] = facts["equal"] and facts["finite"]
    with case(check, "the CPU's image") as facts:
        here = argparse.Namespace(device="cpu")
        facts |= near(draw(loaded(here), options.steps), draw(loaded(options), options.steps))
        facts["ok"] = facts["psnr"] > 40


def reuse(check: str, options: argparse.Namespace) -> None:
    """Plans that hold, forecast, and keep features inside; guidance; the encoder; what `auto` finds."""
    from diffusion_accel import EncoderReuse, Reuse
    from diffusion_accel.pipelines.schedulers import set_scheduler

    pipe = loaded(options)
    for settings in (
        {"plan": "full"}, {"plan": "hold:2"}, {"plan": "deepcache:3"}, {"plan": "faster-diffusion"},
        {"plan": "tuned:balanced", "stretch": True}, {"plan": "tuned:fast", "stretch": True},
        {"plan": "full", "guidance": "reuse:2"}, {"plan": "hold:2", "guidance": "interval:0.2-0.8"}, {"plan": "auto"},
    ):  # fmt: skip
        laws(check, pipe, Reuse(**settings), options.steps, settings == {"plan": "full"})
    laws(check, pipe, EncoderReuse(), options.steps)
    laws(check, loaded(options, "bfloat16"), Reuse(plan="deepcache:3"), options.steps)
    with case(check, "learned, 8 evaluations") as facts:
        set_scheduler(pipe, "learned")
        first = draw(pipe, 8)
        facts |= near(first, draw(pipe, 8))
        facts["ok"] = facts["equal"] and facts["finite"]


def transparency(check: str, options: argparse.Namespace) -> None:
    """Images with alpha, in three types, and together with held steps."""
    from diffusion_accel import LatentTransparency, Reuse, accelerate

    for dtype in ("float32", "bfloat16", "float16"):
        laws(check, loaded(options, dtype), LatentTransparency(), options.steps)
    pipe = loaded(options)
    laws(check, pipe, LatentTransparency.neutral(), options.steps, True)
    accelerate(pipe, LatentTransparency())
    with case(check, "with reuse") as facts:
        base = draw(pipe, options.steps)
        accelerate(pipe, Reuse(plan="tuned:balanced", stretch=True))
        facts |= near(base, draw(pipe, options.steps)) | {"channels": base.shape[1]}
        facts["ok"] = facts["psnr"] > 30 and base.shape[1] == 4


def quantized(check: str, options: argparse.Namespace) -> None:
    """Checkpoints made on the device, read back, and computed by every runtime."""
    from diffusers import UNet2DConditionModel

    from diffusion_accel import Reuse
    from diffusion_accel.measure.sampler import Sampler
    from diffusion_accel.quant.model import computed_with, set_runtime
    from diffusion_accel.quant.ptq.ranges import RangeSettings
    from diffusion_accel.quant.ptq.run import quantize_denoiser
    from diffusion_accel.quant.ptq.settings import QuantizeSettings

    for bits in (8, 4):
        name, pipe = f"W{bits}A8", loaded(options)
        with tempfile.TemporaryDirectory() as place, case(check, f"{name} made and read") as facts:
            full = draw(pipe, options.steps)
            settings = QuantizeSettings(
                weight_bits=bits, buckets=2, rounding=None, finetune=None, ranges=RangeSettings(rows=2, chunk=2)
            )
            call = {"guidance_scale": 3.0, "height": 96, "width": 96}
            run = quantize_denoiser(Sampler(pipe, (PROMPT,) * 2, 3, options=call), settings, Path(place) / "work")
            made = draw(pipe, options.steps)
            run.model.save_pretrained(Path(place) / "unet")
            pipe.unet = UNet2DConditionModel.from_pretrained(Path(place) / "unet").to(options.device)
            set_runtime(pipe, "dequantize")
            facts |= near(full, draw(pipe, options.steps)) | {"as made": near(made, draw(pipe, options.steps))}
            facts["ok"] = facts["psnr"] > 15
        expected = None
        for runtime in ("simulated", "integer", "auto", "dequantize"):
            with case(check, f"{name} {runtime}") as facts:
                set_runtime(pipe, runtime)
                image = draw(pipe, options.steps)
                expected = image if expected is None else expected
                facts |= near(expected, image) | {"same again": near(image, draw(pipe, options.steps))["equal"]}
                facts |= {"computed": computed_with(pipe), "ok": facts["same again"] and facts["finite"]}
        laws(check, pipe, Reuse(plan="hold:2"), options.steps)


def routing(check: str, options: argparse.Namespace) -> None:
    """Task routing, neutral and with the paper's settings."""
    from diffusion_accel import TaskRouting

    pipe = loaded(options)
    laws(check, pipe, TaskRouting.neutral(), options.steps, True)
    laws(check, pipe, TaskRouting(untrained=True), options.steps)


def controlnet(check: str, options: argparse.Namespace) -> None:
    """A ControlNet with random weights beside the U-Net: in its own stream, on the CPU and on another device."""
    import torch
    from diffusers import ControlNetModel

    from diffusion_accel import ControlNetParallel

    torch.manual_seed(0)
    net = ControlNetModel.from_unet(loaded(options).unet, conditioning_channels=3)
    for parameter in net.parameters():
        if parameter.dim() > 1 and not parameter.any():
            parameter.normal_(std=0.02)
    with tempfile.TemporaryDirectory() as place:
        net.save_pretrained(place)
        pipe = loaded(options, controlnet=place)
    given = {"image": torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))}
    laws(check, pipe, ControlNetParallel(), options.steps, True, **given)
    laws(check, pipe, ControlNetParallel(device="cpu"), options.steps, options.device == "cpu", **given)
    if options.device == "cuda" and torch.cuda.device_count() > 1:
        laws(check, pipe, ControlNetParallel(device="cuda:1"), options.steps, True, **given)


def alone(check: str, options: argparse.Namespace) -> None:
    """Patch parallelism in a job of one process, whose messages NCCL would carry."""
    import torch
    import torch.distributed as dist

    from diffusion_accel import PatchParallel

    with case(check, "one process") as facts, tempfile.TemporaryDirectory() as place:
        kind = "nccl" if options.device == "cuda" else "gloo"
        dist.init_process_group(kind, init_method=f"file://{place}/store", rank=0, world_size=1)
        one = torch.ones(1, device=options.device)
        dist.all_reduce(one)
        facts |= {"messages": kind, "ok": float(one) == 1}
        laws(check, loaded(options), PatchParallel(), options.steps, True)
        dist.destroy_process_group()


LAWS = {
    "plain": plain, "reuse": reuse, "transparency": transparency, "quantized": quantized, "routing": routing,
    "patch parallel": alone, "controlnet": controlnet,
}  # fmt: skip


def child(options: argparse.Namespace) -> int:
    """One check. A check with times says that it is ready, and waits until it is told how long it may take."""
    import torch

    if options.device == "cpu":
        torch.set_num_threads(1)
    name = options.check
    if name in LAWS:
        try:
            LAWS[name](name, options)
        except Exception as error:
            tell(name, "all", ok=False, error=f"{type(error).__name__}: {error}"[:600])
        return 0
    try:
        times = compiled(name, options)
    except Exception as error:
        tell(name, "all", ok=False, error=f"{type(error).__name__}: {error}"[:600])
        return 0
    print("ready", flush=True)
    times(float(sys.stdin.readline()))
    return 0


# ---------------------------------------------------------------------- the run
class Job:
    """A check in a process of its own, with what it starts."""

    def __init__(self, name: str, options: argparse.Namespace, heard: queue.Queue[tuple[Job, str]]) -> None:
        self.name, self.cases = name, 0
        words = [sys.executable, __file__, "--check", name, "--device", options.device]
        words += ["--steps", str(options.steps)]
        environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": str(options.threads), "OMP_NUM_THREADS": "1"}
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - read at its end
        self.process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, env=environment,
            start_new_session=True,
        )  # fmt: skip
        threading.Thread(target=self._listen, args=(heard,), daemon=True).start()

    def _listen(self, heard: queue.Queue[tuple[Job, str]]) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            heard.put((self, line.strip()))
        self.process.wait()
        heard.put((self, ""))

    def say(self, text: str) -> None:
        """A line to it."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.write(text + "\n")
            self.process.stdin.flush()

    def end(self) -> str:
        """Kill it with what it has started; the last of what it wrote on its standard error."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.errors.seek(0)
        return self.errors.read()[-600:].strip()


def supervise(options: argparse.Namespace) -> int:
    """Run all checks, the timed ones one at a time when no other is at work; 1 if something is not right."""
    began = time.monotonic()
    ends = began + options.seconds - LAST
    names = [name for name in [*COMPILED, *LAWS] if any(part in name for part in options.only or [""])]
    heard: queue.Queue[tuple[Job, str]] = queue.Queue()
    waiting, working, ready, bad = list(names), dict[Job, None](), list[Job](), 0

    with options.out.open("w", encoding="utf-8") as out:

        def write(row: dict[str, Any]) -> None:
            nonlocal bad
            bad += row.get("ok") is False
            out.write(json.dumps(row) + "\n")
            out.flush()
            short = {k: row[k] for k in ("psnr", "compile_seconds", "seconds", "error") if k in row}
            state = {True: "ok", False: "NOT OK", None: "-"}[row.get("ok")]
            print(f"{time.monotonic() - began:6.1f} {row['check']}: {row['case']}: {state} {short}", flush=True)

        def lost(job: Job, why: str) -> None:
            write({"check": job.name, "case": "all", "ok": False, "error": f"{why}; {job.end()}"})

        timing: Job | None = None
        while (waiting or working or ready or timing) and time.monotonic() < ends:
            while waiting and timing is None and len(working) + len(ready) < options.jobs:
                working[Job(waiting.pop(0), options, heard)] = None
            quiet = not working and (not waiting or options.jobs == len(ready))
            if ready and timing is None and (quiet or time.monotonic() - began > 0.65 * options.seconds):
                timing = ready.pop(0)
                timing.say(str(max(1.0, min(10.0, (ends - time.monotonic() - 1) / (1 + len(ready))))))
            try:
                job, line = heard.get(timeout=max(0.05, min(1.0, ends - time.monotonic())))
            except queue.Empty:
                continue
            if line == "ready":
                working.pop(job, None)
                ready.append(job)
            elif line.startswith("{"):
                write(json.loads(line))
            elif not line:
                if job.process.returncode:
                    lost(job, f"ended with {job.process.returncode}")
                job.end()
                working.pop(job, None)
                timing = None if timing is job else timing
        for job in [*working, *ready, *filter(None, [timing])]:
            lost(job, f"not finished after {time.monotonic() - began:.0f} s")
        for name in waiting:
            write({"check": name, "case": "all", "ok": False, "error": "not begun"})
    print(f"{bad} not right; {time.monotonic() - began:.0f} s; {options.out}")
    return 1 if bad else 0


def main() -> int:
    """All checks, or one in its own process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("cuda.jsonl"), help="JSON lines, written as they come")
    parser.add_argument("--seconds", type=float, default=90, help="when it ends, whatever is missing then")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="4 steps instead of 20")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only", nargs="*", help="checks with one of these texts in their names")
    parser.add_argument("--jobs", type=int, default=0, help="checks at once (default: by CPUs)")
    parser.add_argument("--threads", type=int, default=2, help="of each that compiles")
    parser.add_argument("--check", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.steps = 4 if options.quick else options.steps
    options.jobs = options.jobs or max(1, min(14, (os.cpu_count() or 1) - 2))
    return child(options) if options.check else supervise(options)


if __name__ == "__main__":
    sys.exit(main())
