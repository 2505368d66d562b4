#!/usr/bin/env python3
"""What latent transparency of the embedded model gives and costs; the numbers and images of docs/transparency.md.

    python scripts/measure_transparency.py cutouts together time --out transparency.json --images docs/images
    python scripts/measure_transparency.py roundtrip --work runs/sticker --out transparency.json

roundtrip   held-out RGBA stickers encoded and decoded (needs the image cache of scripts/train_sticker.py)
cutouts     generated images: how many are clean cut-outs, against the ad-hoc ways on the same seeds
together    with encoder reuse, tuned plans and a quantized U-Net, against the transparent image without them
time        what decoding adds to an image of 20 steps, interleaved
Each part is one run; its numbers replace those of an earlier one in --out.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.stats import binomtest

from diffusion_accel import LatentTransparency, accelerate
from diffusion_accel.compositing import checkerboard, over
from diffusion_accel.evaluation.cutouts import cutout_faults, flood_filled, thresholded
from diffusion_accel.evaluation.prompts import embedded_reference
from diffusion_accel.measure.fidelity import as_tensor, psnr
from diffusion_accel.measure.timing import interleaved, ratios, seconds_of
from diffusion_accel.pipelines.loading import load_pipeline
from diffusion_accel.pipelines.schedulers import set_scheduler
from diffusion_accel.registry import feature_class

CALL = {"num_inference_steps": 20, "guidance_scale": 3.0, "width": 96, "height": 96}
SEED, BATCH = 4000, 16
TOGETHER = ("encoder_reuse", "reuse:tuned:quality", "reuse:tuned:balanced", "reuse:tuned:fast", "reuse:deepcache:3")


def pipeline(**options: Any) -> Any:
    """The embedded pipeline with its recommended scheduler."""
    pipe = load_pipeline("sticker", **options)
    set_scheduler(pipe, "dpm++")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def captions(seen: int, heldout: int) -> list[str]:
    """So many captions that the model was trained with, and so many held-out ones."""
    asked, _ = embedded_reference()
    return [
        asked.captions[i] for split, n in (("train", seen), ("heldout", heldout)) for i in asked.choose(split, n, 0)
    ]


def draw(pipe: Any, prompts: list[str]) -> list[Image.Image]:
    """One image a prompt."""
    made = []
    for start in range(0, len(prompts), BATCH):
        part = prompts[start : start + BATCH]
        generators = [torch.Generator().manual_seed(SEED + start + k) for k in range(len(part))]
        made += pipe(part, generator=generators, **CALL).images
    return made


# ------------------------------------------------------------------------------------------- parts
@torch.no_grad()
def roundtrip(options: argparse.Namespace) -> dict[str, Any]:
    """Held-out stickers through the latents and back, and how near they come; the ad-hoc ways beside them."""
    from sticker import data
    from sticker.transparency.images import rgba_of

    from diffusion_accel.transparency.codec import decode_rgba, encode_rgba, refine_latents
    from diffusion_accel.transparency.rgba import checkerboard as fields
    from diffusion_accel.transparency.rgba import composite, on_grey
    from diffusion_accel.transparency.weights import load_weights

    pipe = pipeline()
    loaded = load_weights(LatentTransparency(weights=options.weights), pipe)
    indices = np.sort(data.of_split(data.load_rows(options.work), "heldout")[:96])
    rgb, alpha = rgba_of(data.load_images(options.work), indices)
    grounds = {"black": 0.0, "white": 1.0, "checkerboard": fields(*alpha.shape[-2:], 8, 0.25, 0.75)}
    target = on_grey(rgb, alpha)
    plain = torch.cat([pipe.vae.decode(pipe.vae.encode(x).latent_dist.mean).sample for x in target.split(16)])
    pairs = list(zip(rgb.split(16), alpha.split(16), strict=True))
    first = [encode_rgba(pipe.vae, loaded.encoder, *pair) for pair in pairs]
    better: list[torch.Tensor] = []

    def refine() -> None:
        for z, pair in zip(first, pairs, strict=True):
            better.append(refine_latents(lambda z: pipe.vae.decode(z).sample, loaded.decoder, z, *pair, loaded.refine))

    seconds = seconds_of(refine) / len(rgb)
    found: dict[str, Any] = {
        "pictures": len(rgb),
        "vae_psnr": median(psnr((plain / 2 + 0.5).clamp(0, 1), target / 2 + 0.5)),
        "refinement": {"steps": loaded.refine, "seconds_a_picture": round(seconds, 2)},
    }
    for way, z in (("encoder_alone", torch.cat(first)), ("refined", torch.cat(better))):
        decoded = torch.cat([pipe.vae.decode(part).sample for part in z.split(16)])
        known = [psnr((x / 2 + 0.5).clamp(0, 1), target / 2 + 0.5) for x in (plain, decoded)]
        found[way] = {"vae_moved": median(known[1] - known[0])}
        for views in (1, 4, 8):
            made_rgb, made_alpha = decode_rgba(loaded.decoder, decoded, z, views)
            row = {"alpha_psnr": median(psnr(alpha, made_alpha))}
            for name, ground in grounds.items():
                row[name] = median(psnr(composite(rgb, alpha, ground), composite(made_rgb, made_alpha, ground)))
            row["clean"] = share([cutout_faults(a.numpy()) for a in made_alpha[:, 0]])
            found[way][f"views_{views}"] = row
        found[way]["limits"] = what_limits(loaded.decoder, alpha, decoded, target, z)
    found["real"] = {"clean": share([cutout_faults(a.numpy()) for a in alpha[:, 0]])}
    # the ad-hoc ways on the same images, which the plain VAE has drawn on white
    white = composite(rgb, alpha, 1.0) * 2 - 1
    seen = torch.cat([pipe.vae.decode(pipe.vae.encode(x).latent_dist.mean).sample for x in white.split(16)])
    seen = (seen / 2 + 0.5).clamp(0, 1)
    arrays = (seen.permute(0, 2, 3, 1) * 255).round().byte().numpy()
    for name, cut in rivals().items():
        made_alpha = torch.from_numpy(np.stack([cut(array) for array in arrays]))[:, None].float()
        row = {"alpha_psnr": median(psnr(alpha, made_alpha))}
        for ground_name, ground in grounds.items():
            made = composite(seen, made_alpha, ground)
            row[ground_name] = median(psnr(composite(rgb, alpha, ground), made))
        found[name] = row | {"clean": share([cutout_faults(a.numpy()) for a in made_alpha[:, 0]])}
    return found


def what_limits(decoder: Any, alpha: Any, decoded: Any, target: Any, z: Any) -> dict[str, float]:
    """Where the error of alpha lies (1 view), and how much smaller it is with the true pixels instead of the VAE's."""
    from torch.nn.functional import max_pool2d

    from diffusion_accel.transparency.codec import decode_rgba

    error = (decode_rgba(decoder, decoded, z, 1)[1] - alpha) ** 2
    edge = max_pool2d(alpha, 5, 1, 2) + max_pool2d(-alpha, 5, 1, 2) > 0.1
    inside = torch.where(edge, torch.zeros_like(error), error).flatten(1).mean(1)
    return {
        "share_of_error_within_2_pixels_of_an_edge": round(float((error * edge).sum() / error.sum()), 3),
        "psnr_elsewhere": median(-10 * inside.clamp(min=1e-10).log10()),
        "alpha_psnr_with_true_pixels": median(psnr(alpha, decode_rgba(decoder, target, z, 1)[1])),
    }


