"""What diffusers' pipelines do with their denoiser, as data: the branches of guidance, the unit of the timestep, calls.

Nothing here is guessed from values. A pipeline belongs to the family of the class whose `__call__` it runs; one with a
loop of its own is unknown, and what would need to know more of it is refused.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from diffusion_accel.hooks import forward_parameters

from . import find_denoiser, find_denoisers, mixes_rows, not_a_unet


@dataclass(frozen=True)
class Branches:
    """The two branches of guidance as halves of a batch; `conditional_first` says in which order."""

    conditional_first: bool = False

    def conditional(self, tensor: torch.Tensor) -> torch.Tensor:
        """The rows of the conditional branch."""
        half = tensor.shape[0] // 2
        return tensor[:half] if self.conditional_first else tensor[half:]

    def difference(self, tensor: torch.Tensor) -> torch.Tensor:
        """The unconditional branch minus the conditional one."""
        first, second = tensor.chunk(2)
        return second - first if self.conditional_first else first - second

    def joined(self, conditional: torch.Tensor, difference: torch.Tensor | None = None) -> torch.Tensor:
        """Both branches from the conditional one and their difference; without it they are the same."""
        other = conditional if difference is None else conditional + difference
        return torch.cat([conditional, other] if self.conditional_first else [other, conditional])


@dataclass(frozen=True)
class Family:
    """What a pipeline class does with its denoiser.

    Attributes:
        branches: the halves of the batch with guidance; None if it has no such halves.
        calls: it calls its denoiser for the conditional branch, then, with guidance, for the unconditional one.
        reason: why no branch can be left out, as the end of a sentence; empty if one can.
        guided: how a call says that it uses guidance: "property": `do_classifier_free_guidance`; "above 1" or "not 1":
            by its argument `guidance_scale`; "always".
        time: the unit in which it tells the denoiser the scheduler's timestep: one of `UNITS`; "": not known.
        views: it calls denoiser and scheduler once for each view of the image at every step.
        whole: why no step of the denoiser can be left out; None if any can.
    """

    branches: Branches | None = None
    calls: bool = False
    reason: str = ""
    guided: str = "property"
    time: str = "t"
    views: bool = False
    whole: str | None = None


_HALVES, _SWAPPED = Branches(), Branches(conditional_first=True)
_CALLS = "it calls its denoiser several times for what it guides by"
_CONDITIONED = "its branches are given different latents"
_DISTILLED = "it calls its denoiser for one branch only (its guidance, if it has any, is an input of the model)"
_THREE = "its batch has more than an unconditional and a conditional half"
_INTERLEAVED = "its batch has the branches of guidance in turn, one view after the other"
_OWN = "it decides by itself at which steps it uses guidance"
_GUIDER = "its guider component decides which branches are computed"
_MIXED = "its denoiser has arguments in which the branches cannot be told apart"
_TWO_MODELS = "its branches are computed by two models"

_CACHED = "its denoiser writes keys and values that later calls read"
_UNSTEPPED = "it moves the latents by other methods than its scheduler's step"
_TWO_KINDS = "its denoiser predicts two things at once (such as video and sound)"
_THROUGH = "it moves the latents by gradients through its denoiser"
_PARALLEL = "it denoises several timesteps in one batch"

# A text of class names for each family; "Name" stands for "NamePipeline".
_FAMILIES: tuple[tuple[Family, str], ...] = (
    # ------------------------------------------------ halves of a batch, unconditional first
    (
        Family(_HALVES),
        """
        AltDiffusion AltDiffusionImg2Img AnimateDiff AnimateDiffControlNet AnimateDiffSDXL AnimateDiffSparseControlNet
        AnimateDiffVideoToVideo AnimateDiffVideoToVideoControlNet AnyFlow Bria CogView3Plus EasyAnimate
        EasyAnimateControl EasyAnimateInpaint ErnieImage HunyuanDiT HunyuanDiTControlNet I2VGenXL Kandinsky3
        Kandinsky3Img2Img KandinskyV22 KandinskyV22Img2Img KandinskyV22Inpaint Kolors KolorsImg2Img Latte LTX
        LTXCondition LTXImageToVideo Mochi PIA SanaControlNet SanaVideo SanaImageToVideo StableAudio3
        StableDiffusion StableDiffusion3 StableDiffusion3ControlNet StableDiffusion3ControlNetInpainting
        StableDiffusion3Img2Img StableDiffusion3Inpaint StableDiffusionAdapter StableDiffusionControlNet
        StableDiffusionControlNetImg2Img StableDiffusionControlNetInpaint StableDiffusionControlNetXS
        StableDiffusionDepth2Img StableDiffusionImg2Img StableDiffusionInpaint StableDiffusionLDM3D StableDiffusionXL
        StableDiffusionXLAdapter StableDiffusionXLControlNet StableDiffusionXLControlNetImg2Img
        StableDiffusionXLControlNetInpaint StableDiffusionXLControlNetUnion StableDiffusionXLControlNetUnionImg2Img
        StableDiffusionXLControlNetUnionInpaint StableDiffusionXLControlNetXS StableDiffusionXLImg2Img
        StableDiffusionXLInpaint StableVideoDiffusion
        """,
    ),
    (Family(_HALVES, time="t/1000"), "PRX PRXPixel"),
    (Family(_HALVES, time="t*scale"), "Sana"),
    (
        Family(_HALVES, guided="above 1"),
        """
        Allegro AudioLDM AudioLDM2 BlipDiffusion BlipDiffusionControlNet BriaFibo BriaFiboEdit CogVideoX
        CogVideoXFunControl CogVideoXImageToVideo CogVideoXVideoToVideo ConsisID IF IFImg2Img IFImg2ImgSuperResolution
        IFInpainting IFInpaintingSuperResolution IFSuperResolution Kandinsky KandinskyImg2Img KandinskyInpaint
        KandinskyV22Controlnet KandinskyV22ControlnetImg2Img MusicLDM PaintByExample PixArtAlpha PixArtSigma
        StableAudio StableDiffusionGLIGEN StableDiffusionImageVariation StableDiffusionInpaintPipelineLegacy
        StableDiffusionModelEditing StableDiffusionUpscale StableUnCLIP StableUnCLIPImg2Img TextToVideoSD
        TextToVideoZero TextToVideoZeroSDXL VideoToVideoSD VQDiffusion
        """,
    ),
    (Family(_HALVES, guided="above 1", time="t/1000"), "AuraFlow"),
    (Family(_HALVES, guided="above 1", time="log(sigma)/4"), "StableDiffusionLatentUpscale"),
    (Family(_HALVES, guided="not 1"), "LDMTextToImage"),
    # ------------------------------------------------ halves of a batch, conditional first
    (Family(_SWAPPED, guided="above 1"), "DiT"),
    (Family(_SWAPPED, time="1-t/1000"), "Lumina"),
    # ------------------------------------------------ a call for each branch, conditional first
    (
        Family(calls=True),
        """
        ChronoEdit CogView4 CogView4Control Helios HeliosPyramid HunyuanSkyreelsImageToVideo HunyuanVideo
        HunyuanVideoFramepack HunyuanVideoImageToVideo JoyImageEdit Kandinsky5I2I Kandinsky5I2V Kandinsky5T2I
        Kandinsky5T2V LucyEdit SkyReelsV2 SkyReelsV2ImageToVideo Wan WanAnimate WanImageToVideo WanVACE WanVideoToVideo
        """,
    ),
    (
        Family(calls=True, time="t/1000"),
        """
        BriaFibo2 Chroma ChromaImg2Img ChromaInpaint Flux FluxControlNet FluxImg2Img FluxInpaint FluxKontext
        FluxKontextInpaint Flux2Klein Flux2KleinInpaint Krea2 LongCatAudioDiT LongCatImage LongCatImageEdit
        NucleusMoEImage OvisImage QwenImage QwenImage21 QwenImageControlNet QwenImageControlNetInpaint QwenImageEdit
        QwenImageEditInpaint QwenImageEditPlus QwenImageImg2Img QwenImageInpaint QwenImageLayered
        """,
    ),
    (Family(calls=True, time="1-t/1000"), "Lumina2"),
    (Family(reason=_CONDITIONED), "CosmosTextToWorld CosmosVideoToWorld"),
    (Family(reason=_CONDITIONED, time="sigma"), "Cosmos2_5_PredictBase Cosmos2_5_Transfer"),
    (Family(reason=_CONDITIONED, time="sigma/(1+sigma)"), "Cosmos2TextToImage Cosmos2VideoToWorld"),
    (Family(reason=_CALLS), "StableDiffusionGLIGENTextImage"),
    # ------------------------------------------------ one branch
    (
        Family(reason=_DISTILLED),
        """
        AudioDiffusion ConsistencyModel DanceDiffusion DDIM DDPM DreamLiteMobile Kandinsky6SR LatentConsistencyModel
        LatentConsistencyModelImg2Img LDM LDMSuperResolution MarigoldDepth MarigoldIntrinsics MarigoldNormals PNDM
        RePaint StableAudio3AudioToAudio StableAudio3Inpaint
        """,
    ),
    (
        Family(reason=_DISTILLED, time="t/1000"),
        """
        Flux2 FluxControl FluxControlImg2Img FluxControlInpaint FluxControlNetImg2Img FluxControlNetInpaint FluxFill
        VisualClozeGeneration
        """,
    ),
    (Family(reason=_DISTILLED, time="scm"), "SanaSprint SanaSprintImg2Img"),
    # ------------------------------------------------ other branches
    (
        Family(reason=_THREE),
        """
        AnimateDiffPAG CycleDiffusion DreamLite HunyuanDiTPAG KolorsPAG LEditsPPPipelineStableDiffusion
        LEditsPPPipelineStableDiffusionXL OmniGen PixArtSigmaPAG SemanticStableDiffusion
        StableDiffusion3PAG StableDiffusion3PAGImg2Img StableDiffusionAttendAndExcite StableDiffusionControlNetPAG
        StableDiffusionControlNetPAGInpaint StableDiffusionDiffEdit StableDiffusionInstructPix2Pix StableDiffusionPAG
        StableDiffusionPAGImg2Img StableDiffusionPAGInpaint StableDiffusionPipelineSafe
        StableDiffusionSAG StableDiffusionXLControlNetPAG StableDiffusionXLControlNetPAGImg2Img
        StableDiffusionXLInstructPix2Pix StableDiffusionXLPAG StableDiffusionXLPAGImg2Img StableDiffusionXLPAGInpaint
        """,
    ),
    (Family(reason=_THREE, time="t*scale"), "SanaPAG"),
    (Family(reason=_INTERLEAVED, views=True), "StableDiffusionPanorama"),
    (Family(reason=_OWN), "AceStep"),
    (Family(reason=_GUIDER), "HunyuanImage HunyuanImageRefiner HunyuanVideo15 HunyuanVideo15ImageToVideo MotifVideo"),
    (Family(reason=_GUIDER), "MotifVideoImage2Video"),
    (Family(reason=_MIXED), "HiDreamImage JoyImageEditPlus LTXI2VLongMultiPrompt SanaWM"),
    (Family(reason=_TWO_MODELS, time="1-t/1000"), "Ideogram4"),
    (Family(reason=_CALLS, time="1-t/1000"), "ZImage ZImageControlNet ZImageControlNetInpaint ZImageImg2Img"),
    (Family(reason=_CALLS, time="1-t/1000"), "ZImageInpaint ZImageOmni"),
    # ------------------------------------------------ no step can be left out
    (Family(reason=_MIXED, whole=_CACHED), "AnyFlowFAR"),
    (Family(reason=_CALLS, whole=_CACHED), "GlmImage"),
    (Family(reason=_DISTILLED, time="t/1000", whole=_CACHED), "Flux2KleinKV"),
    (Family(reason=_DISTILLED, time="", whole=_UNSTEPPED), "ScoreSdeVe KarrasVe"),
    (Family(reason=_CALLS, whole=_UNSTEPPED), "SkyReelsV2DiffusionForcing SkyReelsV2DiffusionForcingImageToVideo"),
    (Family(reason=_CALLS, whole=_UNSTEPPED), "SkyReelsV2DiffusionForcingVideoToVideo"),
    (Family(reason=_THREE, whole=_THROUGH), "StableDiffusionPix2PixZero"),
    (Family(reason=_MIXED, whole=_PARALLEL), "StableDiffusionParadigms"),
    (Family(reason=_MIXED, whole=_TWO_KINDS), "LTX2 LTX2Condition LTX2HDR LTX2ImageToVideo LTX2InContext LTX2DFR"),
    (Family(reason=_CALLS, whole=_TWO_KINDS), "Cosmos3Omni Kandinsky6TI2VA LTX2DFRTemporalRefine UniDiffuser"),
)

_BY_NAME = {
    name if "Pipeline" in name else f"{name}Pipeline": family for family, names in _FAMILIES for name in names.split()
}
UNKNOWN = Family(reason="its loop over the steps is not one that this toolkit knows", time="")


def family_of(pipeline: Any) -> Family:
    """The family of a pipeline, by the class whose `__call__` it runs; `UNKNOWN` if that is not one of diffusers'.

    A method that only calls the one of its base class, and no denoiser, does not count.
    """
    for cls in type(pipeline).__mro__:
        call = cls.__dict__.get("__call__")
        if call is None or "_accelerated_base" in cls.__dict__:
            continue
        if cls.__module__.partition(".")[0] == "diffusers":
            return _BY_NAME.get(cls.__name__, UNKNOWN)
        names = set(getattr(getattr(inspect.unwrap(call), "__code__", None), "co_names", ()))
        if not {"super", "__call__"} <= names or names & {"unet", "transformer", "scheduler"}:
            return UNKNOWN
    return UNKNOWN


def not_followed(pipeline: Any) -> str | None:
    """Why the steps of a pipeline's denoiser cannot be told apart or left out; None if they can."""
    for denoiser in find_denoisers(pipeline):
        names = forward_parameters(denoiser)
        if time_argument(names) is None or not {"sample", "hidden_states"} & set(names):
            return f"{type(denoiser).__name__} does not take latents and a timestep as other denoisers do"
    whole = family_of(pipeline).whole
    return None if whole is None else f"no step can be left out: {whole}"


