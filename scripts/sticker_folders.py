#!/usr/bin/env python3
"""Unpack the sticker data set for `train_diffusion.py`: a folder a class, captions, or images alone, on white.

    python scripts/sticker_folders.py --data data/stickers --out runs/stickers-classes --layout classes
    python scripts/sticker_folders.py --data data/stickers --out runs/stickers-captions --layout captions
    python scripts/sticker_folders.py --data data/stickers --out runs/stickers-images --layout folder

What is taken: the starter concepts in the styles that were asked for; every `--every`-th concept of them.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

from diffusion_accel.images import open_image
from diffusion_accel.outputs import replacing_folder

STYLES = ("noto", "gradient", "flat", "3d", "twemoji")


def rows_of(data: Path, styles: list[str], every: int) -> list[dict[str, Any]]:
    """The rows of `captions.jsonl` that are taken: every so many-th starter concept, in these styles."""
    lines = (data / "captions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["starter"] and row["style"] in styles]
    kept = set(sorted({row["slug"] for row in rows})[::every])
    return [row for row in rows if row["slug"] in kept]


def unpack(data: Path, rows: list[dict[str, Any]], out: Path, layout: str) -> None:
    """Write the images of these rows as PNG."""
    archives = {row["style"]: zipfile.ZipFile(data / f"{row['style']}.zip") for row in rows}
    captions = []
    for row in rows:
        stored = io.BytesIO(archives[row["style"]].read(row["file"].partition(":")[2]))
        name = f"{row['style']}-{row['slug']}.png"
        folder = out / row["slug"] if layout == "classes" else out
        folder.mkdir(exist_ok=True, parents=True)
        open_image(stored, background=(255, 255, 255)).save(folder / name)
        captions.append(json.dumps({"file": name, "caption": row["caption"]}))
    if layout == "captions":
        (out / "captions.jsonl").write_text("\n".join(captions) + "\n", encoding="utf-8")


def main() -> int:
    """Unpack what the options say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="sticker data set, of build_sticker_dataset.py")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--layout", choices=("classes", "captions", "folder"), required=True)
    parser.add_argument("--styles", nargs="+", choices=STYLES, default=list(STYLES))
    parser.add_argument("--every", type=int, default=1, help="take every so many-th concept (default: all)")
    options = parser.parse_args()
    if not (options.data / "captions.jsonl").is_file():
        parser.error(f"{options.data} has no captions.jsonl")
    if options.out.exists():
        parser.error(f"{options.out} exists")
    rows = rows_of(options.data, options.styles, max(1, options.every))
    with replacing_folder(options.out) as folder:
        unpack(options.data, rows, folder, options.layout)
    print(f"{options.out}: {len(rows)} images of {len({row['slug'] for row in rows})} concepts")
    return 0


if __name__ == "__main__":
    sys.exit(main())
