"""`estimate`: what patch parallelism would bring on so many devices, before anybody buys or rents them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffusion_accel.arguments import public
from diffusion_accel.errors import ConfigurationError
from diffusion_accel.io import shown
from diffusion_accel.measure.request import MOST_STEPS, whole
from diffusion_accel.model_files.names import find_model
from diffusion_accel.parallel.patch_parallel import PatchParallel
from diffusion_accel.progress import Progress, silent

from .architectures import ARCHITECTURES, make_subject
from .measure_link import measure_link
from .recording import record_busiest
from .simulate import DEVICE_PROFILES, LINKS, DeviceProfile, Link, Prediction, predict

HERE = "here"
MOST_DEVICES = 64
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Estimate:
    """Time and traffic of an image on different numbers of devices.

    Attributes:
        predictions: one for each number of devices, fewest first.
        settings: of patch parallelism.
        steps: denoising steps of the image.
    """

    predictions: tuple[Prediction, ...]
    settings: PatchParallel
    steps: int

    @property
    def exact_steps(self) -> int:
        """How many of the steps are exact; all of them where no number of devices has other ones."""
        return min(self.steps, self.settings.warmup) if any(p.stale for p in self.predictions) else self.steps

    def rows(self, layers: bool = False) -> list[dict[str, Any]]:
        """A row of JSON values for each number of devices, and with `layers` seconds and bytes of each layer."""
        first = self.predictions[0]
        found = [_row(prediction, first) for prediction in self.predictions]
        for row, prediction in zip(found, self.predictions, strict=True):
            if layers:
                row["layers"] = {name: {"seconds": s, "bytes": b} for name, (s, b) in prediction.layers.items()}
        return found


@public
def estimate(
    model: str | Path = "sdxl",
    *,
    devices: Sequence[int] = (1, 2, 4, 8),
    steps: int = 50,
    guidance_scale: float = 7.5,
    height: int = 1024,
    width: int = 1024,
    batch: int = 1,
    decode: bool = True,
    patch_parallel: PatchParallel | None = None,
    machine: str | DeviceProfile = "a100",
    link: str | Link = "nvlink3",
    dtype: str | None = None,
    threads: int = 1,
    progress: Progress = silent,
) -> Estimate:
    """Predict time and traffic of patch parallelism for a model, a size and any number of devices.

        for row in estimate("sdxl", devices=(1, 4), link="pcie4").rows():
            print(row["devices"], row["picture_s"], row["speedup"])

    A simulation: what each device computes and sends is that of a real run, without its numbers; times follow from the
    machine and the link. No weights are loaded.

    Args:
        model: "sd15" or "sdxl" (architectures), embedded name, folder, or hub id.
        devices: how many, each 1 to 64.
        steps: denoising steps.
        guidance_scale: any but 1 is classifier-free guidance: twice the batch.
        height, width: pixels, multiples of what the VAE makes smaller (8, usually).
        batch: images in a call.
        decode: with the VAE's decoder.
        patch_parallel: settings of the feature; None: the recommended ones.
        machine: "a100", "h100", "rtx4090", rates of one, or "here": times are measured on this machine.
        link: "nvlink3", "nvlink4", "pcie4", "pcie5", "ethernet-100g", "ethernet-10g", "here", numbers of one, or
            "GB/S:MICROSECONDS" for one direction.
        dtype: of the U-Net, "float32", "float16" or "bfloat16"; None: float16, measured float32.
        threads: CPU threads of a process where times are measured.
        progress: told which number of devices is being simulated.

    Returns:
        A prediction for each number of devices.

    Raises:
        ConfigurationError: a number or a name that is not allowed, a size that the model cannot draw.
        UnsupportedPipelineError: the model has no U-Net for images.
        ModelLoadError: the model's configuration cannot be read.
    """
    settings = PatchParallel() if patch_parallel is None else patch_parallel
    if not isinstance(settings, PatchParallel):
        raise ConfigurationError(f"patch_parallel must be PatchParallel or None, got {shown(settings)}")
    if not isinstance(devices, Sequence):
        raise ConfigurationError(f"devices must be a list of whole numbers, got {shown(devices)}")
    if isinstance(guidance_scale, bool) or not isinstance(guidance_scale, int | float):
        raise ConfigurationError(f"guidance_scale must be a number, got {shown(guidance_scale)}")
    counts = _counts(devices, settings)
    whole("steps", steps, 1, MOST_STEPS), whole("batch", batch), whole("threads", threads)
    whole("height", height, 8), whole("width", width, 8)
    if dtype is not None and dtype not in _DTYPES:
        raise ConfigurationError(f"dtype must be one of {', '.join(_DTYPES)}, got {shown(dtype)}")
    measured = machine == HERE
    profile, wire = machine_of(machine), link_of(link)
    if measured:
        torch.set_num_threads(threads)
    name = os.fspath(model)
    subject = make_subject(
        name,
        name if name in ARCHITECTURES else find_model(name).location,
        height,
        width,
        batch,
        guidance_scale != 1,
        decode,
        _DTYPES[dtype or ("float32" if measured else "float16")],
        "cpu" if measured else "meta",
    )
    found = []
    for number, count in enumerate(counts):
        progress(f"{count} devices", number / len(counts))
        found.append(predict(record_busiest(subject, settings, count), count, profile, wire, steps, settings.warmup))
    return Estimate(tuple(found), settings, steps)


def machine_of(machine: str | DeviceProfile) -> DeviceProfile:
    """The rates of a machine by its name; those of "here" are not used, since times are measured.

    Raises:
        ConfigurationError: there is no machine of this name.
    """
    if isinstance(machine, DeviceProfile):
        return machine
    if machine not in DEVICE_PROFILES and machine != HERE:
        raise ConfigurationError(f"machine must be one of {', '.join(DEVICE_PROFILES)} or {HERE}, got {shown(machine)}")
    return DEVICE_PROFILES.get(machine, DEVICE_PROFILES["a100"])


def link_of(link: str | Link) -> Link:
    """A link by its name, measured here, or from "GB/S:MICROSECONDS".

    Raises:
        ConfigurationError: the text is none of these.
    """
    if isinstance(link, Link):
        return link
    if link in LINKS:
        return LINKS[link]
    if link == HERE:
        return measure_link()
    bandwidth, _, latency = str(link).partition(":")
    try:
        found = Link(float(bandwidth) * 1e9, float(latency) * 1e-6)
    except ValueError:
        found = Link(0, 0)
    if not (0 < found.bandwidth < 1e15 and 0 <= found.latency < 1):
        raise ConfigurationError(
            f"link must be one of {', '.join(LINKS)}, {HERE}, or GB/s:microseconds such as 25:20, got {shown(link)}"
        )
    return found


def _counts(devices: Sequence[int], settings: PatchParallel) -> list[int]:
    counts = sorted({whole("devices", count, 1, MOST_DEVICES) for count in devices})
    if not counts:
        raise ConfigurationError("devices must be one or more numbers, got none")
    if settings.cfg_parallel and (odd := [n for n in counts if n > 1 and n % 2]):
        raise ConfigurationError(f"cfg_parallel needs an even number of devices, not {odd[0]}")
    return counts


def _row(found: Prediction, first: Prediction) -> dict[str, Any]:
    return {
        "devices": found.devices,
        "picture_s": found.image,
        "speedup": first.image / found.image,
        "exact_step_s": found.exact.seconds,
        "stale_step_s": found.stale.seconds if found.stale else None,
        "decoding_s": found.decoding.seconds,
        "exact_step_bytes": found.exact.sent,
        "stale_step_bytes": found.stale.sent if found.stale else None,
        "hidden": found.hidden,
        "buffer_bytes": found.buffers,
    }
