#!/usr/bin/env python3
"""Build the sticker data set: RGBA emoji artwork with text names, from pinned npm packages.

    pip install resvg-py==0.5.0 pillow numpy
    python scripts/build_sticker_dataset.py --out data/stickers

Needs `npm` (about 45 MB of downloads, checked against the pinned SHA-512 sums) and about four minutes of one core.

Writes into the output folder:
    <style>.zip      stored zip; one lossless WebP per concept, RGBA with straight alpha, named <hexcode>.webp
    captions.jsonl   one line per image: id, style, name, keywords, caption, licence, author, source, file, split
    split.json       ids of the held-out concept x style combinations
    stats.json       counts per style

Everything is built in a folder beside the output folder, which is renamed into place once it is complete.
Exit codes: 0 done, 1 the build failed, 2 wrong arguments.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sticker.concepts import plain_hexcode, read_concepts
from sticker.packages import NAMES, STYLES, BuildError, fetch, members, read_json
from tqdm import tqdm

from diffusion_accel.images import open_image

WEBP_STYLE = "3d"  # ships rendered WebP images; all other styles are Iconify SVG collections
CORE_STYLES = ("noto", "gradient", "flat", "3d", "twemoji")


# --------------------------------------------------------------------------------------------- images
def webp_images(tarball: Path, concepts: dict[str, dict[str, Any]]) -> dict[str, Image.Image]:
    """The images of a package of WebP files, by concept."""
    by_hexcode = {plain_hexcode(concept["hexcode"]): key for key, concept in concepts.items()}
    images = {}
    for name, content in members(tarball, ".webp"):
        key = by_hexcode.get(plain_hexcode(Path(name).stem))
        if key:
            images[key] = open_image(io.BytesIO(content), "RGBA", what=name)
    return images


def iconify_svg(collection: dict[str, Any], name: str, size: int) -> str | None:
    """SVG text of one icon; aliases are followed, but not those that rotate or flip their parent."""
    icons, aliases = collection["icons"], collection.get("aliases", {})
    while name not in icons and name in aliases and not set(aliases[name]) - {"parent"}:
        name = aliases[name]["parent"]
    if name not in icons:
        return None
    icon = icons[name]
    width = icon.get("width", collection.get("width", 16))
    height = icon.get("height", collection.get("height", 16))
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {width} {height}" width="{size}" height="{size}">'
        f"{icon['body']}</svg>"
    )


def svg_images(tarball: Path, concepts: dict[str, Any], size: int) -> tuple[dict[str, Image.Image], int]:
    """Images drawn by resvg, and how many SVGs it could not draw."""
    try:
        import resvg_py
    except ImportError as error:
        raise BuildError("resvg-py is not installed; run: pip install resvg-py==0.5.0") from error
    collection = read_json(tarball, "icons.json")
    images, failed = {}, 0
    for key in tqdm(concepts, desc=tarball.name, unit="svg", leave=False, disable=None):
        svg = iconify_svg(collection, key, size)
        if svg is None:
            continue
        try:
            png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
        except ValueError as error:
            failed += 1
            tqdm.write(f"{tarball.name}: {key}: {error}", file=sys.stderr)
            continue
        images[key] = open_image(io.BytesIO(bytes(png)), "RGBA", what=key)
    return images, failed


def resize_rgba(image: Image.Image, size: int) -> np.ndarray:
    """uint8 (size, size, 4), resized with premultiplied alpha, so that no colour bleeds in from invisible pixels."""
    rgba = np.asarray(image.convert("RGBA"), np.float32) / 255
    if image.size != (size, size):
        planes = np.concatenate([rgba[..., :3] * rgba[..., 3:], rgba[..., 3:]], -1)
        resized = [
            np.asarray(Image.fromarray(planes[..., c]).resize((size, size), Image.Resampling.LANCZOS)) for c in range(4)
        ]
        planes = np.clip(np.stack(resized, -1), 0, 1)
        alpha = planes[..., 3:]
        colour = np.where(alpha > 1 / 255, planes[..., :3] / np.maximum(alpha, 1 / 255), 0)
        rgba = np.concatenate([colour, alpha], -1)
    result = np.clip(rgba * 255 + 0.5, 0, 255).astype(np.uint8)
    result[result[..., 3] == 0] = 0
    return result


def _row(style: str, key: str, concept: dict[str, Any], coverage: float, member: str) -> dict[str, Any]:
    source = STYLES[style]
    return {
        "id": f"{style}/{concept['hexcode']}",
        "style": style,
        "style_words": source.word,
        "slug": key,
        "name": concept["name"],
        "keywords": concept["keywords"],
        "group": concept["group"],
        "subgroup": concept["subgroup"],
        "core": concept["core"] and style in CORE_STYLES,
        "starter": concept["starter"] and style in CORE_STYLES,
        "coverage": round(coverage, 3),
        "caption": f"{concept['name']}, {source.word} style",
        "licence": source.licence,
        "author": source.author,
        "source": source.package.spec,
        "file": f"{style}.zip:{member}",
    }


def write_style(
    style: str, concepts: dict[str, dict[str, Any]], tarball: Path, folder: Path, size: int, seen: set[str]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Draw one style into `folder`/<style>.zip; returns its caption rows and its counts.

    Images that are nearly empty, or equal byte for byte to one already in `seen`, are left out.
    """
    source = STYLES[style]
    if style == WEBP_STYLE:
        images, failed = webp_images(tarball, concepts), 0
    else:
        images, failed = svg_images(tarball, concepts, size)
    rows, duplicates, empty = [], 0, 0
    with zipfile.ZipFile(folder / f"{style}.zip", "w", zipfile.ZIP_STORED) as archive:
        for key in tqdm(sorted(images), desc=f"{style}.zip", unit="image", leave=False, disable=None):
            concept, pixels = concepts[key], resize_rgba(images[key], size)
            coverage = float((pixels[..., 3] > 127).mean())
            if coverage < 0.02:
                empty += 1
                continue
            digest = hashlib.sha1(pixels.tobytes()).hexdigest()
            if digest in seen:
                duplicates += 1
                continue
            seen.add(digest)
            webp = io.BytesIO()
            Image.fromarray(pixels).save(webp, "WEBP", lossless=True, quality=80, method=4, exact=False)
            member = f"{concept['hexcode']}.webp"
            archive.writestr(zipfile.ZipInfo(member, (2026, 1, 1, 0, 0, 0)), webp.getvalue())
            rows.append(_row(style, key, concept, coverage, member))
    counts = {
        "package": source.package.spec,
        "licence": source.licence,
        "author": source.author,
        "matched": len(images),
        "kept": len(rows),
        "duplicates": duplicates,
        "empty": empty,
        "failed": failed,
        "core": sum(row["core"] for row in rows),
        "starter": sum(row["starter"] for row in rows),
    }
    return rows, counts


