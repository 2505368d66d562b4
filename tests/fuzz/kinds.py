"""Every kind of file that the product reads: a good one, and how it is read."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import os
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
import zoo
from diffusers import ControlNetModel
from model_folder import write_folder
from PIL import Image
from safetensors.torch import save_file
from solvers import odd
from transparency_weights import write_weights

from diffusion_accel import accelerate
from diffusion_accel.cli.inspect import inspect
from diffusion_accel.cli.metadata import metadata
from diffusion_accel.cli.prompts import read_jobs
from diffusion_accel.cli.settings import merge, read_config
from diffusion_accel.compiled import Compiled
from diffusion_accel.finite import finite
from diffusion_accel.image_files import read_metadata, save_image
from diffusion_accel.measure.sampler import Sampler
from diffusion_accel.model_files.names import ModelSource
from diffusion_accel.pipelines.loading import load_controlnet, load_lora, load_pipeline
from diffusion_accel.pipelines.quantizers import check_quantize, load_quantized
from diffusion_accel.pipelines.recipes import recipe_of, restore
from diffusion_accel.pipelines.schedulers import check_steps, scheduler_for
from diffusion_accel.quant.ptq.run import quantize_denoiser
from diffusion_accel.quant.ptq.settings import QuantizeSettings
from diffusion_accel.reuse import Reuse
from diffusion_accel.schedulers.measured import describe
from diffusion_accel.training.state import load_average, load_state, read_counters, save_state
from diffusion_accel.transparency.latent_transparency import LatentTransparency

from . import mutate
from .harness import Kind

UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def quiet() -> None:
    """Keep the libraries' own words off the terminal."""
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity(library.utils.logging.CRITICAL)
        library.utils.logging.disable_progress_bar()
    os.environ["HF_HUB_OFFLINE"] = "1"


def digest(*tensors: torch.Tensor) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def of_model(model: Any) -> str:
    return digest(*(value for _, value in sorted(model.state_dict().items())))


def draw(pipe: Any, call: dict[str, Any], steps: int = 1) -> torch.Tensor:
    return zoo.run(pipe, call, steps)


def finite_or_said(value: Any, logged: list[str]) -> str | None:
    """What comes out is a number, or there is a warning that it is none."""
    image = value[-1]
    return None if finite(image) or any("not finite" in line for line in logged) else "an image of NaN, silently"


