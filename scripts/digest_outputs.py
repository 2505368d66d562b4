"""Digests of what every feature, plan and command makes: shows that two states of the code make the same bytes.

    python scripts/digest_outputs.py -o before.json            # in the one state
    python scripts/digest_outputs.py --against before.json     # in the other: exit code 1 if a case differs or fails

Only public names and commands are used, so that the same file runs in both. Compare on one machine, with the same
packages: other processors round differently. All of it takes about five minutes on one idle core; --only picks cases.

Left out: transparency in layers or with conditions, which needs weights of SD 1.5 or SDXL; a quantized model with
--runtime auto, which picks kernels by their times; and whatever is a time or is made of times. The plan of `tune` does
depend on times, but its speed-up lies between those of two and of three full steps: repeat it if it alone differs.
"""

from __future__ import annotations

import argparse
import atexit
import functools
import hashlib
import inspect
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from diffusion_accel import EncoderReuse, LatentTransparency, PatchParallel, Reuse, TaskRouting, accelerate
from diffusion_accel.pipelines import AcceleratedPipeline

PROMPT = "red apple, 3d style"
# of JSON: times, what follows from times, versions and places
DROPPED = frozenset(
    "seconds time_ratio predicted_time_ratio ratio picked peak peak_mib machine torch python versions version made_by "
    "path file folder _name_or_path _diffusers_version Version".split()
)
RENAMED = {"p": "neighbour_fraction"}  # fields that had another name: both states say the new one
PLANS = """full hold:2 hold:3@0 hold:2@1 hold:3@2 hold:2@3 hold:2,epsilon hold:3,sample hold:3,epsilon@1 deepcache:3
    deepcache:3,1 deepcache:2@1 deepcache-pow:2,1,1.4 shallow:2,1 shallow:3,4@1 uniform:3 uniform:3@2 faster-diffusion
    faster-diffusion@1 tuned:quality tuned:balanced tuned:fast tuned:ddim-quality tuned:ddim-balanced tuned:ddim-fast
    """.split()
