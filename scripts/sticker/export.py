"""From trained stages to a diffusers folder, and from a diffusers folder to images and numbers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from diffusion_accel.evaluation.distribution import hit_shares
from diffusion_accel.io import first_line
from diffusion_accel.model_files.index_notes import KEY, notes_of
from diffusion_accel.model_files.names import EMBEDDED
from diffusion_accel.outputs import replacing_folder
from diffusion_accel.routing.hooks import CONFIG_KEY
from diffusion_accel.training import archives
from diffusion_accel.training.denoising import Process
from diffusion_accel.training.diffusion_task import Denoiser, prediction_error, sample_of
from diffusion_accel.training.files import TrainingError, UsageError
from diffusion_accel.training.images import mean_psnr
from diffusion_accel.training.models import float32_text
from diffusion_accel.training.state import STATE, load_average, read_counters

from . import data
from .flux import STATES_LENGTH, FluxDenoiser, build_flux_pipeline, build_states_encoder, build_transformer, initialise
from .latents import PatchCodec, write_encoder
from .models import Shape, build_pipeline, build_text_encoder, build_unet, build_vae

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DiffusionPipeline

THUMBNAIL = 24  # pixels on a side of the images that retrieval compares


# ------------------------------------------------------------------------------------------- export
def build_trained_vae(work: Path) -> tuple[AutoencoderKL, dict[str, float]]:
    """The analytic encoder with the trained decoder, and how exact it is on held-out images (dB, relative error)."""
    rows, images, shape = data.load_rows(work), data.load_images(work), Shape.of_work(work)
    codec, vae = PatchCodec.load(work / "codec.safetensors"), build_vae(shape)
    core = np.array([i for i, row in enumerate(rows) if row["core"]])
    write_encoder(vae, codec, archives.on_colours(images[core[:: max(1, len(core) // 140)]]))
    load_average(work / "decoder", vae.decoder, "decoder")
    heldout = data.of_split(rows, "heldout")[:96]
    shown = archives.on_colours(images[heldout if len(heldout) else core[:96]])
    with torch.no_grad():
        exact, written = codec.encode(shown), vae.encode(shown).latent_dist.mean
        check = {
            "encoder_relative_error": float((written - exact).norm() / exact.norm()),
            "psnr_vae": mean_psnr(vae.decode(written).sample.clamp(-1, 1), shown),
        }
    return vae, check


def denoiser_of(work: Path, shape: Shape) -> Denoiser:
    """An untrained denoiser with its text encoders, for the tokenizers of a work folder."""
    text = build_text_encoder(shape, data.load_tokenizer(work))
    if not shape.transformer_blocks:
        return Denoiser(build_unet(shape), text)
    transformer = build_transformer(shape)
    initialise(transformer)
    return FluxDenoiser(transformer, text, build_states_encoder(shape, len(data.load_states_tokenizer(work))))


def load_text_encoder(work: Path, source: str, text: torch.nn.Module) -> None:
    """Load the text encoder of another pipeline, which must have the work folder's tokenizer and sizes, into `text`."""
    from transformers import CLIPTextModel, CLIPTokenizer

    folder = EMBEDDED[source].path if source in EMBEDDED else Path(source)
    theirs = CLIPTokenizer.from_pretrained(folder / "tokenizer").get_vocab()
    if theirs != data.load_tokenizer(work).get_vocab():
        raise UsageError(f"the tokenizer of {source} is not that of {work}: its text encoder cannot be begun with")
    try:
        text.load_state_dict(CLIPTextModel.from_pretrained(folder / "text_encoder").state_dict())
    except RuntimeError as error:
        raise UsageError(f"the text encoder of {source} has other sizes: {first_line(error)}") from error


