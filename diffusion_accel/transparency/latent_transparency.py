"""The feature: images with alpha from any base pipeline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from diffusion_accel.errors import ConfigurationError
from diffusion_accel.feature import Feature, option
from diffusion_accel.io import is_there, shown
from diffusion_accel.model_files.names import EMBEDDED, HUB_ID

VIEWS = (8, 4, 1, 0)
CONDITIONS = {  # variant -> the images it needs, in the order in which their latents are given
    "fg": (),
    "fg-conv": (),
    "joint": (),
    "fg2blend": ("foreground",),
    "bg2blend": ("background",),
    "fgblend2bg": ("foreground", "blend"),
    "bgblend2fg": ("background", "blend"),
    "fg2bg": ("foreground",),
    "bg2fg": ("background",),
}
# variant -> what it draws, in turn
LAYERS = {
    "joint": ("fg", "bg", "blend"),
    "fg2bg": ("bg", "blend"),
    "bg2fg": ("fg", "blend"),
    "fg2blend": ("blend",),
    "bg2blend": ("blend",),
    "fgblend2bg": ("bg",),
    "bgblend2fg": ("fg",),
    "fg": ("fg",),
    "fg-conv": ("fg",),
}
IMAGES = ("foreground", "background", "blend")


def _is_local(weights: str) -> bool:
    """Whether a text is neither an embedded model's name nor a hub id."""
    return weights not in ("", *EMBEDDED) and (is_there(weights) or not HUB_ID.fullmatch(weights))


@dataclass(frozen=True, kw_only=True)
class LatentTransparency(Feature):
    """Let the pipeline return RGBA images with real, soft alpha.

    The base model is adapted to latents that carry transparency, and a decoder beside the frozen VAE reads colours and
    alpha from them; `output.images` are then RGBA (PIL), or have four channels (np, pt), with straight colours. With
    image-to-image and inpainting pipelines an RGBA image goes in through the matching encoder. Published LayerDiffuse
    weights for SD 1.5 and SDXL load from a folder or the hub; the embedded model has its own.

    Source: Zhang and Agrawala, "Transparent Image Layer Diffusion using Latent Transparency" (2024).

    Attributes:
        weights: an embedded model's name, a folder, or a hub id; empty: what lies beside the pipeline's own model.
        variant: what is drawn: "fg" (an image with alpha), "fg-conv" (SDXL's other adapter), for SDXL
            "fg2blend", "bg2blend", "fgblend2bg", "bgblend2fg", for SD 1.5 "joint" (foreground, background and blend
            in turn, from 3, 6, … images), "fg2bg" and "bg2fg" (two in turn).
        adapter: another adapter file than the one in `weights`.
        views: 8, 4 or 1 sides from which the decoder looks, the median counts; 0 leaves the images as they are. None:
            as the weights recommend, 8 for published ones.
        refine: steps by which the latents of a given RGBA image are refined until they are read back right; each
            takes about as long as decoding three times. None: as the weights recommend, 0 for published ones.
        strength: of the adapter; 0 leaves the base model as it is.
        until: share of the steps in which the adapter is in force, the rest are the base model's; above 0 to 1.
        foreground, background, blend: image files that the variant needs.

    Counters: `views`, `decoded` (images), `changed` (parameters of the base model).
    """

    name: ClassVar[str] = "transparent"
    summary: ClassVar[str] = "RGBA images with real alpha, also in layers"
    paper: ClassVar[str] = "LayerDiffuse (Zhang and Agrawala, 2024)"
    order: ClassVar[int] = 80
    changes_output: ClassVar[bool] = True
    runtime: ClassVar[str] = "diffusion_accel.transparency.attachment"

    weights: str = option("", "embedded name, folder or hub id (default: beside the model)", names_file=_is_local)
    variant: str = option("fg", f"what is drawn: {', '.join(CONDITIONS)}")
    adapter: str = option("", "another adapter file than the one in weights", names_file=bool)
    views: int | None = option(
        None,
        "sides from which the decoder looks: 8, 4 or 1; 0 leaves RGB as it is (default: as the weights recommend)",
        (0, 8),
    )
    refine: int | None = option(
        None, "steps that refine the latents of an image that is given (default: as the weights recommend)", (0, 9_999)
    )
    strength: float = option(1.0, "of the adapter; 0 leaves the base model as it is", (0, 100))
    until: float = option(1.0, "share of the steps with the adapter, above 0, at most 1", (0, 1))
    foreground: str = option("", "image file, where the variant needs one", names_file=bool)
    background: str = option("", "image file, where the variant needs one", names_file=bool)
    blend: str = option("", "image file, where the variant needs one", names_file=bool)

    def __post_init__(self) -> None:
        super().__post_init__()

        def refuse(key: str, allowed: str) -> None:
            raise ConfigurationError(f"transparent: {key} must be {allowed}, got {shown(getattr(self, key))}")

        if self.variant not in CONDITIONS:
            refuse("variant", f"one of {', '.join(CONDITIONS)}")
        if self.views is not None and self.views not in VIEWS:
            refuse("views", "8, 4, 1 or 0")
        if not self.until:
            refuse("until", "above 0 and at most 1")
        for name in IMAGES:
            needed, given = name in CONDITIONS[self.variant], getattr(self, name)
            if needed and not given:
                raise ConfigurationError(f"transparent: the variant {self.variant} needs an image {name}=FILE")
            if given and not needed:
                raise ConfigurationError(f"transparent: the variant {self.variant} takes no image {name}")

    @classmethod
    def neutral(cls) -> Self:
        """Nothing is adapted and nothing decoded."""
        return cls(views=0, strength=0.0)

    def clash(self, other: Feature) -> str | None:
        """Refuses layers that are drawn by each other on several processes: they are put beside whole images."""
        if other.name == "patch_parallel" and self.variant not in ("fg", "fg-conv"):
            return "given layers, and layers that attend to each other, are for whole images; use variant=fg or fg-conv"
        return None

    @property
    def idle(self) -> bool:
        """Whether nothing is adapted and nothing decoded."""
        return self.views == 0 and not self.strength