# --------------------------------------------------------------------------------------------- the whole set
def choose_heldout(rows: list[dict[str, Any]]) -> list[str]:
    """Ids of the held-out images: a quarter of the core concepts loses one style, and keeps at least three.

    The choice hashes the concept's slug, so it does not change when concepts are added.
    """
    by_concept = collections.defaultdict(list)
    for row in rows:
        if row["core"]:
            by_concept[row["slug"]].append(row["id"])
    heldout = []
    for key, ids in sorted(by_concept.items()):
        value = int(hashlib.sha1(f"split1:{key}".encode()).hexdigest(), 16)
        if len(ids) >= 4 and value % 4 == 0:
            heldout.append(ids[(value // 4) % len(ids)])
    return heldout


def build(folder: Path, cache: Path, size: int) -> dict[str, Any]:
    """Write the data set into `folder`; returns the totals."""
    concepts = read_concepts(fetch(NAMES, cache))
    tarballs = {style: fetch(source.package, cache) for style, source in STYLES.items()}
    rows: list[dict[str, Any]] = []
    stats: dict[str, Any] = {}
    seen: set[str] = set()
    for style, tarball in tarballs.items():
        style_rows, stats[style] = write_style(style, concepts, tarball, folder, size, seen)
        rows += style_rows
        print(f"{style}: {json.dumps(stats[style])}", flush=True)
    heldout = choose_heldout(rows)
    for row in rows:
        row["split"] = "heldout" if row["id"] in set(heldout) else "train"
    stats["total"] = {
        "images": len(rows),
        "concepts": len({row["slug"] for row in rows}),
        "core_images": sum(row["core"] for row in rows),
        "core_concepts": len({row["slug"] for row in rows if row["core"]}),
        "starter_images": sum(row["starter"] for row in rows),
        "heldout": len(heldout),
        "groups": collections.Counter(row["group"] for row in rows if row["core"]),
    }
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "split.json").write_text(json.dumps({"heldout": heldout}, indent=0), encoding="utf-8")
    (folder / "stats.json").write_text(json.dumps(stats, indent=1), encoding="utf-8")
    return stats["total"]


def install(fresh: Path, out: Path) -> None:
    """Rename the finished folder into place; a previous one is moved aside first and then removed."""
    old = out.with_name(f".{out.name}.old-{os.getpid()}")
    if out.exists():
        out.rename(old)
    try:
        fresh.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of the command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/stickers"), help="output folder (default: %(default)s)")
    parser.add_argument("--npm-cache", type=Path, help="folder for the tarballs (default: npm-cache beside --out)")
    parser.add_argument("--size", type=int, default=128, help="image side in pixels (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output folder")
    options = parser.parse_args(arguments)
    if not 8 <= options.size <= 1024:
        parser.error(f"--size must be between 8 and 1024 pixels, got {options.size}")
    if options.out.exists() and not options.overwrite:
        parser.error(f"{options.out} exists; pass --overwrite to replace it")
    if options.out.exists() and not (options.out / "captions.jsonl").exists():
        parser.error(f"{options.out} is not a sticker data set; refusing to replace it")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Build the data set; the exit code."""
    options = parse_arguments(arguments)
    out = options.out.resolve()
    cache = options.npm_cache or out.parent / "npm-cache"
    fresh: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        cache.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{out.name}.new-", dir=out.parent))
        fresh.chmod(0o755)
        totals = build(fresh, cache, options.size)
        install(fresh, out)
    except (BuildError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted, nothing was written", file=sys.stderr)
        return 130
    finally:
        if fresh is not None:
            shutil.rmtree(fresh, ignore_errors=True)
    print(json.dumps(totals))
    return 0


if __name__ == "__main__":
    sys.exit(main())
