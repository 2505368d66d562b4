"""Pictures for people: labelled grids of images."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFont

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


# ------------------------------------------------------------------------------------------- transparency
def over(image: Image.Image, background: Image.Image | tuple[int, ...]) -> Image.Image:
    """An RGBA image over a colour or another image (resized to it), as RGB."""
    if isinstance(background, Image.Image):
        ground = background.convert("RGBA").resize(image.size, Image.Resampling.LANCZOS)
    else:
        ground = Image.new("RGBA", image.size, (*background[:3], 255))
    return Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB")


def checkerboard(size: tuple[int, int], low: int = 115, high: int = 140) -> Image.Image:
    """Fields of two greys: 64 pixels on a side, or an eighth of a small picture's."""
    width, height = size
    side = max(1, min(64, min(size) // 8))
    odd = (np.arange(height)[:, None] // side + np.arange(width) // side) % 2
    return Image.fromarray(np.where(odd, high, low).astype(np.uint8)).convert("RGB")


def shown_as_rgb(image: Image.Image) -> Image.Image:
    """An image as RGB, over a checkerboard if it has transparency."""
    return over(image, checkerboard(image.size)) if image.mode == "RGBA" else image.convert("RGB")


def premultiplied(image: Image.Image) -> Image.Image:
    """An RGBA image with its colours multiplied by alpha, as compositing programs want them."""
    pixels = np.asarray(image.convert("RGBA")).astype(np.float32)
    pixels[..., :3] *= pixels[..., 3:] / 255
    return Image.fromarray(pixels.round().astype(np.uint8))
