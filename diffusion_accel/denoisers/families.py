"""What is known of diffusers' pipelines and models, by class, as data. Nothing here imports torch.

Two tables, a row for each class or for all that are alike: `PipelineFamily`, what a pipeline does in its loop, and
`ModelFamily`, what a model is made of. Nothing is guessed from values: a pipeline belongs to the family of the class
whose `__call__` it runs, and what would need to know more of an unknown one is refused.

A class of diffusers gets a row in these tables, one of somebody else `register_family`; see
docs/design/support-a-new-model.md.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

from diffusion_accel.errors import ConfigurationError

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline


Rows = TypeVar("Rows", "torch.Tensor", "list[Any]")


# ---------------------------------------------------------------------- the timestep
@dataclass(frozen=True)
class Moment:
    """An entry of a scheduler's timesteps: its value, σ where the scheduler has it, and what the units divide by."""

    timestep: float
    sigma: float
    training: float
    scale: float


#: what the denoiser is told of a scheduler's timestep, by unit
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
Unit = str | Callable[[Moment], float]


# ---------------------------------------------------------------------- what a row says
@dataclass(frozen=True)
class Branches:
    """The two branches of guidance as halves of a batch; `conditional_first` says in which order."""

    conditional_first: bool = False

    def conditional(self, rows: Rows) -> Rows:
        """The rows of the conditional branch, of a tensor or a list."""
        half = len(rows) // 2
        return rows[:half] if self.conditional_first else rows[half:]

    def difference(self, tensor: torch.Tensor) -> torch.Tensor:
        """The unconditional branch minus the conditional one."""
        first, second = tensor.chunk(2)
        return second - first if self.conditional_first else first - second

    def joined(self, conditional: torch.Tensor, difference: torch.Tensor | None = None) -> torch.Tensor:
        """Both branches from the conditional one and their difference; without it they are the same."""
        import torch  # heavy: torch, which reading the tables does not need

        other = conditional if difference is None else conditional + difference
        return torch.cat([conditional, other] if self.conditional_first else [other, conditional])


GUIDED = ("property", "above 1", "not 1")


@dataclass(frozen=True)
class PipelineFamily:
    """What a pipeline class does with its denoiser.

    Attributes:
        branches: the halves of the batch with guidance; None if it has no such halves.
        calls: it calls its denoiser for the conditional branch, then, with guidance, for the unconditional one.
        reason: why no branch can be left out, as the end of a sentence; empty if one can.
        guided: how a call says that it uses guidance: "property": `do_classifier_free_guidance`; "above 1" or "not 1":
            by its argument `guidance_scale`.
        time: what it tells the denoiser of the scheduler's timestep: one of `UNITS`, or a function of a `Moment`; "":
            not known, each of `UNITS` is tried.
        negated: its scheduler is given the opposite of what the denoiser says.
        views: it calls denoiser and scheduler once for each view of the image at every step.
        whole: why no step of the denoiser can be left out, as the end of a sentence; None if any can.
        reads: why no part of its U-Net can be left out at any step, as a sentence; None if one can. Holds for
            subclasses with a loop of their own, too.
    """

    branches: Branches | None = None
    calls: bool = False
    reason: str = ""
    guided: str = "property"
    time: Unit = "t"
    negated: bool = False
    views: bool = False
    whole: str | None = None
    reads: str | None = None

    def __post_init__(self) -> None:
        if self.guided not in GUIDED:
            raise ConfigurationError(f"guided must be one of {', '.join(GUIDED)}, got {self.guided!r}")
        if isinstance(self.time, str) and self.time not in ("", *UNITS):
            raise ConfigurationError(f"time must be one of {', '.join(UNITS)}, or a function, got {self.time!r}")
        if sum((self.branches is not None, self.calls, bool(self.reason))) > 1:
            raise ConfigurationError("branches, calls and reason exclude each other: a pipeline has one layout")


