"""What this toolkit knows of denoisers: nothing else knows how diffusers names the blocks of a model.

- `families`: tables of what is known of the classes of pipelines and models; `register_family` for other people's
- `find`: the denoisers of a pipeline, and what tells them apart
- `batch`: what they are given and return
- `unet`, `transformer`: the parts of the two kinds, in the order in which a step runs them
- `layers`: layers by what they do, wherever they are
- `guidance`: the branches of guidance
- `timestep`: what a denoiser is told of the scheduler's timesteps

Names are loaded when they are first used: the tables need no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .batch import (
        latents_argument,
        latents_of,
        like_latents,
        lists_samples,
        prediction,
        with_prediction,
    )
    from .families import (
        UNITS,
        UNKNOWN,
        Branches,
        ModelFamily,
        Moment,
        PipelineFamily,
        Tokens,
        family_of,
        model_family,
        reads_every_step,
        register_family,
    )
    from .find import (
        DENOISERS,
        called_denoisers,
        closed_inside,
        denoiser_name,
        denoiser_names,
        draws_pixels,
        find_controlnet,
        find_denoiser,
        find_denoisers,
        fingerprint,
        getattr_path,
        models_of_a_call,
        unwrapped,
    )
    from .guidance import (
        guided,
        no_branches,
        not_followed,
        scale_argument,
        unlike_halves,
    )
    from .layers import (
        FEED_FORWARD,
        KEYS_VALUES,
        QUERIES,
        SAMPLE_KEYS_VALUES,
        SELF_KEYS_VALUES,
        TIME_LAYERS,
        asymmetric_convolutions,
        attentions,
        class_tables,
        condition_halvings,
        doublings,
        edge_layers,
        entry_layer,
        halvings,
        is_block,
        mixes_rows,
        not_splittable,
        ordered_attentions,
        quantization_preset,
        rows_are_independent,
        spatial_attentions,
        text_norms,
        usual_attention,
    )
    from .timestep import (
        time_argument,
        timestep_kind,
        told,
    )
    from .transformer import (
        StreamBlock,
        TokenLayers,
        is_ragged,
        residual_stream_blocks,
        stream_blocks,
        token_layers,
    )
    from .unet import (
        BATCH_ARGUMENTS,
        RESIDUAL_ARGUMENTS,
        UNetLayers,
        UNetStages,
        concatenated_inputs,
        frames_of,
        layers_per_block,
        not_a_unet,
        residual_branches,
        unet_layers,
        unet_stages,
        uses_freeu,
    )

__all__ = [
    "BATCH_ARGUMENTS",
    "DENOISERS",
    "FEED_FORWARD",
    "KEYS_VALUES",
    "QUERIES",
    "RESIDUAL_ARGUMENTS",
    "SAMPLE_KEYS_VALUES",
    "SELF_KEYS_VALUES",
    "TIME_LAYERS",
    "UNITS",
    "UNKNOWN",
    "Branches",
    "ModelFamily",
    "Moment",
    "PipelineFamily",
    "StreamBlock",
    "TokenLayers",
    "Tokens",
    "UNetLayers",
    "UNetStages",
    "asymmetric_convolutions",
    "attentions",
    "called_denoisers",
    "class_tables",
    "closed_inside",
    "concatenated_inputs",
    "condition_halvings",
    "denoiser_name",
    "denoiser_names",
    "doublings",
    "draws_pixels",
    "edge_layers",
    "entry_layer",
    "family_of",
    "find_controlnet",
    "find_denoiser",
    "find_denoisers",
    "fingerprint",
    "frames_of",
    "getattr_path",
    "guided",
    "halvings",
    "is_block",
    "is_ragged",
    "latents_argument",
    "latents_of",
    "layers_per_block",
    "like_latents",
    "lists_samples",
    "mixes_rows",
    "model_family",
    "models_of_a_call",
    "no_branches",
    "not_a_unet",
    "not_followed",
    "not_splittable",
    "ordered_attentions",
    "prediction",
    "quantization_preset",
    "reads_every_step",
    "register_family",
    "residual_branches",
    "residual_stream_blocks",
    "rows_are_independent",
    "scale_argument",
    "spatial_attentions",
    "stream_blocks",
    "text_norms",
    "time_argument",
    "timestep_kind",
    "token_layers",
    "told",
    "unet_layers",
    "unet_stages",
    "unlike_halves",
    "unwrapped",
    "uses_freeu",
    "usual_attention",
    "with_prediction",
]
_PARTS = ("families", "find", "batch", "unet", "transformer", "layers", "guidance", "timestep")


def __getattr__(name: str) -> Any:
    if name in __all__:
        for part in _PARTS:
            module = importlib.import_module(f".{part}", __name__)
            if name in vars(module):
                return vars(module)[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