def load_weights(source: str, model: torch.nn.Module) -> None:
    """Load the weights of another pipeline, an embedded model or a folder, into a denoiser with its text encoders, or
    into a VAE's decoder.

    Raises:
        UsageError: they are those of another model, or no such pipeline is there.
    """
    pipeline = load_pipeline(EMBEDDED[source].path if source in EMBEDDED else Path(source))
    parts: dict[str, Any] = {"text_encoder": "text", "text_encoder_2": "states", "transformer": "core", "unet": "core"}
    try:
        if not isinstance(model, Denoiser):
            model.load_state_dict(pipeline.vae.decoder.state_dict())
            return
        for theirs, ours in parts.items():
            if (part := getattr(pipeline, theirs, None)) is not None:
                getattr(model, ours).load_state_dict(part.state_dict())
    except (AttributeError, RuntimeError) as error:
        raise UsageError(f"the parts of {source} are those of another model: {first_line(error)}") from error


def export(work: Path, out: Path, overwrite: bool = False) -> dict[str, Any]:
    """Write the averaged weights as a folder of StableDiffusionPipeline or FluxPipeline, float16 safetensors.

    Returns facts about it.

    The text encoder's config says float32: transformers loads a model in the dtype that its config names, diffusers in
    float32, and a pipeline with both would fail at its first call.
    """
    if out.exists() and not overwrite:
        raise UsageError(f"{out} exists; pass --overwrite to replace it")
    if out.exists() and not (out / "model_index.json").exists():
        raise UsageError(f"{out} is not a pipeline folder; refusing to replace it")
    shape, tokenizer = Shape.of_work(work), data.load_tokenizer(work)
    denoiser = denoiser_of(work, shape)
    last = work / ("finish" if (work / "finish" / STATE).exists() else "denoiser")
    load_average(last, denoiser, last.name)
    routing = read_counters(last).get("task_routing")
    if routing:
        denoiser.core.register_to_config(**{CONFIG_KEY: routing})
    vae, facts = build_trained_vae(work)
    denoiser.to(memory_format=torch.contiguous_format)
    if isinstance(denoiser, FluxDenoiser):
        pipeline = build_flux_pipeline(vae, denoiser, tokenizer, data.load_states_tokenizer(work))
    else:
        pipeline = build_pipeline(vae, denoiser.text, tokenizer, denoiser.core)
    if out.exists() and (notes := notes_of(out)):  # what the model recommends
        pipeline.register_to_config(**{KEY: notes})
    pipeline.to(dtype=torch.float16)
    with replacing_folder(out) as folder:
        pipeline.save_pretrained(folder, safe_serialization=True)
        float32_text(folder)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return facts | {"megabytes": round(size / 1e6, 1)}


# ------------------------------------------------------------------------------------------- sampling
def load_pipeline(path: Path, device: torch.device | None = None) -> DiffusionPipeline:
    """A pipeline folder in float32 with DPM-Solver++, or a flow's own scheduler, without progress bars."""
    from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler

    if not (path / "model_index.json").exists():
        raise UsageError(f"{path} is not a pipeline folder; run the 'export' stage first")
    try:
        pipeline = DiffusionPipeline.from_pretrained(path, dtype=torch.float32)
    except (OSError, ValueError, RuntimeError) as error:
        raise TrainingError(f"{path} cannot be loaded: {first_line(error)}") from error
    if not is_flux(pipeline):
        pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device or "cpu")


def is_flux(pipeline: DiffusionPipeline) -> bool:
    """Whether the pipeline draws as Flux does."""
    return hasattr(pipeline, "tokenizer_2")


def generate(
    pipeline: DiffusionPipeline, prompts: list[str], steps: int = 20, guidance: float = 3.0, seed: int = 0
) -> torch.Tensor:
    """Images (N, 3, H, W) in -1..1; prompt i starts from the noise of seed + i."""
    images = []
    arguments: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance, "output_type": "pt"}
    if is_flux(pipeline):
        side = pipeline.vae.config.sample_size
        arguments |= {"true_cfg_scale": guidance, "negative_prompt": "", "height": side, "width": side}
        arguments["max_sequence_length"] = STATES_LENGTH
    for start in tqdm(range(0, len(prompts), 16), desc="generate", unit="batch", disable=None):
        part = prompts[start : start + 16]
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(part))]
        images.append(pipeline(part, generator=generators, **arguments).images.float().cpu() * 2 - 1)
    return torch.cat(images)