def rivals() -> dict[str, Any]:
    """The ad-hoc ways to cut an image on white out, with several settings each."""
    found: dict[str, Any] = {}
    for tolerance in (4, 8, 16, 32, 48):
        found[f"flood fill, tolerance {tolerance}"] = functools.partial(flood_filled, tolerance=tolerance)
    for low, high in ((4, 20), (8, 40), (16, 64), (24, 128)):
        found[f"threshold {low} to {high}"] = functools.partial(thresholded, low=low, high=high)
    return found


def cutouts(options: argparse.Namespace) -> dict[str, Any]:
    """How many drawn images are clean cut-outs, against the ad-hoc ways on the same seeds."""
    seen, heldout = options.prompts
    prompts = captions(seen, heldout)
    pipe = accelerate(pipeline(), LatentTransparency(weights=options.weights))
    ours = draw(pipe, prompts)
    pipe.acceleration.disable()
    plain = draw(pipe, prompts)
    arrays = [np.asarray(image.convert("RGB")) for image in plain]
    ways: dict[str, list[np.ndarray]] = {"latent transparency": [np.asarray(i)[..., 3] / 255 for i in ours]}
    ways |= {name: [cut(array) for array in arrays] for name, cut in rivals().items()}
    found: dict[str, Any] = {"prompts": {"seen": seen, "held_out": len(prompts) - seen}}
    clean: dict[str, list[bool]] = {}
    for name, alphas in ways.items():
        faults = [cutout_faults(alpha) for alpha in alphas]
        clean[name] = [not one for one in faults]
        count = {f: sum(f in one for one in faults) for f in ("empty", "border", "parts", "edge", "holes")}
        found[name] = {
            "clean": share(faults),
            "clean_seen": share(faults[:seen]),
            "clean_held_out": share(faults[seen:]),
            "faults": {k: v for k, v in count.items() if v},
        }
    best = max((n for n in ways if n.startswith("flood")), key=lambda n: found[n]["clean"])
    pairs = list(zip(clean["latent transparency"], clean[best], strict=True))
    ahead, behind = pairs.count((True, False)), pairs.count((False, True))
    chance = binomtest(ahead, max(1, ahead + behind)).pvalue  # of a lead or lag as large if both were as good
    found["against the best flood fill"] = {"ours alone": ahead, "its alone": behind, "p": round(chance, 4)}
    real = real_share(options)
    if real is not None:
        found["real stickers"] = real
    if options.images:
        flooded = [with_alpha(image, alpha) for image, alpha in zip(plain, ways[best], strict=True)]
        sheet(ours, flooded, plain, options.images / "transparent.png", best)
        wall(ours[:64], options.images / "transparent-64.png")
    return found