def no_branches(pipeline: Any) -> str | None:
    """Why no branch of guidance can be left out at some steps; None if one can."""
    family, denoiser = family_of(pipeline), find_denoiser(pipeline)
    if family.reason:
        return f"{family.reason}, so guidance=both is the only choice"
    if _is_distilled(pipeline, denoiser):
        return "its guidance is an input of the distilled model, so guidance=both is the only choice"
    if denoiser is not None and not_a_unet(denoiser) is None and mixes_rows(denoiser):
        return "its attention processors may read other rows of a batch, so guidance=both is the only choice"
    return None


def _is_distilled(pipeline: Any, denoiser: Any) -> bool:
    """Whether the pipeline never uses guidance with this model, whatever its scale: it asks one of two configs."""
    asks = getattr(getattr(type(pipeline), "do_classifier_free_guidance", None), "fget", None)
    names = asks.__code__.co_names if asks is not None else ()
    proj = getattr(getattr(denoiser, "config", None), "time_cond_proj_dim", None)
    distilled = getattr(getattr(pipeline, "config", None), "is_distilled", False)
    return ("time_cond_proj_dim" in names and proj is not None) or ("is_distilled" in names and bool(distilled))


def unlike_halves(pipeline: Any) -> str | None:
    """Why a method that takes the batch for [unconditional, conditional] halves, or for one branch where a call has no
    guidance, would draw another image; None if it is right."""
    family = family_of(pipeline)
    if family.branches == _HALVES or family.calls or family.reason == _DISTILLED:
        return None
    return "the conditional half of its batch comes first" if family.branches else family.reason