# ------------------------------------------------------------------------------------------- evaluation
def evaluate(
    pipeline: DiffusionPipeline,
    work: Path,
    chosen: np.ndarray,
    candidates: np.ndarray,
    count: int = 96,
    steps: int = 20,
    guidance: float = 3.0,
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Prediction error and retrieval of an exported pipeline, for trained and for held-out images.

    Args:
        pipeline: any pipeline for this data set; its own VAE and tokenizer are used.
        work: the work folder with the image cache.
        chosen: indices of the images that the pipeline was trained on, or that were held out from it.
        candidates: indices of the images among which retrieval looks for the nearest one.
        count: images generated per split, at most.
        steps, guidance: of sampling.

    Returns:
        Numbers per split: "v_error" (see `prediction_error`), and "retrieval" (see `retrieval`); and per split real
        images (first half) with the generated ones (second half).
    """
    rows, images = data.load_rows(work), data.load_images(work)
    tokenizers = [pipeline.tokenizer]
    denoiser: Denoiser
    if is_flux(pipeline):
        denoiser = FluxDenoiser(pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2).eval()
        tokenizers.append(pipeline.tokenizer_2)
    else:
        denoiser = Denoiser(pipeline.unet, pipeline.text_encoder)
    process = Process("flow" if is_flux(pipeline) else "v_prediction")
    result: dict[str, Any] = {"candidates": len(candidates), "steps": steps, "guidance": guidance}
    shown = {}
    for split in ("train", "heldout"):
        indices = data.of_split(rows, split, chosen)
        if not len(indices):
            continue
        probes = sample_of(indices, 128, seed=3)
        probed = archives.on_colours(images[probes])
        with torch.no_grad():
            encoded = [pipeline.vae.encode(part).latent_dist.mean for part in probed.split(32)]
            ids = data.token_ids(tokenizers, [archives.caption_of(rows[i]) for i in probes])
            clean = torch.cat(encoded) * pipeline.vae.config.scaling_factor
            error = prediction_error(denoiser, clean, ids, process)
        asked = sample_of(indices, count, seed=5)
        made = generate(pipeline, [archives.caption_of(rows[i]) for i in asked], steps, guidance, seed=100)
        result[split] = {"v_error": error, "retrieval": retrieval(made, rows, images, asked, candidates)}
        shown[split] = torch.cat([archives.on_colours(images[asked]), made])
    return result, shown


def retrieval(
    made: torch.Tensor, rows: list[data.Row], images: np.ndarray, asked: np.ndarray, candidates: np.ndarray
) -> dict[str, Any]:
    """Is the real sticker nearest to a generated one (24x24 RGB on white) of the asked concept?

    The shares of `evaluation.distribution.retrieval`; "psnr24" is the mean PSNR in dB to the asked sticker at 24x24.
    """
    if made.shape[-1] % THUMBNAIL:
        raise UsageError(f"retrieval compares at {THUMBNAIL} px: the image side must be a multiple of it")

    def small(drawn: torch.Tensor) -> torch.Tensor:
        return F.adaptive_avg_pool2d(drawn, THUMBNAIL)

    real = torch.cat(
        [small(archives.on_colours(images[candidates[i : i + 256]])) for i in range(0, len(candidates), 256)]
    )
    thumbnails = small(made)
    order = torch.cdist(thumbnails.flatten(1), real.flatten(1)).argsort(1).tolist()
    wanted, found = ([[rows[i][key] for i in part] for key in ("slug", "style")] for part in (asked, candidates))
    target = small(archives.on_colours(images[asked]))
    return hit_shares(order, *wanted, *found) | {"psnr24": round(mean_psnr(thumbnails, target), 2)}