def real_share(options: argparse.Namespace) -> dict[str, Any] | None:
    """The same of the real stickers that the model was trained on, where the image cache is."""
    from sticker import data

    if not (options.work / "images.npy").is_file():
        return None
    rows, images = data.load_rows(options.work), data.load_images(options.work)
    listed = set(data.read_concepts(Path(__file__).parent / "data" / "sticker_concepts.txt"))
    chosen = data.select(rows, ("noto", "flat", "3d", "twemoji"), listed)
    faults = [cutout_faults(images[i][..., 3] / 255) for i in chosen]
    shares = {f: round(sum(f in one for one in faults) / len(faults), 3) for f in ("border", "parts", "edge", "holes")}
    return {"clean": share(faults), "pictures": len(chosen), "shares": shares}


def together(options: argparse.Namespace) -> dict[str, Any]:
    """How near transparent images with another acceleration come to those without."""
    prompts = captions(32, 0)
    transparent = LatentTransparency(weights=options.weights)
    reference = as_tensor(draw(accelerate(pipeline(), transparent), prompts))
    found = {}
    settings: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in TOGETHER]
    for folder in options.quantized:
        settings += [(f"quantized {Path(folder).name}", {"quantize": folder})]
        settings += [(f"quantized {Path(folder).name} + reuse:tuned:quality", {"quantize": folder})]
    for name, extra in settings:
        spec = name.split(" + ")[-1] if extra and " + " in name else "" if extra else name
        features = [transparent]
        if spec:
            flag, _, value = spec.partition(":")
            features.append(feature_class(flag).parse(value))
        made = as_tensor(draw(accelerate(pipeline(**extra), *features), prompts))
        found[name] = {
            "alpha_psnr": median(psnr(reference[:, 3:], made[:, 3:])),
            "rgba_psnr": median(psnr(reference, made)),
            "clean": share([cutout_faults(a) for a in made[:, 3].numpy()]),
        }
        print(name, found[name], flush=True)
    return {"prompts": len(prompts), "without": share([cutout_faults(a) for a in reference[:, 3].numpy()]), **found}


