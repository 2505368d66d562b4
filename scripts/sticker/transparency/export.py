"""What the stages left, as the folder that `--transparent` loads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from diffusion_accel.outputs import replacing_folder
from diffusion_accel.training.files import UsageError
from diffusion_accel.transparency.files import ADAPTER
from diffusion_accel.transparency.weights import write_digests
from sticker.low_rank import low_rank_changes

from .denoiser import trained_denoiser
from .pair import STAGES, sharpen
from .tasks import DecoderTask

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


class FinishedTask(DecoderTask):
    """What the stages have left, to look at."""

    before = STAGES


def export_transparency(
    work: Path,
    pipeline: StableDiffusionPipeline,
    out: Path,
    rank: int,
    overwrite: bool = False,
    start: Path | None = None,
) -> dict[str, Any]:
    """Write encoder, decoder and, if the UNet was trained, its update as float16; returns sizes and final numbers."""
    if out.exists() and not overwrite:
        raise UsageError(f"{out} exists; choose another folder or pass --overwrite")
    task = FinishedTask(work, pipeline.vae, start)
    sharpen(task.model.decoder)
    pair = task.model.half().float().eval()
    with torch.no_grad():
        facts = task.evaluate()
    with replacing_folder(out) as temporary:
        pair.encoder.half().save_pretrained(temporary / "encoder")
        pair.decoder.half().to(memory_format=torch.contiguous_format).save_pretrained(temporary / "decoder")
        if (work / "transparency" / "unet").exists():
            trained = trained_denoiser(work, pipeline, rank)
            save_file(low_rank_changes(trained.core, pipeline.unet), temporary / ADAPTER)
        write_digests(temporary)
    for file in out.rglob("*.safetensors"):
        file.chmod(0o644)
    return facts | {"bytes": sum(file.stat().st_size for file in out.rglob("*.safetensors"))}