KINDS = ("unet", "transformer", "autoencoder", "controlnet")
PRESETS = ("", "sd", "sdxl", "lsun", "dit")


TEXT_PLACES = ("", "first", "last")


@dataclass(frozen=True)
class Tokens:
    """How the tokens of a transformer are shared among processes, each of which has a range of them.

    They are cut where they enter the first block; self-attention gets the keys and values of all; they are put
    together behind `end`. Whatever lies between treats every token by itself.

    Attributes:
        end: the name of that last layer; its output is (batch, tokens, channels). "*" is each of a list.
        text: where the sequence of self-attention has tokens of a text beside the image's: "first" or "last". Every
            process has all of these. "": there are none, and an attention that is given a text attends to it only.
        positions: of the arguments of the blocks that have a value for every token, the dimension of the tokens; of a
            tuple, that of each entry, None if it has no such values.
        controls: arguments of the model with (batch, tokens, channels) that are added between blocks.
        refused: arguments of the model with which another sequence would be made.
        lists: the lists that hold the blocks; () for those of `ModelFamily.stream_lists`.
        blocks: the classes of block; () for those of `ModelFamily.streams`.
        argument: of the blocks, the tokens.
    """

    end: str
    text: str = ""
    positions: Mapping[str, int | tuple[int | None, ...]] = field(default_factory=lambda: MappingProxyType({}))
    controls: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    lists: tuple[str, ...] = ()
    blocks: tuple[str, ...] = ()
    argument: str = "hidden_states"

    def __post_init__(self) -> None:
        if self.text not in TEXT_PLACES:
            raise ConfigurationError(f"text must be one of {', '.join(TEXT_PLACES[1:])} or empty, got {self.text!r}")


@dataclass(frozen=True)
class ModelFamily:
    """What a model class is made of.

    Attributes:
        kind: one of `KINDS`.
        stream_lists: of a transformer whose blocks add to streams: the lists that hold them, in the order in which
            `forward` runs them; "a|b": a block of each list in turn. What lies between two blocks only moves values or
            adds what does not come from the stream.
        streams: by class of block, the arguments that it adds to, in the order in which it returns them; one stream
            comes as a tensor.
        ragged: its streams are as long as the longest text of a batch.
        splittable: its layers look beyond one position only by convolutions, group normalisation and self-attention,
            so they can work on slices of the image that exchange their borders.
        tokens: of a transformer, how its tokens are shared among processes; None if they cannot be.
        time: what it takes for the timestep, as in `PipelineFamily`; "": not known.
        frames_dim: of a (B, ., ., H, W) sample of a video, the dimension of the frames.
        mag_cache: diffusers' MagCache has ratios for it.
        preset: which layers of it post-training quantization finetunes, one of `PRESETS`; "": by what it is made of.
    """

    kind: str
    stream_lists: tuple[str, ...] = ()
    streams: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: MappingProxyType({}))
    ragged: bool = False
    splittable: bool = False
    tokens: Tokens | None = None
    time: Unit = ""
    frames_dim: int = 2
    mag_cache: bool = False
    preset: str = ""

    def __post_init__(self) -> None:
        for name, value, allowed in (("kind", self.kind, KINDS), ("preset", self.preset, PRESETS)):
            if value not in allowed:
                raise ConfigurationError(f"{name} must be one of {', '.join(filter(None, allowed))}, got {value!r}")
        if bool(self.stream_lists) != bool(self.streams):
            raise ConfigurationError("stream_lists and streams come together: where the blocks are, and what they add")


# ---------------------------------------------------------------------- pipelines
HALVES, _SWAPPED = Branches(), Branches(conditional_first=True)
_CALLS = "it calls its denoiser several times for what it guides by"
_CONDITIONED = "its branches are given different latents"
DISTILLED = "it calls its denoiser for one branch only (its guidance, if it has any, is an input of the model)"
_THREE = "its batch has more than an unconditional and a conditional half"
_INTERLEAVED = "its batch has the branches of guidance in turn, one view after the other"
_OWN = "it decides by itself at which steps it uses guidance"
_GUIDER = "its guider component decides which branches are computed"
_MIXED = "its denoiser has arguments in which the branches cannot be told apart"
_TWO_MODELS = "its branches are computed by two models"
_UNEVEN = "what its ControlNet adds is as long as the longest text of both branches"