class Same(tuple[Any, ...]):
    """Values that are compared by tensors' bits."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and [_bits(v) for v in self] == [_bits(v) for v in other]

    __hash__ = None  # type: ignore[assignment]


def _bits(value: Any) -> Any:
    return digest(value) if isinstance(value, torch.Tensor) else value


@contextlib.contextmanager
def printed() -> Iterator[io.StringIO]:
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        yield text


# ---------------------------------------------------------------------- quantized checkpoints
@functools.cache
def _unet2d() -> tuple[Any, dict[str, Any], Any]:
    pipe, call = zoo.unet2d()
    pipe.set_progress_bar_config(disable=True)
    return pipe, call, pipe.unet


def make_checkpoint(folder: Path) -> None:
    pipe, _ = zoo.unet2d()
    pipe.set_progress_bar_config(disable=True)
    settings = QuantizeSettings(weight_bits=4, activation_bits=4, buckets=2, rounding=None, finetune=None)
    quantize_denoiser(Sampler(pipe, ("",) * 4, 2, batch=2), settings, folder.parent / "work")
    pipe.unet.save_pretrained(folder)


def read_checkpoint(folder: Path) -> Any:
    pipe, call, own = _unet2d()
    check_quantize(str(folder))
    with printed():
        inspect(str(folder), as_json=True)
        inspect(str(folder))
    try:
        load_pipeline_quantized(pipe, folder)
        return Same((of_model(pipe.unet), draw(pipe, call)))
    finally:
        pipe.register_modules(unet=own)


def load_pipeline_quantized(pipe: Any, folder: Path) -> None:
    from diffusion_accel.pipelines.loading import _load

    _load(str(folder), lambda: load_quantized(pipe, str(folder), torch.float32))
    from diffusion_accel.quant.model import set_runtime

    set_runtime(pipe, "simulated")


# ---------------------------------------------------------------------- plans
@functools.cache
def _sd() -> tuple[Any, dict[str, Any]]:
    return zoo.sd()


def make_plan(folder: Path) -> None:
    from diffusion_accel.reuse.conditions import conditions
    from diffusion_accel.reuse.plan import Plan
    from diffusion_accel.reuse.plan_file import TunedPlan

    pipe, _ = _sd()
    plan = Plan.parse(
        "full hold:sample=1.1;0.02 full:epsilon=1,0.1;0.01 shallow:1 full/none hold=1.5,-0.5/reuse".split()
    )
    found = {**conditions(pipe, len(plan)), "guidance_scale": 5.0, "height": 16, "width": 16}
    TunedPlan(plan, found, {"psnr": 30.0, "flops": 0.5}, {"seed": 0}).save(folder / "plan.json")


def make_family(folder: Path) -> None:
    from diffusion_accel.reuse.conditions import conditions
    from diffusion_accel.reuse.plan import Plan
    from diffusion_accel.reuse.plan_family import PlanFamily
    from diffusion_accel.reuse.plan_file import TunedPlan

    found, plans = conditions(_sd()[0], 6), []
    for speed, tokens in (
        (2.0, "full hold@1 full shallow:1 full hold"),
        (3.0, "full hold hold full hold=1.5,-0.5 hold"),
    ):
        measured = {"time_ratio": speed, "psnr_median": 50.0, "psnr_worst_decile": 45.0, "psnr_floor": None}
        plans.append(TunedPlan(Plan.parse(tokens), found, measured))
    solvers = {"five": {"config": {"timesteps": [999, 500.5]}, "measured": {"psnr_median": 44.0}}}
    PlanFamily.of(plans, ["slow"], solvers, {"seed": 0}).save(folder / "plan.json")


def read_plan(folder: Path, **wish: float) -> Any:
    pipe, call = _sd()
    try:
        accelerate(pipe, Reuse(plan=str(folder / "plan.json"), **wish))
        with printed():
            inspect(str(folder / "plan.json"))
            return Same((str(pipe.acceleration.features["reuse"]), draw(pipe, call, 6)))
    finally:
        if hasattr(pipe, "acceleration"):
            pipe.acceleration.remove()


# ---------------------------------------------------------------------- recipes
def make_recipe(folder: Path) -> None:
    make_family(folder)
    pipe, _ = zoo.sd()
    pipe.scheduler = odd(pipe.scheduler, 6, channels=4)
    accelerate(pipe, Reuse(plan=str(folder / "plan.json"), speedup=2.5), Compiled(engine="eager"))
    pipe.acceleration.disable("compiled")
    pipe.acceleration.save(folder, call={"steps": 6, "guidance_scale": 3.0}, measured={"psnr": 30.0})
    (folder / "plan.json").unlink()


def read_recipe(folder: Path) -> Any:
    pipe, call = _sd()
    before = pipe.scheduler
    try:
        source = ModelSource("hub", "owner/model", "owner/model")
        recipe = recipe_of(source, folder)
        assert recipe is not None
        restore(pipe, recipe, source)
        accelerate(pipe, *recipe.features.values())
        return Same((str(recipe.call), str(pipe.acceleration.features), draw(pipe, call, 6)))
    finally:
        pipe.scheduler = before
        if hasattr(pipe, "acceleration"):
            pipe.acceleration.remove()


# ---------------------------------------------------------------------- learned solvers
def make_solver(folder: Path) -> None:
    pipe, _ = _sd()
    solver = odd(pipe.scheduler, 4, channels=4, start={"2": ["1;0.5"]})
    solver.register_to_config(made_for={**describe(pipe), "guidance_scale": [1.0, 6.0], "height_width": [[16, 16]]})
    solver.save_pretrained(folder)


def read_solver(folder: Path) -> Any:
    pipe, call = _sd()
    before = pipe.scheduler
    try:
        check_steps(str(folder), ModelSource("hub", "owner/model", "owner/model"), 4)
        pipe.scheduler = scheduler_for(pipe, str(folder))
        accelerate(pipe)
        return Same((draw(pipe, call, 4),))
    finally:
        pipe.scheduler = before
        if hasattr(pipe, "acceleration"):
            pipe.acceleration.remove()


# ---------------------------------------------------------------------- prompts and configurations
def make_prompts(folder: Path) -> None:
    (folder / "a.txt").write_text("red apple\na green pear, 3d style\n\nblue\n")
    job = {"prompt": "red", "negative_prompt": "blue", "seed": 3, "steps": 20, "guidance_scale": 3.5, "width": 96}
    lines = [job, {"prompt": "a"}, {**job, "height": 64, "num_images": 2, "output": "x.png"}]
    (folder / "b.jsonl").write_text("\n".join(map(json.dumps, lines)))


def read_prompts(folder: Path) -> Any:
    return [read_jobs([], str(folder / name)) for name in ("a.txt", "b.jsonl")]


def make_config(folder: Path) -> None:
    values = {
        "steps": 20,
        "guidance-scale": 3.5,
        "seed": 7,
        "scheduler": "ddim",
        "width": 96,
        "lora": [],
        "dtype": "float32",
    }
    values |= {"negative_prompt": "blue", "num_images": 2, "output": "out", "metadata": True}
    values |= {"transparent": False, "reuse": "hold:2", "offload": "none", "lora": [], "dtype": "float32"}
    (folder / "c.json").write_text(json.dumps(values))
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    (folder / "c.toml").write_text("\n".join([*lines, "[encoder-reuse]", 'schedule = "uniform:4"', ""]))


def read_settings(folder: Path) -> Any:
    found = []
    for name in ("c.json", "c.toml"):
        values = read_config(str(folder / name))
        values = {k: v for k, v in values.items() if k not in ("prompt", "prompts_file")}
        found.append(merge({"model": "sticker"}, values))
    return found


# ---------------------------------------------------------------------- metadata of images
DATA = {
    "prompt": "red apple",
    "seed": 3,
    "settings": {"steps": 20, "lora": ["x.safetensors:0.5"]},
    "report": {"s": 1.5},
}
TEXT = "red apple\nNegative prompt: blue\nSteps: 20, Sampler: DDIM, CFG scale: 3.0, Seed: 3, Size: 96x96"


def make_images(folder: Path) -> None:
    for suffix in (".png", ".webp", ".jpg"):
        save_image(Image.new("RGB", (8, 8), (200, 10, 10)), folder / f"a{suffix}", TEXT, DATA)


def image_mutant(name: str, data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    """A whole image with odd metadata, or broken bytes."""
    if rng.random() < 0.3:
        return mutate.bytes_mutant(data, rng, others)
    text = TEXT if rng.random() < 0.3 else mutate.text_mutant(TEXT.encode(), rng, others).decode("utf-8", "replace")
    content: Any = mutate.json_value_mutant(DATA, rng)
    image, out = Image.new("RGB", (8, 8)), io.BytesIO()
    if name.endswith(".png"):
        from PIL.PngImagePlugin import PngInfo

        info = PngInfo()
        for key, value in (("parameters", text), ("diffusion_accel", content), ("Comment", rng.choice(mutate.TEXTS))):
            with contextlib.suppress(ValueError, UnicodeError):
                (info.add_itxt if rng.random() < 0.7 else info.add_text)(key, value)
        with contextlib.suppress(ValueError, UnicodeError):
            image.save(out, "PNG", pnginfo=info)
        return out.getvalue()
    exif = Image.Exif()
    both = f'{{"parameters": {json.dumps(text)}, "diffusion_accel": {content}}}'
    code = rng.choice(("utf-16-be", "utf-16-le", "utf-8"))
    comment = rng.choice((both, content, text)).encode(code, "surrogatepass")[: rng.choice((60_000, 60_000, 33))]
    exif.get_ifd(0x8769)[0x9286] = rng.choice((b"UNICODE\0", b"ASCII\0\0\0", bytes(8), b"")) + comment
    with contextlib.suppress(ValueError, OSError):
        image.save(out, "WEBP" if name.endswith(".webp") else "JPEG", exif=exif.tobytes())
    return out.getvalue()


def read_images(folder: Path) -> Any:
    found = []
    for suffix in (".png", ".webp", ".jpg"):
        with printed() as text:
            metadata(str(folder / f"a{suffix}"))
            metadata(str(folder / f"a{suffix}"), as_json=True)
        found.append((read_metadata(str(folder / f"a{suffix}")), text.getvalue()))
    return found


def nothing_unprintable(value: Any, logged: list[str]) -> str | None:
    for _, text in value:
        if spot := UNPRINTABLE.search(text):
            return f"{spot[0]!r} reaches the terminal"
    return None


# ---------------------------------------------------------------------- transparency, training
def make_transparency(folder: Path) -> None:
    write_weights(folder, _sd()[0].unet)


def read_transparency(folder: Path) -> Any:
    pipe, call = _sd()
    try:
        accelerate(pipe, LatentTransparency(weights=str(folder), views=1))
        out = draw(pipe, {**call, "output_type": "pt"})
        return Same((out, out))
    finally:
        if hasattr(pipe, "acceleration"):
            pipe.acceleration.remove()


def _training() -> tuple[Any, list[torch.Tensor], torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    average = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    return model, average, optimizer


def make_training(folder: Path) -> None:
    counters = {"step": 12, "seed": 3, "samples": 96, "settings": {"lr": 0.001, "batch": 8}, "losses": [0.5, 0.25]}
    save_state(folder, *_training(), counters)


def read_training(folder: Path) -> Any:
    model, average, optimizer = _training()
    counters = load_state(folder, model, average, optimizer)
    assert counters == read_counters(folder)
    load_average(folder, model, "train")
    state = optimizer.state_dict()["state"]
    values = [*average, *model.state_dict().values(), *(v for moments in state.values() for v in moments.values())]
    return Same((json.dumps([counters, optimizer.state_dict()["param_groups"]], default=str), *values))


def all_finite(value: Any, logged: list[str]) -> str | None:
    tensors = [v for v in value if isinstance(v, torch.Tensor)]
    return None if all(map(finite, tensors)) else "numbers that are none, silently"


# ---------------------------------------------------------------------- model folders and what is put on them
def read_folder(folder: Path) -> Any:
    pipe = accelerate(load_pipeline(str(folder)))
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    image = pipe("red apple", num_inference_steps=2, generator=generator, output_type="pt").images
    return Same((image,))


def make_controlnet(folder: Path) -> None:
    ControlNetModel.from_unet(zoo.unet(), conditioning_channels=3).save_pretrained(folder)


def read_controlnet(folder: Path) -> Any:
    net = load_controlnet(str(folder), torch.float32)
    return Same((json.dumps(dict(net.config), default=str), *net.state_dict().values()))


def make_lora(folder: Path) -> None:
    key = "unet.down_blocks.1.attentions.0.transformer_blocks.0"
    tensors = {}
    for number, layer in enumerate(("attn1.to_q", "attn2.to_v")):
        width = 32 if number == 0 else zoo.DIM
        tensors[f"{key}.{layer}.lora_A.weight"] = zoo.rand(2, width, seed=number)
        tensors[f"{key}.{layer}.lora_B.weight"] = zoo.rand(32, 2, seed=number + 5)
    save_file(tensors, folder / "lora.safetensors", {"format": "pt"})


def read_lora(folder: Path) -> Any:
    pipe, _ = _sd()
    try:
        load_lora(pipe, str(folder / "lora.safetensors"), "one")
        return Same(v.clone() for n, v in sorted(pipe.unet.state_dict().items()) if "lora" in n)
    finally:
        pipe.unload_lora_weights()


KINDS: dict[str, Kind] = {
    "checkpoint": Kind(make_checkpoint, read_checkpoint, exact=True, count=30),
    "plan": Kind(make_plan, read_plan, judge=finite_or_said, count=75),
    "family": Kind(make_family, functools.partial(read_plan, speedup=2.5), judge=finite_or_said, count=50),
    "recipe": Kind(make_recipe, read_recipe, judge=finite_or_said, count=50),
    "solver": Kind(make_solver, read_solver, judge=finite_or_said, count=50),
    "prompts": Kind(make_prompts, read_prompts),
    "config": Kind(make_config, read_settings),
    "metadata": Kind(make_images, read_images, mutant=image_mutant, judge=nothing_unprintable),
    "transparency": Kind(make_transparency, read_transparency, judge=finite_or_said, count=50),
    "training": Kind(make_training, read_training, judge=all_finite),
    "folder": Kind(write_folder, read_folder, judge=finite_or_said, count=30),
    "controlnet": Kind(make_controlnet, read_controlnet, judge=all_finite, count=30),
    "lora": Kind(make_lora, read_lora, judge=all_finite, count=50),
}