GUIDANCE = [Reuse(plan=p, guidance=g) for p in PLANS[:18:3] for g in ("reuse:2", "reuse:3", "interval:0.2-0.8")]
STEPS = [
    "steps:full hold@1 full/reuse hold:sample=0.9 full hold=1.2,-0.2 full/none hold:epsilon full hold",
    "steps:full decoder decoder@1 full shallow:2 full shallow:1@1 shallow:2 full/reuse hold",
]
SCHEDULES = ["uniform:2", "paper", "all", "if-stage-1", "if-stage-2", "if-stage-3", (0, 1, 5)]
ROUTING = TaskRouting(beta=0.5, untrained=True)
FEATURES: list[tuple[Any, ...]] = [
    (), (PatchParallel(mode="sync"),), (ROUTING,), (TaskRouting(beta=0.6, alpha=2.0, kind="random", untrained=True),),
    (EncoderReuse(),), (EncoderReuse(batch_decoder=False),), (EncoderReuse(prior_noise=0.003),),
    *((EncoderReuse(schedule=s),) for s in SCHEDULES), *((Reuse(plan=plan, stretch=True),) for plan in PLANS),
    *((Reuse(plan=plan, stretch=True),) for plan in STEPS), *((reuse,) for reuse in GUIDANCE),
    (Reuse(plan="uniform:3", batch_decoder=False),),
    *((LatentTransparency(views=views, refine=2),) for views in (0, 1, 4, 8)),
    (LatentTransparency(strength=0.5, until=0.5),), (LatentTransparency(), Reuse(plan="deepcache:2")),
    (LatentTransparency(), EncoderReuse()), (LatentTransparency(), ROUTING), (ROUTING, EncoderReuse()),
    (ROUTING, Reuse(plan="uniform:2@1")), (PatchParallel(mode="sync"), Reuse()),
]  # fmt: skip
TUNED = {"quality": 20, "balanced": 20, "fast": 20, "ddim-quality": 50, "ddim-balanced": 50, "ddim-fast": 50}


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal noise, the same every time."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# the settings of denoisers
BLOCKS = {
    "block_out_channels": (16, 32), "layers_per_block": 1, "cross_attention_dim": 16, "attention_head_dim": 4,
    "norm_num_groups": 8, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "in_channels": 4,
}  # fmt: skip
UNET = BLOCKS | {"sample_size": 8, "out_channels": 4, "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
FLUX = {
    "in_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
    "joint_attention_dim": 16, "pooled_projection_dim": 16, "axes_dims_rope": (4, 4, 8),
}  # fmt: skip
COGVIDEOX = {
    "num_attention_heads": 4, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4, "time_embed_dim": 2,
    "text_embed_dim": 16, "num_layers": 2, "sample_width": 4, "sample_height": 4, "sample_frames": 9, "patch_size": 2,
    "temporal_compression_ratio": 4, "max_text_seq_length": 6,
}  # fmt: skip
GUIDED = {"negative_prompt_embeds": rand(1, 6, 16, seed=2), "guidance_scale": 5.0}
IMAGE = GUIDED | {"image": rand(1, 3, 16, 16).clamp(-1, 1)}
VIDEO = GUIDED | {"height": 32, "width": 32, "num_frames": 9}
POOLED = {"pooled_prompt_embeds": rand(1, 16, seed=3), "height": 16, "width": 16}
CACHES = "first-block:0.5 taylorseer:3,1 mag:0.5 pab:2"
# pipelines with random weights: classes of denoiser and scheduler, settings, arguments of a call, plans
DDIM = ("UNet2DConditionModel", "DDIMScheduler")
ON_UNET = "full hold:2@1 deepcache:2 shallow:3,2@1 uniform:2"
TINY: dict[str, tuple[tuple[str, str], dict[str, Any], dict[str, Any], str]] = {
    "StableDiffusion": (DDIM, UNET, GUIDED, ON_UNET),
    "StableDiffusionImg2Img": (DDIM, UNET, IMAGE | {"strength": 0.7}, ON_UNET),
    "StableDiffusionInpaint": (DDIM, UNET | {"in_channels": 9}, IMAGE | {"mask_image": torch.eye(16)}, ON_UNET),
    "StableDiffusionControlNet": (DDIM, UNET, IMAGE, ON_UNET),
    "Flux": (
        ("FluxTransformer2DModel", "FlowMatchEulerDiscreteScheduler"), FLUX, POOLED,
        f"full {CACHES} hold:2 hold:2,sample shallow:2,2 deepcache:3@1",
    ),
    "CogVideoX": (
        ("CogVideoXTransformer3DModel", "CogVideoXDDIMScheduler"), COGVIDEOX, VIDEO,
        "full faster-cache:2,3 pab:2 shallow:2,1 hold:2@1",
    ),
}  # fmt: skip
# `generate`, which writes into the folder out; a prompt and a seed come before
GENERATE = {
    "plain": '"panda, flat style" --num-images 2 --negative-prompt blurred', "webp": "-o out/a.webp",
    "jpg, reuse": "--reuse tuned:fast -o out/a.jpg --steps 20", "dtype": "--no-metadata --dtype bfloat16",
    "encoder reuse, compare": "--encoder-reuse schedule=paper,batch_decoder=false --scheduler euler --compare",
    "task routing": "--task-routing beta=0.5,untrained=true", "reuse, compare": "--reuse hold:2 --compare",
    "transparent": "--transparent views=4 --preview checkerboard --premultiplied",
    "transparent, compare, reuse": "--transparent --reuse hold:2 --compare -o out/a.png",
    "image": "--image given.png --strength 0.6", "image, RGBA": "--transparent refine=2 --image given.png",
    "prompts file": "--prompts-file prompts.jsonl --config config.toml",
    "controlnet": "--controlnet controlnet --control-image given.png",
    "2 processes, displaced": "--patch-parallel ranks=2,mode=displaced,warmup=1",
    "2 processes, partial": "--patch-parallel ranks=2,mode=partial,warmup=1,p=0.5,group_norm=sync",
    "2 processes, naive": "--patch-parallel ranks=2,mode=naive,warmup=0",
    "2 processes, branches": "--patch-parallel ranks=2,mode=sync,cfg_parallel=true --reuse hold:2",
    "2 processes, launched": "--patch-parallel mode=sync",
    "quantized, dequantize": "--quantize w4a8 --runtime dequantize --low-memory",
    "quantized, integer": "--quantize w4a8 --runtime integer --reuse hold:2",
    "quantized, simulated": "--quantize w4a8 --runtime simulated",
}  # fmt: skip
QUANTIZE = "--count 2 --steps 2 --buckets 2 --batch 2 --epochs 1 --time-epochs 1 --iterations 2 --report 0 --seed 1 -q"
JOB = "--size 32 --steps 3 --batch 4 --fp32 --threads 1 --grid-every 0 --heldout 0.2 --data data"
UNET_TASKS = "--prediction epsilon --task-clusters 2 --task-loss uw"
DIT_TASKS = "--kind classes --task-routing --immiscible knn:2 --min-snr 5"
# other commands, and what they write (or print, as JSON)
COMMANDS = {
    "quantize w4a8": (f"quantize --bits w4a8 -o w4a8 {QUANTIZE}", "w4a8"),
    "quantize w8a8": (f"quantize --bits w8a8 -o w8a8 --rounding nearest --finetune none {QUANTIZE}", "w8a8"),
    "inspect": ("inspect w4a8 --json", ""), "models": ("models --json", ""), "features": ("features --json", ""),
    "cutout": ("cutout given.png --refine 4 -o cutout.png", "cutout.png"),
    "compose": ("compose given.png given.png --background checkerboard -o both.png", "both.png"),
    "tune a plan": ("tune --steps 4 --count 6 --batch 6 --speedup 1.25 --guidance-scale 1 -q -o p.json", "p.json"),
    "bench": ("bench reuse:hold:2 fewer-steps:3,ddim --steps 4 --count 2 --rounds 1 -q --json b.json", "b.json"),
    "evaluate": ("evaluate --count 4 --steps 4 --reuse hold:2 --json -q", ""),
    "plan": ("plan --model sd15 --width 256 --height 256 --devices 1,2 --json", ""),
    "train unet": (f"train {JOB} --model unet --model-config unet.json --work unet {UNET_TASKS}", "unet/pipeline"),
    "train dit": (f"train {JOB} --model dit --model-config dit.json --work dit {DIT_TASKS}", "dit/pipeline"),
}  # fmt: skip


# ---------------------------------------------------------------------- digests
def scrubbed(value: Any) -> Any:
    """JSON without what differs from run to run; also without rows that times decide on, and words for readers."""
    if isinstance(value, dict):
        kept = {RENAMED.get(k, k): scrubbed(v) for k, v in value.items() if k not in DROPPED}
        return {k: v for k, v in kept.items() if k not in ("summary", "meaning")}
    if isinstance(value, list):
        return [scrubbed(v) for v in value if not (isinstance(v, dict) and "time of" in str(v.get("name")))]
    return value.partition(", Version: ")[0] if isinstance(value, str) else value


def parts(value: Any) -> Iterator[bytes]:
    """The bytes that count of arrays, images, files, folders and JSON."""
    if isinstance(value, torch.Tensor):
        yield f"{value.dtype} {tuple(value.shape)}".encode()
        yield value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    elif isinstance(value, np.ndarray | Image.Image):
        array = np.asarray(value)
        yield f"{array.dtype} {array.shape}".encode() + array.tobytes()
    elif isinstance(value, Path) and value.is_dir():
        for file in sorted(value.iterdir()):
            yield file.name.encode()
            yield from parts(file)
    elif isinstance(value, Path):
        yield from parts(contents(value))
    elif isinstance(value, dict | list | tuple):
        items = sorted(value.items(), key=str) if isinstance(value, dict) else value
        yield f"{type(value).__name__} {len(items)}".encode()
        for item in items:
            yield from parts(item)
    else:
        yield json.dumps(value).encode()


def contents(file: Path) -> Any:
    """Tensors, JSON, or the pixels and settings of an image; nothing of other files."""
    if file.suffix == ".safetensors":
        return load_file(file)
    if file.suffix == ".json":
        return scrubbed(json.loads(file.read_text()))
    if file.suffix not in (".png", ".webp", ".jpg"):
        return None
    with Image.open(file) as image:
        text = getattr(image, "text", {})
        settings = [text.get("parameters", ""), json.loads(text.get("diffusion_accel", "{}"))]
        return [image.copy(), scrubbed(settings)]


# ---------------------------------------------------------------------- pipelines
def drawn(pipe: Any, features: tuple[Any, ...], call: dict[str, Any]) -> Any:
    """What a pipeline draws with features, and what they counted."""
    pipe.set_progress_bar_config(disable=True)
    accelerate(pipe, *features)
    output = pipe(**{"generator": torch.Generator().manual_seed(7), "output_type": "latent", **call})
    result = output.images if "images" in output else output.frames
    if not torch.as_tensor(result).isfinite().all():
        raise ValueError("not finite")
    return [result, pipe.acceleration.report().counters]


def given() -> Image.Image:
    """An image with soft alpha."""
    y, x = np.mgrid[0:96, 0:96] / 95
    alpha = np.clip(3 - 7 * np.hypot(x - 0.5, y - 0.5), 0, 1)
    return Image.fromarray((np.stack([x, y, 1 - x * y, alpha], -1) * 255).astype(np.uint8), "RGBA")


def sticker(*features: Any, scheduler: str = "ddim", steps: int = 10, image: bool = False, **call: Any) -> Any:
    """The embedded model, from text or from an image."""
    pipe = AcceleratedPipeline.from_pretrained("sticker", scheduler=scheduler)
    transparent = any(isinstance(feature, LatentTransparency) for feature in features)
    if image:
        pipe = diffusers.StableDiffusionImg2ImgPipeline(**pipe.components)
        call |= {"image": given() if transparent else given().convert("RGB"), "strength": 0.6}
    else:
        call |= {"height": 96, "width": 96}
    call = {"output_type": "np" if transparent else "latent", "guidance_scale": 3.0, "prompt": PROMPT, **call}
    return drawn(pipe, features, call | {"num_inference_steps": steps})


def switched() -> Any:
    """Features by keyword, then off one by one, to plain diffusers."""
    pipe = AcceleratedPipeline.from_pretrained("sticker", reuse="tuned:fast", encoder_reuse=False)
    call = {"prompt": PROMPT, "height": 96, "width": 96, "num_inference_steps": 20}
    results = [drawn(pipe, (), call)]
    for feature in (EncoderReuse(), LatentTransparency(), ROUTING):
        for name in list(pipe.acceleration.features):
            pipe.acceleration.disable(name)
            results += [drawn(pipe, (), call)]
            pipe.acceleration.remove(name)
        results += [drawn(pipe, (), call), drawn(pipe, (feature,), {**call, "output_type": "np"})]
    return results


def seeded(build: Callable[..., Any], **config: Any) -> Any:
    """A model with fixed random weights, also where its layers begin with zeros."""
    torch.manual_seed(0)
    model = build(**config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def tiny(kind: str, *features: Any) -> Any:
    """One of the pipelines with random weights."""
    (model, scheduler), config, call, _ = TINY[kind]
    cls = getattr(diffusers, f"{kind}Pipeline")
    named = inspect.signature(cls.__init__).parameters.items()
    given = {k: None for k, v in named if v.default is v.empty and k != "self"}
    given["unet" if "UNet" in model else "transformer"] = seeded(getattr(diffusers, model), **config)
    given["scheduler"] = getattr(diffusers, scheduler)()
    if kind == "CogVideoX":
        ends = {"down_block_types": ("CogVideoXDownBlock3D",) * 4, "up_block_types": ("CogVideoXUpBlock3D",) * 4}
        sizes = {"block_out_channels": (8,) * 4, "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 2}
        given["vae"] = seeded(diffusers.AutoencoderKLCogVideoX, **ends, **sizes)
    else:
        ends = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
        given["vae"] = seeded(diffusers.AutoencoderKL, block_out_channels=(8, 8), norm_num_groups=4, **ends)
    if "controlnet" in given:
        embedding = {"conditioning_embedding_out_channels": (8, 16)}
        given["controlnet"] = seeded(diffusers.ControlNetModel, **embedding, **BLOCKS)
    if "requires_safety_checker" in dict(named):
        given["requires_safety_checker"] = False
    call = {"prompt_embeds": rand(1, 6, 16, seed=1), "num_inference_steps": 8, **call}
    return drawn(cls(**given), features, call)


# ---------------------------------------------------------------------- commands
@functools.cache
def place() -> Path:
    """A folder with what the commands read, removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix="digests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    given().save(folder / "given.png")
    lines = [{"prompt": PROMPT, "steps": 3, "guidance_scale": 1.5}, {"prompt": "panda", "seed": 9, "width": 64}]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "config.toml").write_text('scheduler = "unipc"\nnum-images = 2\n')
    (folder / "unet.json").write_text(json.dumps({"block_out_channels": [32, 32, 32]}))
    (folder / "dit.json").write_text(json.dumps({"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16}))
    for number in range(12):
        noise = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        (folder / "data" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise).resize((32, 32)).save(folder / "data" / "ab"[number % 2] / f"{number}.png")
    unet = AcceleratedPipeline.from_pretrained("sticker").unet
    seeded(diffusers.ControlNetModel.from_unet, unet=unet).save_pretrained(folder / "controlnet")
    return folder


def run(text: str, start: str = "-m diffusion_accel") -> Any:
    """The JSON that a command prints with --json at its end, as one value or one a line."""
    if "w4a8" in text and "quantize --bits" not in text and not (place() / "w4a8").exists():
        run(COMMANDS["quantize w4a8"][0])  # what is read here
    words = [sys.executable, *shlex.split(start), *shlex.split(text)]
    ran = subprocess.run(words, cwd=place(), capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError(f"exit code {ran.returncode}: {ran.stderr.strip()[-400:]}")
    if not text.removesuffix(" -q").endswith("--json"):
        return None
    try:
        return scrubbed(json.loads(ran.stdout or "null"))
    except json.JSONDecodeError:
        return [scrubbed(json.loads(line)) for line in ran.stdout.splitlines()]


def generated(name: str) -> Any:
    """What `generate` prints and writes, and what `metadata` reads in formats other than PNG."""
    text, out = GENERATE[name], place() / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    text = text if text[0] == '"' or "--prompts-file" in text else f"'{PROMPT}' {text}"
    text += (" -o out/" if "-o out" not in text else "") + (" --steps 4" if "--steps" not in text else "")
    launched = "-m torch.distributed.run --nproc-per-node 2 -m diffusion_accel"
    lines = run(f"generate {text} --seed 3 --json -q", launched if "launched" in name else "-m diffusion_accel")
    others = [file.name for file in sorted(out.iterdir()) if file.suffix != ".png"]
    return [lines, out, [run(f"metadata out/{other} --json") for other in others]]


def commanded(text: str, written: str) -> Any:
    """What another command writes or prints."""
    script = shlex.quote(str(Path(__file__).resolve().with_name("train_diffusion.py")))
    printed = run(text.removeprefix("train "), script if text.startswith("train ") else "-m diffusion_accel")
    return place() / written if written else printed


# ---------------------------------------------------------------------- all of them
def words(features: tuple[Any, ...]) -> str:
    """Features with those of their settings that are not the default ones."""
    texts = []
    for feature in features:
        usual = vars(type(feature)()).items()
        given = [f"{k}={vars(feature)[k]}" for k, v in usual if k[0] != "_" and vars(feature)[k] != v]
        texts.append(" ".join([feature.name, *given]))
    return " + ".join(texts) or "plain"


def cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every case: its name, and what makes it."""
    for features in FEATURES:
        for scheduler in ("ddim", "dpm++"):
            yield f"{words(features)}, {scheduler}", functools.partial(sticker, *features, scheduler=scheduler)
        yield f"{words(features)}, image", functools.partial(sticker, *features, scheduler="dpm++", image=True)
    for level, steps in TUNED.items():
        options = {"steps": steps, "scheduler": "ddim" if "ddim" in level else "dpm++"}
        reuse = Reuse(plan=f"tuned:{level}")
        yield f"tuned:{level}", functools.partial(sticker, reuse, num_images_per_prompt=2, **options)
        yield f"tuned:{level}, image", functools.partial(sticker, reuse, image=True, **options)
    for scheduler in ("euler", "unipc", "dpm++"):
        for features in ((), (EncoderReuse(),), (Reuse(),), (LatentTransparency(),), (ROUTING,)):
            options = {"scheduler": scheduler, "prompt": [PROMPT, "panda, flat style"], "output_type": "np"}
            yield f"two prompts, {scheduler}, {words(features)}", functools.partial(sticker, *features, **options)
    yield "switched on and off", switched
    for kind, (_, _, _, plans) in TINY.items():
        found: list[tuple[Any, ...]] = [(Reuse(plan=plan),) for plan in plans.split()]
        found += [(EncoderReuse(),), (Reuse(guidance="reuse:2"), ROUTING)] if plans is ON_UNET else []
        for features in [*found, (), (ROUTING,)] if kind != "CogVideoX" else found:
            yield f"tiny {kind}, {words(features)}", functools.partial(tiny, kind, *features)
    for name, (text, written) in COMMANDS.items():
        yield name, functools.partial(commanded, text, written)
    for name in GENERATE:
        yield f"generate: {name}", functools.partial(generated, name)


def main() -> int:
    """1 if a digest differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, help="JSON file to write: the digest of every case")
    parser.add_argument("--against", type=Path, help="such a file of the other state")
    parser.add_argument("--only", default="", help="cases with this in their names")
    args = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", COLUMNS="120", NO_COLOR="1")
    torch.set_num_threads(1)
    before = json.loads(args.against.read_text()) if args.against else {}
    found, wrong = {}, []
    for name, make in cases():
        if args.only not in name:
            continue
        began = time.perf_counter()
        try:
            found[name] = hashlib.sha256(b"\0".join(parts(make()))).hexdigest()
        except Exception as error:
            wrong.append(f"{name}: failed, {type(error).__name__}: {error}")
        print(f"{name}  {found.get(name, 'failed')[:16]}  {time.perf_counter() - began:.1f}", flush=True)
    if args.output:
        args.output.write_text(json.dumps(found, indent=1) + "\n")
    if args.against:
        names = [name for name in {**before, **found} if args.only in name]
        wrong += [f"{name}: differs" for name in names if before.get(name) != found.get(name)]
    print("\n".join(wrong) or f"{len(found)} cases" + (", all equal" if args.against else ""))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