_CACHED = "its denoiser writes keys and values that later calls read"
_UNSTEPPED = "it moves the latents by other methods than its scheduler's step"
_TWO_KINDS = "its denoiser predicts two things at once (such as video and sound)"
_THROUGH = "it moves the latents by gradients through its denoiser"
_SEVERAL = "it gives its denoiser several images of different sizes for each that it draws"
_PARALLEL = "it denoises several timesteps in one batch"

_MAPS = "the edit masks are computed from attention maps of every step"
_ATTENTION = "self-attention guidance reads the mid block's attention maps at every step"
_EXCITES = "attend-and-excite optimises the latents through the encoder"
_MASK = "the mask is computed from differences between single predictions"

# A text of class names for each family; "Name" stands for "NamePipeline".
_PIPELINES: tuple[tuple[PipelineFamily, str], ...] = (
    # ------------------------------------------------ halves of a batch, unconditional first
    (
        PipelineFamily(HALVES),
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
    (PipelineFamily(HALVES, time="t/1000"), "PRX PRXPixel"),
    (PipelineFamily(HALVES, time="t*scale"), "Sana"),
    (
        PipelineFamily(HALVES, guided="above 1"),
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
    (PipelineFamily(HALVES, guided="above 1", time="t/1000"), "AuraFlow"),
    (PipelineFamily(HALVES, guided="above 1", time="log(sigma)/4"), "StableDiffusionLatentUpscale"),
    (PipelineFamily(HALVES, guided="not 1"), "LDMTextToImage"),
    # ------------------------------------------------ halves of a batch, conditional first
    (PipelineFamily(_SWAPPED, guided="above 1"), "DiT"),
    (PipelineFamily(_SWAPPED, time="1-t/1000", negated=True), "Lumina ZImage ZImageImg2Img ZImageInpaint"),
    # ------------------------------------------------ a call for each branch, conditional first
    (
        PipelineFamily(calls=True),
        """
        ChronoEdit CogView4 CogView4Control Helios HeliosPyramid HunyuanSkyreelsImageToVideo HunyuanVideo
        HunyuanVideoFramepack HunyuanVideoImageToVideo JoyImageEdit Kandinsky5I2I Kandinsky5I2V Kandinsky5T2I
        Kandinsky5T2V LucyEdit SkyReelsV2 SkyReelsV2ImageToVideo Wan WanAnimate WanImageToVideo WanVACE WanVideoToVideo
        """,
    ),
    (
        PipelineFamily(calls=True, time="t/1000"),
        """
        BriaFibo2 Chroma ChromaImg2Img ChromaInpaint Flux FluxControlNet FluxImg2Img FluxInpaint FluxKontext
        FluxKontextInpaint Flux2Klein Flux2KleinInpaint Krea2 LongCatAudioDiT LongCatImage LongCatImageEdit
        OvisImage QwenImage QwenImage21 QwenImageControlNet QwenImageControlNetInpaint QwenImageEdit
        QwenImageEditInpaint QwenImageEditPlus QwenImageImg2Img QwenImageInpaint QwenImageLayered
        """,
    ),
    (PipelineFamily(calls=True, time="1-t/1000", negated=True), "Lumina2"),
    (PipelineFamily(calls=True, time="t/1000", negated=True), "NucleusMoEImage"),
    (PipelineFamily(reason=_CONDITIONED), "CosmosTextToWorld CosmosVideoToWorld"),
    (PipelineFamily(reason=_CONDITIONED, time="sigma"), "Cosmos2_5_PredictBase Cosmos2_5_Transfer"),
    (PipelineFamily(reason=_CONDITIONED, time="sigma/(1+sigma)"), "Cosmos2TextToImage Cosmos2VideoToWorld"),
    (PipelineFamily(reason=_CALLS), "StableDiffusionGLIGENTextImage"),
    # ------------------------------------------------ one branch
    (
        PipelineFamily(reason=DISTILLED),
        """
        AudioDiffusion ConsistencyModel DanceDiffusion DDIM DDPM DreamLiteMobile Kandinsky6SR LatentConsistencyModel
        LatentConsistencyModelImg2Img LDM LDMSuperResolution MarigoldDepth MarigoldIntrinsics MarigoldNormals PNDM
        RePaint StableAudio3AudioToAudio StableAudio3Inpaint
        """,
    ),
    (
        PipelineFamily(reason=DISTILLED, time="t/1000"),
        """
        Flux2 FluxControl FluxControlImg2Img FluxControlInpaint FluxControlNetImg2Img FluxControlNetInpaint FluxFill
        VisualClozeGeneration
        """,
    ),
    (PipelineFamily(reason=DISTILLED, time="scm"), "SanaSprint SanaSprintImg2Img"),
    # ------------------------------------------------ other branches
    (
        PipelineFamily(reason=_THREE),
        """
        AnimateDiffPAG CycleDiffusion DreamLite HunyuanDiTPAG KolorsPAG OmniGen PixArtSigmaPAG SemanticStableDiffusion
        StableDiffusion3PAG StableDiffusion3PAGImg2Img StableDiffusionControlNetPAG StableDiffusionControlNetPAGInpaint
        StableDiffusionInstructPix2Pix StableDiffusionPAG StableDiffusionPAGImg2Img StableDiffusionPAGInpaint
        StableDiffusionPipelineSafe StableDiffusionXLControlNetPAG StableDiffusionXLControlNetPAGImg2Img
        StableDiffusionXLInstructPix2Pix StableDiffusionXLPAG StableDiffusionXLPAGImg2Img StableDiffusionXLPAGInpaint
        """,
    ),
    (PipelineFamily(reason=_THREE, reads=_MAPS), "LEditsPPPipelineStableDiffusion LEditsPPPipelineStableDiffusionXL"),
    (PipelineFamily(reason=_THREE, reads=_EXCITES), "StableDiffusionAttendAndExcite"),
    (PipelineFamily(reason=_THREE, reads=_MASK), "StableDiffusionDiffEdit"),
    (PipelineFamily(reason=_THREE, reads=_ATTENTION), "StableDiffusionSAG"),
    (PipelineFamily(reason=_THREE, time="t*scale"), "SanaPAG"),
    (PipelineFamily(reason=_INTERLEAVED, views=True), "StableDiffusionPanorama"),
    (PipelineFamily(reason=_OWN), "AceStep"),
    (PipelineFamily(reason=_GUIDER), "HunyuanImage HunyuanImageRefiner HunyuanVideo15 HunyuanVideo15ImageToVideo"),
    (PipelineFamily(reason=_GUIDER), "MotifVideo MotifVideoImage2Video"),
    (PipelineFamily(reason=_MIXED), "JoyImageEditPlus LTXI2VLongMultiPrompt"),
    (PipelineFamily(reason=_MIXED, negated=True), "HiDreamImage SanaWM"),
    (PipelineFamily(reason=_TWO_MODELS, time="1-t/1000"), "Ideogram4"),
    (PipelineFamily(reason=_UNEVEN, time="1-t/1000", negated=True), "ZImageControlNet ZImageControlNetInpaint"),
    # ------------------------------------------------ no step can be left out
    (PipelineFamily(reason=_MIXED, whole=_CACHED), "AnyFlowFAR"),
    (PipelineFamily(reason=_CALLS, whole=_CACHED), "GlmImage"),
    (PipelineFamily(reason=DISTILLED, time="t/1000", whole=_CACHED), "Flux2KleinKV"),
    (PipelineFamily(reason=DISTILLED, time="", whole=_UNSTEPPED), "ScoreSdeVe KarrasVe"),
    (PipelineFamily(reason=_CALLS, whole=_UNSTEPPED), "SkyReelsV2DiffusionForcing"),
    (PipelineFamily(reason=_CALLS, whole=_UNSTEPPED), "SkyReelsV2DiffusionForcingImageToVideo"),
    (PipelineFamily(reason=_CALLS, whole=_UNSTEPPED), "SkyReelsV2DiffusionForcingVideoToVideo"),
    (PipelineFamily(reason=_THREE, whole=_THROUGH), "StableDiffusionPix2PixZero"),
    (PipelineFamily(reason=_MIXED, time="1-t/1000", negated=True, whole=_SEVERAL), "ZImageOmni"),
    (PipelineFamily(reason=_MIXED, whole=_PARALLEL), "StableDiffusionParadigms"),
    (PipelineFamily(reason=_MIXED, whole=_TWO_KINDS), "LTX2 LTX2Condition LTX2HDR LTX2ImageToVideo LTX2InContext"),
    (PipelineFamily(reason=_MIXED, whole=_TWO_KINDS), "LTX2DFR"),
    (PipelineFamily(reason=_CALLS, whole=_TWO_KINDS), "Cosmos3Omni Kandinsky6TI2VA LTX2DFRTemporalRefine UniDiffuser"),
)

_PIPELINE_OF = {
    name if "Pipeline" in name else f"{name}Pipeline": family for family, names in _PIPELINES for name in names.split()
}
UNKNOWN = PipelineFamily(reason="its loop over the steps is not one that this toolkit knows", time="")


# ---------------------------------------------------------------------- models
_ONE = ("hidden_states",)
_TEXT_FIRST, _TEXT_LAST = ("encoder_hidden_states", "hidden_states"), ("hidden_states", "encoder_hidden_states")
_BOTH_LISTS = "transformer_blocks single_transformer_blocks"


def _transformer(lists: str, streams: Mapping[str, tuple[str, ...]], **facts: Any) -> ModelFamily:
    return ModelFamily("transformer", tuple(lists.split()), MappingProxyType(dict(streams)), **facts)


def _rotary(end: str, text: str = "", dim: int = 0, **more: Any) -> Tokens:
    """Tokens with rotary embeddings, a pair of tensors in which `dim` is that of the tokens."""
    return Tokens(end, text, MappingProxyType({"image_rotary_emb": dim}), **more)


_BASIC = {"BasicTransformerBlock": _ONE}
_CONTROLS = ("controlnet_block_samples", "controlnet_single_block_samples")
_MODELS: dict[str, ModelFamily] = {
    # U-Nets and what is built like them
    "UNet2DModel": ModelFamily("unet", splittable=True, preset="lsun"),
    "UNet2DConditionModel": ModelFamily("unet", splittable=True),
    "UNet3DConditionModel": ModelFamily("unet", splittable=True),
    "UNetMotionModel": ModelFamily("unet", splittable=True),
    "UNetSpatioTemporalConditionModel": ModelFamily("unet", splittable=True, frames_dim=1),
    "AutoencoderKL": ModelFamily("autoencoder", splittable=True),
    "AutoencoderKLTemporalDecoder": ModelFamily("autoencoder", splittable=True),
    "ControlNetModel": ModelFamily("controlnet", splittable=True),
    # transformers
    "AllegroTransformer3DModel": _transformer(
        "transformer_blocks",
        {"AllegroTransformerBlock": _ONE},
        tokens=Tokens("proj_out", positions={"image_rotary_emb": (None, -1)}),
    ),
    "AuraFlowTransformer2DModel": _transformer(
        "joint_transformer_blocks single_transformer_blocks",
        {"AuraFlowJointTransformerBlock": _TEXT_FIRST, "AuraFlowSingleTransformerBlock": _ONE},
        tokens=Tokens("proj_out", "first"),
    ),
    "ChromaTransformer2DModel": _transformer(
        _BOTH_LISTS,
        {"ChromaTransformerBlock": _TEXT_FIRST, "ChromaSingleTransformerBlock": _ONE},
        tokens=_rotary("proj_out", "first", controls=_CONTROLS),
    ),
    "CogVideoXTransformer3DModel": _transformer(
        "transformer_blocks", {"CogVideoXBlock": _TEXT_LAST}, tokens=_rotary("proj_out", "first")
    ),
    "CogView3PlusTransformer2DModel": _transformer(
        "transformer_blocks", {"CogView3PlusTransformerBlock": _TEXT_LAST}, tokens=Tokens("proj_out", "first")
    ),
    "CogView4Transformer2DModel": _transformer(
        "transformer_blocks", {"CogView4TransformerBlock": _TEXT_LAST}, tokens=_rotary("proj_out", "first")
    ),
    "DiTTransformer2DModel": _transformer("transformer_blocks", _BASIC, tokens=Tokens("proj_out_2")),
    "Flux2Transformer2DModel": _transformer(
        _BOTH_LISTS,
        {"Flux2TransformerBlock": _TEXT_FIRST, "Flux2SingleTransformerBlock": _ONE},
        mag_cache=True,
        tokens=_rotary("proj_out", "first", refused=("kv_cache_mode",)),
    ),
    "FluxTransformer2DModel": _transformer(
        _BOTH_LISTS,
        {"FluxTransformerBlock": _TEXT_FIRST, "FluxSingleTransformerBlock": _TEXT_FIRST},
        time="t/1000",
        mag_cache=True,
        tokens=_rotary("proj_out", "first", controls=_CONTROLS),
    ),
    "HunyuanDiT2DModel": _transformer(
        "blocks", {"HunyuanDiTBlock": _ONE}, preset="sd", tokens=_rotary("proj_out", controls=_CONTROLS[:1])
    ),
    "HunyuanVideoTransformer3DModel": _transformer(
        _BOTH_LISTS,
        {"HunyuanVideoTransformerBlock": _TEXT_LAST, "HunyuanVideoSingleTransformerBlock": _TEXT_LAST},
        tokens=Tokens("proj_out", "last", {"freqs_cis": 0, "image_rotary_emb": 0}),
    ),
    "LTXVideoTransformer3DModel": _transformer(
        "transformer_blocks",
        {"LTXVideoTransformerBlock": _ONE},
        tokens=Tokens("norm_out", positions={"image_rotary_emb": 1, "temb": 1}),
    ),
    "LatteTransformer3DModel": _transformer("transformer_blocks|temporal_transformer_blocks", _BASIC),
    "Lumina2Transformer2DModel": _transformer(
        "layers", {"Lumina2TransformerBlock": _ONE}, tokens=_rotary("norm_out", dim=1)
    ),
    "MochiTransformer3DModel": _transformer(
        "transformer_blocks", {"MochiTransformerBlock": _TEXT_LAST}, tokens=_rotary("proj_out", "last")
    ),
    "PixArtTransformer2DModel": _transformer("transformer_blocks", _BASIC, tokens=Tokens("proj_out")),
    "QwenImageTransformer2DModel": _transformer(
        "transformer_blocks",
        {"QwenImageTransformerBlock": _TEXT_FIRST},
        tokens=Tokens("proj_out", "first", {"image_rotary_emb": (0, None), "modulate_index": 1}, _CONTROLS[:1]),
    ),
    "SD3Transformer2DModel": _transformer(
        "transformer_blocks",
        {"JointTransformerBlock": _TEXT_FIRST},
        tokens=Tokens("proj_out", "last", controls=("block_controlnet_hidden_states",)),
    ),
    "SanaTransformer2DModel": _transformer("transformer_blocks", {"SanaTransformerBlock": _ONE}),
    "StableAudioDiTModel": _transformer(
        "transformer_blocks",
        {"StableAudioDiTBlock": _ONE},
        preset="sd",
        tokens=Tokens("proj_out", positions={"rotary_embedding": 0}),
    ),
    "Transformer2DModel": _transformer("transformer_blocks", _BASIC),
    "WanTransformer3DModel": _transformer(
        "blocks", {"WanTransformerBlock": _ONE}, tokens=Tokens("norm_out", positions={"rotary_emb": 1, "temb": -3})
    ),
    "ZImageTransformer2DModel": _transformer(
        "layers",
        {"ZImageTransformerBlock": ("x",)},
        ragged=True,
        tokens=Tokens(
            "all_final_layer.*",
            "last",
            {"freqs_cis": 1},
            refused=("image_noise_mask", "controlnet_block_samples"),
            lists=("noise_refiner", "layers"),
            blocks=("ZImageTransformerBlock",),
            argument="x",
        ),
    ),
}
#: transformer blocks whose branches (attention, feed-forward) begin where task routing expects them to
SEPARABLE_BLOCKS = frozenset(
    {"BasicTransformerBlock", "JointTransformerBlock", "FluxTransformerBlock", "FluxSingleTransformerBlock"}
)


# ---------------------------------------------------------------------- asking
_registered: dict[type, PipelineFamily | ModelFamily] = {}


def register_family(cls: type, family: PipelineFamily | ModelFamily) -> None:
    """Say what is known of a class that is none of diffusers': a pipeline with a `__call__` of its own, or a model.

    Args:
        cls: the class itself; subclasses that run the same `__call__` (`forward`) belong to the family, too.
        family: `PipelineFamily` for a pipeline, `ModelFamily` for a model.

    Raises:
        ConfigurationError: the class has no `__call__` (`forward`) of its own that the family could be about.
    """
    pipeline = isinstance(family, PipelineFamily)
    method = "__call__" if pipeline else "forward"
    if not isinstance(cls, type) or method not in vars(cls):
        name = getattr(cls, "__name__", type(cls).__name__)
        raise ConfigurationError(
            f"{name} has no {method} of its own, and a {type(family).__name__} says what that does; give the class "
            "that defines it"
        )
    _registered[cls] = family


def family_of(pipeline: DiffusionPipeline) -> PipelineFamily:
    """The family of a pipeline, by the class whose `__call__` it runs; `UNKNOWN` if that is none that is known.

    A method that only calls the one of its base class, and no denoiser, does not count.
    """
    for cls in type(pipeline).__mro__:
        call = cls.__dict__.get("__call__")
        if call is None or "_accelerated_base" in cls.__dict__:
            continue
        registered = _registered.get(cls)
        if isinstance(registered, PipelineFamily):
            return registered
        if cls.__module__.partition(".")[0] == "diffusers":
            return _PIPELINE_OF.get(cls.__name__, UNKNOWN)
        names = set(getattr(getattr(inspect.unwrap(call), "__code__", None), "co_names", ()))
        if not {"super", "__call__"} <= names or names & {"unet", "transformer", "scheduler"}:
            return UNKNOWN
    return UNKNOWN


def model_family(cls: type) -> ModelFamily | None:
    """The family of a model class itself, not of its base classes; None if it is not known."""
    registered = _registered.get(cls)
    return registered if isinstance(registered, ModelFamily) else _MODELS.get(cls.__name__)


def reads_every_step(pipeline: DiffusionPipeline) -> str | None:
    """Why no step of this pipeline's denoiser may be skipped; None if any may."""
    for cls in type(pipeline).__mro__:
        known = _registered.get(cls) or _PIPELINE_OF.get(cls.__name__)
        if isinstance(known, PipelineFamily) and known.reads is not None:
            return known.reads
    return None
