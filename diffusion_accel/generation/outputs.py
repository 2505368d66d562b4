"""The files of one request: planned and checked before anything is drawn, written when it is."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_accel import interrupts
from diffusion_accel.compositing import background_of, checkerboard, over, premultiplied
from diffusion_accel.errors import ConfigurationError
from diffusion_accel.image_files import SUFFIXES, check_fits, check_holds_alpha, is_image_file, save_image
from diffusion_accel.io import is_there, printable
from diffusion_accel.outputs import check_distinct, check_free, check_writable, output_path

from . import unfinished
from .clips import FPS, Clip, check_fps, save_clip
from .clips import SUFFIXES as CLIP_SUFFIXES
from .layers import by_image
from .request import Request

if TYPE_CHECKING:
    from PIL import Image

    from diffusion_accel.measure.comparison import Comparison

    from .drawing import Drawn

#: text and JSON values that are written into an image of a seed
Describe = Callable[["Image.Image", int], tuple[str, dict[str, Any]]]


@dataclass(frozen=True)
class Written:
    """A file that was written.

    Attributes:
        path: the file.
        seed: of the image it holds; None for what is made of images: previews, composites.
        words: what a preview or a composite shows.
    """

    path: Path
    seed: int | None = None
    words: str = ""


@dataclass(frozen=True, kw_only=True)
class OutputPlan:
    """Every file that one request becomes.

    Attributes:
        request: what is drawn.
        paths: of each image; of layers that are drawn together, what theirs begin with.
        layers: that one image is drawn as; ("",) without transparency.
        wanted: which of them are written; None: all.
        preview: also write the foreground over this: "checkerboard", a colour, an image file; None: do not.
        multiplied: write colours multiplied by alpha.
        compared: where the comparison goes; None: none is made.
        resuming: files that are there are complete, and stay as they are.
        shown: images are shown before they are finished, in files that are there until then.
    """

    request: Request
    paths: tuple[Path, ...]
    layers: tuple[str, ...] = ("",)
    wanted: tuple[str, ...] | None = None
    preview: str | None = None
    multiplied: bool = False
    compared: Path | None = None
    resuming: bool = False
    shown: bool = False

    def each(self) -> list[OutputPlan]:
        """A plan for each image by itself, as it is one of this one."""
        pairs = zip(self.request.seeds, self.paths, strict=True)
        return [replace(self, request=replace(self.request, seed=s, count=1), paths=(path,)) for s, path in pairs]

    def layer_path(self, path: Path, layer: str) -> Path | None:
        """Where a layer of the image `path` is written; None: it is not asked for."""
        if self.wanted is not None and layer not in self.wanted:
            return None
        return path if len(self.layers) == 1 else path.with_name(f"{path.stem}-{layer}{path.suffix}")

    def image_files(self, path: Path) -> set[Path]:
        """The files that hold the image `path`: itself, or its layers."""
        return {file for layer in self.layers if (file := self.layer_path(path, layer)) is not None}

    def beside(self, path: Path) -> list[Path]:
        """Every other file that is written for the image `path`."""
        found = [file for layer in self.layers if (file := self.layer_path(path, layer)) not in (None, path)]
        if self.preview is not None:
            found.append(path.with_name(f"{path.stem}-preview.png"))
        if {"fg", "bg"} <= set(self.layers):
            found.append(path.with_name(f"{path.stem}-composite.png"))
        return [file for file in found if file is not None]

    def files(self) -> list[Path]:
        """All that are written."""
        whole = self.paths if len(self.layers) == 1 else ()
        more = [file for path in self.paths for file in self.beside(path)]
        return [*whole, *more, *([self.compared] if self.compared is not None else [])]

    def shown_files(self) -> list[Path]:
        """Where images are shown before they are finished."""
        return [unfinished.file_for(path) for path in self.paths] if self.shown else []

    @contextmanager
    def showing(self) -> Iterator[None]:
        """While images are drawn and written: what is shown of them is gone at the end, also a sudden one, and so is
        what a killed process has left."""
        for path in self.paths:
            unfinished.forget_left(path)
        with ExitStack() as all_of_them:
            for file in self.shown_files():
                all_of_them.enter_context(interrupts.unfinished(file))
            yield

    def show(self, images: Sequence[Image.Image]) -> None:
        """Write images that are not finished, the first layer of each."""
        for path, image in zip(self.paths, images[:: len(self.layers)], strict=True):
            unfinished.save(image, path)

    def check(self, overwrite: bool) -> None:
        """Refuse files that exist, cannot be written, or cannot hold what is drawn.

        Raises:
            OutputError: a file exists, and neither `overwrite` nor `resuming` is true, or its name is too long.
            ConfigurationError: its type holds no alpha, or no image as large as the request's.
        """
        shown = [unfinished.file_for(path) for path in self.paths if self.shown and not unfinished.is_left(path)]
        check_free([*self.paths, *self.files(), *shown], overwrite or self.resuming)
        for path in self.paths:
            if self.layers != ("",):
                check_holds_alpha(path)
            check_fps(path, self.request.fps)
            if path.suffix.lower() in SUFFIXES:
                check_fits(path, self.request.width, self.request.height)

    def write(self, drawn: Drawn, describe: Describe | None = None) -> Iterator[Written]:
        """Write what was drawn, file by file; goes on when the next one is asked for.

        Args:
            drawn: the images, one for each path, or its layers in turn.
            describe: gives the metadata of an image; None: there are none.
        """
        if drawn.comparison is not None and self.compared is not None:
            save_comparison(drawn.comparison, self.request.prompt, self.compared)
        images = by_image(drawn.images, self.layers)
        for layers, seed, path in zip(images, self.request.seeds, self.paths, strict=True):
            for layer, image in layers.items():
                file = self.layer_path(path, layer)
                if file is None or self._stays(file):
                    continue
                if self.multiplied and not isinstance(image, Clip) and image.mode == "RGBA":
                    image = premultiplied(image)
                text, data = (None, None) if describe is None else describe(image, seed)
                if isinstance(image, Clip):
                    save_clip(image, file, self.request.fps or FPS, text, data)
                    yield Written(file, seed)
                    continue
                save_image(image, file, text, data)
                yield Written(file, seed)
            yield from self._previews(path, layers)

    def _stays(self, file: Path) -> bool:
        return self.resuming and is_there(file)

    def _previews(self, path: Path, layers: dict[str, Image.Image]) -> Iterator[Written]:
        file = path.with_name(f"{path.stem}-preview.png")
        if self.preview is not None and "fg" in layers and not self._stays(file):
            save_image(over_background(layers["fg"], self.preview), file)
            yield Written(file, words=f"over {self.preview}")
        file = path.with_name(f"{path.stem}-composite.png")
        if {"fg", "bg"} <= set(layers) and not self._stays(file):
            save_image(over(layers["fg"], layers["bg"]), file)
            words = "fg over bg"
            if "blend" in layers:
                words += f"; recomposition error against blend {_recomposition(layers):.4f}"
            yield Written(file, words=words)


def plan_outputs(
    output: str,
    requests: Sequence[Request],
    names: Sequence[str | None] = (),
    *,
    overwrite: bool = False,
    resuming: bool = False,
    comparing: bool = False,
    what: str = "output",
    **options: Any,
) -> list[OutputPlan]:
    """The files of every request, checked.

    A path with an image suffix is a file (several images become `name-1.png`, `name-2.png`, …); a folder that exists,
    or a path without a suffix or with "/" at its end, is a folder, in which numbering goes on after the highest number
    there.

    Args:
        output: where images go.
        requests: what is drawn.
        names: the file names that requests ask for, in a folder; None: a number and the seed.
        overwrite: replace existing files.
        resuming: existing files are of an earlier call like this one, and stay: numbers in a folder begin at 1.
        comparing: a comparison of each request is written, too.
        what: what errors call `output`.
        options: layers, wanted, preview, multiplied, shown; see `OutputPlan`.

    Raises:
        OutputError: a file exists and `overwrite` is false, or the folder cannot be written.
        ConfigurationError: a name or suffix that cannot be used, or a file that would be written twice.
    """
    paths = _paths(output, requests, names or [None] * len(requests), what, resuming)
    flat = [path for group in paths for path in group]
    if len(set(flat)) != len(flat):
        raise ConfigurationError("two images would be written to the same file; give the prompts different outputs")
    plans = [
        OutputPlan(
            request=request,
            paths=tuple(group),
            compared=group[0].with_name(f"{group[0].stem}-compare.png") if comparing else None,
            resuming=resuming,
            **options,
        )
        for request, group in zip(requests, paths, strict=True)
    ]
    for plan in plans:
        plan.check(overwrite)
    check_distinct([file for plan in plans for file in (*plan.files(), *plan.shown_files())])
    for folder in {path.parent for path in flat}:
        check_writable(folder)
    return plans


def plan_file(output: str, overwrite: bool = False, what: str = "output") -> Path:
    """The path of one image, checked as in `plan_outputs`."""
    return plan_outputs(output, [Request(prompt="", seed=0)], overwrite=overwrite, what=what)[0].paths[0]


def over_background(image: Image.Image, background: str) -> Image.Image:
    """An image over what `compositing.background_of` makes of a text, as RGB."""
    return over(image, background_of(background) or checkerboard(image.size))


def save_comparison(found: Comparison, prompt: str, path: Path) -> None:
    """One image: plain, accelerated, and their difference; with fidelity below."""
    from diffusion_accel.measure.grids import difference, grid  # with the comparison itself, which needed torch

    rows = [[a, b, difference(a, b)] for a, b in zip(found.baseline, found.accelerated, strict=True)]
    scale = max(1, 256 // rows[0][0].width)
    shown = printable(prompt)  # a caption is one line, and no longer than anybody reads
    shown = shown if len(shown) <= 100 else f"{shown[:99]}…"
    captions = [[f"{shown}   PSNR {p:.1f} dB, SSIM {s:.3f}"] for p, s in zip(found.psnr, found.ssim, strict=True)]
    save_image(grid(rows, ["plain diffusers", "accelerated", "difference x4"], captions, scale), path)


def _recomposition(layers: dict[str, Image.Image]) -> float:
    from diffusion_accel.transparency.images import rgba_tensor  # heavy: torch
    from diffusion_accel.transparency.layers import recomposition_error  # heavy: torch

    tensors = [rgba_tensor(layers[name]) for name in ("bg", "fg", "blend")]
    below, above, blend = (t for t in tensors if t is not None)
    pairs = [(one[:, :3], one[:, 3:]) for one in (below, above)]
    return float(recomposition_error(pairs, blend[:, :3])[0])


# ---------------------------------------------------------------------- names
def _paths(
    output: str, requests: Sequence[Request], names: Sequence[str | None], what: str, resuming: bool
) -> list[list[Path]]:
    """The path of every image: one list a request."""
    target = output_path(output, what, (*SUFFIXES, *CLIP_SUFFIXES))
    total = sum(request.count for request in requests)
    if target.suffix.lower() not in (".gif", ".mp4") and not is_image_file(output, what):
        return _numbered(target, requests, names, what, 0 if resuming else _highest(target))
    named = next((name for name in names if name is not None), None)
    if named is not None:
        raise ConfigurationError(
            f"output {named!r} of the prompts file needs {what} to be a folder, and {what} {output} is an image file"
        )
    if total == 1:
        return [[target]]
    numbers = iter(range(1, total + 1))
    return [
        [target.with_name(f"{target.stem}-{next(numbers)}{target.suffix}") for _ in request.seeds]
        for request in requests
    ]


def _numbered(
    folder: Path, requests: Sequence[Request], names: Sequence[str | None], what: str, number: int
) -> list[list[Path]]:
    """Paths in a folder, where `number` is the highest number that is taken."""
    paths: list[list[Path]] = []
    for request, name in zip(requests, names, strict=True):
        paths.append([])
        for k, seed in enumerate(request.seeds):
            number += 1
            named = f"{number:04d}-{seed}.png" if name is None else _named(name, k, request.count, what)
            paths[-1].append(folder / named)
    return paths


def _highest(folder: Path) -> int:
    numbers = [int(m[1]) for p in folder.glob("*") if (m := re.match(r"(\d{4,})-", p.name))] if folder.is_dir() else []
    return max(numbers, default=0)


def _named(name: str, k: int, count: int, what: str) -> str:
    path = output_path(name, suffixes=SUFFIXES)
    if path.name != name or name.startswith("."):
        raise ConfigurationError(f"output {name!r} must be a plain file name; the folder is set by {what}")
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigurationError(f"output {name!r}: unknown image type; allowed: {', '.join(SUFFIXES)}")
    return name if count == 1 else f"{path.stem}-{k + 1}{path.suffix}"
