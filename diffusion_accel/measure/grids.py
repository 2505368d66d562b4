"""Images for people: labelled grids, and differences."""

from __future__ import annotations

import base64
import io
from typing import Any

from PIL import Image, ImageChops, ImageDraw, ImageFont

from diffusion_accel.compositing import shown_as_rgb

WHITE, INK, FAINT = (255, 255, 255), (30, 30, 30), (120, 120, 120)


def grid(
    rows: list[list[Image.Image]],
    columns: list[str],
    captions: list[list[str]] | None = None,
    scale: int = 1,
    title: str = "",
) -> Image.Image:
    """Images in rows with a label over each column and a caption under each row.

    Args:
        rows: equally long rows of images of one size.
        columns: one label a column.
        captions: for each row its texts, spread evenly over the columns; or None.
        scale: enlargement of the images, a whole number.
        title: a line above everything.
    """
    width, height = (side * scale for side in rows[0][0].size)
    font, small = ImageFont.load_default(size=15), ImageFont.load_default(size=13)
    gap, head, foot = 12, 26, 24 if captions else 0
    top = gap + (30 if title else 0)
    canvas = Image.new(
        "RGB",
        (gap + (width + gap) * len(columns), top + head + (height + foot + gap) * len(rows)),
        WHITE,
    )
    draw = ImageDraw.Draw(canvas)
    if title:
        draw.text((gap, gap), title, fill=INK, font=font)
    for c, label in enumerate(columns):
        draw.text((gap + c * (width + gap) + width / 2, top), label, fill=FAINT, font=small, anchor="ma")
    for r, row in enumerate(rows):
        y = top + head + r * (height + foot + gap)
        for c, image in enumerate(row):
            shown = shown_as_rgb(image).resize((width, height), Image.Resampling.LANCZOS)
            canvas.paste(shown, (gap + c * (width + gap), y))
        if captions:
            for k, text in enumerate(captions[r]):
                column = k * len(columns) // len(captions[r])
                draw.text((gap + column * (width + gap), y + height + 3), text, fill=INK, font=small)
    return canvas


def difference(a: Image.Image, b: Image.Image, gain: int = 4) -> Image.Image:
    """The absolute difference of two images, `gain` times enlarged, dark on white."""
    return ImageChops.invert(
        ImageChops.difference(shown_as_rgb(a), shown_as_rgb(b)).point(lambda v: min(255, v * gain))
    )


def data_url(pixels: Any, side: int = 192) -> str:
    """An image (3, H, W) in 0..1 as a data URL, at most `side` pixels wide."""
    array = (pixels.permute(1, 2, 0) * 255).round().byte().numpy()
    image = Image.fromarray(array)
    image.thumbnail((side, side))
    file = io.BytesIO()
    image.save(file, "WEBP", quality=85)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
