"""optimum-intel's OVDiffusionPipeline on a pipeline's folder, in an environment of its own, since its pins collide with
ours. There this package need not be installed: nothing of it is imported here. See `lines`.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

HINTS = {"float32": "f32", "bfloat16": "bf16"}
_open: list[Exported] = []


def unfit(_kind: str, pipe: DiffusionPipeline) -> str | None:
    """That a pipeline is not on the CPU; None if it is. What it can export it says itself."""
    return None if str(pipe.device) == "cpu" else f"optimum-intel is compared on the CPU, and this is on {pipe.device}"


def handle(command: dict[str, Any]) -> Any:
    """Open a pipeline, or do with it what is asked."""
    if "job" in command:
        _open[:] = [Exported(command)]
        return None
    return getattr(_open[0], command["do"])(command)


class Exported:
    """A pipeline as OpenVINO's graphs, with static shapes: one image a call."""

    def __init__(self, told: dict[str, Any]) -> None:
        import diffusers  # another version than this package's
        from optimum.intel import OVDiffusionPipeline  # optional package

        job, (name, config) = told["job"], told["scheduler"]
        hints = {"INFERENCE_PRECISION_HINT": HINTS[told["settings"]["precision"]], "PERFORMANCE_HINT": "LATENCY"}
        hints["INFERENCE_NUM_THREADS"] = str(job["threads"])
        pipe = OVDiffusionPipeline.from_pretrained(told["folder"], export=True, compile=False, ov_config=hints)
        size = {name: job["options"].get(name) for name in ("height", "width")}
        if all(size.values()):
            pipe.reshape(batch_size=1, num_images_per_prompt=1, **size)
        pipe.compile()
        pipe.scheduler = getattr(diffusers, name).from_config(config)
        pipe.set_progress_bar_config(disable=True)
        self.pipe, self.job = pipe, job

    def image(self, number: int) -> Any:
        """One image, (H, W, 3) in 0..1."""
        import torch  # heavy: torch

        job = self.job
        generator = torch.Generator("cpu").manual_seed(job["seed"] + number)
        call = {"num_inference_steps": job["steps"], "generator": generator, "output_type": "np"}
        return self.pipe(prompt=job["prompts"][number], **call, **job["options"]).images[0]

    def images(self, command: dict[str, Any]) -> None:
        """Write all images to a file, (N, 3, H, W) in 0..1."""
        import numpy as np  # heavy: NumPy

        images = np.stack([self.image(number) for number in range(len(self.job["prompts"]))])
        np.save(command["to"], images.transpose(0, 3, 1, 2).astype(np.float32).clip(0, 1))

    def seconds(self, _command: dict[str, Any]) -> float:
        """Of one image."""
        start = time.perf_counter()
        self.image(0)
        return time.perf_counter() - start

    def facts(self, _command: dict[str, Any]) -> dict[str, Any]:
        """Nothing: the operations of its graphs are not counted."""
        return {"flops": None, "peak_mib": None}