def guided(pipeline: Any, arguments: dict[str, Any]) -> bool:
    """Whether a call with these `arguments` (by name, with their defaults) uses guidance at the present step."""
    how = family_of(pipeline).guided
    if how == "property":
        return bool(getattr(pipeline, "do_classifier_free_guidance", False))
    scale = arguments.get("guidance_scale")
    if scale is None:
        return False
    return float(scale) > 1 if how == "above 1" else float(scale) != 1


def call_arguments(call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a method is called with, by name and with its defaults; empty if it does not take that."""
    try:
        bound = inspect.signature(call).bind_partial(None, *args, **kwargs)
    except TypeError:
        return {}  # the call itself says why
    bound.apply_defaults()
    return dict(bound.arguments)


# ---------------------------------------------------------------------- the timestep
_TIME_ARGUMENTS = ("timestep", "timesteps")


def time_argument(names: Any) -> str | None:
    """Which of a denoiser's arguments is the timestep."""
    return next((name for name in _TIME_ARGUMENTS if name in names), None)


@dataclass(frozen=True)
class Moment:
    """An entry of a scheduler's timesteps: its value, σ where the scheduler has it, and what the units divide by."""

    timestep: float
    sigma: float
    training: float
    scale: float


#: what the denoiser is told, by unit
UNITS: dict[str, Callable[[Moment], float]] = {
    "t": lambda m: m.timestep,
    "t/1000": lambda m: m.timestep / m.training,
    "1-t/1000": lambda m: 1 - m.timestep / m.training,
    "t*scale": lambda m: m.timestep * m.scale,
    "sigma": lambda m: m.sigma,
    "sigma/(1+sigma)": lambda m: m.sigma / (1 + m.sigma),
    "log(sigma)/4": lambda m: math.log(max(m.sigma, 1e-12)) / 4,
    "scm": lambda m: math.sin(m.timestep) / (math.cos(m.timestep) + math.sin(m.timestep)),
}


def told(pipeline: Any, scheduler: Any, unit: str) -> list[float]:
    """What the denoiser is told at each of the scheduler's timesteps, in a unit of `UNITS`."""
    timesteps = [float(t) for t in scheduler.timesteps.tolist()]
    sigmas = getattr(scheduler, "sigmas", None)
    known = [float(s) for s in sigmas.tolist()] if isinstance(sigmas, torch.Tensor) else []
    known += [math.nan] * (len(timesteps) - len(known))
    training = float(getattr(scheduler, "config", {}).get("num_train_timesteps", 1000))
    scale = getattr(getattr(find_denoiser(pipeline), "config", None), "timestep_scale", None) or 1.0
    return [UNITS[unit](Moment(t, s, training, scale)) for t, s in zip(timesteps, known, strict=False)]