def timing(options: argparse.Namespace) -> dict[str, Any]:
    """Interleaved: the adapted base without decoding, then with 1, 4 and 8 views."""
    pipes = {v: accelerate(pipeline(), LatentTransparency(weights=options.weights, views=v)) for v in (0, 1, 4, 8)}
    pipes[-1] = pipeline()

    def draw_one(pipe: Any) -> None:
        pipe("red apple, 3d style", generator=torch.Generator().manual_seed(0), **CALL)

    seconds = interleaved({v: functools.partial(draw_one, pipe) for v, pipe in pipes.items()}, options.rounds)
    found: dict[str, Any] = {"rounds": options.rounds, "threads": torch.get_num_threads()}
    for views, name in ((0, "adapted, RGB"), (1, "1 view"), (4, "4 views"), (8, "8 views")):
        found[f"{name} / plain"] = round(statistics.median(ratios(seconds[views], seconds[-1])), 3)
        if views:
            found[f"{name} / adapted, RGB"] = round(statistics.median(ratios(seconds[views], seconds[0])), 3)
    return found


PARTS = {"roundtrip": roundtrip, "cutouts": cutouts, "together": together, "time": timing}


# ------------------------------------------------------------------------------------------- helpers
def median(values: torch.Tensor) -> float:
    """With two digits."""
    return round(float(values.median()), 2)


def share(faults: list[list[str]]) -> float:
    """Of images without a fault, with three digits."""
    return round(sum(not one for one in faults) / len(faults), 3)


def with_alpha(image: Image.Image, alpha: np.ndarray) -> Image.Image:
    """An image with alpha (H, W) in 0..1."""
    made = image.convert("RGBA")
    made.putalpha(Image.fromarray((alpha * 255).round().astype(np.uint8)))
    return made


def sheet(ours: list[Any], flooded: list[Any], plain: list[Any], path: Path, label: str) -> None:
    """Rows: plain; ours on black, white and checkerboard; the best flood fill on black."""
    from diffusion_accel.measure.grids import grid

    chosen = range(0, 48, 5)
    rows = [
        [plain[i] for i in chosen],
        [over(ours[i], (0, 0, 0)) for i in chosen],
        [over(ours[i], (255, 255, 255)) for i in chosen],
        [over(ours[i], checkerboard(ours[i].size, 96, 160)) for i in chosen],
        [over(flooded[i], (0, 0, 0)) for i in chosen],
    ]
    names = ["plain RGB", "transparent, on black", "on white", "on a checkerboard", f"{label}, on black"]
    captions = [[name] for name in names]
    path.parent.mkdir(parents=True, exist_ok=True)
    grid(rows, [""] * len(rows[0]), captions).save(path)


def wall(images: list[Image.Image], path: Path) -> None:
    """All of them on a checkerboard, 16 in a row."""
    side = images[0].width
    canvas = Image.new("RGB", (side * 16, side * (len(images) // 16)))
    for k, image in enumerate(images):
        canvas.paste(over(image, checkerboard(image.size, 96, 160)), (k % 16 * side, k // 16 * side))
    canvas.save(path)


def main(arguments: list[str] | None = None) -> int:
    """Measure the parts that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=tuple(PARTS))
    parser.add_argument("--weights", default="", help="transparency weights (default: those of the embedded model)")
    parser.add_argument("--work", type=Path, default=Path("runs/sticker"), help="work folder with the image cache")
    parser.add_argument("--quantized", nargs="*", default=[], metavar="DIR", help="quantized checkpoints of the model")
    parser.add_argument("--prompts", type=int, nargs=2, default=(48, 16), metavar="N", help="seen and held-out ones")
    parser.add_argument("--rounds", type=int, default=15, help="of the timing")
    parser.add_argument("--out", type=Path, help="JSON file; parts that are not measured stay as they are")
    parser.add_argument("--images", "--pictures", type=Path, help="folder for images")
    parser.add_argument("--threads", type=int, help="CPU threads")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    found = json.loads(options.out.read_text()) if options.out and options.out.is_file() else {}
    for part in options.parts:
        found[part] = PARTS[part](options)
        print(part, json.dumps(found[part], indent=1), flush=True)
        if options.out:
            options.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
